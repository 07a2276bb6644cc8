"""Finds whether hidden states of frozen blocks change with weights that train.

Autograd does not see it where the way leads through a comparison: a trained head may make the attention masks of frozen blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..model.probe import first_row
from ..model.split import Split
from .draws import drawing
from .rehearsal_copy import keeping_parameters

__all__ = ["move_parameters", "move_with_what_trains", "noting_trained_weights"]

#: How far weights are moved, beside their own spread: a comparison may need a large step.
_STEPS = (0.05, 0.5, 5.0)


class _Uses(TorchFunctionMode):
    """Notes whether an operation takes one of some tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._watched = {id(tensor) for tensor in tensors}
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.found:
            self.found = any(id(leaf) in self._watched for leaf in pytree.tree_leaves((args, kwargs)))
        return func(*args, **kwargs)


@contextmanager
def noting_trained_weights(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Yield what says whether an operation in this context has taken a parameter that trains."""
    with _Uses([parameter for parameter in model.parameters() if parameter.requires_grad]) as uses:
        yield lambda: uses.found


def move_parameters(model: nn.Module, step: float) -> None:
    """Give all parameters that train other values, as training will.

    Args:
        model: The model.
        step: How far they are moved, beside their own spread.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
                parameter.add_(torch.randn_like(parameter), alpha=spread + step)


def _differ(states: Tensor, before: Tensor) -> bool:
    # The condition says what is right, so that NaN is a difference. 1e-2: bf16 rounds otherwise for one row than for two.
    return not float((states - before).abs().max()) <= 1e-2 * float(before.abs().max())


def move_with_what_trains(
    trainer: Any, run_frozen: Callable[..., Tensor], split: Split, inputs: Mapping[str, Any]
) -> bool:
    """Say whether hidden states change with weights that train. It is asked where such weights are used before the split.

    Args:
        trainer: A copy of the trainer, see ``rehearsal_copy.rehearsing``. Its parameters are as before afterwards.
        run_frozen: ``Runtime.run_frozen``.
        split: The model, split behind the frozen blocks.
        inputs: What the prefix takes, for some rows.
    """
    one = first_row(inputs)

    def run() -> Tensor:
        with drawing(0):  # they may be random
            return run_frozen(split.prefix, **one)

    before = run()
    for step in _STEPS:
        with keeping_parameters(trainer):
            with drawing(1):
                move_parameters(split.model, step)
            if _differ(run(), before):
                return True
    return False
