"""A cache as a map-style data set, and the collator of its batches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .cache.fingerprint import Fingerprint
from .cache.format import GEOMETRY_NAME
from .cache.reader import CacheReader
from .views import ViewKey

__all__ = ["PACKED", "CachedDataset", "collate_cached", "split_packed"]

#: Prefix of the names of what ``Codec.unpack`` gave, in items and batches.
PACKED = "packed."

_Chunk = dict[str, Tensor]


class CachedDataset(Dataset):  # type: ignore[type-arg]
    """The samples of a cache.

    Item ``(i, v)`` is ``{"hidden_states": (tokens, hidden), "labels": ...}`` of sample ``i`` of the original data set in
    view ``v``; item ``i`` is view 0. Samples are found by their sample index, wherever they lie.

    Args:
        reader: The opened cache.
        max_chunks: Decoded chunks kept in memory. ``ChunkSampler`` needs its window and, where a batch spans two
            windows, what the batch touches of the next.
        packed: Items hold the codec's integers, as ``"packed.<name>"``, in place of ``hidden_states``. They are a
            quarter to half the size; ``ViewCodec.restore`` turns a batch of them into hidden states on the training
            device.
        geometry: Items hold ``view_geometry`` (5,), where the view lies in its image, if the cache does.
        keep_read: Chunks of which every sample was read stay until others need their room. ``ChunkSampler`` wants it
            for several processes, some of whose samples come twice.
    """

    def __init__(
        self,
        reader: CacheReader,
        max_chunks: int = 16,
        packed: bool = False,
        geometry: bool = False,
        keep_read: bool = False,
    ) -> None:
        self.reader = reader
        self.max_chunks = max_chunks
        self.packed = packed
        self.geometry = geometry
        self.keep_read = keep_read
        #: Chunks decoded so far by this process.
        self.decoded_chunks = 0
        self._chunks: OrderedDict[tuple[int, int], _Chunk] = OrderedDict()
        self._unread: dict[tuple[int, int], int] = {}

    @classmethod
    def from_pretrained(cls, path: str | Path, expected: Fingerprint | None = None) -> CachedDataset:
        """Open a cache for reading. Nothing in it is trusted: it may come from anyone.

        Args:
            path: The folder with ``index.json``: a local one, or an address that fsspec knows, for example
                ``hf://datasets/user/name`` or ``s3://bucket/cache``. Of a store only those bytes are fetched that are
                needed: the index now, a shard's head once, a chunk's own range whenever it is read.
            expected: Fingerprint it must have.

        Raises:
            CacheCorruptError: Not a finished cache, damaged, or out of reach.
            CacheMismatchError: The fingerprint differs; the message names the parts.
            UnsupportedSetupError: Another version of the format, an unknown codec, or an address of an unknown protocol.
        """
        return cls(CacheReader(path, expected))

    def __len__(self) -> int:
        """Return the number of samples; of its part of the data set, if the cache is of a part."""
        return self.reader.index.num_samples

    def __getstate__(self) -> dict[str, Any]:
        """Leave decoded chunks behind when copied into a worker process."""
        return {**self.__dict__, "_chunks": OrderedDict(), "_unread": {}}

    def _chunk(self, view: int, chunk: int) -> _Chunk:
        key = (view, chunk)
        if key in self._chunks:
            self._chunks.move_to_end(key)
            if self._unread[key] <= 0:  # kept from an epoch before
                self._unread[key] = len(next(iter(self._chunks[key].values())))
            return self._chunks[key]
        if self.packed:
            packed = self.reader.unpack_chunk(view, chunk)
            parts = {PACKED + name: array for name, array in packed.arrays.items()} | packed.extras
        else:
            decoded = self.reader.read_chunk(view, chunk)
            parts = {"hidden_states": decoded.hidden_states, **decoded.extras}
        if not self.geometry:
            parts.pop(GEOMETRY_NAME, None)
        self.decoded_chunks += 1
        self._chunks[key] = parts
        self._unread[key] = len(next(iter(parts.values())))
        while len(self._chunks) > self.max_chunks:
            old, _ = self._chunks.popitem(last=False)
            del self._unread[old]
        return parts

    def __getitem__(self, key: int | ViewKey) -> dict[str, Tensor]:
        """Return one sample.

        Raises:
            IndexError: No such sample or view.
            CacheCorruptError: Its chunk is damaged.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | ViewKey]) -> list[dict[str, Tensor]]:
        """Return several samples. Tensors share memory with the decoded chunk."""
        layout, num_views = self.reader.layout, self.reader.index.num_views
        items = []
        for key in keys:
            sample_index, view = (key, 0) if isinstance(key, (int, np.integer)) else key
            there = 0 <= sample_index < layout.total_samples and 0 <= view < num_views
            position = int(layout.position[sample_index]) if there else -1
            if position < 0:
                raise IndexError(
                    f"Sample {sample_index}, view {view} is not in the cache {self.reader.directory}, which holds "
                    f"{len(self)} samples in {num_views} views."
                )
            chunk, row = divmod(position, layout.chunk_size)
            items.append({name: value[row] for name, value in self._chunk(view, chunk).items()})
            # In an epoch each sample is read once: a chunk read to its end makes room, at once or before any other.
            self._unread[view, chunk] -= 1
            if self._unread[view, chunk] <= 0 and self.keep_read:
                self._chunks.move_to_end((view, chunk), last=False)
            elif self._unread[view, chunk] == 0:
                del self._chunks[view, chunk], self._unread[view, chunk]
        return items


def collate_cached(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples of a cache into a batch: ``hidden_states`` (batch, tokens, hidden), labels and other extras.

    Packed samples are stacked as they are. What only some of them carry, those of chunks with tokens that are stored
    as they are, is zero for the others.
    """
    names = {name: item[name] for item in reversed(items) for name in item}
    return {
        name: torch.stack([item[name] if name in item else torch.zeros_like(like) for item in items])
        for name, like in sorted(names.items())
    }


def split_packed(batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what ``ViewCodec.restore`` takes of a batch, and the rest of the batch."""
    packed = {name.removeprefix(PACKED): value for name, value in batch.items() if name.startswith(PACKED)}
    return packed, {name: value for name, value in batch.items() if not name.startswith(PACKED)}
