"""Predicts how long a stage takes with a cache and without, from what a few images take here and now.

With ``N`` rows, ``V`` views, ``E`` epochs and no worker processes, a stage takes

    N (render all views + V prefix + V encode) + D N decode + E N suffix    with a cache,
    E N (render + prefix + suffix)                                          without one.

``D`` is ``E`` where memory holds no decoded chunks, and at most ``V`` where it holds all of them. Worker processes render, and threads
decode and encode, while the model computes; where it computes on the same cores, only what they wait is overlapped. Saving and entering
the stage cost the same both ways, and so does evaluating, but for ``cache_eval``; see ``evaluation_costs``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..compression.base_view import requested_codec
from ..config import CacheConfig
from ..passes import passes_of_step
from ..schedules import Stage
from .image_rates import Rates, measure_rates, measure_rendering
from .planner import epochs_of, states_at

__all__ = ["build_seconds", "decoded_share", "epoch_seconds", "predict_costs", "stage_seconds"]

#: Where as many views are rendered for a cache as without one, rendering them together must take no more than this share to be worth a
#: closer look: the rest of a build, and what a few rows do not tell, are a tenth.
_MUCH_SHARED = 0.8
#: Where images and frozen blocks take less than this in a whole stage, there is next to nothing to save.
LEAST_SECONDS = 0.5
#: What a build takes beside its rows: locks, tables, the commit, and opening what was built.
#: Source: builds of 16 rows of a model of four narrow blocks take 0.07 s of one core.
_BUILD_SECONDS = 0.1
_PREDICTED = ("cached_seconds", "live_seconds", "cached_views", "live_views", "frozen_seconds")
#: Passes of the calibration images through the prefix, and through the suffix, of which each setting that is tried takes half: with one view,
#: and with several. Source: counted with DeiT-Tiny at split points 3, 6, 9 and 11; 1.5 to 3 and 5.5 to 7 through the suffix.
_CALIBRATION_PASSES = {False: (1, 2), True: (2, 6)}


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
    waiting = rates.waiting if built_from == 0 else 0.0
    computed = rates.together(reading, num_views * prefix, workers, waiting)
    return rates.while_encoding(computed, num_views * rates.encode, num_caches) + num_views * rates.write * num_caches


def decoded_share(
    rates: Rates, config: CacheConfig, epochs: float, num_views: int, rows: float, readers: int = 1, part: float = 1.0
) -> float:
    """Return the share of the chunks read in some epochs that have to be decoded, since memory does not hold them yet.

    An epoch reads each chunk in one view, the views in turn, and each process those that it is dealt: one of ``readers`` has read a
    chunk in an earlier turn of its view with a probability of one in ``readers``.

    Args:
        rates: What one image takes.
        config: The user's settings of caches: how much a process holds.
        epochs: Epochs; the last may be a part of one.
        num_views: Views that are stored.
        rows: Rows of the cache, if it held all.
        readers: Processes that read it.
        part: Share of the rows that it holds. An epoch shows them the more often.
    """
    size, turns = rates.decoded_bytes * num_views * rows * part, epochs / part
    not_held = 1 - min(config.memory_gb * 1e9 / size, 1) if size else 1.0
    decoded = 0.0
    for turn in range(math.ceil(turns)):
        not_read = (1 - 1 / readers) ** (turn // num_views)
        decoded += min(turns - turn, 1.0) * max(not_read, not_held)
    return decoded / turns if turns else 1.0


def epoch_seconds(
    rates: Rates,
    split_point: int,
    num_blocks: int,
    token_keep: float,
    workers: int,
    trained_share: float = 1.0,
    decoded: float = 1.0,
) -> tuple[float, float]:
    """Return the seconds per row of an epoch, from a cache and without one.

    Args:
        rates: What one image takes.
        split_point: Number of frozen blocks.
        num_blocks: Blocks of the model.
        token_keep: Share of the patch tokens that steps see behind the split.
        workers: Processes that render, and threads that read caches; of these there is one beside an accelerator in any case.
        trained_share: Share of their own weights that the other blocks train.
        decoded: See ``decoded_share``.
    """
    suffix = rates.block * passes_of_step(num_blocks, split_point, token_keep, trained_share)
    live = rates.together(rates.render, rates.prefix(split_point) + suffix, workers, rates.waiting)
    threads = workers or int(rates.cores == 0)
    # Threads share one disk.
    cached, read = rates.together(decoded * rates.decode, suffix, threads), decoded * rates.read
    return max(cached, read) if threads else cached + read, live


def stage_seconds(
    rates: Rates,
    stages: Sequence[tuple[float, int, float]],
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
        stages: (epochs, split point, ``decoded_share``) of each. The first has the deepest split point.
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
    for epochs, split_point, decoded in stages:
        in_epoch = epoch_seconds(rates, split_point, num_blocks, token_keep, workers[1], trained_share, decoded)
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
        ``cached_seconds``, building included, and ``live_seconds``, of training, as the main process measured; with ``cache_eval`` those
        of evaluating besides, up to the split. Where a cache cannot pay, ``cached_views`` and ``live_views``: as many views of each image would be rendered for it as without it, in no less
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
        images, rendering, evaluated = rows * views["live_views"], None, run.evaluations.images(views["live_views"])
        if not there and not evaluated and views["cached_views"] >= views["live_views"]:
            # As many images run through the blocks. Only reading each row once, for all of its views, could save.
            if views["live_views"] <= 1 or not cache.chooser.data.views.reading_once().reads_once:
                return views
            rendering = measure_rendering(cache, images)
            if share * rendering.render_all > _MUCH_SHARED * views["live_views"] * rendering.render:
                return views
        rates = measure_rates(cache, run.splits, stage.split_point, run.runtime.batch_size, images, rendering)
        frozen = rows * sum(epochs * (rates.render + rates.prefix(point)) for epochs, point in served)
        workers = (cache.num_workers, run.runtime.args.dataloader_num_workers)
        evaluating = run.evaluations.seconds(rates, served, workers[1])
        if frozen + evaluating[1] < LEAST_SECONDS:
            return {"frozen_seconds": round(frozen + evaluating[1], 3)}
        readers = cache.process_group.size

        def decoded(epochs: float, part: float) -> float:
            return decoded_share(rates, run.config, epochs, run.config.num_views, rows * readers, readers, part)

        cached, live = stage_seconds(
            rates,
            [
                (epochs, point, decoded(epochs, share if point == stage.split_point else 1.0))
                for epochs, point in served
            ],
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
        cached = rows * cached + calibration + _BUILD_SECONDS * len(served) + evaluating[0]
        return {"cached_seconds": round(cached, 3), "live_seconds": round(rows * live + evaluating[1], 3)}

    return run.runtime.everyone.on_main_process(predict)  # type: ignore[no-any-return]
