"""The on-disk format, version 1. Known to writer and reader; knows neither.

A cache directory holds::

    index.json                            written last: names every other file with size and SHA-256
    codec.safetensors                     fitted tensors of a lossy codec and its calibration; absent if lossless
    copies.safetensors                    the same of the codec of views 1 and up; absent if it is that of view 0
    index/view-00/part-00000.parquet      one row per stored sample: where it lies, and its labels
    view-00/shard-00000.safetensors       the hidden states of ``shard_chunks`` chunks in one view

A shard is a valid safetensors file. Its tensors are, in file order, ``frame_offsets`` (chunks, frames + 1), I64, into
``frames``; ``sample_indices`` (rows,), I64; ``frames`` (bytes,), U8: for each chunk the codec's frames, then one frame
per extra. One extra, ``view_geometry``, is for decoding: where the view lies in its image. Everything before ``frames`` is the *head*, which has a hash of its own, so that a reader can trust it
without reading the frames; each frame is a zstd frame with its own checksum.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from ..codecs import DTYPES, codec_from_dict
from ..codecs.base import Buffer
from ..codecs.entropy import decompress_frame
from ..errors import CacheCorruptError, UnsupportedSetupError

__all__ = [
    "CODEC_NAME",
    "COPIES_NAME",
    "FILE_NAME",
    "FORMAT_VERSION",
    "GEOMETRY_NAME",
    "INDEX_NAME",
    "CacheIndex",
    "ExtraSpec",
    "FileRecord",
    "ShardHead",
    "atomic_write",
    "file_sha256",
    "fsync_directory",
    "load_index",
    "part_name",
    "read_chunk_frames",
    "read_extra",
    "read_shard_head",
    "save_index",
    "shard_metadata",
    "shard_name",
    "write_shard_head",
]

FORMAT = "hf_freezecache"
FORMAT_VERSION = 1
INDEX_NAME = "index.json"
CODEC_NAME = "codec.safetensors"
COPIES_NAME = "copies.safetensors"
#: Extra (samples, 5) that says where a view lies in its image, see ``codecs.copies.WHOLE``. Stored where copies are predicted.
GEOMETRY_NAME = "view_geometry"
#: A larger index or head is refused unread. 1 GiB of images in 500 KB shards needs far less.
MAX_INDEX_BYTES = 256 * 2**20
MAX_HEAD_BYTES = 64 * 2**20
#: Names that files of a cache have beside ``index.json``.
FILE_NAME = re.compile(
    r"((codec|copies)\.safetensors|view-\d{2,}/shard-\d{5,}\.safetensors|index/view-\d{2,}/part-\d{5,}\.parquet)"
)


def shard_name(view: int, shard: int) -> str:
    """Return the relative path of a shard."""
    return f"view-{view:02d}/shard-{shard:05d}.safetensors"


def part_name(view: int, shard: int) -> str:
    """Return the relative path of the index part that belongs to a shard."""
    return f"index/view-{view:02d}/part-{shard:05d}.parquet"


@dataclass(frozen=True)
class ExtraSpec:
    """Something that the collator yields beside the images, e.g. labels.

    Attributes:
        name: Key in the batch.
        dtype: Name of a torch dtype, e.g. ``"int64"``.
        shape: Shape per sample, ``()`` for plain labels.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype.

        Raises:
            CacheCorruptError: There is no dtype of this name.
        """
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise CacheCorruptError(f"Extra {self.name!r} has the unknown dtype {self.dtype!r}.")
        return dtype


@dataclass(frozen=True)
class FileRecord:
    """Size and hashes of one file.

    Attributes:
        bytes: Size.
        sha256: Of the whole file.
        head_bytes: Size of a shard's head; 0 for other files.
        head_sha256: Of the head; empty for other files.
    """

    bytes: int
    sha256: str
    head_bytes: int = 0
    head_sha256: str = ""


@dataclass(frozen=True)
class CacheIndex:
    """Content of ``index.json``.

    Attributes:
        fingerprint: Part -> value.
        split_point: Number of blocks in the prefix.
        num_views: Stored views.
        image_shape: (channels, height, width) of the images the prefix saw.
        hidden_shape: (tokens, hidden) per sample.
        dtype: Safetensors name of the dtype of the hidden states.
        codec: ``{"name", "configuration"}``.
        num_samples: Rows of the data set.
        chunk_size: Samples per chunk.
        shard_chunks: Chunks per shard.
        layout_seed: Seed of the chunk layout.
        extras: What is stored beside the hidden states.
        files: Relative path -> record.
        calibration: How the codec was chosen and what it costs, see ``calibration.Calibration``; ``None`` for a lossless
            cache, and then absent from the file.
        copies: ``{"name", "configuration"}`` of the codec of views 1 and up; ``None``, and then absent from the file, if it
            is that of view 0.
        copies_calibration: How that codec was chosen; absent with it.
    """

    fingerprint: dict[str, str]
    split_point: int
    num_views: int
    image_shape: tuple[int, int, int]
    hidden_shape: tuple[int, int]
    dtype: str
    codec: dict[str, Any]
    num_samples: int
    chunk_size: int
    shard_chunks: int
    layout_seed: int
    extras: tuple[ExtraSpec, ...]
    files: dict[str, FileRecord]
    calibration: dict[str, Any] | None = None
    copies: dict[str, Any] | None = None
    copies_calibration: dict[str, Any] | None = None

    @property
    def num_shards(self) -> int:
        """Shards per view."""
        return -(-self.num_samples // (self.chunk_size * self.shard_chunks))

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards, index parts and the codec's state."""
        return sum(record.bytes for record in self.files.values())

    @property
    def bits_per_element(self) -> float:
        """Stored bits of all files per element of the hidden states."""
        elements = self.num_samples * self.num_views * self.hidden_shape[0] * self.hidden_shape[1]
        return 8 * self.total_bytes / elements

    def view_bytes(self, view: int) -> int:
        """Return the bytes of the shards and index parts of one view."""
        names = (name(view, shard) for name in (shard_name, part_name) for shard in range(self.num_shards))
        return sum(self.files[name].bytes for name in names)


def _canonical(index: CacheIndex) -> bytes:
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(index)}
    for name in ("calibration", "copies", "copies_calibration"):
        if document[name] is None:
            del document[name]
    body = json.dumps(document, sort_keys=True)
    document["checksum"] = hashlib.sha256(body.encode()).hexdigest()
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()


def save_index(directory: Path, index: CacheIndex) -> None:
    """Write ``index.json``, which commits the cache."""
    with atomic_write(directory / INDEX_NAME) as file:
        file.write(_canonical(index))


def load_index(directory: Path) -> CacheIndex:
    """Read and check ``index.json``.

    Its bytes must be exactly those that ``save_index`` writes for its content, so that any altered bit shows.

    Raises:
        CacheCorruptError: Missing, too large, altered, or naming files that no cache has.
        UnsupportedSetupError: Written in another version of the format.
    """
    path = directory / INDEX_NAME
    try:
        size = path.stat().st_size
        if size > MAX_INDEX_BYTES:
            raise CacheCorruptError(f"{path} has {size} bytes, expected at most {MAX_INDEX_BYTES}. Not a cache index.")
        raw = path.read_bytes()
        document = json.loads(raw)
    except FileNotFoundError:
        raise CacheCorruptError(
            f"{directory} is no finished cache: it has no {INDEX_NAME}. If a build was interrupted, run the same "
            "training script again to finish it."
        ) from None
    except (ValueError, RecursionError) as error:
        raise CacheCorruptError(
            f"{path} is damaged: not valid JSON ({error}). Delete {directory} to rebuild."
        ) from error
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise CacheCorruptError(f"{path} is not the index of a {FORMAT} cache.")
    version = document.pop("format_version", None)
    document.pop("checksum", None)
    if version != FORMAT_VERSION:
        raise UnsupportedSetupError(
            f"{path} has format version {version!r}; this version of hf_freezecache reads {FORMAT_VERSION}. Install the "
            "version that wrote it, or delete the folder to rebuild."
        )
    try:
        index = CacheIndex(
            **{
                **document,
                "image_shape": tuple(document["image_shape"]),
                "hidden_shape": tuple(document["hidden_shape"]),
                "extras": tuple(ExtraSpec(**{**extra, "shape": tuple(extra["shape"])}) for extra in document["extras"]),
                "files": {name: FileRecord(**record) for name, record in document["files"].items()},
            }
        )
        intact = _canonical(index) == raw
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CacheCorruptError(f"{path} is damaged: {type(error).__name__}: {error}.") from error
    if not intact:
        raise CacheCorruptError(f"{path} is damaged: its checksum does not match. Delete {directory} to rebuild.")
    _check_index(index, path)
    return index


def _check_index(index: CacheIndex, path: Path) -> None:
    counts = (index.num_samples, index.chunk_size, index.shard_chunks, index.num_views, *index.hidden_shape)
    if not all(isinstance(count, int) and count > 0 for count in counts) or index.dtype not in DTYPES:
        raise CacheCorruptError(f"{path} is damaged: counts {counts} and dtype {index.dtype!r} make no cache.")
    codec_from_dict(index.codec)
    # Before anything is listed or permuted: every shard has a file, and every row takes 8 bytes of its shard's head.
    num_files, stored = 2 * index.num_views * index.num_shards, sum(record.bytes for record in index.files.values())
    if len(index.files) < num_files or stored < 8 * index.num_samples * index.num_views:
        raise CacheCorruptError(
            f"{path} is damaged: {index.num_samples} samples in {index.num_views} views do not fit its {len(index.files)} "
            f"files of {stored} bytes, expected {num_files} files."
        )
    expected = {
        name(view, shard)
        for name in (shard_name, part_name)
        for view in range(index.num_views)
        for shard in range(index.num_shards)
    }
    if index.calibration is not None:
        expected.add(CODEC_NAME)
    reports = (index.calibration, index.copies, index.copies_calibration)
    if not all(report is None or isinstance(report, dict) for report in reports):
        raise CacheCorruptError(f"{path} is damaged: calibration and codec of copies must be objects.")
    if (index.copies is None) != (index.copies_calibration is None):
        raise CacheCorruptError(
            f"{path} is damaged: it names a codec of copies without its calibration, or the reverse."
        )
    if index.copies is not None:
        expected.add(COPIES_NAME)
    if set(index.files) != expected or not all(FILE_NAME.fullmatch(name) for name in index.files):
        odd = sorted(set(index.files) ^ expected)[:3]
        raise CacheCorruptError(f"{path} is damaged: files missing from it, or foreign to a cache: {odd}.")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` for writing; on success fsync it and rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb+") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_directory(directory: Path) -> None:
    """Make renames in a directory durable, where the system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # Windows opens no directories
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path, limit: int | None = None) -> str:
    """SHA-256 of a file, or of its first ``limit`` bytes."""
    digest = hashlib.sha256()
    left = path.stat().st_size if limit is None else limit
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def shard_metadata(
    digest: str,
    view: int,
    shard: int,
    codec: dict[str, Any],
    hidden_shape: Sequence[int],
    dtype: str,
    extras: Sequence[ExtraSpec],
) -> dict[str, str]:
    """Return the metadata of a shard: strings, as safetensors wants them, and enough to tell what the shard holds."""
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "fingerprint": digest,
        "view": str(view),
        "shard": str(shard),
        "codec": json.dumps(codec, sort_keys=True),
        "hidden_shape": json.dumps(list(hidden_shape)),
        "dtype": dtype,
        "extras": json.dumps([dataclasses.asdict(spec) for spec in extras], sort_keys=True),
    }


@dataclass(frozen=True)
class ShardHead:
    """The part of a shard before its frames.

    Attributes:
        metadata: Strings, as safetensors allows: format, version, fingerprint, view, shard, codec, dtype, extras.
        frame_offsets: (chunks, frames + 1), int64, ends of frames in ``frames``.
        sample_indices: (rows,), int64.
        head_bytes: Where ``frames`` starts in the file.
    """

    metadata: dict[str, str]
    frame_offsets: npt.NDArray[np.int64]
    sample_indices: npt.NDArray[np.int64]
    head_bytes: int


def _head_layout(num_chunks: int, num_frames: int, num_rows: int, metadata: dict[str, str]) -> tuple[int, int]:
    """Return the bytes reserved for the JSON header, and the size of the whole head."""
    # The one unknown is the number of frame bytes: room is kept for 20 digits.
    header = _header_json(num_chunks, num_frames, num_rows, 10**19, metadata)
    reserved = (len(header) + 7) // 8 * 8
    return reserved, 8 + reserved + 8 * (num_chunks * (num_frames + 1) + num_rows)


def _header_json(num_chunks: int, num_frames: int, num_rows: int, frame_bytes: int, metadata: dict[str, str]) -> bytes:
    end_offsets = 8 * num_chunks * (num_frames + 1)
    end_indices = end_offsets + 8 * num_rows
    header: dict[str, Any] = {
        "__metadata__": metadata,
        "frame_offsets": {
            "dtype": "I64",
            "shape": [num_chunks, num_frames + 1],
            "data_offsets": [0, end_offsets],
        },
        "sample_indices": {"dtype": "I64", "shape": [num_rows], "data_offsets": [end_offsets, end_indices]},
        "frames": {
            "dtype": "U8",
            "shape": [frame_bytes],
            "data_offsets": [end_indices, end_indices + frame_bytes],
        },
    }
    return json.dumps(header, sort_keys=True).encode()


def head_size(num_chunks: int, num_frames: int, num_rows: int, metadata: dict[str, str]) -> int:
    """Return the size in bytes of a shard's head; known before any frame is."""
    return _head_layout(num_chunks, num_frames, num_rows, metadata)[1]


def write_shard_head(
    file: BinaryIO,
    frame_offsets: npt.NDArray[np.int64],
    sample_indices: npt.NDArray[np.int64],
    metadata: dict[str, str],
) -> None:
    """Write the head of a shard whose frames already follow at ``head_size``."""
    num_chunks, width = frame_offsets.shape
    num_rows = len(sample_indices)
    reserved, _ = _head_layout(num_chunks, width - 1, num_rows, metadata)
    header = _header_json(num_chunks, width - 1, num_rows, int(frame_offsets[-1, -1]), metadata)
    file.seek(0)
    file.write(struct.pack("<Q", reserved))
    file.write(header.ljust(reserved))  # safetensors allows trailing spaces
    file.write(frame_offsets.astype("<i8").tobytes())
    file.write(sample_indices.astype("<i8").tobytes())


def read_shard_head(path: Path) -> ShardHead:
    """Read and check the head of a shard.

    Raises:
        CacheCorruptError: Not a shard, truncated, or offsets that do not tile its frames.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (reserved,) = struct.unpack("<Q", file.read(8))
            if not 2 <= reserved <= min(MAX_HEAD_BYTES, size):
                raise ValueError(f"a header of {reserved} bytes in a file of {size}")
            header = json.loads(file.read(reserved))
            metadata = header["__metadata__"]
            num_chunks, width = header["frame_offsets"]["shape"]
            (num_rows,) = header["sample_indices"]["shape"]
            (frame_bytes,) = header["frames"]["shape"]
            counts: Sequence[int] = (num_chunks, width, num_rows, frame_bytes)
            if not all(isinstance(count, int) and count >= 0 for count in counts) or width < 2:
                raise ValueError(f"shapes {list(counts)}")
            head_bytes = 8 + reserved + 8 * (num_chunks * width + num_rows)
            if head_bytes > MAX_HEAD_BYTES or head_bytes + frame_bytes != size:
                raise ValueError(f"{size} bytes, expected {head_bytes + frame_bytes}")
            expected = json.loads(_header_json(num_chunks, width - 1, num_rows, frame_bytes, metadata))
            if header != expected or metadata.get("format") != FORMAT:
                raise ValueError("foreign tensors, offsets or metadata in its header")
            numbers = np.frombuffer(file.read(head_bytes - 8 - reserved), dtype="<i8")
    except FileNotFoundError:
        raise CacheCorruptError(f"{path} is missing. Delete the cache folder to rebuild it.") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise CacheCorruptError(f"{path} is damaged: {error}. Delete it, or the cache folder, to rebuild.") from error
    offsets = numbers[: num_chunks * width].reshape(num_chunks, width)
    ends = offsets.reshape(-1)
    tiled = (
        num_chunks > 0 and offsets[0, 0] == 0 and offsets[-1, -1] == frame_bytes and bool((np.diff(ends) >= 0).all())
    )
    if not tiled or not np.array_equal(offsets[1:, 0], offsets[:-1, -1]):
        raise CacheCorruptError(f"{path} is damaged: its frame offsets do not tile its {frame_bytes} bytes of frames.")
    return ShardHead(metadata, offsets, numbers[num_chunks * width :], head_bytes)


def read_chunk_frames(path: Path, head: ShardHead, position: int) -> list[Buffer]:
    """Read the frames of one chunk of a shard.

    Args:
        path: The shard.
        head: Its head.
        position: The chunk's place in the shard.

    Raises:
        ValueError: The file is shorter than its head promises.
    """
    offsets = head.frame_offsets[position]
    length = int(offsets[-1] - offsets[0])
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), length, head.head_bytes + int(offsets[0]))
    if len(data) != length:
        raise ValueError(f"{len(data)} bytes left of {length}")
    bounds = (offsets - offsets[0]).tolist()
    return [memoryview(data)[start:end] for start, end in itertools.pairwise(bounds)]


def read_extra(spec: ExtraSpec, frame: Buffer, samples: int) -> torch.Tensor:
    """Decode the frame of an extra, (samples, ...).

    Raises:
        ValueError: Damaged, or of another size.
    """
    shape = (samples, *spec.shape)
    content = decompress_frame(frame, math.prod(shape) * spec.torch_dtype.itemsize)
    return torch.frombuffer(bytearray(content), dtype=spec.torch_dtype).reshape(shape)
