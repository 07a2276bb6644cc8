"""Pictures of one run, and of several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .drawing import BLUE, GREEN, GREY, ORANGE, Picture, add_legend
from .text import duration, is_share, over_time_words, size_words, time_unit

__all__ = ["draw_runs", "pictures_of"]

Figures = Mapping[str, Any]

# Of runs side by side; the building of their caches has one colour in all of them.
_RUN_COLORS, _BUILD_COLOR = ["#666666", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"], "#F0C05A"


def _draw_stages(figures: Figures, axes: Any, label: bool) -> None:
    """Shade stages, the deeper the darker; name them above the axes."""
    stages = [stage for stage in figures["stages"] if stage["end_epoch"] > stage["start_epoch"]]
    num_blocks = figures["model"].get("num_blocks") or max([stage["split_point"] for stage in stages], default=1)
    baseline = (figures["baseline"] or {}).get("evaluations", []) if axes.get_label() == "scores" else []
    ends = [stage["end_epoch"] for stage in stages] + [point["epoch"] for point in baseline]
    length = max([figures["epochs_done"] or 0.0, *ends]) or 1.0
    for number, stage in enumerate(stages):
        start, end, frozen = stage["start_epoch"], stage["end_epoch"], stage["split_point"]
        axes.axvspan(start, end, color=BLUE, alpha=0.04 + 0.22 * frozen / max(num_blocks, 1), linewidth=0)
        if label:
            words = f"{frozen} of {num_blocks} frozen" if number == 0 and (end - start) / length > 0.3 else str(frozen)
            place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 9.5}
            axes.text((start + end) / 2, 1.02, words, **place)
    axes.set_xlim(0, length)
    axes.xaxis.get_major_locator().set_params(integer=True)


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
        upper.plot(*zip(*trained, strict=True), color=ORANGE, linewidth=1.2, marker=marker, label="training")
    if losses:
        upper.plot(
            *zip(*losses, strict=True), color=GREEN, linewidth=1.4, marker="o", markersize=3.5, label="evaluation"
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
            style = {"color": GREY, "linewidth": 1.3, "linestyle": "--", "marker": "s", "markersize": 3}
            lower.plot(*zip(*baseline, strict=True), **style, label="baseline, no freezing")
        points = [(epoch, factor * value) for epoch, value in scores]
        lower.plot(
            *zip(*points, strict=True),
            color=BLUE,
            linewidth=1.6,
            marker="o",
            markersize=3.5,
            label="this run" if baseline else name,
        )
        lower.set_ylabel(f"{name}, %" if factor == 100 else name)
    panels[-1].set_xlabel("epoch")
    add_legend(figure, panels)


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
    rates.plot(ends, speeds, color=BLUE, linewidth=1.6, marker="o", markersize=3.5)
    if cost["no_freezing_images_per_second"]:
        rates.axhline(
            cost["no_freezing_images_per_second"],
            color=GREY,
            linestyle="--",
            linewidth=1.3,
        )
    rates.set_ylim(0, 1.12 * max([*speeds, cost["no_freezing_images_per_second"] or 0]))
    rates.set_ylabel("images/s")

    last = max(epoch["cumulative_seconds"] for epoch in epochs)
    factor, unit = time_unit(last)
    # What entering a stage took stands at its beginning, as a step.
    line, before = [(0.0, 0.0)], 0.0
    for epoch in epochs:
        line.append((line[-1][0], (before + epoch["entering_seconds"]) / factor))
        before = epoch["cumulative_seconds"]
        line.append((epoch["epoch"], before / factor))
    if cost["no_freezing_images_per_second"]:
        unfrozen = [(0.0, 0.0), *((epoch["epoch"], epoch["no_freezing_seconds"] / factor) for epoch in epochs)]
        total.plot(
            *zip(*unfrozen, strict=True), color=GREY, linestyle="--", linewidth=1.3, label=f"no freezing, {kind}"
        )
    total.plot(*zip(*line, strict=True), color=BLUE, linewidth=1.6, label="this run, building included")
    total.set_ylim(bottom=0)
    total.set_ylabel(f"cumulative cost, {unit}")
    total.set_xlabel("epoch")
    add_legend(figure, (total,))


def _race(figures: Figures, figure: Any) -> None:
    found, axes = figures["comparison"]["over_time"], figure.subplots()
    name, curves = found["metric"], [found["mine"], found["theirs"]]
    last = max(points[-1][0] for points in curves)
    (factor, unit), percent = time_unit(last), 100 if name is not None and is_share(name) else 1
    cost, before = figures["cost"], 0.0
    timed = cost["preflight_seconds"] + (cost["seconds"] or 0.0)
    rest = max((cost["whole_seconds"] or 0.0) - timed, 0.0)  # spread evenly, as by `run_clock`
    for epoch in figures["epochs"]:
        building, end = epoch["entering_seconds"], epoch["cumulative_seconds"] - epoch["seconds"]
        begin = cost["preflight_seconds"] + end - building + rest * before / figures["epochs"][-1]["epoch"]
        before = epoch["epoch"]
        if building > 0.004 * last:  # thinner than the line
            axes.axvspan(begin / factor, (begin + building) / factor, color=ORANGE, alpha=0.18, linewidth=0)
    styles = (
        {"color": BLUE, "linewidth": 1.6, "marker": "o", "markersize": 3.5, "label": "this run"},
        {"color": GREY, "linewidth": 1.3, "marker": "s", "markersize": 3, "label": "baseline"},
    )
    for points, style in zip(curves, styles, strict=True):
        axes.plot([x / factor for x, _ in points], [percent * y for _, y in points], **style)
        if points[-1][0] < last:  # it has ended, and keeps what it has
            ended = [points[-1][0] / factor, last / factor]
            axes.plot(ended, 2 * [percent * points[-1][1]], color=style["color"], linewidth=1, linestyle=":")
    axes.set_xlim(0, last / factor)
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"time since the start, {unit}")
    axes.set_ylabel("evaluation loss" if name is None else f"{name}, %" if percent == 100 else name)
    add_legend(figure, (axes,))


def _race_picture(figures: Figures) -> Picture | None:
    """Return the picture of scores over seconds beside those of the baseline, if both were timed and evaluated."""
    words = over_time_words(figures)
    if words is None:
        return None
    name = figures["comparison"]["over_time"]["metric"] or "evaluation loss"
    even = (
        ""
        if figures["baseline"].get("timed_by_epoch")
        else " The baseline has one time for all; its points are spread evenly over it."
    )
    built = any(stage["cache"] == "built" for stage in figures["stages"])
    dots = " Dotted: a run that has ended." if _ends_differ(figures) else ""
    return Picture(
        "over_time",
        f"{name[:1].upper()}{name[1:]} over time, beside the baseline".replace("_", " "),
        f"{words} Time has the checks before the first step, building{' (shaded)' if built else ''} and saving in it, and no evaluation.{even}{dots} "
        "Before a run ends its learning rate is still on its way down.",
        f"Curves of {name} over seconds, of this run and of the baseline. {words}",
        3.3,
        lambda figure: _race(figures, figure),
    )


def _ends_differ(figures: Figures) -> bool:
    found = figures["comparison"]["over_time"]
    return bool(found["mine"][-1][0] != found["theirs"][-1][0])


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
            GREEN,
            [f"{stage['bits_per_element']:.2f}" for stage in stages],
            "bits per element",
        ),
        (
            sizes,
            [stage["cache_bytes"] for stage in stages],
            BLUE,
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
    """Return the pictures that a run has figures for: ``over_time``, ``timeline``, ``cost``, ``storage``."""
    pictures = []
    cost, stages = figures["cost"], _cached(figures)
    frozen = ", ".join(f"{stage['split_point']} from epoch {stage['start_epoch']:g}" for stage in figures["stages"])
    shaded = f"Shaded: frozen blocks ({frozen}), the deeper the darker." if frozen else "No block was frozen."
    race = _race_picture(figures)
    if race is not None:
        pictures.append(race)
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
