"""Hostile values: hidden states, geometries, positions of tokens, steps."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import torch

from hf_freezecache.cache.schema import TOKEN_POSITIONS
from hf_freezecache.codecs.entropy import compress_frame

from .cases import case
from .tools import Shard, document_of, seal, set_frame, set_states


@case()
def hidden_states_of_nan(cache: Path) -> None:
    set_states(cache, float("nan"))


@case()
def hidden_states_of_infinity(cache: Path) -> None:
    set_states(cache, float("inf"), view=1)


@case("copies")
def copies_of_nan(cache: Path) -> None:
    set_states(cache, float("nan"), view=1)


@case("copies")
def base_of_copies_of_infinity(cache: Path) -> None:
    set_states(cache, -float("inf"), view=0)


@case("copies")
def copies_that_overflow_with_their_prediction(cache: Path) -> None:
    """Each finite, their sum not."""
    set_states(cache, 3e38, view=0)


def _geometry_case(name: str, values: list[float], view: int) -> None:
    def tamper(cache: Path) -> None:
        set_frame(cache, compress_frame(torch.tensor([values] * 2).numpy().tobytes(), 3), number=5, view=view)

    tamper.__name__ = name
    case("copies")(tamper)


_geometry_case("geometry_of_nan", [0.0, float("nan"), 1.0, 1.0, 0.0], 1)
_geometry_case("geometry_without_extent", [0.5, 0.0, 0.5, 1.0, 0.0], 0)
_geometry_case("geometry_of_infinity", [0.0, 0.0, float("inf"), 1.0, 0.0], 2)


def _positions_case(name: str, values: list[list[int]]) -> None:
    def tamper(cache: Path) -> None:
        number = 4 + [extra["name"] for extra in document_of(cache)["extras"]].index(TOKEN_POSITIONS)
        set_frame(cache, compress_frame(torch.tensor(values, dtype=torch.int16).numpy().tobytes(), 3), number=number)

    tamper.__name__ = name
    case("few_tokens")(tamper)


_positions_case("token_position_out_of_range", [[0, 1], [0, 7], [0, 1]])
_positions_case("token_position_negative", [[0, 1], [0, 1], [-1, 1]])
_positions_case("token_position_twice", [[0, 1], [3, 3], [0, 1]])
_positions_case("token_positions_that_descend", [[2, 1], [0, 1], [0, 1]])
_positions_case("token_positions_of_another_size", [[0, 1], [0, 1]])


def set_tokens(cache: Path, num_tokens: int, rename: str = TOKEN_POSITIONS) -> None:
    """Change the number of tokens of the model, and the name of the extra, in the index and in all shards."""
    document = document_of(cache)
    document["num_tokens"] = num_tokens
    for extra in document["extras"]:
        extra["name"] = rename if extra["name"] == TOKEN_POSITIONS else extra["name"]
    for view, shard in itertools.product(range(2), range(2)):
        opened = Shard(cache, view, shard)
        opened.header["__metadata__"]["extras"] = json.dumps(document["extras"], sort_keys=True)
        opened.header["__metadata__"]["num_tokens"] = str(num_tokens)
        opened.write(sealed=False)
    seal(cache, document)


@case("few_tokens")
def more_tokens_stored_than_the_model_has(cache: Path) -> None:
    set_tokens(cache, 1)


@case("few_tokens")
def token_positions_where_all_tokens_are_stored(cache: Path) -> None:
    set_tokens(cache, 2)


@case("few_tokens")
def fewer_tokens_than_some_positions_need(cache: Path) -> None:
    set_tokens(cache, 3)


@case("few_tokens")
def tokens_without_positions(cache: Path) -> None:
    set_tokens(cache, 7, rename="other_positions")


@case()
def fewer_tokens_without_positions(cache: Path) -> None:
    set_tokens(cache, 5)


@case("few_tokens")
def token_positions_of_another_dtype(cache: Path) -> None:
    document = document_of(cache)
    (extra,) = [extra for extra in document["extras"] if extra["name"] == TOKEN_POSITIONS]
    extra.update(dtype="uint16")
    seal(cache, document)


@case()
def tokens_of_the_model_in_the_index_only(cache: Path) -> None:
    seal(cache, num_tokens=2**20)


@case("int8")
def steps_of_nan(cache: Path) -> None:
    step = np.full(6, np.nan, np.float32).view(np.uint8).reshape(-1, 4).T
    shard = Shard(cache)
    shard.chunks[0][10:14] = [compress_frame(plane.tobytes(), 1) for plane in step]
    shard.write()


@case("int8")
def steps_that_overflow(cache: Path) -> None:
    step = np.full(6, 3e38, np.float32).view(np.uint8).reshape(-1, 4).T
    shard = Shard(cache)
    shard.chunks[0][10:14] = [compress_frame(plane.tobytes(), 1) for plane in step]
    shard.write()


@case("transform")
def prefix_tokens_of_nan(cache: Path) -> None:
    tokens = np.full(18, np.nan, np.float16).view(np.uint8).reshape(-1, 2).T
    shard = Shard(cache)
    shard.chunks[0][10:12] = [compress_frame(plane.tobytes(), 1) for plane in tokens]
    shard.write()
