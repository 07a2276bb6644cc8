"""What policies that decide while training look at: a number for each block, measured over an interval of epochs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UnsupportedSetupError

__all__ = ["SIGNALS", "GradientSums", "Signal"]


class Signal(Protocol):
    """Measures the blocks of a model over an interval.

    Attributes:
        steps: Optimizer steps of the interval so far.
    """

    steps: int

    def note_step(self, blocks: Iterable[nn.Module], scaler: Any) -> None:
        """Note a step, once its gradients are there and before the optimizer takes it. It must not wait for the device.

        Args:
            blocks: All blocks of the model.
            scaler: What scales the loss, a ``GradScaler``; ``None`` without fp16.
        """

    def take(self, num_blocks: int) -> list[float]:
        """Return the number of each block, 0 for frozen ones, and begin the next interval."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint within the interval has to hold."""

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Go on within an interval.

        Args:
            tensors: As ``tensors`` returned them.
            steps: Steps of the interval so far.
        """


class GradientSums:
    """The size of the gradient of each block, on average over the steps of an interval.

    Gradients are added up with their signs, as the loss gives them: before they are clipped, over all processes and all batches
    of a step. That takes memory for one more gradient, in fp32, and an addition in each step. The size is the sum of absolute values.
    """

    def __init__(self) -> None:
        """Begin an interval."""
        self.steps = 0
        self._sums: dict[str, Tensor] = {}

    def note_step(self, blocks: Iterable[nn.Module], scaler: Any) -> None:
        """Add the gradients of a step.

        Raises:
            UnsupportedSetupError: No parameter of a block has a gradient.
        """
        named = [
            (f"{place}.{name}", parameter.grad)
            for place, block in enumerate(blocks)
            for name, parameter in block.named_parameters()
            if parameter.grad is not None
        ]
        if not named:
            raise UnsupportedSetupError(
                "The schedule goes by the gradients of the blocks, but after the backward pass of a step none of their parameters "
                "has one. Either the optimizer takes gradients while they are computed, or no block requires any: use another "
                "optimizer, let the blocks train, or give a schedule that is written out."
            )
        gradients = [gradient.float() for _, gradient in named]
        if scaler is not None:
            gradients = _unscaled(gradients, scaler)
        # What a checkpoint held is on the CPU; a parameter may have no gradient in some steps.
        sums = [
            self._sums[name].to(gradient.device) if name in self._sums else torch.zeros_like(gradient)
            for (name, _), gradient in zip(named, gradients, strict=True)
        ]
        torch._foreach_add_(sums, gradients)
        self._sums.update((name, total) for (name, _), total in zip(named, sums, strict=True))
        self.steps += 1

    def take(self, num_blocks: int) -> list[float]:
        """Return the size for each block, and begin the next interval. This waits for the device."""
        sizes = [0.0] * num_blocks
        names, steps = sorted(self._sums), max(self.steps, 1)  # a checkpoint gives them back in another order
        sums = [self._sums[name] for name in names]
        norms = torch.stack([norm.cpu() for norm in torch._foreach_norm(sums, 1)]).tolist() if sums else []
        for name, norm in zip(names, norms, strict=True):
            sizes[int(name.partition(".")[0])] += norm / steps
        self.steps, self._sums = 0, {}
        return sizes

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums: number of the block and name of the parameter -> a tensor of its shape, fp32."""
        return {name: total.cpu().contiguous() for name, total in self._sums.items()}

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Go on within an interval."""
        self._sums, self.steps = dict(tensors), steps


def _unscaled(gradients: Sequence[Tensor], scaler: Any) -> list[Tensor]:
    """Return the gradients of a step under fp16 without the scale of the loss; zeros if one overflowed: the optimizer skips it."""
    factor = scaler.scale(torch.ones((), device=gradients[0].device)).reciprocal()
    finite = torch.stack([gradient.isfinite().all().to(factor.device) for gradient in gradients]).all()
    return [
        torch.where(finite.to(gradient.device), gradient * factor.to(gradient.device), 0.0) for gradient in gradients
    ]


#: Extension point: name of a signal -> what measures it.
SIGNALS: dict[str, type[Signal]] = {"gradients": GradientSums}
