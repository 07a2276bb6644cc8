"""Draws what augmentation moves: the channels, tokens and augmentations that a base view says little about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_freezecache.compression.sensitivity import Sensitivity

# The palette of Okabe and Ito, which stays distinct for the colour-blind.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"


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
        channels.bar(range(len(order)), order, width=1.0, color=_BLUE)
        tenth, ninth = np.quantile(order, [0.1, 0.9])
        channels.axhline(found.overall, color=_ORANGE, linewidth=1.2)
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
        bars.barh(names, heights, color=_GREEN, height=0.55)
        for place, height in enumerate(heights):
            bars.text(max(height, 0) + 0.02, place, f"{height:.2f}", va="center", fontsize=10)
        bars.invert_yaxis()
        bars.set_xlim(min(0.0, *heights), 1.15)
        bars.set_title(f"by augmentation, {found.num_images} images", fontsize=10.5, loc="left")
        for axes in (channels, bars):
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
