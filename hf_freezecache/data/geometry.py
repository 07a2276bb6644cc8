"""Crop and flip of views: how they are drawn, described in five numbers, recorded, and applied to pixels.

The five numbers ``(left, top, right, bottom, flip)`` are defined at ``codecs.predictor.WHOLE``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from PIL import Image

from ..errors import DataError

__all__ = ["GEOMETRY_NAME", "Box", "CentreCrop", "ViewParameters", "crop_and_flip", "random_crop", "record", "recorded"]

#: Name of the extra (samples, 5) float32 that stores the five numbers of each view, where copies are predicted.
GEOMETRY_NAME = "view_geometry"

#: (left, top, right, bottom): the first four of the five numbers.
Box = tuple[float, float, float, float]

#: How often a crop is drawn before the centre is taken; as in torchvision's ``RandomResizedCrop``.
_CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn for one view of one image. Together with the image it determines the rendering.

    Random crops lie within the image. So does the centre crop of evaluation, mapped back to the original image, unless it is
    larger than the resized image: the pixels outside are black.

    Attributes:
        left: Left edge of the crop; like the next four, one of the five numbers of the geometry.
        top: Upper edge of the crop.
        right: Right edge of the crop.
        bottom: Lower edge of the crop.
        flip: Whether the crop is mirrored left to right.
        brightness: Factor of ``PIL.ImageEnhance.Brightness``; 1.0 changes nothing.
        contrast: Factor of ``PIL.ImageEnhance.Contrast``; 1.0 changes nothing.
        saturation: Factor of ``PIL.ImageEnhance.Color``; 1.0 changes nothing.
    """

    left: float
    top: float
    right: float
    bottom: float
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0

    @property
    def box(self) -> Box:
        """The crop, ``(left, top, right, bottom)``."""
        return self.left, self.top, self.right, self.bottom

    def geometry(self) -> tuple[float, float, float, float, float]:
        """Return the five numbers ``(left, top, right, bottom, flip)``; ``flip`` is 0.0 or 1.0."""
        return *self.box, float(self.flip)


# ---- How crops are drawn ----


def random_crop(width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Draw a crop from Python's ``random``, on whole pixels of an image of ``width`` x ``height`` pixels.

    Where no crop of the drawn area and ratio fits, the result is the centre, as much of it as ``ratio`` allows.

    Args:
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        scale: Least and greatest area of the crop, as a fraction of the image's.
        ratio: Least and greatest width / height of the crop, in pixels of the image.

    Source: ``torchvision.transforms.RandomResizedCrop.get_params``, with Python's generator.
    """
    least, greatest = ratio
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(least), math.log(greatest)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = random.randint(0, width - crop_width), random.randint(0, height - crop_height)
            break
    else:
        crop_width = max(1, min(width, round(height * greatest)))
        crop_height = max(1, min(height, round(width / least)))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left / width, top / height, (left + crop_width) / width, (top + crop_height) / height


@dataclass(frozen=True)
class CentreCrop:
    """The crop of evaluation: an image is resized as a whole, and then cut at its centre.

    Attributes:
        resized: Width and height in pixels to which the image is resized.
        size: Width and height in pixels that are cut from it.
    """

    resized: tuple[int, int]
    size: tuple[int, int]

    @property
    def corner(self) -> tuple[int, int]:
        """Left and upper edge in pixels of the resized image; negative where that image is smaller than the crop."""
        return (self.resized[0] - self.size[0]) // 2, (self.resized[1] - self.size[1]) // 2

    @property
    def box(self) -> Box:
        """The same crop as fractions of the image."""
        (left, top), (width, height) = self.corner, self.resized
        return left / width, top / height, (left + self.size[0]) / width, (top + self.size[1]) / height


# ---- How they are applied to pixels ----


def crop_and_flip(image: Image.Image, view: ViewParameters, evaluation: CentreCrop, resample: int) -> Image.Image:
    """Crop an image, resize the crop and flip it.

    The box of ``evaluation`` is rendered as image processors do: resized, then cropped. Any other box is cropped, with its
    edges rounded to whole pixels, then resized, as torchvision does.

    Args:
        image: The whole image.
        view: What was drawn for an image of this size.
        evaluation: The crop of evaluation for an image of this size. Its ``size`` is that of the result.
        resample: One of ``PIL.Image.Resampling``.

    Raises:
        DataError: The crop contains no pixel of the image.
    """
    width, height = image.size
    # The tolerance is less than a pixel of any image that PIL opens, and more than what float32 loses in a file.
    if all(abs(a - b) < 1e-6 for a, b in zip(view.box, evaluation.box, strict=True)):
        left, top = evaluation.corner
        image = image.resize(evaluation.resized, resample)
        image = image.crop((left, top, left + evaluation.size[0], top + evaluation.size[1]))
    else:
        left, top, right, bottom = (
            round(edge * side) for edge, side in zip(view.box, (width, height) * 2, strict=True)
        )
        if not (left < right and top < bottom):
            raise DataError(
                f"The crop {view.box} of an image of {width} x {height} pixels is empty: expected left < right and "
                "top < bottom, at least a pixel apart. Draw parameters for this image's size."
            )
        image = image.crop((left, top, right, bottom)).resize(evaluation.size, resample)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else image


# ---- How they are recorded ----

_recorder: ContextVar[list[ViewParameters] | None] = ContextVar("_recorder", default=None)


@contextmanager
def recorded() -> Iterator[list[ViewParameters]]:
    """Collect the parameters of every image that a call of an ``ImageTransform`` renders in this context.

    Yields:
        A list that grows by one entry per image, in the order of rendering. It stays empty after a call of any other
        transform. Of nested contexts the innermost collects. Each thread has a list of its own.
    """
    entries: list[ViewParameters] = []
    token = _recorder.set(entries)
    try:
        yield entries
    finally:
        _recorder.reset(token)


def record(view: ViewParameters) -> None:
    """Add the parameters of a rendered image to the innermost ``recorded`` context, if there is one."""
    entries = _recorder.get()
    if entries is not None:
        entries.append(view)
