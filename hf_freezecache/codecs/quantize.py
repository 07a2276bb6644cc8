"""Quantization with one scale per channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from .base import (
    FLOATS,
    INTEGERS,
    ArraySpec,
    ArrayStep,
    largest_of_samples,
    largest_value,
)
from .cast import check_finite

__all__ = ["Quantize"]


@dataclass(frozen=True)
class Quantize(ArrayStep):
    """Rounds each channel to whole multiples of a scale that is computed from the channel's largest value in the chunk.

    It is symmetric around zero, so nothing is clipped. It uses no correlation, and is what ``Transform`` is measured against.

    Attributes:
        bits: Bits of a value, 2 to 8; values run from ``-(2**(bits-1) - 1)`` to the same above.
    """

    name: ClassVar[str] = "quantize"
    takes: ClassVar[frozenset[str]] = frozenset({FLOATS})
    gives: ClassVar[str] = INTEGERS
    token_axes: ClassVar[Mapping[str, int] | None] = {"values": 2}
    bits: int = 8

    def __post_init__(self) -> None:
        """Check the number of bits.

        Raises:
            ValueError: The number is not a whole one from 2 to 8.
        """
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be a whole number from 2 to 8, got {self.bits!r}")

    @property
    def largest(self) -> int:
        """Largest absolute value."""
        return int(2 ** (self.bits - 1)) - 1

    @override
    def encoded_specs(self, spec: ArraySpec) -> dict[str, ArraySpec]:
        """Return the specs of ``values`` (samples, hidden, tokens) int8, and of ``scale`` (1, hidden), fp32 or fp64."""
        samples, tokens, hidden = spec.shape
        wide = torch.float64 if spec.dtype == torch.float64 else torch.float32
        return {
            "values": ArraySpec((samples, hidden, tokens), torch.int8),
            "scale": ArraySpec((1, hidden), wide, ragged=True),
        }

    def _scale(self, array: Tensor) -> Tensor:
        wide = array.double() if array.dtype == torch.float64 else array.float()
        peak = wide.abs().amax((0, 1)) if len(array) else wide.new_zeros(array.shape[-1])
        # A scale is at least the smallest normal number: below it, dividing by the scale overflows.
        scale = (peak / self.largest).clamp_min(torch.finfo(wide.dtype).smallest_normal)
        # Rounded up, the scale of the largest floats times the largest value would be infinite.
        return torch.where(torch.isfinite(scale * self.largest), scale, torch.nextafter(scale, scale.new_zeros(())))

    @override
    def encode(self, array: Tensor) -> dict[str, Tensor]:
        check_finite(array)
        scale = self._scale(array)
        values = torch.round(array.to(scale.dtype) / scale)
        return {"values": values.to(torch.int8).transpose(1, 2).contiguous(), "scale": scale[None]}

    @override
    def collatable(self, arrays: dict[str, Tensor], spec: ArraySpec) -> dict[str, Tensor]:
        if len(arrays["scale"]) != 1:
            raise ValueError(f"{len(arrays['scale'])} rows of scales, expected one")
        return {"values": arrays["values"], "scale": arrays["scale"].expand(spec.shape[0], -1).clone()}

    @override
    def decode(self, arrays: Mapping[str, Tensor], dtype: torch.dtype, compute_dtype: torch.dtype | None) -> Tensor:
        scale = arrays["scale"]
        compute_dtype = compute_dtype or scale.dtype
        values = arrays["values"].transpose(1, 2).to(compute_dtype) * scale[:, None].to(compute_dtype)
        return values.to(dtype).contiguous()

    @override
    def abs_bound(self, arrays: Mapping[str, Tensor], largest: float) -> float:
        return largest * largest_value(arrays["scale"])

    @override
    def error_bound(self, array: Tensor) -> Tensor:
        """Return half a scale plus the rounding of the result; (samples,), float64.

        Among subnormals the rounding of the result is coarser than a scale.
        """
        info = torch.finfo(array.dtype)
        scale = self._scale(array).double()
        # Squares of the smallest and largest fp64 numbers are none.
        half_a_scale = (scale / scale.max()).square().mean().sqrt() * scale.max() / 2
        return half_a_scale * (1 + 1e-5) + largest_of_samples(array) * info.eps + info.smallest_normal * info.eps / 2
