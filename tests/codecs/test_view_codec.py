"""Copies: moving tokens, predicting views from the base view, and decoding what is stored of them."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_freezecache.codecs import (
    PRESETS,
    Codec,
    CopyCodec,
    Pack,
    Predictor,
    Select,
    Transform,
    ViewCodec,
    Zstd,
    codec_from_dict,
    make_codec,
)
from hf_freezecache.codecs.array_names import COPY, GEOMETRY, IS_COPY
from hf_freezecache.codecs.base import ArraySpec, digest
from hf_freezecache.codecs.predictor import WHOLE, move_tokens
from hf_freezecache.compression.step_search import (
    fit_codec,
    roundtrip,
)
from hf_freezecache.data.collators import collate_cached, split_packed
from hf_freezecache.data.kept_tokens import TokenSubset
from hf_freezecache.errors import UnsupportedSetupError
from hf_freezecache.model.tokens import take_tokens

GRID, PREFIX, HIDDEN = (4, 4), 1, 6
TOKENS = PREFIX + 16

_LENGTHS = st.floats(0.1, 1.0)
_PLACES = st.floats(0.0, 1.0)


@st.composite
def geometries(draw) -> tuple[float, ...]:
    """A crop anywhere in the image, mirrored or not."""
    width, height = draw(_LENGTHS), draw(_LENGTHS)
    left, top = draw(_PLACES) * (1 - width), draw(_PLACES) * (1 - height)
    return left, top, left + width, top + height, float(draw(st.booleans()))


def pair(base: tuple[float, ...], view: tuple[float, ...]) -> Tensor:
    return torch.tensor([[base, view]], dtype=torch.float64)


def flipped(geometry: tuple[float, ...]) -> tuple[float, ...]:
    return (*geometry[:4], 1.0 - geometry[4])


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rms(error: Tensor) -> Tensor:
    return error.double().flatten(1).square().mean(1).sqrt()


# ---- Moving tokens ----


def sampled(patches: Tensor, base: tuple[float, ...], view: tuple[float, ...], grid: tuple[int, int]) -> Tensor:
    """The same by ``grid_sample``: for the centre of each token of the view, where in the base view it lies."""
    places = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            across = (column + 0.5) / grid[1]
            across = 1 - across if view[4] else across
            x = view[0] + across * (view[2] - view[0])
            y = view[1] + (row + 0.5) / grid[0] * (view[3] - view[1])
            across, down = (x - base[0]) / (base[2] - base[0]), (y - base[1]) / (base[3] - base[1])
            places.append((2 * (1 - across if base[4] else across) - 1, 2 * down - 1))
    where = torch.tensor(places, dtype=patches.dtype).reshape(1, *grid, 2)
    picture = patches.reshape(1, *grid, -1).permute(0, 3, 1, 2)
    moved = torch.nn.functional.grid_sample(picture, where, "bilinear", "border", align_corners=False)
    return moved.permute(0, 2, 3, 1).reshape(patches.shape)


@given(geometries(), geometries(), st.sampled_from([(2, 2), (3, 5), (5, 3), (14, 14), (4, 1)]), st.integers(0, 99))
def test_moving_is_grid_sample(base, view, grid, seed) -> None:
    patches = noise(1, grid[0] * grid[1], 3, seed=seed)
    moved = move_tokens(patches, pair(base, view), grid)
    torch.testing.assert_close(moved, sampled(patches, base, view, grid), rtol=0, atol=1e-9)


@given(st.lists(st.tuples(geometries(), geometries()), min_size=2, max_size=4))
def test_each_sample_of_a_batch_is_moved_by_its_own_geometry(pairs) -> None:
    patches = noise(len(pairs), 12, 3)
    geometry = torch.cat([pair(*each) for each in pairs])
    together = move_tokens(patches, geometry, (3, 4))
    alone = [move_tokens(patches[[i]], geometry[[i]], (3, 4)) for i in range(len(pairs))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


@given(geometries(), st.sampled_from([torch.float32, torch.float64]))
def test_views_at_the_place_of_the_base_view_are_not_moved(place, dtype) -> None:
    patches = noise(1, 15, 3, dtype=dtype)
    moved = move_tokens(patches, pair(place, place), (3, 5))
    assert moved.dtype == dtype
    torch.testing.assert_close(moved, patches, rtol=1e-5, atol=1e-5)
    whole = torch.stack([torch.tensor([WHOLE]).expand(1, -1)] * 2, 1)
    torch.testing.assert_close(move_tokens(patches, whole, (3, 5)), patches, rtol=1e-6, atol=1e-6)


@given(geometries(), geometries())
def test_flips(base, view) -> None:
    patches = noise(1, 15, 3)
    columns_reversed = patches.reshape(1, 3, 5, 3).flip(2).reshape(1, 15, 3)
    once = move_tokens(patches, pair(WHOLE, flipped(WHOLE)), (3, 5))
    torch.testing.assert_close(once, columns_reversed, rtol=0, atol=1e-12)
    twice = move_tokens(once, pair(WHOLE, flipped(WHOLE)), (3, 5))
    torch.testing.assert_close(twice, patches, rtol=0, atol=1e-12)
    # Base and view both flipped: as neither, with the base's columns and the result's reversed.
    moved = move_tokens(columns_reversed, pair(flipped(base), flipped(view)), (3, 5))
    unflipped = move_tokens(patches, pair(base, view), (3, 5)).reshape(1, 3, 5, 3).flip(2).reshape(1, 15, 3)
    torch.testing.assert_close(moved, unflipped, rtol=0, atol=1e-9)
    same = move_tokens(patches, pair(flipped(base), flipped(base)), (3, 5))
    torch.testing.assert_close(same, patches, rtol=0, atol=1e-9)


@given(geometries(), geometries())
def test_tokens_without_a_grid_stay_where_they_are(base, view) -> None:
    patches = noise(1, 7, 3)
    assert torch.equal(move_tokens(patches, pair(base, view), (1, 7)), patches)


@given(geometries(), st.sampled_from([(14, 14), (7, 10)]))
def test_the_ramp_of_a_picture_becomes_the_ramp_of_the_crop(view, grid) -> None:
    """Tokens hold their own x and y in the image: moved, they hold the x and y of the crop's tokens.

    Except beyond the centres of the outermost tokens of the base, where its border is all there is.
    """
    height, width = grid
    rows, columns = (torch.arange(size, dtype=torch.float64).add(0.5) / size for size in grid)
    ramp = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)], -1)
    x, y = view[0] + columns * (view[2] - view[0]), view[1] + rows * (view[3] - view[1])
    x, y = (x.flip(0) if view[4] else x).clamp(0.5 / width, 1 - 0.5 / width), y.clamp(0.5 / height, 1 - 0.5 / height)
    expected = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1)
    moved = move_tokens(ramp.reshape(1, -1, 2), pair(WHOLE, view), grid)
    torch.testing.assert_close(moved.reshape(height, width, 2), expected, rtol=0, atol=1e-9)


# ---- The predictor ----


def some_geometry(samples: int, seed: int = 0) -> Tensor:
    """Base views that show all, and crops of a quarter to all, half of them flipped, (samples, 2, 5) float32."""
    generator = torch.Generator().manual_seed(seed)
    sides = 0.5 + 0.5 * torch.rand(samples, 2, generator=generator)
    corner = torch.rand(samples, 2, generator=generator) * (1 - sides)
    flip = torch.randint(0, 2, (samples, 1), generator=generator).float()
    return torch.stack([torch.tensor([WHOLE]).expand(samples, -1), torch.cat([corner, corner + sides, flip], 1)], 1)


MIXTURE = noise(HIDDEN, HIDDEN, seed=1) / HIDDEN**0.5
POSITIONS = noise(TOKENS - PREFIX, HIDDEN, seed=2)


def related(samples: int, seed: int = 0, error: float = 0.2, dtype: torch.dtype = torch.float32):
    """Base views, geometry, and views that are a linear map of the moved base, a mean per position, and noise."""
    base = noise(samples, TOKENS, HIDDEN, seed=seed + 10)
    geometry = some_geometry(samples, seed)
    views = noise(samples, TOKENS, HIDDEN, seed=seed + 11) * error
    views[:, PREFIX:] += move_tokens(base[:, PREFIX:], geometry.double(), GRID) @ MIXTURE + POSITIONS
    return base.to(dtype), geometry, views.to(dtype)


def test_a_linear_map_of_the_moved_base_is_recovered() -> None:
    base, geometry, views = related(200, error=0.0)
    predictor = Predictor(0.0, True, PREFIX, GRID).fit(base, geometry, views)
    weights = predictor.gains.double() * predictor.scale.double()
    # int8 columns, and a ridge of a hundredth.
    torch.testing.assert_close(weights, MIXTURE, rtol=0, atol=0.02)
    torch.testing.assert_close(predictor.mean.double(), POSITIONS, rtol=0, atol=0.05)
    base, geometry, views = related(50, seed=5, error=0.0)
    error = rms((predictor(base, geometry) - views)[:, PREFIX:])
    assert bool((error < 0.03 * rms(views[:, PREFIX:])).all())


def test_one_gain_per_channel_is_recovered_and_pulled_to_one() -> None:
    base, geometry, _ = related(200)
    gains = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 0.25])
    views = torch.zeros_like(base)
    views[:, PREFIX:] = move_tokens(base[:, PREFIX:], geometry, GRID) * gains
    for pull in (0.0, 0.5, 1.0):
        predictor = Predictor(pull, False, PREFIX, GRID).fit(base, geometry, views)
        assert predictor.gains.shape == (1, HIDDEN)
        expected = (1 - pull) * gains + pull
        torch.testing.assert_close(predictor.gains[0] * predictor.scale, expected, rtol=0.02, atol=0.002)


@pytest.mark.parametrize("full", [True, False])
def test_pulled_all_the_way_the_moved_tokens_are_the_prediction(full) -> None:
    base, geometry, views = related(20)
    predictor = Predictor(1.0, full, PREFIX, GRID).fit(base, geometry, views)
    moved = move_tokens(base[:, PREFIX:], geometry, GRID) + predictor.mean.float()
    torch.testing.assert_close(predictor(base, geometry)[:, PREFIX:], moved, rtol=1e-5, atol=1e-5)
    # The mean is that of what is left.
    left = (views[:, PREFIX:] - predictor(base, geometry)[:, PREFIX:]).mean(0)
    assert float(left.abs().max()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_prefix_tokens_are_predicted_as_zero_in_the_dtype_of_the_base(dtype) -> None:
    base, geometry, views = related(20)
    predicted = Predictor(0.0, True, PREFIX, GRID).fit(base, geometry, views)(base.to(dtype), geometry)
    assert predicted.dtype == dtype
    assert predicted.shape == base.shape
    assert bool((predicted[:, :PREFIX] == 0).all())
    assert bool((predicted[:, PREFIX:] != 0).any())


@pytest.mark.parametrize("full", [True, False])
def test_a_base_that_says_nothing_predicts_nothing_and_costs_nothing(full) -> None:
    base, geometry, _ = related(600)
    views = noise(600, TOKENS, HIDDEN, seed=77, dtype=torch.float32) + 3
    predictor = Predictor(0.0, full, PREFIX, GRID).fit(base[:400], geometry[:400], views[:400])
    assert float((predictor.gains * predictor.scale).abs().max()) < 0.1
    transform = make_codec("transform")
    direct = fit_codec(transform, views[:400], PREFIX, GRID)
    step = direct.step_size
    copies = CopyCodec(transform, predictor)
    residual = copies.residual(views, base, geometry)
    own = fit_codec(transform, residual[:400], PREFIX, GRID)
    own = own.with_step_size(step)
    _, bits = roundtrip(direct, views[400:], 100)
    _, residual_bits = roundtrip(own, residual[400:], 100)
    assert residual_bits == pytest.approx(bits, rel=0.02)
    # And where it says a lot, much is saved.
    base, geometry, views = related(600, error=0.05)
    predictor = Predictor(0.0, True, PREFIX, GRID).fit(base[:400], geometry[:400], views[:400])
    residual = CopyCodec(transform, predictor).residual(views, base, geometry)
    assert roundtrip(own, residual[400:], 100)[1] < 0.8 * roundtrip(own, views[400:], 100)[1]


def test_constant_and_nonfinite_states() -> None:
    base, geometry, views = related(10)
    flat = Predictor(0.0, True, PREFIX, GRID).fit(torch.zeros_like(base), geometry, torch.ones_like(views))
    torch.testing.assert_close(flat(base, geometry)[:, PREFIX:], torch.ones_like(views[:, PREFIX:]), rtol=0, atol=1e-3)
    for bad in (float("nan"), float("inf")):
        spoiled = base.clone()
        spoiled[3, 2, 1] = bad
        for given_base, given_views in ((spoiled, views), (base, spoiled)):
            with pytest.raises(ValueError, match="NaN or infinite"):
                Predictor(0.0, True, PREFIX, GRID).fit(given_base, geometry, given_views)


def test_a_predictor_must_be_fitted_and_well_formed() -> None:
    base, geometry, _ = related(4)
    with pytest.raises(ValueError, match="has not been fitted"):
        Predictor(0.0, True, PREFIX, GRID)(base, geometry)
    for pull in (-0.1, 1.1, "much"):
        with pytest.raises(ValueError, match="pull must be a number from 0 to 1"):
            Predictor(pull, True, PREFIX, GRID)
    for grid, prefix in (((0, 4), 1), ((4,), 1), ((4, 4.0), 1), ((4, 4), -1)):
        with pytest.raises(ValueError, match="whole numbers"):
            Predictor(0.0, True, prefix, grid)


# ---- Codecs of copies ----

KINDS = ["residual", "direct", "selected"]


def copy_codec(kind: str, dtype: torch.dtype = torch.float32, step: float = 0.1) -> CopyCodec:
    """A codec that was fitted on other samples than the tests encode."""
    base, geometry, views = related(60, seed=3, dtype=dtype)
    predictor = None
    if kind != "direct":
        predictor = Predictor(0.0, True, PREFIX, GRID).fit(base, geometry, views)
    residual = CopyCodec(PRESETS["lossless"], predictor).residual(views, base, geometry)
    transform = Transform(step=step).fit(residual, PREFIX, GRID, rotate=kind != "selected")
    first = (Select((1, 4), 3, PREFIX),) if kind == "selected" else ()
    return CopyCodec(Codec((*first, transform, Pack(), Zstd(matches="skip"))), predictor)


def base_codec(name: str) -> Codec:
    return fit_codec(make_codec(name), related(60, seed=3)[0], PREFIX, GRID)


def decoded(codec: Codec, states: Tensor) -> Tensor:
    return codec.decode(codec.encode(states), states.shape, states.dtype)


def packed_chunk(codec: ViewCodec, base: Tensor, geometry: Tensor, views: Tensor, view: int) -> dict[str, Tensor]:
    """What a reader unpacks of a chunk of a view."""
    base_frames = codec.encode(0, base)
    if view == 0:
        return codec.entropy_decode(0, base_frames, base.shape, base.dtype)
    frames = codec.encode(view, views, decoded(codec.base, base), geometry)
    arrays = codec.entropy_decode(view, frames, views.shape, views.dtype)
    if codec.needs_base(view):
        arrays = {**codec.entropy_decode(0, base_frames, base.shape, base.dtype), **arrays, GEOMETRY: geometry}
    return arrays


@pytest.mark.by_default(9)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base_name", ["lossless", "int4", "transform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_views_come_back_within_the_bound_of_their_own_codec(kind, base_name, dtype) -> None:
    """Of the *true* view, however coarse the base view is: what it was decoded to is what is predicted from."""
    copies = copy_codec(kind, dtype)
    codec = ViewCodec(base_codec(base_name), copies)
    base, geometry, views = related(12, seed=20, dtype=dtype)
    found = codec.dequantize(packed_chunk(codec, base, geometry, views, 2), dtype)
    assert found.dtype == dtype
    residual = copies.residual(views, decoded(codec.base, base), geometry)
    rounding = torch.finfo(dtype).eps * 4 * views.double().abs().max() + 1e-5
    bound = copies.codec.error_bound(residual) + rounding
    assert bool((rms(found.double() - views.double()) <= bound).all())
    # The bound says something: the base view itself, or another view, is far outside.
    assert bool((rms(base.double() - views.double()) > bound).all())
    torch.testing.assert_close(
        codec.dequantize(packed_chunk(codec, base, geometry, views, 0), dtype), decoded(codec.base, base)
    )


def test_what_the_predictor_knows_need_not_be_stored() -> None:
    base, geometry, views = related(12, seed=20, error=0.05)
    sizes = {kind: sum(map(len, copy_codec(kind).encode(views, base, geometry))) for kind in ("residual", "direct")}
    assert sizes["residual"] < 0.8 * sizes["direct"]


def selection(channels: tuple[int, ...], tokens: int, step: float = 1e-3) -> CopyCodec:
    fine = copy_codec("selected", step=step)
    return dataclasses.replace(fine, codec=Codec((Select(channels, tokens, PREFIX), *fine.codec.steps[1:])))


def test_nothing_selected_decodes_to_the_prediction_and_never_to_tokens_of_the_base() -> None:
    """No splice of two views: what is not stored is predicted, at the place of the view."""
    base, geometry, views = related(12, seed=20)
    copies = selection((), 0)
    codec = ViewCodec(PRESETS["lossless"], copies)
    found = codec.dequantize(packed_chunk(codec, base, geometry, views, 1), base.dtype)
    predicted = copies.predictor(base, geometry)
    torch.testing.assert_close(found[:, PREFIX:], predicted[:, PREFIX:], rtol=0, atol=0.01)
    # Prefix tokens are not predicted, but stored.
    torch.testing.assert_close(found[:, :PREFIX], views[:, :PREFIX], rtol=1e-3, atol=1e-3)
    assert float((found - base)[:, PREFIX:].abs().amax(2).min()) > 0.05
    moved = move_tokens(base[:, PREFIX:], geometry, GRID)
    assert not torch.allclose(predicted[:, PREFIX:], moved, atol=0.1)


@given(
    st.sets(st.integers(0, HIDDEN - 1), max_size=HIDDEN),
    st.integers(0, TOKENS - PREFIX),
)
def test_what_is_selected_is_that_of_the_true_view_and_the_rest_is_predicted(channels, tokens) -> None:
    base, geometry, views = related(3, seed=20)
    copies = selection(tuple(sorted(channels)), tokens)
    codec = ViewCodec(PRESETS["lossless"], copies)
    found = codec.dequantize(packed_chunk(codec, base, geometry, views, 1), base.dtype)
    predicted = copies.predictor(base, geometry)
    kept = copies.codec.steps[0].encode(views - predicted)["values"] != 0
    kept[:, :PREFIX] = True
    expected = torch.where(kept, views, predicted)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.01)
    assert int(kept[:, PREFIX:].all(2).sum(1).min()) >= tokens
    assert bool(kept[:, :, sorted(channels)].all())


def items(packed: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What ``CachedDataset`` makes of a chunk."""
    count = len(next(iter(packed.values())))
    return [{name: array[row] for name, array in packed.items()} for row in range(count)]


def mixed_case(kind: str, exact_tokens: bool = False):
    codec = ViewCodec(base_codec("transform"), copy_codec(kind))
    base, geometry, views = related(6, seed=30)
    if exact_tokens:  # chunks with tokens that are stored as they are carry more arrays
        views[2, 5, 1] = 1e7
    chunks = [packed_chunk(codec, base, geometry, views, view) for view in (0, 1)]
    return codec, [items(chunk) for chunk in chunks]


MIXED = {(kind, exact): mixed_case(kind, exact) for kind in KINDS for exact in (False, True)}


@given(
    st.sampled_from(sorted(MIXED)),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=1, max_size=10),
    st.sampled_from([None, torch.bfloat16]),
)
def test_a_mixed_batch_restores_each_sample_as_it_would_alone(case, keys, compute_dtype) -> None:
    codec, chunks = MIXED[case]

    def restored(batch) -> Tensor:
        packed, rest = split_packed(collate_cached(batch))
        assert rest == {}
        return codec.dequantize(packed, torch.float32, compute_dtype)

    together = restored([chunks[view][row] for row, view in keys])
    alone = torch.cat([restored([chunks[view][row]]) for row, view in keys])
    assert bool(torch.isfinite(together).all())
    tolerance = 1e-5 if compute_dtype is None else 0.02
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)


def one_after_the_other(codec: ViewCodec, packed: dict[str, Tensor], positions: Tensor | None) -> Tensor:
    """Base view, move, prediction and residual, each by itself and with all tokens, in fp64."""
    base = codec.base.dequantize(packed, torch.float64)
    copies = codec.copies.codec.dequantize(packed, torch.float64, view=COPY)
    geometry = packed[GEOMETRY].double()
    geometry[~packed[IS_COPY]] = torch.tensor(WHOLE, dtype=torch.float64)
    views = copies + codec.copies.predictor(base, geometry)
    states = torch.where(packed[IS_COPY][:, None, None], views, base)
    return states if positions is None else take_tokens(states, positions)


@given(
    st.lists(st.tuples(geometries(), geometries(), st.booleans()), min_size=1, max_size=5),
    st.sampled_from([(4, 4), (2, 6), (5, 3)]),
    st.booleans(),
    st.floats(0, 1),
    st.sampled_from([None, 0.3, 0.7]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_what_is_restored_at_once_is_what_comes_one_after_the_other(places, grid, full, pull, keep, dtype) -> None:
    geometry = some_geometry(40)
    base = noise(40, PREFIX + math.prod(grid), HIDDEN) + 3 * torch.arange(HIDDEN)
    views = base @ MIXTURE + noise(*base.shape, seed=1)
    predictor = Predictor(pull, full, PREFIX, grid).fit(base, geometry, views)
    residual = CopyCodec(PRESETS["lossless"], predictor).residual(views, base, geometry)
    transforms = [Transform(step=0.05).fit(states, PREFIX, grid) for states in (base, residual)]
    first, second = (Codec((transform, Pack(), Zstd())) for transform in transforms)
    codec = ViewCodec(first, CopyCodec(second, predictor))
    assert codec._together is not None  # or both would be the same way
    count = len(places)
    geometry = torch.tensor([[one, other] for one, other, _ in places])
    base, views = base[:count], views[:count]
    packed = packed_chunk(codec, base, geometry, views, 1)
    packed[IS_COPY] = torch.tensor([copied for _, _, copied in places])
    for name in list(packed):  # what a base view does not have is zero
        if name.startswith("packed.copy") or name == GEOMETRY:
            packed[name][~packed[IS_COPY]] = 0
    positions = None
    if keep is not None:
        subset = TokenSubset(0, PREFIX, math.prod(grid), keep)
        positions = torch.stack([subset.positions(row, 0, 0) for row in range(count)])
    found = codec.dequantize(packed, torch.float64 if dtype == torch.float64 else torch.float32, dtype, positions)
    expected = one_after_the_other(codec, packed, positions)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance / 2, atol=tolerance)


def test_a_residual_without_any_extent_leaves_the_prediction_and_the_means() -> None:
    copies = copy_codec("residual")
    transform, *rest = copies.codec.steps
    tensors = {**transform.tensors(), "scale": torch.zeros_like(transform.scale)}
    flat = dataclasses.replace(transform, state=digest(tensors), **tensors)
    base, geometry, views = related(6, seed=30)
    packed = packed_chunk(ViewCodec(base_codec("transform"), copies), base, geometry, views, 1)
    codec = ViewCodec(base_codec("transform"), dataclasses.replace(copies, codec=Codec((flat, *rest))))
    codec.check(TOKENS, HIDDEN)
    found = codec.dequantize(packed, torch.float32)
    torch.testing.assert_close(found.double(), one_after_the_other(codec, packed, None), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_restoring_in_bf16(kind) -> None:
    codec = ViewCodec(base_codec("transform"), copy_codec(kind))
    base, geometry, views = related(6, seed=30)
    packed = packed_chunk(codec, base, geometry, views, 1)
    exact = codec.dequantize(packed, torch.float32)
    rough = codec.dequantize(packed, torch.float32, torch.bfloat16)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.03, atol=0.06)
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(codec.dequantize(packed, torch.bfloat16).float(), exact, rtol=0.03, atol=0.06)


@pytest.mark.slow
def test_restoring_compiles_in_one_graph() -> None:
    codec = ViewCodec(base_codec("transform"), copy_codec("residual"))
    base, geometry, views = related(6, seed=30)
    packed = packed_chunk(codec, base, geometry, views, 1)
    compiled = torch.compile(codec.dequantize, backend="eager", fullgraph=True)
    assert torch.equal(compiled(packed, torch.float32), codec.dequantize(packed, torch.float32))


def test_only_a_cache_of_exact_views_is_lossless() -> None:
    lossless, lossy = PRESETS["lossless"], base_codec("int8")
    predictor = copy_codec("residual").predictor
    assert ViewCodec(lossless).lossless
    assert ViewCodec(lossless, CopyCodec(lossless)).lossless
    assert not ViewCodec(lossy, CopyCodec(lossless)).lossless
    assert not ViewCodec(lossless, CopyCodec(lossy)).lossless
    # Differences and sums are rounded, and prefix tokens of a lossless residual would be exact, but no more than they.
    assert not ViewCodec(lossless, CopyCodec(lossless, predictor)).lossless


def test_without_a_codec_of_copies_all_views_are_alike() -> None:
    codec = ViewCodec(base_codec("int8"))
    base, _, views = related(5, seed=30)
    assert codec.encode(1, views) == codec.base.encode(views)
    assert not codec.needs_base(1)
    assert codec.stored_dict(1) == codec.base.to_dict()
    packed = codec.entropy_decode(1, codec.encode(1, views), views.shape, views.dtype)
    assert torch.equal(codec.dequantize(packed, views.dtype), decoded(codec.base, views))
    assert not torch.equal(base, views)


@pytest.mark.parametrize("kind", KINDS)
def test_a_codec_of_copies_comes_back_from_json_and_tensors(kind) -> None:
    copies = copy_codec(kind)
    data = json.loads(json.dumps(copies.to_dict()))
    again = CopyCodec.from_dict(data, copies.tensors())
    assert again == copies
    assert again.to_dict() == copies.to_dict()
    base, geometry, views = related(5, seed=30)
    assert again.encode(views, base, geometry) == copies.encode(views, base, geometry)
    if copies.predictor is not None:
        assert torch.equal(again.predictor(base, geometry), copies.predictor(base, geometry))


@pytest.mark.parametrize("name", ["predictor.gains", "predictor.scale", "predictor.mean", "codec.0.basis"])
def test_altered_tensors_are_refused(name) -> None:
    copies = copy_codec("residual")
    tensors = {own: tensor.clone() for own, tensor in copies.tensors().items()}
    tensors[name].view(-1)[0] += 1
    with pytest.raises((ValueError, UnsupportedSetupError), match="not those that the configuration names"):
        CopyCodec.from_dict(copies.to_dict(), tensors)


def test_what_describes_no_codec_of_copies_is_refused() -> None:
    copies = copy_codec("residual")
    bare = {name: tensor for name, tensor in copies.tensors().items() if name.startswith("codec.")}
    with pytest.raises(ValueError, match="has no tensors"):
        CopyCodec.from_dict(copies.to_dict(), bare)
    with pytest.raises(ValueError, match="expected the codec of copies, got 'pipeline'"):
        CopyCodec.from_dict(copies.codec.to_dict(), {})
    other = copy_codec("residual", dtype=torch.float64)
    swapped = {**copies.tensors(), "predictor.mean": other.tensors()["predictor.mean"] + 1}
    with pytest.raises(ValueError, match="not those"):
        CopyCodec.from_dict(copies.to_dict(), swapped)


# ---- Selection ----


@st.composite
def selections(draw) -> tuple[Select, Tensor]:
    prefix = draw(st.integers(0, 2))
    patches, hidden = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    channels = tuple(sorted(draw(st.sets(st.integers(0, hidden - 1), max_size=hidden))))
    states = noise(draw(st.integers(1, 4)), prefix + patches, hidden, seed=draw(st.integers(0, 999)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    return Select(channels, draw(st.integers(0, patches + 2)), prefix), states.to(dtype)


@given(selections())
def test_selected_entries_are_exact_the_others_zero_and_tokens_those_of_most_energy(case) -> None:
    select, states = case
    values = select.encode(states)["values"]
    others = [channel for channel in range(states.shape[2]) if channel not in select.channels]
    assert values.dtype == states.dtype
    for sample, found in zip(states, values, strict=True):
        assert torch.equal(found[: select.prefix_tokens], sample[: select.prefix_tokens])
        assert torch.equal(found[:, list(select.channels)], sample[:, list(select.channels)])
        patches, kept = sample[select.prefix_tokens :], found[select.prefix_tokens :]
        energy = patches[:, others].double().square().sum(1)
        whole = set(torch.argsort(energy, descending=True, stable=True)[: select.tokens].tolist())
        for token in range(len(patches)):
            if token in whole:
                assert torch.equal(kept[token], patches[token])
            else:
                assert bool((kept[token, others] == 0).all())
    expected = rms(states.double() - values.double())
    torch.testing.assert_close(select.error_bound(states), expected, rtol=1e-12, atol=0)
    assert torch.equal(select.decode({"values": values}, states.dtype, None), values)


def test_each_sample_has_tokens_of_its_own() -> None:
    states = torch.zeros(2, 4, 3)
    states[0, 1], states[1, 3] = 1.0, 1.0
    assert torch.equal(Select((), 1, 1).encode(states)["values"], states)
    # Energy in channels that are kept anyway does not count.
    states[0, 2, 0] = 9.0
    assert torch.equal(Select((0,), 1, 1).encode(states)["values"], states)


@pytest.mark.parametrize(
    ("configuration", "words"),
    [
        ({"channels": [2, 1]}, "channels must rise"),
        ({"channels": [1, 1]}, "channels must rise"),
        ({"channels": [-1]}, "whole numbers"),
        ({"channels": [1.0]}, "whole numbers"),
        ({"channels": [True]}, "whole numbers"),
        ({"tokens": -1}, "whole numbers"),
        ({"tokens": 0.5}, "whole numbers"),
        ({"prefix_tokens": -1}, "whole numbers"),
        ({"patches": 3}, "unexpected keyword"),
    ],
)
def test_wrong_selections_are_refused(configuration, words) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        Select(**configuration)
    with pytest.raises(UnsupportedSetupError, match=words):
        make_codec([{"name": "select", "configuration": configuration}, "planes", "zstd"])


def test_selections_refuse_states_that_they_do_not_fit() -> None:
    with pytest.raises(ValueError, match="keeps channel 3, got 3 channels"):
        Select((3,)).encode(torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="NaN or infinite"):
        Select((0,)).encode(torch.full((1, 2, 3), float("nan")))
    with pytest.raises(ValueError, match="select takes \\(samples, tokens, hidden\\)"):
        Select().encoded_specs(ArraySpec((2, 3), torch.float32))


def test_a_selection_comes_back_from_json() -> None:
    codec = make_codec([Select((0, 2), 3, 1), "planes", "zstd"])
    again = make_codec(json.dumps(codec.to_dict()["configuration"]["steps"]))
    assert again == codec == codec_from_dict(json.loads(json.dumps(codec.to_dict())))
    assert again.steps[0] == Select((0, 2), 3, 1)
    assert not again.lossless
    states = noise(4, 9, 5, dtype=torch.float32)
    assert torch.equal(decoded(again, states), Select((0, 2), 3, 1).encode(states)["values"])
    assert bool((rms(decoded(again, states) - states) <= again.error_bound(states) + 1e-12).all())
