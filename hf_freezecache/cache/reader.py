"""Opens a cache, checks it, and reads chunks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..codecs import (
    DTYPES,
    Codec,
    ViewCodec,
    Zstd,
    codec_from_dict,
)
from ..codecs.array_names import GEOMETRY
from ..codecs.predictor import check_geometry
from ..data.geometry import GEOMETRY_NAME
from ..data.layout import ChunkLayout
from ..errors import (
    CacheCorruptError,
    CacheMismatchError,
)
from .codec_state import (
    CodecState,
    load_copies,
    load_state,
    read_state,
)
from .fingerprint import Fingerprint
from .index import (
    CODEC_NAME,
    COPIES_NAME,
    INDEX_NAME,
    CacheIndex,
    ExtraSpec,
    ShardHeader,
    load_index,
    read_chunk_frames,
    read_extra,
    read_shard_header,
    shard_metadata,
    shard_name,
)
from .schema import max_tensor_bytes
from .selection import Selection
from .storage import (
    LocalStorage,
    RemoteStorage,
    Storage,
    open_storage,
)

__all__ = [
    "CacheReader",
    "DecodedChunk",
    "PackedChunk",
]


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
    """The samples of one chunk in one view, as ``Codec.entropy_decode`` gave them.

    Attributes:
        arrays: Name -> (samples, ...), for ``ViewCodec.dequantize``.
        extras: Name -> (samples, ...).
    """

    arrays: dict[str, Tensor]
    extras: dict[str, Tensor]


#: What numpy, torch and codecs raise for content that makes no sense.
_NONSENSE = (ValueError, ArithmeticError, LookupError, TypeError, RuntimeError)
#: Samples decoded at once where only decoding tells whether they are finite.
_SLICE = 16


@dataclass
class CacheReader:
    """A finished cache, opened for reading. Cheap to copy into worker processes; keeps no file open.

    Opening reads ``index.json`` and the states of codecs, and checks that every file is there with its size. A shard's
    head is read and checked against its hash when it is first used, a chunk's own range of bytes whenever it is; each frame
    is checked against its checksum when it is decoded. Nothing that is read is trusted, hashes or not: what reaches a
    batch has the shapes and dtypes that the index promises, belongs to the samples it is asked for, and is finite.

    Args:
        directory: The cache: a local folder, or an address that fsspec knows, e.g. ``hf://datasets/user/name``.
        expected: Fingerprint it must have; ``None`` takes it as it is.
        selection: Views and shards that must be there, and can be read; default all.
        check_files: Whether to check now that all files are there. Reading one that is not fails.
        index_name: Name of its index.

    Raises:
        CacheCorruptError: Not a finished cache, damaged, or out of reach.
        CacheMismatchError: The fingerprint differs; the message names the parts.
        IndexError: The cache has no such view or shard.
        UnsupportedSetupError: Another version of the format, an unknown codec, or an address of an unknown protocol.
    """

    directory: Path | str
    expected: Fingerprint | None = None
    selection: Selection = field(default_factory=Selection)
    check_files: bool = True
    index_name: str = INDEX_NAME
    storage: Storage = field(init=False)
    index: CacheIndex = field(init=False)
    codec: Codec = field(init=False)
    views: ViewCodec = field(init=False)
    layout: ChunkLayout = field(init=False)
    _heads: dict[tuple[int, int], ShardHeader] = field(init=False, default_factory=dict)
    _largest: dict[tuple[int, int], list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Open and check."""
        self.storage = open_storage(self.directory)
        self.directory = self.storage.directory if isinstance(self.storage, LocalStorage) else str(self.storage)
        self.index = load_index(self.storage, self.index_name)
        if self.expected is not None:
            different = self.expected.difference(Fingerprint(self.index.fingerprint))
            if different:
                raise CacheMismatchError(
                    f"Cache {self.directory} was written for other inputs; these parts differ: {', '.join(different)}. "
                    "Use another cache_dir, or delete the folder to rebuild."
                )
        self.layout = ChunkLayout(
            self.index.num_samples, self.index.chunk_size, self.index.layout_seed, self.index.part
        )
        wanted = self.selection.files(self.index)
        if self.check_files:
            if isinstance(self.storage, RemoteStorage):
                self.storage.names()  # one listing gives all sizes
            for name in wanted:
                problem = self._file_problem(name)
                if problem is not None:
                    raise CacheCorruptError(
                        f"{problem} Delete {self.storage.file(INDEX_NAME)} and run the same training again to rebuild "
                        "what is damaged. Of a cache that was fetched in part, open that part: from_pretrained(..., "
                        "views=[...], shards=[...])."
                    )
        self._open_codecs()

    def _file_problem(self, name: str) -> str | None:
        """Say what is wrong with presence or size of a file."""
        file, expected = self.storage.file(name), self.index.files[name].bytes
        size = file.size()
        if size == expected:
            return None
        found = "is missing" if size is None else f"has {size} bytes"
        return f"{file} {found}, expected {expected} bytes."

    def _open_codecs(self) -> None:
        index = self.storage.file(INDEX_NAME)
        if CODEC_NAME not in self.index.files:
            self.codec = codec_from_dict(self.index.codec)
            if not self.codec.lossless:
                raise CacheCorruptError(f"{index} is damaged: it names a lossy codec but no {CODEC_NAME}.")
        else:
            self.codec = self._state(CODEC_NAME, load_state, self.index.codec).codec
        self.views = ViewCodec(self.codec)
        if self.index.copies is not None:
            self.views = ViewCodec(self.codec, self._state(COPIES_NAME, load_copies, self.index.copies).codec)
        name = CODEC_NAME
        try:
            self.codec.check(*self.index.hidden_shape)
            name = COPIES_NAME
            self.views.check(*self.index.hidden_shape)
        except _NONSENSE as error:
            raise CacheCorruptError(
                f"{self.storage.file(name)} is damaged: {error}. Delete {self.directory} to rebuild."
            ) from error
        geometry = [spec for spec in self.index.extras if spec.name == GEOMETRY_NAME]
        if self.views.needs_base(1) and geometry != [ExtraSpec(GEOMETRY_NAME, "float32", (5,))]:
            raise CacheCorruptError(f"{index} is damaged: it names no {GEOMETRY_NAME} of 5 numbers.")

    def _state(self, name: str, load: Callable[..., CodecState[Any]], expected: Any) -> CodecState[Any]:
        file, most = self.storage.file(name), max_tensor_bytes(*self.index.hidden_shape)
        data = read_state(file, most)
        if hashlib.sha256(data).hexdigest() != self.index.files[name].sha256:
            raise CacheCorruptError(
                f"{file} is damaged: its hash does not match {INDEX_NAME}. Delete {self.directory}."
            )
        state = load(file, Fingerprint(self.index.fingerprint).digest, most, data)
        if state.codec.to_dict() != expected:
            raise CacheCorruptError(f"{file} holds another codec than {INDEX_NAME} names. Delete {self.directory}.")
        return state

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states."""
        return DTYPES[self.index.dtype]

    def _codec_frames(self, view: int) -> int:
        """Return the frames of hidden states per chunk; those of extras follow."""
        return self.views.num_frames(view, (1, *self.index.hidden_shape), self.dtype)

    def _head(self, view: int, shard: int) -> ShardHeader:
        if (view, shard) not in self._heads:
            index, name = self.index, shard_name(view, shard)
            if not self.selection.whole and name not in self.selection.files(index):
                raise IndexError(
                    f"View {view}, shard {shard} of {self.directory} was left out when it was opened; there are views "
                    f"{list(self.selection.chosen_views(index))}, shards {list(self.selection.chosen_shards(index))}."
                )
            file, record = self.storage.file(name), self.index.files[name]
            start = file.read(0, record.header_bytes)
            if hashlib.sha256(start).hexdigest() != record.head_sha256:
                raise CacheCorruptError(f"{file} is damaged: the hash of its head does not match {INDEX_NAME}.")
            head = read_shard_header(file, start)
            codec = index.codec if view == 0 or index.copies is None else index.copies
            expected = shard_metadata(
                Fingerprint(index.fingerprint).digest,
                view,
                shard,
                codec,
                index.hidden_shape,
                index.dtype,
                index.extras,
            )
            first = shard * index.shard_chunks * index.chunk_size
            rows = self.layout.order[first : first + index.shard_chunks * index.chunk_size]
            frames = self._codec_frames(view) + len(index.extras)
            different = sorted(
                key for key in expected.keys() | head.metadata.keys() if head.metadata.get(key) != expected.get(key)
            )
            if "codec" in different:
                problem = f"it was encoded with {str(head.metadata.get('codec'))[:500]}, not {expected['codec'][:500]}"
            elif different:
                problem = f"its {', '.join(map(str, different))[:500]} differ"
            elif head.header_bytes != record.header_bytes:
                problem = f"its head takes {head.header_bytes} bytes, not {record.header_bytes}"
            elif head.frame_offsets.shape != (-(-len(rows) // index.chunk_size), frames + 1):
                problem = f"frame offsets of shape {head.frame_offsets.shape}"
            elif not np.array_equal(head.sample_indices, rows):
                problem = "other sample indices"
            else:
                self._heads[view, shard] = head
                return head
            raise CacheCorruptError(
                f"{file} is damaged: it does not hold the samples that {INDEX_NAME} promises: {problem}."
            )
        return self._heads[view, shard]

    def available_rows(self) -> npt.NDArray[np.int64]:
        """Return the sample indices that can be read, sorted: of shards that are there, if that was not checked."""
        if self.check_files:
            return np.sort(self.layout.order)
        views, per_shard = range(self.index.num_views), self.index.shard_chunks * self.index.chunk_size
        there = [
            self.layout.order[shard * per_shard : (shard + 1) * per_shard]
            for shard in range(self.index.num_shards)
            if all(self._file_problem(shard_name(view, shard)) is None for view in views)
        ]
        return np.sort(np.concatenate([np.zeros(0, np.int64), *there]))

    def members(self, chunk: int) -> npt.NDArray[np.int64]:
        """Return the sample indices of a chunk in stored order."""
        return self.layout.members(chunk)

    def read_chunk(self, view: int, chunk: int) -> DecodedChunk:
        """Read and decode one chunk of one view.

        Raises:
            CacheCorruptError: Its bytes are missing, damaged, or no finite hidden states.
        """
        packed = self.entropy_decode_chunk(view, chunk)
        with self._blaming(view, chunk):
            return DecodedChunk(self.views.dequantize(packed.arrays, self.dtype), packed.extras)

    def entropy_decode_chunk(self, view: int, chunk: int) -> PackedChunk:
        """Read one chunk of one view and undo its entropy coding; and, if that view is predicted, of the base view too.

        Raises:
            CacheCorruptError: As ``read_chunk``.
        """
        packed = self._unpack(view, chunk)
        if self.views.needs_base(view):
            base = self._unpack(0, chunk)
            for position, part in ((0, base), (view, packed)):
                with self._blaming(position, chunk):
                    check_geometry(part.extras[GEOMETRY_NAME])
            geometries = torch.stack([base.extras[GEOMETRY_NAME], packed.extras[GEOMETRY_NAME]], 1)
            packed = PackedChunk({**base.arrays, **packed.arrays, GEOMETRY: geometries}, packed.extras)
        with self._blaming(view, chunk):
            self._check_finite(packed.arrays)
        return packed

    def _check_finite(self, arrays: dict[str, Tensor]) -> None:
        """Refuse what would restore to NaN or infinite hidden states. Cheap: nearly always a bound is enough."""
        largest = torch.finfo(self.dtype).max
        if self.views.abs_bound(arrays, self.dtype) < largest:
            return
        samples = len(next(iter(arrays.values())))
        for start in range(0, samples, _SLICE):
            part = {name: array[start : start + _SLICE] for name, array in arrays.items()}
            if not bool(torch.isfinite(self.views.dequantize(part, self.dtype)).all()):
                raise ValueError(f"NaN or infinite hidden states among its samples {start} to {start + _SLICE - 1}")

    @contextmanager
    def _blaming(self, view: int, chunk: int) -> Iterator[None]:
        """Turn errors of decoding into one that names the shard."""
        try:
            yield
        except CacheCorruptError:
            raise
        except _NONSENSE as error:
            file = self.storage.file(shard_name(view, chunk // self.index.shard_chunks))
            raise CacheCorruptError(
                f"{file} is damaged in chunk {chunk}: {error}. Delete {file} and {self.storage.file(INDEX_NAME)}, and run "
                "the same training again to rebuild this shard."
            ) from error

    def _largest_frames(self, view: int, samples: int) -> list[int]:
        """Return the largest size of each frame of a chunk."""
        if (view, samples) not in self._largest:
            shape = (samples, *self.index.hidden_shape)
            sizes = self.views.codec(view).max_frame_bytes(shape, self.dtype)
            for spec in self.index.extras:
                sizes.append(Zstd().max_bytes(samples * math.prod(spec.shape) * spec.torch_dtype.itemsize))
            self._largest[view, samples] = sizes
        return self._largest[view, samples]

    def _unpack(self, view: int, chunk: int) -> PackedChunk:
        shard, position = divmod(chunk, self.index.shard_chunks)
        head = self._head(view, shard)
        samples = len(self.members(chunk))
        with self._blaming(view, chunk):
            file = self.storage.file(shard_name(view, shard))
            frames = read_chunk_frames(file, head, position, self._largest_frames(view, samples))
            split = self._codec_frames(view)
            arrays = self.views.entropy_decode(view, frames[:split], (samples, *self.index.hidden_shape), self.dtype)
            extras = {
                spec.name: read_extra(spec, frame, samples)
                for spec, frame in zip(self.index.extras, frames[split:], strict=True)
            }
        return PackedChunk(arrays, extras)
