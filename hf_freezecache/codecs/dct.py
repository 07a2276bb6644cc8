"""The discrete cosine transform of a grid of tokens, with its frequencies ordered from low to high."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.tokens import take_tokens

__all__ = [
    "Axes",
    "Inverse",
    "dct_matrix",
    "frequency_order",
    "inverse_dct",
    "rows_then_columns",
    "to_frequencies",
    "to_positions",
    "to_states",
]

#: Tokens up to which the DCT is undone by one matrix of all frequencies: more arithmetic than rows and columns apart, but in
#: one product, which for 196 tokens takes half the time (measured on a CPU in bf16).
_DENSE_TOKENS = 1024


def dct_matrix(size: int) -> Tensor:
    """Return the orthonormal DCT-II, (size, size) float64; row ``u`` is the ``u``-th cosine.

    Source: Ahmed, Natarajan and Rao, "Discrete Cosine Transform", 1974; with the usual orthonormal scaling.
    """
    position = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * position[None] + 1) * position[:, None] / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def frequency_order(height: int, width: int) -> Tensor:
    """Return the positions of a (height, width) grid of frequencies from low to high, (height * width,) int64."""
    rows = torch.arange(height, dtype=torch.float64)[:, None] / height
    columns = torch.arange(width, dtype=torch.float64)[None] / width
    return torch.argsort((rows.square() + columns.square()).flatten(), stable=True)


def to_frequencies(components: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the coefficients of components, both (samples, hidden, tokens).

    Args:
        components: Values by token, row by row.
        grid: (height, width) of the tokens. A height of 1 says that they form no grid; then nothing changes.
    """
    height, width = grid
    if height == 1:
        return components
    values = components.reshape(*components.shape[:2], height, width)
    rows, columns = dct_matrix(height).to(components.dtype), dct_matrix(width).to(components.dtype)
    order = frequency_order(height, width).expand(*components.shape[:2], -1)
    return (rows @ values @ columns.T).flatten(2).gather(2, order)  # an index takes three times as long


class Axes(NamedTuple):
    """What undoes the DCT of rows and of columns apart.

    Attributes:
        order: Place of each frequency, row by row, among those from low to high, (tokens,) int64.
        rows: Inverse DCT of the rows, (height, height), or of each sample, (batch, height, height).
        columns: The same of the columns.
    """

    order: Tensor
    rows: Tensor
    columns: Tensor


class Inverse(NamedTuple):
    """What undoes the DCT of a grid; nothing for tokens that form none.

    Attributes:
        matrix: One matrix for all frequencies, (tokens, tokens); ``None`` for many tokens.
        axes: Rows and columns apart.
        apart: Whether ``axes`` take less time than ``matrix`` where the last axis is that of the channels.
    """

    matrix: Tensor | None
    axes: Axes | None
    apart: bool


def inverse_dct(grid: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Inverse:
    """Return what ``to_positions`` and ``to_states`` need.

    Rows and columns apart are a seventh of the arithmetic for 196 tokens, but in small products. Those of a CPU's fp32 take a quarter of
    the time of one matrix (DeiT-Tiny, AVX2); those of its bf16 took twice as long, where it has instructions for it.
    """
    height, width = grid
    if height == 1:
        return Inverse(None, None, False)
    order, rows, columns = frequency_order(height, width), dct_matrix(height), dct_matrix(width)
    matrix = torch.kron(rows, columns)[order].to(device, dtype) if height * width <= _DENSE_TOKENS else None
    inverse_rows, inverse_columns = (each.T.contiguous().to(device, dtype) for each in (rows, columns))
    axes = Axes(torch.argsort(order).to(device), inverse_rows, inverse_columns)
    return Inverse(matrix, axes, device.type == "cpu" and dtype.itemsize >= 4)


def to_positions(
    coefficients: Tensor, grid: tuple[int, int], dtype: torch.dtype, inverse: Inverse, kept: Tensor | None = None
) -> Tensor:
    """Undo ``to_frequencies``, in ``dtype``.

    Args:
        coefficients: (samples, hidden, tokens).
        grid: (height, width) of the tokens.
        dtype: Dtype of the result.
        inverse: What ``inverse_dct`` gave.
        kept: Which tokens of each sample to give, (samples, kept) int64 on the same device; ``None`` for all.

    Returns:
        (samples, hidden, tokens), or (samples, hidden, kept).
    """
    if inverse.matrix is not None:
        if kept is None:
            return coefficients.to(dtype) @ inverse.matrix
        columns = inverse.matrix.T.contiguous()[kept]  # those of kept tokens are all that is needed
        return torch.bmm(coefficients.to(dtype), columns.transpose(1, 2))
    values = coefficients
    if inverse.axes is not None:
        axes = inverse.axes
        values = coefficients.index_select(2, axes.order).to(dtype).reshape(*coefficients.shape[:2], *grid)
        values = (axes.rows @ (values @ axes.columns.T)).flatten(2)
    return (values if kept is None else take_tokens(values, kept, axis=2)).to(dtype)


def rows_then_columns(coefficients: Tensor, axes: Axes) -> Tensor:
    """Undo ``to_frequencies`` of coefficients whose last axis is that of the channels.

    Args:
        coefficients: (samples, tokens, hidden), from low to high frequency.
        axes: What ``inverse_dct`` gave, or maps of each sample on top of it.

    Returns:
        (samples, tokens, hidden).
    """
    samples, _, hidden = coefficients.shape
    height, width = axes.rows.shape[-1], axes.columns.shape[-1]
    values = coefficients.index_select(1, axes.order).view(samples, height, width * hidden)
    values = torch.matmul(axes.rows, values).view(samples, height, width, hidden)
    return torch.matmul(axes.columns.unsqueeze(-3), values).flatten(1, 2)


def to_states(
    coefficients: Tensor, basis: Tensor, grid: tuple[int, int], inverse: Inverse, kept: Tensor | None = None
) -> Tensor:
    """Undo ``to_frequencies``, and mix the channels.

    Args:
        coefficients: (samples, hidden, tokens), in the dtype of the basis.
        basis: What each component adds to the channels, (hidden, hidden).
        grid: As for ``to_positions``.
        inverse: As for ``to_positions``.
        kept: As for ``to_positions``.

    Returns:
        (samples, tokens, hidden), or (samples, kept, hidden).
    """
    basis = basis.expand(len(coefficients), -1, -1)
    # Of a part of the tokens one product has as little to do as two.
    if kept is None and inverse.apart and inverse.axes is not None:
        return rows_then_columns(torch.bmm(coefficients.transpose(1, 2), basis), inverse.axes)
    return torch.bmm(to_positions(coefficients, grid, basis.dtype, inverse, kept).transpose(1, 2), basis)
