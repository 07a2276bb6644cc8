"""Writes ``tests/golden/v2``, ``tests/golden/v2-copies`` and ``tests/golden/codecs/<name>``. Run it by hand, once per folder; no test ever does.

    python tests/golden/make_golden.py

It adds what is missing and never replaces what exists. A change of what it writes into ``v2`` or ``v2-copies`` is a change of
the format: raise ``FORMAT_VERSION`` and write into a new folder beside this one. A change of what a codec makes of its frames is one
too: caches that hold such frames are of no use any more.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent / "v2"
COPIES = GOLDEN.parent / "v2-copies"
CODECS = GOLDEN.parent / "codecs"
sys.path.insert(0, str(GOLDEN.parents[1]))

import datasets  # noqa: E402
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402
import zstandard  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from support import tiny_copies  # noqa: E402
from support.tiny_cache import build, make_plan  # noqa: E402

from hf_freezecache.codecs import (  # noqa: E402
    PRESETS,
    Codec,
    Transform,
)
from hf_freezecache.codecs.array_names import BASE, main_array  # noqa: E402


def environment() -> dict[str, str]:
    """Versions on which bytes may depend that the format does not fix."""
    return {
        "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
        "pyarrow": pa.__version__,
        "datasets": datasets.__version__,
    }


def write_cache(golden: Path) -> None:
    """Write a golden cache: of views that are stored alike, or of copies that are predicted from the base view."""
    with tempfile.TemporaryDirectory() as folder:
        build_here = {GOLDEN: lambda: build(Path(folder), make_plan()), COPIES: lambda: tiny_copies.build(Path(folder))}
        directory = build_here[golden]().directory
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            target = golden / directory.name / path.relative_to(directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (golden / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")


def write_codec(name: str) -> None:
    """Write configuration, fitted tensors, input, frames, and what they decode to, of one codec."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(15, 10, 8, generator=generator).cumsum(2).cumsum(1)
    codec, states = PRESETS[name], sample[12:].clone()
    if name == "lossless":
        states[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    elif name == "transform":
        codec = Codec((Transform(gradient_weight=0.5).fit(sample[:12], 1, (3, 3), sample[:12]), *codec.steps[1:]))
        states[1, 4, 2], states[2, 0, 0] = 1e20, 1e6
    frames = codec.encode(states)
    unpacked = codec.entropy_decode(frames, states.shape, states.dtype)
    if not codec.lossless:
        # Nothing lies so near the edge of rounding that other processors might decide otherwise.
        for factor in (1 - 1e-6, 1 + 1e-6):
            moved = codec.entropy_decode(codec.encode(states * factor), states.shape, states.dtype)
            assert torch.equal(moved[main_array(BASE)], unpacked[main_array(BASE)]), name
    as_arrays = [torch.frombuffer(bytearray(frame), dtype=torch.uint8) for frame in frames]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "codec.json").write_text(json.dumps(codec.to_dict(), indent=1) + "\n")
        if codec.tensors():
            save_file(codec.tensors(), folder / "tensors.safetensors")
        save_file({"hidden_states": states}, folder / "input.safetensors")
        save_file({f"{number:02d}": frame for number, frame in enumerate(as_arrays)}, folder / "frames.safetensors")
        save_file(unpacked, folder / "unpacked.safetensors")
        save_file({"hidden_states": codec.decode(frames, states.shape, states.dtype)}, folder / "expected.safetensors")
        (CODECS / name).mkdir(parents=True)
        for path in sorted(folder.iterdir()):
            (CODECS / name / path.name).write_bytes(path.read_bytes())


if __name__ == "__main__":
    folders = [GOLDEN, COPIES, *(CODECS / name for name in PRESETS)]
    missing = [folder for folder in folders if not folder.exists()]
    for folder in folders:
        if folder not in missing:
            print(f"{folder} exists. Golden files are never replaced; for a new format make a new folder.")
    if not missing:
        sys.exit("Nothing is missing.")
    for folder in missing:
        write_cache(folder) if folder in (GOLDEN, COPIES) else write_codec(folder.name)
        print(f"Wrote {folder}.")
