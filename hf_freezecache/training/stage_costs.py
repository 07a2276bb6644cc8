"""Predicts how long a stage takes with a cache and without, from what a few images take here and now.

With ``N`` rows, ``V`` views, ``E`` epochs and no worker processes, a stage takes

    N (render all views + V prefix + V encode) + E N (decode + suffix)      with a cache,
    E N (render + prefix + suffix)                                          without one.

Worker processes render, or decode, while the model computes; where it computes on the same cores, only what they wait is overlapped.
Evaluating, saving and entering the stage cost the same both ways.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..codecs import make_codec
from ..compression.base_view import requested_codec
from ..data.seeding import preserved_random_state
from ..model.split import Splits
from ..model.threads import available_cores
from ..passes import passes_of_step
from ..schedules import Stage
from .planner import epochs_of, states_at
from .stage_cache import StageCache

__all__ = [
    "Rates",
    "Rendering",
    "build_seconds",
    "epoch_seconds",
    "measure_rates",
    "measure_rendering",
    "predict_costs",
    "stage_seconds",
]

#: The most images that are rendered.
_ROWS = 8
#: Measuring may take so much of what a stage without a cache takes, or one image: of rendering, and of running images through the
#: blocks, where a step of training takes up to three passes for one of these.
_SHARE, _SHARE_OF_BLOCKS = 0.01, 0.015
#: The most blocks that are timed together: the rest take as long.
_BLOCKS = 4
#: No further image is rendered after this. What is measured must cost far less than what it decides about.
_RENDER_SECONDS = 0.2
#: Where images and frozen blocks take less than this in a whole stage, there is next to nothing to save.
LEAST_SECONDS = 0.5
#: What a build takes beside its rows: locks, tables, the commit, and opening what was built.
#: Source: builds of 16 rows of a model of four narrow blocks take 0.07 s of one core.
_BUILD_SECONDS = 0.1
_PREDICTED = ("cached_seconds", "live_seconds", "cached_views", "live_views", "frozen_seconds")
#: Encoding with a fitted codec takes so many times what encoding without loss does. Source: building is 1.2 and 1.5 times rendering
#: and prefix (recipes/benchmarks/epoch_cost.py).
_LOSSY_ENCODING = 2.5
#: Passes of the calibration images through the prefix, and through the suffix, of which each setting that is tried takes half: with one view,
#: and with several. Source: counted with DeiT-Tiny at split points 3, 6, 9 and 11; 1.5 to 3 and 5.5 to 7 through the suffix.
_CALIBRATION_PASSES = {False: (1, 2), True: (2, 6)}


@dataclass(frozen=True)
class Rates:
    """What one image takes, in seconds.

    Attributes:
        render: Reading and rendering one view.
        render_all: Reading a row and rendering all views that are stored.
        block: A forward pass through one block.
        encode: Encoding one view.
        decode: Decoding one view.
        stored_bytes: Bytes of one view, stored without loss; not seconds.
        write: Writing one view to disk.
        read: Reading one view from disk, which worker processes do not share out; 0 where files stay in memory.
        embed: A forward pass through what stands before the blocks.
        cores: Cores of a CPU that the model computes on, and worker processes as well; 0 beside an accelerator. No seconds.
        waiting: Share of rendering that takes no core, as where images are fetched; no seconds.
    """

    render: float
    render_all: float
    block: float
    encode: float
    decode: float
    stored_bytes: float = 0.0
    write: float = 0.0
    read: float = 0.0
    embed: float = 0.0
    cores: int = 0
    waiting: float = 0.0

    def prefix(self, split_point: int, start: int = 0) -> float:
        """Return the seconds from the images, or from the block ``start``, to a split point."""
        return self.block * (split_point - start) + (self.embed if start == 0 else 0.0)

    def together(self, ahead: float, computing: float, workers: int, waiting: float = 0.0) -> float:
        """Return what a step takes whose data worker processes prepare while the one before computes.

        Args:
            ahead: Seconds in which one process prepares the data.
            computing: Seconds of computing, on all cores.
            workers: Processes that prepare data.
            waiting: Share of ``ahead`` that takes no core.
        """
        if workers == 0:
            return ahead + computing
        busy = ahead * (1 - waiting) / self.cores if self.cores else 0.0
        return max(ahead / workers, computing + busy)


@dataclass(frozen=True)
class Rendering:
    """A few rows, rendered, and what one takes.

    Attributes:
        render: As in ``Rates``.
        render_all: As in ``Rates``.
        waiting: As in ``Rates``.
        examples: A view of each row, as the transform gives it.
    """

    render: float
    render_all: float
    waiting: float
    examples: list[Any]


def measure_rendering(cache: StageCache, images: float = math.inf) -> Rendering:
    """Render a few rows, and all of their views.

    Args:
        cache: Of the stage that is to come.
        images: As in ``measure_rates``.

    Raises:
        FreezeCacheError: A row cannot be rendered.
    """
    data, num_views = cache.chooser.data, cache.config.num_views
    rows = data.layout.order[: _at_most(_SHARE * images / (1 + num_views / 2), 1, _ROWS)].tolist()
    with preserved_random_state():
        views, busy = data.views.reading_once(), time.process_time()
        render, examples = _per_row(lambda row: views[row, 1 if num_views > 1 else 0], rows)
        busy = (time.process_time() - busy) / len(examples)
        render_all = render
        if num_views > 1:
            render_all, _ = _per_row(lambda row: views.render_views(row, range(num_views)), rows)
    waiting = min(max(1 - busy / render, 0.0), 1.0) if render > 0 else 0.0
    return Rendering(render, render_all, waiting, examples)


def measure_rates(
    cache: StageCache,
    splits: Splits,
    split_point: int,
    batch_size: int,
    images: float = math.inf,
    rendering: Rendering | None = None,
) -> Rates:
    """Render a few rows, encode, write and decode what they are at a split, and run a batch of them through a few blocks.

    The batch is one of training, if so many images are worth it: of fewer, each takes longer, up to three times (DeiT-Tiny, one image at
    112 pixels, 2 cores).

    Args:
        cache: Of the stage that is to come.
        splits: Splits of the model.
        split_point: Where the cache would be made.
        batch_size: Images of a batch.
        images: Images that the stage trains on without a cache, those of all epochs: few of them allow little measuring.
        rendering: Rows that are rendered; otherwise a few are.

    Raises:
        FreezeCacheError: A row cannot be rendered, or the frozen blocks fail.
    """
    chooser, config = cache.chooser, cache.config
    data, examples = chooser.data, (rendering := rendering or measure_rendering(cache, images)).examples
    device = next(splits.model.parameters()).device.type
    with preserved_random_state():
        count = len(examples)
        # Half for the blocks, half for what stands before them, and for the states that are encoded.
        passes = _SHARE_OF_BLOCKS * images * splits.num_blocks / 2
        repeated = _at_most(passes, count, max(batch_size, count))
        depth = _at_most(passes / repeated, 1, min(_BLOCKS, splits.num_blocks))

        def run(split_point: int, examples: list[Any]) -> Tensor:
            batch = data.collate(examples)
            inputs = {name: batch[name] for name in ("pixel_values", *sorted(data.prefix_inputs))}
            return chooser.run(splits.at(split_point).prefix, **inputs).cpu()  # type: ignore[no-any-return]

        stored = run(split_point, examples)
        # Images that are there cost nothing more.
        batch = (examples * math.ceil(repeated / count))[:repeated]
        # The first call allocates, and may compile.
        embed, _ = min((_timed(lambda: run(0, batch)) for _ in range(2)), key=lambda timed: timed[0])
        deep = [_timed(lambda: run(depth, batch))[0] for _ in range(1 if device == "cpu" else 2)][-1]
        lossless = make_codec("lossless")
        encode, frames = _timed(lambda: lossless.encode(stored))
        copies = _ROWS // count
        write, _ = _timed(lambda: _write(frames * copies, Path(config.freezecache_dir)))
        decode, _ = _timed(lambda: lossless.decode(frames, stored.shape, stored.dtype))
    if not requested_codec(config, split_point)[0].lossless:
        encode, write = encode * _LOSSY_ENCODING, write * _LOSSY_ENCODING
    return Rates(
        render=rendering.render,
        render_all=rendering.render_all,
        # Other work on the machine must not leave nothing for the blocks.
        block=max(deep - embed, deep / 4) / depth / repeated,
        encode=encode / count,
        decode=decode / count,
        stored_bytes=sum(map(len, frames)) / count,
        write=write / count / copies,
        embed=embed / repeated,
        cores=available_cores() if device == "cpu" else 0,
        waiting=rendering.waiting,
    )


def _at_most(wanted: float, least: int, most: int) -> int:
    return int(min(max(wanted, least), most))


def _per_row(render: Callable[[int], Any], rows: Sequence[int]) -> tuple[float, list[Any]]:
    """Render rows, at least two if so many are given, for a short while; return the median of the seconds that one took, and what was rendered."""
    seconds: list[float] = []
    rendered = []
    for row in rows:
        if len(seconds) >= 2 and sum(seconds) > _RENDER_SECONDS:
            break
        took, item = _timed(lambda row=row: render(row))  # type: ignore[misc]
        seconds.append(took)
        rendered.append(item)
    return statistics.median(seconds), rendered


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def _write(frames: list[bytes], folder: Path) -> None:
    """Write frames to the disk of the caches, as a build does, and remove them."""
    with suppress(OSError):  # building tells
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.writelines(frames)
            file.flush()
            os.fsync(file.fileno())


def build_seconds(
    rates: Rates, split_point: int, built_from: int, num_views: int, num_caches: int, workers: int
) -> float:
    """Return the seconds per row of building the cache of a split point, and those of lower ones on the way.

    Args:
        rates: What one image takes.
        split_point: The deepest split point.
        built_from: Split point from whose cache states are computed; 0 for the images.
        num_views: Views that are stored.
        num_caches: How many caches are written.
        workers: Processes that render.
    """
    prefix = rates.prefix(split_point, built_from)
    reading = rates.render_all if built_from == 0 else (rates.decode + rates.read) * num_views
    writing = num_views * (rates.encode + rates.write) * num_caches
    waiting = rates.waiting if built_from == 0 else 0.0
    return rates.together(reading, num_views * prefix, workers, waiting) + writing


def epoch_seconds(
    rates: Rates, split_point: int, num_blocks: int, token_keep: float, workers: int, trained_share: float = 1.0
) -> tuple[float, float]:
    """Return the seconds per row of an epoch, from a cache and without one.

    Args:
        rates: What one image takes.
        split_point: Number of frozen blocks.
        num_blocks: Blocks of the model.
        token_keep: Share of the patch tokens that steps see behind the split.
        workers: Processes, or threads, that prepare data.
        trained_share: Share of their own weights that the other blocks train.
    """
    suffix = rates.block * passes_of_step(num_blocks, split_point, token_keep, trained_share)
    live = rates.together(rates.render, rates.prefix(split_point) + suffix, workers, rates.waiting)
    # Threads share one disk.
    cached = rates.together(rates.decode, suffix, workers)
    return max(cached, rates.read) if workers else cached + rates.read, live


def stage_seconds(
    rates: Rates,
    stages: Sequence[tuple[float, int]],
    num_blocks: int,
    built_from: int,
    num_views: int,
    token_keep: float,
    workers: tuple[int, int],
    trained_share: float = 1.0,
) -> tuple[float, float]:
    """Return the seconds per row of some stages that one build serves, with caches and without.

    Args:
        rates: What one image takes.
        stages: (epochs, split point) of each. The first has the deepest split point.
        num_blocks: Blocks of the model.
        built_from: Split point from whose cache states are computed; 0 for the images.
        num_views: Views that are stored.
        token_keep: Share of the patch tokens that steps see behind the split.
        workers: Processes that prepare data: while building, and while training.
        trained_share: Share of their own weights that the other blocks train.

    Returns:
        Seconds with caches, building included, and without.
    """
    cached = build_seconds(rates, stages[0][1], built_from, num_views, len(stages), workers[0])
    live = 0.0
    for epochs, split_point in stages:
        in_epoch = epoch_seconds(rates, split_point, num_blocks, token_keep, workers[1], trained_share)
        cached += epochs * in_epoch[0]
        live += epochs * in_epoch[1]
    return cached, live


def predict_costs(run: Any, stage: Stage, token_keep: float) -> dict[str, float]:
    """Predict what a stage takes, and those whose caches its build gives as well. Collective.

    Args:
        run: The ``StageRunner``, at the beginning of the stage.
        stage: The stage; it freezes at least one block.
        token_keep: Share of the patch tokens that its steps see behind the split.

    Returns:
        ``cached_seconds``, building included, and ``live_seconds``, of training alone, as the main process measured. Where a cache
        cannot pay, ``cached_views`` and ``live_views``: as many views of each image would be rendered for it as without it, in no less
        time. Where there is little that it could save, ``frozen_seconds``, of images and frozen blocks without one. Empty where the cache is
        there, or an earlier part of the run has decided for one.

    Raises:
        FreezeCacheError: See ``measure_rates``.
    """
    earlier = next((one for one in run.record.decisions if one.stage == stage.index), None)
    if earlier is not None:  # the run was resumed in this stage, and goes on as it was
        return {name: earlier.predicted[name] for name in _PREDICTED if name in earlier.predicted}
    cache, split = run.cache, run.splits.at(stage.split_point)

    def predict() -> dict[str, float]:
        if cache.locate(split, cache.identify(split)) is not None:
            return {}
        points = [stage.split_point, *run.built_ahead(stage)]
        served = [
            (epochs_of(one, run.stages, run.num_epochs), one.split_point)
            for one in run.stages[stage.index :]
            if one.split_point in points
        ]
        current, source = cache.current, states_at(stage, run.stages, run.config)
        there = current is not None and current.index.split_point == source
        share, ahead = cache.chooser.rows_shares(stage.split_point)[1], [point for _, point in served[1:]]
        views = {
            "cached_views": run.config.num_views * (1 if ahead else share),
            "live_views": sum(epochs for epochs, _ in served),
        }
        rows = cache.chooser.data.layout.total_samples / run.runtime.everyone.size
        images, rendering = rows * views["live_views"], None
        if not there and views["cached_views"] >= views["live_views"]:
            # As many images run through the blocks. Only reading each row once, for all of its views, could save.
            if views["live_views"] <= 1:
                return views
            rendering = measure_rendering(cache, images)
            if share * rendering.render_all >= views["live_views"] * rendering.render:
                return views
        rates = measure_rates(cache, run.splits, stage.split_point, run.runtime.batch_size, images, rendering)
        frozen = rows * sum(epochs * (rates.render + rates.prefix(point)) for epochs, point in served)
        if frozen < LEAST_SECONDS:
            return {"frozen_seconds": round(frozen, 3)}
        workers = (cache.num_workers, run.runtime.args.dataloader_num_workers)
        cached, live = stage_seconds(
            rates,
            served,
            run.splits.num_blocks,
            source if there else 0,
            run.config.num_views,
            token_keep,
            workers,
            run.freezer.trained_share,
        )
        # What the head does not see need not come as far.
        spared = build_seconds(
            rates, stage.split_point, max(ahead, default=source if there else 0), run.config.num_views, 1, workers[0]
        )
        cached -= (1 - share) * spared
        calibration = 0.0
        if not requested_codec(run.config, stage.split_point)[0].lossless:
            suffix = rates.block * (run.splits.num_blocks - stage.split_point)
            forwards, measured = _CALIBRATION_PASSES[run.config.num_views > 1]
            forward = forwards * (rates.render + rates.prefix(stage.split_point)) + measured * suffix
            calibration = forward * min(run.config.calibration_samples, rows)
        cached = rows * cached + calibration + _BUILD_SECONDS * len(served)
        return {"cached_seconds": round(cached, 3), "live_seconds": round(rows * live, 3)}

    return run.runtime.everyone.on_main_process(predict)  # type: ignore[no-any-return]
