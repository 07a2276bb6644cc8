"""Compiles the blocks of a model one by one, and leaves what surrounds them as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["CompiledBlocks"]

#: Modes of ``torch.compile`` in which outputs lie in memory that the next step uses again.
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


class CompiledBlocks:
    """Runs the forwards of blocks compiled by ``torch.compile``.

    A compiled model would hold the hidden states of one batch, and hooks as they were when it was compiled. A compiled block holds
    neither: hidden states come to it as arguments, and hooks run around it. Blocks of one class share what is compiled.
    Frozen blocks are not compiled, so hidden states are the same whether they are built, found or computed in each step.

    Args:
        blocks: The blocks of the model, in order.
        settings: Keyword arguments of ``torch.compile``; ``None`` compiles nothing.
    """

    def __init__(self, blocks: Iterable[nn.Module], settings: Mapping[str, Any] | None) -> None:
        self._blocks = list(blocks)
        self._settings = settings
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}

    @contextmanager
    def running(self, start: int) -> Iterator[None]:
        """While active, blocks ``[start:]`` run compiled.

        A block whose forward was replaced on the instance runs as it is: who replaced it may replace it again.

        Args:
            start: Number of leading blocks that are left as they are.
        """
        if self._settings is None:
            yield
            return
        if self._settings.get("mode") in _CUDA_GRAPHS and next(self._blocks[0].parameters()).is_cuda:
            # Without it, each block would be a step by itself, in which what the one before gave is no longer needed.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        patched = [block for block in self._blocks[start:] if "forward" not in vars(block)]
        for block in patched:
            if block not in self._forwards:
                self._forwards[block] = torch.compile(block.forward, **self._settings)
            block.forward = self._forwards[block]
        try:
            yield
        finally:
            for block in patched:
                del block.forward
