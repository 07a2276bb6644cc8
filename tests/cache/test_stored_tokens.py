"""Caches that hold fewer tokens per sample than the model has: which ones they are is stored, checked and read back."""

from __future__ import annotations

import dataclasses
import io
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_cache
from torch.utils.data import default_collate

from hf_freezecache.cache.encoder import Encoder
from hf_freezecache.cache.index import load_index
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.cache.schema import TOKEN_POSITIONS
from hf_freezecache.cache.shard_file import check_token_positions
from hf_freezecache.cache.shard_writer import CachePlan, ShardWriter
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.codecs import make_codec
from hf_freezecache.dataset import CachedDataset
from hf_freezecache.errors import DataError


def states_of(pixel_values: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(batch, 1, 1, 2) -> all tokens (batch, num_tokens, 3), each of other values."""
    row, draw = pixel_values[:, 0, 0, :].T
    tokens = torch.arange(num_tokens) / 16
    return torch.stack([row[:, None] + tokens, draw[:, None] - tokens, -row[:, None] * tokens], 2)


def make_plan(num_tokens: int, codec: str = "lossless", **layout: int) -> CachePlan:
    plan = tiny_cache.make_plan(**layout, tokens=str(num_tokens))
    codec_settings = {} if codec == "lossless" else {"codec": make_codec(codec), "calibration": {}}
    return dataclasses.replace(plan, num_tokens=num_tokens, **codec_settings)


def build(cache_dir: Path, plan: CachePlan, positions: torch.Tensor, **settings: Any) -> CacheReader:
    """Store of row ``i`` the tokens at ``positions[i]``."""

    def collate(examples: list[Any]) -> dict[str, Any]:
        batch = default_collate(examples)
        rows = batch["pixel_values"][:, 0, 0, 0].long()
        return {**batch, TOKEN_POSITIONS: positions[rows]}

    def prefix(pixel_values: torch.Tensor, token_positions: torch.Tensor) -> torch.Tensor:
        states = states_of(pixel_values, plan.num_tokens)
        return states.gather(1, token_positions.long()[:, :, None].expand(-1, -1, 3))

    settings = {"collate": collate, "prefix": prefix, "prefix_inputs": frozenset({TOKEN_POSITIONS}), **settings}
    return CacheReader(tiny_cache.build(cache_dir, plan, **settings).directory)


@given(data=st.data())
def test_tokens_come_back_with_their_positions(data) -> None:
    num_tokens = data.draw(st.integers(2, 12), "tokens of the model")
    stored_tokens = data.draw(st.integers(1, num_tokens - 1), "stored tokens")
    num_samples = data.draw(st.integers(1, 7), "samples")
    dtype = data.draw(st.sampled_from([torch.int16, torch.int32]), "dtype")
    chosen = [
        sorted(data.draw(st.permutations(range(num_tokens)), f"of row {row}")[:stored_tokens])
        for row in range(num_samples)
    ]
    positions = torch.tensor(chosen, dtype=dtype)
    plan = make_plan(num_tokens, num_samples=num_samples, num_views=1)
    with tempfile.TemporaryDirectory() as folder:
        reader = build(Path(folder), plan, positions)
        assert (reader.index.num_tokens, reader.index.hidden_shape) == (num_tokens, (stored_tokens, 3))
        for chunk in range(reader.layout.num_chunks):
            decoded, rows = reader.read_chunk(0, chunk), reader.members(chunk)
            assert decoded.extras[TOKEN_POSITIONS].dtype is dtype
            assert torch.equal(decoded.extras[TOKEN_POSITIONS], positions[rows])
            images = torch.stack([tiny_cache.make_views(plan)[int(row), 0]["pixel_values"] for row in rows])
            everything = states_of(images, num_tokens)
            for sample, kept in enumerate(positions[rows].tolist()):
                assert torch.equal(decoded.hidden_states[sample], everything[sample, kept])
        assert verify_cache(reader.directory) == []


@pytest.mark.parametrize("codec", ["lossless", "int8"])
def test_samples_carry_their_positions_into_batches(tmp_path, codec) -> None:
    positions = torch.tensor([[0, 2 + row % 3] for row in range(8)], dtype=torch.int16)
    reader = build(tmp_path, make_plan(6, codec), positions)
    for packed in (False, True):
        item = CachedDataset(reader, packed=packed)[4, 1]
        assert item[TOKEN_POSITIONS].tolist() == [0, 3]
    assert load_index(reader.directory).num_tokens == 6


def test_all_tokens_need_no_positions(tmp_path) -> None:
    plan = dataclasses.replace(tiny_cache.make_plan(), num_tokens=2)
    directory = tiny_cache.build(tmp_path / "stated", plan).directory
    default = tiny_cache.build(tmp_path / "default", tiny_cache.make_plan()).directory
    assert (directory / "index.json").read_bytes() == (default / "index.json").read_bytes()
    assert load_index(directory).num_tokens == 2


# ---- What is refused ----


@pytest.mark.parametrize(
    ("positions", "sample"),
    [([[0, 1], [1, 1]], 1), ([[2, 1], [0, 1]], 0), ([[0, 5], [0, 1]], 0), ([[0, 1], [-1, 1]], 1), ([[-2, -1]], 0)],
    ids=["twice", "descending", "too large", "negative", "all negative"],
)
def test_positions_that_are_none_are_refused(tmp_path, positions, sample) -> None:
    with pytest.raises(
        ValueError, match=rf"of its sample {sample} begin with .* expected ascending numbers from 0 to 4"
    ):
        check_token_positions(torch.tensor(positions, dtype=torch.int16), 5)
    stored = torch.tensor([[0, 1]] * 5 + [positions[sample]] + [[0, 1]] * 2, dtype=torch.int16)

    def prefix(pixel_values: torch.Tensor, token_positions: torch.Tensor) -> torch.Tensor:
        return tiny_cache.prefix(pixel_values)

    with pytest.raises(DataError, match=r"cannot be stored: token_positions .* Sort the positions"):
        build(tmp_path, make_plan(5), stored, prefix=prefix)


def test_the_largest_positions_are_taken() -> None:
    check_token_positions(torch.tensor([[0, 4], [3, 4]], dtype=torch.int16), 5)
    check_token_positions(torch.tensor([[32767]], dtype=torch.int16), 2**20)
    check_token_positions(torch.zeros(0, 3, dtype=torch.int16), 5)


def append(plan: CachePlan, stored_tokens: int, extras: dict[str, torch.Tensor]) -> None:
    with closing(Encoder()) as encoder:
        ShardWriter(io.BytesIO(), plan, 0, 0, encoder).append(torch.zeros(2, stored_tokens, 3), extras)


@pytest.mark.parametrize(
    ("num_tokens", "positions", "message"),
    [
        (5, None, r"2 of 5 tokens are stored per sample, and token_positions is \[\]"),
        (5, torch.zeros(2, 3, dtype=torch.int16), r"expected int16 or int32 of shape \[2\]"),
        (5, torch.zeros(2, dtype=torch.int16), r"expected int16 or int32 of shape \[2\]"),
        (5, torch.tensor([[0, 1]] * 2), r"expected int16 or int32 of shape \[2\]"),
        (5, torch.tensor([[0.0, 1.0]] * 2), r"expected int16 or int32 of shape \[2\]"),
        (2, torch.tensor([[0, 1]] * 2, dtype=torch.int16), "reserved for samples with fewer tokens"),
        (None, torch.tensor([[0, 1]] * 2, dtype=torch.int16), "reserved for samples with fewer tokens"),
        (1, None, "2 tokens are stored per sample, but the model has 1"),
    ],
    ids=["missing", "too many", "no axis", "int64", "float", "superfluous", "superfluous by default", "too few tokens"],
)
def test_positions_that_do_not_fit_the_tokens_are_refused(num_tokens, positions, message) -> None:
    plan = dataclasses.replace(tiny_cache.make_plan(), num_tokens=num_tokens)
    with pytest.raises(DataError, match=message):
        append(plan, 2, {} if positions is None else {TOKEN_POSITIONS: positions})
