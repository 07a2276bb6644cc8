"""Run in a child process: holds the lock of a cache until it is killed or its time is up."""

from __future__ import annotations

import time
from pathlib import Path

from hf_freezecache.cache.lock import build_lock
from support import tiny_cache


def hold(folder: Path, mark: Path, seconds: float) -> None:
    with build_lock(folder, tiny_cache.make_plan()):
        mark.touch()
        time.sleep(seconds)
