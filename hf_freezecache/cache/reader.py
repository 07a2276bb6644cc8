"""Opens a finished cache, checks it, and reads chunks."""

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
    Selection,
    load_index,
    shard_name,
)
from .schema import TOKEN_POSITIONS, max_tensor_bytes
from .shard_file import (
    ExtraSpec,
    ShardHeader,
    check_token_positions,
    read_chunk_frames,
    read_extra,
    read_shard_header,
    shard_metadata,
)
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
        hidden_states: (samples, stored tokens, hidden).
        extras: Name -> (samples, ...). Where fewer tokens are stored than the model has, ``token_positions`` (samples, stored
            tokens) says which.
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
    """A finished cache, opened for reading. It is cheap to copy into worker processes, and keeps no file open.

    Opening reads ``index.json`` and the states of codecs, and checks that every file exists and has its size. The header of a
    shard is read and checked against its hash when it is first used. The bytes of a chunk are read whenever it is used, and
    each frame is checked against its checksum. Nothing that is read is trusted, hashes or not. What reaches a batch has the
    shapes and dtypes that the index promises, belongs to the samples that were asked for, and is finite.

    Args:
        directory: The cache: a local folder, or an address that fsspec knows, e.g. ``hf://datasets/user/name``.
        expected: Fingerprint that the cache must have; ``None`` takes any.
        selection: Views and shards that must exist, and that can be read; default all.
        check_files: Whether to check now that all files exist. Reading a missing one fails in any case.
        index_name: Name of the index file.

    Raises:
        CacheCorruptError: It is no finished cache, is damaged, or is out of reach.
        CacheMismatchError: The fingerprint differs; the message names the components.
        IndexError: The cache has no such view or shard.
        UnsupportedSetupError: It has another version of the format, an unknown codec, or an address of an unknown protocol.
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
    _headers: dict[tuple[int, int], ShardHeader] = field(init=False, default_factory=dict)
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
                    f"Cache {self.directory} was written for other inputs; these differ: {', '.join(different)}. "
                    "Use another freezecache_dir, or delete the folder to rebuild."
                )
        self.layout = ChunkLayout(
            self.index.num_samples, self.index.chunk_size, self.index.layout_seed, self.index.rows
        )
        names = self.selection.files(self.index)
        if self.check_files:
            if isinstance(self.storage, RemoteStorage):
                self.storage.names()  # one listing gives all sizes
            for name in names:
                problem = self._file_problem(name)
                if problem is not None:
                    raise CacheCorruptError(
                        f"{problem} Delete {self.storage.file(INDEX_NAME)} and run the same training again to rebuild "
                        "what is damaged. If only some views or shards were fetched, name them: from_pretrained(..., "
                        "views=[...], shards=[...])."
                    )
        self._open_codecs()

    def _file_problem(self, name: str) -> str | None:
        """Say what is wrong with presence or size of a file."""
        file, expected = self.storage.file(name), self.index.files[name].bytes
        size = file.size()
        if size == expected:
            return None
        return f"{file} {'is missing' if size is None else f'has {size} bytes'}, expected {expected} bytes."

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

    def _header(self, view: int, shard: int) -> ShardHeader:
        """Read the header of a shard once, and check that it holds what the index promises."""
        if (view, shard) not in self._headers:
            index, name = self.index, shard_name(view, shard)
            if not self.selection.whole and name not in self.selection.files(index):
                raise IndexError(
                    f"View {view}, shard {shard} of {self.directory} was left out when it was opened; it was opened with views "
                    f"{list(self.selection.chosen_views(index))}, shards {list(self.selection.chosen_shards(index))}. Read what was "
                    "opened: torch.utils.data.Subset(cached, cached.sample_indices.tolist()) is a data set of it."
                )
            file, record = self.storage.file(name), index.files[name]
            start = file.read(0, record.header_bytes)
            if hashlib.sha256(start).hexdigest() != record.header_sha256:
                raise CacheCorruptError(f"{file} is damaged: the hash of its header does not match {INDEX_NAME}.")
            header = read_shard_header(file, start)
            problem = self._header_problem(view, shard, header)
            if problem is not None:
                raise CacheCorruptError(
                    f"{file} is damaged: it does not hold the samples that {INDEX_NAME} promises: {problem}."
                )
            self._headers[view, shard] = header
        return self._headers[view, shard]

    def _header_problem(self, view: int, shard: int, header: ShardHeader) -> str | None:
        """Say where a shard's header differs from the index."""
        index, record = self.index, self.index.files[shard_name(view, shard)]
        expected = shard_metadata(
            Fingerprint(index.fingerprint).digest,
            view,
            shard,
            index.codec if view == 0 or index.copies is None else index.copies,
            index.num_tokens,
            index.hidden_shape,
            index.dtype,
            index.extras,
        )
        names = expected.keys() | header.metadata.keys()
        different = sorted(name for name in names if header.metadata.get(name) != expected.get(name))
        if "codec" in different:
            return f"it was encoded with {str(header.metadata.get('codec'))[:500]}, not {expected['codec'][:500]}"
        if different:
            return f"its {', '.join(map(str, different))[:500]} differ"
        if header.header_bytes != record.header_bytes:
            return f"its header takes {header.header_bytes} bytes, not {record.header_bytes}"
        first = shard * index.shard_chunks * index.chunk_size
        rows = self.layout.order[first : first + index.shard_chunks * index.chunk_size]
        frames = self._codec_frames(view) + len(index.extras)
        if header.frame_offsets.shape != (-(-len(rows) // index.chunk_size), frames + 1):
            return f"frame offsets of shape {header.frame_offsets.shape}"
        return None if np.array_equal(header.sample_indices, rows) else "other sample indices"

    def available_rows(self) -> npt.NDArray[np.int64]:
        """Return the sample indices that can be read, sorted, int64: those of shards that exist in all views."""
        if self.check_files:
            return np.sort(self.layout.order)
        views, per_shard = range(self.index.num_views), self.index.shard_chunks * self.index.chunk_size
        rows = [
            self.layout.order[shard * per_shard : (shard + 1) * per_shard]
            for shard in range(self.index.num_shards)
            if all(self._file_problem(shard_name(view, shard)) is None for view in views)
        ]
        return np.sort(np.concatenate([np.zeros(0, np.int64), *rows]))

    def members(self, chunk: int) -> npt.NDArray[np.int64]:
        """Return the sample indices of a chunk in stored order."""
        return self.layout.members(chunk)

    def read_chunk(self, view: int, chunk: int) -> DecodedChunk:
        """Read and decode one chunk of one view.

        Raises:
            CacheCorruptError: Its bytes are missing or damaged, or its hidden states are not finite.
        """
        packed = self.entropy_decode_chunk(view, chunk)
        with self._blaming(view, chunk):
            return DecodedChunk(self.views.dequantize(packed.arrays, self.dtype), packed.extras)

    def entropy_decode_chunk(self, view: int, chunk: int) -> PackedChunk:
        """Read one chunk of one view and undo its entropy coding.

        If that view is predicted, the arrays of the base view are among the result.

        Raises:
            CacheCorruptError: Its bytes are missing or damaged, or its hidden states would not be finite.
        """
        packed = self._decode_frames(view, chunk)
        if self.views.needs_base(view):
            base = self._decode_frames(0, chunk)
            for number, decoded in ((0, base), (view, packed)):
                with self._blaming(number, chunk):
                    check_geometry(decoded.extras[GEOMETRY_NAME])
            geometries = torch.stack([base.extras[GEOMETRY_NAME], packed.extras[GEOMETRY_NAME]], 1)
            packed = PackedChunk({**base.arrays, **packed.arrays, GEOMETRY: geometries}, packed.extras)
        with self._blaming(view, chunk):
            self._check_finite(packed.arrays)
        return packed

    def read_extra(self, name: str, view: int, chunk: int) -> Tensor:
        """Read one extra of a chunk, (samples, ...), and nothing else of it.

        Raises:
            CacheCorruptError: Its bytes are missing or damaged.
            ValueError: The cache has no such extra.
        """
        place = [spec.name for spec in self.index.extras].index(name)
        shard, position = divmod(chunk, self.index.shard_chunks)
        header, samples = self._header(view, shard), len(self.members(chunk))
        with self._blaming(view, chunk):
            number = self._codec_frames(view) + place
            start, end = header.frame_offsets[position][number : number + 2].tolist()
            if end - start > (most := self._largest_frames(view, samples)[number]):
                raise ValueError(f"frame {number} takes {end - start} bytes, expected at most {most}")
            file = self.storage.file(shard_name(view, shard))
            frame = file.read(header.header_bytes + start, end - start)
            return read_extra(self.index.extras[place], frame, samples)

    def _check_finite(self, arrays: dict[str, Tensor]) -> None:
        """Refuse what decodes to NaN or infinite hidden states. This is cheap, since a bound nearly always decides."""
        largest = torch.finfo(self.dtype).max
        if self.views.abs_bound(arrays, self.dtype) < largest:
            return
        samples = len(next(iter(arrays.values())))
        for start in range(0, samples, _SLICE):
            some = {name: array[start : start + _SLICE] for name, array in arrays.items()}
            if not bool(torch.isfinite(self.views.dequantize(some, self.dtype)).all()):
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
        """Return the largest size in bytes of each frame of a chunk."""
        if (view, samples) not in self._largest:
            shape = (samples, *self.index.hidden_shape)
            sizes = self.views.codec(view).max_frame_bytes(shape, self.dtype)
            for spec in self.index.extras:
                sizes.append(Zstd().max_bytes(samples * math.prod(spec.shape) * spec.torch_dtype.itemsize))
            self._largest[view, samples] = sizes
        return self._largest[view, samples]

    def _decode_frames(self, view: int, chunk: int) -> PackedChunk:
        """Read and check the frames of one chunk of one view, without what it is predicted from."""
        shard, position = divmod(chunk, self.index.shard_chunks)
        header = self._header(view, shard)
        samples = len(self.members(chunk))
        with self._blaming(view, chunk):
            file = self.storage.file(shard_name(view, shard))
            frames = read_chunk_frames(file, header, position, self._largest_frames(view, samples))
            split = self._codec_frames(view)
            arrays = self.views.entropy_decode(view, frames[:split], (samples, *self.index.hidden_shape), self.dtype)
            extras = {
                spec.name: read_extra(spec, frame, samples)
                for spec, frame in zip(self.index.extras, frames[split:], strict=True)
            }
            if TOKEN_POSITIONS in extras:
                check_token_positions(extras[TOKEN_POSITIONS], self.index.num_tokens)
        return PackedChunk(arrays, extras)
