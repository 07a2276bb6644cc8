"""Measures which channels, tokens and augmentations a base view says little about: what augmentation moves most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..codecs import Predictor
from ..codecs.predictor import WHOLE

__all__ = ["Sensitivity", "measure_sensitivity"]

#: Digits kept of a similarity; further digits are noise of the sample.
_DIGITS = 4


@dataclass(frozen=True)
class Sensitivity:
    """Similarity of augmented views to what their base view predicts of them, at one split point.

    *Similarity* is the share of a view's variance that the prediction accounts for: ``1 - E[(v - p)^2] / E[(v - m)^2]``. Here
    ``v`` are the true hidden states of the view, ``m`` is their mean over images at each token position, and ``p`` is the
    prediction of ``codecs.Predictor``, fitted on other images: base tokens resampled at the view's crop and flip, with one
    least-squares gain per channel, and means corrected. A similarity of 1 says that the base view tells all, 0 that it tells
    no more than the mean, and less than 0 that it misleads. It is the coefficient of determination R^2 of regression, not a
    cosine. Channels and tokens of low similarity are called *sensitive*.

    Attributes:
        overall: Similarity of all patch tokens and channels together.
        prefix: Similarity of the prefix tokens, which are predicted by those of the base view through a gain per channel;
            ``None`` if there are none.
        channels: Similarity of each channel, over images and patches, (hidden,).
        tokens: Similarity at each patch position of the view, over images and channels, (height, width).
        augmentations: Name of an augmentation -> overall similarity of views with this one alone.
        num_images: Number of images that it was measured on.
        known_geometry: Whether any view said where it lies in its image.
    """

    overall: float
    prefix: float | None
    channels: tuple[float, ...]
    tokens: tuple[tuple[float, ...], ...]
    augmentations: dict[str, float] = field(default_factory=dict)
    num_images: int = 0
    known_geometry: bool = True


def _similarity(error: Tensor, variance: Tensor) -> Tensor:
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
        base: Base views, (samples, tokens, hidden); at least 4 samples.
        views: Other views of the same images, (samples, tokens, hidden).
        geometry: Geometries of base view and view, (samples, 2, 5).
        prefix_tokens: Number of leading tokens that are no patches.
        grid: (height, width) of the patches.
        augmentations: Overall similarities of views with a single augmentation, which become part of the result.

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
    by_token = _similarity(error.mean((0, 2)), variance.mean((0, 2))).reshape(grid)
    prefix = None
    if prefix_tokens:
        # No grid to move on: a predictor of prefix tokens alone.
        leading = slice(0, prefix_tokens)
        of_prefix = Predictor(0.0, False, 0, (1, prefix_tokens))
        of_prefix = of_prefix.fit(base[:middle, leading], geometry[:middle], views[:middle, leading])
        tokens = exact[:, leading]
        prefix_error = (tokens - of_prefix(base[middle:, leading].double(), geometry[middle:])).square().mean()
        prefix = round(float(_similarity(prefix_error, (tokens - tokens.mean(0)).square().mean())), _DIGITS)
    return Sensitivity(
        overall=round(float(_similarity(error.mean(), variance.mean())), _DIGITS),
        prefix=prefix,
        channels=tuple(
            round(value, _DIGITS) for value in _similarity(error.mean((0, 1)), variance.mean((0, 1))).tolist()
        ),
        tokens=tuple(tuple(round(value, _DIGITS) for value in row) for row in by_token.tolist()),
        augmentations=dict(augmentations or {}),
        num_images=len(exact),
        known_geometry=bool((geometry != torch.tensor(WHOLE)).any()),
    )
