"""Reads a whole cache and names every damaged file."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CacheCorruptError, FreezeCacheError
from .index import (
    CODEC_NAME,
    COPIES_NAME,
    INDEX_NAME,
    PROVENANCE_NAME,
    CacheIndex,
    load_index,
    shard_name,
    table_name,
)
from .index_tables import check_table
from .reader import CacheReader
from .shard_file import file_sha256
from .storage import Storage, open_storage

__all__ = ["verify_cache"]


def verify_cache(directory: Path | str) -> list[str]:
    """Check every bit of every file of a cache, and that the files make sense together.

    Hashes are compared first. They only say that files are those of the index, so then every frame is decoded. Hidden states
    must be finite, token positions must ascend, headers must list each sample once, and index tables must say of it what
    the shards say. Verifying takes the memory of a few chunks and of a shard's labels.

    Args:
        directory: The cache, as for ``CacheReader``.

    Returns:
        One line per damaged, missing or foreign file; nothing for a sound cache.
    """
    try:
        reader = CacheReader(directory, check_files=False)
    except FreezeCacheError as error:
        refusal: FreezeCacheError | None = error
        try:
            storage = open_storage(directory)
            index = load_index(storage)
        except FreezeCacheError as other:
            return [str(other)]
    else:
        refusal, storage, index = None, reader.storage, reader.index
    problems = _file_problems(storage, index)
    if refusal is not None:
        # What is wrong with the file of a codec says more than that the codec could not be made.
        if not problems.keys() & {CODEC_NAME, COPIES_NAME}:
            problems[CODEC_NAME] = str(refusal)
    elif not any(_is_shard(name) for name in problems):
        # Only now can the number of samples be trusted: the files hold 8 bytes for each.
        problems |= _content_problems(reader, problems.keys())
    try:
        foreign = [name for name in storage.names() if name not in {INDEX_NAME, PROVENANCE_NAME, *index.files}]
    except CacheCorruptError as error:
        return [*problems.values(), str(error)]
    return [
        *(problems[name] for name in sorted(problems)),
        *(f"{storage.file(n)} does not belong to the cache." for n in foreign),
    ]


def _is_shard(name: str) -> bool:
    return name.startswith("view-")


def _file_problems(storage: Storage, index: CacheIndex) -> dict[str, str]:
    """Return by name what is wrong with files, without a look at what they mean."""
    problems = {}
    for name, record in index.files.items():
        file = storage.file(name)
        try:
            size = file.size()
            if size is None:
                problems[name] = f"{file} is missing."
            elif size != record.bytes:
                problems[name] = f"{file} has {size} bytes, expected {record.bytes}."
            elif file_sha256(file) != record.sha256:
                problems[name] = f"{file} is altered: its SHA-256 does not match {INDEX_NAME}."
        except CacheCorruptError as error:
            problems[name] = str(error)
    return problems


def _content_problems(reader: CacheReader, damaged: Collection[str]) -> dict[str, str]:
    """Return by name what is wrong with the content of shards, and of those index tables that are not damaged."""
    index, problems = reader.index, dict[str, str]()
    for shard, view in itertools.product(range(index.num_shards), range(index.num_views)):
        if view == 0:
            reader._headers.clear()
        name, table = shard_name(view, shard), table_name(view, shard)
        base_is_sound = shard_name(0, shard) not in problems
        columns: dict[str, list[Any]] = {}
        try:
            first = shard * index.shard_chunks
            for chunk in range(first, min(first + index.shard_chunks, reader.layout.num_chunks)):
                packed = (
                    reader.entropy_decode_chunk(view, chunk) if base_is_sound else reader._decode_frames(view, chunk)
                )
                _append_columns(columns, packed.extras, reader.members(chunk).tolist(), view, shard, chunk)
        except CacheCorruptError as error:
            problems[name] = str(error)
            continue
        if table not in damaged:
            try:
                check_table(reader.storage.file(table), columns)
            except CacheCorruptError as error:
                problems[table] = str(error)
            except ValueError as error:
                problems[table] = f"{reader.storage.file(table)} does not fit its shard: {error}."
    return problems


def _append_columns(
    columns: dict[str, list[Any]], extras: dict[str, Tensor], rows: list[int], view: int, shard: int, chunk: int
) -> None:
    """Add what an index table must say of the samples of a chunk."""
    size = len(rows)
    chunk_columns = {
        "sample_index": rows,
        "view": [view] * size,
        "shard": [shard] * size,
        "chunk": [chunk] * size,
        "row": list(range(size)),
    } | {name: value.tolist() for name, value in extras.items() if value.dim() == 1}
    for name, values in chunk_columns.items():
        columns.setdefault(name, []).extend(values)
