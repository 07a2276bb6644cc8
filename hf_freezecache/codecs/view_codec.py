"""Copies: augmented views of a sample, stored as what its base view does not predict of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import (
    Buffer,
    Codec,
)
from .predictor import Predictor

__all__ = [
    "COPY",
    "CopyCodec",
    "ViewCodec",
]

#: Prefix of the names of a copy's arrays beside those of its base view.
COPY = "copy."


@dataclass(frozen=True)
class CopyCodec:
    """Encodes views beside the base view: directly, or as the residual of their prediction from the decoded base.

    Attributes:
        codec: Of the residual, or of the view itself.
        predictor: ``None``: views are stored directly, and decoded without their base.
    """

    codec: Codec
    predictor: Predictor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"name", "configuration"}``, from which ``from_dict`` makes an equal one."""
        predictor = None if self.predictor is None else self.predictor.configuration()
        return {"name": "copy", "configuration": {"codec": self.codec.to_dict(), "predictor": predictor}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor], read_codec: Any) -> CopyCodec:
        """Return what ``to_dict`` and ``tensors`` describe; ``read_codec`` is ``codecs.codec_from_dict``.

        Raises:
            ValueError: They describe no copy codec.
        """
        if data.get("name") != "copy":
            raise ValueError(f"expected the codec of copies, got {data.get('name')!r}")
        configuration = data["configuration"]
        parts: dict[str, dict[str, Tensor]] = {"codec": {}, "predictor": {}}
        for name, tensor in tensors.items():
            part, own = name.split(".", 1)
            parts[part][own] = tensor
        codec = read_codec(configuration["codec"], parts["codec"])
        if configuration["predictor"] is None:
            return cls(codec)
        settings: dict[str, Any] = {**configuration["predictor"], **parts["predictor"]}
        predictor = Predictor(**settings)
        if not predictor.tensors():
            raise ValueError("the predictor of copies has no tensors")
        return cls(codec, predictor)

    def tensors(self) -> dict[str, Tensor]:
        """Return the fitted tensors of codec and predictor."""
        own = {} if self.predictor is None else self.predictor.tensors()
        return {f"codec.{name}": t for name, t in self.codec.tensors().items()} | {
            f"predictor.{name}": t for name, t in own.items()
        }

    def residual(self, views: Tensor, base: Tensor | None, geometry: Tensor | None) -> Tensor:
        """Return what the codec encodes of views, (samples, tokens, hidden) in their dtype."""
        if self.predictor is None:
            return views
        assert base is not None
        assert geometry is not None
        wide = torch.promote_types(views.dtype, torch.float32)
        return (views.to(wide) - self.predictor(base.to(wide), geometry)).to(views.dtype)

    def encode(self, views: Tensor, base: Tensor | None = None, geometry: Tensor | None = None) -> list[bytes]:
        """Encode a chunk.

        Args:
            views: (samples, tokens, hidden), on the CPU.
            base: The base views as they are decoded, like ``views``; needed with a predictor.
            geometry: (samples, 2, 5) of base and view; needed with a predictor.

        Raises:
            ValueError: As ``Codec.encode``.
        """
        return self.codec.encode(self.residual(views, base, geometry))

    def dequantize(
        self,
        arrays: Mapping[str, Tensor],
        base: Tensor | None,
        geometry: Tensor | None,
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Turn what ``codec.entropy_decode`` gave of views into hidden states, where it lies.

        Returns:
            (batch, tokens, hidden).
        """
        states = self.codec.dequantize(arrays, dtype, compute_dtype)
        if self.predictor is None:
            return states
        assert base is not None
        assert geometry is not None
        wide = compute_dtype or torch.promote_types(dtype, torch.float32)
        return (states.to(wide) + self.predictor(base.to(wide), geometry)).to(dtype)


def _parts(arrays: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what a packed batch holds of copies, and of base views."""
    copies = {name.removeprefix(COPY): array for name, array in arrays.items() if name.startswith(COPY)}
    return copies, {n: a for n, a in arrays.items() if not n.startswith(COPY) and n not in ("geometry", "is_copy")}


@dataclass(frozen=True)
class ViewCodec:
    """Decodes the views of a cache.

    A packed batch holds, by name: what ``base.entropy_decode`` gave of base views; under ``COPY`` what ``copies.codec.entropy_decode`` gave
    of others; ``geometry`` (batch, 2, 5) where there is a predictor; ``is_copy`` (batch,) bool. What a sample does not have
    is zero.

    Attributes:
        base: Codec of view 0, and of all views if there is no other.
        copies: Codec of the other views.
    """

    base: Codec
    copies: CopyCodec | None = None

    @property
    def lossless(self) -> bool:
        """Whether every bit of every view comes back."""
        return self.base.lossless and (
            self.copies is None or (self.copies.codec.lossless and not self.copies.predictor)
        )

    def encode(
        self, view: int, hidden_states: Tensor, base: Tensor | None = None, geometry: Tensor | None = None
    ) -> list[bytes]:
        """Encode a chunk of one view; see ``CopyCodec.encode``."""
        if view == 0 or self.copies is None:
            return self.base.encode(hidden_states)
        return self.copies.encode(hidden_states, base, geometry)

    def needs_base(self, view: int) -> bool:
        """Say whether a view is decoded with the help of the base view."""
        return view > 0 and self.copies is not None and self.copies.predictor is not None

    def codec(self, view: int) -> Codec:
        """Return the codec whose frames hold a view."""
        return self.base if view == 0 or self.copies is None else self.copies.codec

    def stored_dict(self, view: int) -> dict[str, Any]:
        """Return the description of a view's codec that its shards carry."""
        return self.base.to_dict() if view == 0 or self.copies is None else self.copies.to_dict()

    def num_frames(self, view: int, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the number of frames of hidden states per chunk of (samples, tokens, hidden)."""
        return len(self.codec(view).max_frame_bytes(shape, dtype))

    def entropy_decode(
        self, view: int, frames: Sequence[Buffer], shape: Sequence[int], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Undo entropy coding and packing of one view; see ``Codec.entropy_decode``.

        Raises:
            ValueError: As ``Codec.entropy_decode``.
        """
        arrays = self.codec(view).entropy_decode(frames, shape, dtype)
        if view == 0 or self.copies is None:
            return arrays
        copies = {COPY + name: array for name, array in arrays.items()}
        return {**copies, "is_copy": torch.ones(int(shape[0]), dtype=torch.bool)}

    def check(self, tokens: int, hidden: int) -> None:
        """Check what was fitted against hidden states of (tokens, hidden); what a file holds may be anything.

        Raises:
            ValueError: It does not fit, or is not finite.
        """
        self.base.check(tokens, hidden)
        if self.copies is not None:
            self.copies.codec.check(tokens, hidden)
            if self.copies.predictor is not None:
                self.copies.predictor.check(tokens, hidden)

    def abs_bound(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> float:
        """Return a bound of the absolute values that ``dequantize`` gives, cheaper than to restore; inf or NaN if it knows none."""
        copies, own = _parts(arrays)
        base = self.base.abs_bound(own, dtype) if own else 0.0
        if not copies:
            return base
        assert self.copies is not None
        residual = self.copies.codec.abs_bound(copies, dtype)
        copy = residual + (self.copies.predictor.abs_bound(base) if self.copies.predictor is not None else 0.0)
        # Of both: a packed batch may hold samples of either. ``max`` would pass over NaN.
        return copy if math.isnan(copy) else max(base, copy)

    def dequantize(
        self, arrays: Mapping[str, Tensor], dtype: torch.dtype, compute_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Turn a packed batch into hidden states, on the device where it lies; see ``Codec.dequantize``."""
        copies, own = _parts(arrays)
        if not copies:
            return self.base.dequantize(own, dtype, compute_dtype)
        assert self.copies is not None
        base = self.base.dequantize(own, dtype, compute_dtype) if own else None
        states = self.copies.dequantize(copies, base, arrays.get("geometry"), dtype, compute_dtype)
        return states if base is None else torch.where(arrays["is_copy"][:, None, None], states, base)
