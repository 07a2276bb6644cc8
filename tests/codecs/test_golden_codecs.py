"""Every codec against frames of old, which caches on disks hold: they decode to what they did, and are made as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_freezecache.codecs import (
    PRESETS,
    Codec,
    codec_from_dict,
)
from hf_freezecache.codecs.array_names import BASE, main_array, side_array
from hf_freezecache.codecs.entropy import decompress_frame

GOLDEN = Path(__file__).parents[1] / "golden" / "codecs"
every_codec = pytest.mark.parametrize("name", PRESETS)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def stored(name: str) -> tuple[Codec, torch.Tensor, list[bytes]]:
    """Codec, input and frames."""
    folder = GOLDEN / name
    path = folder / "tensors.safetensors"
    codec = codec_from_dict(json.loads((folder / "codec.json").read_text()), load_file(path) if path.exists() else None)
    frames = [bits(frame) for _, frame in sorted(load_file(folder / "frames.safetensors").items())]
    return codec, load_file(folder / "input.safetensors")["hidden_states"], frames


def contents(frames: list[bytes]) -> list[bytes]:
    """Without zstd, whose releases may compress differently."""
    return [decompress_frame(frame, 2**16, at_most=True) for frame in frames]


def test_every_preset_has_golden_files() -> None:
    """A new one needs them: add them with ``make_golden.py``."""
    expected = {"codec.json", "input.safetensors", "frames.safetensors", "unpacked.safetensors", "expected.safetensors"}
    assert {folder.name for folder in GOLDEN.iterdir()} == set(PRESETS)
    for name in PRESETS:
        files = {path.name for path in (GOLDEN / name).iterdir()}
        assert files - {"tensors.safetensors"} == expected
        assert ("tensors.safetensors" in files) == (name == "transform")


@every_codec
def test_todays_code_reads_the_configuration(name) -> None:
    codec, _, _ = stored(name)
    assert codec.to_dict() == json.loads((GOLDEN / name / "codec.json").read_text())
    if name != "transform":
        assert codec == PRESETS[name], "the preset makes other frames now: give it another name, or change nothing"


@every_codec
def test_todays_code_decodes_the_frames(name) -> None:
    codec, states, frames = stored(name)
    unpacked = codec.entropy_decode(frames, states.shape, states.dtype)
    expected = load_file(GOLDEN / name / "unpacked.safetensors")
    assert unpacked.keys() == expected.keys()
    for key, array in expected.items():
        # `pack` gives int8 where that holds all values, and once gave the dtype that was packed.
        small = array.dtype == torch.int16 and bool(array.min() >= -128 and array.max() <= 127)
        assert unpacked[key].dtype == (torch.int8 if small else array.dtype)
        assert unpacked[key].shape == array.shape
        assert bits(unpacked[key].to(array.dtype)) == bits(array), key
    decoded = codec.decode(frames, states.shape, states.dtype)
    reference = load_file(GOLDEN / name / "expected.safetensors")["hidden_states"]
    torch.testing.assert_close(decoded, reference, rtol=1e-6, atol=1e-5, equal_nan=True)
    if codec.lossless:
        assert bits(decoded) == bits(states)
    else:
        error = (reference.double() - states.double()).square().mean((1, 2)).sqrt()
        assert bool((error <= codec.error_bound(states)).all())


@every_codec
def test_todays_code_makes_the_same_frames(name) -> None:
    codec, states, frames = stored(name)
    assert contents(codec.encode(states)) == contents(frames)


def test_the_frames_hold_every_kind_of_array() -> None:
    """Tokens that are kept as they are, and a prefix token."""
    unpacked = load_file(GOLDEN / "transform" / "unpacked.safetensors")
    assert unpacked.keys() == {
        main_array(BASE),
        *(side_array(BASE, 0, name) for name in ("prefix", "exact", "is_exact")),
    }
    assert unpacked[side_array(BASE, 0, "is_exact")].nonzero().tolist() == [[1, 4], [2, 0]]
