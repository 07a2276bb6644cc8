"""Commands that look after a machine and its folder of caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .base import EXIT_CODES, AsJson, Debug, app, one_line_errors, print_error

__all__ = ["doctor", "prune"]

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of caches.")]


@app.command(epilog=f"Example: hf-freezecache doctor caches\n\n{EXIT_CODES}")
def doctor(folder: Folder = Path("caches"), as_json: AsJson = False, debug: Debug = False) -> None:
    """Look at versions, device, disk, locks and the installed Trainer, and at what a folder of caches holds.

    Nothing is changed. The exit status is 1 if something is not as it should be.
    """
    with one_line_errors(debug):
        from dataclasses import asdict

        from .doctor import examine

        found = list(examine(folder.expanduser()))
        if as_json:
            typer.echo(json.dumps([asdict(one) for one in found], indent=1))
        else:
            width = max(len(one.name) for one in found)
            for one in found:
                typer.echo(f"{'ok ' if one.ok else 'BAD'}  {one.name:<{width}}  {' '.join(one.words.split())}")
        if not all(one.ok for one in found):
            raise typer.Exit(1)


@app.command(epilog=f"Example: hf-freezecache prune caches --unfinished\n\n{EXIT_CODES}")
def prune(
    folder: Folder,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Those whose build did not end.")] = False,
    older_than: Annotated[
        float | None,
        typer.Option(min=0, metavar="DAYS", help="Those that were written longer ago.", show_default=False),
    ] = None,
    split_point: Annotated[
        int | None, typer.Option(min=1, help="Those of so many frozen blocks.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All caches.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete them; without it they are only listed.")] = False,
    debug: Debug = False,
) -> None:
    """List caches of a folder, and delete them with --yes. With several conditions all must hold.

    A cache that is being written is left alone. Whether a run is reading one cannot be told: do not prune beneath a training.
    """
    if not (unfinished or everything or older_than is not None or split_point is not None):
        raise typer.BadParameter("say which caches: --unfinished, --older-than DAYS, --split-point K or --all.")
    with one_line_errors(debug):
        from ..errors import CacheLockedError
        from ..report.text import size_words
        from .prune import caches_of, delete

        chosen = [
            cache
            for cache in caches_of(folder.expanduser())
            if not (unfinished and cache.finished)
            and (older_than is None or cache.days > older_than)
            and split_point in (None, cache.split_point)
        ]
        freed, locked = 0, False
        for cache in chosen:
            if yes:
                try:
                    delete(cache)
                except CacheLockedError as error:
                    locked = True
                    print_error(error)
                    continue
            freed += cache.bytes
            typer.echo(f"{'deleted' if yes else 'would delete'}  {cache.path}  {cache.words}")
        if yes:
            typer.echo(f"{size_words(freed)} freed.")
        else:
            typer.echo(f"{size_words(freed)} would be freed. Nothing was deleted; --yes deletes.")
        if locked:
            raise typer.Exit(1)
