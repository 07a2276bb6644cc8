"""Render the cards of this folder again, from the records of their runs, by the code that users call:

    python model_cards/render.py

A folder here is what ``recipes/image_classification.py`` left in its ``--output_dir``, without model and checkpoints.
"""

from __future__ import annotations

from pathlib import Path

from hf_freezecache.report.drawing import save_png
from hf_freezecache.report.figures import figures_of
from hf_freezecache.report.model_card import render_card
from hf_freezecache.report.page import PLOT_NAME
from hf_freezecache.report.plots import pictures_of
from hf_freezecache.report.record import RUN_NAME, read_run

HERE = Path(__file__).parent


def main(folder: Path = HERE) -> None:
    """Render all cards of a folder."""
    for path in sorted(folder.glob(f"*/{RUN_NAME}")):
        record = read_run(path.parent)
        figures = figures_of(record)
        plot = path.parent / PLOT_NAME
        plot.parent.mkdir(exist_ok=True)
        save_png(next(picture for picture in pictures_of(figures) if picture.name == plot.stem), plot)
        (path.parent / "README.md").write_text(render_card(figures, record.card or {}, PLOT_NAME), encoding="utf-8")


if __name__ == "__main__":
    main()
