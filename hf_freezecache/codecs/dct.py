"""The discrete cosine transform of a grid of tokens, with its frequencies ordered from low to high."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..model.tokens import take_tokens

__all__ = ["dct_matrix", "frequency_order", "inverse_matrices", "to_frequencies", "to_positions"]

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


def inverse_matrices(grid: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return what ``to_positions`` needs: nothing without a grid, else one matrix, else rows, columns and inverse order."""
    height, width = grid
    if height == 1:
        return ()
    order = frequency_order(height, width)
    rows, columns = dct_matrix(height), dct_matrix(width)
    if height * width <= _DENSE_TOKENS:
        return (torch.kron(rows, columns)[order].to(device, dtype),)
    return rows.to(device, dtype), columns.to(device, dtype), torch.argsort(order).to(device)


def to_positions(
    coefficients: Tensor, grid: tuple[int, int], dtype: torch.dtype, *matrices: Tensor, kept: Tensor | None = None
) -> Tensor:
    """Undo ``to_frequencies``, in ``dtype`` and with the ``inverse_matrices`` of it.

    Args:
        coefficients: (samples, hidden, tokens).
        grid: (height, width) of the tokens.
        dtype: Dtype of the result.
        matrices: What ``inverse_matrices`` gave.
        kept: Which tokens of each sample to give, (samples, kept) int64 on the same device; ``None`` for all.

    Returns:
        (samples, hidden, tokens), or (samples, hidden, kept).
    """
    if len(matrices) == 1:
        if kept is None:
            return coefficients.to(dtype) @ matrices[0]
        columns = matrices[0].T.contiguous()[kept]  # those of kept tokens are all that is needed
        return torch.bmm(coefficients.to(dtype), columns.transpose(1, 2))
    values = coefficients
    if matrices:
        rows, columns, order = matrices
        values = coefficients.index_select(2, order).to(dtype).reshape(*coefficients.shape[:2], *grid)
        values = (rows.T @ (values @ columns)).flatten(2)
    return (values if kept is None else take_tokens(values, kept, axis=2)).to(dtype)
