"""Stages: runs of epochs with one split point. What follows from a list of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Stage", "number_stages", "stage_at", "thawed_to"]


@dataclass(frozen=True)
class Stage:
    """A run of epochs with one split point.

    Two stages may have the same split point: the index tells them apart.

    Attributes:
        index: Position of the stage in the run, counted from 0.
        start_epoch: First epoch of the stage, counted from 0.
        split_point: Number of leading blocks that are frozen in it.
    """

    index: int
    start_epoch: int
    split_point: int

    @property
    def tokens_point(self) -> int:
        """Number of blocks that see all tokens where a step sees a part of them: the frozen ones, but at least the first.

        Where a random half of the patches was left out before block 0, accuracy fell by 2.9 to 4 points (single runs of DeiT-Tiny, 101
        classes of Caltech-101 at 160 pixels): no token has seen another patch than its own by then.
        """
        return max(self.split_point, 1)


def number_stages(pairs: Iterable[tuple[int, int]]) -> list[Stage]:
    """Return the stages of (start epoch, split point) pairs, numbered from 0."""
    return [Stage(index, *pair) for index, pair in enumerate(pairs)]


def stage_at(stages: Sequence[Stage], epoch: int) -> Stage:
    """Return the stage in force in ``epoch``."""
    return max((stage for stage in stages if stage.start_epoch <= epoch), key=lambda stage: stage.start_epoch)


def thawed_to(stage: Stage, stages: Sequence[Stage]) -> list[int]:
    """Return the lower split points, in rising order, of later stages before whose blocks nothing is trained until then."""
    points = [stage.split_point]
    for later in stages[stage.index + 1 :]:
        if later.split_point < points[-1]:
            points.append(later.split_point)
    return sorted(point for point in points[1:] if point > 0)
