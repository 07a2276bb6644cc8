"""What a run would have cost without freezing, and what its stages cost in passes through blocks."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from ..passes import passes_of_step
from .record import Decision, RunRecord

__all__ = ["Rate", "passes_spent", "run_clock", "unfrozen_rate", "unfrozen_seconds"]


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


def _step_passes(decision: Decision, num_blocks: int) -> float:
    """Return the passes through blocks that one training step takes per image."""
    frozen = decision.split_point if decision.runs_frozen_blocks else 0
    return passes_of_step(num_blocks, decision.split_point, decision.token_keep, decision.trained_share) + frozen


def unfrozen_rate(record: RunRecord) -> Rate | None:
    """Estimate the images per second of training all blocks, from the run's own epochs.

    It is the median of the unfrozen epochs, if there are any. Otherwise it is estimated from the epochs with the fewest
    frozen blocks, by counting passes. Without freezing, a step of a model of ``N`` blocks takes ``3 N`` passes: one
    forward, and a backward like two. With ``k`` frozen blocks it takes ``3 (N - k)``, and ``k`` more if the frozen blocks
    run in every step. Where trained blocks see a part of the tokens, or train a part of their weights, their passes count that part. Embeddings, head, image
    pipeline and cache reading are left out.

    Returns:
        The estimate, or ``None`` if there is nothing to make it from.
    """
    num_blocks = int(record.model.get("num_blocks") or 0)
    epochs = [(epoch, record.decision_of(epoch)) for epoch in record.epochs]
    if not epochs or not num_blocks:
        return None
    fewest = min(decision.split_point for _, decision in epochs)
    whole = any(_trains_whole(decision) for _, decision in epochs)
    # The first epoch of a run warms up: the median of several passes over it.
    rates = [
        epoch.images_per_second * _step_passes(decision, num_blocks) / passes_of_step(num_blocks, 0)
        for epoch, decision in epochs
        if decision.split_point == fewest and (_trains_whole(decision) or not whole)
    ]
    rate = statistics.median(rates)
    if whole:
        text = f"estimated from this run's own {len(rates)} unfrozen epoch{'s' if len(rates) > 1 else ''}"
        return Rate(rate, "unfrozen epochs", text)
    if rate <= 0:
        return None
    missing = "unfrozen epoch" if fewest else "epoch of all weights and tokens"
    text = (
        f"estimated by counting passes through blocks from the epochs with {fewest} of {num_blocks} blocks frozen; "
        f"no {missing} was timed"
    )
    return Rate(rate, "counted passes", text)


def _trains_whole(decision: Decision) -> bool:
    """Whether a stage trains all weights of all blocks on all tokens."""
    return decision.split_point == 0 and decision.token_keep == decision.trained_share == 1


def unfrozen_seconds(record: RunRecord, rate: Rate) -> list[float]:
    """Return cumulative seconds at the end of each epoch, had nothing been frozen.

    Epochs that trained all blocks whole took what they took, unless the rate is that of another run. Where ``schedule="auto"`` chose another
    number of epochs, a run of the number that was asked for is spread over these: at the end it has taken what that run takes.
    """
    total, seconds, share = 0.0, [], 1.0
    if record.asked_epochs and (chosen := record.training.get("num_train_epochs")):
        share = record.asked_epochs / chosen
    for epoch in record.epochs:
        decision = record.decision_of(epoch)
        took = _trains_whole(decision) and not rate.measured
        total += share * (epoch.seconds if took else epoch.images / rate.images_per_second)
        seconds.append(total)
    return seconds


def passes_spent(record: RunRecord, decision: Decision) -> float | None:
    """Return the passes through blocks, per image, that a stage took so far: building its cache, and training.

    They are counted as ``Decision.predicted`` is, so that the two can be compared.

    Returns:
        The passes, or ``None`` if the number of blocks or of training images is not recorded.
    """
    num_blocks, num_images = record.model.get("num_blocks"), record.data.get("train_images")
    if not num_blocks or not num_images:
        return None
    images = sum(epoch.images for epoch in record.epochs if epoch.stage == decision.stage)
    built = 0.0
    if decision.built_from is not None:
        built = decision.num_views * (decision.built_blocks or decision.split_point - decision.built_from)
    return built + images / num_images * _step_passes(decision, num_blocks)


def run_clock(record: RunRecord, whole_seconds: float | None) -> Callable[[float], float | None]:
    """Return what tells how many seconds of ``train()`` had passed at an epoch, evaluations left out.

    Of a run with epochs in its record, the seconds are those of checks, building and training; what ``train()`` took beyond
    them, for saving say, is spread evenly. Plain ``Trainer`` gives one time for all, and it is spread evenly.

    Args:
        record: The run.
        whole_seconds: Of ``train()`` with its checks, evaluations left out; ``None`` if it did not run in one piece.

    Returns:
        A function of epochs done, which may be fractions. It returns ``None`` where the seconds are not known.
    """
    last = max((float(entry["epoch"]) for entry in record.log_history if "epoch" in entry), default=0.0)
    if not record.epochs:
        return lambda epoch: None if whole_seconds is None or not last else whole_seconds * epoch / last
    # Pairs of epochs done and seconds; entering a stage takes seconds and no epochs.
    points, before, timed = [(0.0, 0.0)], 0.0, record.preflight_seconds
    points.append((0.0, timed))
    for epoch in record.epochs:
        points.append((before, timed + epoch.cumulative_seconds - epoch.seconds))
        points.append((epoch.epoch, timed + epoch.cumulative_seconds))
        before = epoch.epoch
    rest = max((whole_seconds or 0.0) - points[-1][1], 0.0)

    def seconds(epoch: float) -> float | None:
        if epoch > points[-1][0] + 1e-6:
            return None
        number = next(number for number, (end, _) in enumerate(points) if end >= epoch - 1e-6)
        (start, low), (end, high) = points[max(number - 1, 0)], points[number]
        share = (epoch - start) / (end - start) if end > start else 1.0
        return low + share * (high - low) + rest * epoch / points[-1][0]

    return seconds
