"""Restores views that are predicted, with base view, move, prediction and residual taken together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.tokens import take_tokens
from .array_names import BASE, COPY, GEOMETRY, IS_COPY, main_array, side_array, side_arrays
from .codec import Codec, floats_of, integers_of
from .dct import Axes, Inverse, dct_matrix, frequency_order, inverse_dct, rows_then_columns, to_states
from .predictor import WHOLE, Predictor, token_maps
from .transform import Transform

__all__ = ["PredictedViews"]

#: Patches up to which the move and the DCT are one matrix for each sample. It has the square of the patches: with 576, at 384
#: pixels, three quarters of the states of DeiT-Base, and three times those of DeiT-Tiny.
_MOST_PATCHES = 576


class _Constants(NamedTuple):
    """What is known before any batch; in the dtype of the arithmetic but for ``offset``, ``rows``, ``columns`` and ``whole``.

    Attributes:
        maps: ``B^T`` and ``B^T A``, (2, hidden, hidden).
        mean: ``b'``, coefficients of what the average over the patches leaves of ``b``, (hidden, patches).
        offset: That average, and for predicted views that average through ``A`` and ``m + s``, (2, patches, hidden).
        residual_basis: ``S^T``, (hidden, hidden).
        inverse: ``C``; its matrix is ``C^T``, (patches, patches).
        rows: Inverse DCT of rows at each frequency, (height, patches).
        columns: Inverse DCT of columns at each frequency, (width, patches).
        whole: The geometry of base views, for which a batch has none, (5,).
    """

    maps: Tensor
    mean: Tensor
    offset: Tensor
    residual_basis: Tensor
    inverse: Inverse
    rows: Tensor
    columns: Tensor
    whole: Tensor


@dataclass(frozen=True)
class PredictedViews:
    """Decodes batches of base views and predicted views whose codecs are both transforms, at once.

    With coefficients ``q`` of the base view and ``r`` of the residual, (patches, hidden) from low to high frequency, inverse DCT
    ``C``, bases ``B`` and ``S`` times their step sizes, means ``b`` and ``s``, the move ``M`` of the tokens and the prediction
    ``y A + m``, a view is ``M (C q B^T + b) A + m + C r S^T + s``. Tokens and channels are mixed independently, and ``b``
    has coefficients too, so it is ``(M C) (q + b') (B^T A) + C r S^T + m + s``: four products in place of six and the move. ``M C`` is
    one matrix for each sample. A base view is the same without move, prediction and residual.

    Attributes:
        base: Transform of base views.
        residual: Transform of what the prediction leaves.
        predictor: Predicts views.
    """

    base: Transform
    residual: Transform
    predictor: Predictor
    _cached_constants: dict[Any, _Constants] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, base: Codec, copies: Codec, predictor: Predictor | None) -> PredictedViews | None:
        """Return the decoder for these codecs of base views and of copies; ``None`` if there is none."""
        (first, *_), (second, *_) = base.steps, copies.steps
        alone = all(len(codec.array_steps) == 1 for codec in (base, copies))
        if not (alone and predictor and isinstance(first, Transform) and isinstance(second, Transform)):
            return None
        height, width = predictor.grid
        fits = first.grid == second.grid == predictor.grid and height > 1 and height * width <= _MOST_PATCHES
        return cls(first, second, predictor) if fits else None

    def takes(self, arrays: Mapping[str, Tensor]) -> bool:
        """Say whether a packed batch can be decoded: it has views beyond the first, and no token is stored as it is."""
        exact = (side_array(view, 0, "exact") in arrays for view in (BASE, COPY))
        return IS_COPY in arrays and main_array(BASE) in arrays and not any(exact)

    def _constants(self, dtype: torch.dtype, device: torch.device) -> _Constants:
        key = (dtype, device)
        if key not in self._cached_constants:
            # Products in full precision, then rounded once.
            exact = torch.float64 if device.type == "cpu" else torch.float32
            height, width = self.predictor.grid
            _, basis, undo = self.base.constants(exact, device)
            assert undo.matrix is not None  # of no more than ``_MOST_PATCHES``
            inverse = undo.matrix
            residual_mean, residual_basis, _ = self.residual.constants(exact, device)
            weights = self.predictor.linear_map(exact, device)
            mean = self.base.mean_coefficients(exact, device)
            # The average over tokens moves nowhere, and what is added to the residual neither. Apart, they cost bf16 no digits of the rest.
            level = (basis @ mean[:, 0] * inverse[0, 0]).expand(height * width, -1)
            mean = torch.cat([torch.zeros_like(mean[:, :1]), mean[:, 1:]], 1)
            assert self.predictor.mean is not None
            added = self.predictor.mean.to(device, exact) + residual_mean
            order = frequency_order(height, width)
            rows, columns = dct_matrix(height)[order // width].T, dct_matrix(width)[order % width].T
            self._cached_constants[key] = _Constants(
                torch.stack([basis.T, basis.T @ weights]).to(dtype),
                mean.to(dtype),
                torch.stack([level, level @ weights + added]).to(torch.promote_types(dtype, torch.float32)),
                residual_basis.T.contiguous().to(dtype),
                inverse_dct((height, width), dtype, device),
                rows.to(device, torch.float32),
                columns.to(device, torch.float32),
                torch.tensor(WHOLE, device=device),
            )
        return self._cached_constants[key]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without derived tensors, which a worker process computes anew."""
        return {**self.__dict__, "_cached_constants": {}}

    def decode(
        self,
        arrays: Mapping[str, Tensor],
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None,
        positions: Tensor | None,
    ) -> Tensor:
        """Turn a packed batch that ``takes`` accepts into hidden states; see ``ViewCodec.dequantize``.

        Nothing asks an accelerator which samples are base views: there they take part in all products.
        """
        wide = compute_dtype or torch.promote_types(dtype, torch.float32)
        is_copy, prefix_tokens = arrays[IS_COPY], self.predictor.prefix_tokens
        constants, which = self._constants(wide, is_copy.device), is_copy.long()
        kept = None if positions is None else positions[:, prefix_tokens:].to(is_copy.device) - prefix_tokens

        coefficients = floats_of(arrays, BASE, wide).add_(constants.mean)
        coefficients = torch.bmm(coefficients.transpose(1, 2), constants.maps.index_select(0, which))
        geometry = torch.where(is_copy[:, None, None], arrays[GEOMETRY].float(), constants.whole)
        moves, (_, axes, apart) = token_maps(geometry, self.predictor.grid), constants.inverse
        if not apart:
            patches = self._residuals(floats_of(arrays, COPY, wide), constants, kept)
            patches.baddbmm_(self._moved(*moves, constants, kept), coefficients)
        else:  # as in ``to_states``; products take longer than picking out the copies
            if axes is not None and kept is None:
                rows, columns = (move.to(wide) @ each for move, each in zip(moves, axes[1:], strict=True))
                patches = rows_then_columns(coefficients, Axes(axes.order, rows, columns))
            else:
                patches = torch.bmm(self._moved(*moves, constants, kept), coefficients)
            copies = is_copy.nonzero()[:, 0]
            residual, kept_of_copies = (
                integers_of(arrays, COPY)[copies].to(wide),
                None if kept is None else kept[copies],
            )
            patches.index_add_(0, copies, self._residuals(residual, constants, kept_of_copies))

        states = patches.new_empty((len(is_copy), prefix_tokens + patches.shape[1], patches.shape[2]), dtype=dtype)
        prefix, base_prefix = (side_arrays(arrays, view, 0)["prefix"] for view in (COPY, BASE))
        states[:, :prefix_tokens] = torch.where(is_copy[:, None, None], prefix, base_prefix)
        if kept is None and is_copy.device.type == "cpu" and not torch.compiler.is_compiling():
            # One by one, their offsets need not be copied.
            for sample, copied in enumerate(is_copy.tolist()):
                torch.add(patches[sample], constants.offset[int(copied)], out=states[sample, prefix_tokens:])
        else:
            offset = constants.offset.index_select(0, which) if kept is None else constants.offset[which[:, None], kept]
            states[:, prefix_tokens:] = offset.add_(patches)
        return states

    def _residuals(self, coefficients: Tensor, constants: _Constants, kept: Tensor | None) -> Tensor:
        """Return ``C r S^T``, (batch, patches or kept, hidden), from ``r`` as it is stored, (batch, hidden, patches): zeros from zeros."""
        return to_states(coefficients, constants.residual_basis, self.predictor.grid, constants.inverse, kept)

    def _moved(self, rows: Tensor, columns: Tensor, constants: _Constants, kept: Tensor | None) -> Tensor:
        """Return ``M C`` of each sample, (batch, patches or kept, patches), from how its rows and columns move."""
        dtype = constants.maps.dtype
        rows, columns = (rows @ constants.rows).to(dtype), (columns @ constants.columns).to(dtype)
        if kept is None:
            return (rows[:, :, None] * columns[:, None]).flatten(1, 2)
        width = self.predictor.grid[1]
        return take_tokens(rows, kept // width) * take_tokens(columns, kept % width)
