"""Two caches of different split points, built in one pass; run as a script, it kills itself at a number of prefix calls."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from hf_freezecache.cache.shard_writer import CachePlan
from hf_freezecache.cache.writer import BuildReport, build_caches
from hf_freezecache.codecs import PRESETS
from hf_freezecache.data.collators import CheckedCollator
from support import tiny_cache


def make_plans() -> list[CachePlan]:
    """Split point 2, lossless, and split point 5 in 8 bits."""
    deeper = tiny_cache.make_plan(**{"split point": "5"})
    return [
        tiny_cache.make_plan(),
        dataclasses.replace(deeper, split_point=5, codec=PRESETS["int8"], calibration={"bits": 8}),
    ]


class Prefixes:
    """Hidden states by split point: those of ``tiny_cache`` at 2, three times as large at 5. Counts its calls."""

    def __init__(self, die_at: int | None = None) -> None:
        self.calls, self.die_at = 0, die_at

    def __call__(self, pixel_values: torch.Tensor) -> dict[int, torch.Tensor]:
        self.calls += 1
        if self.calls == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        states = tiny_cache.prefix(pixel_values)
        return {2: states, 5: 3 * states}


def build(
    cache_dir: Path, prefixes: Any, plans: Sequence[CachePlan] | None = None, **settings: Any
) -> list[BuildReport]:
    plans = plans or make_plans()
    arguments = {"views": tiny_cache.make_views(plans[0]), "collate": CheckedCollator(default_collate), "batch_size": 2}
    return build_caches(cache_dir, plans, prefixes=prefixes, **arguments, **settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    build(Path(sys.argv[1]), Prefixes(int(sys.argv[2])))
