"""Commands about training runs: a demo, the report of a run, and what can be set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UnsupportedSetupError
from .base import Debug, app, one_line_errors

__all__ = ["demo", "report", "settings"]


@app.command(epilog="Example: hf-freezecache demo --output-dir freezecache-demo")
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where picture, figures and caches go.")] = Path("freezecache-demo"),
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write the figures here.", show_default="demo.json in the output folder"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, splits, order and views.")] = 0,
    unseen: Annotated[
        bool, typer.Option("--unseen-digits", help="A harder task: fine-tune on digits that it has never seen.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a small ViT three ways on real images, and compare accuracy and time.

    It takes one to two and a half minutes on two cores and needs no network: the images are scikit-learn's handwritten
    digits. The ViT learns them on half of the scans. With a new head it is then fine-tuned on the other half: fully, fully in a
    third of the epochs, and frozen and cached for the cost of that third.
    """
    with one_line_errors(debug):
        from .demo import run

        run(output_dir, seed=seed, json_path=json_file, echo=typer.echo, unseen=unseen)


@app.command(epilog="Example: hf-freezecache report outputs/flowers --baseline outputs/flowers-plain")
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="output_dir of a run.", show_default=False)],
    baseline: Annotated[
        list[Path] | None,
        typer.Option(
            help="output_dir of a run without freezing, to compare with; plain Trainer's will do. Again for more runs of it."
        ),
    ] = None,
    seeds: Annotated[
        list[Path] | None,
        typer.Option(
            help="output_dir of a run that differs in the seed only, for mean and spread. Again for more of them."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Where the folder freezecache_report goes.", show_default="the folder of the run"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and draw nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Draw what a run did, as one HTML page and pictures: stages, loss, accuracy, cost, caches.

    It reads freezecache_run.json, trainer_state.json or the last checkpoint in RUN_DIR, also of a run that was interrupted.
    With --baseline, the cost of a run without freezing is measured; without, it is an estimate.
    """
    with one_line_errors(debug):
        from ..report.figures import figures_of
        from ..report.page import write_report
        from ..report.record import read_run
        from ..report.seeds import read_baselines, read_seeds
        from ..report.text import accuracy_cost, describe_schedule, over_time_words, seeds_words, time_cost

        record = read_run(run_dir)
        figures = figures_of(
            record,
            read_baselines(baseline) if baseline else None,
            read_seeds(record, seeds) if seeds else None,
        )
        if as_json:
            typer.echo(json.dumps(figures, indent=1))
            return
        try:
            page = write_report(figures, output_dir or run_dir)
        except ImportError as error:
            raise UnsupportedSetupError(
                f"The report needs matplotlib, which cannot be imported ({error}). Install it with pip install "
                "'hf-freezecache[report]', or print the figures with --json."
            ) from error
        for name, words in (
            ("schedule", describe_schedule(figures)),
            ("seeds", seeds_words(figures)),
            ("accuracy", accuracy_cost(figures)),
            ("time", time_cost(figures)),
            ("over time", over_time_words(figures)),
            ("page", str(page)),
        ):
            if words is None:
                continue
            typer.echo(f"{name + ':':<11}{words}")


@app.command(epilog="Example: hf-freezecache settings")
def settings(debug: Debug = False) -> None:
    """Say what can be set of freezing and caching, first what most users need.

    These are the fields of FreezeConfig and CacheConfig, and the flags of scripts that parse both with HfArgumentParser.
    """
    with one_line_errors(debug):
        from .settings import settings_lines

        typer.echo("\n".join(settings_lines()))
