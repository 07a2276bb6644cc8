"""What one training step gave, and how two of them differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.views import same_examples

__all__ = ["TOLERANCES", "StepOutcome", "difference", "sleeps"]

#: Largest difference of the loss, relative to it, and of the gradients, relative to all of them. On a CPU equal shapes give
#: equal bits, as a rule. Elsewhere kernels need not be deterministic, and 16 bits round to 3 digits.
TOLERANCES = {"cpu": 1e-6, "16 bits": 2e-2, "other": 1e-3}


@dataclass(frozen=True)
class StepOutcome:
    """What one training step gave.

    Attributes:
        loss: The loss, a scalar.
        gradients: Name of each trainable parameter -> its gradient, or ``None``.
        buffers: Buffers that the step changed, with their new values.
        draws: Whether random numbers were drawn before the hidden states at the split were there.
        repeatable: Whether no random number was drawn at all, and no buffer changed. Then the step gives the same behind more
            frozen blocks, which are in eval mode.
    """

    loss: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    draws: bool = False
    repeatable: bool = False


def sleeps(outcome: StepOutcome) -> bool:
    """Say whether a parameter got a gradient of nothing but zeros: what a step depends on may not show yet.

    It is so of what stands before a head of zeros, or behind a mask that lets nothing through.
    """
    return any(gradient is not None and not bool(gradient.any()) for gradient in outcome.gradients.values())


def _finite(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor, 0.0, 0.0, 0.0)


def difference(live: StepOutcome, cached: StepOutcome, tolerance: float) -> str | None:
    """Say how two steps differ; ``None`` if they agree."""
    expected, found = float(live.loss), float(cached.loss)
    # The conditions say what is right, so that NaN is a difference.
    if not abs(found - expected) <= tolerance * max(abs(expected), 1e-12) and found != expected:
        return f"the loss is {found:.6g} from the cache and {expected:.6g} on images"
    # The step on images may have been taken with fewer frozen blocks.
    gradients = {name: live.gradients[name] for name in cached.gradients}
    for name, gradient in gradients.items():
        other = cached.gradients[name]
        if (gradient is None) != (other is None):
            has, lacks = ("images", "the cache") if other is None else ("the cache", "images")
            return f"the parameter {name} gets a gradient from {has} and none from {lacks}"
    if live.buffers.keys() != cached.buffers.keys() or any(
        not same_examples(value, cached.buffers[name]) for name, value in live.buffers.items()
    ):
        names = sorted({*live.buffers, *cached.buffers})
        return f"buffers of the model ({', '.join(names[:3])}) are updated otherwise from the cache than on images"
    pairs = [(name, g.float(), cached.gradients[name].float()) for name, g in gradients.items() if g is not None]  # type: ignore[union-attr]
    for name, gradient, other in pairs:
        if not torch.equal(gradient.isfinite(), other.isfinite()):
            return f"the gradient of {name} is infinite or no number elsewhere from the cache than on images"
    pairs = [(name, _finite(gradient), _finite(other)) for name, gradient, other in pairs]
    total = sum(float(g.square().sum()) for _, g, _ in pairs) ** 0.5
    for name, gradient, other in pairs:
        if torch.equal(gradient, other):
            continue
        # A parameter whose gradient is all rounding (the bias of keys) is measured by those of the others.
        scale = max(float(gradient.norm()), total * (gradient.numel() / sum(g.numel() for _, g, _ in pairs)) ** 0.5)
        if not float((gradient - other).norm()) <= tolerance * scale:
            return (
                f"the gradient of {name} differs by {float((gradient - other).norm()) / max(scale, 1e-30):.3g} of its size "
                "between cache and images"
            )
    return None
