"""Lets a model's own forward go on with some of the tokens behind its split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedSetupError
from .split import Split
from .tokens import take_tokens
from .withheld import first_tensor, with_first_tensor

__all__ = ["keeping_tokens"]


@contextmanager
def keeping_tokens(split: Split, positions: Tensor | None) -> Iterator[list[torch.Size]]:
    """While active, each forward of a model drops tokens once its first ``k`` blocks have run.

    Args:
        split: The model, split behind at least one block.
        positions: Which tokens of each sample stay, (batch, kept) int64, on any device; ``None`` for all.

    Yields:
        The shapes of the hidden states at the split, one for each forward so far, before tokens are dropped.

    Raises:
        UnsupportedSetupError: From a forward: it runs on other rows than those of the batch.
    """
    seen: list[torch.Size] = []

    def drop(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden_states = first_tensor(output)
        seen.append(hidden_states.shape)
        if positions is None:
            return None
        if hidden_states.dim() != 3 or len(hidden_states) != len(positions):
            raise UnsupportedSetupError(
                f"With token_keep below 1 each row of a batch has tokens of its own, but {type(split.model).__name__} runs on "
                f"hidden states of shape {tuple(hidden_states.shape)} for {len(positions)} rows; expected ({len(positions)}, "
                "tokens, hidden). Call the model on the whole batch, once or several times, or set token_keep=1."
            )
        kept = take_tokens(hidden_states, positions)
        layout = sorted(range(3), key=hidden_states.stride, reverse=True)
        if layout != [0, 1, 2]:  # kernels may round otherwise in another layout
            kept = kept.permute(layout).contiguous().permute([layout.index(place) for place in range(3)])
        return with_first_tensor(output, kept)

    handle = list(split.blocks)[split.split_point - 1].register_forward_hook(drop)
    try:
        yield seen
    finally:
        handle.remove()
