"""Runs side by side as a table and as a picture, and what augmentation moves.

A run is a dict as ``hf_freezecache.demo`` makes it: ``run`` (name), ``accuracy`` (0 to 1), ``seconds`` and, part of
them, ``build_seconds``, ``cache_bytes_per_image``, and ``accuracy_after_seconds``, a list of (seconds, accuracy).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..compression.sensitivity import Sensitivity

__all__ = ["draw_runs", "draw_sensitivity", "format_runs"]

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


def draw_sensitivity(stages: Sequence[tuple[int, Sensitivity]], path: Path, title: str = "") -> None:
    """Write a PNG: which channels, tokens and augmentations a base view says little about, one row per split point.

    Args:
        stages: Split points and what was measured there; at least one.
        path: The file.
        title: Line above all.

    Raises:
        ImportError: matplotlib is missing.
        OSError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(
        figsize=(13, 0.7 + 3.1 * len(stages)), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    )
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=13)
    grid = figure.subplots(len(stages), 3, width_ratios=[1.5, 0.8, 1.1], squeeze=False)
    values = np.concatenate([np.ravel(stage.tokens) for _, stage in stages])
    # One scale for all maps, so that stages can be compared.
    low, high = float(values.min()), max(float(values.max()), float(values.min()) + 0.01)
    for row, (split_point, found) in enumerate(stages):
        channels, tokens, bars = grid[row]
        order = np.sort(found.channels)
        channels.bar(range(len(order)), order, width=1.0, color=_COLORS[1])
        tenth, ninth = np.quantile(order, [0.1, 0.9])
        channels.axhline(found.overall, color=_COLORS[2], linewidth=1.2)
        channels.set_title(
            f"{split_point} frozen blocks: channels {tenth:.2f} to {ninth:.2f} (middle 80%)", fontsize=10.5, loc="left"
        )
        channels.set_ylabel("similarity to the prediction")
        channels.set_ylim(min(0.0, float(order[0])), 1.0)
        channels.set_xlim(-0.5, len(order) - 0.5)
        least = np.argsort(found.channels)[:3]
        channels.set_xlabel(f"channels, least similar first ({', '.join(map(str, least))}, ...); line: all together")
        image = tokens.imshow(np.array(found.tokens), cmap="viridis", vmin=low, vmax=high)
        tokens.set_title("patch tokens, at their place", fontsize=10.5, loc="left")
        tokens.set_xticks([])
        tokens.set_yticks([])
        figure.colorbar(image, ax=tokens, shrink=0.85)
        names = ["all together", *(f"{name} alone" for name in found.augmentations)]
        heights = [found.overall, *found.augmentations.values()]
        if found.prefix is not None:
            names.append("prefix tokens")
            heights.append(found.prefix)
        bars.barh(names, heights, color=_COLORS[3], height=0.55)
        for place, height in enumerate(heights):
            bars.text(max(height, 0) + 0.02, place, f"{height:.2f}", va="center", fontsize=10)
        bars.invert_yaxis()
        bars.set_xlim(min(0.0, *heights), 1.15)
        bars.set_title(f"by augmentation, {found.num_images} images", fontsize=10.5, loc="left")
        for axes in (channels, bars):
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
