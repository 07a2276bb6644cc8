"""Which channels, tokens and augmentations a base view says little about: what augmentation moves most."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..codecs import Predictor
from ..codecs.predictor import WHOLE

__all__ = ["Sensitivity", "measure_sensitivity"]

#: Digits kept of a similarity: what is below is noise of the sample.
_DIGITS = 4


@dataclass(frozen=True)
class Sensitivity:
    """Similarity of augmented views to what their base view predicts of them, at one split point.

    *Similarity* is the share of a view's variance that is explained: ``1 - E[(v - p)^2] / E[(v - m)^2]``, with ``v`` the
    true hidden states of the view, ``m`` their mean over images at each token position, and ``p`` the prediction: base
    tokens resampled at the view's crop and flip, one least-squares gain per channel, means corrected (``codecs.Predictor``,
    fitted on other images). 1: the base view says all; 0: no more than the mean; below 0: it misleads. It is the
    coefficient of determination R^2 of regression, not a cosine. The *sensitive* are the least similar.

    Attributes:
        overall: Of all patch tokens and channels together.
        prefix: Of the prefix tokens, which are predicted by those of the base view through a gain per channel.
        channels: Per channel, over images and patches, (hidden,).
        tokens: Per patch position of the view, over images and channels, (height, width).
        augmentations: Name of an augmentation -> overall similarity of views with this one alone; empty where the
            transform is opaque.
        num_images: Images that it was measured on.
        known_geometry: Whether any view said where it lies in its image.
    """

    overall: float
    prefix: float | None
    channels: tuple[float, ...]
    tokens: tuple[tuple[float, ...], ...]
    augmentations: dict[str, float] = field(default_factory=dict)
    num_images: int = 0
    known_geometry: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Return what ``to_dict`` gave, also after a way through JSON.

        Raises:
            KeyError: Something is missing.
            TypeError: Something is unknown, or no number where one belongs.
            ValueError: The same.
        """
        numbers = {
            "overall": float(data["overall"]),
            "prefix": None if data["prefix"] is None else float(data["prefix"]),
            "channels": tuple(map(float, data["channels"])),
            "tokens": tuple(tuple(map(float, row)) for row in data["tokens"]),
            "augmentations": {str(name): float(value) for name, value in dict(data["augmentations"]).items()},
        }
        return cls(**{**data, **numbers})


def _explained(error: Tensor, variance: Tensor) -> Tensor:
    return 1 - error / variance.clamp_min(1e-30)


def measure_sensitivity(
    base: Tensor,
    views: Tensor,
    geometry: Tensor,
    prefix_tokens: int,
    grid: tuple[int, int],
    augmentations: Mapping[str, float] | None = None,
) -> Sensitivity:
    """Measure similarity on the second half of the samples, with a predictor fitted on the first.

    Args:
        base: (samples, tokens, hidden), base views; at least 4 samples.
        views: The same of other views of the same images.
        geometry: (samples, 2, 5) of base view and view.
        prefix_tokens: Leading tokens that are no patches.
        grid: (height, width) of the patches.
        augmentations: Overall similarities of single augmentations, for the report.

    Raises:
        ValueError: NaN or infinite values.
    """
    middle = len(base) // 2
    predictor = Predictor(0.0, False, prefix_tokens, grid).fit(base[:middle], geometry[:middle], views[:middle])
    exact = views[middle:].double()
    patches = exact[:, prefix_tokens:]
    predicted = predictor(base[middle:].double(), geometry[middle:])[:, prefix_tokens:]
    error = (patches - predicted).square()
    variance = (patches - patches.mean(0)).square()
    by_token = _explained(error.mean((0, 2)), variance.mean((0, 2))).reshape(grid)
    prefix = None
    if prefix_tokens:
        # No grid to move on: a predictor of prefix tokens alone.
        own = Predictor(0.0, False, 0, (1, prefix_tokens))
        start = slice(0, prefix_tokens)
        own = own.fit(base[:middle, start], geometry[:middle], views[:middle, start])
        given = exact[:, start]
        left = (given - own(base[middle:, start].double(), geometry[middle:])).square().mean()
        prefix = round(float(_explained(left, (given - given.mean(0)).square().mean())), _DIGITS)
    return Sensitivity(
        overall=round(float(_explained(error.mean(), variance.mean())), _DIGITS),
        prefix=prefix,
        channels=tuple(
            round(value, _DIGITS) for value in _explained(error.mean((0, 1)), variance.mean((0, 1))).tolist()
        ),
        tokens=tuple(tuple(round(value, _DIGITS) for value in row) for row in by_token.tolist()),
        augmentations=dict(augmentations or {}),
        num_images=len(exact),
        known_geometry=bool((geometry != torch.tensor(WHOLE)).any()),
    )
