"""Casting hidden states to a smaller float dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from .base import (
    DTYPES,
    FLOATS,
    ArraySpec,
    ArrayStep,
    all_finite,
    largest_of_samples,
)

__all__ = ["Cast"]


def check_finite(array: Tensor) -> None:
    """Refuse values that no lossy step can keep within a bound.

    Raises:
        ValueError: The array has NaN or infinite values; the message names their samples and channels.
    """
    if not all_finite(array):
        bad = (~torch.isfinite(array)).nonzero()
        samples = sorted({int(row) for row in bad[:, 0]})[:5]
        channels = sorted({int(row) for row in bad[:, -1]})[:5]
        raise ValueError(
            f"NaN or infinite values in samples {samples} of the chunk, channels {channels}; lossy codecs take finite "
            "values only. Check the images and the model's weights, or use codec='lossless'"
        )


@dataclass(frozen=True)
class Cast(ArrayStep):
    """Rounds to the nearest number of another float dtype.

    Attributes:
        dtype: ``"F16"``, ``"BF16"`` or ``"F32"``. fp16 keeps 11 bits of numbers up to 65504, and bf16 keeps 8 bits of any
            number. bf16 is lossy under bf16 autocast too, since hidden states between blocks are fp32 then.
    """

    name: ClassVar[str] = "cast"
    takes: ClassVar[frozenset[str]] = frozenset({FLOATS})
    gives: ClassVar[str] = FLOATS
    token_axes: ClassVar[Mapping[str, int] | None] = {"values": 1}
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        """Check the dtype.

        Raises:
            ValueError: The dtype is not one of those above.
        """
        if self.dtype not in ("F16", "BF16", "F32"):
            raise ValueError(f"dtype must be 'F16', 'BF16' or 'F32', got {self.dtype!r}")

    @override
    def encoded_specs(self, spec: ArraySpec) -> dict[str, ArraySpec]:
        return {"values": ArraySpec(spec.shape, DTYPES[self.dtype])}

    @override
    def encode(self, array: Tensor) -> dict[str, Tensor]:
        check_finite(array)
        values = array.to(DTYPES[self.dtype])
        # Rounding up may leave the range of either: bf16 makes 65536 of fp16's 65504.
        if not all_finite(values.to(array.dtype)):
            raise ValueError(
                f"values up to {float(array.abs().max()):.5g} do not fit in {self.dtype}, whose largest is "
                f"{torch.finfo(values.dtype).max:.5g}, and back in {array.dtype}. Use another dtype, or codec='lossless'"
            )
        return {"values": values}

    @override
    def decode(self, arrays: Mapping[str, Tensor], dtype: torch.dtype, compute_dtype: torch.dtype | None) -> Tensor:
        return arrays["values"].to(dtype)

    @override
    def abs_bound(self, arrays: Mapping[str, Tensor], largest: float) -> float:
        return largest

    @override
    def error_bound(self, array: Tensor) -> Tensor:
        """Return half a unit in the last place of the largest value, and half the smallest subnormal; (samples,), float64."""
        info = torch.finfo(DTYPES[self.dtype])
        return largest_of_samples(array) * info.eps / 2 + info.smallest_normal * info.eps / 2
