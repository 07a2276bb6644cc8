"""Two runs over seconds: which of them had the better score at each moment, and when one reached what the other ended at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from .text import is_share

__all__ = ["over_time"]

Figures = dict[str, Any]


def _points(evaluations: Sequence[Mapping[str, Any]], name: str | None) -> list[tuple[float, float]]:
    """Return pairs of seconds and metric, or loss if no metric is named, in order of time."""
    pairs = [
        (point.get("seconds"), point["loss"] if name is None else point["value"])
        for point in evaluations
        if name is None or point["metric"] == name
    ]
    known = [(seconds, value) for seconds, value in pairs if seconds is not None and value is not None]
    return sorted(known, key=lambda pair: pair[0])


def _at(points: Sequence[tuple[float, float]], seconds: float) -> float:
    """Return the last score at a moment that is not before the first one."""
    return [value for when, value in points if when <= seconds][-1]


def over_time(mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> Figures | None:
    """Compare the scores of two runs at each moment, by the last evaluation before it.

    Args:
        mine: Evaluations of this run: ``seconds``, ``metric``, ``value`` and ``loss`` of each.
        theirs: The same of the baseline.

    Returns:
        ``metric``, or ``None`` for the loss; ``mine`` and ``theirs``, pairs of seconds and score. ``spans``: triples of first second,
        last second and how this run stands (``"ahead"``, ``"behind"``, ``"level"``); the last one has no end. ``target``, the
        baseline's last score, with ``reached`` and ``baseline_reached``, the seconds after which a run first had it. Spans and
        target are empty where it is not known whether higher is better. ``None`` if there is nothing to compare.
    """
    named = {point["metric"] for point in mine} & {point["metric"] for point in theirs} - {None}
    # The metric that is best known is the first of its evaluation; all evaluations of a run have the same.
    name = next((point["metric"] for point in mine if point["metric"] in named), None)
    ours, others = _points(mine, name), _points(theirs, name)
    if not ours or not others:
        return None
    sign = -1 if name is None else 1 if is_share(name) else 0
    found: Figures = {
        "metric": name,
        "mine": [list(pair) for pair in ours],
        "theirs": [list(pair) for pair in others],
        "spans": [],
        "target": None,
        "reached": None,
        "baseline_reached": None,
    }
    if not sign:
        return found
    first = max(ours[0][0], others[0][0])
    moments = [first, *sorted({seconds for seconds, _ in (*ours, *others) if seconds > first})]
    changes: list[tuple[float, str]] = []
    for moment in moments:
        difference = sign * (_at(ours, moment) - _at(others, moment))
        standing = "ahead" if difference > 0 else "behind" if difference < 0 else "level"
        if not changes or changes[-1][1] != standing:
            changes.append((moment, standing))
    ends = [*(end for _, (end, _) in pairwise(changes)), None]
    found["spans"] = [[start, end, standing] for (start, standing), end in zip(changes, ends, strict=True)]
    target = others[-1][1]
    found["target"] = target
    for key, points in (("reached", ours), ("baseline_reached", others)):
        found[key] = next((seconds for seconds, value in points if sign * (value - target) >= 0), None)
    return found
