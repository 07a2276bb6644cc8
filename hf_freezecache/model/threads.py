"""Cores of a CPU, and threads for a few rows: those of small models cost more time waiting for each other than they save."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["available_cores", "one_thread_if_small"]

#: Parameters of the largest model whose forward of two rows is not worth several threads: DeiT-Small's 22 M.
_SMALL = 30_000_000


def available_cores() -> int:
    """Return the number of cores that this process may use, as far as the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread_if_small(model: nn.Module) -> Iterator[None]:
    """Run PyTorch on one thread of the CPU while a small model is tried on a few rows; put the number back afterwards."""
    parameters = list(model.parameters())
    small = sum(p.numel() for p in parameters) <= _SMALL and all(p.device.type == "cpu" for p in parameters)
    threads = torch.get_num_threads()
    if small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
