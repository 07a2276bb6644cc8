"""What a checkpoint holds beside ``Trainer``'s own files, and restoring its weights."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from ..cache.index import atomic_write
from ..distributed.process_group import ProcessGroup
from ..errors import UnsupportedSetupError
from ..schedules import Stage

__all__ = [
    "STATE_NAME",
    "SavedStage",
    "check_complete",
    "find_checkpoint",
    "last_complete",
    "load_stage",
    "move_scheduler",
    "move_to_world_size",
    "moved_step",
    "restore_weights",
    "save_stage",
]

logger = logging.getLogger(__name__)

#: Written into every checkpoint; ``trainer_state.json`` takes no foreign keys.
STATE_NAME = "freezecache_state.json"
_TRAINER_STATE = "trainer_state.json"
_FORMAT_VERSION = 2


@dataclass(frozen=True)
class SavedStage:
    """What a checkpoint says of the run that saved it.

    Attributes:
        stage: The stage that was being trained; ``None`` for a checkpoint of plain ``Trainer``.
        world_size: Number of processes; ``None`` if the checkpoint does not say.
        progress: Decisions and epochs of the record, see ``report.record``.
    """

    stage: Stage | None = None
    world_size: int | None = None
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def split_point(self) -> int:
        """Number of blocks that were frozen."""
        return 0 if self.stage is None else self.stage.split_point


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
    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return f"{path.name} is cut off"
    for path in sorted(checkpoint.glob("*.pt")) + sorted(checkpoint.glob("*.pth")):
        if not zipfile.is_zipfile(path):  # the directory of a zip file is its end
            return f"{path.name} is cut off"
    weights = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
    if not any(any(checkpoint.glob(pattern)) for pattern in weights):
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


def load_stage(checkpoint: Path) -> SavedStage:
    """Return what a checkpoint says of the run that saved it; nothing if it is one of plain ``Trainer``.

    Raises:
        UnsupportedSetupError: The file is there and cannot be read, or is of another version.
    """
    path = checkpoint / STATE_NAME
    if not path.is_file():
        logger.warning("%s has no %s: taking it for a checkpoint of plain training.", checkpoint, STATE_NAME)
        return SavedStage()
    try:
        state = json.loads(path.read_bytes())
        if state["format_version"] != _FORMAT_VERSION:
            raise ValueError(f"format version {state['format_version']}, expected {_FORMAT_VERSION}")
        return SavedStage(Stage(**state["stage"]), int(state["world_size"]), dict(state["progress"]))
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


def restore_weights(checkpoint: Path, model: nn.Module) -> bool:
    """Load a checkpoint's weights strictly, by the names ``from_pretrained`` understands.

    ``save_pretrained`` writes ViT-like models under legacy names. ``Trainer`` reads them back with
    ``load_state_dict(strict=False)``, which restores almost nothing (transformers issue 43701).

    Returns:
        Whether it was done. Models that are no ``PreTrainedModel``, and folders without a whole model (adapters, say),
        are left to ``Trainer``.

    Raises:
        RuntimeError: The checkpoint is that of another model.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    if not any(any(checkpoint.glob(pattern)) for pattern in ("model*.safetensors", "pytorch_model*.bin")):
        return False
    path = checkpoint / "model.safetensors"
    if path.is_file():
        tensors = load_file(path)
        if tensors.keys() == model.state_dict().keys():  # saved under today's names
            model.load_state_dict(tensors, strict=True)
            return True
    with torch.random.fork_rng(devices=[]):
        # fp32 holds what any 16-bit file holds; each parameter is cast to its own dtype on copying.
        restored, info = type(model).from_pretrained(
            checkpoint, config=model.config, dtype=torch.float32, output_loading_info=True
        )
    wrong = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise RuntimeError(
            f"Checkpoint {checkpoint} does not hold the weights of this {type(model).__name__}: "
            + ", ".join(f"{name.replace('_', ' ')} {keys[:5]}" for name, keys in wrong.items() if keys)
        )
    model.load_state_dict(restored.state_dict(), strict=True)
    return True


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
    checkpoint: str, args: Any, state: Any, *, num_update_steps_per_epoch: int, max_steps: int
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
