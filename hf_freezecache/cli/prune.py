"""What ``hf-freezecache prune`` does: finds the caches of a folder, finished or not, and deletes those that are asked for.

A folder is taken for a cache only if all that it holds is what this library writes into one.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import filelock

from ..errors import CacheCorruptError, CacheLockedError, FreezeCacheError
from ..report.text import counted, size_words
from .describe import is_cache_name

__all__ = ["FoundCache", "caches_of", "delete", "others_in"]

DAY = 86400
#: What comes to a cache with a repository of the Hub.
_OF_THE_HUB = ("README.md", "LICENSE", ".gitattributes")
#: A file that is being written, and folders that copies and downloads leave when they are killed.
_PENDING, _SCRATCH = r"(\.[0-9a-f]{12}\.tmp)?", r"\.(cache|freezecache-pull|\d+\.tmp)/.*"


@dataclass(frozen=True)
class FoundCache:
    """A cache of a folder, finished or not.

    Attributes:
        path: Its folder.
        bytes: Size of its files.
        finished: Whether it has its index.
        modified: When it was written last, or measured for another head, seconds since 1970. Reading leaves no trace.
        split_point: Number of frozen blocks; ``None`` if that cannot be read.
        problem: Why it cannot be opened, if it is finished and cannot.
        content: What it holds, in words.
    """

    path: Path
    bytes: int
    finished: bool
    modified: float
    split_point: int | None
    problem: str | None
    content: str

    @property
    def days(self) -> float:
        """Days since it was written."""
        return max(time.time() - self.modified, 0.0) / DAY

    @property
    def words(self) -> str:
        """Size, age and content."""
        return f"{size_words(self.bytes)}, {self.days:.0f} days old, {self.problem or self.content}"


def caches_of(folder: Path) -> list[FoundCache]:
    """Return the caches right below a folder, sorted by name. A folder with anything else in it is none.

    Raises:
        CacheCorruptError: It is no folder.
    """
    if not folder.is_dir():
        raise CacheCorruptError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}.")
    return [_found(child) for child in sorted(folder.iterdir()) if _is_cache(child)]


def others_in(folder: Path, caches: Iterable[FoundCache]) -> list[Path]:
    """Return what lies right below a folder and is neither one of its caches nor a lock or note of one, sorted by name."""
    known = {cache.path for cache in caches}
    return [
        child
        for child in sorted(folder.iterdir())
        if child not in known and not (child.name.startswith(".") and child.suffix in (".lock", ".json"))
    ]


def _is_cache(path: Path) -> bool:
    """Say whether a folder is a cache, finished or not: by its name or its index, and by all that is in it."""
    from ..cache.commit import SCRATCH
    from ..cache.index import CONSUMED_NAME, INDEX_NAME, PROVENANCE_NAME
    from ..cache.schema import FILE_NAME
    from ..cache.shard_file import FORMAT

    if not path.is_dir() or path.is_symlink():
        return False
    if not is_cache_name(path.name):
        try:
            if json.loads((path / INDEX_NAME).read_bytes())["format"] != FORMAT:
                return False
        except (OSError, ValueError, LookupError, TypeError):
            return False
    beside = "|".join(map(re.escape, (INDEX_NAME, CONSUMED_NAME, PROVENANCE_NAME, *_OF_THE_HUB)))
    scratch = f"{re.escape(SCRATCH)}/.*|{_SCRATCH}"
    own = re.compile(f"({FILE_NAME.pattern}|{beside}){_PENDING}|{scratch}", re.DOTALL)
    files = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    return all(own.fullmatch(name) for name in files)


def _found(path: Path) -> FoundCache:
    from ..cache.index import INDEX_NAME, load_index

    files = [file for file in path.rglob("*") if file.is_file()]
    notes = [note for note in path.parent.glob(f".{path.name}.*.json") if note.is_file()]
    finished, split_point, problem, content = (path / INDEX_NAME).is_file(), None, None, "unfinished"
    if finished:
        try:
            index = load_index(path)
        except (FreezeCacheError, OSError) as error:
            problem = str(error)
        else:
            split_point = index.split_point
            blocks, views = counted(index.split_point, "block"), counted(index.num_views, "view")
            content = f"{blocks}, {index.num_samples:,} samples, {views}"
    elif is_cache_name(path.name):
        split_point = int(path.name[1:].partition("-")[0])
    modified = max((file.stat().st_mtime for file in [*files, *notes]), default=path.stat().st_mtime)
    size = sum(file.stat().st_size for file in files)
    return FoundCache(path, size, finished, modified, split_point, problem, content)


def delete(cache: FoundCache) -> None:
    """Delete a cache and what was noted of it. Its index goes first: what is left after a crash is an unfinished cache.

    Raises:
        CacheLockedError: A run is writing it.
        OSError: It cannot be deleted.
    """
    from ..cache.index import INDEX_NAME

    # The lock's own file stays: another process may wait for it.
    lock = filelock.FileLock(cache.path.with_name(f".{cache.path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise CacheLockedError(
            f"{cache.path} is being written by a live process. It was left alone; prune again when that has ended."
        ) from None
    try:
        (cache.path / INDEX_NAME).unlink(missing_ok=True)
        shutil.rmtree(cache.path)
        for note in cache.path.parent.glob(f".{cache.path.name}.*.json"):
            note.unlink(missing_ok=True)
    finally:
        lock.release()
