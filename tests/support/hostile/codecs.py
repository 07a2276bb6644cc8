"""Hostile codecs: what they name, and what was fitted."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from hf_freezecache.cache.codec_state import CodecState, save_state
from hf_freezecache.codecs import PRESETS

from .cases import GIB, case, fitted
from .tools import document_of, edit_state, seal, set_codec, set_predictor, set_transform, zeros, zstd_frame


@case("transform")
def state_of_nan(cache: Path) -> None:
    set_transform(cache, scale=torch.full((6,), torch.nan))


@case("transform")
def state_of_infinity(cache: Path) -> None:
    set_transform(cache, scale=torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, torch.inf]))


@case("transform")
def state_that_overflows(cache: Path) -> None:
    set_transform(cache, scale=torch.full((6,), 3e38))


@case("transform")
def state_with_a_huge_step(cache: Path) -> None:
    set_transform(cache, step=1e300)


@case("transform")
def state_with_a_mean_of_another_shape(cache: Path) -> None:
    set_transform(cache, mean=torch.zeros(1, 6, dtype=torch.int32))


@case("transform")
def state_with_a_scale_of_one(cache: Path) -> None:
    """It would be broadcast."""
    set_transform(cache, scale=torch.ones(1))


@case("transform")
def state_with_a_basis_that_is_not_square(cache: Path) -> None:
    set_transform(cache, basis=torch.ones(6, 1, dtype=torch.int8))


@case("transform")
def state_with_an_absurd_grid(cache: Path) -> None:
    set_transform(cache, grid=(10**6, 10**6))


@case("transform")
def state_with_an_absurd_number_of_prefix_tokens(cache: Path) -> None:
    set_transform(cache, prefix_tokens=10**12)


@case("transform")
def state_of_another_cache(cache: Path) -> None:
    save_state(cache / "codec.safetensors", "0" * 64, CodecState(fitted(), {}))
    seal(cache)


@case("transform")
def state_with_an_entry_that_no_state_has(cache: Path) -> None:
    edit_state(cache, hook="x")
    seal(cache)


@case("transform")
def state_without_its_tensors(cache: Path) -> None:
    (cache / "codec.safetensors").write_bytes(safetensors.torch.save({}, {"hf_freezecache": "{}"}))
    seal(cache)


@case("transform")
def state_of_gigabytes(cache: Path) -> None:
    """A basis of 32768 channels: frames that hold what they claim."""
    frame = torch.frombuffer(bytearray(zstd_frame(GIB, zeros(GIB))), dtype=torch.uint8)
    tensors = {"0.basis": ["int8", [2**15, 2**15]], "0.mean": ["int32", [4, 6]], "0.scale": ["float32", [6]]}
    edit_state(cache, frames={"0.basis": frame}, tensors=tensors)
    seal(cache)


@case("transform")
def state_that_claims_exabytes(cache: Path) -> None:
    edit_state(
        cache, tensors={"0.basis": ["int8", [6, 6]], "0.mean": ["int32", [2**31, 2**31]], "0.scale": ["float32", [6]]}
    )
    seal(cache)


@case("transform")
def state_with_a_header_of_60_megabytes(cache: Path) -> None:
    path = cache / "codec.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = b'{"x":[' + b"{}," * (20 * 2**20) + b"{}]," + raw[9 : 8 + length]
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    seal(cache)


@case("transform")
def state_nested_deeply(cache: Path) -> None:
    path = cache / "codec.safetensors"
    header = b'{"__metadata__":{"hf_freezecache":"' + b"[" * 100_000 + b"]" * 100_000 + b'"}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    seal(cache)


@case("transform")
def state_of_a_sparse_terabyte(cache: Path) -> None:
    os.truncate(cache / "codec.safetensors", 2**40)
    document = document_of(cache)
    document["files"]["codec.safetensors"]["bytes"] = 2**40
    seal(cache, document, records=False)


@case("copies")
def prediction_of_nan(cache: Path) -> None:
    set_predictor(cache, scale=torch.tensor([1.0, torch.nan, 1.0]))


@case("copies")
def prediction_with_a_mean_of_infinity(cache: Path) -> None:
    set_predictor(cache, mean=torch.full((4, 3), torch.inf, dtype=torch.float16))


@case("copies")
def prediction_that_overflows(cache: Path) -> None:
    """All of it finite."""
    set_predictor(cache, scale=torch.full((3,), 3e38))


def _codec_case(name: str, steps: Any, base: str = "int8") -> None:
    def tamper(cache: Path) -> None:
        set_codec(cache, {"name": "pipeline", "configuration": {"steps": steps}})

    tamper.__name__ = name
    case(base)(tamper)


_PACKED = [{"name": "pack", "configuration": {"zones": 10}}, {"name": "zstd", "configuration": {"level": 1}}]
_codec_case("codec_of_a_million_bits", [{"name": "quantize", "configuration": {"bits": 10**6}}, *_PACKED])
_codec_case("codec_of_an_unknown_step", [{"name": "exec", "configuration": {"code": "1"}}, *_PACKED])
_codec_case("codec_of_steps_that_are_none", 7)
_codec_case("codec_of_a_list_for_settings", [{"name": "quantize", "configuration": [8]}, *_PACKED])
_codec_case("codec_of_a_step_by_no_name", [{"name": ["quantize"], "configuration": {}}, *_PACKED])
_codec_case("codec_of_a_thousand_compressions", ["planes", *["zstd"] * 1000])
_codec_case("codec_of_a_step_of_400_digits", [{"name": "transform", "configuration": {"step": 10**38}}, *_PACKED])
_codec_case("codec_with_a_text_for_a_tensor", [{"name": "transform", "configuration": {"basis": "x"}}, *_PACKED])


@case("int8")
def codec_nested_deeply(cache: Path) -> None:
    nested: Any = 8
    for _ in range(60):
        nested = [nested]
    set_codec(
        cache,
        {"name": "pipeline", "configuration": {"steps": [{"name": "quantize", "configuration": {"bits": nested}}]}},
    )


@case("int8")
def frames_of_another_codec(cache: Path) -> None:
    """All say fp16: as many bytes, other meaning."""
    set_codec(cache, PRESETS["fp16"])
