"""Figures of training runs as a table and as a picture.

A run is a dict as ``hf_freezecache.demo`` makes it: ``run`` (name), ``accuracy`` (0 to 1), ``seconds`` and, part of
them, ``build_seconds``, ``cache_bytes_per_image``, and ``accuracy_after_seconds``, a list of (seconds, accuracy).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw_runs", "format_runs"]

Run = dict[str, Any]

# The palette of Okabe and Ito, which stays distinct for the colour-blind.
_COLORS = ["#666666", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"]
_BUILD_COLOR = "#F0C05A"


def format_runs(runs: Sequence[Run]) -> str:
    """Return a plain-text table, one line per run: name, accuracy, seconds, of which build, bytes per image."""
    rows = [("run", "accuracy", "seconds", "of it build", "bytes per image")]
    for run in runs:
        cached = run["cache_bytes_per_image"] > 0
        rows.append(
            (
                run["run"],
                f"{run['accuracy']:.1%}",
                f"{run['seconds']:.1f}",
                f"{run['build_seconds']:.1f}" if cached else "-",
                f"{run['cache_bytes_per_image']:,.0f}" if cached else "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def draw_runs(runs: Sequence[Run], path: Path, title: str = "") -> None:
    """Write a PNG: seconds of each run, split into build and training; beside it accuracy against seconds.

    Args:
        runs: At most six.
        path: The file.
        title: Line above both.

    Raises:
        ImportError: matplotlib is missing.
        OSError: The file cannot be written.
    """
    # Without pyplot: no global state, and no window system is asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(12, 4.6), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    bars, curves = figure.subplots(1, 2, width_ratios=[1.1, 1])
    if title:
        figure.suptitle(title, fontsize=13)
    longest = max(run["seconds"] for run in runs)
    for row, (run, color) in enumerate(zip(runs, _COLORS, strict=False)):
        build = run["build_seconds"]
        bars.barh(row, build, color=_BUILD_COLOR, height=0.55)
        bars.barh(row, run["seconds"] - build, left=build, color=color, height=0.55)
        label = f"{run['seconds']:.1f} s, accuracy {run['accuracy']:.1%}"
        bars.text(run["seconds"] + 0.015 * longest, row, label, va="center", fontsize=10.5)
        points = run["accuracy_after_seconds"]
        curves.plot(
            [seconds for seconds, _ in points],
            [100 * accuracy for _, accuracy in points],
            color=color,
            marker="o",
            markersize=3.5,
            label=run["run"],
        )
    bars.set_yticks(range(len(runs)), [run["run"] for run in runs], fontsize=11)
    bars.invert_yaxis()
    bars.set_xlim(0, 1.65 * longest)  # room for the labels behind the bars
    bars.set_xlabel("seconds, cache build included, evaluation left out")
    if any(run["build_seconds"] > 0 for run in runs):
        bars.barh(0, 0, color=_BUILD_COLOR, label="building the caches")
        bars.legend(loc="lower right", frameon=False)
    curves.set_xlabel("seconds, cache build included, evaluation left out")
    curves.set_ylabel("accuracy on held-out images, %")
    curves.set_xlim(left=0)
    curves.legend(loc="lower right", frameon=False)
    curves.grid(alpha=0.3)
    for axes in (bars, curves):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
