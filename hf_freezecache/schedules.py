"""When to freeze how much. Values in, stages out; knows no model and no disk."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .config import FreezeConfig
from .errors import ScheduleError

__all__ = ["POLICIES", "Stage", "plan_stages", "split_point_at"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A run of epochs with one split point.

    Attributes:
        start_epoch: First epoch of the stage, counted from 0.
        split_point: Number of leading blocks that are frozen in it.
    """

    start_epoch: int
    split_point: int


def _parse_start(text: str, num_epochs: int, schedule: str) -> int:
    text = text.strip()
    if re.fullmatch(r"-?[0-9]+", text):
        if int(text) < 0:
            raise ScheduleError(f"Schedule {schedule!r}: epoch {text} is negative.")
        return int(text)
    if not re.fullmatch(r"-?([0-9]+\.[0-9]*|\.[0-9]+)", text):
        raise ScheduleError(
            f"Schedule {schedule!r}: {text!r} is not a start. Expected an epoch such as '3', or a fraction of "
            "training such as '0.5'."
        )
    value = float(text)
    if not 0 <= value < 1:
        raise ScheduleError(
            f"Schedule {schedule!r}: {text!r} is written as a fraction of training, which lies in [0, 1). "
            "Write epochs as whole numbers; stages change at epoch boundaries only."
        )
    # The tolerance keeps 0.7 of 10 epochs at 7: in binary the product lies just above it.
    return math.ceil(value * num_epochs - 1e-9)


def explicit_schedule(config: FreezeConfig, num_epochs: int, num_blocks: int) -> list[Stage]:
    """Read ``config.schedule``.

    Args:
        config: Its ``schedule`` holds ``start:split_point`` pairs, e.g. ``"0:6,3:9"`` or ``"0.0:6,0.5:9"``.
        num_epochs: Epochs of the whole run, rounded up; fractions are fractions of this.
        num_blocks: Blocks of the model, for messages only.

    Raises:
        ScheduleError: A pair cannot be read, or two starts fall on one epoch.
    """
    schedule = str(config.schedule)
    stages: list[Stage] = []
    for pair in schedule.split(","):
        start_text, colon, split_text = pair.partition(":")
        if not colon or not re.fullmatch(r"\s*[0-9]+\s*", split_text):
            raise ScheduleError(
                f"Schedule {schedule!r}: {pair.strip()!r} is not a start:split_point pair. Expected e.g. "
                f"'0:6,3:9' (from epoch 0 freeze 6 blocks, from epoch 3 freeze 9; this model has {num_blocks})."
            )
        stages.append(Stage(_parse_start(start_text, num_epochs, schedule), int(split_text)))
    for before, after in itertools.pairwise(stages):
        if after.start_epoch <= before.start_epoch:
            raise ScheduleError(
                f"Schedule {schedule!r}: starts must increase, but epoch {before.start_epoch} is followed by epoch "
                f"{after.start_epoch} (with {num_epochs} epochs in all)."
            )
    return stages


def linear(config: FreezeConfig, num_epochs: int, num_blocks: int) -> list[Stage]:
    """Freeze at a constant pace from ``freeze_start`` to ``freeze_end``, up to ``freeze_level`` of the blocks.

    In epoch ``e`` (of ``num_epochs``) the split point is ``floor(num_blocks * freeze_level * p)`` with
    ``p = clip((e / num_epochs - freeze_start) / (freeze_end - freeze_start), 0, 1)``.

    Source: the linear schedule of Composer's layer freezing, with ``freeze_end`` in place of the end of training.
    """
    stages: list[Stage] = []
    for epoch in range(num_epochs):
        progress = (epoch / num_epochs - config.freeze_start) / (config.freeze_end - config.freeze_start)
        split_point = math.floor(num_blocks * config.freeze_level * min(max(progress, 0.0), 1.0) + 1e-9)
        if not stages or stages[-1].split_point != split_point:
            stages.append(Stage(epoch, split_point))
    return stages


#: Extension point: name -> function of (config, num_epochs, num_blocks) that returns the stages in order.
POLICIES: dict[str, Callable[[FreezeConfig, int, int], list[Stage]]] = {"linear": linear}


def plan_stages(config: FreezeConfig, num_epochs: int, num_blocks: int) -> list[Stage]:
    """Return the stages of a run, the first of which starts at epoch 0.

    Args:
        config: The user's settings.
        num_epochs: Epochs of the whole run, rounded up.
        num_blocks: Blocks of the model.

    Raises:
        ScheduleError: Unknown policy, unreadable schedule, a split point that is negative, exceeds ``num_blocks``
            or is lower than an earlier one (frozen blocks cannot thaw: their cache would go stale).
    """
    if config.schedule is not None:
        stages = explicit_schedule(config, num_epochs, num_blocks)
    elif config.policy is not None:
        if config.policy not in POLICIES:
            raise ScheduleError(f"Unknown policy {config.policy!r}; known are {sorted(POLICIES)}.")
        stages = POLICIES[config.policy](config, num_epochs, num_blocks)
    else:
        stages = [Stage(0, 0)]
    if not stages or stages[0].start_epoch > 0:
        stages = [Stage(0, 0), *stages]
    for stage in stages:
        if not 0 <= stage.split_point <= num_blocks:
            raise ScheduleError(
                f"The schedule freezes {stage.split_point} blocks from epoch {stage.start_epoch}, but the model has "
                f"{num_blocks}: use split points from 0 to {num_blocks}."
            )
    for before, after in itertools.pairwise(stages):
        if after.split_point < before.split_point:
            raise ScheduleError(
                f"The schedule unfreezes blocks: {before.split_point} are frozen from epoch {before.start_epoch}, "
                f"{after.split_point} from epoch {after.start_epoch}. Split points must not fall."
            )
    unreached = [stage for stage in stages if stage.start_epoch >= num_epochs]
    if unreached:
        logger.warning(
            "The run has %d epochs, so these stages of the schedule are never reached: %s",
            num_epochs,
            ", ".join(f"{stage.start_epoch}:{stage.split_point}" for stage in unreached),
        )
    return stages


def split_point_at(stages: Sequence[Stage], epoch: int) -> int:
    """Return the split point in force in ``epoch``."""
    return max((stage for stage in stages if stage.start_epoch <= epoch), key=lambda s: s.start_epoch).split_point
