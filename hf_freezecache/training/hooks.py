"""The private parts of ``transformers.Trainer`` that cached training relies on, checked against the installed version."""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any

import accelerate
import transformers

from ..errors import UnsupportedSetupError

__all__ = [
    "TRAINER_ATTRIBUTES",
    "TRAINER_HOOKS",
    "TrainerHook",
    "check_trainer_attributes",
    "check_trainer_hooks",
    "missing_hooks",
]


@dataclass(frozen=True)
class TrainerHook:
    """A private method of ``Trainer`` that is overridden or called.

    Attributes:
        name: Name of the method.
        parameters: Names of the parameters that are relied on.
        purpose: What it is for, in a few words.
    """

    name: str
    parameters: frozenset[str]
    purpose: str


def _hook(name: str, parameters: str, purpose: str) -> TrainerHook:
    return TrainerHook(name, frozenset(parameters.split()), purpose)


#: One line for each private method that ``FreezeCacheTrainer`` overrides or calls.
TRAINER_HOOKS = (
    _hook("_run_epoch", "model epoch train_dataloader num_update_steps_per_epoch", "stages change before an epoch"),
    _hook(
        "_prepare_for_training",
        "max_steps train_dataloader resume_from_checkpoint",
        "frozen blocks leave the optimizer before it is made",
    ),
    _hook(
        "_init_training_state",
        "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint",
        "a checkpoint of another number of processes is continued",
    ),
    _hook("_maybe_log_save_evaluate", "tr_loss model epoch", "the stopwatch rests while a run evaluates and saves"),
    _hook("_save_checkpoint", "model trial", "the stage is written into each checkpoint"),
    _hook("_save_rng_state", "output_dir", "a checkpoint is complete once all processes have saved"),
    _hook("_load_from_checkpoint", "resume_from_checkpoint model", "weights are restored strictly"),
    _hook("_load_best_model", "", "weights are restored under the model's own keys"),
    _hook("_load_optimizer_and_scheduler", "checkpoint", "frozen blocks leave an optimizer before its state is loaded"),
    _hook("_push_from_checkpoint", "checkpoint_folder", "no cache is pushed with a model"),
    _hook("_get_train_sampler", "train_dataset", "a CachedDataset is shuffled chunk by chunk"),
    _hook("_get_collator_with_removed_columns", "data_collator description", "columns are removed as Trainer does"),
    _hook("_remove_unused_columns", "dataset description", "columns are removed as Trainer does"),
    _hook("_get_output_dir", "trial", "the folder of a checkpoint"),
    _hook("_prepare_inputs", "inputs", "batches go to the training device"),
    _hook("_prepare_input", "data", "packed hidden states go to the training device"),
    _hook("_track_num_input_tokens", "inputs", "inputs of cached batches are counted as those of images"),
)

#: Private attributes of a trainer and of accelerate's ``Accelerator`` that are read or changed, and what for.
TRAINER_ATTRIBUTES = {
    "_train_batch_size": "samples per batch of one process",
    "accelerator._dataloaders": "the loader of a stage that has ended is let go",
    "accelerator._models": "the wrapper of a stage that has ended is let go",
}


def missing_hooks(trainer_class: type) -> list[str]:
    """Return what the installed ``Trainer`` lacks, as ``name(missing parameters)``; empty if nothing.

    Args:
        trainer_class: ``transformers.Trainer``.
    """
    missing = []
    for hook in TRAINER_HOOKS:
        method = getattr(trainer_class, hook.name, None)
        if method is None:
            missing.append(f"{hook.name} ({hook.purpose})")
            continue
        absent = hook.parameters - set(inspect.signature(method).parameters)
        if absent:
            missing.append(f"parameters {sorted(absent)} of {hook.name} ({hook.purpose})")
    return missing


def check_trainer_hooks(trainer_class: type) -> None:
    """Refuse a version of transformers whose ``Trainer`` lacks a hook.

    Raises:
        UnsupportedSetupError: The message names what is missing.
    """
    missing = missing_hooks(trainer_class)
    if missing:
        raise UnsupportedSetupError(
            f"The Trainer of transformers {transformers.__version__} lacks what cached training relies on: "
            f"{'; '.join(missing)}. Install transformers>=5.4, or train without freeze_config."
        )


def check_trainer_attributes(trainer: Any) -> None:
    """Refuse versions whose trainer or accelerator lacks a private attribute.

    Args:
        trainer: The user's trainer.

    Raises:
        UnsupportedSetupError: The message names what is missing.
    """
    missing = []
    for path, purpose in TRAINER_ATTRIBUTES.items():
        try:
            operator.attrgetter(path)(trainer)
        except AttributeError:
            missing.append(f"{path} ({purpose})")
    if missing:
        raise UnsupportedSetupError(
            f"With transformers {transformers.__version__} and accelerate {accelerate.__version__}, a trainer lacks what cached "
            f"training relies on: {'; '.join(missing)}. Install other versions of them, or train without freeze_config."
        )
