"""The cases by name, and the sound caches that they are made of."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from hf_freezecache.cache.schema import TOKEN_POSITIONS
from hf_freezecache.codecs import PRESETS, Codec
from hf_freezecache.codecs.array_names import is_packed
from hf_freezecache.compression.step_search import fit_codec
from hf_freezecache.data.collators import collate_cached, split_packed
from hf_freezecache.dataset import CachedDataset
from support import tiny_cache

GOLDEN = Path(__file__).parents[2] / "golden"
GIB = 2**30

CASES: dict[str, tuple[str, Callable[[Path], Any]]] = {}
#: What training never reads: only ``verify_cache`` can see it.
ONLY_VERIFIED: set[str] = set()


def case(
    base: str = "lossless", only_verified: bool = False
) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    def add(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
        CASES[function.__name__] = base, function
        if only_verified:
            ONLY_VERIFIED.add(function.__name__)
        return function

    return add


def prefix(pixel_values: torch.Tensor) -> torch.Tensor:
    """(batch, 1, 1, 2) -> (batch, 5, 6): one prefix token, four patches."""
    row, draw = pixel_values[:, 0, 0, :].T
    tokens, hidden = torch.arange(5.0)[:, None], torch.arange(6.0)
    return torch.sin(row[:, None, None] * (tokens + 1) / 3 + draw[:, None, None] * (hidden + 1) / 40)


def fitted() -> Codec:
    images = torch.rand(32, 1, 1, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([8.0, 2000.0])
    return fit_codec(PRESETS["transform"], prefix(images), 1, (2, 2))


def sound_caches(folder: Path) -> dict[str, Path]:
    """Sound caches by name: golden ones, and two lossy ones built into a folder."""
    (lossless,), (copies,) = ([p for p in (GOLDEN / name).iterdir() if p.is_dir()] for name in ("v2", "v2-copies"))
    caches = {"lossless": lossless, "copies": copies}
    for name, codec in (("int8", PRESETS["int8"]), ("transform", fitted())):
        plan = dataclasses.replace(tiny_cache.make_plan(codec=name), codec=codec, calibration={})
        caches[name] = tiny_cache.build(folder / name, plan, prefix=prefix).directory
    plan = dataclasses.replace(tiny_cache.make_plan(codec="few tokens"), num_tokens=7)
    caches["few_tokens"] = tiny_cache.build(folder / "few_tokens", plan, collate=collate_few_tokens).directory
    return caches


def collate_few_tokens(examples: list[Any]) -> dict[str, Any]:
    """Say that the two tokens of ``tiny_cache`` are the first and one more of seven."""
    batch = default_collate(examples)
    rows = batch["pixel_values"][:, 0, 0, 0].to(torch.int16)
    return {**batch, TOKEN_POSITIONS: torch.stack([torch.zeros_like(rows), 1 + rows % 6], 1)}


def make_hostile(name: str, sound: dict[str, Path], folder: Path) -> Path:
    base, tamper = CASES[name]
    cache = Path(shutil.copytree(sound[base], folder / "cache"))
    tamper(cache)
    return cache


def read_all(cache: Path) -> None:
    """Read every sample of every view into batches, decoded and as training does: packed, then restored."""
    for packed in (True, False):
        dataset = CachedDataset.from_pretrained(cache)
        dataset.packed = packed
        for view in range(dataset.reader.index.num_views):
            for row in range(len(dataset)):
                batch = collate_cached(dataset.__getitems__([(row, view)]))
                if packed:
                    arrays, _ = split_packed(batch)
                    assert any(is_packed(key) for key in batch)
                    batch["hidden_states"] = dataset.reader.views.dequantize(arrays, dataset.reader.dtype)
                assert bool(torch.isfinite(batch["hidden_states"]).all()), (
                    "hidden states that are not finite in a batch"
                )
