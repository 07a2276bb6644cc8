"""Commands that build caches, look into them and check them.

Each command imports what takes long to import, so that help and completion answer at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import FreezeCacheError
from .base import EXIT_CODES, AsJson, CachePath, Debug, app, one_line_errors, print_error
from .describe import describe_cache, description_lines, find_caches

__all__ = ["build", "inspect", "plan", "verify"]


#: Options of commands that load a model and images.
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model on the Hub, or its folder.", show_default=False)]
Images = Annotated[
    str,
    typer.Argument(
        metavar="DATASET",
        help="Folder of images (one folder per class) or of parquet files, a parquet file, what save_to_disk wrote, or a "
        "data set on the Hub.",
        show_default=False,
    ),
]
Split = Annotated[str, typer.Option(help="Split of the data set.")]
Views = Annotated[int, typer.Option(min=1, help="Renderings of each image; all but the first are augmented.")]
ImageColumn = Annotated[str, typer.Option(help="Column of the images.")]
LabelColumn = Annotated[str, typer.Option(help="Column of the classes.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward of the prefix.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Run under bf16 autocast.")]
HeadRows = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="As of FreezeConfig: share of the rows that a head trains on alone. Default: all.",
        show_default=False,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")]


@app.command(
    epilog="Example: hf-freezecache build facebook/deit-tiny-patch16-224 ./flower_photos --split-point 6 --views 4"
)
def build(
    model: Model,
    dataset: Images,
    split_point: Annotated[int, typer.Option(min=1, help="Number of blocks to run.", show_default=False)],
    split: Split = "train",
    views: Views = 1,
    codec: Annotated[str, typer.Option(help="As of CacheConfig: 'lossless', 'auto', ...")] = "lossless",
    cache_dir: Annotated[Path, typer.Option(help="Folder of caches.")] = Path("caches"),
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
    min_crop_scale: Annotated[
        float, typer.Option(min=0.01, max=1, help="Least share of the area in a random crop.")
    ] = 0.35,
    batch_size: BatchSize = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the views and the chunk layout.")] = 0,
    bf16: Bf16 = False,
    revision: Revision = None,
    head_rows: HeadRows = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Build the cache of one split point without training, or go on with one that is unfinished.

    The model's image processor decides the size of the images. If the cache exists, nothing is computed.
    """
    with one_line_errors(debug):
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
                head_rows=head_rows,
                show_progress=sys.stderr.isatty(),
            )
        )
        # Named as the user names it.
        directory = cache_dir.expanduser() / Path(cached.reader.directory).name
        described = describe_cache(directory, cached.reader.index)
        typer.echo(json.dumps(described, indent=1) if as_json else "\n".join(description_lines(described)))


@app.command(epilog="Example: hf-freezecache plan facebook/deit-tiny-patch16-224 ./flower_photos --epochs 12 --views 2")
def plan(
    model: Model,
    dataset: Images,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs that would be trained.", show_default=False)],
    split_points: Annotated[
        str | None,
        typer.Option(
            help="Numbers of frozen blocks, e.g. '3,6,9'; default: some, and schedule auto.", show_default=False
        ),
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            help="A schedule, e.g. '0:6,6:11' or auto; give it several times for several.", show_default=False
        ),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Images, in place of those that the data set has.")] = None,
    rates: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Rates of another machine, as JSON, in place of those measured here.",
            show_default=False,
        ),
    ] = None,
    split: Split = "train",
    views: Annotated[
        str | None,
        typer.Option(
            metavar="INTEGER|auto",
            help="Renderings of each image; all but the first are augmented. 'auto': as CacheConfig chooses for each schedule. "
            "Default: 1, and as many as schedule auto chooses.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=0, max=1, help="As of FreezeConfig, for schedule auto.", show_default=False)
    ] = None,
    token_keep: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1, help="As of FreezeConfig. Default: 1, or what schedule auto chooses.", show_default=False
        ),
    ] = None,
    block_weights: Annotated[
        Literal["all", "qkv"] | None,
        typer.Option(
            metavar="all|qkv",
            help="As of FreezeConfig. Default: all, or what schedule auto chooses.",
            show_default=False,
        ),
    ] = None,
    head_rows: HeadRows = None,
    learning_rate: Annotated[
        float, typer.Option(min=0, help="As of TrainingArguments; what schedule auto chooses depends on it.")
    ] = 5e-5,
    consume_previous_cache: Annotated[
        bool, typer.Option("--consume-previous-cache", help="As of CacheConfig.")
    ] = False,
    cache_dir: Annotated[Path, typer.Option(help="Folder of caches: a few are written there, and removed.")] = Path(
        "caches"
    ),
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
    batch_size: Annotated[
        int,
        typer.Option(
            min=1, help="Images of an optimizer step on one device; what schedule auto chooses depends on it."
        ),
    ] = 32,
    bf16: Bf16 = False,
    revision: Revision = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what caches of several split points, or of whole schedules, would take: bytes, and the time of building and training.

    A few images are rendered, run through the frozen blocks, encoded and decoded. Nothing is trained. "no cache" freezes as many
    blocks and runs them in every step; "unfrozen" trains all blocks for the epochs given. What schedule auto would choose, epochs
    included, is said below the table. Caches are taken to be lossless. For another machine give
    what you know of it with --rates: name, rendered_images_per_second (of one process), block_passes_per_second or
    full_training_images_per_second (of one device), encode_, decode_, write_ and read_mb_per_second, devices, processes (that render,
    of each device). What the file leaves out is measured here.
    """
    try:
        points = [int(point) for point in (split_points or "").split(",") if point]
    except ValueError:
        raise typer.BadParameter(f"--split-points {split_points}: expected numbers such as '3,6,9'.") from None
    stored: int | Literal["auto"] | None = "auto" if views == "auto" else None
    if views not in (None, "auto"):
        if not (views.isdecimal() and int(views) > 0):
            raise typer.BadParameter(f"--views {views}: expected a whole number of at least 1, or auto.")
        stored = int(views)
    with one_line_errors(debug):
        from .given_rates import GivenRates, read_rates
        from .planned_runs import PlanSettings, check_schedules

        asked = PlanSettings(
            epochs=epochs,
            schedules=[*(f"0:{point}" for point in points), *(schedule or [])],
            rows=rows,
            num_views=stored,
            consume_previous_cache=consume_previous_cache,
            given=GivenRates() if rates is None else read_rates(rates),
            budget=budget,
            token_keep=token_keep,
            block_weights=block_weights,
            head_rows=head_rows,
            learning_rate=learning_rate,
        )
        check_schedules(asked)

        from .build import BuildSettings
        from .plan import plan as predict
        from .plan_table import table_lines

        settings = BuildSettings(
            model=model,
            dataset=dataset,
            split_point=1,
            split=split,
            cache_dir=str(cache_dir),
            image_column=image_column,
            label_column=label_column,
            batch_size=batch_size,
            bf16=bf16,
            revision=revision,
            show_progress=False,
        )
        found = predict(settings, asked)
        typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(table_lines(found)))


@app.command(epilog="Example: hf-freezecache inspect caches/k06-0123456789abcdef")
def inspect(
    path: CachePath,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a cache holds: split point, views, shapes, codec, sizes, and all that it depends on.

    This command reads index.json only; "verify" checks the other files.
    """
    with one_line_errors(debug):
        from ..cache.index import load_index

        caches, unfinished = find_caches(path)
        described, damaged = [], []
        for cache in caches:
            try:
                described.append(describe_cache(cache, load_index(cache)))
            except FreezeCacheError as error:  # go on with the other caches
                damaged.append(error)
        if as_json and described:
            typer.echo(json.dumps({"caches": described, "unfinished": list(map(str, unfinished))}, indent=1))
        elif not as_json:
            for entry in described:
                typer.echo("\n".join(description_lines(entry)))
            _note_unfinished(unfinished)
        for other in damaged[1:]:
            print_error(other)
        if damaged:
            raise damaged[0]


@app.command(epilog=f"Example: hf-freezecache verify caches\n\n{EXIT_CODES}")
def verify(path: CachePath, as_json: AsJson = False, debug: Debug = False) -> None:
    """Check every bit of every file of a cache, or of all caches in a folder.

    It names each damaged, missing or foreign file. The exit status is 1 if there is one, or if there is no cache.
    """
    with one_line_errors(debug):
        from ..cache.index import INDEX_NAME

        caches, unfinished = find_caches(path)
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
    from ..cache.index import INDEX_NAME, load_index
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
