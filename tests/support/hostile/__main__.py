"""Reads and verifies all cases in one process; prints the peak of memory above that of reading sound ones, case by case."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from pathlib import Path

import torch

from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.errors import CacheCorruptError, UnsupportedSetupError
from support.hostile import CASES, ONLY_VERIFIED, make_hostile, read_all, sound_caches


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return next(
        1024 * int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(name)
    )


def main() -> None:
    """Print for each case the peak of memory above what reading and verifying sound caches takes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sound = sound_caches(Path(folder) / "sound")
        for cache in sound.values():
            read_all(cache)
            assert verify_cache(cache) == []
        made = {}
        for number, name in enumerate(CASES):
            place = Path(folder) / f"{number}"
            place.mkdir()
            made[name] = make_hostile(name, sound, place)
        # What crafting freed would hide what reading takes.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        peaks = {}
        for name, cache in made.items():
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is there
            before = _status("VmRSS")
            try:
                read_all(cache)
                assert name in ONLY_VERIFIED, name
            except (CacheCorruptError, UnsupportedSetupError):
                pass
            assert verify_cache(cache), name
            peaks[name] = _status("VmHWM") - before
        print(json.dumps(peaks))


if __name__ == "__main__":
    sys.exit(main())
