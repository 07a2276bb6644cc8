"""Hard selection keeps some channels, and some tokens of each sample; the rest becomes zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from .base import (
    FLOATS,
    ArraySpec,
    ArrayStep,
)
from .cast import check_finite

__all__ = ["Select"]


@dataclass(frozen=True)
class Select(ArrayStep):
    """Keeps listed channels, and of each sample the patch tokens with the most energy in other channels.

    It is for residuals of predicted views, where zero means "as predicted". Prefix tokens are kept.

    Attributes:
        channels: Channels that are kept for all tokens, in rising order.
        tokens: Number of patch tokens that are kept of each sample, in all channels.
        prefix_tokens: Number of leading tokens that are no patches.
    """

    name: ClassVar[str] = "select"
    takes: ClassVar[frozenset[str]] = frozenset({FLOATS})
    gives: ClassVar[str] = FLOATS
    token_axes: ClassVar[Mapping[str, int] | None] = {"values": 1}
    channels: tuple[int, ...] = ()
    tokens: int = 0
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: A value is out of range.
        """
        object.__setattr__(self, "channels", tuple(self.channels))
        numbers = (*self.channels, self.tokens, self.prefix_tokens)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(
                f"select takes whole numbers, got {self.channels!r}, {self.tokens!r}, {self.prefix_tokens!r}"
            )
        if sorted(set(self.channels)) != list(self.channels):
            raise ValueError(f"channels must rise, got {self.channels!r}")

    @override
    def configuration(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "channels": list(self.channels)}

    @override
    def encoded_specs(self, spec: ArraySpec) -> dict[str, ArraySpec]:
        if len(spec.shape) != 3:
            raise ValueError(f"select takes (samples, tokens, hidden), got {spec.shape}")
        return {"values": spec}

    @override
    def encode(self, array: Tensor) -> dict[str, Tensor]:
        self.encoded_specs(ArraySpec(tuple(array.shape), array.dtype))
        check_finite(array)
        if self.channels and self.channels[-1] >= array.shape[2]:
            raise ValueError(f"select keeps channel {self.channels[-1]}, got {array.shape[2]} channels")
        keep = torch.zeros(array.shape, dtype=torch.bool)
        keep[:, : self.prefix_tokens] = True
        keep[..., list(self.channels)] = True
        patches = array[:, self.prefix_tokens :]
        energy = patches.float().masked_fill(keep[:, self.prefix_tokens :], 0).square().sum(2)
        best = energy.topk(min(self.tokens, energy.shape[1]), dim=1).indices
        keep[:, self.prefix_tokens :][torch.arange(len(array))[:, None], best] = True
        return {"values": array.masked_fill(~keep, 0)}

    @override
    def decode(self, arrays: Mapping[str, Tensor], dtype: torch.dtype, compute_dtype: torch.dtype | None) -> Tensor:
        return arrays["values"].to(dtype)

    @override
    def abs_bound(self, arrays: Mapping[str, Tensor], largest: float) -> float:
        return largest

    @override
    def error_bound(self, array: Tensor) -> Tensor:
        """Return the root-mean-square of what is left out; (samples,), float64."""
        left_out = array.double() - self.encode(array)["values"].double()
        return left_out.flatten(1).square().mean(1).sqrt()
