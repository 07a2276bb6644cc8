"""Rows as the transform of a data set gets them: read and decoded once, and handed out once for each view."""

from __future__ import annotations

import copy
import datetime
import decimal
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageFile, ImagePalette

from .image_transform import ImageTransform
from .seeding import random_states

__all__ = ["DecodedRow", "RowReader", "can_share_rows"]

_IMMUTABLE = (
    type(None),
    str,
    bytes,
    int,
    float,
    complex,
    np.number,
    np.bool_,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    decimal.Decimal,
)
#: Parts of images that Python's own deep copy copies.
_DEEP = (Image.Exif, ImagePalette.ImagePalette, io.BytesIO)


@dataclass
class _Copier:
    """Copies what a row holds, so that no change to the copy shows in the original.

    Attributes:
        images: Whether images are copied; if not, the copy holds the same ones.
    """

    images: bool = True

    def __call__(self, value: Any) -> Any:
        """Return a copy; what cannot be changed is itself.

        Raises:
            TypeError: It holds something of an unknown type.
        """
        kind = type(value)
        if isinstance(value, _IMMUTABLE) or (isinstance(value, io.IOBase) and value.closed):
            return value
        if kind is dict:
            return {self(key): self(part) for key, part in value.items()}
        if kind in (list, tuple):
            return kind(map(self, value))
        if kind is np.ndarray and not value.dtype.hasobject:
            return value.copy(order="K")
        if isinstance(value, Image.Image):
            return self._image(value) if self.images else value
        if kind in _DEEP:
            return copy.deepcopy(value)
        raise TypeError(f"nothing says how to copy {kind.__name__}")

    def _image(self, image: Image.Image) -> Image.Image:
        """Copy an image with all that it knows of its file. ``Image.copy`` would leave out format and file name."""
        if isinstance(image, ImageFile.ImageFile) and (image.tile or image.fp is not None):
            raise TypeError("the image is not loaded, or may be loaded on")
        # These copy themselves, or, with a single frame, are of no more use.
        known = {id(image.im): image.im.copy()}
        # Not through properties: some read on in the file.
        held = vars(image)
        if held.get("n_frames", 1) == 1 and "_decoder" in held:
            known[id(held["_decoder"])] = held["_decoder"]
        attributes = {name: known[id(value)] if id(value) in known else self(value) for name, value in held.items()}
        other = object.__new__(type(image))
        vars(other).update(attributes)
        return other


class _Catcher:
    """A transform that keeps the batch that it gets, and returns nothing."""

    def __init__(self) -> None:
        self.batch: Any = None

    def __call__(self, batch: Any) -> dict[str, Any]:
        self.batch = batch
        return {}


@dataclass
class DecodedRow:
    """One row, read and decoded.

    Attributes:
        batch: What the transform gets: columns of one row.
        rest: Columns that the data set adds to what the transform gives, by name.
    """

    batch: dict[str, list[Any]]
    rest: dict[str, Any]

    def copied(self, transform: Any) -> DecodedRow | None:
        """Return a copy that a transform may change; ``None`` if something in the row cannot be copied."""
        # Our own transform leaves images as they are.
        copier = _Copier(images=type(transform) is not ImageTransform)
        try:
            return DecodedRow(copier(self.batch), copier(self.rest))
        except Exception:  # classes of images and features that nobody here knows
            return None

    def transformed(self, transform: Callable[[Any], Any]) -> dict[str, Any]:
        """Return the example that the data set would give. The transform may change this row."""
        return {name: column[0] for name, column in transform(self.batch).items()} | self.rest


class RowReader:
    """Reads rows of a ``datasets.Dataset`` up to its transform, through ``datasets`` itself.

    Args:
        dataset: A data set for which ``can_share_rows`` holds.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        layout = dataset.format
        self._catcher = _Catcher()
        self._dataset = copy.copy(dataset)
        self._dataset.set_format(
            "custom",
            columns=layout["columns"],
            output_all_columns=layout["output_all_columns"],
            transform=self._catcher,
        )
        self._draws: bool | None = None

    def read(self, sample_index: int) -> DecodedRow | None:
        """Read and decode a row; ``None`` if decoding draws random numbers, so that each view is decoded in its own way.

        Only the first row that is read tells: looking at random states takes as long as decoding a small image.

        Raises:
            Exception: Whatever reading or decoding raises.
        """
        if self._draws:
            return None
        before = random_states() if self._draws is None else None
        rest = self._dataset[sample_index]
        batch, self._catcher.batch = self._catcher.batch, None
        if before is not None:
            self._draws = random_states() != before
        return None if self._draws else DecodedRow(batch, rest)


def can_share_rows(*sources: Any) -> bool:
    """Say whether data sets give their rows to known transforms, and the same rows to all of them.

    Args:
        sources: What renders the views: one data set, or the same one with different transforms.
    """
    layouts = []
    for source in sources:
        if type(source) is not datasets.Dataset:
            return False
        layout = source.format
        if layout["type"] != "custom" or "transform" not in (layout["format_kwargs"] or {}):
            return False
        layouts.append((layout["columns"], layout["output_all_columns"]))
    return all(layout == layouts[0] for layout in layouts)
