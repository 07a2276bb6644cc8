"""Caches of made-up hidden states, for benchmarks that need no model: sample ``i`` holds row ``i`` of a table, again and again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_freezecache.cache.fingerprint import Fingerprint
from hf_freezecache.cache.shard_writer import CachePlan
from hf_freezecache.cache.writer import build_cache
from hf_freezecache.codecs import Codec
from hf_freezecache.data.collators import CheckedCollator
from hf_freezecache.data.layout import ChunkLayout

SEED = 0


class RowNumbers(Dataset):  # type: ignore[type-arg]
    """Row numbers in place of images."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, key: tuple[int, int]) -> int:
        return key[0]


def collate_numbers(rows: Sequence[int]) -> dict[str, Tensor]:
    numbers = torch.tensor(rows)
    return {"pixel_values": numbers, "labels": numbers % 1000}


def build(folder: Path, rows: int, table: Tensor, codec: Codec, chunk_size: int = 32, batch_size: int = 1024) -> Path:
    """Write a cache of one view; return its folder.

    Args:
        folder: Folder of caches.
        rows: Samples.
        table: Hidden states, (any number, tokens, hidden).
        codec: How they are stored, fitted.
        chunk_size: Samples of a chunk.
        batch_size: Samples that are made at once.
    """

    def prefix(pixel_values: Tensor) -> Tensor:
        return table[pixel_values % len(table)]

    plan = CachePlan(
        Fingerprint({"rows": str(rows), "shape": str(table.shape), "codec": str(codec.to_dict())}),
        split_point=1,
        image_shape=(3, 32, 32),
        num_views=1,
        layout=ChunkLayout(rows, chunk_size, SEED),
        shard_chunks=32,
        codec=codec,
    )
    collate = CheckedCollator(collate_numbers)
    return build_cache(folder, plan, RowNumbers(rows), collate, prefix, batch_size=batch_size).directory
