"""Command line ``hf-freezecache``: build, look into, check, push and pull caches, and a demo. Thin: the work is done elsewhere.

What takes long to import is imported by the command that needs it, so that help and completion answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import (
    CacheCorruptError,
    FreezeCacheError,
    UnsupportedSetupError,
)
from ..report.text import (
    codec_words,
    distortion_words,
    size_words,
)

if TYPE_CHECKING:
    from ..cache.index import CacheIndex
    from ..compression.sensitivity import Sensitivity

__all__ = ["app"]

EXIT_CODES = "Exit status: 0 on success, 1 if something is wrong or could not be done, 2 on wrong usage."

#: Name of a cache's folder, as ``CachePlan.name`` makes it; marks unfinished caches, which have no index yet.
_CACHE_NAME = re.compile(r"k\d{2,}-[0-9a-f]{16}")

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


def _complain(what: object) -> None:
    typer.echo(f"error: {' '.join(str(what).split())}", err=True)


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """Turn exceptions into one line on stderr and exit status 1; with ``debug`` let them through."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, (FreezeCacheError, OSError))
        _complain(error if known else f"{type(error).__name__}: {error} (--debug shows where)")
        raise typer.Exit(1) from None


def _find_caches(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the caches at or right below a path, and the unfinished ones below it.

    Raises:
        CacheCorruptError: There is no finished cache.
    """
    from ..cache.index import (
        INDEX_NAME,
        load_index,
    )

    if not path.is_dir():
        what = "is a file; give the folder of the cache" if path.exists() else "does not exist"
        raise CacheCorruptError(f"{path} {what}.")
    if (path / INDEX_NAME).exists():
        return [path], []
    folders = sorted(child for child in path.iterdir() if child.is_dir())
    caches = [child for child in folders if (child / INDEX_NAME).exists()]
    unfinished = [child for child in folders if child not in caches and _CACHE_NAME.fullmatch(child.name)]
    if caches:
        return caches, unfinished
    if _CACHE_NAME.fullmatch(path.resolve().name) or any(path.glob("view-*")):
        load_index(path)  # says what is missing, and how to finish the build
    found = f" It holds {len(unfinished)} unfinished caches, e.g. {unfinished[0]}." if unfinished else ""
    raise CacheCorruptError(f"{path} is no cache: it has no {INDEX_NAME}, and no folder in it has one.{found}")


def _describe(path: Path, index: CacheIndex) -> dict[str, Any]:
    from ..cache.fingerprint import Fingerprint
    from ..codecs import DTYPES
    from ..hub.provenance import read_provenance

    tokens, hidden = index.hidden_shape
    per_view = index.total_bytes / (index.num_samples * index.num_views)
    return {
        "path": str(path),
        "split_point": index.split_point,
        "num_views": index.num_views,
        "num_samples": index.num_samples,
        "image_shape": list(index.image_shape),
        "tokens": tokens,
        "hidden": hidden,
        "dtype": str(DTYPES[index.dtype]).removeprefix("torch."),
        "codec": index.codec,
        "calibration": index.calibration,
        "copies": index.copies,
        "copies_calibration": index.copies_calibration,
        "view_bytes": [index.view_bytes(view) for view in range(index.num_views)],
        "chunk_size": index.chunk_size,
        "shard_chunks": index.shard_chunks,
        "shards": index.num_shards * index.num_views,
        "bytes": index.total_bytes,
        "bytes_per_image": per_view * index.num_views,
        "bytes_per_image_and_view": per_view,
        "bits_per_element": 8 * per_view / (tokens * hidden),
        "extras": [{"name": e.name, "dtype": e.dtype, "shape": list(e.shape)} for e in index.extras],
        "provenance": read_provenance(path).to_dict(),
        "fingerprint": Fingerprint(index.fingerprint).digest,
        "fingerprint_parts": index.fingerprint,
    }


def _copies_lines(cache: dict[str, Any]) -> dict[str, str]:
    """Return what ``inspect`` prints of views beyond the first, if these have a codec of their own."""
    copies, calibration = cache["copies"], cache["copies_calibration"]
    if not copies or not calibration:
        return {}
    first, *others = cache["view_bytes"]
    configuration = copies.get("configuration", {})
    predictor = configuration.get("predictor")
    how = calibration.get("storage", "stored apart")
    if predictor is not None:
        kind = "all channels" if predictor.get("full") else "each channel"
        how += f", predicted from the first by {kind}, pull {predictor.get('pull')}"
    lines = {
        "further views": f"{how}; {sum(others) / len(others) / first:.0%} of the bytes of the first each",
        "  codec": codec_words(configuration["codec"]),
        "  distortion": distortion_words(calibration) if "distortion" in calibration else "not measured",
    }
    if "sensitivity" in calibration:
        found = _sensitivity(calibration, cache["path"])
        parts = [f"{found.overall:.2f}", *(f"{name} alone {value:.2f}" for name, value in found.augmentations.items())]
        lines["  similarity"] = f"{', '.join(parts)}; channels {min(found.channels):.2f} to {max(found.channels):.2f}"
    return lines


def _sensitivity(calibration: dict[str, Any], path: str) -> Sensitivity:
    from ..cache.index import INDEX_NAME
    from ..compression.sensitivity import Sensitivity

    try:
        return Sensitivity.from_dict(calibration["sensitivity"])
    except (KeyError, TypeError, ValueError) as error:
        raise CacheCorruptError(f"{path}/{INDEX_NAME} is damaged: its sensitivity cannot be read: {error}.") from error


def _lines(cache: dict[str, Any]) -> list[str]:
    """Return what ``inspect`` prints of one cache."""
    from ..hub.provenance import Provenance

    measured = "exact" if cache["codec"]["name"] == "lossless" else "not measured"
    if cache["calibration"]:
        measured = distortion_words(cache["calibration"])
    extras = [f"{e['name']} ({e['dtype']}, {e['shape'] or 'one number'})" for e in cache["extras"]]
    rows = {
        "split point": f"{cache['split_point']} frozen blocks",
        "samples": f"{cache['num_samples']:,} in {cache['num_views']} views",
        "images": " x ".join(map(str, cache["image_shape"])) + " (channels x height x width)",
        "hidden states": f"{cache['tokens']} tokens x {cache['hidden']}, {cache['dtype']}",
        "codec": codec_words(cache["codec"]),
        "distortion": measured,
        **_copies_lines(cache),
        "shards": f"{cache['shards']}, up to {cache['shard_chunks']} chunks of {cache['chunk_size']} samples each",
        "size": f"{size_words(cache['bytes'])} ({cache['bytes']:,} bytes)",
        "per image": f"{size_words(cache['bytes_per_image'])}; {size_words(cache['bytes_per_image_and_view'])} per view",
        "per element": f"{cache['bits_per_element']:.2f} bits, everything counted",
        "extras": ", ".join(extras) or "none",
        **({"made of": made_of} if (made_of := Provenance.from_dict(cache["provenance"]).words()) else {}),
        "fingerprint": cache["fingerprint"],
        **{f"  {part}": value for part, value in cache["fingerprint_parts"].items()},
    }
    width = max(map(len, rows))
    return [cache["path"], *(f"  {name:<{width}}  {value}" for name, value in rows.items())]


@app.command(epilog="Example: hf-freezecache inspect caches/k06-0123456789abcdef")
def inspect(
    path: CachePath,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a cache holds: split point, views, shapes, codec, sizes, and all that it depends on.

    Reads index.json only; "verify" checks the other files.
    """
    with _one_line_errors(debug):
        from ..cache.index import load_index

        caches, unfinished = _find_caches(path)
        described, damaged = [], []
        for cache in caches:
            try:
                described.append(_describe(cache, load_index(cache)))
            except FreezeCacheError as error:  # go on with the other caches
                damaged.append(error)
        if as_json and described:
            typer.echo(json.dumps({"caches": described, "unfinished": list(map(str, unfinished))}, indent=1))
        elif not as_json:
            for entry in described:
                typer.echo("\n".join(_lines(entry)))
            _note_unfinished(unfinished)
        for other in damaged[1:]:
            _complain(other)
        if damaged:
            raise damaged[0]


@app.command(epilog=f"Example: hf-freezecache verify caches\n\n{EXIT_CODES}")
def verify(path: CachePath, as_json: AsJson = False, debug: Debug = False) -> None:
    """Check every bit of every file of a cache, or of all caches in a folder.

    Names each damaged, missing or foreign file. Exit status 1 if there is one, or if there is no cache.
    """
    with _one_line_errors(debug):
        from ..cache.index import INDEX_NAME

        caches, unfinished = _find_caches(path)
        results = [_verify(cache) for cache in caches]
        problems = sum(len(result["problems"]) for result in results) + len(unfinished)
        if as_json:
            document = {"sound": not problems, "caches": results, "unfinished": list(map(str, unfinished))}
            typer.echo(json.dumps(document, indent=1))
        else:
            for result in results:
                for problem in result["problems"]:
                    typer.echo(f"problem: {' '.join(problem.split())}")
                if not result["problems"]:
                    typer.echo(f"sound: {result['path']}, {result['files']} files, {result['bytes']:,} bytes")
            for folder in unfinished:
                typer.echo(f"problem: {folder} has no {INDEX_NAME}: its build is unfinished, or the file is lost.")
        if problems:
            raise typer.Exit(1)


def _verify(cache: Path) -> dict[str, Any]:
    from ..cache.index import (
        INDEX_NAME,
        load_index,
    )
    from ..cache.verify import verify_cache

    result: dict[str, Any] = {"path": str(cache), "files": None, "bytes": None}
    try:
        result["problems"] = verify_cache(cache)
        if not result["problems"]:
            index = load_index(cache)
            result["files"] = len(index.files) + 1
            result["bytes"] = index.total_bytes + (cache / INDEX_NAME).stat().st_size
    except OSError as error:  # a file that cannot be read: go on with the other caches
        result["problems"] = [f"{cache} cannot be read: {error}"]
    return result


def _note_unfinished(unfinished: list[Path]) -> None:
    for folder in unfinished:
        typer.echo(f"note: {folder} is unfinished; the training script that began it will finish it.")


@app.command(epilog="Example: hf-freezecache demo --output-dir freezecache-demo")
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where picture, figures and caches go.")] = Path("freezecache-demo"),
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write the figures here.", show_default="demo.json in the output folder"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, splits, order and views.")] = 0,
    debug: Debug = False,
) -> None:
    """Fine-tune a small ViT three ways on real images, and compare accuracy and time.

    Takes one to two and a half minutes on two cores and needs no network: the images are scikit-learn's handwritten
    digits. The ViT learns the digits 0-5, then 6-9: fully, with a frozen prefix, and from a cache of that prefix.
    """
    with _one_line_errors(debug):
        from .demo import run

        run(output_dir, seed=seed, json_path=json_file, echo=typer.echo)


@app.command(
    epilog="Example: hf-freezecache build facebook/deit-tiny-patch16-224 ./flower_photos --split-point 6 --views 4"
)
def build(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model on the Hub, or its folder.", show_default=False)],
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="Folder of images (one folder per class) or of parquet files, a parquet file, what save_to_disk wrote, or a "
            "data set on the Hub.",
            show_default=False,
        ),
    ],
    split_point: Annotated[int, typer.Option(min=1, help="Number of blocks to run.", show_default=False)],
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    views: Annotated[int, typer.Option(min=1, help="Renderings of each image; all but the first are augmented.")] = 1,
    codec: Annotated[str, typer.Option(help="'lossless', 'auto', 'transform', or a pipeline in JSON.")] = "lossless",
    cache_dir: Annotated[Path, typer.Option(help="Folder of caches.")] = Path("caches"),
    image_column: Annotated[str, typer.Option(help="Column of the images.")] = "image",
    label_column: Annotated[str, typer.Option(help="Column of the classes.")] = "label",
    min_crop_scale: Annotated[float, typer.Option(min=0.01, max=1, help="Least area of a random crop.")] = 0.35,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the views and the layout.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run under bf16 autocast.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Build the cache of one split point without training, or go on with it; images get the size the model's processor says.

    A cache that is there already is found, and nothing is computed.
    """
    with _one_line_errors(debug):
        from .build import BuildSettings
        from .build import build as build_cache

        cached, _ = build_cache(
            BuildSettings(
                model=model,
                dataset=dataset,
                split_point=split_point,
                split=split,
                num_views=views,
                codec=codec,
                cache_dir=str(cache_dir),
                image_column=image_column,
                label_column=label_column,
                min_crop_scale=min_crop_scale,
                batch_size=batch_size,
                seed=seed,
                bf16=bf16,
                revision=revision,
                show_progress=sys.stderr.isatty(),
            )
        )
        described = _describe(Path(cached.reader.directory), cached.reader.index)
        typer.echo(json.dumps(described, indent=1) if as_json else "\n".join(_lines(described)))


RepoId = Annotated[str, typer.Argument(metavar="REPO_ID", help="Data set on the Hub, user/name.", show_default=False)]


@app.command(epilog=f"Example: hf-freezecache push caches/k06-0123456789abcdef user/flowers-k06\n\n{EXIT_CODES}")
def push(
    path: Annotated[Path, typer.Argument(metavar="CACHE", help="The cache.", show_default=False)],
    repo_id: RepoId,
    public: Annotated[bool, typer.Option("--public", help="Anybody may see it. Default: only you.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it is not there.", show_default="main")] = None,
    dataset_name: Annotated[str | None, typer.Option("--dataset", help="For the card: source of the images.")] = None,
    license_id: Annotated[str | None, typer.Option("--license", help="For the card: licence of the source.")] = None,
    model: Annotated[str | None, typer.Option(help="For the card: model whose blocks were run.")] = None,
    model_revision: Annotated[str | None, typer.Option(help="For the card: its commit.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another cache that is there.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Push a cache to a private data set on the Hub; after an interruption, the rest of it.

    Hidden states can reveal the images they were computed from: think before you add --public. The cache is checked first.
    Needs a token with write access: hf auth login, or HF_TOKEN.
    """
    with _one_line_errors(debug):
        from ..hub.provenance import Provenance
        from ..hub.push import push_cache

        caches, _ = _find_caches(path)
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
    views: Annotated[str | None, typer.Option(help="Only these, e.g. 0,1.", show_default="all")] = None,
    shards: Annotated[str | None, typer.Option(help="Only these of each view.", show_default="all")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Pull a cache from the Hub and check every bit; the folder appears once all of it is sound.

    A part that is pulled is opened with CachedDataset.from_pretrained(DIR, views=[...], shards=[...]).
    """
    chosen = [_numbers(text, option) for text, option in ((views, "--views"), (shards, "--shards"))]
    with _one_line_errors(debug):
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


@app.command(epilog="Example: hf-freezecache report outputs/flowers --baseline outputs/flowers-plain")
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="output_dir of a run.", show_default=False)],
    baseline: Annotated[
        Path | None,
        typer.Option(help="output_dir of a run without freezing, to compare with; plain Trainer's will do."),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Where the folder freezecache_report goes.", show_default="the folder of the run"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and draw nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Draw what a run did, as one HTML page and pictures: stages, loss, accuracy, cost, caches.

    Reads freezecache_run.json, trainer_state.json or the last checkpoint in RUN_DIR, also of a run that was interrupted.
    What a run without freezing would have cost is measured with --baseline, and an estimate without.
    """
    with _one_line_errors(debug):
        from ..report.figures import (
            figures_of,
            read_baseline,
        )
        from ..report.page import write_report
        from ..report.record import read_run
        from ..report.text import (
            accuracy_cost,
            describe_schedule,
            time_cost,
        )

        figures = figures_of(read_run(run_dir), None if baseline is None else read_baseline(baseline))
        if as_json:
            typer.echo(json.dumps(figures, indent=1))
            return
        try:
            page = write_report(figures, output_dir or run_dir)
        except ImportError as error:
            raise UnsupportedSetupError(
                f"The report needs matplotlib, which cannot be imported ({error}). Install it with pip install "
                "'hf-freezecache[demo]', or print the figures with --json."
            ) from error
        for name, words in (
            ("schedule", describe_schedule(figures)),
            ("accuracy", accuracy_cost(figures)),
            ("time", time_cost(figures)),
            ("page", str(page)),
        ):
            typer.echo(f"{name + ':':<10}{words}")
