"""Figures in a reader's words: the same on the page, in the model card and on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .figures import is_share

__all__ = [
    "accuracy_cost",
    "describe_schedule",
    "duration",
    "how_it_ended",
    "metric",
    "points",
    "time_cost",
    "when_not_to_use",
]

Figures = Mapping[str, Any]


def duration(seconds: float) -> str:
    """Return seconds, minutes or hours, with three digits or so."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def metric(name: str, value: float) -> str:
    """Return the value of a metric; shares in per cent."""
    return f"{value:.2%}" if is_share(name) else f"{value:.4g}"


def points(name: str, difference: float) -> str:
    """Return a difference of a metric; of shares in percentage points."""
    return f"{100 * difference:+.2f} points" if is_share(name) else f"{difference:+.4g}"


def describe_schedule(figures: Figures) -> str:
    """Return the schedule, e.g. ``6 of 12 blocks frozen from epoch 0, 9 from epoch 3``; and what of it was not reached."""
    num_blocks, done = figures["model"].get("num_blocks"), figures["epochs_done"]
    stages = figures["planned_stages"] or figures["stages"]
    if not stages:
        return "no block frozen"
    parts = []
    for number, stage in enumerate(stages):
        first = f"{f' of {num_blocks}' if num_blocks else ''} blocks frozen" if number == 0 else ""
        ahead = " (not reached)" if number and done is not None and stage["start_epoch"] >= done else ""
        parts.append(f"{stage['split_point']}{first} from epoch {stage['start_epoch']:g}{ahead}")
    return ", ".join(parts)


def how_it_ended(figures: Figures) -> str | None:
    """Say that training did not finish, or was stopped early; ``None`` if it ended as planned."""
    if figures["complete"] and not figures["stopped_early"]:
        return None
    steps = f"step {figures['steps']:,}" + (f" of {figures['max_steps']:,}" if figures["max_steps"] else "")
    if figures["complete"]:
        return f"Training was stopped early, after {figures['epochs_done'] or 0:.3g} epochs, {steps}."
    return f"Training did not finish: the figures are those of {steps}."


def accuracy_cost(figures: Figures) -> str:
    """Say what freezing and caching cost in accuracy, as far as it was measured."""
    compared, result = figures["comparison"], figures["result"]
    if compared is None:
        return "Not measured: no run without freezing was recorded to compare with. It may be lower than such a run's."
    baseline = figures["baseline"]
    if compared["difference"] is None:
        return f"Not measured: this run and the baseline '{baseline['run']}' have no metric in common."
    name, theirs = compared["metric"], baseline["result"]
    text = (
        f"{points(name, compared['difference'])} of {name} against the baseline '{baseline['run']}' without freezing "
        f"({metric(name, result['value'])} against {metric(name, theirs['value'])}), one run each."
    )
    if compared["standard_error"]:
        error = 100 * compared["standard_error"]
        text += (
            f" With {result['images']:,} evaluation images, differences below about {2 * error:.1f} points say little."
        )
    return text + _caveats(compared)


def time_cost(figures: Figures) -> str:
    """Say what the run took, against a run without freezing that was measured or is estimated."""
    cost, compared, baseline = figures["cost"], figures["comparison"], figures["baseline"]
    if cost["seconds"] is None:
        return "Not measured: no epoch was finished."
    taken = f"{duration(cost['seconds'])} of training, {duration(cost['entering_seconds'])} of it for building or opening caches"
    if compared is not None and compared["speedup"]:
        text = (
            f"{duration(cost['whole_seconds'])} against the baseline's {duration(baseline['seconds'])}, a factor of "
            f"{compared['speedup']:.2f}: wall-clock of train() with building, without evaluations, one run each."
        )
        if not baseline["device"] or baseline["device"] != figures["device"]:
            text += " That both ran on the same idle machine is not recorded."
        return text + _caveats(compared)
    if cost["no_freezing_seconds"] is None:
        return f"{taken}. What a run without freezing takes was not measured, and there is nothing to estimate it from."
    if cost["no_freezing_measured"]:
        return f"{taken}. At the images per second {cost['no_freezing_text']}: {duration(cost['no_freezing_seconds'])}."
    return (
        f"{taken}. Without freezing about {duration(cost['no_freezing_seconds'])}: {cost['no_freezing_text']}. This is an "
        "estimate, not a measurement."
    )


def _caveats(compared: Figures) -> str:
    return f" Mind that {'; '.join(compared['caveats'])}." if compared["caveats"] else ""


def when_not_to_use(figures: Figures) -> list[str]:
    """Return when this way of training is the wrong one."""
    lines = [
        "In runs of a few epochs: each stored view goes through the frozen blocks once before it pays.",
        "When every epoch must show new augmentations, or the collator mixes samples: a cache shows what was stored.",
        "When data differ much from what the frozen blocks were trained on: they cannot adapt.",
    ]
    cost = figures["cost"]
    if cost["seconds"] is not None and cost["no_freezing_seconds"] is not None:
        ratio = cost["seconds"] / cost["no_freezing_seconds"]
        if ratio > 1:
            kind = "measured" if cost["no_freezing_measured"] else "estimated"
            lines.insert(0, f"In a run like this one: it took {ratio:.2f} times the {kind} time without freezing.")
    return lines
