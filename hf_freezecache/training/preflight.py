"""Checks on the user's arguments and data before a run does any work."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compression.base_view import CodecChooser
from ..config import CacheConfig
from ..data.feature_augmentation import parse_feature_augmentation, step_generator
from ..data.feature_augmenter import FeatureAugmenter
from ..data.task import IMAGE_CLASSIFICATION, task_of
from ..data.views import ViewDataset, views_differ
from ..errors import UnsupportedSetupError
from ..model.freeze import check_checkpointing
from ..model.split import Split, Splits, first_tensor
from ..model.suffix import SuffixModel
from ..model.threads import one_thread_if_small
from ..model.tokens import token_grid
from ..report.record import RunRecord
from ..schedules import Stage
from .cache_folder import check_folder
from .data_checks import num_classes, prepare_data
from .freezer import Freezer
from .planner import epochs_of, exact_epochs, make_sampler, shuffle_seed
from .rehearsal import rehearse
from .runtime import Runtime
from .stage import StageRunner
from .stage_cache import StageCache

__all__ = [
    "check_arguments",
    "check_augmenter",
    "check_cache_dir",
    "check_overrides",
    "check_pushed",
    "check_steps",
    "make_augmenter",
    "prepare_run",
    "warn_of_one_view",
]


logger = logging.getLogger(__name__)


def check_arguments(args: Any) -> None:
    """Refuse ``TrainingArguments`` whose meaning cached training cannot keep.

    Raises:
        UnsupportedSetupError: With the argument, the reason and what to do.
    """
    if args.n_gpu > 1:
        raise UnsupportedSetupError(
            f"One process sees {args.n_gpu} GPUs, on which Trainer would use torch.nn.DataParallel: it copies the model, "
            "prefix and all, to each of them in every step, and cached training does not support it. Start one process for "
            f"each GPU (accelerate launch --num_processes {args.n_gpu} ..., or torchrun --nproc_per_node {args.n_gpu} ...), "
            "or let CUDA_VISIBLE_DEVICES name one."
        )
    if args.world_size > 1 and not torch.distributed.is_initialized():
        raise UnsupportedSetupError(
            f"world_size is {args.world_size}, but these processes do not talk through torch.distributed. Use torchrun or "
            "accelerate launch with DistributedDataParallel."
        )
    if args.auto_find_batch_size:
        raise UnsupportedSetupError("auto_find_batch_size restarts the epoch loop; set the batch size instead.")
    if getattr(args, "train_sampling_strategy", "random") != "random":
        raise UnsupportedSetupError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} cannot be kept: cached training shuffles by "
            "chunks. Use 'random'."
        )
    # The names differ over transformers versions; either may be None.
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise UnsupportedSetupError(
                f"{name} sets use_reentrant=True: with a frozen prefix that gives no gradients at all, without an "
                "error. Set it to False, the default."
            )


def check_cache_dir(cache_dir: Path, output_dir: Path) -> None:
    """Refuse caches where ``push_to_hub`` would upload them.

    Raises:
        UnsupportedSetupError: ``cache_dir`` is ``output_dir`` or lies inside it.
    """
    cache_dir, output_dir = cache_dir.resolve(), output_dir.resolve()
    if cache_dir == output_dir or output_dir in cache_dir.parents:
        raise UnsupportedSetupError(
            f"freezecache_dir {cache_dir} lies inside output_dir {output_dir}, all of which push_to_hub uploads. Caches can "
            "reveal training images: choose a freezecache_dir elsewhere."
        )


def check_pushed(output_dir: Path, model: nn.Module) -> None:
    """Refuse to upload what is no ordinary model, or has a cache beside it, such as one that was pulled or copied there.

    Raises:
        UnsupportedSetupError: A cache lies inside ``output_dir``, or ``model`` is the suffix of another.
    """
    shard = next(output_dir.rglob("view-*/shard-*.safetensors"), None)
    if shard is not None:
        raise UnsupportedSetupError(
            f"A cache lies in {shard.parents[1]}, inside output_dir {output_dir}, all of which would be uploaded with the model. "
            "Caches can reveal training images: move it elsewhere, and push again."
        )
    if isinstance(model, SuffixModel):
        raise UnsupportedSetupError(
            "The Trainer's model is a SuffixModel, of which the Hub would get no model that loads. Push the whole model that "
            "it trains: suffix.model.push_to_hub(repo_id)."
        )


def make_augmenter(config: CacheConfig, args: Any, model: nn.Module, own_loss: str | None) -> FeatureAugmenter | None:
    """Return what augments cached batches, or ``None`` if nothing does.

    Args:
        config: The user's settings of caches.
        args: ``TrainingArguments``.
        model: The model.
        own_loss: Name of what computes the loss in place of the model, if anything does.

    Raises:
        UnsupportedSetupError: The text cannot be read, or samples are to be mixed under a loss of the user's own.
    """
    text = config.feature_augmentation
    if text is None:
        return None
    augmenter = FeatureAugmenter(
        parse_feature_augmentation(text),
        num_classes(model),
        shuffle_seed(args),
        args.label_smoothing_factor,
        args.process_index,
        task_of(model) or IMAGE_CLASSIFICATION,
    )
    if augmenter.mixes and own_loss is not None:
        raise UnsupportedSetupError(
            f"feature_augmentation={text!r} mixes samples and trains on soft labels by cross-entropy, in place of the loss "
            f"that {own_loss} computes. Leave mixup and cutmix out, or train with the model's own loss."
        )
    return augmenter


def check_augmenter(
    augmenter: FeatureAugmenter, split: Split, runtime: Runtime, labels: Any, batch: dict[str, Any]
) -> None:
    """Augment one batch, so that what would fail once a cache is built fails now.

    Args:
        augmenter: What augments cached batches.
        split: The model, split at the deepest split point of the run.
        runtime: The trainer.
        labels: Classes of the batch.
        batch: Inputs of the model, without labels, on its device.

    Raises:
        UnsupportedSetupError: An augmentation needs a grid of patches, or mixing does not fit the model's loss.
        DataError: Logits or labels are not what mixing needs.
    """
    hidden_states = runtime.run_frozen(split.prefix, **batch)
    grid = token_grid(hidden_states.shape[1], split.image_shape, getattr(split.model, "config", None))
    augmenter.augment(hidden_states, labels, grid, step_generator(0, 0))
    extra = {name: value for name, value in batch.items() if name != "pixel_values"}

    def unrounded(hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.to(next(split.model.parameters()).dtype)
            return first_tensor(split.suffix(hidden_states, **extra))

    def suffix(states: torch.Tensor) -> torch.Tensor:
        return runtime.run_frozen(unrounded, hidden_states=states)  # type: ignore[no-any-return]

    for name in augmenter.without_effect(suffix, hidden_states, grid):
        logger.warning(
            "feature_augmentation: %s changes nothing that %s computes behind %d frozen blocks: its output does not "
            "depend on what this changes (the order of the patches, or patches at all). Leave it out.",
            name,
            type(split.model).__name__,
            split.split_point,
        )
    if augmenter.mixes:
        outputs = runtime.run_frozen(split.model, **batch, labels=labels)
        augmenter.check_loss(first_tensor(outputs), outputs, labels)


def check_plain_training(transforms: tuple[Any, Any], config: CacheConfig) -> None:
    """Refuse settings that do nothing without ``freeze_config``, or say so.

    Args:
        transforms: The user's ``train_transform`` and ``eval_transform``.
        config: The user's settings of caches.

    Raises:
        UnsupportedSetupError: There are transforms.
    """
    if transforms != (None, None):
        raise UnsupportedSetupError(
            "train_transform and eval_transform are used with freeze_config only; without it set a transform on the "
            "data set, as for Trainer."
        )
    if config.feature_augmentation is not None:
        logger.warning("feature_augmentation acts on cached stages only: without freeze_config it does nothing.")


def check_overrides(trainer: Any, base: type) -> None:
    """Refuse overrides of what cached training does not use, by the trainer's class or set on the trainer itself.

    Args:
        trainer: The user's trainer.
        base: ``FreezeCacheTrainer``.

    Raises:
        UnsupportedSetupError: The sampler or the loader of training data is overridden.
    """
    kind = type(trainer)
    for name in ("_get_train_sampler", "get_train_dataloader", "_get_dataloader"):
        if name in vars(trainer) or getattr(kind, name, None) is not getattr(base, name, None):
            raise UnsupportedSetupError(
                f"{kind.__name__} overrides {name}, which cached training would not use: it shuffles by chunks of "
                "the cache. Remove the override, or train without freeze_config."
            )


def prepare_run(
    runtime: Runtime,
    config: CacheConfig,
    stages: Sequence[Stage],
    num_epochs: int,
    dataset: Any,
    transforms: tuple[Any, Any],
    freezer: Freezer,
    record: RunRecord,
    augmenter: FeatureAugmenter | None = None,
    try_evaluation: Callable[[], None] = lambda: None,
    foreseen: Sequence[Stage] = (),
    head_rows: float = 1.0,
) -> StageRunner:
    """Check data, split and folder, and return what runs the stages. Collective; nothing is built.

    Args:
        runtime: The trainer.
        config: The user's settings of caches.
        stages: The stages, in order.
        num_epochs: Epochs of the run.
        dataset: The data set that the user passed.
        transforms: The user's ``train_transform`` and ``eval_transform``, or ``(None, None)``.
        freezer: What the trainer has frozen.
        record: The record of the run.
        augmenter: Augments cached batches.
        try_evaluation: Tries an evaluation, once the training data are known to be fine.
        foreseen: The stages to prepare for, where more than ``stages`` may be decided while training.
        head_rows: Share of the rows that stages see in which the head trains alone.

    Raises:
        FreezeCacheError: See ``prepare_data``, ``check_augmenter`` and ``StageCache.check_settings``.
    """
    sampler = make_sampler(len(dataset), config, runtime.args, runtime.cache_group, runtime.batch_size)
    layout = sampler.layouts[runtime.cache_group.group_index]
    foreseen = foreseen or stages
    split_points = tuple(stage.split_point for stage in foreseen)
    cached = config.mode != "never" and any(split_points)
    model = runtime.model
    with one_thread_if_small(model):
        # Stages without frozen blocks show new views, whatever is stored.
        shown = 2 if 0 in split_points else config.num_views
        data = prepare_data(runtime, config, dataset, transforms, layout, config.view_seed, cached, shown)
        if config.num_views == 1 and config.chooses_views and transforms[0] is None:
            warn_of_one_view(data.views, stages, num_epochs)
    splits = Splits(model, data.image_shape, data.call, strict=config.mode == "always")
    deepest = splits.at(max(split_points))
    device = next(model.parameters()).device
    inputs = {"pixel_values", *data.prefix_inputs}
    batch = {name: value.to(device) for name, value in data.example_batch.items() if name in inputs}
    check_checkpointing(model)
    with one_thread_if_small(model):
        _ = deepest.stem  # traces the model
    if augmenter is not None and deepest.split_point > 0:
        check_augmenter(augmenter, deepest, runtime, data.example_batch.get("labels"), batch)
    try_evaluation()
    batch_size = config.build_batch_size or runtime.batch_size
    workers = config.build_num_workers
    cache = StageCache(
        config,
        CodecChooser(config, data, splits, runtime.run_frozen, batch_size, head_rows),
        str(runtime.accelerator.mixed_precision),
        runtime.args.dataloader_num_workers if workers is None else workers,
        not runtime.args.disable_tqdm,
        split_points,
        runtime.cache_group,
    )
    if cached:
        cache.check_settings()
        if transforms[0] is not None and config.num_views == 1:
            logger.warning("num_views=1 stores the eval rendering only: train_transform is not used in cached stages.")
    cache.split_points = tuple(stage.split_point for stage in stages)  # others are not known yet, as after a resume
    return StageRunner(
        runtime,
        config,
        stages,
        exact_epochs(runtime.args, sampler, num_epochs),
        data,
        splits,
        sampler,
        augmenter,
        cache,
        freezer,
        record,
        foreseen,
    )


#: Rows whose views are compared before a warning: a flip alone leaves three views of four rows alike once in 256 times.
_ROWS_COMPARED = 4


def warn_of_one_view(views: ViewDataset, stages: Sequence[Stage], num_epochs: int) -> None:
    """Log that a random transform is drawn once for all frozen epochs, where the user has not said how many views to store.

    Args:
        views: Renders the rows.
        stages: The stages, in order.
        num_epochs: Epochs of the run.

    Raises:
        DataError: A row could not be read or transformed.
    """
    frozen = sum(epochs_of(stage, stages, num_epochs) for stage in stages if stage.split_point > 0)
    if frozen > 1 and views_differ(views, _ROWS_COMPARED):
        logger.warning(
            "The training transform is random, and num_views is 1, the default: in stages with frozen blocks an image looks the "
            "same in all of the %d epochs, with one draw of crop and flip. CacheConfig(num_views='auto') stores more where that "
            "is worth it (docs/augmented_views.md); CacheConfig(num_views=1) says that one will do.",
            frozen,
        )


def check_steps(run: StageRunner, wrapped: nn.Module) -> None:
    """Rehearse a step of each stage, then try the folder of caches: the last that is done before training. Collective.

    Args:
        run: What runs the stages, with the model frozen as at the start.
        wrapped: The model in its wrapper for several processes.

    Raises:
        FreezeCacheError: See ``rehearse`` and ``check_folder``.
    """
    started = time.perf_counter()
    with one_thread_if_small(run.runtime.model):
        rehearse(run, wrapped)
    points = [stage.split_point for stage in run.foreseen if stage.split_point not in run.refusals]
    if run.config.mode != "never" and any(points):
        check_folder(run.cache, run.splits, points)
    run.record.preflight_seconds = round(run.record.preflight_seconds + time.perf_counter() - started, 3)
