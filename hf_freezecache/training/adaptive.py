"""The stages of a run whose policy decides while it trains: what has been decided, from what, and what a checkpoint keeps of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..adaptive_policies import AdaptivePolicy
from ..distributed.process_group import ProcessGroup
from ..errors import UnsupportedSetupError
from ..stages import Stage, number_stages
from .signals import SIGNALS, Signal

__all__ = ["SIGNAL_NAME", "AdaptiveStages"]

logger = logging.getLogger(__name__)

#: What a signal has gathered when a checkpoint is saved within an interval.
SIGNAL_NAME = "freezecache_signal.safetensors"


@dataclass
class AdaptiveStages:
    """Decides the stages of a run at the ends of intervals.

    Attributes:
        policy: Says how many blocks to freeze.
        num_blocks: Blocks of the model.
        everyone: All processes of the run.
        stages: What is decided so far, in order.
        reasons: Why each of these stages was begun, in a sentence; empty for those that were known before the run.
        history: The signal of each block in each interval so far, in order.
        began: The epoch, from 0, in which the present interval began; ``None`` before the first.
        signal: Measures the present interval.
    """

    policy: AdaptivePolicy
    num_blocks: int
    everyone: ProcessGroup
    stages: list[Stage]
    reasons: list[str] = field(init=False)
    history: list[list[float]] = field(default_factory=list)
    began: int | None = None
    signal: Signal = field(init=False)

    def __post_init__(self) -> None:
        """Begin with what is known before the run."""
        self.reasons = [""] * len(self.stages)
        self.signal = SIGNALS[self.policy.signal]()

    def note_step(self, blocks: Iterable[nn.Module], accelerator: Any) -> None:
        """Note a backward pass; it counts once the gradients of an optimizer step are there.

        Args:
            blocks: All blocks of the model.
            accelerator: accelerate's ``Accelerator``.

        Raises:
            UnsupportedSetupError: See ``Signal.note_step``.
        """
        if accelerator.sync_gradients:
            self.signal.note_step(blocks, accelerator.scaler)

    def begin_epoch(self, epoch: int) -> Sequence[Stage]:
        """Decide, if an interval has ended; return the stages that are known now. Collective.

        Args:
            epoch: The epoch that begins, from 0; or in which a resumed run goes on.
        """
        if self.began is None:
            self.began = epoch
        if epoch - self.began < self.policy.every:
            return self.stages
        # Processes that add in another order might decide otherwise.
        self.history.append(self.everyone.broadcast(self.signal.take(self.num_blocks)))
        self.began, frozen = epoch, self.stages[-1].split_point
        split_point, reason = self.policy.decide(self.history, frozen)
        if split_point > frozen:
            self.stages = [*self.stages, Stage(len(self.stages), epoch, split_point)]
            self.reasons.append(reason)
            logger.info("%d blocks are frozen from epoch %d on. %s", split_point, epoch, reason)
        else:
            logger.info("The number of frozen blocks stays %d in epoch %d.", frozen, epoch)
        return self.stages

    # ---- Checkpoints ----

    def save(self, folder: Path) -> dict[str, Any]:
        """Write what the signal has gathered into a checkpoint, and return the rest, as JSON takes it.

        Args:
            folder: The folder of the checkpoint; it is made if need be.

        Raises:
            OSError: It cannot be written.
        """
        if tensors := self.signal.tensors():
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / SIGNAL_NAME)
        return {
            "policy": repr(self.policy),
            "stages": [[stage.start_epoch, stage.split_point] for stage in self.stages],
            "reasons": self.reasons,
            "history": self.history,
            "began": self.began,
            "steps": self.signal.steps,
            "tensors": len(tensors),
        }

    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            folder: Its folder.
            state: As ``save`` returned it; empty for a checkpoint of a run that decided nothing while it trained.

        Raises:
            UnsupportedSetupError: The state cannot be read.
        """
        if not state:
            return
        try:
            stages = number_stages((int(start), int(point)) for start, point in state["stages"])
            history, began = [list(map(float, row)) for row in state["history"]], state["began"]
            reasons, steps = list(map(str, state["reasons"])), int(state["steps"])
            tensors = load_file(folder / SIGNAL_NAME) if state["tensors"] else {}
            if len(tensors) != state["tensors"] or len(reasons) != len(stages):
                raise ValueError(f"{len(tensors)} tensors and {len(reasons)} reasons for {len(stages)} stages")
        except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
            raise UnsupportedSetupError(
                f"What the schedule had decided cannot be read from {folder}: {error!r}. Resume from another checkpoint, or start "
                "anew."
            ) from error
        self.stages, self.reasons = stages, reasons
        if state["policy"] != repr(self.policy):
            logger.warning(
                "%s was saved by a run with %s, this one has %r: it keeps the stages, and begins to look anew.",
                folder,
                state["policy"],
                self.policy,
            )
            return
        self.history, self.began = history, began
        self.signal.load(tensors, steps)
