"""What ``hf-freezecache plan`` would train: the runs of some schedules, with what ``schedule="auto"`` chooses for itself."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from ..auto_recipes import views_for
from ..config import FreezeConfig
from ..data.layout import ChunkLayout
from ..errors import UnsupportedSetupError
from ..model.probe import find_blocks
from ..model.split import Splits
from ..schedules import Stage, adaptive_policy, plan_stages
from ..trainer import FreezeCacheTrainer
from ..training.adapter import start_run
from ..training.auto import settle_auto
from ..training.block_weights import qkv_share
from ..training.planner import most_views
from ..training.preflight import check_steps
from ..training.stage import StageRunner
from .build import BuildSettings, make_trainer
from .given_rates import GivenRates

__all__ = ["PlanSettings", "PlannedRun", "check_schedules", "planned_runs", "views_to_measure"]


@dataclass(frozen=True)
class PlanSettings:
    """What to predict.

    Attributes:
        epochs: Epochs that would be trained.
        schedules: When to freeze how many blocks, as of ``FreezeConfig``. Default: a quarter, half and three quarters of the
            blocks, and all but one, each from the start, and ``"auto"``.
        rows: Images of the data set; default those that it has.
        num_views: Views of each image to store; ``"auto"``: as many as ``CacheConfig`` chooses for each schedule. ``None`` is one, and as
            many as it chooses for schedule ``"auto"``.
        consume_previous_cache: As of ``CacheConfig``.
        given: Rates of another machine, in place of what is measured.
        budget: As of ``FreezeConfig``, for schedule ``"auto"``.
        token_keep: As of ``FreezeConfig``, as are the next two.
        block_weights: Which weights of the blocks train.
        head_rows: Share of the rows that stages see in which all blocks are frozen.
        learning_rate: As of ``TrainingArguments``: schedule ``"auto"`` says what it makes of it.
    """

    epochs: int
    schedules: Sequence[str] = ()
    rows: int | None = None
    num_views: int | Literal["auto"] | None = None
    consume_previous_cache: bool = False
    given: GivenRates = field(default_factory=GivenRates)
    budget: float | None = None
    token_keep: float | None = None
    block_weights: Literal["all", "qkv"] | None = None
    head_rows: float | None = None
    learning_rate: float = 5e-5

    def freezing(self, schedule: str) -> FreezeConfig:
        """Return what a run by a schedule would be given.

        Args:
            schedule: The schedule.

        Raises:
            ScheduleError: The schedule cannot be read.
            UnsupportedSetupError: A value is out of its range.
        """
        config = FreezeConfig(
            schedule, token_keep=self.token_keep, block_weights=self.block_weights, head_rows=self.head_rows
        )
        return replace(config, budget=self.budget) if config.is_auto else config


@dataclass(frozen=True)
class PlannedRun:
    """What would be trained.

    Attributes:
        stages: Stages, in order.
        epochs: Epochs; the last may be a part of one.
        num_views: Views of each image that are stored.
        token_keep: Share of the patch tokens that steps see behind frozen blocks.
        trained_share: Share of their own weights that the other blocks train.
        head_rows: Share of the rows that stages see in which all blocks are frozen: whole chunks.
        uncached: Split points behind which it cannot train from a cache: blocks run in every step.
        chosen: What schedule ``"auto"`` says of its choice.
    """

    stages: list[Stage]
    epochs: float
    num_views: int
    token_keep: float = 1.0
    trained_share: float = 1.0
    head_rows: float = 1.0
    uncached: frozenset[int] = frozenset()
    chosen: str | None = None


def check_schedules(asked: PlanSettings) -> None:
    """Check what can be checked of schedules without a model.

    Args:
        asked: What is to be predicted.

    Raises:
        ScheduleError: One cannot be read.
        UnsupportedSetupError: One decides while training, a value is out of its range, or there is a budget that is for none of them.
    """
    for schedule in asked.schedules:
        if adaptive_policy(schedule) is not None:
            raise UnsupportedSetupError(
                f"schedule={schedule!r} decides while it trains how many blocks to freeze, so what it takes is not known before. Plan "
                "schedules that are written out, such as '0:0,2:3,4:6', or 'auto'."
            )
    if not _chooses(asked) and asked.budget is not None:
        raise UnsupportedSetupError(
            f"budget={asked.budget:g} is for schedule='auto', which chooses what fits it. Plan that schedule as well, or remove the "
            "budget."
        )


def _chooses(asked: PlanSettings) -> bool:
    """Whether ``"auto"`` is among the schedules; all of them are read."""
    return True in [asked.freezing(schedule).is_auto for schedule in asked.schedules or ("auto",)]


def _schedules_of(asked: PlanSettings, num_blocks: int) -> list[str]:
    """Return the schedules to predict, for a model of so many blocks."""
    quarters = {max(num_blocks * part // 4, 1) for part in (1, 2, 3)} | {max(num_blocks - 1, 1)}
    return list(asked.schedules) or [*(f"0:{point}" for point in sorted(quarters)), "auto"]


def views_to_measure(asked: PlanSettings) -> int:
    """Return of how many views of an image the rendering has to be measured: several, where runs may store several."""
    if isinstance(asked.num_views, int):
        return asked.num_views
    several = views_for(asked.epochs) if asked.num_views == "auto" else 1
    return max(several, 2) if _chooses(asked) else several


def planned_runs(
    settings: BuildSettings, asked: PlanSettings, trainer: FreezeCacheTrainer, scratch: str
) -> tuple[dict[str, PlannedRun], StageRunner]:
    """Return what each schedule would train, with a step of each stage tried.

    Args:
        settings: Model and data.
        asked: What to predict.
        trainer: A trainer of model and data.
        scratch: The ``output_dir`` of others, to which nothing is written.

    Returns:
        Runs by schedule, and what would run the stages of those that are written out.

    Raises:
        ScheduleError: A schedule asks for more blocks than there are, or the budget pays for nothing.
        FreezeCacheError: Data or model are not as they must be, or the model cannot be trained as it is asked for.
    """
    splits, keep = Splits(trainer.model), asked.token_keep or 1.0
    runs: dict[str, PlannedRun] = {}
    for schedule in _schedules_of(asked, splits.num_blocks):
        freezing = asked.freezing(schedule)
        if freezing.is_auto:
            runs[schedule] = _chosen_run(freezing, settings, asked, trainer, scratch)
            continue
        stages = _reached(freezing, asked.epochs, splits.num_blocks)
        views = most_views(stages, asked.epochs)[0] if asked.num_views == "auto" else asked.num_views or 1
        runs[schedule] = _run_of(freezing, stages, asked.epochs, views, trainer, asked)
    points = {one.split_point for each in runs.values() if each.chosen is None for one in each.stages}
    return runs, _rehearsed(trainer, points or {0}, keep)


def _chosen_run(
    freezing: FreezeConfig, settings: BuildSettings, asked: PlanSettings, trainer: FreezeCacheTrainer, scratch: str
) -> PlannedRun:
    """Return what ``"auto"`` chooses, as a trainer of so many images does, with steps of all devices."""
    devices, views = asked.given.devices, asked.num_views or "auto"
    with _without_words():
        chooser = make_trainer(
            replace(settings, num_views=views, batch_size=settings.batch_size * devices),
            scratch,
            freezing,
            rows=asked.rows,
            num_train_epochs=asked.epochs,
            learning_rate=asked.learning_rate,
        )
    chosen, epochs = chooser.freeze_config or freezing, chooser.args.num_train_epochs
    stages = _reached(chosen, epochs, len(find_blocks(chooser.model)[1]))
    found = _run_of(chosen, stages, epochs, int(chooser.cache_config.num_views), trainer, asked)
    points = {stage.split_point for stage in stages}
    run = _rehearsed(chooser, points, found.token_keep)
    kept = {
        run.tokens[point].token_keep if point in run.tokens else 1.0 for point in points - {0, run.splits.num_blocks}
    }
    return replace(
        found, token_keep=min(kept, default=1.0), uncached=frozenset(run.refusals), chosen=chooser._record.chosen
    )


def _reached(freezing: FreezeConfig, epochs: float, num_blocks: int) -> list[Stage]:
    return [one for one in plan_stages(freezing.schedule, math.ceil(epochs), num_blocks) if one.start_epoch < epochs]


def _run_of(
    freezing: FreezeConfig,
    stages: list[Stage],
    epochs: float,
    num_views: int,
    trainer: FreezeCacheTrainer,
    asked: PlanSettings,
) -> PlannedRun:
    rows = asked.rows or len(trainer.train_dataset)
    layout = ChunkLayout(rows, trainer.cache_config.chunk_size, seed=0)
    return PlannedRun(
        stages,
        float(epochs),
        num_views,
        token_keep=freezing.token_keep or 1.0,
        trained_share=qkv_share(Splits(trainer.model)) if freezing.block_weights == "qkv" else 1.0,
        head_rows=layout.part(freezing.head_rows or 1.0).num_samples / rows,
    )


def _rehearsed(trainer: FreezeCacheTrainer, points: Collection[int], token_keep: float) -> StageRunner:
    """Try a step behind each split point, and return what would run the stages."""
    stages = [Stage(place, place, point) for place, point in enumerate(sorted(points))]
    with _without_words():
        run = start_run(trainer, stages, len(stages), None)
    run.token_keep = token_keep, 1.0
    check_steps(run, trainer.model)
    return run


@contextmanager
def _without_words() -> Iterator[None]:
    """Let a trainer begin in silence: the plan says what was chosen."""
    loggers = [logging.getLogger(function.__module__) for function in (settle_auto, check_steps)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
