"""Codecs decode some of the tokens of each sample as they would decode all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_freezecache.codecs import CopyCodec, Pack, Predictor, Select, Transform, ViewCodec, Zstd, make_codec
from hf_freezecache.codecs.array_names import GEOMETRY
from hf_freezecache.codecs.base import ArrayStep
from hf_freezecache.codecs.codec import Codec
from hf_freezecache.compression.step_search import fit_codec
from hf_freezecache.data.collators import collate_cached
from hf_freezecache.data.kept_tokens import TokenSubset
from hf_freezecache.model.tokens import take_tokens

PREFIX, GRID, HIDDEN, SAMPLES = 2, (4, 6), 8, 5


def states_of(grid: tuple[int, int] = GRID, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(SAMPLES, PREFIX + grid[0] * grid[1], HIDDEN, generator=generator)
    return (states + torch.arange(HIDDEN)).to(dtype)


def positions_of(grid: tuple[int, int] = GRID, keep: float = 0.4) -> Tensor:
    tokens = TokenSubset(0, PREFIX, grid[0] * grid[1], keep)
    return torch.stack([tokens.positions(row, 0, 0) for row in range(SAMPLES)])


def dropped(arrays: dict[str, Tensor], axes: dict[str, int], positions: Tensor) -> dict[str, Tensor]:
    """The arrays as a data set copies them: sample by sample."""
    items = [
        {
            name: array[row].index_select(axes[name] - 1, positions[row]) if name in axes else array[row]
            for name, array in arrays.items()
        }
        for row in range(SAMPLES)
    ]
    return collate_cached(items)


class Blurred(ArrayStep):
    """A step of somebody else's that knows nothing of this: each token is mixed with the one before."""

    name, takes, gives, lossless = "blurred", frozenset({"float array"}), "float array", True

    def encoded_specs(self, spec):
        return {"values": spec}

    def encode(self, array):
        return {"values": array + array.roll(1, 1)}

    def decode(self, arrays, dtype, compute_dtype):
        return (arrays["values"] - arrays["values"].roll(1, 1)).to(dtype)

    def error_bound(self, array):
        return torch.zeros(len(array), dtype=torch.float64)


CODECS = {
    "lossless": make_codec("lossless"),
    "bf16": make_codec("bf16"),
    "int8": make_codec("int8"),
    "int4": make_codec("int4"),
    "transform": make_codec("transform"),
    "select, then int8": Codec((Select((1, 3), 4, PREFIX), *make_codec("int8").steps)),
    "select, then transform": Codec((Select((1, 3), 4, PREFIX), Transform(), Pack(), Zstd())),
    "a step of one's own": Codec((Blurred(), *make_codec("bf16").steps)),
    "a step of one's own, then int8": Codec((Blurred(), *make_codec("int8").steps)),
}


@pytest.mark.parametrize("name", CODECS)
def test_kept_tokens_decode_as_among_all(name) -> None:
    check(CODECS[name], GRID, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("grid", [(1, 24), (36, 30)], ids=["no grid", "more tokens than one matrix takes"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_kept_tokens_of_other_grids_and_dtypes(name, grid, dtype) -> None:
    check(CODECS[name], grid, dtype)


def check(codec: Codec, grid: tuple[int, int], dtype: torch.dtype) -> None:
    codec = fit_codec(codec, states_of(grid, 1, dtype), PREFIX, grid)
    states, positions = states_of(grid, 2, dtype), positions_of(grid)
    states[3, 5] *= 1e6  # a token that the transform stores as it is
    arrays = codec.entropy_decode(codec.encode(states), states.shape, dtype)
    for compute_dtype in (None, torch.bfloat16):
        expected = take_tokens(codec.dequantize(arrays, dtype, compute_dtype), positions)
        found = codec.dequantize(
            dropped(arrays, codec.token_axes(), positions), dtype, compute_dtype, positions=positions
        )
        assert found.shape == (SAMPLES, positions.shape[1], HIDDEN)
        assert found.dtype == dtype
        one_by_one = all(step.token_axes is not None for step in codec.steps if isinstance(step, ArrayStep))
        assert bool(codec.token_axes()) == one_by_one
        if one_by_one:
            assert torch.equal(found, expected)
        else:  # products of other sizes may round otherwise
            rounding = 2e-2 if torch.bfloat16 in (dtype, compute_dtype) else 1e-5
            torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("predicted", [False, True], ids=["direct", "predicted"])
@pytest.mark.parametrize("name", ["int8", "transform"])
def test_kept_tokens_of_views_beside_base_views(name, predicted) -> None:
    base, views, positions = states_of(seed=1), states_of(seed=2), positions_of()
    geometry = torch.tensor([[(0.0, 0.0, 1.0, 1.0, 0.0), (0.2, 0.1, 0.9, 0.8, 1.0)]] * SAMPLES)
    codec = fit_codec(make_codec(name), base, PREFIX, GRID)
    predictor = Predictor(0.2, True, PREFIX, GRID).fit(base, geometry, views) if predicted else None
    copies = CopyCodec(codec, predictor)
    copies = CopyCodec(fit_codec(make_codec(name), copies.residual(views, base, geometry), PREFIX, GRID), predictor)
    both = ViewCodec(codec, copies)
    first = both.entropy_decode(0, codec.encode(base), base.shape, base.dtype)
    decoded = both.dequantize(first, base.dtype)
    second = both.entropy_decode(1, copies.encode(views, decoded, geometry), views.shape, views.dtype)
    if predicted:
        second = {**first, **second, GEOMETRY: geometry}
        first = {**first, GEOMETRY: geometry.new_zeros(geometry.shape)}
    # A batch of both: rows 1 and 3 are copies.
    batch = [{name: array[row] for name, array in (second if row % 2 else first).items()} for row in range(SAMPLES)]
    whole = collate_cached(batch)
    expected = take_tokens(both.dequantize(whole, base.dtype), positions)
    axes = both.token_axes()
    few = collate_cached(
        [
            {n: array.index_select(axes[n] - 1, positions[row]) if n in axes else array for n, array in item.items()}
            for row, item in enumerate(batch)
        ]
    )
    found = both.dequantize(few, base.dtype, positions=positions)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[1], take_tokens(decoded, positions)[1])
    only_base = both.dequantize(dropped(first, axes, positions), base.dtype, positions=positions)
    torch.testing.assert_close(only_base, take_tokens(decoded, positions), rtol=1e-5, atol=1e-5)
