"""Opens a cache, checks it, and reads chunks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..codecs import DTYPES, Codec, ViewCodec, codec_from_dict
from ..errors import CacheCorruptError, CacheMismatchError
from .fingerprint import Fingerprint
from .format import (
    CODEC_NAME,
    COPIES_NAME,
    GEOMETRY_NAME,
    INDEX_NAME,
    CacheIndex,
    ShardHead,
    file_sha256,
    load_index,
    read_chunk_frames,
    read_extra,
    read_shard_head,
    shard_metadata,
    shard_name,
)
from .layout import ChunkLayout
from .selection import Selection
from .state import CodecState, load_copies, load_state

__all__ = ["CacheReader", "DecodedChunk", "PackedChunk", "verify_cache"]


@dataclass(frozen=True)
class DecodedChunk:
    """The samples of one chunk in one view.

    Attributes:
        hidden_states: (samples, tokens, hidden).
        extras: Name -> (samples, ...).
    """

    hidden_states: Tensor
    extras: dict[str, Tensor]


@dataclass(frozen=True)
class PackedChunk:
    """The samples of one chunk in one view, as ``Codec.unpack`` gave them.

    Attributes:
        arrays: Name -> (samples, ...), for ``ViewCodec.restore``.
        extras: Name -> (samples, ...).
    """

    arrays: dict[str, Tensor]
    extras: dict[str, Tensor]


@dataclass
class CacheReader:
    """A finished cache, opened for reading. Cheap to copy into worker processes; keeps no file open.

    Opening checks ``index.json``, and that every file is there with its size. A shard's head is checked against its
    hash when it is first used, each frame against its checksum whenever it is decoded.

    Args:
        directory: The cache.
        expected: Fingerprint it must have; ``None`` takes it as it is.
        selection: Views and shards that must be there, and can be read; default all.

    Raises:
        CacheCorruptError: Not a finished cache, or damaged.
        CacheMismatchError: The fingerprint differs; the message names the parts.
        IndexError: The cache has no such view or shard.
    """

    directory: Path
    expected: Fingerprint | None = None
    selection: Selection = field(default_factory=Selection)
    index: CacheIndex = field(init=False)
    codec: Codec = field(init=False)
    views: ViewCodec = field(init=False)
    layout: ChunkLayout = field(init=False)
    _heads: dict[tuple[int, int], ShardHead] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Open and check."""
        self.directory = Path(self.directory)
        self.index = load_index(self.directory)
        if self.expected is not None:
            different = self.expected.difference(Fingerprint(self.index.fingerprint))
            if different:
                raise CacheMismatchError(
                    f"Cache {self.directory} was written for other inputs; these parts differ: {', '.join(different)}. "
                    "Use another cache_dir, or delete the folder to rebuild."
                )
        self.layout = ChunkLayout(self.index.num_samples, self.index.chunk_size, self.index.layout_seed)
        for name in self.selection.files(self.index):
            path, record = self.directory / name, self.index.files[name]
            size = path.stat().st_size if path.is_file() else None
            if size != record.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise CacheCorruptError(
                    f"{path} {found}, expected {record.bytes} bytes. Delete {self.directory / INDEX_NAME} and run the "
                    "same training again to rebuild what is damaged. Of a cache that was fetched in part, open that part: "
                    "from_pretrained(..., views=[...], shards=[...])."
                )
        if CODEC_NAME not in self.index.files:
            self.codec = codec_from_dict(self.index.codec)
            if not self.codec.lossless:
                raise CacheCorruptError(
                    f"{self.directory / INDEX_NAME} is damaged: it names a lossy codec but no {CODEC_NAME}."
                )
        else:
            self.codec = self._state(CODEC_NAME, load_state, self.index.codec).codec
        self.views = ViewCodec(self.codec)
        if self.index.copies is not None:
            self.views = ViewCodec(self.codec, self._state(COPIES_NAME, load_copies, self.index.copies).codec)
            predictor = self.views.copies.predictor if self.views.copies is not None else None
            try:
                if predictor is not None:
                    predictor.check(*self.index.hidden_shape)
            except ValueError as error:
                raise CacheCorruptError(
                    f"{self.directory / COPIES_NAME} is damaged: {error}. Delete {self.directory}."
                ) from error
            if self.views.needs_base(1) and GEOMETRY_NAME not in {extra.name for extra in self.index.extras}:
                raise CacheCorruptError(f"{self.directory / INDEX_NAME} is damaged: it names no {GEOMETRY_NAME}.")

    def _state(self, name: str, load: Callable[[Path, str], CodecState[Any]], expected: Any) -> CodecState[Any]:
        path = self.directory / name
        if file_sha256(path) != self.index.files[name].sha256:
            raise CacheCorruptError(
                f"{path} is damaged: its hash does not match {INDEX_NAME}. Delete {self.directory}."
            )
        state = load(path, Fingerprint(self.index.fingerprint).digest)
        if state.codec.to_dict() != expected:
            raise CacheCorruptError(f"{path} holds another codec than {INDEX_NAME} names. Delete {self.directory}.")
        return state

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states."""
        return DTYPES[self.index.dtype]

    def _codec_frames(self, view: int) -> int:
        """Return the frames of hidden states per chunk; those of extras follow."""
        return self.views.num_frames(view, (1, *self.index.hidden_shape), self.dtype)

    def _head(self, view: int, shard: int) -> ShardHead:
        if (view, shard) not in self._heads:
            if shard_name(view, shard) not in self.selection.files(self.index):
                raise IndexError(
                    f"View {view}, shard {shard} of {self.directory} was left out when it was opened; there are views "
                    f"{list(self.selection.chosen_views(self.index))}, shards {list(self.selection.chosen_shards(self.index))}."
                )
            path = self.directory / shard_name(view, shard)
            record = self.index.files[shard_name(view, shard)]
            if file_sha256(path, record.head_bytes) != record.head_sha256:
                raise CacheCorruptError(f"{path} is damaged: the hash of its head does not match {INDEX_NAME}.")
            head = read_shard_head(path)
            index = self.index
            fits = head.metadata == shard_metadata(
                Fingerprint(index.fingerprint).digest,
                view,
                shard,
                index.codec if view == 0 or index.copies is None else index.copies,
                index.hidden_shape,
                index.dtype,
                index.extras,
            )
            chunks = range(shard * self.index.shard_chunks, (shard + 1) * self.index.shard_chunks)
            rows = self.layout.order[chunks.start * self.index.chunk_size : chunks.stop * self.index.chunk_size]
            frames = self._codec_frames(view) + len(self.index.extras)
            if (
                not fits
                or not np.array_equal(head.sample_indices, rows)
                or head.frame_offsets.shape != (-(-len(rows) // self.index.chunk_size), frames + 1)
            ):
                raise CacheCorruptError(f"{path} is damaged: it does not hold the samples that {INDEX_NAME} promises.")
            self._heads[view, shard] = head
        return self._heads[view, shard]

    def members(self, chunk: int) -> npt.NDArray[np.int64]:
        """Return the sample indices of a chunk in stored order."""
        return self.layout.members(chunk)

    def read_chunk(self, view: int, chunk: int) -> DecodedChunk:
        """Read and decode one chunk of one view.

        Raises:
            CacheCorruptError: Its bytes are damaged.
        """
        packed = self.unpack_chunk(view, chunk)
        return DecodedChunk(self.views.restore(packed.arrays, self.dtype), packed.extras)

    def unpack_chunk(self, view: int, chunk: int) -> PackedChunk:
        """Read one chunk of one view and undo its entropy coding; and, if that view is predicted, of the base view too.

        Raises:
            CacheCorruptError: Its bytes are damaged.
        """
        packed = self._unpack(view, chunk)
        if not self.views.needs_base(view):
            return packed
        base = self._unpack(0, chunk)
        geometries = torch.stack([base.extras[GEOMETRY_NAME], packed.extras[GEOMETRY_NAME]], 1)
        return PackedChunk({**base.arrays, **packed.arrays, "geometry": geometries}, packed.extras)

    def _unpack(self, view: int, chunk: int) -> PackedChunk:
        shard, position = divmod(chunk, self.index.shard_chunks)
        head = self._head(view, shard)
        path = self.directory / shard_name(view, shard)
        samples = len(self.members(chunk))
        try:
            frames = read_chunk_frames(path, head, position)
            split = self._codec_frames(view)
            arrays = self.views.unpack(view, frames[:split], (samples, *self.index.hidden_shape), self.dtype)
            extras = {
                spec.name: read_extra(spec, frame, samples)
                for spec, frame in zip(self.index.extras, frames[split:], strict=True)
            }
        except ValueError as error:
            raise CacheCorruptError(
                f"{path} is damaged in chunk {chunk}: {error}. Delete {path} and {self.directory / INDEX_NAME}, and run "
                "the same training again to rebuild this shard."
            ) from error
        return PackedChunk(arrays, extras)


def verify_cache(directory: Path) -> list[str]:
    """Check every bit of every file of a cache.

    Returns:
        One line per damaged, missing or foreign file; empty for a sound cache.
    """
    directory = Path(directory)
    try:
        index = load_index(directory)
    except (CacheCorruptError, ValueError) as error:
        return [str(error)]
    problems = []
    for name, record in sorted(index.files.items()):
        path = directory / name
        if not path.is_file():
            problems.append(f"{path} is missing.")
        elif (size := path.stat().st_size) != record.bytes:
            problems.append(f"{path} has {size} bytes, expected {record.bytes}.")
        elif file_sha256(path) != record.sha256:
            problems.append(f"{path} is altered: its SHA-256 does not match {INDEX_NAME}.")
        elif name in (CODEC_NAME, COPIES_NAME):
            try:
                load = load_state if name == CODEC_NAME else load_copies
                load(path, Fingerprint(index.fingerprint).digest)
            except CacheCorruptError as error:
                problems.append(str(error))
        elif name.endswith(".safetensors"):
            try:
                metadata = read_shard_head(path).metadata
                expected = index.codec if int(metadata["view"]) == 0 else index.copies or index.codec
                if json.loads(metadata["codec"]) != expected:
                    problems.append(f"{path} was encoded with {metadata['codec']}, {INDEX_NAME} says {expected}.")
            except (CacheCorruptError, KeyError, ValueError) as error:
                problems.append(str(error))
    known = {INDEX_NAME, *index.files}
    foreign = [
        path for path in directory.rglob("*") if path.is_file() and str(path.relative_to(directory)) not in known
    ]
    problems += [f"{path} does not belong to the cache." for path in sorted(foreign)]
    return problems
