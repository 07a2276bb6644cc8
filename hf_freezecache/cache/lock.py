"""The lock of a cache that is being written, and what errors of the file system mean to the user."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

try:
    import fcntl
except ImportError:  # Windows, which locks files on every file system
    fcntl = None  # type: ignore[assignment]

from ..distributed.process_group import ProcessGroup
from ..errors import (
    CacheLockedError,
    CacheWriteError,
    FreezeCacheError,
)
from .shard_writer import CachePlan

__all__ = ["SINGLE_PROCESS", "build_lock", "check_lockable", "os_errors_as_cache_errors"]

logger = logging.getLogger(__name__)

SINGLE_PROCESS = ProcessGroup()


@contextmanager
def build_lock(
    cache_dir: Path, plan: CachePlan, process_group: ProcessGroup = SINGLE_PROCESS, lock_timeout: float = 0.0
) -> Iterator[None]:
    """Hold the lock of a cache, and make its directory. Collective: the main process holds the lock for all processes.

    The kernel keeps the lock: it ends with the process that holds it, however that ends.

    Args:
        cache_dir: Folder of caches.
        plan: What the cache is to hold.
        process_group: Processes that write together.
        lock_timeout: Seconds to wait for another run that holds it.

    Raises:
        CacheLockedError: Another live process holds it.
        CacheWriteError: The folder cannot be written, or its file system has no locks.
    """
    directory = cache_dir / plan.name
    lock = filelock.FileLock(cache_dir / f".{plan.name}.lock")

    def take() -> None:
        with os_errors_as_cache_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            # What `filelock` does without locks depends on its version: it waits for nobody, raises, or makes do.
            check_lockable(cache_dir)
            try:
                lock.acquire(timeout=0)
                return
            except filelock.Timeout:
                if lock_timeout > 0:
                    logger.warning(
                        "%s is being written by another process: waiting up to %g s.", directory, lock_timeout
                    )
            try:
                lock.acquire(timeout=lock_timeout)
            except filelock.Timeout:
                raise CacheLockedError(
                    f"{directory} is being written by another live process, for which this one waited {lock_timeout:g} s. "
                    "Wait for it to finish and start again, let this run wait with CacheConfig(lock_timeout=...), or give it "
                    "another freezecache_dir."
                ) from None

    process_group.on_main_process(take)
    try:
        yield
    finally:
        if process_group.is_main_process:
            lock.release()


def check_lockable(cache_dir: Path) -> None:
    """Lock a file of its own in a folder and release it, for some network file systems have no locks.

    Args:
        cache_dir: Folder of caches. It exists.

    Raises:
        CacheWriteError: The file system has no locks.
        OSError: The folder cannot be written.
    """
    if fcntl is None:
        return
    with tempfile.TemporaryFile(dir=cache_dir) as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file.fileno(), fcntl.LOCK_UN)
        except OSError as error:
            raise CacheWriteError(
                f"The file system of {cache_dir} has no file locks: {error}. Without them two runs could write into one cache. "
                "Choose a freezecache_dir on a local disk, or have this file system mounted with locks."
            ) from error


@contextmanager
def os_errors_as_cache_errors(directory: Path) -> Iterator[None]:
    """Turn errors of the file system into one that says what was kept and what to do.

    Raises:
        CacheWriteError: The folder cannot be written, or the disk is full.
    """
    try:
        yield
    except FreezeCacheError:
        raise
    except OSError as error:
        existing = next(path for path in [directory, *directory.absolute().parents] if path.is_dir())
        free = shutil.disk_usage(existing).free
        raise CacheWriteError(
            f"The cache {directory} could not be written: {error} ({free / 2**20:.0f} MiB are free on that disk). Its finished "
            "shards are kept: make room or permit writing, or choose another freezecache_dir, and start again."
        ) from error
