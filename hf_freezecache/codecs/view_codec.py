"""Copies: augmented views of a sample, stored as what its base view does not predict of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..model.tokens import take_tokens
from .array_names import BASE, COPY, GEOMETRY, IS_COPY, join_groups, main_array, split_groups
from .base import Buffer
from .codec import Codec
from .predicted_views import PredictedViews
from .predictor import Predictor
from .registry import codec_from_dict

__all__ = ["CopyCodec", "ViewCodec"]


@dataclass(frozen=True)
class CopyCodec:
    """Encodes views beside the base view: directly, or as the residual of their prediction from the decoded base.

    Attributes:
        codec: Codec of the residual, or of the view itself.
        predictor: Predictor of views. ``None`` says that views are stored directly and decoded without their base view.
    """

    codec: Codec
    predictor: Predictor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"name", "configuration"}``, from which ``from_dict`` makes an equal one."""
        predictor = None if self.predictor is None else self.predictor.configuration()
        return {"name": "copy", "configuration": {"codec": self.codec.to_dict(), "predictor": predictor}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CopyCodec:
        """Return the codec that ``to_dict`` and ``tensors`` describe.

        Raises:
            ValueError: They describe no codec of copies.
            UnsupportedSetupError: As ``codec_from_dict``.
        """
        if data.get("name") != "copy":
            raise ValueError(f"expected the codec of copies, got {data.get('name')!r}")
        configuration = data["configuration"]
        groups = split_groups(tensors)
        if not groups.keys() <= {"codec", "predictor"}:
            raise ValueError(f"tensors of {sorted(groups)}, expected those of 'codec' and 'predictor'")
        codec = codec_from_dict(configuration["codec"], groups.get("codec"))
        if configuration["predictor"] is None:
            return cls(codec)
        settings: dict[str, Any] = {**configuration["predictor"], **groups.get("predictor", {})}
        predictor = Predictor(**settings)
        if not predictor.tensors():
            raise ValueError("the predictor of copies has no tensors")
        return cls(codec, predictor)

    def tensors(self) -> dict[str, Tensor]:
        """Return the fitted tensors, as ``codec.<position>.<name>`` and ``predictor.<name>``."""
        predictor = {} if self.predictor is None else self.predictor.tensors()
        return join_groups({"codec": self.codec.tensors(), "predictor": predictor})

    def residual(self, views: Tensor, base: Tensor | None, geometry: Tensor | None) -> Tensor:
        """Return what the codec encodes in place of views, (samples, tokens, hidden) in their dtype; see ``encode``."""
        if self.predictor is None:
            return views
        assert base is not None
        assert geometry is not None
        wide = torch.promote_types(views.dtype, torch.float32)
        residual = views.to(wide, copy=True)
        residual[:, self.predictor.prefix_tokens :].sub_(self.predictor.patches(base.to(wide), geometry))
        return residual.to(views.dtype)

    def encode(self, views: Tensor, base: Tensor | None = None, geometry: Tensor | None = None) -> list[bytes]:
        """Encode a chunk.

        Args:
            views: Hidden states of the views, (samples, tokens, hidden), on the CPU.
            base: Base views as they are decoded, like ``views``; needed with a predictor.
            geometry: Geometries of base view and view, (samples, 2, 5); needed with a predictor.

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
        positions: Tensor | None = None,
    ) -> Tensor:
        """Turn a batch of what ``codec.entropy_decode`` gave as ``COPY`` into hidden states, on the device where it lies.

        Args:
            arrays: Arrays of (batch, ...) by name.
            base: Base views with all tokens, (batch, tokens, hidden); needed with a predictor.
            geometry: Geometries of base view and view, (batch, 2, 5); needed with a predictor.
            dtype: As for ``Codec.dequantize``.
            compute_dtype: As for ``Codec.dequantize``.
            positions: As for ``Codec.dequantize``.

        Returns:
            (batch, tokens, hidden), or (batch, kept, hidden).
        """
        states = self.codec.dequantize(arrays, dtype, compute_dtype, COPY, positions)
        if self.predictor is None:
            return states
        assert base is not None
        assert geometry is not None
        wide = compute_dtype or torch.promote_types(dtype, torch.float32)
        return (states.to(wide) + self.predictor(base.to(wide), geometry, positions)).to(dtype)


@dataclass(frozen=True)
class ViewCodec:
    """Encodes and decodes the views of a cache.

    A packed batch holds arrays of base views, of copies, or of both, under the names of ``array_names``; with a predictor also
    their geometries. An array that only some of the samples have is zero for the others.

    Attributes:
        base: Codec of view 0, and of all views if ``copies`` is ``None``.
        copies: Codec of the other views.
    """

    base: Codec
    copies: CopyCodec | None = None
    _together: PredictedViews | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """See whether predicted views are restored together with what they are predicted from."""
        together = self.copies and PredictedViews.of(self.base, self.copies.codec, self.copies.predictor)
        object.__setattr__(self, "_together", together)

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
        if view == 0 or self.copies is None:
            return self.base.entropy_decode(frames, shape, dtype)
        arrays = self.copies.codec.entropy_decode(frames, shape, dtype, COPY)
        return {**arrays, IS_COPY: torch.ones(int(shape[0]), dtype=torch.bool)}

    def check(self, tokens: int, hidden: int) -> None:
        """Check what was fitted against hidden states of (tokens, hidden); a file may hold anything.

        Raises:
            ValueError: It does not fit, or is not finite.
        """
        self.base.check(tokens, hidden)
        if self.copies is not None:
            self.copies.codec.check(tokens, hidden)
            if self.copies.predictor is not None:
                self.copies.predictor.check(tokens, hidden)

    def abs_bound(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> float:
        """Return a bound of the absolute values that ``dequantize`` gives; see ``Codec.abs_bound``."""
        base = self.base.abs_bound(arrays, dtype) if main_array(BASE) in arrays else 0.0
        if IS_COPY not in arrays:
            return base
        assert self.copies is not None
        residual = self.copies.codec.abs_bound(arrays, dtype, COPY)
        copy = residual + (self.copies.predictor.abs_bound(base) if self.copies.predictor is not None else 0.0)
        # A packed batch may hold samples of both. ``max`` would pass over NaN.
        return copy if math.isnan(copy) else max(base, copy)

    @property
    def _predicts(self) -> bool:
        return self.copies is not None and self.copies.predictor is not None

    def token_axes(self) -> dict[str, int]:
        """Return the axis of the tokens in those arrays of a packed batch that need hold only the tokens to be decoded.

        A view is predicted from all tokens of its base view, so arrays of base views are not among them there.
        """
        axes = {} if self._predicts else self.base.token_axes(BASE)
        return axes if self.copies is None else axes | self.copies.codec.token_axes(COPY)

    def dequantize(
        self,
        arrays: Mapping[str, Tensor],
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Turn a packed batch into hidden states, on the device where it lies; see ``Codec.dequantize``.

        With ``positions``, arrays that ``token_axes`` names hold only these tokens.
        """
        if self._together is not None and self._together.takes(arrays):
            return self._together.decode(arrays, dtype, compute_dtype, positions)
        whole = None if self._predicts else positions
        base = self.base.dequantize(arrays, dtype, compute_dtype, BASE, whole) if main_array(BASE) in arrays else None
        states = None
        if IS_COPY in arrays:
            assert self.copies is not None
            states = self.copies.dequantize(arrays, base, arrays.get(GEOMETRY), dtype, compute_dtype, positions)
        if base is not None and positions is not None and whole is None:
            base = take_tokens(base, positions)
        if states is None or base is None:
            found = base if states is None else states
            assert found is not None
            return found
        return torch.where(arrays[IS_COPY][:, None, None], states, base)
