"""The command line's frame: the app itself, options that several commands have, and errors on one line.

To add a command, decorate a function with ``@app.command`` in a module of this package. A new module needs its name in ``app.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..errors import FreezeCacheError

__all__ = ["EXIT_CODES", "AsJson", "CachePath", "Debug", "app", "one_line_errors", "print_error"]

EXIT_CODES = "Exit status: 0 on success, 1 if something is wrong or could not be done, 2 on wrong usage."

app = typer.Typer(
    name="hf-freezecache",
    help="Fine-tune vision transformers from a cache of their own frozen prefix.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)

CachePath = Annotated[Path, typer.Argument(metavar="PATH", help="A cache, or a folder of caches.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="On an error show the whole traceback.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_error(what: object) -> None:
    """Print one line on stderr."""
    typer.echo(f"error: {' '.join(str(what).split())}", err=True)


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turn exceptions into one line on stderr and exit status 1; with ``debug`` let them through."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, (FreezeCacheError, OSError))
        print_error(error if known else f"{type(error).__name__}: {error} (--debug shows where)")
        raise typer.Exit(1) from None
