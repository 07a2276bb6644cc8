"""Lets all processes of a run save the checkpoint that a SIGTERM asks for in the same step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .process_group import ProcessGroup

__all__ = ["SynchronizedJITCheckpoint"]


class SynchronizedJITCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Makes ``enable_jit_checkpoint`` act in the same step on every process.

    ``JITCheckpointCallback`` acts on each process when the timer of that process has run out: one saves and stops while the
    others wait for its gradients. This callback holds a request back until all processes know of it, at the beginning of a
    step. It costs one small exchange per step, and is added only if ``enable_jit_checkpoint`` is set.

    Args:
        jit_callback: ``Trainer``'s ``JITCheckpointCallback``. It must come after this callback.
        process_group: All processes of the run.
    """

    def __init__(self, jit_callback: Any, process_group: ProcessGroup) -> None:
        self.process_group = process_group
        self.requested = False
        self.manager = jit_callback.jit_manager
        self.manager._enable_checkpoint = self._request

    def _request(self) -> None:
        self.requested = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass a request on to every process once any process has one."""
        if any(self.process_group.gather(self.requested)):
            self.requested = False
            self.manager.is_checkpoint_requested = True
