"""Mean and spread of a score over runs that differ in the seed only. It reads no file."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["run_of", "spread_of"]

Figures = Mapping[str, Any]


def run_of(name: str, seed: int | None, result: Figures | None, seconds: float | None) -> dict[str, Any]:
    """Return what is kept of a run among others of its setting.

    Args:
        name: Name of the run's folder.
        seed: ``None`` where it is not recorded, as of runs of plain ``Trainer``.
        result: ``figures["result"]`` of the run.
        seconds: Of ``train()`` without evaluations, if it was timed as a whole.
    """
    known = result or {}
    kept = {key: known.get(key) for key in ("metric", "value", "loss", "images")}
    return {"run": name, "seed": seed, **kept, "metrics": known.get("metrics", {}), "seconds": seconds}


def _spread(values: Sequence[float]) -> dict[str, float]:
    deviation = statistics.stdev(values)  # of a sample: divided by n - 1
    return {
        "mean": statistics.fmean(values),
        "standard_deviation": deviation,
        "lowest": min(values),
        "highest": max(values),
    }


def spread_of(runs: Sequence[Figures]) -> dict[str, Any] | None:
    """Return mean, sample standard deviation, lowest and highest of each metric, and of the loss, that all runs have.

    Args:
        runs: As ``run_of`` returns them, of one setting.

    Returns:
        ``runs``, those given; ``seeds``, in their order, or ``None`` if one is not known; ``metric``, the name of the first;
        ``metrics`` and ``loss``, the figures. ``None`` if there are fewer than two runs.
    """
    if len(runs) < 2:
        return None
    names = [name for name in runs[0]["metrics"] if all(name in run["metrics"] for run in runs)]
    losses = [run["loss"] for run in runs]
    seeds = [run["seed"] for run in runs]
    return {
        "runs": [dict(run) for run in runs],
        "seeds": None if None in seeds else seeds,
        "metric": runs[0]["metric"] if runs[0]["metric"] in names else None,
        "metrics": {name: _spread([run["metrics"][name] for run in runs]) for name in names},
        "loss": None if None in losses else _spread(losses),
    }
