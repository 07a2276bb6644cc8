"""The discrete cosine transform of tokens, undone by one matrix, or by rows and columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_freezecache.codecs.dct import (
    Axes,
    inverse_dct,
    rows_then_columns,
    to_frequencies,
    to_positions,
    to_states,
)

CPU = torch.device("cpu")


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@given(st.integers(1, 3), st.integers(2, 40), st.integers(1, 40), st.integers(1, 5))
def test_rows_and_columns_give_what_one_matrix_gives(samples, height, width, hidden) -> None:
    grid, values = (height, width), numbers(samples, hidden, height * width)
    axes = inverse_dct(grid, torch.float64, CPU).axes
    apart = rows_then_columns(values.transpose(1, 2), axes)
    torch.testing.assert_close(
        apart.transpose(1, 2), to_positions(values, grid, torch.float64, inverse_dct(grid, torch.float64, CPU))
    )
    torch.testing.assert_close(to_frequencies(apart.transpose(1, 2), grid), values)


def test_maps_of_each_sample() -> None:
    axes, values = inverse_dct((3, 4), torch.float64, CPU).axes, numbers(2, 12, 5)
    flips = torch.eye(3).flip(0), torch.eye(4).flip(0)
    rows, columns = (
        torch.stack([torch.eye(len(flip)), flip]).double() @ each for flip, each in zip(flips, axes[1:], strict=True)
    )
    plain, flipped = rows_then_columns(values, Axes(axes.order, rows, columns))
    torch.testing.assert_close(plain, rows_then_columns(values[:1], axes)[0])
    torch.testing.assert_close(flipped, rows_then_columns(values[1:], axes)[0].flip(0))


@pytest.mark.parametrize("grid", [(1, 12), (3, 4), (40, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_all_tokens_and_of_some(grid, dtype) -> None:
    tokens, basis = grid[0] * grid[1], numbers(6, 6)
    values, kept = numbers(2, 6, tokens), torch.tensor([[0, 3, 7], [1, 2, 11]])
    exact = inverse_dct(grid, torch.float64, CPU)
    expected = to_positions(values, grid, torch.float64, exact).transpose(1, 2) @ basis
    inverse = inverse_dct(grid, dtype, CPU)
    tolerance = {"rtol": 0.05, "atol": 0.3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for some in (None, kept):
        found = to_states(values.to(dtype), basis.to(dtype), grid, inverse, some)
        assert found.dtype == dtype
        wanted = (
            expected if some is None else torch.stack([each[row] for each, row in zip(expected, some, strict=True)])
        )
        torch.testing.assert_close(found.double(), wanted, **tolerance)


@pytest.mark.parametrize(
    ("grid", "dtype"), [((1, 12), torch.float32), ((3, 4), torch.bfloat16), ((3, 4), torch.float16)]
)
def test_where_one_matrix_takes_less_time(grid, dtype) -> None:
    assert not inverse_dct(grid, dtype, CPU).apart
