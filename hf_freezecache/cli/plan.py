"""Predicts what training by several schedules takes with caches and without: what ``hf-freezecache plan`` does."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from ..auto_schedule import views_for
from ..config import CacheConfig
from ..errors import UnsupportedSetupError
from ..hub.client import quiet_libraries
from ..model.probe import find_blocks
from ..schedules import Auto, Stage, adaptive_policy, parse_schedule, plan_stages, thawed_to
from ..training.adapter import start_run
from ..training.planner import epochs_of, most_views, states_at
from ..training.preflight import check_steps
from ..training.stage_costs import Rates, build_seconds, epoch_seconds, measure_rates
from .build import BuildSettings, make_trainer
from .given_rates import GivenRates, shown_rates

__all__ = ["Plan", "PlanSettings", "Prediction", "check_schedules", "plan", "predict", "table_cells", "table_lines"]


@dataclass(frozen=True)
class PlanSettings:
    """What to predict.

    Attributes:
        epochs: Epochs that would be trained.
        schedules: When to freeze how many blocks, as of ``FreezeConfig``. Default: a quarter, half and three quarters of the
            blocks, and all but one, each from the start.
        rows: Images of the data set; default those that it has.
        token_keep: As of ``FreezeConfig``.
        consume_previous_cache: As of ``CacheConfig``.
        chooses_views: Store as many views as ``num_views="auto"`` chooses for each schedule, in place of those of the settings.
        given: Rates of another machine, in place of what is measured.
    """

    epochs: int
    schedules: Sequence[str] = ()
    rows: int | None = None
    token_keep: float = 1.0
    consume_previous_cache: bool = False
    given: GivenRates = field(default_factory=GivenRates)
    chooses_views: bool = False


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


@dataclass(frozen=True)
class Plan:
    """Predictions, and what they rest on.

    Attributes:
        machine: What was said of the machine; ``None`` if it is this one.
        rows: Images.
        epochs: Epochs.
        num_views: Views of each image that are stored; the most of all schedules, where they were chosen.
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


def check_schedules(schedules: Sequence[str]) -> None:
    """Check what can be checked of schedules without a model.

    Raises:
        ScheduleError: One cannot be read.
        UnsupportedSetupError: One is ``"auto"``, or decides while training.
    """
    for schedule in schedules:
        if adaptive_policy(schedule) is not None:
            raise UnsupportedSetupError(
                f"schedule={schedule!r} decides while it trains how many blocks to freeze, so what it takes is not known before. Plan "
                "schedules that are written out, such as '0:0,2:3,4:6'."
            )
        if isinstance(parse_schedule(schedule), Auto):
            raise UnsupportedSetupError(
                "schedule='auto' chooses epochs, views and tokens, too. Plan a schedule that is written out, such as '0:12,2:6'."
            )


def plan(settings: BuildSettings, asked: PlanSettings) -> Plan:
    """Render a few images, run them through frozen blocks, and predict from what that took and from given rates.

    Args:
        settings: As for ``build``; its ``split_point`` does not matter.
        asked: What to predict.

    Raises:
        FreezeCacheError: Data, model, disk or a schedule are not as they must be; the message says why.
        OSError: Model or data set cannot be loaded.
    """
    check_schedules(asked.schedules)
    given = asked.given
    with quiet_libraries(settings.show_progress), tempfile.TemporaryDirectory(prefix="hf-freezecache-") as scratch:
        measuring = replace(settings, split_point=1)
        if asked.chooses_views:  # those that a run of so many epochs might store
            measuring = replace(measuring, num_views=views_for(asked.epochs))
        trainer = make_trainer(measuring, scratch)
        num_blocks = len(find_blocks(trainer.model)[1])
        quarters = {max(num_blocks * part // 4, 1) for part in (1, 2, 3)} | {max(num_blocks - 1, 1)}
        schedules = asked.schedules or [f"0:{point}" for point in sorted(quarters)]
        stages = {text: _reached(plan_stages(text, asked.epochs, num_blocks), asked.epochs) for text in schedules}
        points = sorted({one.split_point for each in stages.values() for one in each if one.split_point > 0}) or [1]
        run = start_run(trainer, [Stage(place, place, point) for place, point in enumerate(points)], len(points), None)
        check_steps(run, trainer.model)
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

    return Plan(
        machine=given.name,
        rows=rows,
        epochs=asked.epochs,
        num_views=measuring.num_views,
        devices=given.devices,
        processes=processes[1],
        rates=shown_rates(given, rates[points[len(points) // 2]]),
        predictions=[
            predict(text, stages[text], rates, num_blocks, rows, config, asked, processes) for text in schedules
        ],
    )


def _reached(stages: Sequence[Stage], epochs: int) -> list[Stage]:
    return [stage for stage in stages if stage.start_epoch < epochs]


def predict(
    schedule: str,
    stages: Sequence[Stage],
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
        stages: Its stages, in order.
        rates: What one image takes, by split point.
        num_blocks: Blocks of the model.
        rows: Images.
        config: Settings of caches.
        asked: What to predict.
        processes: Of each device: those that render while building, and those that prepare data while training.
    """
    share, num_views = rows / asked.given.devices, config.num_views
    if asked.chooses_views:
        most, num_views = num_views, most_views(stages, asked.epochs)[0]
        rates = {point: _of_views(rate, num_views, most) for point, rate in rates.items()}
    one = next(iter(rates.values()))
    sizes = {point: rows * num_views * rate.stored_bytes for point, rate in rates.items()}
    shard = min(rows, asked.given.devices * config.chunk_size * config.shard_chunks) / rows
    build = cached = live = written = held = peak = 0.0
    for stage in stages:
        point, epochs = stage.split_point, epochs_of(stage, stages, asked.epochs)
        rate, keep = rates.get(point, one), asked.token_keep if point else 1.0
        from_cache, from_images = epoch_seconds(rate, point, num_blocks, keep, processes[1])
        cached += epochs * (from_cache if point else from_images)
        live += epochs * from_images
        source = states_at(stage, stages, config)
        if source == point:  # nothing is frozen, or the cache is there
            continue
        lower = [] if config.consume_previous_cache else thawed_to(stage, stages)
        made = [point, *(each for each in lower if states_at(replace(stage, split_point=each), stages, config) < each)]
        build += build_seconds(rate, point, source, num_views, len(made), processes[0])
        new = sum(sizes[each] for each in made)
        written += new
        later = {after.split_point for after in stages[stage.index + 1 :]}
        if config.consume_previous_cache and source > 0 and source not in later:
            held -= sizes[source]
            peak = max(peak, held + max(sizes[source], new) + shard * new)
        held += new
        peak = max(peak, held)
    return Prediction(
        schedule=schedule,
        split_points=[stage.split_point for stage in stages],
        cache_bytes=written,
        peak_bytes=peak,
        build_seconds=share * build,
        epoch_seconds=share * cached / asked.epochs,
        cached_seconds=share * (build + cached),
        live_seconds=share * live,
        full_seconds=share * asked.epochs * epoch_seconds(one, 0, num_blocks, 1.0, processes[1])[1],
        num_views=num_views if asked.chooses_views else None,
    )


def _of_views(rates: Rates, num_views: int, measured: int) -> Rates:
    """Return rates with a row rendered in fewer views than were measured: what the views share counts once."""
    further = (rates.render_all - rates.render) / max(measured - 1, 1)
    return replace(rates, render_all=rates.render + further * (num_views - 1))


#: Name of a rate -> its unit in the table.
_UNITS = {
    "rendered_images_per_second": "rendering {} images/s",
    "block_passes_per_second": "blocks {} passes/s",
    "encode_mb_per_second": "encoding {} MB/s",
    "decode_mb_per_second": "decoding {} MB/s",
    "write_mb_per_second": "writing {} MB/s",
    "read_mb_per_second": "reading {} MB/s",
}


def table_lines(found: Plan) -> list[str]:
    """Return what predictions rest on, and a table of them, one line each."""
    machine = "This machine" if found.machine is None else found.machine
    lines = [f"{machine}: {_counted(found.devices, 'device')} with {_counted(found.processes, 'data process')} each."]
    for source in ("given", "measured"):
        rates = [
            _UNITS[name].format(_figure(rate["value"]))
            for name, rate in found.rates.items()
            if rate["source"] == source
        ]
        if rates:
            lines.append(f"{'Given' if source == 'given' else 'Measured here'}: {', '.join(rates)}.")
    chosen = any(one.num_views is not None for one in found.predictions)
    views = "views as num_views='auto' chooses" if chosen else _counted(found.num_views, "view")
    lines.append(f"{found.rows:,} images, {views}, {_counted(found.epochs, 'epoch')}:")
    rows = table_cells(found)
    width = max(len(row[0]) for row in rows)
    return [*lines, *(" ".join([f"{row[0]:>{width}}", *(f"{cell:>10}" for cell in row[1:])]) for row in rows)]


def table_cells(found: Plan) -> list[list[str]]:
    """Return the cells of a table of predictions, its head first."""
    rows = [["frozen", "cache", "peak disk", "build", "an epoch", "in all", "no cache", "unfrozen"]]
    for one in found.predictions:
        seconds = (one.build_seconds, one.epoch_seconds, one.cached_seconds, one.live_seconds, one.full_seconds)
        rows.append([_name(one), *map(_size, (one.cache_bytes, one.peak_bytes)), *map(_duration, seconds)])
    return rows


def _name(one: Prediction) -> str:
    """Return a schedule as the table has it: its only split point, or all of it; and its views, where they were chosen."""
    name = one.schedule.removeprefix("0:") if len(one.split_points) == 1 else one.schedule
    return name if one.num_views is None else f"{name}, {_counted(one.num_views, 'view')}"


def _counted(count: int, noun: str) -> str:
    several = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count} {noun if count == 1 else several}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"
