"""A tiny cache of predicted views whose content anybody can compute by hand: exact in binary, without any random draw.

Row ``i`` is an image of 2 x 2 patches, ``i`` plus 0, 2, 4 and 6. View 1 is its mirror image plus a half; view 2 is its upper left
quarter, enlarged: of the numbers 0, 0.5, 1 and 1.5 above ``i``, and ``i`` more. A patch has three channels: the number, its
double and four times the number; before the patches comes a token of ones.

The prediction takes the first two channels from the base view (at 1 and 2 times a scale of 1 and a half) and nothing of the
third, and adds a quarter to all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from hf_freezecache.cache.fingerprint import Fingerprint
from hf_freezecache.cache.shard_writer import CachePlan
from hf_freezecache.cache.writer import (
    BuildReport,
    build_cache,
)
from hf_freezecache.codecs import (
    CopyCodec,
    Predictor,
    make_codec,
)
from hf_freezecache.codecs.base import digest
from hf_freezecache.data.collators import CheckedCollator
from hf_freezecache.data.geometry import GEOMETRY_NAME
from hf_freezecache.data.layout import ChunkLayout

NUM_SAMPLES, NUM_VIEWS = 5, 3
GEOMETRIES = [(0.0, 0.0, 1.0, 1.0, 0.0), (0.0, 0.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.5, 0.5, 0.0)]


def patches(row: int, view: int) -> list[float]:
    """The four numbers of a view, row by row."""
    return [
        [row + 0.0, row + 2.0, row + 4.0, row + 6.0],
        [row + 2.5, row + 0.5, row + 6.5, row + 4.5],
        [row * 2 + 0.0, row * 2 + 0.5, row * 2 + 1.0, row * 2 + 1.5],
    ][view]


def moved(row: int, view: int) -> list[float]:
    """The four numbers that the base view has at the place of a view. Beyond its outer centres there is its border.

    The tokens of the quarter lie at an eighth and three eighths of the image, those of the base at a quarter and three
    quarters: the first is before all, the second a quarter of the way to the next.
    """
    return [
        [row + 0.0, row + 2.0, row + 4.0, row + 6.0],
        [row + 2.0, row + 0.0, row + 6.0, row + 4.0],
        [row + 0.0, row + 0.5, row + 1.0, row + 1.5],
    ][view]


class Views(Dataset):
    """Items by ``(row, view)``."""

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        row, view = key
        return {
            "pixel_values": torch.tensor(patches(row, view)).reshape(1, 2, 2),
            "labels": row % 3,
            GEOMETRY_NAME: torch.tensor(GEOMETRIES[view]),
        }


def prefix(pixel_values: torch.Tensor) -> torch.Tensor:
    """(batch, 1, 2, 2) -> (batch, 5, 3)."""
    tokens = pixel_values.flatten(1)[:, :, None] * torch.tensor([1.0, 2.0, 4.0])
    return torch.cat([torch.ones(len(tokens), 1, 3), tokens], 1)


def make_copies() -> CopyCodec:
    """The codec of views 1 and 2; residuals are exact."""
    tensors = {
        "gains": torch.tensor([[1, 2, 0]], dtype=torch.int8),
        "scale": torch.tensor([1.0, 0.5, 1.0]),
        "mean": torch.full((4, 3), 0.25, dtype=torch.float16),
    }
    return CopyCodec(make_codec("lossless"), Predictor(0.0, False, 1, (2, 2), digest(tensors), **tensors))


def make_plan() -> CachePlan:
    return CachePlan(
        fingerprint=Fingerprint({"data": "rows", "copies": "residual"}),
        split_point=2,
        image_shape=(1, 2, 2),
        num_views=NUM_VIEWS,
        layout=ChunkLayout(NUM_SAMPLES, 2, seed=3),
        shard_chunks=3,
        codec=make_codec("lossless"),
        copies=make_copies(),
        copies_calibration={"storage": "residual"},
    )


def build(cache_dir: Path, batch_size: int = 4) -> BuildReport:
    return build_cache(cache_dir, make_plan(), Views(), CheckedCollator(default_collate), prefix, batch_size=batch_size)
