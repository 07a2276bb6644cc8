"""Finds whether hidden states of frozen blocks change with weights that train.

Autograd does not see it where the way leads through a comparison: a trained head may make the attention masks of frozen blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..model.probe import first_row
from ..model.split import Split
from ..model.withheld import METADATA
from .draws import drawing
from .rehearsal_copy import keeping_parameters
from .step_outcome import StepOutcome

__all__ = ["move_parameters", "move_with_what_trains", "noting_uses", "trained_parameters"]

#: How far weights are moved, beside their own spread: a comparison may need a large step.
_STEPS = (0.05, 0.5, 5.0)


class _Uses(TorchFunctionMode):
    """Notes which of some tensors operations take. What is asked of shape and place alone does not count."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._watched = {id(tensor) for tensor in tensors}
        self.found: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in METADATA and len(self.found) < len(self._watched):
            self.found |= self._watched.intersection(map(id, pytree.tree_leaves((args, kwargs))))
        return func(*args, **kwargs)


def trained_parameters(model: nn.Module, step: StepOutcome) -> list[nn.Parameter]:
    """Return the parameters that training changes: an optimizer passes over those that get no gradient.

    Args:
        model: The model, frozen as in the stage.
        step: What a training step on images gave.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [parameter for name, parameter in named if step.gradients.get(name) is not None]


@contextmanager
def noting_uses(parameters: Sequence[nn.Parameter]) -> Iterator[Callable[[], set[int]]]:
    """Yield what tells which of some parameters operations in this context have taken, each by its ``id``."""
    with _Uses(parameters) as uses:
        yield lambda: uses.found


def move_parameters(parameters: Sequence[nn.Parameter], step: float) -> None:
    """Give parameters other values, as training will.

    Args:
        parameters: What trains.
        step: How far they are moved, beside their own spread.
    """
    with torch.no_grad():
        for parameter in parameters:
            if parameter.is_floating_point():
                spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
                parameter.add_(torch.randn_like(parameter), alpha=spread + step)


def _differ(states: Tensor, before: Tensor) -> bool:
    # The condition says what is right, so that NaN is a difference. 1e-2: bf16 rounds otherwise for one row than for two.
    return not float((states - before).abs().max()) <= 1e-2 * float(before.abs().max())


def move_with_what_trains(
    trainer: Any,
    run_frozen: Callable[..., Tensor],
    split: Split,
    inputs: Mapping[str, Any],
    parameters: Sequence[nn.Parameter],
) -> bool:
    """Say whether hidden states change with weights that train. It is asked where such weights are used before the split.

    Args:
        trainer: A copy of the trainer, see ``rehearsal_copy.rehearsing``. Its parameters are as before afterwards.
        run_frozen: ``Runtime.run_frozen``.
        split: The model, split behind the frozen blocks.
        inputs: What the prefix takes, for some rows.
        parameters: What trains.
    """
    one = first_row(inputs)

    def run() -> Tensor:
        with drawing(0):  # they may be random
            return run_frozen(split.prefix, **one)

    before = run()
    for step in _STEPS:
        with keeping_parameters(trainer):
            with drawing(1):
                move_parameters(parameters, step)
            if _differ(run(), before):
                return True
    return False
