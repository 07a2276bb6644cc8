"""Evaluates from caches of what the frozen blocks give of the evaluation sets: images are rendered once, not in each evaluation.

A cache of an evaluation set is an ordinary one: lossless, of one view, in the same folder. ``Trainer`` then gets the same samples in
the same batches, so that its metrics are those of evaluating from images, on a CPU to the bit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, IterableDataset, SequentialSampler, Subset

from ..codecs.array_names import is_packed
from ..compression.base_view import CodecChooser
from ..config import CacheConfig
from ..data.chunk_samples import ChunkSamples
from ..data.layout import ChunkLayout
from ..data.read_ahead import StoredOrder
from ..data.seeding import preserved_random_state, random_states
from ..data.training_data import TrainingData
from ..data.views import views_differ
from ..dataset import CachedDataset
from ..errors import (
    CacheCorruptError,
    CacheLockedError,
    CacheMismatchError,
    CacheWriteError,
    FreezeCacheError,
    UnsupportedSetupError,
)
from ..model.split import Splits
from .cached_step import CachedStep
from .data_checks import name_of_checks, prepare_data
from .evaluation_comparison import EvaluationStep, compare_evaluations
from .remembered import Remembered
from .runtime import Runtime
from .stage_batches import collator_of_cached, reading_threads
from .stage_cache import StageCache

__all__ = ["EvaluationCache"]

logger = logging.getLogger(__name__)

#: Decoded chunks in memory, beside one for each thread that reads ahead: the one whose rows are evaluated, and the next.
_CHUNKS = 2
#: Evaluation sets that are remembered.
_SETS = 8
#: Evaluation sets whose transform was seen to draw nothing.
_STILL: Remembered[bool] = Remembered(64)
_OF_CACHES = (CacheWriteError, CacheLockedError, CacheMismatchError, CacheCorruptError)


class _InOrder(Dataset):  # type: ignore[type-arg]
    """A cache as an evaluation reads it: item ``i`` is the ``i``-th stored sample."""

    def __init__(self, cached: CachedDataset, order: npt.NDArray[np.int64]) -> None:
        self.cached, self.order = cached, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return self.cached[int(self.order[place])]

    def __getitems__(self, places: list[int]) -> ChunkSamples:
        return self.cached.__getitems__(self.order[places].tolist())


@dataclass
class _EvaluationSet:
    """An evaluation set that can be cached.

    Attributes:
        name: Tells it from others.
        splits: The splits of the model that is evaluated.
        hashes: Hashes of the code that renders it.
        data: Its rows, in an order in which the layout of the cache stores them one after the other.
        cache: Finds and builds its caches.
        tried: Split points at which evaluating from the cache was compared with evaluating from images.
    """

    name: str
    splits: Splits
    hashes: dict[str, str]
    data: TrainingData
    cache: StageCache
    tried: set[int] = field(default_factory=set)


@dataclass
class EvaluationCache:
    """Replaces the loaders of evaluations by those of caches, where that gives the same.

    Attributes:
        config: The user's settings of caches.
        step: What evaluates batches of the loader that was given out last; ``None`` before the first.
    """

    config: CacheConfig
    step: EvaluationStep | None = None
    _images: Any = None
    _sets: list[_EvaluationSet] = field(default_factory=list)
    _refused: set[str] = field(default_factory=set)
    _not_written: set[tuple[str, int]] = field(default_factory=set)

    def loader(self, trainer: Any, images: Any, runtime: Runtime, splits: Splits, split_point: int) -> Any:
        """Return a loader of hidden states in place of one of images; the same loader where none can take its place. Collective.

        A cache is built while training only. It is looked for in each evaluation: weights, transform or rows may have changed. One
        that could not be written is not tried again, with so many frozen blocks.

        Args:
            trainer: The user's trainer.
            images: The loader that ``Trainer`` made.
            runtime: The same trainer, as its stages see it.
            splits: The splits of its model.
            split_point: Number of frozen blocks.
        """
        if not self.config.cache_eval:
            return images
        everyone, known, self._images = runtime.everyone, None, None
        try:
            with everyone.fail_together():
                _check_trainer(trainer)
                _check_loader(images, runtime)
                known = self._known(trainer, images, runtime, splits)
            if (known.name, split_point) in self._not_written:
                return images
            split = splits.at(split_point)
            # Several groups of processes have folders of their own. All read a cache, or none does.
            with everyone.fail_together() if runtime.cache_group.num_groups > 1 else nullcontext():
                opened = known.cache.open(split) if trainer.is_in_train else known.cache.open_finished(split)[1]
            if not all(everyone.gather(opened is not None)) or opened is None:
                return images
            reader = opened.reader
            step = CachedStep(
                split, reader.views, reader.dtype, None, None, runtime.to_device, reader.index.hidden_shape[0]
            )
            threads = reading_threads(runtime)
            dataset = CachedDataset(reader, _CHUNKS + threads, packed=True, keep_read=True)
            cached = _InOrder(dataset, reader.layout.order)
            if split_point not in known.tried:
                with everyone.fail_together():
                    inputs = known.data.prefix_inputs
                    compare_evaluations(trainer, images, cached, step, inputs, runtime, self._use)
                known.tried.add(split_point)
            self.step, self._images = step, images
            # Not before: rows that were compared are read once more.
            layout, batch_size = reader.layout, runtime.args.eval_batch_size
            order = StoredOrder(layout.num_samples, layout.chunk_size, batch_size, everyone.size)
            dataset.read_ahead(order, everyone.rank, threads)
            return self._reading(cached, images, runtime)
        except FreezeCacheError as error:
            if isinstance(error, CacheWriteError) and known is not None:
                self._not_written.add((known.name, split_point))
            # Messages about caches differ each time: they name a few rows, or the room on the disk.
            what = type(error).__name__ if isinstance(error, _OF_CACHES) else str(error)
            if what not in self._refused:
                self._refused.add(what)
                logger.warning("cache_eval: evaluating from images. %s", error)
            return images

    def predict(
        self, trainer: Any, prediction_step: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Run ``prediction_step(model, inputs, ...)`` on a batch of images, or on one of hidden states through the suffix.

        Args:
            trainer: The user's trainer. Its callbacks are shown the loader of images, as without a cache.
            prediction_step: ``Trainer.prediction_step``.
            model: The model, wrapped or not.
            inputs: The batch.
            args: As for ``prediction_step``.
            kwargs: As for ``prediction_step``.

        Raises:
            UnsupportedSetupError: See ``CachedStep.predict``.
        """
        if self.step is None or not isinstance(inputs, Mapping) or not any(map(is_packed, inputs)):
            return prediction_step(model, inputs, *args, **kwargs)
        if self._images is not None:  # not while the first rows are compared
            trainer.callback_handler.eval_dataloader = self._images
        return self.step.predict(prediction_step, model, inputs, *args, **kwargs)

    def _use(self, step: EvaluationStep) -> None:
        self.step = step

    def _reading(self, cached: _InOrder, images: Any, runtime: Runtime) -> Any:
        """Return a loader of a cache. It leaves the global random states as one of images does."""
        draws = _would_draw(images)
        # Workers would each decode all chunks.
        reading = replace(runtime.without_workers(), batch_size=runtime.args.eval_batch_size)
        loader = reading.make_loader(cached, SequentialSampler(cached), collator_of_cached(runtime), draws)
        loaders = runtime.accelerator._dataloaders
        loaders[:] = [other for other in loaders if other is not loader]  # it keeps them all
        return loader

    def _known(self, trainer: Any, images: Any, runtime: Runtime, splits: Splits) -> _EvaluationSet:
        """Return what was prepared of an evaluation set, or prepare it now.

        Raises:
            FreezeCacheError: It cannot be cached.
        """
        dataset = images.dataset
        if isinstance(dataset, IterableDataset):
            raise UnsupportedSetupError("The evaluation set is an IterableDataset, whose rows have no number.")
        # `set_transform` gives the same object another code, and columns are removed into another object each time.
        name = getattr(dataset, "_fingerprint", None) or f"object {id(dataset)}"
        for known in self._sets:
            code = replace(known.data.code, dataset=dataset, collator=trainer.data_collator)
            if (known.name, known.splits, known.hashes) == (name, splits, code.hashes(known.cache.config)):
                return known
        known = self._prepared(trainer, images, runtime, splits, name)
        self._sets = [*self._sets[-_SETS:], known]
        return known

    def _prepared(self, trainer: Any, images: Any, runtime: Runtime, splits: Splits, name: str) -> _EvaluationSet:
        """Look at an evaluation set.

        Raises:
            FreezeCacheError: It cannot be cached.
        """
        mine, dataset, batch_size = self.config, images.dataset, trainer.args.eval_batch_size
        config = CacheConfig(
            freezecache_dir=mine.freezecache_dir,
            # Whole batches: the frozen blocks then get the same batches as in an evaluation, and kernels give the same bits.
            chunk_size=-(-mine.chunk_size // batch_size) * batch_size,
            shard_chunks=mine.shard_chunks,
            build_num_workers=mine.build_num_workers,
            lock_timeout=mine.lock_timeout,
            view_seed=mine.view_seed,
        )
        runtime = replace(
            runtime,
            collate=images.collate_fn,
            raw_collator=trainer.data_collator,
            batch_size=batch_size,
        )
        layout = ChunkLayout(len(dataset), config.chunk_size, config.view_seed)
        rows = layout.position
        ordered = dataset.select(rows) if hasattr(dataset, "select") else Subset(dataset, rows.tolist())
        data = prepare_data(runtime, config, ordered, (None, None), layout, config.view_seed)
        walks = data.code.walks() if config.transform_id is None else {}
        name_of_draws = name_of_checks(dataset, walks, "draws", config.view_seed)
        still = bool(_STILL.get(name_of_draws))
        if not still and views_differ(data.views):
            raise UnsupportedSetupError(
                "The evaluation set's transform draws at random: each evaluation sees other images, and a cache would not. Give "
                "the evaluation set a transform without random parts."
            )
        if not still and runtime.args.dataloader_num_workers == 0 and _draws(images):
            raise UnsupportedSetupError(
                "The evaluation set's transform draws random numbers, if to no effect: training would go on with others if it were "
                "left out. Give the evaluation set a transform without random parts."
            )
        _STILL.keep(name_of_draws if runtime.args.dataloader_num_workers == 0 else None, True)
        if data.image_shape != splits.image_shape:
            raise UnsupportedSetupError(
                f"Images of the evaluation set have shape {data.image_shape}, those of the training set {splits.image_shape}."
            )
        # Rows and code by which the cache is named are those of the data set as the user passed it.
        # The same rows may be trained on, from a cache in which they lie in another order.
        spec = json.dumps([json.loads(data.batch_spec), f"in the order of the rows, {batch_size} at a time"])
        data = replace(data, dataset=dataset, code=replace(data.code, dataset=dataset), batch_spec=spec)
        workers = config.build_num_workers
        cache = StageCache(
            config,
            CodecChooser(config, data, splits, runtime.run_frozen, runtime.batch_size),
            str(runtime.accelerator.mixed_precision),
            runtime.args.dataloader_num_workers if workers is None else workers,
            not runtime.args.disable_tqdm,
            tuple(range(splits.num_blocks + 1)),
            runtime.cache_group,
        )
        try:
            cache.check_settings()
        except UnsupportedSetupError as error:
            raise UnsupportedSetupError(
                f"The rows of {type(dataset).__name__}, or the code that renders them, cannot be hashed: a cache could go stale "
                "unseen. Pass a datasets.Dataset with a transform whose state can be hashed as eval_dataset."
            ) from error
        return _EvaluationSet(name, splits, data.code.hashes(config), data, cache)


def _check_trainer(trainer: Any) -> None:
    """Refuse trainers that see the images of an evaluation.

    Raises:
        UnsupportedSetupError: They do.
    """
    args, kind = trainer.args, type(trainer)
    for name in ("evaluation_loop", "prediction_step", "get_eval_dataloader", "compute_loss"):
        if not getattr(kind, name).__module__.startswith(("hf_freezecache.", "transformers.")) or name in vars(trainer):
            raise UnsupportedSetupError(f"{kind.__name__} overrides {name}, which may read the images.")
    if "inputs" in (getattr(args, "include_for_metrics", None) or []):
        raise UnsupportedSetupError("include_for_metrics asks for the inputs, which are images.")
    if args.fp16_full_eval or args.bf16_full_eval:
        raise UnsupportedSetupError(
            "fp16_full_eval and bf16_full_eval cast the model for an evaluation after training."
        )


def _check_loader(images: Any, runtime: Runtime) -> None:
    """Refuse loaders that do not give all rows in order, in the batches of ``TrainingArguments``.

    Args:
        images: The loader of an evaluation.
        runtime: The trainer.

    Raises:
        UnsupportedSetupError: They do not.
    """
    batches: Any = getattr(images, "batch_sampler", None)
    batches = getattr(batches, "batch_sampler", batches)  # of one process among several
    sampler: Any = getattr(batches, "sampler", None)
    expected = (runtime.args.eval_batch_size, runtime.args.dataloader_drop_last)
    ours = hasattr(images, "gradient_state")  # accelerate's
    plain = type(batches) is BatchSampler and type(sampler) is SequentialSampler
    if isinstance(images.dataset, IterableDataset) or (
        ours and plain and (batches.batch_size, batches.drop_last) == expected and len(sampler) == len(images.dataset)
    ):
        return
    raise UnsupportedSetupError(
        f"The evaluation's loader has batches or an order of its own ({type(sampler or images).__name__}); a cache is read in the "
        "order of the rows."
    )


def _would_draw(images: Any) -> bool:
    """Return whether iterating over a loader draws a number from the global generator: with workers that stay, only once.

    They may be started later, if a later stage evaluates from images: the loader then draws from a generator of its own.
    """
    inner = getattr(images, "base_dataloader", images)
    if not inner.persistent_workers:
        return True
    if inner.generator is not None or inner._iterator is not None:
        return False
    inner.generator = torch.Generator()
    return True


def _draws(images: Any) -> bool:
    """Return whether rendering the first row takes numbers from the global random generators."""
    with preserved_random_state():
        before = random_states()
        images.collate_fn([images.dataset[0]])
        return random_states() != before
