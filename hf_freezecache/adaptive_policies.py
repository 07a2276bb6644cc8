"""Policies that look at the run: they decide how many blocks to freeze while it trains, at the ends of epochs.

The run measures a signal of each block, over intervals of some epochs. After each interval the policy says how many blocks are
frozen from then on; it never gives blocks back. What it was told is in every checkpoint, so a resumed run decides the same, and all
processes get the values of the first. To add one, write a frozen dataclass with the members of ``AdaptivePolicy`` and name it in
``schedules.POLICIES``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from .errors import ScheduleError
from .stages import Stage, number_stages

__all__ = ["AdaptivePolicy", "AutoFreeze"]


@runtime_checkable
class AdaptivePolicy(Protocol):
    """Decides while training. Its parameters are its fields.

    Attributes:
        every: Epochs of an interval, at least 1.
        signal: What it looks at: a name in ``training.signals.SIGNALS``.
    """

    every: int
    signal: ClassVar[str]

    @property
    def first_epoch(self) -> int:
        """The first epoch, from 0, that can have frozen blocks."""

    def stages(self, num_epochs: int, num_blocks: int) -> list[Stage]:
        """Return the stages that are known before the run; see ``schedules.Policy``."""

    def split_points(self, num_blocks: int) -> Sequence[int]:
        """Return the split points that may be decided, in rising order. The run prepares for all of them."""

    def decide(self, history: Sequence[Sequence[float]], frozen: int) -> tuple[int, str]:
        """Return how many blocks are frozen from now on, at least as many as before, and why, in a sentence.

        Args:
            history: The signal of each block in each interval so far, in order; 0 for a block that was frozen.
            frozen: Number of blocks that are frozen.
        """


@dataclass(frozen=True)
class AutoFreeze:
    """Freeze the leading blocks whose gradients have stopped changing.

    The gradient of each block is summed up over an interval. Its size is the sum of absolute values, and its change the difference to
    the interval before, relative to that one. From the first block that trains on, blocks are frozen up to the first whose change is
    at or above a percentile of the changes of all that train. So the last block always trains, and so does the first of them
    with a change like that.

    Source: AutoFreeze (Liu, Agarwal and Venkataraman, arXiv:2102.01386), by the code that its authors published: it takes the sizes
    and the percentile in this way, of blocks alone, 50 by default. Its intervals are a twentieth of the run; here they are whole epochs.

    Attributes:
        percentile: From 0, where nothing is ever frozen, to 100.
        every: Epochs of an interval. Nothing is decided before the second has ended.
    """

    percentile: float = 50.0
    every: int = 1

    signal: ClassVar[str] = "gradients"

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ScheduleError: A parameter is out of its range.
        """
        if not 0 <= self.percentile <= 100:
            raise ScheduleError(f"percentile is a number from 0 to 100, got {self.percentile}.")
        if self.every < 1:
            raise ScheduleError(f"every is a number of epochs, at least 1, got {self.every}.")

    @property
    def first_epoch(self) -> int:
        """The first epoch, from 0, that can have frozen blocks: two intervals come before."""
        return 2 * self.every

    def stages(self, num_epochs: int, num_blocks: int) -> list[Stage]:
        """Return a stage without frozen blocks.

        Raises:
            ScheduleError: The model has one block only.
        """
        if num_blocks < 2:
            raise ScheduleError(
                "autofreeze freezes some of several blocks, but the model has one. Give another schedule."
            )
        return number_stages([(0, 0)])

    def split_points(self, num_blocks: int) -> Sequence[int]:
        """Return all but 0 and the number of blocks: the last block always trains."""
        return range(1, num_blocks)

    def decide(self, history: Sequence[Sequence[float]], frozen: int) -> tuple[int, str]:
        """Compare the last two intervals; see ``AdaptivePolicy``."""
        if len(history) < 2:
            return frozen, ""
        changes = [_change(*pair) for pair in zip(history[-2][frozen:], history[-1][frozen:], strict=True)]
        threshold = float(np.percentile(changes, self.percentile)) if all(map(math.isfinite, changes)) else math.nan
        count = next((place for place, change in enumerate(changes) if change >= threshold), 0)
        blocks = f"block {frozen}" if count == 1 else f"blocks {frozen} to {frozen + count - 1}"
        return frozen + count, (
            f"autofreeze: gradients of {blocks} changed by {max(changes[:count]):.2%} at most since the interval before, those of "
            f"block {frozen + count} by {changes[count]:.2%}; percentile {self.percentile:g} is {threshold:.2%}."
            if count
            else ""
        )


def _change(before: float, now: float) -> float:
    """Return by which share the size of a gradient has changed; 0 if there was none and is none."""
    if before == now:
        return 0.0
    return abs(before - now) / before if before else math.inf
