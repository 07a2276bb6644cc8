"""Predicts the hidden states of a view from those of the base view and from where the view lies in the image."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..model.tokens import take_tokens
from .base import ArraySpec, check_tensors, digest, largest_value
from .cast import check_finite

__all__ = ["WHOLE", "Predictor", "check_geometry", "move_tokens", "token_maps"]

#: The geometry of a view is five numbers, ``(left, top, right, bottom, flip)``. The first four are the edges of the crop as
#: fractions of the image: ``left < right`` of its width, ``top < bottom`` of its height, 0 at its left or upper edge and 1 at
#: the opposite one. ``flip`` is 1.0 if the crop is mirrored left to right, else 0.0. ``data.geometry`` draws such crops and
#: applies them to pixels, ``move_tokens`` applies them to tokens. This geometry shows the whole image. It also stands for
#: views whose geometry is unknown.
WHOLE = (0.0, 0.0, 1.0, 1.0, 0.0)

#: Ridge of the least squares, relative to the mean variance of the predictors: channels of ViTs are nearly collinear.
_RIDGE = 1e-2

_NOT_FITTED = "the predictor has not been fitted"

#: Beyond the geometry of any view.
_FAR = 1e6


def _interpolation(start: Tensor, end: Tensor, size: int) -> Tensor:
    """Return the weights of bilinear interpolation along one axis: ``new[i] = sum_j w[i, j] old[j]``.

    Args:
        start: Where the new axis begins on the old one, whose length is 1, (batch,). It is larger than ``end`` if mirrored.
        end: Where the new axis ends, (batch,).
        size: Number of tokens on the axis.

    Returns:
        (batch, size, size).
    """
    token = torch.arange(size, device=start.device, dtype=start.dtype)
    centre = (token + 0.5) / size
    place = (start[:, None] + centre * (end - start)[:, None]) * size - 0.5
    # What the base does not show is taken from its border.
    place = place.clamp(0, size - 1)
    return (1 - (place[:, :, None] - token).abs()).clamp_min(0)


def _ends(geometry: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    start, end = geometry[:, axis], geometry[:, axis + 2]
    if axis == 1:
        return start, end
    flipped = geometry[:, 4] > 0.5
    return torch.where(flipped, end, start), torch.where(flipped, start, end)


def token_maps(geometry: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return how rows and columns of the token grid move from base views to other views of the same images.

    The resampling is bilinear on the token grid, as by ``torch.nn.functional.grid_sample`` with ``padding_mode="border"``. Crops
    are upright, so rows and columns move apart: ``new[i, j] = sum_ab rows[i, a] columns[j, b] old[a, b]``.

    Args:
        geometry: Geometries of the base view and of the other, (batch, 2, 5); see ``WHOLE``.
        grid: (height, width) of the patches.

    Returns:
        (batch, height, height) and (batch, width, width), dtype of ``geometry``.
    """
    maps = []
    for axis, size in ((1, grid[0]), (0, grid[1])):
        (base_start, base_end), (start, end) = _ends(geometry[:, 0], axis), _ends(geometry[:, 1], axis)
        span = base_end - base_start
        maps.append(_interpolation((start - base_start) / span, (end - base_start) / span, size))
    return maps[0], maps[1]


def move_tokens(patches: Tensor, geometry: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample the patch tokens of base views at the place of other views of the same images; see ``token_maps``.

    Args:
        patches: Patch tokens row by row, (batch, patches, hidden).
        geometry: Geometries of the base view and of the other, (batch, 2, 5); see ``WHOLE``.
        grid: (height, width) of the patches; (1, n) is no grid, and then they stay where they are.

    Returns:
        (batch, patches, hidden), dtype of ``patches``.
    """
    height, width = grid
    if height == 1:
        return patches
    rows, columns = (axis.to(patches.dtype) for axis in token_maps(geometry, grid))
    batch, _, hidden = patches.shape
    moved = torch.bmm(rows, patches.reshape(batch, height, width * hidden)).reshape(batch * height, width, hidden)
    moved = torch.bmm(columns.repeat_interleave(height, 0), moved)
    return moved.reshape(batch, height * width, hidden)


def check_geometry(geometry: Tensor) -> None:
    """Check the geometries of views, (..., 5); see ``WHOLE``. A file may hold anything.

    Raises:
        ValueError: A number is not finite or far from any image, or a view has no extent, so tokens could not be moved.
    """
    spans = geometry[..., 2:4] - geometry[..., :2]
    if not bool((geometry.abs() < _FAR).all()) or not bool((spans > 1 / _FAR).all()):
        raise ValueError("the geometry of a view is not finite, or has no extent")


@dataclass(frozen=True)
class Predictor:
    """Predicts the patch tokens of a view: those of the base view, moved to its place, through one linear map.

    With moved base tokens ``y`` (tokens, hidden) the prediction is ``y A + m``: ``A`` (hidden, hidden) by least squares on
    calibration images, drawn towards the identity by ``pull``, and ``m`` the mean that is left per token position. Prefix
    tokens are predicted as zero.

    Least squares shrinks what it cannot know, and layer normalisation takes the lost length for signal. ``pull`` is against
    that: for crops on DeiT-Tiny at split point 11, ``A`` halfway to the identity leaves more squared error but saves 7% of the
    bits at equal KL.

    Attributes:
        pull: How far ``A`` is drawn to the identity. 0 is least squares, 1 the moved tokens as they are.
        full: Whether ``A`` mixes channels, or is one gain per channel.
        prefix_tokens: Number of leading tokens that are no patches.
        grid: (height, width) of the patches; (1, tokens) if they form no known grid.
        state: SHA-256 of the tensors. Set by ``fit``.
        gains: (hidden, hidden), or (1, hidden) unless ``full``, int8, columns in units of ``scale``. Set by ``fit``.
        scale: (hidden,) float32. Set by ``fit``.
        mean: (patches, hidden) fp16. Set by ``fit``.
    """

    pull: float
    full: bool
    prefix_tokens: int
    grid: tuple[int, int]
    state: str = ""
    gains: Tensor | None = field(default=None, repr=False, compare=False)
    scale: Tensor | None = field(default=None, repr=False, compare=False)
    mean: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: A value is out of range, or the tensors are not those of ``state``.
        """
        if not (isinstance(self.pull, (int, float)) and 0 <= self.pull <= 1):
            raise ValueError(f"pull must be a number from 0 to 1, got {self.pull!r}")
        grid = tuple(self.grid)
        sides = (*grid, self.prefix_tokens + 1)
        if len(grid) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(
                f"grid and prefix_tokens must be whole numbers, got {self.grid!r} and {self.prefix_tokens!r}"
            )
        object.__setattr__(self, "grid", grid)
        if self.tensors() and digest(self.tensors()) != self.state:
            raise ValueError("the predictor's tensors are not those that the configuration names")

    def configuration(self) -> dict[str, Any]:
        """Return what JSON can hold of the predictor."""
        return {
            "pull": self.pull,
            "full": self.full,
            "prefix_tokens": self.prefix_tokens,
            "grid": list(self.grid),
            "state": self.state,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return ``gains``, ``scale`` and ``mean``, or nothing before ``fit``."""
        if self.gains is None or self.scale is None or self.mean is None:
            return {}
        return {"gains": self.gains, "scale": self.scale, "mean": self.mean}

    def check(self, tokens: int, hidden: int) -> None:
        """Check the tensors against hidden states of (tokens, hidden); a file may hold anything.

        Raises:
            ValueError: They do not fit, or are not finite.
        """
        patches = self.grid[0] * self.grid[1]
        # Moving tokens takes the square of a side: no more than the states themselves, some times over.
        large = self.grid[0] > 1 and max(self.grid) ** 2 > 4 * patches * hidden
        if self.prefix_tokens + patches != tokens or large:
            raise ValueError(
                f"{self.prefix_tokens} prefix tokens and a grid of {self.grid[0]} x {self.grid[1]} make no {tokens} tokens"
            )
        specs = {
            "gains": ArraySpec((hidden if self.full else 1, hidden), torch.int8),
            "scale": ArraySpec((hidden,), torch.float32),
            "mean": ArraySpec((patches, hidden), torch.float16),
        }
        check_tensors("the predictor", self.tensors(), specs)

    def abs_bound(self, largest: float) -> float:
        """Return a bound of the absolute values that are predicted from base views up to ``largest``."""
        if self.gains is None or self.scale is None or self.mean is None:
            return math.inf
        weights = self.gains.abs().double().sum(0) * self.scale.abs().double()
        return 1.01 * (largest * largest_value(weights) + largest_value(self.mean))

    def fit(self, base: Tensor, geometry: Tensor, views: Tensor) -> Predictor:
        """Fit ``A`` and ``m``.

        Args:
            base: Base views as they are decoded, (samples, tokens, hidden).
            geometry: Geometries of base view and view, (samples, 2, 5).
            views: Exact hidden states of the views, (samples, tokens, hidden).

        Returns:
            The fitted predictor.

        Raises:
            ValueError: NaN or infinite values.
        """
        check_finite(base)
        check_finite(views)
        moved = move_tokens(base[:, self.prefix_tokens :].double(), geometry.double(), self.grid)
        patches = views[:, self.prefix_tokens :].double()
        hidden = patches.shape[2]
        x = (moved - moved.mean(0)).reshape(-1, hidden)
        y = (patches - patches.mean(0)).reshape(-1, hidden)
        floor = _RIDGE * float(x.square().mean()) + 1e-30
        if self.full:
            # As if there were a hundredth more tokens, of the mean variance of all channels, that predict nothing.
            moment = x.T @ x / len(x) + floor * torch.eye(hidden, dtype=torch.float64)
            gains = torch.linalg.solve(moment, x.T @ y / len(x))
            gains = gains * (1 - self.pull) + self.pull * torch.eye(hidden, dtype=torch.float64)
        else:
            gains = (x * y).sum(0, keepdim=True) / (x.square().sum(0, keepdim=True) + floor * 1e-3)
            gains = gains * (1 - self.pull) + self.pull
        scale = (gains.abs().amax(0) / 127).clamp_min(1e-30).float()
        stored = torch.round(gains / scale).to(torch.int8).contiguous()
        bare = dataclasses.replace(self, state="", gains=None, scale=None, mean=None)
        predicted = bare._apply(moved, stored, scale)
        mean = (patches - predicted).mean(0)
        limit = torch.finfo(torch.float16).max
        tensors = {"gains": stored, "scale": scale, "mean": mean.clamp(-limit, limit).to(torch.float16)}
        return dataclasses.replace(bare, state=digest(tensors), **tensors)

    def linear_map(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return ``A``, (hidden, hidden).

        Raises:
            ValueError: The predictor has not been fitted.
        """
        if self.gains is None or self.scale is None:
            raise ValueError(_NOT_FITTED)
        gains = self.gains.to(device, dtype) * self.scale.to(device, dtype)
        return gains if self.full else gains[0].diag()

    def _apply(self, moved: Tensor, gains: Tensor, scale: Tensor) -> Tensor:
        weights = (gains.to(moved.device, torch.float32) * scale.to(moved.device)).to(moved.dtype)
        return moved @ weights if self.full else moved * weights

    def patches(self, base: Tensor, geometry: Tensor, positions: Tensor | None = None) -> Tensor:
        """Predict the patch tokens of views from base views; see ``__call__``.

        Returns:
            (batch, patches, hidden), or those of them that are kept, dtype of ``base``.

        Raises:
            ValueError: The predictor has not been fitted.
        """
        if self.gains is None or self.scale is None or self.mean is None:
            raise ValueError(_NOT_FITTED)
        moved = move_tokens(base[:, self.prefix_tokens :], geometry.float(), self.grid)
        mean = self.mean.to(base.device, base.dtype)
        if positions is not None:
            # A token moves to several places: all are moved, and those that are kept go through the map.
            kept = positions[:, self.prefix_tokens :].to(base.device) - self.prefix_tokens
            moved, mean = take_tokens(moved, kept), mean[kept]
        return self._apply(moved, self.gains, self.scale).add_(mean)

    def __call__(self, base: Tensor, geometry: Tensor, positions: Tensor | None = None) -> Tensor:
        """Predict views from base views.

        Args:
            base: Base views, (batch, tokens, hidden), on any device.
            geometry: Geometries of base view and view, (batch, 2, 5).
            positions: Which tokens of each sample to predict, (batch, kept) int64, in rising order, with all prefix
                tokens; ``None`` for all.

        Returns:
            (batch, tokens, hidden), or (batch, kept, hidden), dtype of ``base``; zeros for prefix tokens.

        Raises:
            ValueError: The predictor has not been fitted.
        """
        patches = self.patches(base, geometry, positions)
        return torch.cat([torch.zeros_like(base[:, : self.prefix_tokens]), patches], 1)
