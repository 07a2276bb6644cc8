"""Encodes the chunks of a build: in a thread beside the blocks, or between them where they would share two cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

from ..model.threads import available_cores

__all__ = ["Encoder", "encodes_beside"]

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")

#: With no more cores than these a forward pass waits for a thread beside it as long as that takes. Source: builds of DeiT-Tiny with
#: ``codec="auto"`` behind 6 blocks, on two cores, take 1.23 of rendering and prefix with such a thread, 1.15 without (medians of six).
_FEW_CORES = 2


def encodes_beside(device: torch.device) -> bool:
    """Say whether chunks are encoded in a thread while blocks compute on a device: not where these need all of few cores."""
    threads = torch.get_num_threads()
    return device.type != "cpu" or not available_cores() <= threads <= _FEW_CORES


class Encoder:
    """Runs one job after the other, in a thread of its own unless told otherwise."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._beside = True

    def follow(self, device: torch.device) -> None:
        """Choose how later jobs run, by where the blocks do, and whether they leave a core."""
        self._beside = encodes_beside(device)

    def submit(
        self, job: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> Future[_Result]:
        """Run a job, behind those that were submitted before; what it raises, ``result()`` raises."""
        if self._beside:
            return self._thread.submit(job, *args, **kwargs)
        future: Future[_Result] = Future()
        try:
            future.set_result(job(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Wait for what was submitted, and end the thread."""
        self._thread.shutdown()
