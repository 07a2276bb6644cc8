"""Times the training of an epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..model.devices import finish_device

__all__ = ["Stopwatch"]

_CPU = torch.device("cpu")


class Stopwatch:
    """Times the training of one epoch, without the pauses in which it is evaluated and saved.

    What it has timed is taken at each checkpoint, before it is saved, so that a run that goes on from there knows of it.

    Args:
        step: Steps done when the epoch begins.
        images_per_step: Images of a full step.
        images: Images of the epoch; its last step may have fewer.
        entering_seconds: What entering a stage took just before.
        device: The training device: what it was given is part of the time.
    """

    def __init__(
        self,
        step: int,
        images_per_step: int,
        images: int,
        entering_seconds: float,
        device: torch.device = _CPU,
    ) -> None:
        self._device = device
        self._step, self._images_per_step, self._images = step, images_per_step, images
        self._entering_seconds = entering_seconds
        self._since = time.perf_counter()
        self._pause: float | None = None

    @contextmanager
    def paused(self, waits: bool = True) -> Iterator[None]:
        """Stop the clock while the context is active.

        Args:
            waits: Whether something follows that waits for the device.
        """
        if waits:
            finish_device(self._device)
        self._pause = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - self._pause
            self._pause = None

    def take(self, step: int) -> dict[str, float] | None:
        """Return ``images``, ``seconds`` and ``entering_seconds`` since the last time; ``None`` if no step was done."""
        if step <= self._step:
            return None
        if self._pause is None:
            finish_device(self._device)
        now = time.perf_counter() if self._pause is None else self._pause
        images = min((step - self._step) * self._images_per_step, self._images)
        taken = {"images": images, "seconds": now - self._since, "entering_seconds": self._entering_seconds}
        self._step, self._images, self._since, self._entering_seconds = step, self._images - images, now, 0.0
        return taken
