"""Encodes the chunks of a build: in threads beside an accelerator, in one beside blocks on a CPU, or between them where they would share two cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

from ..model.threads import available_cores

__all__ = ["Encoder", "encoding_threads"]

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")

#: With no more cores than these a forward pass waits for a thread beside it as long as that takes. Source: builds of DeiT-Tiny with
#: ``codec="auto"`` behind 6 blocks, on two cores, take 1.23 of rendering and prefix with such a thread, 1.15 without (medians of six).
_FEW_CORES = 2
#: The most threads that encode beside an accelerator. One encodes some hundred chunks of DeiT-Tiny in a second, and fewer of wider models; what it
#: computes takes several cores already.
_MOST_THREADS = 4


def encoding_threads(device: torch.device) -> int:
    """Return how many threads encode chunks while blocks compute on a device; 0 where these need all of few cores."""
    if device.type != "cpu":
        return max(1, min(_MOST_THREADS, available_cores() - 1))
    return 0 if available_cores() <= torch.get_num_threads() <= _FEW_CORES else 1


class Encoder:
    """Runs one job after the other, in a thread of its own unless told otherwise; beside an accelerator some at once.

    Attributes:
        at_once: So many jobs may run at the same time. They begin in the order in which they are submitted.
    """

    def __init__(self) -> None:
        self.at_once = 1
        self._threads: ThreadPoolExecutor | None = None
        self._beside = True

    def follow(self, device: torch.device) -> None:
        """Choose how later jobs run, by where the blocks do, and whether they leave a core."""
        threads = encoding_threads(device)
        self._beside = threads > 0
        if self._threads is None:
            self.at_once = max(1, threads)

    def submit(
        self, job: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> Future[_Result]:
        """Run a job once those that were submitted before have begun; what it raises, ``result()`` raises."""
        if self._beside:
            self._threads = self._threads or ThreadPoolExecutor(self.at_once)
            return self._threads.submit(job, *args, **kwargs)
        future: Future[_Result] = Future()
        try:
            future.set_result(job(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Wait for what was submitted, and end the threads."""
        if self._threads is not None:
            self._threads.shutdown()
