"""Batches of a cache that a thread gathers, and pins, while the step before runs."""

from __future__ import annotations

import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .chunk_samples import ChunkSamples

__all__ = ["GatheredBatch", "GathersAhead"]


class GathersAhead:
    """Collates samples of a cache in a thread: ``DataLoader`` goes on, and the batch is there when its step begins.

    Args:
        device: The training device, whose memory the thread pins for.
    """

    def __init__(self, device: torch.device) -> None:
        use: tuple[Any, tuple[Any, ...]] = (None, ())
        if device.type == "cuda":  # otherwise a thread pins by way of the first GPU, and takes memory there
            use = (torch.cuda.set_device, (torch.cuda.current_device() if device.index is None else device.index,))
        self._thread = ThreadPoolExecutor(1, "freezecache-gather", *use)
        weakref.finalize(self, self._thread.shutdown, wait=False)

    def __call__(self, samples: ChunkSamples) -> GatheredBatch:
        """Begin to gather a batch."""
        return GatheredBatch(self, self._thread.submit(samples.batch))

    def pin(self, batch: Future[dict[str, Tensor]]) -> GatheredBatch:
        """Begin to copy a batch to pinned memory, once it is there."""
        return GatheredBatch(self, self._thread.submit(_pinned, batch))


class GatheredBatch:
    """A batch that is there once it is asked for.

    ``DataLoader`` pins it, and accelerate moves it to the device, as they do with tensors; moved, it is a dict.

    Args:
        gathers: Whose thread gathers and pins, one batch after the other.
        batch: Gives the batch.
    """

    def __init__(self, gathers: GathersAhead, batch: Future[dict[str, Tensor]]) -> None:
        self._gathers, self._batch = gathers, batch

    def pin_memory(self) -> GatheredBatch:
        """Return the batch in pinned memory."""
        return self._gathers.pin(self._batch)

    def to(self, device: Any, non_blocking: bool = False) -> dict[str, Tensor]:
        """Return the batch on a device. CUDA copies it in its turn, and the memory is not used again before.

        Raises:
            ValueError: See ``ChunkSamples.batch``.
        """
        batch, non_blocking = self._batch.result(), non_blocking or torch.device(device).type == "cuda"
        return {name: array.to(device, non_blocking=non_blocking) for name, array in batch.items()}


def _pinned(batch: Future[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: array.pin_memory() for name, array in batch.result().items()}
