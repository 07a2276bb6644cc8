"""The pictures of ``time_to_accuracy.py``, from its records: accuracy over cost, and over wall-clock where it was measured.

    python recipes/benchmarks/accuracy_picture.py

draws those of README and docs, from the records in ``recipes/benchmarks/results``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accuracy_arms import Arm
from accuracy_front import LINES, Point, front, line_of, mean_points, points_of
from records import RESULTS, load

from hf_freezecache.report.drawing import BLUE, GREEN, GREY, ORANGE, Picture, save_png, to_svg

PINK = "#cc79a7"
#: Line -> colour, marker, whether it is dashed. Colours of the package's pictures, which a dark page sets anew.
LOOKS = {
    "cached (ours)": (BLUE, "o", "-"),
    "schedule='auto'": (BLUE, "*", ":"),
    "schedule='auto', layer-wise decay": (BLUE, "D", "-."),
    "schedule='auto', LoRA": (BLUE, "P", "--"),
    "full, layer-wise decay": (GREY, "s", "-"),
    "schedule='auto', a setting given": (BLUE, ".", ":"),
    "full fine-tuning": (GREY, "s", "--"),
    "LoRA": (ORANGE, "^", "-"),
    "frozen, no cache": (GREEN, "v", "-"),
    "linear probe": (GREEN, "d", "--"),
    "linear probe, cached": (PINK, "d", "-"),
    "naive cache": (ORANGE, "x", ":"),
}
#: The same where full fine-tuning is one line, with and without layer-wise decay: the better of them counts. Of ``auto`` all is at
#: its default.
FEW_LOOKS = {
    "schedule='auto'": (BLUE, "o", "-"),
    "schedule='auto', LoRA": (BLUE, "P", "--"),
    "full fine-tuning": (GREY, "s", "-"),
    "LoRA": (ORANGE, "^", "-"),
    "linear probe": (GREEN, "d", "--"),
}
COST, SECONDS = "cost with building, epochs of full fine-tuning", "wall-clock with building, s"
#: The colours of a picture by itself, light and dark, as on the report's page.
_STYLE = """<style>
svg { color: #1b1b1b; --blue: #0072b2; --orange: #c65200; --green: #007d5b; --grey: #6b6b6b; --grid: #dadada;
  font-family: system-ui, sans-serif; }
@media (prefers-color-scheme: dark) {
  svg { color: #e8eaed; --blue: #5ab4ec; --orange: #f09a58; --green: #41c79c; --grey: #a3a9b1; --grid: #343a42; }
}
text { fill: currentColor; }
</style>"""


def few_lines(arm: Arm) -> str:
    """Return the name of the line that an arm belongs to; of full fine-tuning and of linear probes there is one."""
    name = line_of(arm)
    return {"full, layer-wise decay": "full fine-tuning", "linear probe, cached": "linear probe"}.get(name, name)


def paint_panel(
    axes: Any,
    points: Mapping[str, Point],
    key: str,
    looks: Mapping[str, tuple[str, str, str]],
    line: Callable[[Arm], str],
) -> None:
    """Draw accuracy over the cost (or ``key="seconds"``), one line an arm, its front only.

    Args:
        axes: Where to.
        points: By name of the arm.
        key: The field of a point that is drawn to the right.
        looks: Colour, marker and style of each line; others are left out.
        line: Tells the line of an arm.
    """
    for name, (color, marker, style) in looks.items():
        own = [point for point in points.values() if line(point.arm) == name]
        best = front([point for point in own if getattr(point, key) is not None], key)
        if best:
            axes.errorbar(
                [getattr(point, key) for point in best],
                [point.accuracy for point in best],
                yerr=[0 if math.isnan(point.error) else point.error for point in best],
                color=color,
                marker=marker,
                linestyle=style,
                linewidth=1.6,
                markersize=4,
                elinewidth=0.8,
                label=name,
            )
    axes.set_xscale("log")
    axes.grid(axis="y", linewidth=0.6)
    axes.set_axisbelow(True)


def set_ticks(axes: Any) -> None:
    """Mark 1, 2, 5, 10, ... within the limits."""
    low, high = axes.get_xlim()
    ticks = [tick for power in range(-2, 6) for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy over cost, and over wall-clock where it was measured; all arms.

    Args:
        records: Of several data sets means are drawn, of the arms that all have.
        path: An SVG that stands by itself, or a PNG.
    """
    sets = [points_of(record) for record in records]
    points = mean_points(sets) if len(sets) > 1 else sets[0]
    timed = sum(point.seconds is not None for point in points.values()) > 1
    names = ", ".join(map(title_of, records))
    panels = [("cost", COST), *([("seconds", SECONDS)] if timed else [])]

    def paint(figure: Any) -> None:
        found = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (key, label) in zip(found, panels, strict=True):
            paint_panel(axes, points, key, {name: LOOKS[name] for name in LINES}, line_of)
            axes.set_xlabel(label)
            axes.set_ylabel("accuracy, %")
            set_ticks(axes)
        handles, labels = found[0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=1)

    best = max(points.values(), key=lambda point: point.accuracy)
    write(
        Picture(
            name="time-to-accuracy",
            title="Accuracy over cost",
            caption=names,
            alt=f"Accuracy over cost on {names}, one line an arm; the best is {best.accuracy:.1f}% at a cost of {best.cost:.1f}.",
            height=3.0 * len(panels) + 0.2 * len({line_of(point.arm) for point in points.values()}) + 0.2,
            draw=paint,
        ),
        path,
    )


def draw_summary(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each data set, accuracy over cost, and before them one over wall-clock for each that was timed.

    Args:
        records: Of several data sets.
        path: A PNG.
    """
    sets = [(title_of(record), points_of(record)) for record in records]
    timed = [one for one in sets if sum(point.seconds is not None for point in one[1].values()) > 1]
    panels = [(*one, "seconds", SECONDS) for one in timed] + [(*one, "cost", COST) for one in sets]
    rows = math.ceil(len(panels) / 3)

    def paint(figure: Any) -> None:
        cells = figure.subplots(rows, 3, squeeze=False).ravel()
        labelled: dict[str, Any] = {}
        limits = [point.cost for _, points in sets for point in points.values()]
        for axes, (title, points, key, label) in zip(cells, panels, strict=False):
            paint_panel(axes, points, key, FEW_LOOKS, few_lines)
            if key == "cost":
                axes.set_xlim(min(limits) * 0.85, max(limits) * 1.15)
            set_ticks(axes)
            axes.set_title(title)
            axes.set_xlabel(label.replace(", epochs", ",\nepochs"))
            labelled |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        for axes in cells[::3]:
            axes.set_ylabel("accuracy, %")
        for axes in cells[len(panels) :]:
            axes.set_axis_off()
        order = [name for name in FEW_LOOKS if name in labelled]
        handles = [labelled[name] for name in order]
        if len(panels) < len(cells):
            cells[len(panels)].legend(handles, order, frameon=False, loc="center")
        else:
            figure.legend(handles, order, frameon=False, loc="outside lower center", ncols=len(order))

    names = ", ".join(title for title, _ in sets)
    alt = f"Accuracy over cost on {names}, one line an arm."
    write(Picture("summary", "Accuracy over cost", names, alt, height=2.9 * rows + 0.3, draw=paint, width=9.0), path)


def title_of(record: Mapping[str, Any]) -> str:
    config = record["config"]
    return f"{config['data']} at {config['image_size']} px"


def write(picture: Picture, path: Path) -> None:
    """Write an SVG that stands by itself, or a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        save_png(picture, path)
    else:
        text = to_svg(picture).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        path.write_text(re.sub(r"(<svg [^>]*>)", lambda match: match[1] + _STYLE, text, count=1))
    print(f"picture: {path}")


def main() -> None:
    records = {path: load(path.name) for path in sorted(RESULTS.glob("time_to_accuracy--*.json"))}
    draw_summary(list(records.values()), RESULTS / "time_to_accuracy--deit-tiny.png")
    for path, record in records.items():
        if path.with_suffix(".png").exists():
            draw([record], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
