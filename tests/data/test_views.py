"""Views are pure functions of (seed, row, view), whatever the user's transform draws from."""

from __future__ import annotations

import io
import itertools
import random
import threading

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.images import make_images
from support.tiny import IMAGE_SIZE, TinyTransform

from hf_freezecache.data.seeding import preserved_random_state, seeded
from hf_freezecache.data.views import (
    ViewDataset,
    check_repeatable,
)
from hf_freezecache.errors import (
    DataError,
    UnrepeatableTransformError,
    UnsupportedSetupError,
)


def draws() -> tuple:
    return (
        random.random(),
        random.gauss(0, 1),
        np.random.random(),
        np.random.randn(),
        torch.rand(()).item(),
        torch.randn(()).item(),
    )


def states() -> tuple:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()


KEYS = st.tuples(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**40), st.integers(0, 10**6))


@given(KEYS)
def test_draws_depend_on_the_key_only_and_states_are_restored(key) -> None:
    draws()  # leaves half a Gaussian pair behind in Python's and NumPy's generators
    before = states()
    with seeded(*key):
        first = draws()
    assert states() == before
    torch.rand(3), np.random.rand(3), random.random(), random.gauss(0, 1)
    with seeded(*key):
        assert draws() == first
        with seeded(*key):
            assert draws() == first


def fail_after_drawing() -> None:
    draws()
    raise KeyError


def test_states_are_restored_after_an_error() -> None:
    before = states()
    with pytest.raises(KeyError), seeded(0, 1, 2):
        fail_after_drawing()
    assert states() == before
    with pytest.raises(KeyError), preserved_random_state():
        fail_after_drawing()
    assert states() == before


def test_different_keys_give_different_draws_from_all_generators() -> None:
    keys = list(itertools.product((0, 1, 2), range(12), range(12)))
    columns = [[] for _ in range(6)]
    for key in keys:
        with seeded(*key):
            for column, value in zip(columns, draws(), strict=True):
                column.append(value)
    for column in columns:
        assert len(set(column)) == len(keys)
    # Neighbours are unrelated: no generator follows the view or the row.
    for column in columns[::2]:
        table = np.array(column).reshape(3, 12, 12)
        assert abs(np.corrcoef(table[:, :, :-1].ravel(), table[:, :, 1:].ravel())[0, 1]) < 0.2
        assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.2
        assert 0.4 < table.mean() < 0.6


def test_seeds_of_any_sign_and_size_are_taken() -> None:
    found = set()
    for seed in (0, -1, 2**32, 2**63, -(2**63) + 1):
        with seeded(seed, 0, 0):
            found.add(draws())
    assert len(found) == 5


# ---- The data set of views ----


@pytest.fixture
def views(images) -> ViewDataset:
    return ViewDataset(images.with_transform(TinyTransform(augment=True)), seed=5)


def test_a_view_is_the_users_transform_under_seeded_states(views, images) -> None:
    dataset = images.with_transform(TinyTransform(augment=True))
    assert len(views) == len(images)
    for row, view in ((0, 0), (3, 1), (49, 7)):
        with seeded(5, row, view):
            expected = dataset[row]
        found = views[row, view]
        assert found.keys() == expected.keys() == {"pixel_values", "labels"}
        assert torch.equal(found["pixel_values"], expected["pixel_values"])
        assert found["labels"] == row % 4


def test_views_of_a_row_differ_and_repeat_whatever_was_drawn_before(views) -> None:
    first = [views[3, view]["pixel_values"] for view in range(4)]
    for a, b in itertools.combinations(first, 2):
        assert not torch.equal(a, b)
    draws()
    before = states()
    for view in (2, 0, 3, 1):
        assert torch.equal(views[3, view]["pixel_values"], first[view])
    assert states() == before
    assert torch.equal(views[3]["pixel_values"], first[0])
    batch = views.__getitems__([(3, 2), 3, (4, 0)])
    assert torch.equal(batch[0]["pixel_values"], first[2])
    assert torch.equal(batch[1]["pixel_values"], first[0])
    other_seed = ViewDataset(views._base, seed=6)
    assert not torch.equal(other_seed[3, 2]["pixel_values"], first[2])


def test_train_and_eval_transform_render_view_0_for_evaluation(images) -> None:
    evaluation, training = TinyTransform(augment=False), TinyTransform(augment=True)
    views = ViewDataset(images, 5, train_transform=training, eval_transform=evaluation)
    for row in (0, 7):
        expected = images.with_transform(evaluation)[row]["pixel_values"]
        assert torch.equal(views[row]["pixel_values"], expected)
        assert torch.equal(views[row, 0]["pixel_values"], expected)
        with seeded(5, row, 1):
            augmented = images.with_transform(training)[row]["pixel_values"]
        assert torch.equal(views[row, 1]["pixel_values"], augmented)
        assert not torch.equal(augmented, expected)
    assert isinstance(images[0]["image"], Image.Image), "the user's own data set keeps its format"


def test_transforms_replace_the_data_sets_own(images) -> None:
    def refuse(batch):
        raise AssertionError("the data set's own transform ran")

    evaluation = TinyTransform(augment=False)
    views = ViewDataset(images.with_transform(refuse), 5, evaluation, evaluation)
    assert views[0, 1]["pixel_values"].shape == views[0]["pixel_values"].shape == (3, IMAGE_SIZE, IMAGE_SIZE)


def test_one_transform_alone_or_on_another_kind_of_data_set_is_refused(images) -> None:
    transform = TinyTransform(augment=False)
    for settings in ({"train_transform": transform}, {"eval_transform": transform}):
        with pytest.raises(UnsupportedSetupError, match="go together"):
            ViewDataset(images, 0, **settings)
    with pytest.raises(UnsupportedSetupError, match=r"need a datasets.Dataset, got list"):
        ViewDataset([1, 2], 0, transform, transform)


class OwnGenerator:
    def __init__(self, generator) -> None:
        self.generator = generator

    def __call__(self, batch):
        return {"pixel_values": [torch.full((3, 4, 4), float(self.generator.random())) for _ in batch["image"]]}


@pytest.mark.parametrize("make", [random.Random, np.random.default_rng], ids=["random.Random", "numpy.default_rng"])
def test_a_transform_with_a_generator_of_its_own_is_refused(images, make) -> None:
    views = ViewDataset(images.with_transform(OwnGenerator(make(0))), 5)
    with pytest.raises(UnrepeatableTransformError, match=r"row 0, view 0.*random generator of its own") as caught:
        check_repeatable(views, num_views=2)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("seed", range(8))
def test_a_generator_of_its_own_is_not_taken_for_mixing_rows(images, seed) -> None:
    generator = random.Random(seed)

    def flip(batch):
        return {"pixel_values": [torch.full((3, 4, 4), generator.random() < 0.5) for _ in batch["image"]]}

    with pytest.raises(UnrepeatableTransformError):
        check_repeatable(ViewDataset(images.with_transform(flip), 5), num_views=2)


def test_an_unrepeatable_train_transform_is_found_behind_a_repeatable_eval_transform(images) -> None:
    evaluation = TinyTransform(augment=False)
    views = ViewDataset(images, 5, OwnGenerator(random.Random(0)), evaluation)
    check_repeatable(views, num_views=1)  # only view 0 will be used
    with pytest.raises(UnrepeatableTransformError, match="row 0, view 1"):
        check_repeatable(views, num_views=2)


def test_repeatable_transforms_pass_whatever_they_return(images) -> None:
    check_repeatable(ViewDataset(images.with_transform(TinyTransform(augment=True)), 5), num_views=3)
    check_repeatable(ViewDataset(images.with_transform(OwnGenerator(random)), 5), num_views=3)

    def odd(batch):
        rows = len(batch["image"])
        return {
            "nan": [torch.tensor([float("nan"), random.random()])] * rows,
            "nested": [[{"a": np.random.rand(2)}, "text", None]] * rows,
        }

    check_repeatable(ViewDataset(images.with_transform(odd), 5), num_views=2)
    check_repeatable(ViewDataset(images.select([]).with_transform(odd), 5), num_views=2)


# ---- What the user's transform gets ----


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def images_of(contents: list[bytes]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": [0] * len(contents)}
    return datasets.Dataset.from_dict(rows, features=features)


def images_of_all_modes() -> tuple[list[str], datasets.Dataset]:
    rgb = make_images(1)[0]["image"]
    modes = ["RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "I;16"]
    gray = np.arange(IMAGE_SIZE**2, dtype=np.uint16).reshape(IMAGE_SIZE, IMAGE_SIZE) * 256
    pictures = [Image.fromarray(gray) if mode == "I;16" else rgb.convert(mode) for mode in modes]
    kinds = ["TIFF" if mode == "CMYK" else "PNG" for mode in modes]
    return modes, images_of([encoded(picture, kind) for picture, kind in zip(pictures, kinds, strict=True)])


class Looking:
    """Keeps the images that it got; it holds a lock, so it cannot be copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.images: list[Image.Image] = []

    def __call__(self, batch):
        self.images += batch["image"]
        return {"pixel_values": [torch.zeros(3, 4, 4) for _ in batch["image"]]}


@pytest.mark.parametrize("given", ["set", "apart"])
def test_the_users_own_transform_gets_images_as_they_are_stored(given) -> None:
    modes, dataset = images_of_all_modes()
    transform = Looking()
    if given == "set":
        dataset.set_transform(transform)
        views = ViewDataset(dataset, 0)
    else:
        dataset.set_transform(Looking())  # this one cannot be copied either
        views = ViewDataset(dataset, 0, transform, transform)
    for row in range(len(modes)):
        views[row, 1]
    # Older versions of Pillow read 16 bits as 32.
    assert [image.mode.replace(";16", "") for image in transform.images] == [mode.replace(";16", "") for mode in modes]
    assert len(np.unique(np.array(transform.images[-1]))) == 256
    dataset.reset_format()
    for row, image in enumerate(transform.images):
        assert np.array_equal(np.array(image), np.array(dataset[row]["image"]))


def test_a_transform_that_fails_on_an_image_of_another_mode_is_told_the_mode() -> None:
    modes, dataset = images_of_all_modes()
    views = ViewDataset(dataset.with_transform(TinyTransform(augment=True)), 0)
    assert views[0]["pixel_values"].shape == (3, IMAGE_SIZE, IMAGE_SIZE)
    with pytest.raises(DataError, match=r"^Row 1 .*'image' has mode 'L'.*convert\('RGB'\)"):
        views[modes.index("L")]


# ---- Transforms that mix the rows of a batch ----


class Mixing:
    """Mixes rows in a way; ``augment`` draws as people do: all crops first, then all noise."""

    def __init__(self, how: str, augment: bool) -> None:
        self.how, self.plain = how, TinyTransform(augment)

    def __call__(self, batch):
        batch = self.plain(batch)
        pixels = torch.stack(batch["pixel_values"])
        if self.how == "mixup":
            share = np.random.beta(0.4, 0.4)
            pixels = share * pixels + (1 - share) * pixels[torch.randperm(len(pixels))]
        elif self.how == "mixup, half of the time" and random.random() < 0.5:
            pixels = 0.5 * pixels + 0.5 * pixels.roll(1, 0)
        elif self.how == "norm over the batch":
            pixels = (pixels - pixels.mean()) / pixels.std()
        elif self.how == "cutmix" and len(pixels) > 1:
            pixels[0, :, :4, :4] = pixels[-1, :, :4, :4]
        elif self.how == "reversed":
            pixels = pixels.flip(0)
        return {**batch, "pixel_values": list(pixels)}


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("how", ["mixup", "mixup, half of the time", "norm over the batch", "cutmix", "reversed"])
def test_a_transform_that_mixes_rows_is_found(images, how, augment) -> None:
    assert check_repeatable(ViewDataset(images.with_transform(Mixing(how, augment)), 5), 1)
    assert check_repeatable(ViewDataset(images, 5, Mixing(how, augment), TinyTransform(augment=False)), 2)
    assert not check_repeatable(ViewDataset(images, 5, Mixing(how, augment), TinyTransform(augment=False)), 1)


def draws_by_image(batch):
    """Draws more often for brighter images, as crops that are tried again; then adds noise to all."""
    pixels = [torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) for image in batch["image"]]
    for each in pixels:
        while random.random() < float(each.mean()) / 255:
            each *= 0.99
    return {"pixel_values": [each + random.random() for each in pixels], "labels": batch["label"]}


def draws_at_once(batch):
    noise = np.random.rand(len(batch["image"]))
    return {"pixel_values": [torch.full((3, 4, 4), float(each)) for each in noise], "labels": batch["label"]}


def one_row_only(batch):
    (image,) = batch["image"]
    return {"pixel_values": [torch.full((3, 4, 4), float(np.array(image).mean()))], "labels": batch["label"]}


@pytest.mark.parametrize(
    "transform", [TinyTransform(True), TinyTransform(False), draws_by_image, draws_at_once, one_row_only]
)
def test_a_transform_that_treats_each_row_by_itself_is_not_taken_for_one_that_mixes(images, transform) -> None:
    assert not check_repeatable(ViewDataset(images.with_transform(transform), 5), 2)
    assert not check_repeatable(ViewDataset(images.select([0]).with_transform(transform), 5), 2)


def test_rows_rendered_together_are_those_of_one_call(images) -> None:
    mixing, plain = Mixing("mixup", augment=True), TinyTransform(augment=False)
    views = ViewDataset(images.with_transform(mixing), 5).rendered_together()
    with seeded(5, 3, 2):
        expected = images.with_transform(mixing)[[3, 1, 7]]["pixel_values"]
    found = [example["pixel_values"] for example in views.__getitems__([(3, 2), (1, 2), (7, 2)])]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Rows of view 0 have a transform of their own.
    both = ViewDataset(images, 5, mixing, plain).rendered_together().__getitems__([(3, 1), (1, 0), (7, 1)])
    assert torch.equal(both[1]["pixel_values"], images.with_transform(plain)[1]["pixel_values"])
    assert not torch.equal(both[0]["pixel_values"], images.with_transform(plain)[3]["pixel_values"])


# ---- Images that are none ----


@pytest.mark.parametrize("content", [b"no image at all", b"", encoded(Image.new("RGB", (64, 64)))[:60]])
def test_a_corrupt_image_is_an_error_that_names_its_row(content) -> None:
    good = encoded(Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)))
    views = ViewDataset(images_of([good, good, content, good]).with_transform(TinyTransform(augment=True)), 0)
    assert views[1, 1]["pixel_values"].shape == (3, IMAGE_SIZE, IMAGE_SIZE)
    before = states()
    with pytest.raises(DataError, match=r"^Row 2 of the training data set could not be rendered \(view 1\)") as caught:
        views[2, 1]
    assert states() == before
    assert caught.value.__cause__ is not None
    assert type(caught.value.__cause__).__name__ in str(caught.value)
    assert "dataset.select" in str(caught.value)


def test_a_transform_that_fails_names_the_row(images) -> None:
    views = ViewDataset(images.with_transform(lambda batch: {"pixel_values": batch["picture"]}), 0)
    with pytest.raises(DataError, match=r"Row 4 .* \(view 0\): KeyError: 'picture'"):
        views[4]


class Mosaic:
    """Makes one image of each four."""

    def __call__(self, batch):
        images = [torch.from_numpy(np.array(image, dtype=np.float32)) for image in batch["image"]]
        for first in range(0, len(images) // 4 * 4, 4):
            images[first : first + 4] = [torch.stack(images[first : first + 4]).mean(0)] * 4
        return {"pixel_values": images}


def test_a_transform_that_mixes_many_rows_only_is_found(images) -> None:
    assert check_repeatable(ViewDataset(images.with_transform(Mosaic()), 0), 1)
