"""``index.json``, which commits a cache and names its files; and selections of what it names. See ``docs/format.md``.

The on-disk format is known to writer and reader, and knows neither.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
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
    "FileRecord",
    "Selection",
    "atomic_write",
    "fsync_directory",
    "load_index",
    "save_index",
    "shard_name",
    "table_name",
]

INDEX_NAME = "index.json"
PROVENANCE_NAME = "provenance.json"
#: The index of a cache that gives way, shard by shard, to the one that is computed from it.
CONSUMED_NAME = "index.consumed.json"
#: Entries of the index that are absent from the file where their value is ``None``.
_OPTIONAL = ("calibration", "copies", "copies_calibration", "rows")


@dataclass(frozen=True)
class FileRecord:
    """Size and hashes of one file.

    Attributes:
        bytes: Size.
        sha256: Of the whole file.
        header_bytes: Size of a shard's header; 0 for other files.
        header_sha256: Of the header; empty for other files.
    """

    bytes: int
    sha256: str
    header_bytes: int = 0
    header_sha256: str = ""


@dataclass(frozen=True)
class CacheIndex:
    """Content of ``index.json``.

    Attributes:
        fingerprint: Component -> value.
        split_point: Number of blocks in the prefix.
        num_views: Stored views.
        image_shape: (channels, height, width) of the images the prefix saw, or (patches, values) of each.
        num_tokens: Tokens per sample in the model.
        hidden_shape: (stored tokens, hidden) per sample. Where fewer tokens are stored than the model has, the extra
            ``token_positions`` says which.
        dtype: Safetensors name of the dtype of the hidden states.
        codec: ``{"name", "configuration"}``.
        num_samples: Stored samples per view.
        chunk_size: Samples per chunk.
        shard_chunks: Chunks per shard.
        layout_seed: Seed of the chunk layout.
        extras: What is stored beside the hidden states.
        files: Relative path -> record.
        calibration: How the codec was chosen and what it costs; ``None`` where there is no ``codec.safetensors``.
        copies: ``{"name", "configuration"}`` of the codec of views 1 and up; ``None`` if it is that of view 0.
        copies_calibration: How the codec of copies was chosen; ``None`` with it.
        rows: Which of the permuted rows of the data set are stored, see ``ChunkLayout.rows``; ``None`` for all.
    """

    fingerprint: dict[str, str]
    split_point: int
    num_views: int
    image_shape: tuple[int, ...]
    num_tokens: int
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
    rows: tuple[int, int, int] | None = None

    @property
    def num_shards(self) -> int:
        """Shards per view."""
        return -(-self.num_samples // (self.chunk_size * self.shard_chunks))

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards, index tables and codec states."""
        return sum(record.bytes for record in self.files.values())

    @property
    def bits_per_element(self) -> float:
        """Stored bits of all files per element of the hidden states."""
        elements = self.num_samples * self.num_views * self.hidden_shape[0] * self.hidden_shape[1]
        return 8 * self.total_bytes / elements

    def view_bytes(self, view: int) -> int:
        """Return the bytes of the shards and index tables of one view."""
        names = (name(view, shard) for name in (shard_name, table_name) for shard in range(self.num_shards))
        return sum(self.files[name].bytes for name in names)


def _canonical(index: CacheIndex) -> bytes:
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(index)}
    for name in _OPTIONAL:
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
    """Read and check ``index.json``.

    Its bytes must be exactly those that ``save_index`` writes for its content, so that any altered bit shows.

    Args:
        directory: The cache.
        name: Name of the file, if it has been renamed.

    Raises:
        CacheCorruptError: The file is missing, too large or altered, or says what no cache can say.
        UnsupportedSetupError: It has another version of the format, an entry of a later one, or an unknown codec.
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
            "Delete the folder, or give another freezecache_dir, to rebuild the cache; or install the version that wrote it."
        )
    unknown = sorted(document.keys() - {field.name for field in dataclasses.fields(CacheIndex)})
    if unknown:
        raise UnsupportedSetupError(
            f"{file} has entries that this version of hf_freezecache does not know: {', '.join(unknown)[:300]}. A later "
            "version wrote it. Install that version, or delete the folder to rebuild."
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
                "rows": None if document.get("rows") is None else tuple(document["rows"]),
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
    # Another process, of a run that was killed in part, may still be writing this very file: names must differ.
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


@dataclass(frozen=True)
class Selection:
    """Some views and shards of a cache, which can be fetched, opened and copied by themselves.

    Attributes:
        views: Numbers of the views; ``None`` for all.
        shards: Numbers of the shards, the same in each view; ``None`` for all.
    """

    views: tuple[int, ...] | None = None
    shards: tuple[int, ...] | None = None

    @classmethod
    def of(cls, views: Sequence[int] | None = None, shards: Sequence[int] | None = None) -> Selection:
        """Return a selection of any sequences of numbers."""
        return cls(
            None if views is None else tuple(sorted(set(views))), None if shards is None else tuple(sorted(set(shards)))
        )

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self.views is None and self.shards is None

    def chosen_views(self, index: CacheIndex) -> tuple[int, ...]:
        """Return the numbers of the views.

        Raises:
            IndexError: The cache has no such view, or none was chosen.
        """
        return _checked("view", self.views, index.num_views)

    def chosen_shards(self, index: CacheIndex) -> tuple[int, ...]:
        """Return the numbers of the shards.

        Raises:
            IndexError: The cache has no such shard, or none was chosen.
        """
        return _checked("shard", self.shards, index.num_shards)

    def files(self, index: CacheIndex) -> list[str]:
        """Return the names of the files that are needed beside ``index.json``, sorted.

        View 0 is always among them where other views are predicted from it.

        Raises:
            IndexError: The cache has no such view or shard.
        """
        views = set(self.chosen_views(index))
        if index.copies is not None and index.copies.get("configuration", {}).get("predictor") is not None:
            views.add(0)
        names = {name for name in (CODEC_NAME, COPIES_NAME) if name in index.files}
        for view in views:
            for shard in self.chosen_shards(index):
                names |= {shard_name(view, shard), table_name(view, shard)}
        return sorted(names)


def _checked(what: str, chosen: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    if chosen is None:
        return tuple(range(count))
    if not chosen or not all(0 <= number < count for number in chosen):
        raise IndexError(f"{what}s {list(chosen)} were asked for; the cache has {what}s 0 to {count - 1}.")
    return chosen
