"""Distortion: how far decoded hidden states lead the suffix astray, measured on held-out images.

There are two measures:

``logits``
    KL(exact logits || logits from decoded states), in nats per image.
``features``
    Mean squared error of the final features, each in units of its variance over the images.

Where the head's predictions say something, the distortion is the larger of the two, under the name ``"logits and features"``.
They do if their mutual information with the image is at least 0.5 nats, or half of what is possible with two classes. While the
head is still random, and for outputs that are no logits of classes, the distortion is ``"features"`` alone. Features that are
the same for all images are left out. If all are, the squared relative error of the states takes their place, as ``"states"``.

The two differ by a factor of 0.9 to 2.1 for the ImageNet head of DeiT-Tiny on Imagenette, at split points 3 to 11 and step sizes
from a quarter to 1.6 standard deviations, so one budget serves for either. A head of few classes that was trained for an epoch
is far less demanding: its KL alone would accept states that are half noise, of which a suffix still in training may have use.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import DataError

__all__ = ["DistortionMeter"]

#: Suffix of a calibration: (samples, tokens, hidden) -> first output and final features, both (samples, ...), on the CPU.
Outputs = Callable[[Tensor], tuple[Tensor, Tensor]]


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp_min(1e-30).log()).sum(-1)


class DistortionMeter:
    """Measures the distortion of decoded states.

    Args:
        exact: Exact states of the images to measure on, (samples, tokens, hidden).
        outputs: Runs the suffix.
        classes: Whether the outputs are logits of exclusive classes. If not, only features are measured.

    Attributes:
        measure: ``"logits and features"``, ``"features"``, or the same with ``"states"``.
        uses_logits: Whether logits count.
        information: Mutual information of predictions and images, in nats.

    Raises:
        DataError: The outputs of the exact states are NaN or infinite.
    """

    def __init__(self, exact: Tensor, outputs: Outputs, classes: bool = True) -> None:
        self.exact = exact
        self._outputs = outputs
        logits, features = (tensor.double() for tensor in outputs(exact))
        finite = torch.isfinite(logits.flatten(1)).all(1) & torch.isfinite(features).all(1)
        if not bool(finite.all()):
            raise DataError(
                f"The model's output is NaN or infinite for {int((~finite).sum())} of {len(finite)} calibration images, at "
                "positions "
                f"{(~finite).nonzero()[:5, 0].tolist()} of those measured, so a codec cannot be judged by it. Check the "
                "model's weights and the images; with fp16 try bf16 or fp32, or use codec='lossless'."
            )
        self._logits = logits
        self._log_probabilities = logits.log_softmax(-1)
        probabilities = self._log_probabilities.exp()
        self.information = float((_entropy(probabilities.mean(0)) - _entropy(probabilities)).mean())
        least = 0.5 * min(1.0, math.log(max(logits.shape[-1], 1)))
        self.uses_logits = classes and logits.dim() == 2 and 0 < least <= self.information
        # A feature that never changes carries nothing: it is left out. If none changes, the states themselves are judged.
        spread = features.var(0, unbiased=False)
        self._varies = spread > 1e-12 * features.square().mean(0).clamp_min(1e-300)
        self._features, self._spread = features, spread[self._varies]
        self.measure = "features" if len(self._spread) else "states"
        if self.uses_logits:
            self.measure = f"logits and {self.measure}"

    def __call__(self, states: Tensor) -> tuple[float, float | None]:
        """Return (distortion, agreement) of states that stand in for the exact ones.

        The distortion is infinite where they make the output NaN or infinite.
        """
        logits, features = (tensor.double() for tensor in self._outputs(states))
        agreement = None
        if logits.shape[-1] > 1:
            agreement = float((logits.argmax(-1) == self._logits.argmax(-1)).double().mean())
        if len(self._spread):
            distortion = ((features - self._features)[:, self._varies].square() / self._spread).mean()
        else:
            distortion = torch.tensor(self.relative_error(states) ** 2, dtype=torch.float64)
        if self.uses_logits:
            exact = self._log_probabilities
            distortion = torch.maximum(distortion, (exact.exp() * (exact - logits.log_softmax(-1))).sum(-1).mean())
        # A sum of rounding errors around zero is zero.
        return max(float(distortion), 0.0) if bool(torch.isfinite(distortion)) else math.inf, agreement

    def relative_error(self, states: Tensor) -> float:
        """Return the root-mean-square error of states over the root-mean-square of the exact ones."""
        error = (states.double() - self.exact.double()).square().mean()
        return float((error / self.exact.double().square().mean().clamp_min(1e-300)).sqrt())

    def worst_error(self, states: Tensor) -> float:
        """Return the largest relative error of a single image."""
        errors = (states.double() - self.exact.double()).flatten(1).square().mean(1)
        return float((errors / self.exact.double().flatten(1).square().mean(1).clamp_min(1e-300)).sqrt().max())
