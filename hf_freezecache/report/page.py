"""The report of a run: one self-contained HTML page, and its pictures as PNGs beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from .drawing import save_png, to_svg
from .plots import pictures_of
from .text import (
    accuracy_cost,
    counted,
    describe_schedule,
    distortion_of,
    duration,
    how_it_ended,
    how_it_trained,
    is_share,
    metric,
    over_time_words,
    points,
    runs_words,
    seeds_words,
    size_words,
    spread_words,
    stage_account,
    time_cost,
    when_not_to_use,
)

__all__ = ["PAGE_NAME", "PLOT_NAME", "REPORT_FOLDER", "TEMPLATES", "fill_template", "render_page", "write_report"]

#: Folder in ``output_dir``. Part of what ``push_to_hub`` uploads.
REPORT_FOLDER = "freezecache_report"
PAGE_NAME = "report.html"
#: The picture that the model card shows, seen from ``output_dir``.
PLOT_NAME = f"{REPORT_FOLDER}/timeline.png"

#: Stands in tables where there is no figure.
_NOTHING = "\N{EN DASH}"
TEMPLATES = Path(__file__).parent / "templates"

Figures = Mapping[str, Any]


def fill_template(template: Path, **values: Any) -> str:
    """Return the text of a Jinja template; what goes into an ``.html`` one is escaped.

    Raises:
        jinja2.UndefinedError: The template asks for a value that is not there.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=template.suffix == ".html",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "duration": duration,
        "size": size_words,
        "account": stage_account,
        "distortion": distortion_of,
        "seconds": lambda seconds: duration(seconds) if seconds else _NOTHING,
        "figure": lambda value: f"{value:,.4g}" if value else _NOTHING,
    }
    return environment.get_template(template.name).render(**values)


def _tiles(figures: Figures) -> list[tuple[str, str, str]]:
    """Return (figure, what it is, what to know of it) of the few that matter most."""
    result, cost, compared = figures["result"], figures["cost"], figures["comparison"]
    tiles = []
    if result and result["value"] is not None:
        note = f"on {result['images']:,} images" if result["images"] else ""
        if compared and compared["difference"] is not None:
            note = f"{points(result['metric'], compared['difference'])} against the baseline"
        tiles.append((metric(result["metric"], result["value"]), result["metric"].replace("_", " "), note))
    elif result and result["loss"] is not None:
        tiles.append((f"{result['loss']:.4g}", "evaluation loss", ""))
    if cost["seconds"] is not None:
        entering = f"{duration(cost['entering_seconds'])} of it for caches" if cost["entering_seconds"] else ""
        tiles.append((duration(cost["seconds"]), "training, caches included", entering))
    if cost["no_freezing_seconds"] is not None:
        kind = "at the images/s of the baseline" if cost["no_freezing_measured"] else "estimated, not measured"
        asked = f", {counted(cost['no_freezing_epochs'], 'epoch')}" if cost["no_freezing_epochs"] else ""
        tiles.append((duration(cost["no_freezing_seconds"]), f"without freezing{asked}", kind))
    # Stages of one split point may share a cache.
    caches = list({stage["split_point"]: stage for stage in figures["stages"] if stage["has_cache"]}.values())
    if caches:
        number = f"in {len(caches)} cache{'s' if len(caches) > 1 else ''}"
        bits = " and ".join(f"{stage['bits_per_element']:.1f}" for stage in (caches[0], *caches[1:][-1:]))
        tiles.append((size_words(sum(stage["cache_bytes"] for stage in caches)), number, f"{bits} bits per element"))
    return tiles


def _settings(figures: Figures) -> dict[str, dict[str, Any]]:
    """Return settings and versions in groups, without those at nothing."""
    groups = {
        "Freezing": figures["freezing"],
        "Caching": figures["cache"],
        "Training": figures["training"],
        "Model and data": {**figures["model"], **figures["data"], "device": figures["device"]},
        "Versions": figures["versions"],
    }
    return {
        title: {name: value for name, value in group.items() if value not in (None, "", [])}
        for title, group in groups.items()
    }


def render_page(figures: Figures) -> str:
    """Return the page. It asks for no other file and runs no script.

    Raises:
        ImportError: matplotlib is missing.
    """
    pictures = [(picture, to_svg(picture)) for picture in pictures_of(figures)]
    return fill_template(
        TEMPLATES / "report.html",
        figures=figures,
        schedule=describe_schedule(figures),
        ending=how_it_ended(figures),
        training_source=how_it_trained(figures),
        tiles=_tiles(figures),
        pictures=pictures,
        accuracy_cost=accuracy_cost(figures),
        time_cost=time_cost(figures),
        over_time=over_time_words(figures),
        when_not_to_use=when_not_to_use(figures),
        settings=_settings(figures),
        seeds=seeds_words(figures),
        runs_words=runs_words,
        spread_words=spread_words,
        metric=metric,
        is_share=is_share,
    )


def write_report(figures: Figures, folder: Path) -> Path:
    """Write ``freezecache_report/report.html`` and its PNGs into a folder, and return the page.

    Raises:
        ImportError: matplotlib is missing.
        OSError: A file cannot be written.
    """
    text = render_page(figures)
    folder = folder / REPORT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures_of(figures):
        save_png(picture, folder / f"{picture.name}.png")
    page = folder / PAGE_NAME
    temporary = page.with_name(f".{PAGE_NAME}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(page)
    return page
