"""Lets the processes of a run agree on when to save the checkpoint that a SIGTERM asks for."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .process_group import ProcessGroup

__all__ = ["AgreedCheckpoint"]


class AgreedCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Makes ``enable_jit_checkpoint`` act in the same step on every process.

    ``JITCheckpointCallback`` acts on each process when that one's own timer has run out: one saves and stops, while others
    wait for its gradients. Here a request is held back until all processes know of it, at the beginning of a step. Costs one
    small exchange for each step, and only where ``enable_jit_checkpoint`` is set.

    Args:
        jit: ``Trainer``'s ``JITCheckpointCallback``; it must come after this callback.
        processes: All processes of the run.
    """

    def __init__(self, jit: Any, processes: ProcessGroup) -> None:
        self.processes = processes
        self.asked = False
        self.manager = jit.jit_manager
        self.manager._enable_checkpoint = self._ask

    def _ask(self) -> None:
        self.asked = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass a request on once any process has one."""
        if any(self.processes.gather(self.asked)):
            self.asked = False
            self.manager.is_checkpoint_requested = True
