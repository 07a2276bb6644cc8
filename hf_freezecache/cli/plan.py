"""Predicts what caches of several split points take: what ``hf-freezecache plan`` does."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from ..hub.client import quiet_libraries
from ..model.probe import find_blocks
from ..passes import passes_of_step
from ..schedules import Stage
from ..training.adapter import start_run
from ..training.preflight import check_steps
from ..training.stage_costs import measure_rates, stage_seconds
from .build import BuildSettings, make_trainer

__all__ = ["Prediction", "plan", "table_lines"]


@dataclass(frozen=True)
class Prediction:
    """What training behind so many frozen blocks takes.

    Attributes:
        split_point: Number of frozen blocks.
        cache_bytes: Bytes of all views, stored without loss.
        build_seconds: Seconds of building the cache.
        epoch_seconds: Seconds of one epoch from it.
        cached_seconds: Seconds of all epochs from it, building included.
        live_seconds: Seconds of all epochs with the blocks frozen and no cache.
        full_seconds: Seconds of all epochs with all blocks trained.
    """

    split_point: int
    cache_bytes: float
    build_seconds: float
    epoch_seconds: float
    cached_seconds: float
    live_seconds: float
    full_seconds: float


def plan(
    settings: BuildSettings,
    epochs: int,
    split_points: Sequence[int] = (),
    rows: int | None = None,
    token_keep: float = 1.0,
) -> list[Prediction]:
    """Render a few images, run them through frozen blocks, and predict from what that took.

    Args:
        settings: As for ``build``; its ``split_point`` does not matter.
        epochs: Epochs that would be trained.
        split_points: Numbers of frozen blocks; default a quarter, half and three quarters of the blocks, and all but one.
        rows: Images of the data set; default those that it has.
        token_keep: Share of the patch tokens that steps see behind the frozen blocks.

    Raises:
        FreezeCacheError: Data, model or disk are not as they must be; the message says why.
        OSError: Model or data set cannot be loaded.
    """
    with quiet_libraries(settings.show_progress), tempfile.TemporaryDirectory(prefix="hf-freezecache-") as scratch:
        trainer = make_trainer(replace(settings, split_point=1), scratch)
        num_blocks = len(find_blocks(trainer.model)[1])
        asked = split_points or sorted(
            {max(num_blocks * part // 4, 1) for part in (1, 2, 3)} | {max(num_blocks - 1, 1)}
        )
        stages = [Stage(place, place, point) for place, point in enumerate(asked)]
        run = start_run(trainer, stages, len(stages), None)
        check_steps(run, trainer.model)
        count = len(trainer.train_dataset) if rows is None else rows
        measured = {point: measure_rates(run.cache, run.splits.at(point)) for point in asked}
        # Images and blocks are the same for all of them: what one measurement was held up by must not favour another.
        common = {
            name: median(getattr(one, name) for one in measured.values()) for name in ("render", "render_all", "block")
        }
        workers = (run.cache.num_workers, trainer.args.dataloader_num_workers)
        behind = (num_blocks, 0, settings.num_views, token_keep, workers)
        found = []
        for point in asked:
            rates = replace(measured[point], **common)
            build, _ = stage_seconds(rates, [(0, point)], *behind)
            cached, live = stage_seconds(rates, [(epochs, point)], *behind)
            full = epochs * (rates.render + rates.block * passes_of_step(num_blocks, 0))
            found.append(
                Prediction(
                    split_point=point,
                    cache_bytes=count * settings.num_views * rates.stored_bytes,
                    build_seconds=count * build,
                    epoch_seconds=count * (cached - build) / epochs,
                    cached_seconds=count * cached,
                    live_seconds=count * live,
                    full_seconds=count * full,
                )
            )
        return found


def table_lines(found: Sequence[Prediction]) -> list[str]:
    """Return a table of predictions, one line each, and above it what the columns are."""
    lines = [f"{'frozen':>6} {'cache':>10} {'build':>9} {'an epoch':>9} {'in all':>9} {'no cache':>9} {'unfrozen':>9}"]
    for one in found:
        seconds = (one.build_seconds, one.epoch_seconds, one.cached_seconds, one.live_seconds, one.full_seconds)
        cells = " ".join(f"{_duration(value):>9}" for value in seconds)
        lines.append(f"{one.split_point:>6} {one.cache_bytes / 2**20:>6,.0f} MiB {cells}")
    return lines


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
