"""The package's own transform: what it draws is known, repeatable, and all that its pixels depend on."""

from __future__ import annotations

import dataclasses
import math
import pickle
import random
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets.fingerprint import Hasher
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.tiny import PROCESSOR
from transformers.models import vit

from hf_freezecache.data.geometry import ViewParameters, recorded
from hf_freezecache.data.image_transform import ImageTransform
from hf_freezecache.data.seeding import seeded
from hf_freezecache.data.views import ViewDataset, check_repeatable
from hf_freezecache.errors import (
    DataError,
    UnsupportedSetupError,
)

SIDES = st.integers(1, 300)
COLOURS = {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2}
WHOLE = ViewParameters(0.0, 0.0, 1.0, 1.0)
RAW = {"mean": (0, 0, 0), "std": (1, 1, 1), "rescale": 1}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def box_of(parameters: ViewParameters) -> tuple[float, ...]:
    return parameters.geometry()[:4]


def factors_of(parameters: ViewParameters) -> tuple[float, ...]:
    return parameters.brightness, parameters.contrast, parameters.saturation


# ---- What is drawn ----


@given(st.integers(0, 2**32), st.integers(0, 10**6), st.integers(0, 50), SIDES, SIDES)
def test_parameters_are_recovered_from_the_key_and_the_size(seed, sample_index, view, width, height) -> None:
    transform = ImageTransform((5, 4), train=True, **COLOURS)
    image = noise(width, height)
    random.random()
    before = random.getstate()
    with seeded(seed, sample_index, view), recorded() as found:
        pixels = transform({"image": [image], "label": [7]})["pixel_values"][0]
    random.random()
    assert [transform.parameters(seed, sample_index, view, width, height)] == found
    assert torch.equal(transform.render(image, found[0]), pixels)
    random.setstate(before)
    transform.parameters(seed, sample_index, view, width, height)
    assert random.getstate() == before


def test_parameters_depend_on_seed_sample_and_view() -> None:
    transform = ImageTransform(4, train=True, brightness=0.1)
    keys = [(seed, row, view) for seed in range(3) for row in range(5) for view in range(5)]
    assert len({transform.parameters(*key, 40, 30) for key in keys}) == len(keys)


def test_parameters_of_a_key_stay_what_they_are() -> None:
    """Caches hold views that were drawn by earlier versions. If this must change, raise ``image_transform.REVISION``."""
    found = ImageTransform(4, train=True, **COLOURS).parameters(1, 2, 3, 400, 300)
    edges = [round(edge * side) for edge, side in zip(box_of(found), (400, 300) * 2, strict=True)]
    assert (edges, found.flip) == ([35, 5, 349, 280], True)
    assert factors_of(found) == pytest.approx((0.824682, 0.923886, 1.031341), abs=1e-6)


@given(
    SIDES,
    SIDES,
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted),
    st.integers(0, 1000),
)
def test_crops_lie_within_the_image_on_whole_pixels(width, height, scale, ratio, seed) -> None:
    transform = ImageTransform(4, train=True, scale=scale, ratio=ratio)
    left, top, right, bottom = box_of(transform.parameters(seed, 0, 0, width, height))
    assert 0 <= left < right <= 1
    assert 0 <= top < bottom <= 1
    edges = np.array([left * width, top * height, right * width, bottom * height])
    np.testing.assert_allclose(edges, edges.round(), atol=1e-9)


def test_area_and_ratio_of_crops_fill_their_range_and_no_more() -> None:
    transform = ImageTransform(4, train=True, scale=(0.2, 0.45), ratio=(0.5, 2))
    boxes = np.array([transform.parameters(0, row, 1, 1000, 1000).geometry() for row in range(400)])
    widths, heights = 1000 * (boxes[:, 2] - boxes[:, 0]), 1000 * (boxes[:, 3] - boxes[:, 1])
    areas, ratios = widths * heights / 1000**2, widths / heights
    assert 0.199 < areas.min() < 0.21
    assert 0.44 < areas.max() < 0.451
    assert 0.498 < ratios.min() < 0.52
    assert 1.92 < ratios.max() < 2.01
    # Area uniform, ratio uniform in its logarithm: as many wide crops as high ones.
    assert abs(areas.mean() - 0.325) < 0.015
    assert abs(np.log(ratios).mean()) < 0.06
    for place in (boxes[:, 0] / (1 - widths / 1000), boxes[:, 1] / (1 - heights / 1000)):
        assert place.min() < 0.02
        assert place.max() > 0.98
        assert abs(place.mean() - 0.5) < 0.05


def test_where_no_crop_fits_it_is_the_middle_as_far_as_the_ratio_allows() -> None:
    def edges(ratio: tuple[float, float], width: int, height: int) -> tuple[float, ...]:
        transform = ImageTransform(4, train=True, scale=(0.9, 1), ratio=ratio)
        return tuple(
            e * side for e, side in zip(box_of(transform.draw(width, height)), (width, height) * 2, strict=True)
        )

    assert edges((3 / 4, 4 / 3), 90, 12) == pytest.approx((37, 0, 53, 12))
    assert edges((3 / 4, 4 / 3), 12, 90) == pytest.approx((0, 37, 12, 53))
    assert edges((1e-3, 1e-3), 91, 12) == pytest.approx((45, 0, 46, 12)), "never less than a pixel"


@pytest.mark.parametrize(("probability", "low", "high"), [(0, 0, 0), (0.25, 70, 130), (1, 400, 400)])
def test_flips_have_their_probability(probability, low, high) -> None:
    transform = ImageTransform(4, train=True, flip=probability)
    flips = [transform.parameters(0, row, 1, 20, 20).flip for row in range(400)]
    assert low <= sum(flips) <= high
    assert {transform.parameters(0, row, 1, 20, 20).geometry()[4] for row in range(400)} == set(map(float, flips))


def test_colour_factors_fill_their_range_and_no_more() -> None:
    transform = ImageTransform(4, train=True, brightness=0.4, contrast=1.5, saturation=0)
    brightness, contrast, saturation = np.array(
        [factors_of(transform.parameters(0, row, 1, 20, 20)) for row in range(400)]
    ).T
    assert 0.6 <= brightness.min() < 0.62
    assert 1.38 < brightness.max() <= 1.4
    assert 0 <= contrast.min() < 0.03
    assert 2.45 < contrast.max() <= 2.5
    assert set(saturation) == {1.0}


def test_switching_one_part_off_leaves_the_others_as_they_were() -> None:
    whole = ImageTransform(4, train=True, **COLOURS)
    variants = {
        "colour": ImageTransform(4, train=True),
        "flip": ImageTransform(4, train=True, flip=0, **COLOURS),
        "contrast": ImageTransform(4, train=True, **{**COLOURS, "contrast": 0}),
    }
    for row in range(50):
        drawn = {name: variant.parameters(3, row, 1, 31, 47) for name, variant in variants.items()}
        full = whole.parameters(3, row, 1, 31, 47)
        assert drawn["colour"] == ViewParameters(*box_of(full), full.flip)
        assert drawn["flip"] == dataclasses.replace(full, flip=False)
        assert drawn["contrast"] == dataclasses.replace(full, contrast=1.0)


def test_only_keeps_what_the_whole_transform_draws_for_one_part() -> None:
    settings = {"shortest_edge": 6, **COLOURS}
    whole = ImageTransform(4, train=True, **settings)
    evaluation = ImageTransform(4, train=False, **settings)
    assert whole.augmentations == ("crop", "flip", "colour")
    assert [whole.only(name).augmentations for name in whole.augmentations] == [("crop",), ("flip",), ("colour",)]
    base = evaluation.parameters(0, 0, 0, 31, 47)
    flips = 0
    for row in range(50):
        full = whole.parameters(3, row, 1, 31, 47)
        crop, flip, colour = (whole.only(name).parameters(3, row, 1, 31, 47) for name in whole.augmentations)
        assert crop == ViewParameters(*box_of(full))
        assert flip == dataclasses.replace(base, flip=full.flip)
        assert colour == ViewParameters(*box_of(base), False, *factors_of(full))
        flips += flip.flip
    assert 10 < flips < 40
    assert whole.only("crop").only("flip").augmentations == ()
    assert whole.only("crop").only("flip").parameters(3, 0, 1, 31, 47) == base
    assert whole.augmentations == ("crop", "flip", "colour"), "the whole transform stays whole"
    with pytest.raises(UnsupportedSetupError, match=r"no augmentation 'color'.*crop, flip, colour"):
        whole.only("color")


def test_only_leaves_the_random_state_where_the_whole_transform_does() -> None:
    """So that a whole batch under one state shows the same crops."""
    whole = ImageTransform(4, train=True, **COLOURS)
    images = [noise(30, 20, seed) for seed in range(5)]
    drawn = {}
    for name, transform in (("all", whole), *((name, whole.only(name)) for name in whole.augmentations)):
        with seeded(0, 0, 0), recorded() as drawn[name]:
            transform({"image": images, "label": [0] * 5})
    assert [box_of(p) for p in drawn["crop"]] == [box_of(p) for p in drawn["all"]]
    assert [p.flip for p in drawn["flip"]] == [p.flip for p in drawn["all"]]
    assert [factors_of(p) for p in drawn["colour"]] == [factors_of(p) for p in drawn["all"]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("crop", "flip")),
        ({"scale": None}, ("flip",)),
        ({"flip": 0, "saturation": 0.1}, ("crop", "colour")),
        ({"scale": None, "flip": 0}, ()),
        ({"train": False, "contrast": 0.1}, ()),
    ],
)
def test_augmentations_that_are_switched_on(settings, expected) -> None:
    transform = ImageTransform(4, **{"train": True, **settings})
    assert transform.augmentations == expected
    moved = {
        name
        for row in range(20)
        for name, differs in {
            "crop": box_of(transform.parameters(0, row, 1, 20, 30)) != box_of(WHOLE),
            "flip": transform.parameters(0, row, 1, 20, 30).flip,
            "colour": factors_of(transform.parameters(0, row, 1, 20, 30)) != (1, 1, 1),
        }.items()
        if differs
    }
    assert moved == set(expected)


# ---- Evaluation ----


@pytest.mark.parametrize(
    ("settings", "size", "expected"),
    [
        ({}, (31, 23), (0, 0, 1, 1)),
        # 50 x 40 becomes 25 x 20, of which 16 x 16 are cut at (4, 2).
        ({"shortest_edge": 20}, (50, 40), (4 / 25, 2 / 20, 20 / 25, 18 / 20)),
        ({"shortest_edge": 20}, (40, 50), (2 / 20, 4 / 25, 18 / 20, 20 / 25)),
        ({"resized": (32, 16)}, (100, 7), (0.25, 0, 0.75, 1)),
        # Larger than the resized image: two rows and columns of black around it.
        ({"resized": (12, 12)}, (24, 24), (-2 / 12, -2 / 12, 14 / 12, 14 / 12)),
    ],
)
def test_box_of_the_evaluations_centre_crop(settings, size, expected) -> None:
    transform = ImageTransform(16, train=False, **settings)
    before = random.getstate()
    found = transform.draw(*size)
    assert random.getstate() == before
    assert box_of(found) == pytest.approx(expected)
    assert (found.flip, factors_of(found)) == (False, (1, 1, 1))


def test_the_box_is_where_the_pixels_come_from() -> None:
    # Every pixel tells its column and row.
    rows, columns = np.mgrid[:200, :240]
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8))
    evaluation = ImageTransform(16, train=False, shortest_edge=20, **RAW)
    training = ImageTransform(16, train=True, scale=(0.2, 1), **RAW)
    for transform in (evaluation, training, training.only("crop"), training.only("flip")):
        for row in range(10):
            parameters = transform.parameters(0, row, 1, 240, 200)
            left, top, right, bottom = box_of(parameters)
            pixels = transform.render(image, parameters)
            across = pixels[0, 8].flip(0) if parameters.flip else pixels[0, 8]
            centres = (torch.arange(16) + 0.5) / 16
            torch.testing.assert_close(across, 240 * (left + (right - left) * centres) - 0.5, rtol=0, atol=2)
            torch.testing.assert_close(pixels[1, :, 8], 200 * (top + (bottom - top) * centres) - 0.5, rtol=0, atol=2)


#: Runs without torchvision. Its name before transformers had two backends is the fall-back.
PilProcessor = getattr(vit, "ViTImageProcessorPil", vit.ViTImageProcessor)
PROCESSORS = [
    {},
    {"do_center_crop": False, "size": {"height": 16, "width": 12}, "resample": 2},
    {"size": {"height": 20, "width": 22}, "do_normalize": False},
    {"size": {"height": 12, "width": 20}},
    {"do_rescale": False},
]


@pytest.mark.parametrize("settings", PROCESSORS)
@pytest.mark.parametrize("size", [(16, 16), (31, 23), (17, 50), (50, 17)])
def test_evaluation_is_the_processors(settings, size) -> None:
    processor = PilProcessor(**{**PROCESSOR, **settings})
    image = noise(*size)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    evaluation = ImageTransform.from_processor(processor, train=False)
    found = evaluation({"image": [image], "label": [0]})["pixel_values"][0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    # View 0 can be rendered by either, also from a file of float32.
    training = ImageTransform.from_processor(processor, train=True)
    parameters = evaluation.draw(*size)
    rounded = ViewParameters(*(float(np.float32(edge)) for edge in box_of(parameters)))
    assert torch.equal(training.render(image, parameters), found)
    assert torch.equal(training.render(image, rounded), found)


def test_settings_replace_what_the_processor_says() -> None:
    processor = SimpleNamespace(to_dict=lambda: PROCESSOR)
    transform = ImageTransform.from_processor(
        processor, train=True, size=10, mean=[0.1] * 3, image_column="picture", label_column=None, scale=(0.5, 1)
    )
    plain = ImageTransform(
        10,
        train=True,
        mean=[0.1] * 3,
        std=PROCESSOR["image_std"],
        resample=3,
        image_column="picture",
        label_column=None,
        scale=(0.5, 1),
    )
    assert Hasher.hash(transform) == Hasher.hash(plain)
    defaults = {key: PROCESSOR[key] for key in ("rescale_factor", "image_mean", "image_std")}
    square = SimpleNamespace(to_dict=lambda: {**defaults, "size": {"height": 8, "width": 8}, "resample": None})
    expected = ImageTransform(8, train=False, mean=PROCESSOR["image_mean"], std=PROCESSOR["image_std"])
    assert Hasher.hash(ImageTransform.from_processor(square, train=False)) == Hasher.hash(expected)


# ---- What is rendered ----


@given(st.integers(0, 10**6), SIDES, SIDES)
def test_a_view_is_rendered_again_from_its_parameters_alone(key, width, height) -> None:
    transform = ImageTransform((7, 5), train=True, **COLOURS)
    image = noise(width, height)
    parameters = transform.parameters(0, key, 1, width, height)
    random.seed(key)
    first = transform.render(image, parameters)
    random.seed(key + 1)
    assert torch.equal(ImageTransform((7, 5), train=False).render(image, parameters), first)
    assert first.shape == (3, 5, 7)
    assert first.dtype == torch.float32
    assert first.abs().max() <= 1


def test_a_flip_mirrors_the_rendering() -> None:
    transform = ImageTransform((7, 5), train=True, **COLOURS)
    for row in range(20):
        parameters = transform.parameters(0, row, 1, 31, 23)
        image = noise(31, 23, row)
        straight = transform.render(image, dataclasses.replace(parameters, flip=False))
        mirrored = transform.render(image, dataclasses.replace(parameters, flip=True))
        assert torch.equal(mirrored, straight.flip(2))
        assert not torch.equal(mirrored, straight)


def test_a_crop_shows_its_part_of_the_image_and_nothing_else() -> None:
    transform = ImageTransform((10, 4), train=True, **RAW)
    image = noise(40, 20)
    pixels = transform.render(image, ViewParameters(0.25, 0.5, 0.5, 0.7))
    expected = np.array(image)[10:14, 10:20]
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_colour_factors_change_colours_as_their_names_say() -> None:
    transform = ImageTransform(16, train=True, **RAW)
    image = noise(16, 16)
    plain = transform.render(image, WHOLE)
    assert np.array_equal(plain.permute(1, 2, 0).numpy(), np.array(image))
    dark = transform.render(image, dataclasses.replace(WHOLE, brightness=0.5))
    torch.testing.assert_close(dark, plain / 2, rtol=0, atol=1)
    flat = transform.render(image, dataclasses.replace(WHOLE, contrast=0.5))
    assert flat.std() == pytest.approx(float(plain.std()) / 2, rel=0.02)
    assert flat.mean() == pytest.approx(float(plain.mean()), abs=1.5)
    gray = transform.render(image, dataclasses.replace(WHOLE, saturation=0.0))
    assert torch.equal(gray[0], gray[1])
    assert torch.equal(gray[1], gray[2])
    assert torch.equal(gray[0], torch.from_numpy(np.array(image.convert("L"), dtype=np.float32)))


def test_brightness_comes_before_contrast_before_saturation() -> None:
    from PIL import ImageEnhance

    image = noise(16, 16)
    found = ImageTransform(16, train=True, **RAW).render(image, ViewParameters(0, 0, 1, 1, False, 1.6, 1.5, 0.3))
    for enhance, factor in ((ImageEnhance.Brightness, 1.6), (ImageEnhance.Contrast, 1.5), (ImageEnhance.Color, 0.3)):
        image = enhance(image).enhance(factor)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.array(image))


def test_images_of_all_modes_are_made_rgb() -> None:
    transform = ImageTransform(8, train=True)
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        image = noise(9, 8).convert(mode)
        assert torch.equal(transform.render(image, WHOLE), transform.render(image.convert("RGB"), WHOLE))


def test_a_crop_without_pixels_is_refused() -> None:
    transform = ImageTransform(8, train=True)
    for box in ((0.5, 0, 0.5, 1), (0, 0.9, 1, 0.1), (0.3, 0, 0.31, 1)):
        with pytest.raises(DataError, match=r"9 x 8 pixels is empty"):
            transform.render(noise(9, 8), ViewParameters(*box))
    with pytest.raises(DataError, match="0 x 8 pixels"):
        transform.draw(0, 8)


# ---- Hashes ----


def test_equal_settings_hash_alike_and_different_ones_do_not() -> None:
    settings: dict[str, Any] = {"size": 8, "train": True}
    same = [
        {"size": (8, 8)},
        {"scale": [0.08, 1]},
        {"mean": [0.5] * 3, "std": torch.full((3,), 0.5).tolist()},
        {"mean": (half := (0.5, 0.5, 0.5)), "std": half},
        {"brightness": 0, "resample": 2},
    ]
    other = [
        {"size": (8, 9)},
        {"train": False},
        {"scale": (0.09, 1)},
        {"scale": None},
        {"ratio": (3 / 4, 1)},
        {"flip": 0.4},
        {"brightness": 0.1},
        {"contrast": 0.1},
        {"saturation": 0.1},
        {"mean": (0.5, 0.5, 0.4)},
        {"std": (0.5, 0.5, 0.4)},
        {"rescale": 1 / 256},
        {"resample": 3},
        {"shortest_edge": 9},
        {"resized": (9, 9)},
        {"image_column": "picture"},
        {"label_column": None},
    ]
    transform = ImageTransform(**settings)
    hashes = [Hasher.hash(ImageTransform(**{**settings, **more})) for more in other]
    hashes += [Hasher.hash(transform.only(name)) for name in ("crop", "flip", "colour")]
    assert {Hasher.hash(ImageTransform(**{**settings, **more})) for more in same} == {Hasher.hash(transform)}
    assert len({Hasher.hash(transform), *hashes}) == 1 + len(hashes)
    # Using it leaves no trace.
    transform({"image": [noise(9, 9)], "label": [0]})
    assert Hasher.hash(transform) == Hasher.hash(ImageTransform(**settings))


def test_pickles_render_and_hash_the_same() -> None:
    transform = ImageTransform(8, train=True, **COLOURS).only("colour")
    again = pickle.loads(pickle.dumps(transform))
    assert Hasher.hash(again) == Hasher.hash(transform)
    parameters = transform.parameters(0, 1, 2, 9, 9)
    assert again.parameters(0, 1, 2, 9, 9) == parameters
    assert torch.equal(again.render(noise(9, 9), parameters), transform.render(noise(9, 9), parameters))
    assert pickle.loads(pickle.dumps(parameters)) == parameters


def test_the_hash_depends_on_values_alone() -> None:
    """So that another process finds the caches of this one."""

    def plain(value: Any) -> bool:
        return all(map(plain, value)) if type(value) is tuple else type(value) in (int, float, bool, str, type(None))

    transform = ImageTransform(8, train=np.bool_(True), scale=np.array([0.5, 1]), flip=np.float64(0.25), **COLOURS)
    assert all(map(plain, vars(transform).values()))
    joined = ImageTransform(8, train=True, image_column="".join(["ima", "ge"]))
    assert Hasher.hash(joined) == Hasher.hash(ImageTransform(8, train=True))


# ---- The recorder ----


def test_the_innermost_recorder_collects_one_entry_per_image_in_order() -> None:
    transform = ImageTransform(4, train=True)
    batch = {"image": [noise(20, 10), noise(11, 13)], "label": [0, 1]}

    def fail() -> None:
        transform(batch)
        raise KeyError

    transform(batch)
    with recorded() as outer:
        assert outer == []
        transform(batch)
        with recorded() as inner:
            transform(batch)
            transform(batch)
        transform(batch)
        with pytest.raises(KeyError), recorded() as failed:
            fail()
        random.seed(5)
        transform(batch)
        random.seed(5)
        assert outer[4:] == [transform.draw(20, 10), transform.draw(11, 13)]
        transform.draw(20, 10)
        transform.render(batch["image"][0], WHOLE)
    transform(batch)
    assert (len(outer), len(inner), len(failed)) == (6, 4, 2)


def test_each_thread_records_its_own_images() -> None:
    rows, found = 20, {}
    barrier = threading.Barrier(4)

    def work(width: int) -> None:
        transform = ImageTransform(4, train=False, shortest_edge=8)
        with recorded() as found[width]:
            for _ in range(rows):
                barrier.wait(10)
                transform({"image": [noise(width, 10)], "label": [0]})

    with recorded() as main:
        threads = [threading.Thread(target=work, args=(width,)) for width in (10, 20, 30, 40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert main == []
    for width, entries in found.items():
        assert entries == [ImageTransform(4, train=False, shortest_edge=8).draw(width, 10)] * rows


# ---- With datasets ----


def test_as_the_transforms_of_views(images) -> None:
    training, evaluation = (ImageTransform(12, train=train, **COLOURS) for train in (True, False))
    views = ViewDataset(images, 5, training, evaluation)
    check_repeatable(views, num_views=2)
    # The data set records by itself, so that a recorder around it stays empty.
    items, found = zip(*(views.render(key) for key in ((3, 0), (3, 1), (4, 2))), strict=True)
    assert list(found) == [
        evaluation.parameters(5, 3, 0, 16, 16),
        training.parameters(5, 3, 1, 16, 16),
        training.parameters(5, 4, 2, 16, 16),
    ]
    assert [item["labels"] for item in items] == [3, 3, 0]
    for row, item, parameters in zip((3, 3, 4), items, found, strict=True):
        assert torch.equal(item["pixel_values"], training.render(images[row]["image"], parameters))
    own = images.with_transform(training)
    with recorded() as found:
        batch = own[:3]
    assert len(batch["pixel_values"]) == len(found) == 3
    assert batch["labels"] == [0, 1, 2]
    unlabelled = images.remove_columns("label").with_transform(ImageTransform(12, train=True, label_column=None))
    assert set(unlabelled[0]) == {"pixel_values"}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"image_column": "picture"}, r"no column 'picture' but 'image', 'label': set image_column to one of them\. "),
        ({"label_column": "fine"}, r"no column 'fine' but 'image', 'label': set label_column to one of them or None"),
        ({"image_column": "label"}, r"Column 'label' holds int, not PIL images.*cast_column"),
    ],
)
def test_missing_columns_and_images_are_named(images, column, message) -> None:
    with pytest.raises(DataError, match=message):
        images.with_transform(ImageTransform(12, train=True, **column))[0]
    with pytest.raises(DataError, match=r"Row 0 of the training data set .*" + message):
        ViewDataset(images.with_transform(ImageTransform(12, train=True, **column)), 0)[0, 1]


# ---- Settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, r"size=\(0, 0\): expected .* at least one pixel"),
        ({"size": (4, -1)}, r"size=\(4, -1\)"),
        ({"size": (4, 4, 3)}, r"size=\(4, 4, 3\) is no pair"),
        ({"size": "4"}, r"size='4' is no pair"),
        ({"scale": (0, 1)}, r"scale=\(0\.0, 1\.0\): expected .*0 < least <= greatest <= 1; None switches crops off"),
        ({"scale": (0.5, 0.4)}, r"scale=\(0\.5, 0\.4\)"),
        ({"scale": (0.5, 1.1)}, r"scale=\(0\.5, 1\.1\)"),
        ({"scale": (math.nan, 1)}, r"scale=\(nan, 1\.0\)"),
        ({"scale": 0.5}, r"scale=0\.5 is no pair"),
        ({"ratio": (0, 1)}, r"ratio=\(0\.0, 1\.0\): expected least and greatest width / height"),
        ({"ratio": (2, 1)}, r"ratio=\(2\.0, 1\.0\)"),
        ({"ratio": (1, math.inf)}, r"ratio=\(1\.0, inf\)"),
        ({"flip": 1.1}, r"flip=1\.1: expected a probability"),
        ({"flip": -0.1}, r"flip=-0\.1"),
        ({"brightness": -0.1}, r"brightness=-0\.1: expected a number of at least 0"),
        ({"contrast": math.nan}, r"contrast=nan"),
        ({"saturation": math.inf}, r"saturation=inf"),
        ({"mean": (0.5,)}, r"mean=\(0\.5,\): expected three numbers"),
        ({"std": (0.5, 0.5, 0)}, r"std=\(0\.5, 0\.5, 0\.0\): expected three numbers above 0"),
        ({"rescale": math.nan}, r"rescale=nan"),
        ({"resample": 9}, r"resample=9: expected one of 0 \(NEAREST\)"),
        ({"shortest_edge": 0}, r"shortest_edge=0"),
        ({"resized": (0, 4)}, r"resized=\(0, 4\)"),
        ({"resized": (4, 4), "shortest_edge": 4}, r"resized=\(4, 4\): expected None beside shortest_edge=4"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message) -> None:
    with pytest.raises(UnsupportedSetupError, match=message):
        ImageTransform(**{"size": 8, "train": True, **settings})


@pytest.mark.parametrize(
    "settings",
    [{"size": {"longest_edge": 20}}, {"size": {"longest_edge": 20}, "do_center_crop": False}, {"crop_size": {}}],
)
def test_a_processor_of_another_kind_is_refused(settings) -> None:
    processor = SimpleNamespace(to_dict=lambda: {**PROCESSOR, **settings})
    with pytest.raises(
        UnsupportedSetupError, match=r"SimpleNamespace has size=.*a shortest_edge.*size=\(width, height\)"
    ):
        ImageTransform.from_processor(processor, train=True)
    assert ImageTransform.from_processor(processor, train=True, size=8).size == (8, 8)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_images_of_16_bits_are_scaled_to_8(order) -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 256 + 3).reshape(16, 16)
    image = (
        Image.fromarray(ramp.astype(order))
        if order == "<u2"
        else Image.frombytes("I;16B", (16, 16), ramp.astype(order).tobytes())
    )
    assert image.mode.startswith("I;16")
    transform = ImageTransform(16, train=False, mean=(0, 0, 0), std=(1, 1, 1), rescale=1)
    (pixels,) = transform({"image": [image], "label": [0]})["pixel_values"]
    assert torch.equal(pixels, torch.arange(256.0).reshape(16, 16).expand(3, 16, 16))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_an_image_of_a_mode_without_known_range_is_refused(mode) -> None:
    image = Image.new(mode, (20, 20))
    with pytest.raises(DataError, match=f"mode {mode!r}.*transform of your own"):
        ImageTransform(16, train=False)({"image": [image], "label": [0]})
