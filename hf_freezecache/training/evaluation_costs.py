"""What evaluating takes while a stage is trained, from caches of the evaluation sets and from images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.sampler import ChunkSampler
from .image_rates import Rates
from .planner import steps_per_epoch

__all__ = ["Evaluations", "planned_evaluations"]


@dataclass(frozen=True)
class Evaluations:
    """How much is evaluated during training, of what caches can serve.

    Attributes:
        rows: Rows of all evaluation sets, on one process.
        per_epoch: How often they are evaluated in an epoch.
    """

    rows: float = 0.0
    per_epoch: float = 0.0

    def images(self, epochs: float) -> float:
        """Return how many images are evaluated in so many epochs."""
        return self.rows * math.floor(self.per_epoch * epochs + 1e-9)

    def seconds(self, rates: Rates, stages: Sequence[tuple[float, int]], workers: int) -> tuple[float, float]:
        """Return what evaluations in some stages take up to the split, from caches, which are built, and from images.

        Evaluation sets whose transform draws at random will be evaluated from images in any case. That is not known before.

        Args:
            rates: What one image takes.
            stages: (epochs, split point) of each.
            workers: Processes that render.
        """
        cached = live = 0.0
        for epochs, split_point in stages:
            images = self.images(epochs)
            frozen = rates.together(rates.render, rates.prefix(split_point), workers, rates.waiting)
            live += images * frozen
            cached += min(self.rows, images) * (frozen + rates.encode + rates.write)
            cached += images * (rates.decode + rates.read)
        return cached, live


def planned_evaluations(trainer: Any, sampler: ChunkSampler, num_epochs: float) -> Evaluations:
    """Return what a trainer evaluates while it trains, if caches are to serve that.

    Args:
        trainer: The user's trainer.
        sampler: Order of the training data.
        num_epochs: Epochs of the run.
    """
    args, sets = trainer.args, trainer.eval_dataset
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if not trainer.cache_config.cache_eval or strategy not in ("epoch", "steps") or sets is None:
        return Evaluations()
    try:
        rows = sum(len(one) for one in (sets.values() if isinstance(sets, dict) else [sets]))
    except TypeError:  # without a length it is not cached
        return Evaluations()
    per_epoch = 1.0
    if strategy == "steps":
        steps, every = steps_per_epoch(args, sampler), args.eval_steps or args.logging_steps
        # As ``Trainer``: below 1, a share of all steps.
        every = every if every >= 1 else max(math.ceil(every * steps * num_epochs), 1)
        per_epoch = steps / every
    return Evaluations(rows / args.world_size, per_epoch)
