"""A tiny cache whose content anybody can compute by hand: no model, no floating-point rounding."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from hf_freezecache.cache.fingerprint import Fingerprint
from hf_freezecache.cache.shard_writer import CachePlan
from hf_freezecache.cache.writer import (
    BuildReport,
    build_cache,
)
from hf_freezecache.codecs import make_codec
from hf_freezecache.data.collators import CheckedCollator, Collator
from hf_freezecache.data.layout import ChunkLayout
from hf_freezecache.data.views import ViewDataset

VIEW_SEED = 7


class Rows(Dataset):
    """Row ``i`` is an image of two pixels: ``i``, and a number drawn from Python's and NumPy's generators."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, row: int) -> dict[str, Any]:
        draw = random.getrandbits(10) + np.random.randint(1024)
        return {
            "pixel_values": torch.tensor([[[row, draw]]], dtype=torch.float32),
            "labels": row % 3,
            "mask": torch.tensor([row % 2 == 0, True]),
            "weights": torch.tensor([row / 8, -row / 4]),
        }


def prefix(pixel_values: torch.Tensor) -> torch.Tensor:
    """(batch, 1, 1, 2) -> (batch, 2, 3): the row in token 0, the draw in token 1, eighths beside them."""
    return pixel_values[:, 0, 0, :, None] + torch.arange(3) / 8


def make_plan(
    num_samples: int = 8, chunk_size: int = 3, shard_chunks: int = 2, num_views: int = 2, **components: str
) -> CachePlan:
    return CachePlan(
        fingerprint=Fingerprint({"data": "rows", "prefix weights": "none", **components}),
        split_point=2,
        image_shape=(1, 1, 2),
        num_views=num_views,
        layout=ChunkLayout(num_samples, chunk_size, seed=3),
        shard_chunks=shard_chunks,
        codec=make_codec("lossless"),
    )


def make_views(plan: CachePlan) -> ViewDataset:
    return ViewDataset(Rows(plan.layout.num_samples), VIEW_SEED)


def build(
    cache_dir: Path, plan: CachePlan, batch_size: int = 4, collate: Collator = default_collate, **settings: Any
) -> BuildReport:
    arguments = {"views": make_views(plan), "collate": CheckedCollator(collate), "prefix": prefix, **settings}
    return build_cache(cache_dir, plan, batch_size=batch_size, **arguments)
