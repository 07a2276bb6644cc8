"""Crop and flip: the five numbers mean the same to pixels, to their description and to tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hf_freezecache.codecs.predictor import WHOLE, check_geometry, move_tokens
from hf_freezecache.data.geometry import CentreCrop, ViewParameters, crop_and_flip, random_crop

SIDE, GRID = 96, 6


def tokens_of(image: Image.Image) -> torch.Tensor:
    """Mean of red and green over each patch of a grid, (1, GRID * GRID, 2)."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))[:, :, :2].permute(2, 0, 1)
    return torch.nn.functional.avg_pool2d(pixels, image.size[0] // GRID).flatten(1).T[None]


#: Red grows to the right, green downwards.
RAMP = Image.fromarray(
    np.stack([*np.meshgrid(np.arange(SIDE) * 2.5, np.arange(SIDE) * 2.5), np.zeros((SIDE, SIDE))], 2).astype(np.uint8)
)


@given(
    st.tuples(st.integers(10, 40), st.integers(10, 40), st.integers(56, 86), st.integers(56, 86)),
    st.booleans(),
)
def test_moving_tokens_by_the_five_numbers_shows_what_cropping_pixels_shows(edges, flip) -> None:
    left, top, right, bottom = (edge / SIDE for edge in edges)
    view = ViewParameters(left, top, right, bottom, flip)
    assert view.geometry() == (left, top, right, bottom, float(flip))
    rendered = crop_and_flip(RAMP, view, CentreCrop((SIDE, SIDE), (SIDE, SIDE)), Image.Resampling.BILINEAR)
    geometry = torch.tensor([[WHOLE, view.geometry()]])
    check_geometry(geometry)
    moved = move_tokens(tokens_of(RAMP), geometry, (GRID, GRID))
    # Pixels are whole numbers, and a resized ramp is flat at its border.
    torch.testing.assert_close(moved, tokens_of(rendered), rtol=0, atol=2.5)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 60), st.integers(1, 60))
def test_the_centre_crop_is_at_the_centre(width, height, across, down) -> None:
    crop = CentreCrop((width, height), (across, down))
    left, top, right, bottom = crop.box
    assert ((right - left) * width, (bottom - top) * height) == pytest.approx((across, down))
    assert abs((left + right) / 2 - 0.5) * width <= 0.5 + 1e-9
    assert abs((top + bottom) / 2 - 0.5) * height <= 0.5 + 1e-9
    assert crop.corner == (round(left * width), round(top * height))


def test_a_crop_of_the_whole_area_is_the_whole_image() -> None:
    assert random_crop(40, 40, (1, 1), (1, 1)) == WHOLE[:4]
