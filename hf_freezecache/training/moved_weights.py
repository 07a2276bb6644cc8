"""Tries whether hidden states of frozen blocks change with weights that train.

Autograd does not see it where the way leads through a comparison: a trained head may make the attention masks of frozen blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..model.probe import first_row
from ..model.split import Split
from .draws import drawing
from .rehearsal_copy import keeping_parameters

__all__ = ["move_with_what_trains"]


def _move_parameters(model: nn.Module) -> None:
    """Give all parameters that train other values, as training will."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
                parameter.add_(torch.randn_like(parameter), alpha=spread + 0.05)


def _differ(states: Tensor, before: Tensor) -> bool:
    # The condition says what is right, so that NaN is a difference. 1e-2: bf16 rounds otherwise for one row than for two.
    return not float((states - before).abs().max()) <= 1e-2 * float(before.abs().max())


def move_with_what_trains(
    trainer: Any, run_frozen: Callable[..., Tensor], split: Split, inputs: Mapping[str, Any], hidden_states: Tensor
) -> bool:
    """Say whether hidden states change with weights that train.

    Args:
        trainer: A copy of the trainer, see ``rehearsal_copy.rehearsing``. Its parameters are as before afterwards.
        run_frozen: ``Runtime.run_frozen``.
        split: The model, split behind the frozen blocks.
        inputs: What the prefix takes, for some rows.
        hidden_states: What it gives for them, (rows, tokens, hidden).
    """
    one = first_row(inputs)
    with keeping_parameters(trainer):
        with drawing(1):
            _move_parameters(split.model)
        with drawing(0):
            moved = run_frozen(split.prefix, **one)
    if not _differ(moved, hidden_states[:1]):
        return False
    with drawing(0):  # they may be random
        return _differ(moved, run_frozen(split.prefix, **one))
