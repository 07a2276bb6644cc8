"""What a run cost, read from what it logged, and what it would have cost without freezing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Epoch", "Rate", "epoch_logs", "read_epochs", "unfrozen_rate", "unfrozen_seconds"]

Log = Mapping[str, Any]

#: A backward pass takes about two forward passes: one for the gradients of inputs, one for those of weights.
_STEP_PASSES = 3


@dataclass(frozen=True)
class Epoch:
    """One epoch, or the part of one up to a checkpoint or from there on.

    Attributes:
        epoch: Epochs done at its end.
        split_point: Frozen blocks.
        images_per_second: Images trained on, by the seconds that training took.
        seconds: Training alone: no building, evaluating or saving.
        entering_seconds: Spent before it on entering a stage, which includes building its cache.
        cumulative_seconds: Training and entering of stages, from the start of the run.
    """

    epoch: float
    split_point: int
    images_per_second: float
    seconds: float
    entering_seconds: float
    cumulative_seconds: float

    @property
    def images(self) -> float:
        """Images trained on."""
        return self.images_per_second * self.seconds


@dataclass(frozen=True)
class Rate:
    """Images per second of training without freezing, and how that is known.

    Attributes:
        images_per_second: The rate.
        basis: ``"baseline"``, a run without freezing; ``"unfrozen epochs"`` of the same run; ``"counted passes"`` through blocks.
        text: The basis in a reader's words.
    """

    images_per_second: float
    basis: str
    text: str

    @property
    def measured(self) -> bool:
        """Whether a whole run without freezing was timed."""
        return self.basis == "baseline"


def read_epochs(log_history: Sequence[Log]) -> list[Epoch]:
    """Return the epochs that a run logged, in order; none for a run of plain ``Trainer``."""
    epochs: list[Epoch] = []
    split_point, before = 0, 0.0
    for entry in log_history:
        split_point = int(entry.get("freezecache/split_point", split_point))
        if "freezecache/cumulative_seconds" not in entry:
            continue
        seconds, until = entry["freezecache/epoch_seconds"], entry["freezecache/cumulative_seconds"]
        rate = entry["freezecache/train_images_per_second"]
        entering = max(until - before - seconds, 0.0)
        epochs.append(Epoch(entry.get("epoch", 0.0), split_point, rate, seconds, entering, until))
        before = until
    return epochs


def unfrozen_rate(epochs: Sequence[Epoch], num_blocks: int, cached: bool) -> Rate | None:
    """Estimate the images per second of training all blocks, from the run's own epochs.

    From its unfrozen epochs, if there are any. Otherwise from the epochs with the fewest frozen blocks, by counting: of
    ``N`` blocks, a step on images passes ``3 N`` (forward once, backward like two), one on ``k`` frozen blocks
    ``3 (N - k)``, and ``k`` more if the frozen ones run live. Embeddings, head, image pipeline and cache reading are left
    out.

    Args:
        epochs: The run's.
        num_blocks: ``N``.
        cached: Whether frozen blocks were read from a cache.

    Returns:
        The estimate, or ``None`` if there is nothing to make it from.
    """
    fewest = min((epoch.split_point for epoch in epochs), default=num_blocks)
    # The first epoch of a run warms up: the median of several passes over it.
    rates = [epoch.images_per_second for epoch in epochs if epoch.split_point == fewest]
    if fewest == 0 and rates:
        text = f"estimated from this run's own {len(rates)} unfrozen epoch{'s' if len(rates) > 1 else ''}"
        return Rate(statistics.median(rates), "unfrozen epochs", text)
    passes = _STEP_PASSES * (num_blocks - fewest) + (0 if cached else fewest)
    if not rates or passes <= 0:
        return None
    text = (
        f"estimated by counting passes through blocks from the epochs with {fewest} of {num_blocks} blocks frozen; "
        "no unfrozen epoch was timed"
    )
    return Rate(statistics.median(rates) * passes / (_STEP_PASSES * num_blocks), "counted passes", text)


def unfrozen_seconds(epochs: Sequence[Epoch], rate: Rate) -> list[float]:
    """Return cumulative seconds at the end of each epoch, had nothing been frozen.

    Epochs that were unfrozen took what they took, unless another run's rate is given.
    """
    total, seconds = 0.0, []
    for epoch in epochs:
        own = epoch.split_point == 0 and not rate.measured
        total += epoch.seconds if own else epoch.images / rate.images_per_second
        seconds.append(total)
    return seconds


def epoch_logs(
    log_history: Sequence[Log], taken: Mapping[str, float], split_point: int, num_blocks: int, cached: bool
) -> dict[str, float]:
    """Return what to log at the end of an epoch, or of a part of one.

    Args:
        log_history: What was logged before.
        taken: As ``Stopwatch.take`` returns it.
        split_point: Frozen blocks.
        num_blocks: Blocks of the model.
        cached: Whether frozen blocks are read from a cache.
    """
    images, seconds, entering_seconds = taken["images"], max(taken["seconds"], 1e-9), taken["entering_seconds"]
    epochs = read_epochs(log_history)
    until = (epochs[-1].cumulative_seconds if epochs else 0.0) + entering_seconds + seconds
    epochs.append(Epoch(0.0, split_point, images / seconds, seconds, entering_seconds, until))
    logs = {
        "freezecache/train_images_per_second": round(images / seconds, 3),
        "freezecache/epoch_seconds": round(seconds, 4),
        "freezecache/cumulative_seconds": round(until, 4),
    }
    rate = unfrozen_rate(epochs, num_blocks, cached)
    if rate is not None:
        logs["freezecache/no_freezing_seconds_estimated"] = round(unfrozen_seconds(epochs, rate)[-1], 4)
    return logs
