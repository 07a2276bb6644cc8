"""What the head of a model sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from .withheld import first_tensor

__all__ = ["output_and_features"]


def output_and_features(
    model: nn.Module, before_head: Iterable[nn.Module], forward: Callable[[], Any]
) -> tuple[Tensor, Tensor]:
    """Run a forward of a model, and also return what its head saw.

    Args:
        model: The model.
        before_head: Modules that hold no head.
        forward: Runs the model.

    Returns:
        The model's first output, e.g. logits (batch, classes), and the final features (batch, features): the input of
        the last ``nn.Linear`` elsewhere that gives as many values as the output has. Without one, the output.
    """
    inside = {module for part in before_head for module in part.modules()}
    seen: list[tuple[int, Tensor]] = []

    def record(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
        seen.append((module.out_features, args[0]))

    handles = [
        module.register_forward_pre_hook(record)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module not in inside
    ]
    try:
        output = first_tensor(forward())
    finally:
        for handle in handles:
            handle.remove()
    features = [tensor for size, tensor in seen if size == output.shape[-1]]
    return output, (features[-1] if features else output).flatten(1)
