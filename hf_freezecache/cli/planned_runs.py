"""What ``hf-freezecache plan`` would train: the runs of some schedules, with what ``schedule="auto"`` chooses for itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..auto_recipes import views_for
from ..config import FreezeConfig
from ..data.layout import ChunkLayout
from ..errors import UnsupportedSetupError
from ..model.split import Splits
from ..schedules import Stage, adaptive_policy, plan_stages
from ..trainer import FreezeCacheTrainer
from ..training.block_weights import qkv_share
from ..training.planner import most_views
from .build import BuildSettings, make_trainer
from .given_rates import GivenRates

__all__ = ["PlanSettings", "PlannedRun", "check_schedules", "planned_run", "schedules_of", "views_to_measure"]


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
        chosen: What schedule ``"auto"`` says of its choice.
    """

    stages: list[Stage]
    epochs: float
    num_views: int
    token_keep: float = 1.0
    trained_share: float = 1.0
    head_rows: float = 1.0
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


def schedules_of(asked: PlanSettings, num_blocks: int) -> list[str]:
    """Return the schedules to predict, for a model of so many blocks."""
    quarters = {max(num_blocks * part // 4, 1) for part in (1, 2, 3)} | {max(num_blocks - 1, 1)}
    return list(asked.schedules) or [*(f"0:{point}" for point in sorted(quarters)), "auto"]


def views_to_measure(asked: PlanSettings) -> int:
    """Return of how many views of an image the rendering has to be measured: several, where runs may store several."""
    if asked.num_views is None:
        return max(views_for(asked.epochs), 2) if _chooses(asked) else 1
    return views_for(asked.epochs) if asked.num_views == "auto" else asked.num_views


def planned_run(
    schedule: str, settings: BuildSettings, asked: PlanSettings, trainer: FreezeCacheTrainer, scratch: str
) -> PlannedRun:
    """Return what a schedule would train.

    Args:
        schedule: The schedule.
        settings: Model and data.
        asked: What to predict.
        trainer: A trainer of model and data.
        scratch: The ``output_dir`` of another, to which nothing is written.

    Raises:
        ScheduleError: The schedule asks for more blocks than there are, or the budget pays for nothing.
        FreezeCacheError: Data or model are not as they must be.
    """
    splits, freezing = Splits(trainer.model), asked.freezing(schedule)
    rows, chosen = asked.rows or len(trainer.train_dataset), None
    num_views, epochs = asked.num_views or 1, float(asked.epochs)
    if freezing.is_auto:
        chooser = make_trainer(
            replace(
                settings,
                num_views=asked.num_views or "auto",
                batch_size=settings.batch_size * asked.given.devices,
            ),
            scratch,
            freezing,
            rows=rows,
            num_train_epochs=asked.epochs,
            learning_rate=asked.learning_rate,
        )
        freezing, chosen = chooser.freeze_config or freezing, chooser._record.chosen
        num_views, epochs = chooser.cache_config.num_views, chooser.args.num_train_epochs
    stages = [
        stage
        for stage in plan_stages(freezing.schedule, math.ceil(epochs), splits.num_blocks)
        if stage.start_epoch < epochs
    ]
    if num_views == "auto":
        num_views = most_views(stages, asked.epochs)[0]
    layout = ChunkLayout(rows, trainer.cache_config.chunk_size, seed=0)
    return PlannedRun(
        stages,
        epochs,
        num_views,
        token_keep=freezing.token_keep or 1.0,
        trained_share=qkv_share(splits) if freezing.block_weights == "qkv" else 1.0,
        head_rows=layout.part(freezing.head_rows or 1.0).num_samples / rows,
        chosen=chosen,
    )
