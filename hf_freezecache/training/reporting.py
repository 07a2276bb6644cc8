"""Writes down what a trainer's run is, and lets it report. The trainer is a ``FreezeCacheTrainer``; this module does not import it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..distributed.jit_checkpoint import SynchronizedJITCheckpoint
from ..model.split import find_blocks
from ..report.callback import ReportCallback, describe_run, write_card
from ..report.seeds import Folders
from ..schedules import adaptive_policy
from .adapter import plan_stages_of

__all__ = ["describe", "install_callbacks", "report_callbacks", "write_model_card"]


def describe(trainer: Any) -> None:
    """Write into a trainer's record what is known before the first step."""
    record, num_blocks = trainer._record, len(find_blocks(trainer.model)[1])
    describe_run(record, trainer.args, trainer.model, num_blocks, trainer.freeze_config, trainer.cache_config)
    # Stages that are decided while training are told by the decisions: runs of one setting may differ in them.
    adaptive = adaptive_policy(trainer.freeze_config.schedule) is not None
    record.planned_stages = [] if adaptive else [vars(stage) for stage in plan_stages_of(trainer)[0]]
    if trainer._run is not None:
        data = trainer._run.data
        record.data = {"train_images": len(data.views), "image_shape": list(data.image_shape)}


def report_callbacks(trainer: Any) -> list[ReportCallback]:
    """Return the callbacks of a trainer that write its record and its report."""
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ReportCallback)]


def install_callbacks(trainer: Any) -> None:
    """Let a trainer write its record and report, and let all its processes save a checkpoint in the same step."""
    everyone, callbacks = trainer._process_groups[0], trainer.callback_handler.callbacks
    jit = next((callback for callback in callbacks if getattr(callback, "jit_manager", None) is not None), None)
    if everyone.size > 1 and jit is not None:
        callbacks.insert(callbacks.index(jit), SynchronizedJITCheckpoint(jit, everyone))
    if not report_callbacks(trainer):
        trainer.add_callback(ReportCallback())
    for callback in report_callbacks(trainer):
        callback.record = trainer._record


def write_model_card(trainer: Any, arguments: dict[str, Any], baseline: Folders | None, seeds: Folders) -> None:
    """Write the model card of a trainer's run, its record and the picture it shows into ``output_dir``.

    Args:
        trainer: The user's trainer.
        arguments: Those of ``Trainer.create_model_card``, by name.
        baseline: ``output_dir`` of a run without freezing, or of several.
        seeds: ``output_dir`` of runs that differ in the seed only.

    Raises:
        RunError: As ``write_card``.
        OSError: A file cannot be written.
    """
    record = trainer._record
    if not record.model:
        describe(trainer)
    record.log_history, record.global_step = list(trainer.state.log_history), trainer.state.global_step
    arguments = {**arguments, "model_id": trainer.args.hub_model_id}
    write_card(Path(trainer.args.output_dir), record, trainer.model, arguments, baseline, seeds)
