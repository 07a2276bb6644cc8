"""``FreezeCacheTrainer``: the only module that knows ``transformers.Trainer``."""

from __future__ import annotations

import inspect
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from .cache.index import CacheIndex
from .cache.reader import CacheReader
from .cache.writer import BuildReport
from .codecs import ViewCodec
from .compression.base_view import requested_codec
from .config import (
    CacheConfig,
    FreezeConfig,
)
from .data.collators import CheckedCollator, collate_cached, split_packed
from .data.feature_augmentation import (
    FeatureAugmenter,
    parse_feature_augmentation,
    step_generator,
)
from .data.layout import ChunkLayout
from .data.sampler import ChunkSampler
from .data.training_data import Data
from .data.views import (
    ViewDataset,
    check_repeatable,
    with_rgb_images,
)
from .dataset import CachedDataset
from .distributed.ddp import (
    check_parallelism,
    is_replicated,
    unused_parameters,
    unwrapped,
    wrap_again,
)
from .distributed.jit_checkpoint import AgreedCheckpoint
from .distributed.process_group import (
    ProcessGroup,
    find_process_group,
)
from .errors import (
    CacheWriteError,
    UnsupportedSetupError,
)
from .hub.provenance import (
    Origin,
    keep_origin,
    origin_of_dataset,
    origin_of_model,
)
from .model.freeze import (
    Frozen,
    check_checkpointing,
    freeze,
    prune_optimizer,
    restore_groups,
)
from .model.hashing import hash_prefix
from .model.split import (
    Split,
    find_blocks,
    first_tensor,
    split_model,
    token_grid,
)
from .report.callback import (
    ReportCallback,
    describe_run,
    describe_stage,
    write_card,
)
from .report.cost import epoch_logs
from .report.record import RunRecord
from .report.stopwatch import Stopwatch
from .schedules import (
    Stage,
    plan_stages,
    split_point_at,
)
from .training.checkpoints import (
    check_complete,
    last_complete,
    load_stage,
    load_world_size,
    move_scheduler,
    moved_step,
    restore_weights,
    save_stage,
)
from .training.preflight import (
    check_arguments,
    check_batch,
    check_cache_dir,
    check_collator,
    check_labels,
    check_pushed,
    check_same_rows,
    check_writable,
)
from .training.stage_cache import StageCache

__all__ = ["FreezeCacheTrainer"]

logger = logging.getLogger(__name__)


def _check_transformers() -> None:
    wanted = {"model", "epoch", "train_dataloader", "num_update_steps_per_epoch"}
    method = getattr(Trainer, "_run_epoch", None)
    if method is None or not wanted <= set(inspect.signature(method).parameters):
        raise UnsupportedSetupError(
            f"transformers {transformers.__version__} has no Trainer._run_epoch(model, epoch, train_dataloader, ...), in "
            "which stages change. Install transformers>=5.4, or train without freeze_config."
        )


class FreezeCacheTrainer(Trainer):
    """``Trainer`` that freezes leading blocks stage by stage and trains the rest from a cache of their output.

    Every argument of ``Trainer`` keeps its meaning. Without ``freeze_config`` its numbers are those of ``Trainer``, to
    the bit; only restoring weights (resume, ``load_best_model_at_end``) is mended, see ``checkpoints.restore_weights``.

    With ``freeze_config`` the training data are drawn as *views*: view ``v`` of row ``i`` is one draw of the data set's
    own transform under random states seeded by ``(seed, i, v)``. A stage that freezes at least one block first writes
    the hidden states of ``num_views`` views of every row to ``cache_config.cache_dir`` (or finds them there), and then
    trains on them; evaluation and prediction always see images. Saved models are whole, ordinary models.

    Each stage logs, as ``freezecache/<name>``: ``split_point``, ``trainable_parameters``, ``released_optimizer_bytes``; and of
    its cache ``cache_bytes``, ``cache_bytes_per_image``, ``bits_per_element`` (all files counted), ``build_seconds`` (with
    calibration), ``built_shards``, and, of a lossy one, ``distortion``, ``agreement`` and ``relative_error`` on held-out images;
    the same of views beyond the first as ``copy_distortion`` and so on, if these are stored apart. Each epoch logs ``train_images_per_second``, ``epoch_seconds``, ``cumulative_seconds`` (with
    building, without evaluating and saving) and ``no_freezing_seconds_estimated`` (see ``cost.unfrozen_rate``). Where
    a run saves, ``ReportCallback`` writes its record and a report.

    Args:
        args: As for ``Trainer``, positional or keyword.
        freeze_config: When to freeze how many blocks. ``None`` trains like ``Trainer``.
        cache_config: Where and how hidden states are cached. Default: ``CacheConfig()``.
        train_transform: Renders training views, given with ``eval_transform`` in place of the data set's own transform;
            takes and returns a batch dict like ``Dataset.set_transform``'s.
        eval_transform: Renders the base view (view 0).
        kwargs: As for ``Trainer``.

    Raises:
        UnsupportedSetupError: The setup cannot work with cached training; the message says why and what to do.
        UnsupportedModelError: The model has no blocks to split at.
        ScheduleError: The schedule cannot be read or asks for more blocks than there are.
    """

    compute_loss_func: Any
    eval_dataset: Any
    model: Any
    model_wrapped: Any

    def __init__(
        self,
        *args: Any,
        freeze_config: FreezeConfig | None = None,
        cache_config: CacheConfig | None = None,
        train_transform: Callable[..., Any] | None = None,
        eval_transform: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.freeze_config = freeze_config
        self.cache_config = cache_config or CacheConfig()
        self._train_transform = train_transform
        self._eval_transform = eval_transform
        self._split: Split | None = None
        self._stages: list[Stage] = []
        self._frozen: list[Frozen] = []
        self._made_optimizer = False
        self._own_groups: list[list[nn.Parameter]] | None = None
        self._data: Data | None = None
        self._stage_cache: StageCache | None = None
        self._codec: ViewCodec | None = None
        self._dtype = torch.float32
        self._sampler: ChunkSampler | None = None
        self._stage_loader: Any = None
        self._moved_to: int | None = None
        #: The first block that this trainer may have trained; no block before it has changed.
        self._trained_from: float = math.inf
        self._stopwatch: Stopwatch | None = None
        self._augmenter: FeatureAugmenter | None = None
        #: All processes of the run, and those that share this one's folder of caches.
        self._everyone = self._processes = ProcessGroup()
        self._record = RunRecord()
        if freeze_config is None and (train_transform is not None or eval_transform is not None):
            raise UnsupportedSetupError(
                "train_transform and eval_transform are used with freeze_config only; without it set a transform on the "
                "data set, as for Trainer."
            )
        if freeze_config is not None:
            _check_transformers()
        super().__init__(*args, **kwargs)
        if freeze_config is not None:
            self._check_setup(freeze_config)
            self.eval_dataset = self._with_rgb(self.eval_dataset)
            if self._everyone.size > 1:
                callbacks = self.callback_handler.callbacks
                for place, callback in enumerate(callbacks):
                    if getattr(callback, "jit_manager", None) is not None:
                        callbacks.insert(place, AgreedCheckpoint(callback, self._everyone))
                        break
            if not any(isinstance(callback, ReportCallback) for callback in self.callback_handler.callbacks):
                self.add_callback(ReportCallback())
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ReportCallback):
                    callback.record = self._record
        elif self.cache_config.feature_augmentation is not None:
            logger.warning("feature_augmentation acts on cached stages only: without freeze_config it does nothing.")

    # ---- What can be refused before anything runs ----

    def _check_setup(self, freeze_config: FreezeConfig) -> None:
        args = self.args
        if isinstance(self.train_dataset, (IterableDataset, datasets.IterableDataset)):
            raise UnsupportedSetupError(
                "train_dataset is an IterableDataset: its rows have no number by which to find their hidden states. Use "
                "a map-style data set (datasets.load_dataset without streaming=True)."
            )
        check_parallelism(self.accelerator, args, deepspeed=self.is_deepspeed_enabled, fsdp=bool(self.is_fsdp_enabled))
        check_arguments(args)
        local_rank = self.accelerator.local_process_index
        self._everyone = self._processes = find_process_group(args.world_size, local_rank, per_node=False)
        if self.cache_config.cache_placement == "node":
            self._processes = find_process_group(args.world_size, local_rank, per_node=True)
        for name, base in (("_get_train_sampler", FreezeCacheTrainer), ("get_train_dataloader", FreezeCacheTrainer)):
            if getattr(type(self), name) is not getattr(base, name):
                raise UnsupportedSetupError(
                    f"{type(self).__name__} overrides {name}, which cached training would not use: it shuffles by chunks of "
                    "the cache. Remove the override, or train without freeze_config."
                )
        stages = self._plan(freeze_config)
        if self.cache_config.mode != "never":
            check_cache_dir(Path(self.cache_config.cache_dir), Path(args.output_dir))
        num_blocks = len(find_blocks(self.model)[1])
        for stage in stages:
            requested_codec(self.cache_config, max(stage.split_point, 1), num_blocks)
        if self.train_dataset is not None:
            check_labels(self.train_dataset, self._num_labels, [*(self.label_names or []), "label"])
        if self._make_augmenter() is not None and not any(stage.split_point for stage in stages):
            logger.warning("feature_augmentation acts on cached stages only: no stage of this schedule is one.")

    @property
    def _num_labels(self) -> int | None:
        """Number of classes, or ``None`` if the labels are not classes."""
        config = getattr(self.model, "config", None)
        if getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
            return None
        count = getattr(config, "num_labels", None)
        return count if count is not None and count > 1 else None

    def _plan(self, freeze_config: FreezeConfig) -> list[Stage]:
        epochs = math.ceil(self.args.num_train_epochs)
        if self.train_dataset is not None and (self.args.max_steps > 0 or self.args.world_size > 1):
            sampler = self._make_sampler(len(self.train_dataset))  # too few chunks for so many processes fail here
            batches = len(sampler) / self.args.train_batch_size / self.args.world_size
            batches = math.floor(batches) if self.args.dataloader_drop_last else math.ceil(batches)
        if self.args.max_steps > 0 and self.train_dataset is not None:
            per_epoch = math.ceil(batches / self.args.gradient_accumulation_steps)
            epochs = math.ceil(self.args.max_steps / max(per_epoch, 1))
        _, blocks = find_blocks(self.model)
        return plan_stages(freeze_config, max(epochs, 1), len(blocks))

    def _make_sampler(self, num_samples: int) -> ChunkSampler:
        args, config, processes = self.args, self.cache_config, self._processes
        return ChunkSampler(
            [
                ChunkLayout.of_rows(num_samples, config.chunk_size, self._view_seed, *rows)
                for rows in processes.rows_of_groups(num_samples)
            ],
            args.seed if args.data_seed is None else args.data_seed,
            self._view_seed,
            config.num_views,
            config.shuffle_window,
            processes.group_of_rank,
            self._train_batch_size,
            args.dataloader_drop_last,
        )

    def _with_rgb(self, dataset: Any) -> Any:
        if isinstance(dataset, dict):
            return {name: self._with_rgb(part) for name, part in dataset.items()}
        config = getattr(self.model, "config", None)
        channels = getattr(getattr(config, "vision_config", config), "num_channels", 3)
        return with_rgb_images(dataset) if channels == 3 else dataset

    # ---- Training ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as ``Trainer.train`` does; stages change at epoch boundaries.

        Raises:
            DataError: The transform or the collator gives batches that cannot be used.
            UnrepeatableTransformError: The transform has a random generator of its own.
            UnsupportedSetupError: As at construction, the transform cannot be hashed, or this is a trial of a
                hyperparameter search.
            CacheWriteError: The folder of caches cannot be written.
            CacheLockedError: Another live process is building the cache of a stage.
            CacheCorruptError: The cache of a stage is damaged.
            CacheMismatchError: A cache with the right fingerprint does not hold what its rows give now.
        """
        if self.freeze_config is not None:
            if args:
                args = (self._checkpoint(args[0]), *args[1:])
            elif "resume_from_checkpoint" in kwargs:
                kwargs["resume_from_checkpoint"] = self._checkpoint(kwargs["resume_from_checkpoint"])
            if kwargs.get("trial") is not None or (len(args) > 1 and args[1] is not None):
                raise UnsupportedSetupError(
                    "Hyperparameter search changes seeds and epochs after stages and views are planned: search without "
                    "freeze_config, or call train() of a new trainer for each trial."
                )
            if self.train_dataset is None:
                raise UnsupportedSetupError("FreezeCacheTrainer: training requires a train_dataset.")
            started = time.perf_counter()
            self._split, self._codec, self._stage_loader, self._stopwatch = None, None, None, None
            self._augmenter = self._make_augmenter()
            # A second train() starts at the first stage again, with an optimizer that holds all parameters.
            self._thaw()
            if self._made_optimizer:
                self.optimizer, self.lr_scheduler = None, None
            elif self.optimizer is not None:
                self._own_groups = restore_groups(self.optimizer, self._own_groups)
            self._stages = self._plan(self.freeze_config)
            self._trained_from = min(self._stages[0].split_point, self._trained_from)
            self._prepare_data()
            self._describe_run(self.freeze_config)
            self._record.preflight_seconds = round(time.perf_counter() - started, 3)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._thaw()

    def _checkpoint(self, asked: Any) -> Any:
        """Return the checkpoint to resume from: not one whose saving was cut off, which ``Trainer`` would take for the last."""
        if asked is None or asked is False:
            return asked
        if asked is not True:
            self._everyone.on_main_process(lambda: check_complete(Path(asked)))
            return asked
        last = self._everyone.on_main_process(lambda: last_complete(Path(self.args.output_dir)))
        if last is None:
            raise ValueError(f"No complete checkpoint found in the output directory ({self.args.output_dir}).")
        return str(last)

    def _prepare_data(self) -> None:
        """Set up views, order and caches of ``_stages``, and check them."""
        check_same_rows(self.train_dataset, self._everyone)
        views = ViewDataset(
            self._with_rgb(self.train_dataset),
            self._view_seed,
            self._train_transform,
            self._eval_transform,
        )
        self._sampler = self._make_sampler(len(views))
        self._data = Data(
            self.train_dataset,
            (self._train_transform, self._eval_transform),
            views,
            self._collator,
            self.data_collator,
            self._sampler.layouts[self._processes.group_index],
            self._view_seed,
            classes=self._num_labels is not None,
        )
        self._preflight()

    # ---- Caches by themselves ----

    def build_cache(self, split_point: int | None = None) -> CachedDataset:
        """Build the cache of a split point without training, or find it.

        Args:
            split_point: Number of frozen blocks; default that of the schedule's first stage that freezes any.

        Raises:
            FreezeCacheError: As ``train``.
        """
        if self.freeze_config is None or self.train_dataset is None:
            raise UnsupportedSetupError("build_cache needs a freeze_config and a train_dataset.")
        stages = [stage for stage in self._plan(self.freeze_config) if stage.split_point > 0]
        if split_point is not None:
            stages = [Stage(0, split_point)]
        if not stages:
            raise UnsupportedSetupError("No stage of the schedule freezes a block; give build_cache a split_point.")
        self._stages, self._augmenter = stages[:1], None
        self._prepare_data()
        assert self._stage_cache is not None
        split = split_model(self.model, stages[0].split_point)
        assert self._data is not None
        split.image_shape = self._data.image_shape
        # While training, DDP has given all processes the weights of the first; here nobody has.
        if self._everyone.size > 1 and len(set(self._everyone.gather(hash_prefix(split)))) > 1:
            raise UnsupportedSetupError(
                "The processes have different weights in the blocks to freeze: each of them would write other hidden states "
                "into the cache. Load the model from one checkpoint, or seed its initialisation."
            )
        return CachedDataset(self._open_stage(split)[0])

    def push_cache_to_hub(self, repo_id: str, private: bool = True, **settings: Any) -> Any:
        """Push the cache of the stage that was trained or built last to a data set on the Hub. The first process pushes.

        Source data set, its licence, classes and the model are written on its card where they are known: where they came from
        the Hub, or are given. A model whose frozen blocks were trained first, in earlier stages, is not the one of the Hub.

        Args:
            repo_id: ``user/name``.
            private: A repository that is made is private, and a public one is refused; ``False`` makes a public one.
            settings: As for ``CachedDataset.push_to_hub``.

        Raises:
            UnsupportedSetupError: There is no cache yet.
            FreezeCacheError: As ``CachedDataset.push_to_hub``.
        """
        reader = None if self._stage_cache is None else self._stage_cache.previous
        if reader is None:
            raise UnsupportedSetupError("There is no cache to push: call train() or build_cache() first.")
        if self._processes.num_groups > 1:
            raise UnsupportedSetupError(
                "With cache_placement='node' each machine has a part of the cache. To push one, build it with 'shared'."
            )

        def push() -> Any:
            def known() -> Origin:
                return self._origin(reader.index)

            kept = keep_origin(Path(reader.directory), known)  # else in a folder that takes no files
            parts = {} if kept else vars(known().updated(Origin.among(settings)))
            return CachedDataset(reader).push_to_hub(repo_id, private, **{**settings, **parts})

        return self._everyone.on_main_process(push)

    def _origin(self, index: CacheIndex) -> Origin:
        """Return what is known of the origin of a cache of this run."""
        known = origin_of_dataset(self.train_dataset)
        if index.split_point <= self._trained_from:  # else no need to look: the model is no longer that of the Hub
            known |= origin_of_model(self.model, index)
        return Origin(**known)

    def _open_stage(self, split: Split) -> tuple[CacheReader, BuildReport]:
        """Find or build the cache of a stage, and write down what it was made of."""
        assert self._stage_cache is not None
        reader, report = self._stage_cache.open(split)
        if self._processes.is_main_process:
            keep_origin(Path(reader.directory), lambda: self._origin(reader.index))
        return reader, report

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As ``Trainer``; a ``CachedDataset`` is shuffled chunk by chunk, and shows its views in turn."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, CachedDataset):
            return super()._get_train_sampler(*(() if train_dataset is None else (train_dataset,)))
        window = self.cache_config.shuffle_window
        dataset.max_chunks = max(dataset.max_chunks, window + min(self._train_batch_size, window))
        return dataset.sampler(self.args.seed if self.args.data_seed is None else self.args.data_seed, window)

    def _describe_run(self, freeze_config: FreezeConfig) -> None:
        num_blocks = len(find_blocks(self.model)[1])
        describe_run(self._record, self.args, self.model, num_blocks, freeze_config, self.cache_config)
        self._record.planned_stages = [vars(stage) for stage in self._plan(freeze_config)]
        if self._data is not None:
            self._record.data = {"train_images": len(self._data.views), "image_shape": list(self._data.image_shape)}

    def _thaw(self) -> None:
        """Give the model back as it came: frozen parameters require gradients again, hooks are gone."""
        while self._frozen:
            self._frozen.pop().thaw()

    @property
    def _view_seed(self) -> int:
        for seed in (self.cache_config.view_seed, self.args.data_seed):
            if seed is not None:
                return seed
        return int(self.args.seed)

    @property
    def _collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        return CheckedCollator(collate, tuple(self.label_names or ()), self._num_labels)

    def _preflight(self) -> None:
        """Draw a few views and refuse what would fail later, when work could be lost."""
        data = self._data
        assert data is not None
        check_repeatable(data.views, self.cache_config.num_views)
        batch = check_batch(data.views, data.collate, self.label_names, self._num_labels)
        check_collator(data.views, data.collate)
        data.image_shape = tuple(batch["pixel_values"].shape[1:])
        model = self.model
        parameters = inspect.signature(model.forward).parameters
        data.prefix_inputs = frozenset(
            name for name in batch if name in parameters and name not in {"pixel_values", *(self.label_names or [])}
        )
        data.batch_spec = json.dumps(sorted((name, str(v.dtype), list(v.shape[1:])) for name, v in batch.items()))
        split = split_model(model, max(stage.split_point for stage in self._stages))
        device_batch = {
            name: value.to(next(model.parameters()).device)
            for name, value in batch.items()
            if name in {"pixel_values", *data.prefix_inputs}
        }
        check_checkpointing(model)
        difference = split.verify(device_batch)
        logger.info("Split of %s verified: largest difference %.3g.", type(model).__name__, difference)
        if self._augmenter is not None and split.split_point > 0:
            self._check_augmenter(self._augmenter, split, batch.get("labels"), device_batch)
        config, workers = self.cache_config, self.cache_config.build_num_workers
        self._stage_cache = StageCache(
            config,
            data,
            self._run_frozen,
            str(self.accelerator.mixed_precision),
            batch_size=config.build_batch_size or self._train_batch_size,
            num_workers=self.args.dataloader_num_workers if workers is None else workers,
            show_progress=not self.args.disable_tqdm,
            split_points=tuple(stage.split_point for stage in self._stages),
            processes=self._processes,
        )
        if config.mode != "never" and any(stage.split_point for stage in self._stages):
            # What would stop a later stage stops the run now.
            self._stage_cache.check()
            try:
                self._processes.on_main_process(lambda: check_writable(Path(config.cache_dir)))
            except CacheWriteError as error:
                if config.mode == "always":
                    raise
                logger.warning("mode='auto': %s", error)
            if self._train_transform is not None and config.num_views == 1:
                logger.warning(
                    "num_views=1 stores the eval rendering only: train_transform is not used in cached stages."
                )

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        """Return a loader that renders views live; each stage swaps in its own when it begins.

        Raises:
            UnsupportedSetupError: ``train()`` has not been called.
        """
        if self.freeze_config is None:
            return super().get_train_dataloader()
        if self._sampler is None:
            raise UnsupportedSetupError("get_train_dataloader() is available once train() has been called.")
        assert self._data is not None
        return self._loader(self._data.views, self._data.collate)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As for ``Trainer``; images are decoded to RGB, as those of the training data are."""
        convert = self.freeze_config is not None and eval_dataset is not None and not isinstance(eval_dataset, str)
        return super().get_eval_dataloader(self._with_rgb(eval_dataset) if convert else eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As for ``Trainer``; images are decoded to RGB, as those of the training data are."""
        return super().get_test_dataloader(self._with_rgb(test_dataset) if self.freeze_config else test_dataset)

    def _loader(self, dataset: Any, collate: Callable[..., Any]) -> Any:
        args = self.args
        return self.accelerator.prepare(
            DataLoader(
                dataset,
                batch_size=self._train_batch_size,
                sampler=self._sampler,
                collate_fn=collate,
                num_workers=args.dataloader_num_workers,
                # Starting workers draws a seed: from here, so that the global state is the same with kept workers or
                # after a resume. Views are seeded by themselves.
                generator=torch.Generator(),
                # Absent from early 5.x.
                multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
                pin_memory=args.dataloader_pin_memory,
                persistent_workers=args.dataloader_persistent_workers,
                prefetch_factor=args.dataloader_prefetch_factor,
                drop_last=args.dataloader_drop_last,
            )
        )

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any, **kwargs: Any
    ) -> Any:
        """As ``Trainer``; a checkpoint of another number of processes, with other steps per epoch, is found by its epoch."""
        found = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs)
        self._moved_to = None
        checkpoint = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        if self.freeze_config is None or checkpoint is None:
            return found
        saved = load_world_size(Path(checkpoint))
        if saved in (None, self.args.world_size) or self.state.epoch is None:
            return found
        step, epochs, skip = moved_step(
            self.state.epoch, num_update_steps_per_epoch, self.args.gradient_accumulation_steps
        )
        logger.warning(
            "%s was saved by %d processes, in step %d: going on with %d in epoch %.2f, now step %d of %d. Samples of an epoch "
            "that had begun may be seen again, or left out.",
            checkpoint,
            saved,
            self.state.global_step,
            self.args.world_size,
            step / num_update_steps_per_epoch,
            step,
            max_steps,
        )
        self.state.global_step = self._moved_to = step
        return epochs, 0 if self.args.ignore_data_skip else skip

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # The model is final here (model_init, restored weights) and the optimizer does not exist yet. Groups saved in a
        # checkpoint hold what was trained when it was saved, so freeze that much, and let `_run_epoch` freeze the rest.
        if self.freeze_config is not None:
            if resume_from_checkpoint is None:
                split_point = self._stages[0].split_point
            else:
                split_point = load_stage(Path(resume_from_checkpoint))
            self._freeze(split_point)
            self._made_optimizer = self.optimizer is None
            if self.optimizer is not None:  # the user's own holds all parameters
                prune_optimizer(self.optimizer)
            if is_replicated(self.accelerator):
                # A wrapper of an earlier train() would be kept, around parameters that this one may not train.
                self.model_wrapped = unwrapped(self.accelerator, self.model_wrapped)
                self._choose_ddp()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.freeze_config is None:
            return prepared
        if self._moved_to is not None:
            move_scheduler(self.lr_scheduler, self._moved_to)
        # The caller keeps what it gets for the whole run: not the wrapper, which the next stage replaces.
        return self.model, prepared[1]

    def _choose_ddp(self) -> None:
        """Let DDP look for unused parameters in every step, ``Trainer``'s default, only where a model has some."""
        handler, data = getattr(self.accelerator, "ddp_handler", None), self._data
        if handler is None or data is None or self.args.ddp_find_unused_parameters is not None:
            return
        batch = self._prepare_inputs(check_batch(data.views, data.collate, self.label_names, self._num_labels))

        def loss() -> torch.Tensor:
            with self.accelerator.autocast():
                return self.compute_loss(self.model, batch)  # type: ignore[no-any-return]

        unused = unused_parameters(self.model, loss)
        handler.find_unused_parameters = bool(unused)
        if unused:
            logger.warning(
                "The loss does not depend on %d parameters that are to be trained (%s, ...): DDP looks for them in every step. "
                "Set requires_grad=False for what your model does not use.",
                len(unused),
                unused[0],
            )

    def _freeze(self, split_point: int) -> None:
        self._split = split_model(self.model, split_point)
        assert self._data is not None
        self._split.image_shape = self._data.image_shape
        check_checkpointing(self.model)
        if split_point > 0:
            self._frozen.append(freeze(self._split))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.freeze_config is None:
            super()._run_epoch(*args, **kwargs)
            return
        assert self._sampler is not None
        assert self._split is not None
        epoch, entering = kwargs["epoch"], time.perf_counter()
        split_point = split_point_at(self._stages, epoch)
        if self._stage_loader is None or split_point != self._split.split_point:
            self._enter_stage(split_point)
        self._sampler.set_epoch(epoch)
        entering = time.perf_counter() - entering
        batch_size = self.get_total_train_batch_size(self.args)
        self._stopwatch = Stopwatch(self.state.global_step, batch_size, len(self._sampler), entering)
        super()._run_epoch(*args, **{**kwargs, "model": self.model_wrapped, "train_dataloader": self._stage_loader})
        self._log_cost()
        self._stopwatch = None

    def _log_cost(self) -> None:
        """Log what training has cost since this was done last: at the end of an epoch, and before a checkpoint is saved."""
        taken = self._stopwatch.take(self.state.global_step) if self._stopwatch is not None else None
        if taken is not None and self._split is not None:
            split, cached = self._split, self._codec is not None
            self.log(epoch_logs(self.state.log_history, taken, split.split_point, split.num_blocks, cached))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._stopwatch is None:
            super()._maybe_log_save_evaluate(*args, **kwargs)
            return
        self._stopwatch.pause()
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._stopwatch.go_on()

    def _enter_stage(self, split_point: int) -> None:
        """Freeze, prune the optimizer, and swap the loader for one on this stage's cache."""
        assert self._split is not None
        if split_point < self._split.split_point:
            raise UnsupportedSetupError(
                f"The checkpoint was saved with {self._split.split_point} frozen blocks, the schedule now asks for "
                f"{split_point}: frozen blocks cannot thaw. Resume with the schedule of the interrupted run."
            )
        if self._stage_loader is not None:
            self.accelerator._dataloaders = [d for d in self.accelerator._dataloaders if d is not self._stage_loader]
            self._stage_loader = None
        changed = split_point != self._split.split_point
        self._freeze(split_point)
        released = prune_optimizer(self.optimizer)
        if changed and is_replicated(self.accelerator):
            self.model_wrapped = unwrapped(self.accelerator, self.model_wrapped)
            self._choose_ddp()
            self.model_wrapped = wrap_again(self.accelerator, self.model_wrapped)
        logs: dict[str, float] = {
            "freezecache/split_point": split_point,
            "freezecache/trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "freezecache/released_optimizer_bytes": released,
        }
        assert self._sampler is not None
        assert self._data is not None
        assert self._stage_cache is not None
        self._codec = None
        self._sampler.num_views = self.cache_config.num_views if split_point > 0 else 0
        opened = self._open_cache() if split_point > 0 and self.cache_config.mode != "never" else None
        if opened is not None:
            reader, report = opened
            self._codec, self._dtype = reader.views, reader.dtype
            dataset = CachedDataset(
                reader,
                max_chunks=self.cache_config.shuffle_window + self._chunks_per_batch,
                packed=True,
                keep_read=self.args.world_size > 1,
            )
            self._stage_loader = self._loader(dataset, collate_cached)
            logs |= {
                "freezecache/cache_bytes": report.total_bytes,
                "freezecache/cache_bytes_per_image": report.total_bytes / len(dataset),
                "freezecache/bits_per_element": round(reader.index.bits_per_element, 4),
                "freezecache/build_seconds": round(report.seconds, 3),
                "freezecache/built_shards": report.built_shards,
            }
            self._record.keep_stage(describe_stage(split_point, reader.index))
            measured = self._stage_cache.measured.items()
            logs |= {f"freezecache/{name}": value for name, value in measured if value is not None}
        else:
            mode = self.cache_config.mode
            why = "no block is frozen" if split_point == 0 else "mode='never'" if mode == "never" else "see above"
            logger.info("Training without a cache from here on: %s.", why)
            self._stage_loader = self._loader(self._data.views, self._data.collate)
        self.callback_handler.train_dataloader = self._stage_loader
        self.log(logs)

    def _open_cache(self) -> tuple[CacheReader, BuildReport] | None:
        """Find or build this stage's cache; ``None`` if it cannot be written and the user takes that."""
        assert self._split is not None
        assert self._stage_cache is not None
        try:
            with self._everyone.fail_together() if self._processes.num_groups > 1 else nullcontext():
                return self._open_stage(self._split)
        except CacheWriteError as error:
            if self.cache_config.mode == "auto":
                logger.warning(
                    "mode='auto': training on without a cache from epoch %d on. %s",
                    int(self.state.epoch or 0),
                    error,
                )
                return None
            last = last_complete(Path(self.args.output_dir))
            raise CacheWriteError(
                f"{error} "
                + (
                    f"To go on from {last.name}, call trainer.train(resume_from_checkpoint=True)."
                    if last is not None
                    else "No checkpoint was saved yet: trainer.train() begins anew, with the finished shards."
                )
            ) from error

    @property
    def _chunks_per_batch(self) -> int:
        return min(self._train_batch_size, self.cache_config.shuffle_window)

    def _run_frozen(self, function: Callable[..., Any], **inputs: Any) -> Any:
        """Call a function of tensors on the training device, in eval mode, without gradients."""
        inputs = self._prepare_inputs(inputs)
        training = self.model.training
        try:
            self.model.eval()
            # The run's own autocast: hidden states computed in fp32 are not those of a bf16 run.
            with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
                return function(**inputs)
        finally:
            self.model.train(training)

    # ---- Steps on cached batches ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on a batch of images, or on a batch of hidden states through the suffix."""
        packed, rest = split_packed(inputs) if self._codec is not None and isinstance(inputs, Mapping) else ({}, {})
        if self._codec is None or not packed:
            return super().training_step(model, inputs, *args, **kwargs)
        assert self._split is not None
        inputs, packed = self._prepare_inputs(rest) if rest else {}, self._prepare_inputs(packed)
        # Integers came to the device; what bf16 rounds off the states is far below what the codec did.
        compute_dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None
        with torch.no_grad():
            hidden_states = self._codec.dequantize(packed, self._dtype, compute_dtype)
        inputs["pixel_values"] = self._split.placeholder(len(hidden_states))
        if self._augmenter is not None:
            geometry = self._geometry(hidden_states)
            hidden_states = self._augmenter.step(hidden_states, inputs.get("labels"), geometry, self.state.global_step)
        try:
            with self._split.injecting(hidden_states):
                return super().training_step(model, inputs, *args, **kwargs)
        finally:
            if self._augmenter is not None:
                self._augmenter.targets = None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count 6 operations per suffix parameter and token for cached batches; as ``Trainer`` for images.

        Source: the estimate of ``PreTrainedModel.floating_point_ops``, with tokens for inputs, and without what does not
        run.
        """
        packed, _ = split_packed(inputs)
        if self._codec is None or not packed:
            return super().floating_point_ops(inputs)
        assert self._stage_cache is not None
        assert self._stage_cache.previous is not None
        tokens, _ = self._stage_cache.previous.index.hidden_shape
        return (
            6
            * len(next(iter(packed.values())))
            * tokens
            * sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        )

    # ---- Augmentation of cached batches ----

    def _make_augmenter(self) -> FeatureAugmenter | None:
        text, args = self.cache_config.feature_augmentation, self.args
        if text is None:
            return None
        seed = args.seed if args.data_seed is None else args.data_seed
        augmenter = FeatureAugmenter(
            parse_feature_augmentation(text), self._num_labels, seed, args.label_smoothing_factor, args.process_index
        )
        own_loss = "compute_loss_func" if self.compute_loss_func is not None else None
        if type(self).compute_loss is not FreezeCacheTrainer.compute_loss:
            own_loss = f"{type(self).__name__}.compute_loss"
        if augmenter.mixes and own_loss is not None:
            raise UnsupportedSetupError(
                f"feature_augmentation={text!r} mixes samples and trains on soft labels by cross-entropy, in place of the loss "
                f"that {own_loss} computes. Leave mixup and cutmix out, or train with the model's own loss."
            )
        return augmenter

    def _geometry(self, hidden_states: torch.Tensor) -> tuple[int, tuple[int, int]]:
        assert self._data is not None
        return token_grid(hidden_states.shape[1], self._data.image_shape, getattr(self.model, "config", None))

    def _check_augmenter(
        self, augmenter: FeatureAugmenter, split: Split, labels: Any, device_batch: dict[str, Any]
    ) -> None:
        """Augment one batch: what would fail once a cache is built fails now."""
        hidden_states = self._run_frozen(split.prefix, **device_batch)
        geometry = self._geometry(hidden_states)
        augmenter.augment(hidden_states, labels, geometry, step_generator(0, 0))
        extra = {name: value for name, value in device_batch.items() if name != "pixel_values"}

        def unrounded(hidden_states: torch.Tensor) -> torch.Tensor:
            with torch.autocast(hidden_states.device.type, enabled=False):
                hidden_states = hidden_states.to(next(self.model.parameters()).dtype)
                return first_tensor(split.suffix(hidden_states, **extra))

        def suffix(states: torch.Tensor) -> torch.Tensor:
            return self._run_frozen(unrounded, hidden_states=states)

        for name in augmenter.without_effect(suffix, hidden_states, geometry):
            logger.warning(
                "feature_augmentation: %s changes nothing that %s computes behind %d frozen blocks: its output does not "
                "depend on what this changes (the order of the patches, or patches at all). Leave it out.",
                name,
                type(self.model).__name__,
                split.split_point,
            )
        if augmenter.mixes:
            outputs = self._run_frozen(self.model, **device_batch, labels=labels)
            augmenter.check_loss(first_tensor(outputs), outputs, labels)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``; with soft labels, by cross-entropy, while a batch of mixed samples is trained on."""
        if self._augmenter is None or self._augmenter.targets is None:
            return super().compute_loss(*args, **kwargs)
        # Trainer then keeps the labels from the model, which would take soft ones for multi-label, and hands over
        # `num_items_in_batch`. Not for longer: `training_step` would take every loss for one divided by it.
        self.compute_loss_func = self._augmenter.loss
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            self.compute_loss_func = None

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._log_cost()
        # Before `super()`, which may push the folder to the Hub at once.
        if self.freeze_config is not None and self.args.should_save:
            assert self._split is not None
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            save_stage(folder, self._split.split_point, self.args.world_size)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        # What follows says that the checkpoint is complete, and removes older ones: not before all processes are done.
        with self._everyone.fail_together():
            super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if not self._restore_weights(resume_from_checkpoint, target):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        logger.info("Loading the best model from %s.", self.state.best_model_checkpoint)
        if not self._restore_weights(self.state.best_model_checkpoint, self.model):
            super()._load_best_model()

    def _restore_weights(self, checkpoint: str | None, model: nn.Module) -> bool:
        if checkpoint is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return False
        return restore_weights(Path(checkpoint), model)

    # ---- The Hub ----

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``; the model only, never a cache.

        Raises:
            UnsupportedSetupError: A cache lies inside ``output_dir``, or the model is a ``SuffixModel``.
        """
        check_pushed(Path(self.args.output_dir), self.model)
        return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        try:
            check_pushed(Path(self.args.output_dir), self.model)
        except UnsupportedSetupError as error:  # training goes on
            logger.warning("Checkpoint not pushed. %s", error)
            return
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        baseline: str | Path | None = None,
    ) -> None:
        """Write ``README.md``, the record and the picture it shows into ``output_dir``; ``push_to_hub`` calls this.

        Data sets and licence are named if given, and never guessed. Without ``freeze_config`` the card is ``Trainer``'s.

        Args:
            language: As for ``Trainer.create_model_card``, like all but the last.
            license: Of the model.
            tags: For the metadata.
            model_name: Title; default: the name of ``output_dir``.
            finetuned_from: A model on the Hub; default: where the model was loaded from, if that is no folder.
            tasks: By the Hub's names.
            dataset_tags: Data sets on the Hub.
            dataset: Names of the data sets.
            dataset_args: Configurations of the data sets.
            baseline: ``output_dir`` of a run without freezing, to compare with.

        Raises:
            RunError: ``baseline`` holds no run.
        """
        given = {
            "language": language,
            "license": license,
            "tags": tags,
            "model_name": model_name,
            "finetuned_from": finetuned_from,
            "tasks": tasks,
            "dataset_tags": dataset_tags,
            "dataset": dataset,
            "dataset_args": dataset_args,
        }
        if self.freeze_config is None:
            super().create_model_card(**given)
        elif self.is_world_process_zero():
            if not self._record.model:
                self._describe_run(self.freeze_config)
            self._record.log_history, self._record.global_step = list(self.state.log_history), self.state.global_step
            given["model_id"] = self.args.hub_model_id
            write_card(Path(self.args.output_dir), self._record, self.model, given, baseline)
