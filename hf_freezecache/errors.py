"""Exceptions. Each is also of the builtin kind that a caller would expect."""

from __future__ import annotations

__all__ = [
    "CacheCorruptError",
    "CacheLockedError",
    "CacheMismatchError",
    "CacheWriteError",
    "DataError",
    "FreezeCacheError",
    "HubError",
    "PeerError",
    "RunError",
    "ScheduleError",
    "UnrepeatableTransformError",
    "UnsupportedModelError",
    "UnsupportedSetupError",
]


class FreezeCacheError(Exception):
    """Base class of every error this package raises on purpose."""


class UnsupportedModelError(FreezeCacheError, ValueError):
    """The model cannot be split, or its split does not reproduce it."""


class UnsupportedSetupError(FreezeCacheError, ValueError):
    """Arguments, library versions or a kind of dataset that cached training cannot work with."""


class ScheduleError(FreezeCacheError, ValueError):
    """A freezing schedule that cannot be read, or that asks for something impossible."""


class DataError(FreezeCacheError, ValueError):
    """A row of the user's dataset, or what the transform or collator made of it, cannot be used."""


class RunError(FreezeCacheError, ValueError):
    """A folder holds no training run, or one whose files cannot be read."""


class UnrepeatableTransformError(FreezeCacheError, ValueError):
    """The transform drew two different images under the same random state."""


class CacheMismatchError(FreezeCacheError, ValueError):
    """A cache was written for other data, weights or settings than the ones at hand."""


class CacheCorruptError(FreezeCacheError, OSError):
    """A file of a cache is missing, truncated or altered."""


class CacheLockedError(FreezeCacheError, BlockingIOError):
    """Another live process is writing this cache."""


class CacheWriteError(FreezeCacheError, OSError):
    """A cache could not be written: the disk is full, or the folder is read-only."""


class PeerError(FreezeCacheError, ChildProcessError):
    """Another process of the run failed, so that this one cannot go on."""


class HubError(FreezeCacheError, OSError):
    """The Hub could not be reached, or refused what was asked of it."""
