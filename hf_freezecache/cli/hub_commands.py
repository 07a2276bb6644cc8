"""Commands that carry caches to the Hub and back."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UnsupportedSetupError
from ..report.text import size_words
from .base import EXIT_CODES, AsJson, Debug, app, one_line_errors
from .describe import find_caches

__all__ = ["pull", "push"]


RepoId = Annotated[str, typer.Argument(metavar="REPO_ID", help="Data set on the Hub, user/name.", show_default=False)]


@app.command(epilog=f"Example: hf-freezecache push caches/k06-0123456789abcdef user/flowers-k06\n\n{EXIT_CODES}")
def push(
    path: Annotated[Path, typer.Argument(metavar="CACHE", help="The cache.", show_default=False)],
    repo_id: RepoId,
    public: Annotated[bool, typer.Option("--public", help="Anybody may see it. Default: only you.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch; it is made if it does not exist.", show_default="main")
    ] = None,
    dataset_name: Annotated[str | None, typer.Option("--dataset", help="For the card: source of the images.")] = None,
    license_id: Annotated[str | None, typer.Option("--license", help="For the card: licence of the source.")] = None,
    model: Annotated[str | None, typer.Option(help="For the card: model whose blocks were run.")] = None,
    model_revision: Annotated[str | None, typer.Option(help="For the card: its commit.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another cache in the data set.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Push a cache to a private data set on the Hub; after an interruption, the rest of it.

    Hidden states can reveal the images they were computed from: think before you add --public. The cache is checked first.
    You need a token with write access: hf auth login, or HF_TOKEN.
    """
    with one_line_errors(debug):
        from ..hub.provenance import Provenance
        from ..hub.push import push_cache

        caches, _ = find_caches(path)
        if len(caches) > 1:
            raise UnsupportedSetupError(f"{path} holds {len(caches)} caches; give one of them, e.g. {caches[0]}.")
        provenance = Provenance(
            dataset_name=dataset_name, license=license_id, model_id=model, model_revision=model_revision
        )
        report = push_cache(
            caches[0],
            repo_id,
            private=not public,
            revision=revision,
            provenance=provenance,
            overwrite=overwrite,
            show_progress=sys.stderr.isatty(),
        )
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(report), indent=1))
        else:
            kind = "private" if report.private else "public"
            typer.echo(
                f"pushed: {report.url} ({kind}), {len(report.uploaded)} files sent ({size_words(report.uploaded_bytes)}), "
                f"{report.kept_files} were there, {report.commits} commits, revision {report.revision}"
            )


@app.command(epilog=f"Example: hf-freezecache pull user/flowers-k06 caches/flowers-k06 --views 0,1\n\n{EXIT_CODES}")
def pull(
    repo_id: RepoId,
    path: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.", show_default=False)],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit.", show_default="main, as it is now")
    ] = None,
    views: Annotated[str | None, typer.Option(help="Pull only these views, e.g. 0,1.", show_default="all")] = None,
    shards: Annotated[str | None, typer.Option(help="Pull only these shards of each view.", show_default="all")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Pull a cache from the Hub and check every bit; the folder appears once all of it is sound.

    Open a part of a cache with CachedDataset.from_pretrained(DIR, views=[...], shards=[...]).
    """
    chosen = [_numbers(text, option) for text, option in ((views, "--views"), (shards, "--shards"))]
    with one_line_errors(debug):
        from ..hub.pull import pull_cache

        report = pull_cache(
            repo_id, path, revision=revision, views=chosen[0], shards=chosen[1], show_progress=sys.stderr.isatty()
        )
        if as_json:
            typer.echo(json.dumps({**dataclasses.asdict(report), "directory": str(report.directory)}, indent=1))
        else:
            typer.echo(
                f"pulled: {report.directory}, {report.files} files checked, {report.total_bytes:,} bytes, of {repo_id} at "
                f"revision {report.revision}"
            )


def _numbers(text: str | None, option: str) -> list[int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text.replace(" ", "")):
        raise typer.BadParameter(f"{option} takes numbers, e.g. 0,1; got {text!r}.")
    return [int(number) for number in text.split(",")]
