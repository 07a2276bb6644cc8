"""Which channels and tokens a base view says little about."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from hf_freezecache.codecs.predictor import WHOLE, move_tokens
from hf_freezecache.compression.sensitivity import (
    Sensitivity,
    measure_sensitivity,
)

GRID, PREFIX, HIDDEN, SAMPLES = (3, 4), 1, 6, 400
TOKENS = PREFIX + GRID[0] * GRID[1]
FLIP = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (SAMPLES, TOKENS, HIDDEN)), generator=torch.Generator().manual_seed(seed))


def geometries(flip: bool = False) -> Tensor:
    whole = torch.tensor([WHOLE]).expand(SAMPLES, -1)
    return torch.stack([whole, FLIP.expand(SAMPLES, 5) if flip else whole], 1)


def measured(base: Tensor, views: Tensor, flip: bool = False, **settings) -> Sensitivity:
    return measure_sensitivity(base, views, geometries(flip), PREFIX, GRID, **settings)


def test_a_noisy_channel_and_a_noisy_token_are_the_least_similar() -> None:
    base = noise(0)
    views = base.clone()
    views[:, :, 2] = noise(1)[:, :, 2]
    views[:, PREFIX + 7] = noise(2)[:, PREFIX + 7]
    found = measured(base, views)
    channels, tokens = torch.tensor(found.channels), torch.tensor(found.tokens)
    assert tokens.shape == GRID
    assert int(channels.argmin()) == 2
    assert divmod(int(tokens.argmin()), GRID[1]) == (1, 3)
    # Channel 2 is noise wherever it is looked at; the others are so at one token of twelve.
    assert abs(float(channels[2])) < 0.1
    others = torch.cat([channels[:2], channels[3:]])
    # With a gain of 11/12 they lack 1 - (11/12)**2.
    assert 0.78 < float(others.min()) <= float(others.max()) < 0.9
    # The gains are fitted over all tokens; so at the token that is noise the prediction misleads.
    assert float(tokens[1, 3]) < -0.5
    assert float(tokens.flatten().sort().values[1]) > 0.75
    assert found.overall == pytest.approx(float(channels.mean()), abs=0.01)
    assert found.num_images == SAMPLES // 2


def test_identical_views_are_wholly_similar() -> None:
    base = noise(0)
    found = measured(base, base)
    assert found.overall == pytest.approx(1, abs=1e-3)
    assert found.prefix == pytest.approx(1, abs=1e-3)
    assert found.channels == pytest.approx([1] * HIDDEN, abs=1e-3)
    assert not found.known_geometry


def test_a_mirrored_view_is_wholly_similar_where_its_geometry_is_known() -> None:
    base = noise(0)
    views = base.clone()
    views[:, PREFIX:] = move_tokens(base[:, PREFIX:], geometries(flip=True), GRID)
    assert measured(base, views, flip=True).overall == pytest.approx(1, abs=1e-3)
    assert measured(base, views, flip=True).known_geometry
    assert measured(base, views).overall < 0.1


def test_scales_and_means_do_not_matter() -> None:
    base = noise(0)
    views = base * noise(3, HIDDEN) + 10 * noise(4, TOKENS, HIDDEN)
    assert measured(base, views).overall == pytest.approx(1, abs=1e-3)


def test_unrelated_views_are_not_similar() -> None:
    found = measured(noise(0), noise(1) + 5)
    assert abs(found.overall) < 0.1
    assert abs(found.prefix) < 0.1
    assert max(map(abs, found.channels)) < 0.1


def test_prefix_tokens_are_measured_apart() -> None:
    base = noise(0)
    views = base.clone()
    views[:, :PREFIX] = noise(1)[:, :PREFIX]
    found = measured(base, views)
    assert found.overall == pytest.approx(1, abs=1e-3)
    assert abs(found.prefix) < 0.1
    whole = geometries()
    assert measure_sensitivity(base[:, PREFIX:], views[:, PREFIX:], whole, 0, GRID).prefix is None


@pytest.mark.slow
def test_it_is_drawn_with_a_row_for_each_split_point(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes" / "benchmarks"))
    from sensitivity_plot import draw_sensitivity

    stages = [
        (3, measured(noise(0), noise(0) + noise(1), augmentations={"crop": 0.25, "flip": 0.75})),
        (6, measured(noise(0), noise(1))),
    ]
    heights = []
    for number in (1, 2):
        draw_sensitivity(stages[:number], tmp_path / "picture.png", "What augmentation moves")
        with Image.open(tmp_path / "picture.png") as picture:
            assert picture.format == "PNG"
            heights.append(picture.height)
    assert heights[1] > 1.5 * heights[0]


def test_states_that_are_not_finite_are_refused() -> None:
    spoiled = noise(0)
    spoiled[3, 4, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        measured(noise(1), spoiled)
