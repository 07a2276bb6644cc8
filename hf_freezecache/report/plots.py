"""Pictures of one run, narrow enough for a phone: as PNG, and as SVG that takes the colours of its page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from .text import duration, is_share, size_words

__all__ = ["Picture", "draw_runs", "pictures_of", "save_png", "to_svg"]

Figures = Mapping[str, Any]

# Okabe and Ito's palette, distinct for the colour-blind. On a page each is a CSS variable, which dark mode sets anew.
_BLUE, _ORANGE, _GREEN, _GREY, _INK, _GRID = "#0072b2", "#d55e00", "#009e73", "#6b6b6b", "#1b1b1b", "#dadada"
_VARIABLES = {
    _BLUE: "var(--blue)",
    _ORANGE: "var(--orange)",
    _GREEN: "var(--green)",
    _GREY: "var(--grey)",
    _INK: "currentColor",
    _GRID: "var(--grid)",
}
# Of runs side by side; the building of their caches has one colour in all of them.
_RUN_COLORS, _BUILD_COLOR = ["#666666", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"], "#F0C05A"
_WIDTH = 4.2  # inches: at 72 units each, about as many as a phone has pixels
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "axes.titlelocation": "left",
}


@dataclass(frozen=True)
class Picture:
    """A picture before it is drawn.

    Attributes:
        name: Stem of its file.
        title: Heading.
        caption: What to see in it.
        alt: The same for those who do not see it, with figures.
        height: Inches.
        draw: Draws it into a matplotlib figure.
    """

    name: str
    title: str
    caption: str
    alt: str
    height: float
    draw: Callable[[Any], None]


def _figure(picture: Picture) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    figure = Figure(figsize=(_WIDTH, picture.height), layout=engine, facecolor="none")
    FigureCanvasAgg(figure)
    picture.draw(figure)
    for axes in figure.axes:
        axes.set_facecolor("none")
        for line in axes.lines:  # a marker at the edge is whole
            line.set_clip_on(False)
    return figure


def _styled(salt: str) -> Any:
    from matplotlib import rc_context

    return rc_context({**_STYLE, "svg.hashsalt": salt})


def save_png(picture: Picture, path: Path) -> None:
    """Write a PNG on white.

    Raises:
        ImportError: matplotlib is missing.
        OSError: The file cannot be written.
    """
    with _styled(picture.name):
        _figure(picture).savefig(path, format="png", dpi=200, facecolor="white", metadata={"Software": None})


def to_svg(picture: Picture) -> str:
    """Return an ``<svg>`` element without a size of its own, with real text, in colours that the page sets.

    Raises:
        ImportError: matplotlib is missing.
    """
    file = io.StringIO()
    with _styled(picture.name):
        _figure(picture).savefig(file, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    text = re.sub(r"(?s)^.*?<svg ", "<svg ", file.getvalue())
    text = re.sub(r"(?s)<metadata>.*?</metadata>\s*", "", text)
    text = re.sub(r' (?:width|height)="[0-9.]+pt"', "", text, count=2)
    text = re.sub(r' (?:xmlns:xlink|xmlns|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(
        r"font-family: [^;\"]*;?|font: ([0-9.]+px) [^;\"]*", lambda m: f"font-size: {m[1]}" if m[1] else "", text
    )
    for color, variable in _VARIABLES.items():
        text = re.sub(f"(?i){color}", variable, text)
    # Ids are unique within a picture only.
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{picture.name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(picture.alt)}" ', 1)


def _draw_stages(figures: Figures, axes: Any, label: bool) -> None:
    """Shade stages, the deeper the darker; name them above the axes."""
    stages = [stage for stage in figures["stages"] if stage["end_epoch"] > stage["start_epoch"]]
    num_blocks = figures["model"].get("num_blocks") or max([stage["split_point"] for stage in stages], default=1)
    baseline = (figures["baseline"] or {}).get("evaluations", []) if axes.get_label() == "scores" else []
    ends = [stage["end_epoch"] for stage in stages] + [point["epoch"] for point in baseline]
    length = max([figures["epochs_done"] or 0.0, *ends]) or 1.0
    for number, stage in enumerate(stages):
        start, end, frozen = stage["start_epoch"], stage["end_epoch"], stage["split_point"]
        axes.axvspan(start, end, color=_BLUE, alpha=0.04 + 0.22 * frozen / max(num_blocks, 1), linewidth=0)
        if label:
            words = f"{frozen} of {num_blocks} frozen" if number == 0 and (end - start) / length > 0.3 else str(frozen)
            place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 9.5}
            axes.text((start + end) / 2, 1.02, words, **place)
    axes.set_xlim(0, length)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _legend(figure: Any, panels: Any) -> None:
    """Name the curves below the panels, where they cover none."""
    found = [axes.get_legend_handles_labels() for axes in panels]
    handles = [handle for handles, _ in found for handle in handles]
    labels = [label for _, labels in found for label in labels]
    if handles:
        # Long names take a line each.
        columns = 1 if max(map(len, labels)) > 28 else 2 if max(map(len, labels)) > 14 else 3
        figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=columns)


def _timeline(figures: Figures, figure: Any) -> None:
    evaluations = figures["evaluations"]
    scores = [(point["epoch"], point["value"]) for point in evaluations if point["value"] is not None]
    losses = [(point["epoch"], point["loss"]) for point in evaluations if point["loss"] is not None]
    panels = figure.subplots(2 if scores else 1, 1, sharex=True, squeeze=False)[:, 0]
    for number, axes in enumerate(panels):
        axes.set_label("scores")
        _draw_stages(figures, axes, label=number == 0)
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
    upper = panels[0]
    trained = [(epoch, loss) for epoch, loss in figures["loss"] if loss is not None]
    marker = "." if len(trained) < 30 else None
    if trained:
        upper.plot(*zip(*trained, strict=True), color=_ORANGE, linewidth=1.2, marker=marker, label="training")
    if losses:
        upper.plot(
            *zip(*losses, strict=True), color=_GREEN, linewidth=1.4, marker="o", markersize=3.5, label="evaluation"
        )
    upper.set_ylabel("loss")
    if scores:
        name = next(point["metric"] for point in evaluations if point["value"] is not None)
        factor = 100 if is_share(name) else 1
        lower = panels[1]
        baseline = [
            (point["epoch"], factor * point["value"])
            for point in (figures["baseline"] or {}).get("evaluations", [])
            if point["metric"] == name
        ]
        if baseline:
            style = {"color": _GREY, "linewidth": 1.3, "linestyle": "--", "marker": "s", "markersize": 3}
            lower.plot(*zip(*baseline, strict=True), **style, label="baseline, no freezing")
        points = [(epoch, factor * value) for epoch, value in scores]
        lower.plot(
            *zip(*points, strict=True),
            color=_BLUE,
            linewidth=1.6,
            marker="o",
            markersize=3.5,
            label="this run" if baseline else name,
        )
        lower.set_ylabel(f"{name}, %" if factor == 100 else name)
    panels[-1].set_xlabel("epoch")
    _legend(figure, panels)


def _cost(figures: Figures, figure: Any) -> None:
    rates, total = figure.subplots(2, 1, sharex=True)
    epochs, cost = figures["epochs"], figures["cost"]
    for number, axes in enumerate((rates, total)):
        _draw_stages(figures, axes, label=number == 0)
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
    kind = "measured" if cost["no_freezing_measured"] else "estimated"
    ends = [epoch["epoch"] for epoch in epochs]
    speeds = [epoch["images_per_second"] for epoch in epochs]
    rates.plot(ends, speeds, color=_BLUE, linewidth=1.6, marker="o", markersize=3.5)
    if cost["no_freezing_images_per_second"]:
        rates.axhline(
            cost["no_freezing_images_per_second"],
            color=_GREY,
            linestyle="--",
            linewidth=1.3,
        )
    rates.set_ylim(0, 1.12 * max([*speeds, cost["no_freezing_images_per_second"] or 0]))
    rates.set_ylabel("images/s")

    last = max(epoch["cumulative_seconds"] for epoch in epochs)
    factor, unit = (1, "s") if last < 600 else (60, "min") if last < 2 * 3600 else (3600, "h")
    # What entering a stage took stands at its beginning, as a step.
    line, before = [(0.0, 0.0)], 0.0
    for epoch in epochs:
        line.append((line[-1][0], (before + epoch["entering_seconds"]) / factor))
        before = epoch["cumulative_seconds"]
        line.append((epoch["epoch"], before / factor))
    if cost["no_freezing_images_per_second"]:
        unfrozen = [(0.0, 0.0), *((epoch["epoch"], epoch["no_freezing_seconds"] / factor) for epoch in epochs)]
        total.plot(
            *zip(*unfrozen, strict=True), color=_GREY, linestyle="--", linewidth=1.3, label=f"no freezing, {kind}"
        )
    total.plot(*zip(*line, strict=True), color=_BLUE, linewidth=1.6, label="this run, building included")
    total.set_ylim(bottom=0)
    total.set_ylabel(f"cumulative cost, {unit}")
    total.set_xlabel("epoch")
    _legend(figure, (total,))


def _cached(figures: Figures) -> list[Figures]:
    return [stage for stage in figures["stages"] if stage["has_cache"]]


def _stage_names(stages: Sequence[Figures]) -> list[str]:
    """Return the frozen blocks of each stage, and its first epoch if two stages have the same."""
    split_points = [stage["split_point"] for stage in stages]
    if len(set(split_points)) == len(stages):
        return [f"{split_point} frozen" for split_point in split_points]
    return [f"{stage['split_point']} from epoch {stage['start_epoch']}" for stage in stages]


def _storage(figures: Figures, figure: Any) -> None:
    stages = _cached(figures)
    bits, sizes = figure.subplots(1, 2, sharey=True)
    names = _stage_names(stages)
    for axes, values, color, texts, title in (
        (
            bits,
            [stage["bits_per_element"] for stage in stages],
            _GREEN,
            [f"{stage['bits_per_element']:.2f}" for stage in stages],
            "bits per element",
        ),
        (
            sizes,
            [stage["cache_bytes"] for stage in stages],
            _BLUE,
            [size_words(s["cache_bytes"]) for s in stages],
            "cache size",
        ),
    ):
        axes.barh(range(len(stages)), values, height=0.55, color=color)
        for row, (value, text) in enumerate(zip(values, texts, strict=True)):
            axes.text(value + 0.02 * max(values), row, text, va="center")
        axes.set_xlim(0, 1.45 * max(values))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_title(title)
    bits.set_yticks(range(len(stages)), names)
    bits.set_ylim(len(stages) - 0.5, -0.5)


def pictures_of(figures: Figures) -> list[Picture]:
    """Return the pictures that a run has figures for: ``timeline``, ``cost``, ``storage``."""
    pictures = []
    cost, stages = figures["cost"], _cached(figures)
    frozen = ", ".join(f"{stage['split_point']} from epoch {stage['start_epoch']:g}" for stage in figures["stages"])
    shaded = f"Shaded: frozen blocks ({frozen}), the deeper the darker." if frozen else "No block was frozen."
    if figures["loss"] or figures["evaluations"]:
        result = figures["result"] or {}
        value = f", {result['metric']} {result['value']:.4g} in the end" if result.get("value") is not None else ""
        scored = any(point["value"] is not None for point in figures["evaluations"])
        title = "Loss and accuracy by stage" if "accuracy" in str(result.get("metric")) else "Loss by stage"
        pictures.append(
            Picture(
                "timeline",
                title,
                shaded,
                f"Curves of training and evaluation loss over {figures['epochs_done'] or 0:g} epochs{value}. {shaded}",
                4.2 if scored else 2.6,
                lambda figure: _timeline(figures, figure),
            )
        )
    if figures["epochs"]:
        text = cost["no_freezing_text"] or "there is nothing to estimate a run without freezing from"
        ends = f"{duration(cost['seconds'])} in all" + (
            f", {duration(cost['no_freezing_seconds'])} without freezing" if cost["no_freezing_seconds"] else ""
        )
        pictures.append(
            Picture(
                "cost",
                "Speed and cost against no freezing",
                f"No freezing: {text}. Building a cache is the step where a stage begins; evaluating and saving are left out.",
                f"Images per second by epoch, and cumulative cost: {ends}.",
                4.2,
                lambda figure: _cost(figures, figure),
            )
        )
    if stages:
        listed = "; ".join(
            f"{name}: {stage['bits_per_element']:.2f} bits per element, {size_words(stage['cache_bytes'])}"
            for name, stage in zip(_stage_names(stages), stages, strict=True)
        )
        pictures.append(
            Picture(
                "storage",
                "Bits per element and cache size by stage",
                "All files of a cache counted, over all stored views. fp16 is 16 bits, fp32 is 32.",
                f"Bars by stage. {listed}.",
                0.75 + 0.42 * len(stages),
                lambda figure: _storage(figures, figure),
            )
        )
    return pictures


def draw_runs(runs: Sequence[Figures], path: Path, title: str = "") -> None:
    """Write a PNG: seconds of each run, split into build and training; beside it accuracy against seconds.

    Args:
        runs: At most six, each as for ``text.format_runs``, with ``accuracy_after_seconds``: pairs of seconds and accuracy.
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
    for row, (run, color) in enumerate(zip(runs, _RUN_COLORS, strict=False)):
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
