"""Predicts what training by several schedules takes with caches and without: what ``hf-freezecache plan`` does."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from ..config import CacheConfig
from ..hub.client import quiet_libraries
from ..schedules import thawed_to
from ..training.image_rates import Rates, measure_rates
from ..training.planner import epochs_of, states_at
from ..training.stage_costs import build_seconds, decoded_share, epoch_seconds
from .build import BuildSettings, make_trainer
from .given_rates import shown_rates
from .planned_runs import PlannedRun, PlanSettings, check_schedules, planned_runs, views_to_measure

__all__ = ["Plan", "Prediction", "plan", "predict"]


@dataclass(frozen=True)
class Prediction:
    """What training by one schedule takes. Seconds are of the wall clock.

    Attributes:
        schedule: The schedule.
        split_points: Numbers of frozen blocks of its stages.
        cache_bytes: Bytes of all caches that are written, all views, stored without loss.
        peak_bytes: Most bytes of caches at one time.
        build_seconds: Seconds of building the caches.
        epoch_seconds: Seconds of an epoch from them, on average over the run.
        cached_seconds: Seconds of all epochs from them, building included.
        live_seconds: Seconds of all epochs with the blocks frozen and no cache.
        full_seconds: Seconds of all epochs with all blocks trained.
        num_views: Views of each image, where they were chosen for this schedule.
        epochs: Epochs, where they were chosen.
        chosen: What schedule ``"auto"`` says of its choice.
    """

    schedule: str
    split_points: list[int]
    cache_bytes: float
    peak_bytes: float
    build_seconds: float
    epoch_seconds: float
    cached_seconds: float
    live_seconds: float
    full_seconds: float
    num_views: int | None = None
    epochs: float | None = None
    chosen: str | None = None


@dataclass(frozen=True)
class Plan:
    """Predictions, and what they rest on.

    Attributes:
        machine: What was said of the machine; ``None`` if it is this one.
        rows: Images.
        epochs: Epochs asked for.
        num_views: Views of each image that are stored; the most of all schedules, where they were chosen for all.
        devices: Devices that train.
        processes: Processes of each device that render.
        rates: See ``shown_rates``.
        predictions: One of each schedule.
    """

    machine: str | None
    rows: int
    epochs: int
    num_views: int
    devices: int
    processes: int
    rates: dict[str, dict[str, Any]]
    predictions: list[Prediction]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return asdict(self)


def plan(settings: BuildSettings, asked: PlanSettings) -> Plan:
    """Render a few images, run them through frozen blocks, and predict from what that took and from given rates.

    Args:
        settings: As for ``build``; its ``split_point``, ``num_views`` and ``head_rows`` do not matter.
        asked: What to predict.

    Raises:
        FreezeCacheError: Data, model, disk or a schedule are not as they must be; the message says why.
        OSError: Model or data set cannot be loaded.
    """
    check_schedules(asked)
    given, settings = asked.given, replace(settings, split_point=1, head_rows=None)
    with quiet_libraries(settings.show_progress), tempfile.TemporaryDirectory(prefix="hf-freezecache-") as scratch:
        trainer = make_trainer(replace(settings, num_views=views_to_measure(asked)), scratch)
        runs, run = planned_runs(settings, asked, trainer, scratch)
        num_blocks = run.splits.num_blocks
        points = sorted({stage.split_point for one in runs.values() for stage in one.stages if stage.split_point > 0})
        points = points or [1]
        rows = len(trainer.train_dataset) if asked.rows is None else asked.rows
        size = run.runtime.batch_size
        measured = {point: measure_rates(run.cache, run.splits, point, size) for point in points}
        processes = (run.cache.num_workers, trainer.args.dataloader_num_workers)
        config = replace(trainer.cache_config, consume_previous_cache=asked.consume_previous_cache)
    if given.processes is not None:
        processes = (given.processes, given.processes)
    # Images and blocks are the same for all of them: what one measurement was held up by must not favour another.
    common = {
        name: median(getattr(one, name) for one in measured.values())
        for name in ("render", "render_all", "block", "embed", "waiting")
    }
    rates = {point: given.applied(replace(one, **common), num_blocks) for point, one in measured.items()}
    stored = [one.num_views for one in runs.values()]
    return Plan(
        machine=given.name,
        rows=rows,
        epochs=asked.epochs,
        num_views=max(stored) if asked.num_views == "auto" else asked.num_views or 1,
        devices=given.devices,
        processes=processes[1],
        rates=shown_rates(given, rates[points[len(points) // 2]]),
        predictions=[
            predict(text, one, rates, num_blocks, rows, config, asked, processes) for text, one in runs.items()
        ],
    )


def predict(
    schedule: str,
    run: PlannedRun,
    rates: Mapping[int, Rates],
    num_blocks: int,
    rows: int,
    config: CacheConfig,
    asked: PlanSettings,
    processes: tuple[int, int],
) -> Prediction:
    """Add up what the stages of a run take.

    A cache that an earlier stage has made is not built again, a deeper one is computed from that of an earlier stage, and caches of
    later, lower split points are made on the way, as in training.

    Args:
        schedule: The schedule, as text.
        run: What it trains.
        rates: What one image takes, by split point.
        num_blocks: Blocks of the model.
        rows: Images.
        config: Settings of caches. Rates are of its number of views.
        asked: What to predict.
        processes: Of each device: those that render while building, and those that prepare data while training.
    """
    devices, stages, num_views = asked.given.devices, run.stages, run.num_views
    rates = {point: _of_views(rate, num_views, config.num_views) for point, rate in rates.items()}
    one = next(iter(rates.values()))
    shown = {point: run.head_rows if point == num_blocks else 1.0 for point in rates}
    sizes = {point: shown[point] * rows * num_views * rate.stored_bytes for point, rate in rates.items()}
    shard = min(rows, devices * config.chunk_size * config.shard_chunks) / rows
    build = cached = live = written = held = peak = 0.0
    for stage in stages:
        point, epochs = stage.split_point, epochs_of(stage, stages, run.epochs)
        rate, keep = rates.get(point, one), run.token_keep if point else 1.0
        decoded = decoded_share(rate, config, epochs, num_views, rows, devices, shown.get(point, 1.0))
        from_cache, from_images = epoch_seconds(rate, point, num_blocks, keep, processes[1], run.trained_share, decoded)
        cached += epochs * (from_cache if point and point not in run.uncached else from_images)
        live += epochs * from_images
        # A head that trains from images gives no cache on the way.
        source = 0 if run.uncached else states_at(stage, stages, config)
        if source == point or point in run.uncached:  # nothing is frozen, or the cache is there
            continue
        lower = [] if config.consume_previous_cache else thawed_to(stage, stages)
        made = [point, *(each for each in lower if states_at(replace(stage, split_point=each), stages, config) < each)]
        build += build_seconds(rate, point, source, num_views, len(made), processes[0])
        # What the head does not see need not come as far.
        reached = max(made[1:], default=source)
        build -= (1 - shown[point]) * build_seconds(rate, point, reached, num_views, 1, processes[0])
        new = sum(sizes[each] for each in made)
        written += new
        later = {after.split_point for after in stages[stage.index + 1 :]}
        # One of other rows stays.
        if config.consume_previous_cache and source > 0 and source not in later and shown[source] == shown[point]:
            held -= sizes[source]
            peak = max(peak, held + max(sizes[source], new) + shard * new)
        held += new
        peak = max(peak, held)
    share = rows / devices
    return Prediction(
        schedule=schedule,
        split_points=[stage.split_point for stage in stages],
        cache_bytes=written,
        peak_bytes=peak,
        build_seconds=share * build,
        epoch_seconds=share * cached / run.epochs,
        cached_seconds=share * (build + cached),
        live_seconds=share * live,
        full_seconds=share * asked.epochs * epoch_seconds(one, 0, num_blocks, 1.0, processes[1])[1],
        num_views=num_views if asked.num_views == "auto" or (run.chosen and asked.num_views is None) else None,
        epochs=run.epochs if run.chosen else None,
        chosen=run.chosen,
    )


def _of_views(rates: Rates, num_views: int, measured: int) -> Rates:
    """Return rates with a row rendered in another number of views than was measured: what the views share counts once."""
    further = (rates.render_all - rates.render) / max(measured - 1, 1)
    return replace(rates, render_all=rates.render + further * (num_views - 1))
