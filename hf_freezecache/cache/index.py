"""The on-disk format, version 1. Known to writer and reader; knows neither.

These files make up a cache directory.

    index.json                       written last: names every other file with size and SHA-256
    codec.safetensors                fitted tensors of a lossy codec and its calibration; absent if lossless
    copies.safetensors               the same of the codec of views 1 and up; absent if it is that of view 0
    index/view-00/part-00000.parquet one row per stored sample: where it lies, and its labels
    view-00/shard-00000.safetensors  the hidden states of shard_chunks chunks in one view
    provenance.json                  what it was made of, for its card; may be absent or wrong: nothing depends on it

A shard is a valid safetensors file. Its tensors are, in file order, ``frame_offsets`` (chunks, frames + 1), I64, into
``frames``; ``sample_indices`` (rows,), I64; ``frames`` (bytes,), U8: for each chunk the codec's frames, then one frame
per extra. One extra, ``view_geometry``, is for decoding: where the view lies in its image. Everything before ``frames`` is the *head*, which has a hash of its own, so that a reader can trust it
without reading the frames; each frame is a zstd frame with its own checksum.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..codecs import codec_from_dict
from ..errors import (
    CacheCorruptError,
    UnsupportedSetupError,
)
from .schema import (
    CODEC_NAME,
    COPIES_NAME,
    FILE_NAME,
    MAX_INDEX_BYTES,
    check_document,
    parse_json,
    shard_name,
    table_name,
)
from .shard_file import (
    FORMAT,
    FORMAT_VERSION,
    ExtraSpec,
    ShardHeader,
    file_sha256,
    header_size,
    read_chunk_frames,
    read_extra,
    read_shard_header,
    shard_metadata,
    write_shard_header,
)
from .storage import (
    Storage,
    open_storage,
)

__all__ = [
    "CODEC_NAME",
    "CONSUMED_NAME",
    "COPIES_NAME",
    "FILE_NAME",
    "FORMAT",
    "FORMAT_VERSION",
    "INDEX_NAME",
    "PROVENANCE_NAME",
    "CacheIndex",
    "ExtraSpec",
    "FileRecord",
    "ShardHeader",
    "atomic_write",
    "file_sha256",
    "fsync_directory",
    "header_size",
    "load_index",
    "read_chunk_frames",
    "read_extra",
    "read_shard_header",
    "save_index",
    "shard_metadata",
    "shard_name",
    "table_name",
    "write_shard_header",
]

INDEX_NAME = "index.json"
PROVENANCE_NAME = "provenance.json"
#: The index of a cache that gives way, shard by shard, to the one that is computed from it.
CONSUMED_NAME = "index.consumed.json"


@dataclass(frozen=True)
class FileRecord:
    """Size and hashes of one file.

    Attributes:
        bytes: Size.
        sha256: Of the whole file.
        header_bytes: Size of a shard's head; 0 for other files.
        head_sha256: Of the head; empty for other files.
    """

    bytes: int
    sha256: str
    header_bytes: int = 0
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
        num_samples: Rows of the data set, or of its part.
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
        part: Which part of the data set this is a cache of, see ``ChunkLayout.part``; ``None``, and then absent from the
            file, for all of it.
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
    part: tuple[int, int, int] | None = None

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
        names = (name(view, shard) for name in (shard_name, table_name) for shard in range(self.num_shards))
        return sum(self.files[name].bytes for name in names)


def _canonical(index: CacheIndex) -> bytes:
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(index)}
    for name in ("calibration", "copies", "copies_calibration", "part"):
        if document[name] is None:
            del document[name]
    body = json.dumps(document, sort_keys=True)
    document["checksum"] = hashlib.sha256(body.encode()).hexdigest()
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()


def save_index(directory: Path, index: CacheIndex) -> None:
    """Write ``index.json``, which commits the cache."""
    with atomic_write(directory / INDEX_NAME) as file:
        file.write(_canonical(index))


def load_index(directory: Path | Storage, name: str = INDEX_NAME) -> CacheIndex:
    """Read and check ``index.json``, or what it has been renamed to.

    Its bytes must be exactly those that ``save_index`` writes for its content, so that any altered bit shows.

    Raises:
        CacheCorruptError: Missing, too large, altered, or saying what no cache says.
        UnsupportedSetupError: Written in another version of the format, or with an unknown codec.
    """
    storage = open_storage(directory)
    file = storage.file(name)
    size = file.size()
    if size is None:
        raise CacheCorruptError(
            f"{storage} is no finished cache: it has no {INDEX_NAME}. If a build was interrupted, run the same "
            "training script again to finish it."
        )
    if size > MAX_INDEX_BYTES:
        raise CacheCorruptError(f"{file} has {size} bytes, expected at most {MAX_INDEX_BYTES}. Not a cache index.")
    raw = file.read(0, size)
    try:
        document = parse_json(raw)
    except ValueError as error:
        raise CacheCorruptError(f"{file} is damaged: {error}. Delete {storage} to rebuild.") from error
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise CacheCorruptError(f"{file} is not the index of a {FORMAT} cache.")
    version = document.pop("format_version", None)
    document.pop("checksum", None)
    if version != FORMAT_VERSION:
        raise UnsupportedSetupError(
            f"{file} has format version {repr(version)[:80]}; this version of hf_freezecache reads {FORMAT_VERSION}. "
            "Install the version that wrote it, or delete the folder to rebuild."
        )
    try:
        check_document(document)
        index = CacheIndex(
            **{
                **document,
                "image_shape": tuple(document["image_shape"]),
                "hidden_shape": tuple(document["hidden_shape"]),
                "extras": tuple(ExtraSpec(**{**extra, "shape": tuple(extra["shape"])}) for extra in document["extras"]),
                "files": {name: FileRecord(**record) for name, record in document["files"].items()},
                "part": None if document.get("part") is None else tuple(document["part"]),
            }
        )
        intact = _canonical(index) == raw
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CacheCorruptError(f"{file} is damaged: {type(error).__name__}: {error}.") from error
    if not intact:
        raise CacheCorruptError(f"{file} is damaged: its checksum does not match. Delete {storage} to rebuild.")
    codec_from_dict(index.codec)
    return index


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` for writing; on success fsync it and rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: a process of a run that was killed in part may still be writing this very file.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
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
