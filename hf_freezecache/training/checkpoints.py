"""What a checkpoint holds beside ``Trainer``'s own files, and where a run goes on from it."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..cache.index import atomic_write
from ..distributed.process_group import ProcessGroup
from ..errors import UnsupportedSetupError
from ..report.record import RunRecord, restore_progress
from ..schedules import Stage

__all__ = [
    "STATE_NAME",
    "Chosen",
    "SavedStage",
    "announce_stage",
    "check_complete",
    "check_goes_on",
    "find_checkpoint",
    "last_complete",
    "load_stage",
    "move_scheduler",
    "move_to_world_size",
    "moved_step",
    "save_stage",
    "take_over_progress",
]

logger = logging.getLogger(__name__)

#: Written into every checkpoint; ``trainer_state.json`` takes no foreign keys.
STATE_NAME = "freezecache_state.json"
_TRAINER_STATE = "trainer_state.json"
_FORMAT_VERSION = 2


@dataclass(frozen=True)
class Chosen:
    """What ``schedule="auto"`` chose, and what it was asked.

    Attributes:
        asked: Epochs, budget, and what the user had settled; empty if that is not known.
        settings: Fields of ``FreezeConfig`` that were open, by name.
        num_views: Views to store; ``None`` if the user says.
        num_train_epochs: Epochs of the run; ``None`` if ``max_steps`` rules.
        words: Why, and behind a colon what was chosen.
    """

    asked: dict[str, Any]
    settings: dict[str, Any]
    num_views: int | None = None
    num_train_epochs: float | None = None
    words: str = ""


@dataclass(frozen=True)
class SavedStage:
    """What a checkpoint says of the run that saved it.

    Attributes:
        stage: The stage that was being trained; ``None`` for a checkpoint of plain ``Trainer``.
        world_size: Number of processes; ``None`` if the checkpoint does not say.
        progress: Decisions and epochs of the record, see ``report.record``.
        adaptive: What a schedule that decides while training goes by, see ``AdaptiveStages.save``; else empty.
        chosen: What ``schedule="auto"`` chose; ``None`` where the user says.
        block_weights: Which weights of the blocks trained, see ``FreezeConfig``.
    """

    stage: Stage | None = None
    world_size: int | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    adaptive: dict[str, Any] = field(default_factory=dict)
    chosen: Chosen | None = None
    block_weights: str = "all"

    @property
    def split_point(self) -> int:
        """Number of blocks that were frozen."""
        return 0 if self.stage is None else self.stage.split_point


def check_goes_on(saved: Stage | None, frozen: int, stages: Sequence[Stage], stage: Stage) -> None:
    """Refuse a checkpoint of whose frozen blocks the stage in which a run goes on trains some: its optimizer knows them no more.

    Args:
        saved: The stage in which it was saved; ``None`` where the run begins without one.
        frozen: Blocks that were frozen there.
        stages: The stages of the run.
        stage: The one in which it goes on.

    Raises:
        UnsupportedSetupError: It is of another schedule, or its epochs had fewer steps.
    """
    if stage.split_point >= frozen or (saved in stages and saved is not None and saved.index <= stage.index):
        return
    if saved is None or saved not in stages:
        raise UnsupportedSetupError(
            f"The checkpoint was saved with {frozen} frozen blocks, the schedule now asks for {stage.split_point}, without such a "
            "stage before. Resume with the schedule of the interrupted run."
        )
    raise UnsupportedSetupError(
        f"The checkpoint was saved in the stage from epoch {saved.start_epoch}, with {frozen} frozen blocks. Epochs have more steps "
        f"now: the run would go on in the stage from epoch {stage.start_epoch}, and train blocks from {stage.split_point} on. Resume "
        "with the batch size, the gradient accumulation and the rows of the interrupted run."
    )


def save_stage(checkpoint: Path, saved: SavedStage) -> None:
    """Write what ``load_stage`` reads into a checkpoint folder, which is made if need be.

    Raises:
        OSError: The folder cannot be written.
    """
    checkpoint.mkdir(parents=True, exist_ok=True)
    with atomic_write(checkpoint / STATE_NAME) as file:
        file.write((json.dumps({"format_version": _FORMAT_VERSION, **asdict(saved)}) + "\n").encode())


def _flaw(checkpoint: Path) -> str | None:
    """Say what of a checkpoint is missing or cut off, or ``None``.

    ``trainer_state.json`` is written last, once every process has written its random state.
    """
    if (checkpoint / _TRAINER_STATE).is_file():
        try:
            json.loads((checkpoint / _TRAINER_STATE).read_bytes())
        except ValueError:
            return f"{_TRAINER_STATE} is cut off"
    else:
        return f"{_TRAINER_STATE} is missing"
    if (checkpoint / STATE_NAME).is_file():
        try:
            json.loads((checkpoint / STATE_NAME).read_bytes())
        except ValueError:
            return f"{STATE_NAME} is cut off"
    for path in sorted([*checkpoint.glob("*.safetensors"), *checkpoint.glob("*/adapter_model*.safetensors")]):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return f"{path.name} is cut off"
    for path in sorted(checkpoint.glob("*.pt")) + sorted(checkpoint.glob("*.pth")):
        if not zipfile.is_zipfile(path):  # the directory of a zip file is its end
            return f"{path.name} is cut off"
    weights = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
    # An adapter with a name has a folder of its own.
    named = ("*/adapter_model*.safetensors", "*/adapter_model*.bin")
    if not any(any(checkpoint.glob(pattern)) for pattern in (*weights, *named)):
        return "its weights are missing"
    if (checkpoint / "optimizer.pt").is_file() and not any(checkpoint.glob("rng_state*.pth")):
        return "its random states are missing"
    return None


def check_complete(checkpoint: Path) -> None:
    """Refuse a checkpoint whose saving was cut off.

    Raises:
        UnsupportedSetupError: What is missing, and what to do.
    """
    flaw = _flaw(checkpoint)
    if flaw is not None:
        raise UnsupportedSetupError(
            f"The checkpoint {checkpoint} cannot be resumed from: {flaw}; its saving was probably cut off. Resume from an "
            "earlier one, or with resume_from_checkpoint=True from the last that is complete."
        )


def last_complete(output_dir: Path) -> Path | None:
    """Return the last checkpoint in a folder whose saving was not cut off, or ``None``."""
    found = [
        (int(match.group(1)), path)
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    for _, path in sorted(found, reverse=True):
        flaw = _flaw(path)
        if flaw is None:
            return path
        logger.warning("Passing over %s: %s; its saving was cut off.", path, flaw)
    return None


def announce_stage(checkpoint: Path, *, freezes: bool) -> None:
    """Warn if a run goes on from a checkpoint of the other kind: of a run that freezes blocks, or of plain training.

    Args:
        checkpoint: Its folder.
        freezes: Whether this run has a ``freeze_config``.

    Raises:
        UnsupportedSetupError: This run freezes blocks, and the stage cannot be read.
    """
    try:
        stage = load_stage(checkpoint).stage
    except UnsupportedSetupError as error:
        if freezes:
            raise
        logger.warning("%s is a checkpoint of a run with freeze_config, and this run has none. %s", checkpoint, error)
        return
    if freezes and stage is None:
        logger.warning("%s has no %s: taking it for a checkpoint of plain training.", checkpoint, STATE_NAME)
    elif not freezes and stage is not None:
        logger.warning(
            "%s was saved by a run with freeze_config, in its stage %d, which began with epoch %d and freezes %d blocks. This "
            "run has no freeze_config, and trains all blocks.%s",
            checkpoint,
            stage.index,
            stage.start_epoch,
            stage.split_point,
            " The saved optimizer has no frozen blocks in its groups: loading it into one that has them fails. Pass the "
            "freeze_config of that run, or begin a new run with the weights of the checkpoint."
            if stage.split_point
            else "",
        )


def load_stage(checkpoint: Path) -> SavedStage:
    """Return what a checkpoint says of the run that saved it; nothing if it is one of plain ``Trainer``.

    Raises:
        UnsupportedSetupError: The file is there and cannot be read, or is of another version.
    """
    path = checkpoint / STATE_NAME
    if not path.is_file():
        return SavedStage()
    try:
        state = json.loads(path.read_bytes())
        if state["format_version"] != _FORMAT_VERSION:
            raise ValueError(f"format version {state['format_version']}, expected {_FORMAT_VERSION}")
        # Older checkpoints have none of these, or of what was chosen the rates alone.
        adaptive, chosen, weights = dict(state.get("adaptive", {})), state.get("chosen"), state.get("block_weights")
        if chosen is None and state.get("lr_scale") is not None:
            chosen = {"asked": {}, "settings": {"lr_scale": str(state["lr_scale"])}}
        return SavedStage(
            Stage(**state["stage"]),
            int(state["world_size"]),
            dict(state["progress"]),
            adaptive,
            None if chosen is None else Chosen(**chosen),
            str(weights or "all"),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedSetupError(
            f"{path} cannot be read ({error!r}). Resume from another checkpoint, or start anew."
        ) from error


def moved_step(epoch: float, steps_per_epoch: int, accumulation: int) -> tuple[int, int, int]:
    """Return where a run with other steps per epoch goes on.

    Args:
        epoch: ``TrainerState.epoch`` of the checkpoint: whole at the end of an epoch.
        steps_per_epoch: Optimizer steps of this run's epochs.
        accumulation: Batches per optimizer step.

    Returns:
        Optimizer step, whole epochs done, and batches to skip in the next. The last step of an epoch that was not finished
        is never passed over.
    """
    whole = int(epoch)
    done = min(int((epoch - whole) * steps_per_epoch + 1e-6), steps_per_epoch - 1)
    return whole * steps_per_epoch + done, whole, done * accumulation


def move_scheduler(scheduler: Any, step: int) -> None:
    """Set a learning-rate scheduler of a checkpoint to a step of this run, whose number of steps differs."""
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        logger.warning(
            "%s goes on by the steps of the checkpoint, not by those of this run: it is no LambdaLR.",
            type(scheduler).__name__,
        )
        return
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    rates = [base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def find_checkpoint(asked: Any, args: Any, everyone: ProcessGroup) -> Any:
    """Return the checkpoint to resume from: never one whose saving was cut off, which ``Trainer`` would take. Collective.

    Args:
        asked: ``resume_from_checkpoint``: a path, ``True`` for the last one, or ``None`` or ``False``.
        args: ``TrainingArguments``.
        everyone: All processes of the run.

    Raises:
        UnsupportedSetupError: The checkpoint that was asked for is not complete.
        ValueError: There is no complete checkpoint.
    """
    if asked is None or asked is False:
        return asked
    if asked is not True:
        everyone.on_main_process(lambda: check_complete(Path(asked)))
        return asked
    last = everyone.on_main_process(lambda: last_complete(Path(args.output_dir)))
    if last is None:
        raise ValueError(f"No complete checkpoint found in the output directory ({args.output_dir}).")
    return str(last)


def move_to_world_size(
    checkpoint: str, args: Any, state: Any, num_update_steps_per_epoch: int, max_steps: int
) -> tuple[int, int, int] | None:
    """Return where a run goes on from a checkpoint of another number of processes, whose epochs have other steps.

    Args:
        checkpoint: Its folder.
        args: ``TrainingArguments`` of this run.
        state: ``TrainerState`` of the checkpoint.
        num_update_steps_per_epoch: Optimizer steps of this run's epochs.
        max_steps: Optimizer steps of this run.

    Returns:
        Optimizer step, whole epochs done, and batches to skip in the next; ``None`` if the number is the same.
    """
    saved = load_stage(Path(checkpoint))
    if saved.world_size in (None, args.world_size) or state.epoch is None:
        return None
    step, epochs, skip = moved_step(state.epoch, num_update_steps_per_epoch, args.gradient_accumulation_steps)
    logger.warning(
        "%s was saved by %d processes, in step %d: going on with %d in epoch %.2f, now step %d of %d. Samples of an epoch "
        "that had begun may be seen again, or left out.",
        checkpoint,
        saved.world_size,
        state.global_step,
        args.world_size,
        step / num_update_steps_per_epoch,
        step,
        max_steps,
    )
    return step, epochs, 0 if args.ignore_data_skip else skip


def take_over_progress(record: RunRecord, progress: Mapping[str, Any], stages: Sequence[Stage]) -> None:
    """Take over the decisions and epochs of a checkpoint, unless they are those of another schedule.

    Args:
        record: The record of the run that goes on.
        progress: What the checkpoint holds of it.
        stages: The stages of the run.

    Raises:
        RunError: The progress cannot be read.
    """
    restore_progress(record, progress)
    known = {(stage.index, stage.start_epoch, stage.split_point) for stage in stages}
    if any((d.stage, d.start_epoch, d.split_point) not in known for d in record.decisions):
        logger.warning("The checkpoint was saved under another schedule: its stages will be missing from the report.")
        record.decisions, record.epochs = [], []
