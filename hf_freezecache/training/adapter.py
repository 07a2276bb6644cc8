"""Reads off a trainer what its stages need. The trainer is a ``FreezeCacheTrainer``; this module does not import it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from torch import nn
from torch.utils.data import IterableDataset

from ..compression.base_view import requested_codec
from ..data.feature_augmenter import FeatureAugmenter
from ..dataset import CachedDataset
from ..errors import DataError, UnsupportedSetupError
from ..model.hashing import hash_prefix
from ..model.split import find_blocks
from ..schedules import Stage, adaptive_policy, foreseen_stages
from .adaptive import AdaptiveStages
from .auto import resume_choice, settle_auto, settle_views
from .block_weights import qkv_weights
from .by_block import compile_settings
from .checkpoints import announce_stage, find_checkpoint, load_stage, take_over_progress
from .data_checks import num_classes, with_columns_removed
from .evaluation_check import check_evaluation
from .evaluation_costs import planned_evaluations
from .hooks import check_trainer_attributes
from .learning_rates import LearningRates
from .placement import place_model
from .planner import make_sampler, plan_run
from .preflight import check_cache_dir, check_overrides, check_steps, make_augmenter, prepare_run
from .rehearsal_copy import rehearsing
from .runtime import Runtime
from .stage import StageRunner
from .stage_opening import open_cache
from .weights import check_saving, restore_weights

__all__ = [
    "augmenter_of",
    "begin_from",
    "build_cache_of",
    "check_setup",
    "optimizer_ready",
    "plan_stages_of",
    "prepare_optimizer",
    "restore_weights_of",
    "resume_weights_of",
    "start_run",
]

logger = logging.getLogger(__name__)


def check_setup(trainer: Any, base: type) -> None:
    """Refuse what can be refused before anything runs.

    Args:
        trainer: The user's trainer.
        base: ``FreezeCacheTrainer``.

    Raises:
        UnsupportedSetupError: The setup cannot work with cached training.
        UnsupportedModelError: The model has no blocks to split at.
        ScheduleError: The schedule cannot be read, or asks for more blocks than there are.
        DataError: The training data set has no rows.
    """
    check_trainer_attributes(trainer)
    config, dataset = trainer.cache_config, trainer.train_dataset
    if isinstance(dataset, (IterableDataset, datasets.IterableDataset)):
        raise UnsupportedSetupError(
            "train_dataset is an IterableDataset: its rows have no number by which to find their hidden states. Use "
            "a map-style data set (datasets.load_dataset without streaming=True)."
        )
    check_overrides(trainer, base)
    stages, num_epochs = plan_stages_of(trainer)
    if trainer.freeze_config.is_auto:
        settle_auto(trainer, num_epochs)
        stages, num_epochs = plan_stages_of(trainer)
    stages = foreseen_of(trainer, stages, num_epochs)
    settle_views(trainer, stages, num_epochs)
    config = trainer.cache_config
    if config.mode != "never":
        check_cache_dir(Path(config.freezecache_dir), Path(trainer.args.output_dir))
    for stage in stages:
        requested_codec(config, max(stage.split_point, 1))
    if dataset is not None and len(dataset) == 0:
        raise DataError("The training data set has no rows.")
    points = {stage.split_point for stage in stages}
    if augmenter_of(trainer, base) is not None and 0 in points and points <= {0, len(find_blocks(trainer.model)[1])}:
        logger.warning("feature_augmentation acts on cached stages only: in none of this schedule do blocks train.")


def check_train_arguments(trainer: Any, call: inspect.BoundArguments) -> dict[str, Any]:
    """Return the arguments of a call of ``train()`` by name, with the checkpoint to resume from found. Collective.

    Args:
        trainer: The user's trainer.
        call: Arguments of ``Trainer.train``.

    Raises:
        UnsupportedSetupError: This is a trial of a hyperparameter search, there is no data set, or the checkpoint is cut off.
        ValueError: There is no complete checkpoint.
    """
    arguments = {name: value for name, value in call.arguments.items() if name not in ("self", "kwargs")}
    arguments |= call.arguments.get("kwargs", {})
    if arguments.get("trial") is not None:
        raise UnsupportedSetupError(
            "Hyperparameter search changes seeds and epochs after stages and views are planned: search without "
            "freeze_config, or call train() of a new trainer for each trial."
        )
    if trainer.train_dataset is None:
        raise UnsupportedSetupError("FreezeCacheTrainer: training requires a train_dataset.")
    if "resume_from_checkpoint" in arguments:
        asked, everyone = arguments["resume_from_checkpoint"], trainer._process_groups[0]
        arguments["resume_from_checkpoint"] = found = find_checkpoint(asked, trainer.args, everyone)
        if found and trainer._chosen is not None:
            resume_choice(trainer, Path(found))
    return arguments


def plan_stages_of(trainer: Any) -> tuple[list[Stage], int]:
    """Return the stages of a trainer's run, and its number of epochs.

    Raises:
        ScheduleError: The schedule cannot be read, or asks for more blocks than there are.
        UnsupportedSetupError: There are too few rows for so many processes.
    """
    args, dataset, sampler = trainer.args, trainer.train_dataset, None
    if dataset is not None and (args.max_steps > 0 or args.world_size > 1):
        cache_group, batch_size = trainer._process_groups[1], trainer._train_batch_size
        sampler = make_sampler(len(dataset), trainer.cache_config, args, cache_group, batch_size)
    return plan_run(trainer.freeze_config, args, len(find_blocks(trainer.model)[1]), sampler)


def foreseen_of(trainer: Any, stages: list[Stage], num_epochs: int) -> list[Stage]:
    """Return the stages that a trainer's run must be prepared for, see ``foreseen_stages``; it may reach all of them.

    Args:
        trainer: The user's trainer.
        stages: The stages that are known, in order.
        num_epochs: Epochs of the run.
    """
    schedule = trainer.freeze_config.schedule
    policy, found = adaptive_policy(schedule), foreseen_stages(schedule, stages, len(find_blocks(trainer.model)[1]))
    if policy is not None and policy.first_epoch >= num_epochs:
        logger.warning(
            "%s decides first at the beginning of epoch %d, from 0, and the run has %d: nothing will be frozen.",
            schedule,
            policy.first_epoch,
            num_epochs,
        )
    return [stage for stage in found if stage.start_epoch < num_epochs]  # others are planned, but never reached


def augmenter_of(trainer: Any, base: type) -> FeatureAugmenter | None:
    """Return what augments a trainer's cached batches, or ``None``; see ``make_augmenter`` for errors."""
    own_loss = "compute_loss_func" if trainer.compute_loss_func is not None else None
    if type(trainer).compute_loss is not base.compute_loss:  # type: ignore[attr-defined]
        own_loss = f"{type(trainer).__name__}.compute_loss"
    return make_augmenter(trainer.cache_config, trainer.args, trainer.model, own_loss)


def _collator_of(trainer: Any) -> Any:
    """Return the user's collator. As ``Trainer`` does, columns are removed behind it where the data set cannot lose them."""
    if isinstance(trainer.train_dataset, datasets.Dataset) and trainer._transforms == (None, None):
        return trainer.data_collator
    return trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")


def start_run(
    trainer: Any, stages: list[Stage], num_epochs: int, augmenter: FeatureAugmenter | None, base: type | None = None
) -> StageRunner:
    """Check a trainer's data, split and folder, and return what runs its stages.

    Args:
        trainer: The user's trainer.
        stages: The stages, in order.
        num_epochs: Epochs of the run.
        augmenter: Augments cached batches.
        base: ``FreezeCacheTrainer``, for a run that trains; ``None`` for one that only builds.

    Raises:
        UnsupportedSetupError: There are to be plain epochs, but nothing says how plain images look.
        FreezeCacheError: See ``with_columns_removed``, ``check_evaluation`` and ``prepare_run``.
    """
    plain_epochs = trainer.freeze_config.plain_epochs or 0
    if plain_epochs and trainer._transforms[1] is None:
        raise UnsupportedSetupError(
            f"plain_epochs={plain_epochs} ends the run with images as eval_transform renders them, but there is none: the data set "
            "has one transform for all. Give the trainer train_transform and eval_transform, or remove plain_epochs."
        )

    def try_evaluation() -> None:
        if base is not None:
            with everyone.fail_together():
                check_evaluation(trainer, base)

    everyone, cache_group = trainer._process_groups
    if base is not None:
        check_overrides(trainer, base)  # once more: a method may have been set on the trainer since
    place_model(trainer)
    if trainer.args.load_best_model_at_end or trainer.args.save_strategy != "no":
        check_saving(trainer.model)
    runtime = Runtime(
        model=trainer.model,
        args=trainer.args,
        accelerator=trainer.accelerator,
        everyone=everyone,
        cache_group=cache_group,
        batch_size=trainer._train_batch_size,
        label_names=tuple(trainer.label_names or ()),
        num_classes=num_classes(trainer.model),
        raw_collator=trainer.data_collator,
        collate=_collator_of(trainer),
        prepare_inputs=trainer._prepare_inputs,
        to_device=trainer._prepare_input,
        rehearsing=lambda: rehearsing(trainer),
        autocast=trainer.compute_loss_context_manager,
        compile_settings=compile_settings(trainer.accelerator),
        known_loss=trainer.compute_loss_func is None and trainer.compute_loss.__module__.startswith("hf_freezecache."),
    )
    foreseen = foreseen_of(trainer, stages, num_epochs) if base is not None else ()
    run = prepare_run(
        runtime,
        trainer.cache_config,
        [stage for stage in stages if stage.start_epoch < num_epochs],
        num_epochs,
        with_columns_removed(trainer),
        trainer._transforms,
        trainer._freezer,
        trainer._record,
        augmenter,
        try_evaluation,
        foreseen,
        trainer.freeze_config.head_rows or 1.0,
    )
    if base is not None:  # a run that only builds takes no step
        policy, num_blocks = adaptive_policy(trainer.freeze_config.schedule), run.splits.num_blocks
        run.adaptive = None if policy is None else AdaptiveStages(policy, num_blocks, everyone, list(run.stages))
        run.rates = LearningRates.of(trainer.freeze_config)
        run.evaluations = planned_evaluations(trainer, run.sampler, num_epochs)
        freezing = trainer.freeze_config
        if freezing.block_weights == "qkv":
            qkv_weights(run.splits)  # or says why not, before anything is built
        run.token_keep = freezing.token_keep or 1.0, freezing.unfrozen_token_keep or 1.0
        run.sampler.plain_from = num_epochs - plain_epochs if plain_epochs else None
    run.chosen = trainer._chosen
    return run


def begin_from(run: StageRunner, checkpoint: str | None, block_weights: str | None) -> int:
    """Let a run begin in its first stage, or where a checkpoint is; return how few blocks are frozen in what is left of it.

    Args:
        run: What runs the stages. It takes over stage and progress of the checkpoint.
        checkpoint: Its folder; ``None`` if there is none.
        block_weights: As of ``FreezeConfig``.

    Raises:
        UnsupportedSetupError: The stage of the checkpoint cannot be read, or other weights of the blocks trained.
    """
    left = run.stages
    if checkpoint is not None:
        saved, wanted = load_stage(Path(checkpoint)), block_weights or "all"
        if saved.stage is not None and saved.block_weights != wanted:
            raise UnsupportedSetupError(
                f"{checkpoint} was saved with block_weights={saved.block_weights!r}, and this run has {wanted!r}: other weights would "
                f"train, without the optimizer's states. Resume with FreezeConfig(block_weights={saved.block_weights!r})."
            )
        if run.adaptive is not None:
            run.adaptive.restore(Path(checkpoint), saved.adaptive)
            left = run.stages = run.adaptive.stages
        if saved.stage is not None:
            take_over_progress(run.record, saved.progress, run.stages)
        run.saved, run.frozen_before = saved.stage, saved.split_point
        if saved.stage is not None and saved.stage in run.stages:
            left = run.stages[saved.stage.index :]
    else:
        run.frozen_before = run.stages[0].split_point
    return min([run.frozen_before, *(stage.split_point for stage in left)])


def build_cache_of(trainer: Any, split_point: int | None) -> CachedDataset:
    """Build or find a cache without training. Collective.

    Args:
        trainer: The user's trainer.
        split_point: Number of frozen blocks; default that of the schedule's first stage that freezes any. Caches of later
            stages that the same pass over the images can give are built as well.

    Raises:
        UnsupportedSetupError: There is no data set or no split point, or the processes have different weights.
        FreezeCacheError: See ``prepare_run`` and ``StageCache.open``.
    """
    if trainer.freeze_config is None or trainer.train_dataset is None:
        raise UnsupportedSetupError("build_cache needs a freeze_config and a train_dataset.")
    stages, num_epochs = plan_stages_of(trainer)
    if split_point is not None:
        stages = [Stage(0, 0, split_point)]
    first = next((stage for stage in stages if stage.split_point), None)
    if first is None:
        raise UnsupportedSetupError("No stage of the schedule freezes a block; give build_cache a split_point.")
    # It is built for runs of more epochs, too.
    trainer._run = run = start_run(trainer, stages, max(num_epochs, first.start_epoch + 1), None)
    with run.runtime.in_its_precision():
        check_steps(run, trainer.model)
    # As `train` does, which trains the others from images.
    first = next((one for one in run.stages if one.split_point and one.split_point not in run.refusals), None)
    if first is None:
        raise UnsupportedSetupError(
            f"No stage of the schedule can be trained from a cache: {next(iter(run.refusals.values()))}. Freeze other blocks."
        )
    split, everyone = run.splits.at(first.split_point), run.runtime.everyone
    # While training, DDP has given all processes the weights of the first; here nobody has.
    if everyone.size > 1 and len(set(everyone.gather(hash_prefix(split)))) > 1:
        raise UnsupportedSetupError(
            "The processes have different weights in the blocks to freeze: each of them would write other hidden states "
            "into the cache. Load the model from one checkpoint, or seed its initialisation."
        )
    return CachedDataset(open_cache(run, split, [run.splits.at(point) for point in run.built_ahead(first)]).reader)


def resume_weights_of(trainer: Any, checkpoint: str, model: nn.Module | None) -> bool:
    """As ``restore_weights_of``, for a run that goes on: it says so if the checkpoint is of another kind of run.

    Args:
        trainer: The user's trainer.
        checkpoint: Its folder.
        model: The model; ``None`` for the trainer's.

    Raises:
        UnsupportedSetupError: The stage of the checkpoint cannot be read, or it lacks weights of a model to be frozen.
    """
    freezes = trainer.freeze_config is not None
    announce_stage(Path(checkpoint), freezes=freezes)
    return restore_weights_of(trainer, checkpoint, model, strict=freezes)


def restore_weights_of(
    trainer: Any, checkpoint: str | None, model: nn.Module | None = None, *, strict: bool = False
) -> bool:
    """Load a checkpoint's weights into a trainer's model; return whether that was done, or is left to ``Trainer``.

    Args:
        trainer: The user's trainer.
        checkpoint: Its folder; ``None`` if there is none.
        model: The model; ``None`` for the trainer's.
        strict: Refuse a checkpoint that lacks weights of the model.

    Raises:
        UnsupportedSetupError: See ``restore_weights``.
    """
    if checkpoint is None or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return False
    logger.info("Loading the weights of %s.", checkpoint)
    return restore_weights(Path(checkpoint), trainer.model if model is None else model, strict=strict)


def prepare_optimizer(trainer: Any) -> None:
    """Give a trainer's new optimizer the groups that it has in the stage in which the run begins. A second call does nothing.

    Args:
        trainer: The user's trainer.

    Raises:
        UnsupportedSetupError: See ``LearningRates.prepare``.
    """
    run, freezer = trainer._run, trainer._freezer
    freezer.adopt(trainer.optimizer)
    run.rates.prepare(run.splits, trainer.optimizer, trainer.lr_scheduler, freezer)
    # Blocks that a later stage thaws, and what a `create_optimizer` of the user's own put in of frozen ones.
    freezer.prune(trainer.optimizer, run.splits.at(run.frozen_before))


@contextmanager
def optimizer_ready(trainer: Any, checkpoint: str | None) -> Iterator[None]:
    """While active, a trainer's optimizer has the groups that a checkpoint of such a run has.

    Args:
        trainer: The user's trainer.
        checkpoint: Its folder; ``None`` if there is none.

    Raises:
        UnsupportedSetupError: See ``prepare_optimizer`` and ``LearningRates.restoring``.
    """
    run = trainer._run
    if run is None:
        yield
        return
    prepare_optimizer(trainer)
    with run.rates.restoring(checkpoint, trainer.optimizer):
        yield
