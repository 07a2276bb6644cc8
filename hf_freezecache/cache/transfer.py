"""Checks files of a cache against its index, and copies a cache from folder to folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..errors import (
    CacheCorruptError,
    CacheWriteError,
)
from .index import (
    INDEX_NAME,
    PROVENANCE_NAME,
    CacheIndex,
    FileRecord,
    Selection,
    fsync_directory,
    load_index,
)
from .shard_file import file_sha256

__all__ = ["check_free_space", "check_vacant", "copy_cache", "file_problem", "put_in_place", "scratch_of"]


def file_problem(path: Path, record: FileRecord) -> str | None:
    """Say what is wrong with a file of a cache: missing, of another size or altered; ``None`` if it is sound."""
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != record.bytes:
        return f"{path} has {size} bytes, expected {record.bytes}"
    return None if file_sha256(path) == record.sha256 else f"{path} is altered: its SHA-256 is not that of {INDEX_NAME}"


def check_vacant(directory: Path) -> None:
    """Refuse a folder that holds something, since nothing is overwritten.

    Raises:
        CacheWriteError: It is a file, or a folder that is not empty.
    """
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists():
        what = "is not empty" if directory.is_dir() else "is a file"
        raise CacheWriteError(f"{directory} {what}; nothing is overwritten. Give another path, or remove it first.")


def check_free_space(directory: Path, num_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        CacheWriteError: Fewer bytes are free on the disk of the folder.
    """
    free = shutil.disk_usage(next(path for path in [directory, *directory.absolute().parents] if path.is_dir())).free
    if free < num_bytes:
        raise CacheWriteError(
            f"{directory} has room for {free / 2**20:,.0f} MiB, {num_bytes / 2**20:,.0f} MiB are needed. Make room, choose "
            "another place, or take fewer views or shards."
        )


def copy_cache(source: Path, target: Path, selection: Selection | None = None) -> CacheIndex:
    """Copy a cache, or some views and shards of it.

    Each file is checked in its copy, and the copy appears as a whole or not at all.

    Args:
        source: A finished cache.
        target: A new or empty folder; it is made with its parents.
        selection: What to copy; default all.

    Returns:
        The index.

    Raises:
        CacheCorruptError: A file of the source is missing or damaged; the message names it.
        CacheWriteError: The target is not empty, or cannot be written.
        IndexError: The cache has no such view or shard.
    """
    index, target = load_index(source), target.resolve()
    names = (selection or Selection()).files(index)
    check_vacant(target)
    check_free_space(target, sum(index.files[name].bytes for name in names))
    scratch = scratch_of(target, f"{os.getpid()}.tmp")
    try:
        for name in [*names, INDEX_NAME, *([PROVENANCE_NAME] if (source / PROVENANCE_NAME).is_file() else [])]:
            copy = scratch / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(source / name, copy)
            except FileNotFoundError:
                raise CacheCorruptError(f"{source / name} is missing; nothing was copied.") from None
            problem = file_problem(copy, index.files[name]) if name in index.files else None
            if problem is not None:
                raise CacheCorruptError(
                    f"{source / name} cannot be copied: {problem.replace(str(copy), 'it')}. Check {source} with "
                    "hf-freezecache verify."
                )
        if load_index(scratch) != index:
            raise CacheCorruptError(f"{source / INDEX_NAME} changed while it was copied.")
        put_in_place(scratch, target)
    except OSError as error:
        if isinstance(error, (CacheCorruptError, CacheWriteError)):
            raise
        raise CacheWriteError(f"{target} could not be written: {error}. Nothing was left behind.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return index


def scratch_of(target: Path, purpose: str) -> Path:
    """Return the folder where a copy is prepared that ``put_in_place`` moves to its target.

    It lies on the same file system: beside the target; or in it if it exists, since it may be a mount, or where a shell stands.
    """
    target = target.absolute()
    return target / f".{purpose}" if target.is_dir() else target.with_name(f".{target.name}.{purpose}")


def put_in_place(scratch: Path, target: Path) -> None:
    """Flush a complete folder and rename it to its target; or move its files into the target if that exists."""
    last = (INDEX_NAME, PROVENANCE_NAME)  # the index makes a cache of the folder, and its provenance describes a cache
    files = [path for path in scratch.rglob("*") if path.is_file()]
    files.sort(key=lambda path: last.index(path.name) if path.name in last else -1)
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if target.is_dir():
        for path in files:
            destination = target / path.relative_to(scratch)
            destination.parent.mkdir(parents=True, exist_ok=True)
            path.replace(destination)
            fsync_directory(destination.parent)
        shutil.rmtree(scratch)
        fsync_directory(target)
    else:
        scratch.rename(target)
    fsync_directory(target.absolute().parent)
