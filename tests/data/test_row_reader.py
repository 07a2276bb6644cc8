"""Views of a row that was read once are those of a row that is read for each of them."""

from __future__ import annotations

import io
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageDraw, ImageEnhance
from support.images import make_images
from support.tiny import IMAGE_SIZE, TinyTransform

from hf_freezecache.data.image_transform import ImageTransform
from hf_freezecache.data.row_reader import DecodedRow
from hf_freezecache.data.views import ViewDataset, same_examples
from hf_freezecache.errors import DataError

VIEWS = (0, 1, 2)
ROWS = 6


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Grows by one entry per image that is decoded."""
    entries: list[int] = []
    genuine = datasets.Image.decode_example

    def decode(self, value, *args, **kwargs):
        entries.append(1)
        return genuine(self, value, *args, **kwargs)

    monkeypatch.setattr(datasets.Image, "decode_example", decode)
    return entries


def square(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE))


class Painting(TinyTransform):
    """Changes all it gets, in place, and fails where somebody else has done so before."""

    def __call__(self, batch):
        for image in batch["image"]:
            assert "seen" not in image.info
            image.info["seen"] = True
            image.getexif()[ExifTags.Base.Software] = "seen"
            corner = random.randrange(4)
            ImageDraw.Draw(image).rectangle((corner, corner, corner + 8, corner + 8), fill="red")
            image.load()[0, 0] = (1, 2, 3)
            image.thumbnail((9, 9))
        images = [square(image) for image in batch.pop("image")]
        for label in batch["label"]:
            if isinstance(label, list):
                label.append(len(label))
        return super().__call__({"image": images, "label": batch.pop("label")})


class OfFile(TinyTransform):
    """Reads off an image what its file was."""

    def __call__(self, batch):
        images = [square(image) for image in batch["image"]]
        for place, image in enumerate(batch["image"]):
            known = repr(
                (image.format, sorted(image.info), dict(image.getexif()), image.getbands(), image.getpalette())
            )
            brightness = sum(known.encode()) % 100 / 100
            images[place] = ImageEnhance.Brightness(images[place]).enhance(brightness)
        return super().__call__({"image": images, "label": batch["label"]})


class OfBytes(TinyTransform):
    """Decodes by itself."""

    def __call__(self, batch):
        images = [square(Image.open(io.BytesIO(file["bytes"]))) for file in batch["image"]]
        return super().__call__({"image": images, "label": batch["label"]})


class OfTheImageAlone(TinyTransform):
    def __call__(self, batch):
        rendered = super().__call__({"image": batch["image"], "label": [0] * len(batch["image"])})
        return {"pixel_values": rendered["pixel_values"]}


def files(format: str, **settings) -> datasets.Dataset:
    """Images in files of a format."""
    rows = []
    for row in make_images(ROWS):
        file = io.BytesIO()
        row["image"].resize((24, 20)).save(file, format, **settings)
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": row["label"]})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_list(rows, features=features)


def with_exif() -> datasets.Dataset:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "a camera"
    return files("JPEG", exif=exif)


def turned() -> datasets.Dataset:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return files("JPEG", exif=exif)


def animated(format: str) -> datasets.Dataset:
    return files(format, save_all=True, append_images=[Image.new("RGB", (24, 20), "blue")])


def lists() -> datasets.Dataset:
    rows = make_images(ROWS)
    labels = [[row % 2, row % 3] for row in range(ROWS)]
    return rows.remove_columns("label").add_column("label", labels)


def assert_same_views(views: ViewDataset, decoded: list[int], decodes: int) -> None:
    expected = [[views[row, view] for view in VIEWS] for row in range(ROWS)]
    assert not same_examples(expected[0][1], expected[0][2])
    once = views.reading_once()
    del decoded[:]
    found = [once.render_views(row, VIEWS) for row in range(ROWS)]
    assert len(decoded) == decodes
    assert same_examples(found, expected)


@pytest.mark.parametrize(
    ("dataset", "transform", "decodes"),
    [
        pytest.param(lambda: make_images(ROWS), TinyTransform(True), ROWS, id="opaque"),
        pytest.param(lambda: make_images(ROWS), ImageTransform(IMAGE_SIZE, train=True), ROWS, id="ours"),
        pytest.param(lambda: make_images(2 * ROWS).shuffle(seed=1), TinyTransform(True), ROWS, id="shuffled"),
        pytest.param(lambda: make_images(ROWS), Painting(True), ROWS, id="in place"),
        pytest.param(lists, Painting(True), ROWS, id="lists in place"),
        pytest.param(lambda: files("PNG"), Painting(True), ROWS, id="png in place"),
        *(
            pytest.param(lambda format=format: files(format), OfFile(True), ROWS, id=format)
            for format in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "MPO")
        ),
        pytest.param(with_exif, OfFile(True), ROWS, id="exif"),
        pytest.param(turned, OfFile(True), ROWS, id="turned"),
        pytest.param(with_exif, Painting(True), ROWS, id="exif in place"),
        # Nothing says how these are copied.
        pytest.param(lambda: files("TIFF"), OfFile(True), 3 * ROWS, id="TIFF"),
        pytest.param(lambda: animated("WEBP"), OfFile(True), 3 * ROWS, id="animated"),
        pytest.param(
            lambda: files("JPEG").cast_column("image", datasets.Image(decode=False)), OfBytes(True), 0, id="undecoded"
        ),
    ],
)
def test_views_are_the_same_and_rows_are_decoded_once(decoded, dataset, transform, decodes) -> None:
    assert_same_views(ViewDataset(dataset().with_transform(transform), 3), decoded, decodes)


def test_a_base_view_of_another_transform_shares_the_row(decoded) -> None:
    rows, evaluation = make_images(ROWS), ImageTransform(IMAGE_SIZE, train=False)
    assert_same_views(ViewDataset(rows, 3, Painting(True), evaluation), decoded, ROWS)
    views = ViewDataset(rows, 3, ImageTransform(IMAGE_SIZE, train=True), evaluation)
    assert_same_views(views.with_geometry(), decoded, ROWS)


def test_columns_beside_the_transform_are_those_of_the_data_set(decoded) -> None:
    rows = lists().rename_column("label", "labels")
    rows = rows.with_transform(OfTheImageAlone(True), columns=["image"], output_all_columns=True)
    assert_same_views(ViewDataset(rows, 3), decoded, ROWS)
    first, second, _ = ViewDataset(rows, 3).reading_once().render_views(1, VIEWS)
    first["labels"].append(7)
    assert second["labels"] == [1, 1]


def test_files_on_disk(decoded, tmp_path: Path) -> None:
    places = []
    for number, row in enumerate(make_images(ROWS)):
        places.append(str(tmp_path / f"{number}.{['png', 'jpg', 'webp'][number % 3]}"))
        row["image"].save(places[-1])
    rows = datasets.Dataset.from_dict({"image": places, "label": [0] * ROWS}).cast_column("image", datasets.Image())
    assert_same_views(ViewDataset(rows.with_transform(Painting(True)), 3), decoded, ROWS)


def test_data_sets_of_the_users_own_render_each_view_themselves() -> None:
    rows = make_images(ROWS).with_transform(TinyTransform(True))

    class Whole(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, row: int):
            return rows[row]

    class Doubled(datasets.Dataset):
        def __getitem__(self, row):
            return {**super().__getitem__(row), "row": row}

    doubled = Doubled(rows.data, rows.info, fingerprint="doubled")
    doubled.set_transform(TinyTransform(True))
    for dataset in (
        Whole(),
        torch.utils.data.Subset(rows, range(ROWS)),
        doubled,
        make_images(ROWS).with_format("torch"),
    ):
        views = ViewDataset(dataset, 3).reading_once()
        assert not views.reads_once
        assert same_examples(views.render_views(1, VIEWS), [views[1, view] for view in VIEWS])


def test_decoding_that_draws_is_drawn_for_each_view(monkeypatch) -> None:
    genuine = datasets.Image.decode_example

    def draw(self, value, *args, **kwargs):
        return genuine(self, value, *args, **kwargs).rotate(90 * np.random.randint(4))

    monkeypatch.setattr(datasets.Image, "decode_example", draw)
    views = ViewDataset(make_images(ROWS).with_transform(TinyTransform(True)), 3)
    once = views.reading_once()
    for row in range(ROWS):
        assert same_examples(once.render_views(row, VIEWS), [views[row, view] for view in VIEWS])


def test_a_bad_row_has_the_message_of_its_view() -> None:
    rows = make_images(3).cast_column("image", datasets.Image(decode=False))
    broken = [{**row, "image": {"bytes": b"no image", "path": None}} if n == 1 else row for n, row in enumerate(rows)]
    views = ViewDataset(
        datasets.Dataset.from_list(broken).cast_column("image", datasets.Image()).with_transform(TinyTransform(True)), 3
    )
    once = views.reading_once()
    assert len(once.render_views(0, VIEWS)) == 3
    with pytest.raises(DataError, match=r"Row 1 .* \(view 0\)"):
        once.render_views(1, VIEWS)

    def fail_at_a_view(batch):
        if random.random() < 0.2:
            raise ValueError("no more")
        return TinyTransform(False)(batch)

    views = ViewDataset(make_images(3).with_transform(fail_at_a_view), 3)
    failing = [view for view in range(9) if not renders(views, (0, view))]
    assert failing[0] > 0
    with pytest.raises(DataError, match=rf"Row 0 .* \(view {failing[0]}\).*no more"):
        views.reading_once().render_views(0, range(9))


def renders(views: ViewDataset, key: tuple[int, int]) -> bool:
    try:
        return bool(views[key])
    except DataError:
        return False


def test_copies_know_what_the_image_knew() -> None:
    (image,) = (row["image"] for row in with_exif().select([0]))
    (other,) = DecodedRow({"image": [image]}, {}).copied(TinyTransform(True)).batch["image"]
    assert other is not image
    assert type(other) is type(image)
    assert vars(other).keys() == vars(image).keys()
    assert other == image
    assert other.quantization == image.quantization
    other.quantization[0][0] += 1
    assert other.quantization != image.quantization
