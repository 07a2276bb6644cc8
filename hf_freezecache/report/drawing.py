"""How a picture of a run is drawn, narrow enough for a phone: as PNG, and as SVG that takes the colours of its page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "Picture", "add_legend", "save_png", "to_svg"]

# Okabe and Ito's palette, distinct for the colour-blind. On a page each is a CSS variable, which dark mode sets anew.
BLUE, ORANGE, GREEN, GREY, _INK, _GRID = "#0072b2", "#d55e00", "#009e73", "#6b6b6b", "#1b1b1b", "#dadada"
_VARIABLES = {
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
    GREY: "var(--grey)",
    _INK: "currentColor",
    _GRID: "var(--grid)",
}
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
        width: Inches; by default as wide as a phone.
    """

    name: str
    title: str
    caption: str
    alt: str
    height: float
    draw: Callable[[Any], None]
    width: float = _WIDTH


def _figure(picture: Picture) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    figure = Figure(figsize=(picture.width, picture.height), layout=engine, facecolor="none")
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


def add_legend(figure: Any, panels: Any) -> None:
    """Name the curves below the panels, where they cover none."""
    found = [axes.get_legend_handles_labels() for axes in panels]
    handles = [handle for handles, _ in found for handle in handles]
    labels = [label for _, labels in found for label in labels]
    if handles:
        # Long names take a line each.
        columns = 1 if max(map(len, labels)) > 28 else 2 if max(map(len, labels)) > 14 else 3
        figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=columns)
