"""A training transform that tells where it cut: random resized crop, flip and colour, seeded and replayable."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance

from ..errors import (
    DataError,
    UnsupportedSetupError,
)
from .geometry import Box, ViewParameters, _recorder
from .seeding import seeded

__all__ = [
    "ImageTransform",
]


#: In the order in which they are drawn.
AUGMENTATIONS = ("crop", "flip", "colour")
#: Part of the hashed state. Raise it when the same settings begin to give other pixels or draws: caches name it.
REVISION = 1
#: Attempts of torchvision's ``RandomResizedCrop`` before it falls back to the middle.
CROP_ATTEMPTS = 10


def _pair(name: str, value: Any, kind: type) -> tuple[Any, Any]:
    try:
        first, second = value
        return kind(first), kind(second)
    except (TypeError, ValueError) as error:
        raise UnsupportedSetupError(f"{name}={value!r} is no pair of numbers.") from error


class ImageTransform:
    """Renders images for a vision transformer: with ``train`` cropped, flipped and coloured at random.

    To be given to ``Dataset.set_transform`` or as ``train_transform``/``eval_transform``. Parameters are drawn from Python's
    ``random`` alone, so under ``views.seeded(seed, sample_index, view)`` they depend on these three numbers and on the
    image's size. All state is plain numbers and names: equal settings hash alike, in any process.

    Crops are those of torchvision's ``RandomResizedCrop``, whose defaults (area 0.08 to 1, aspect ratio 3/4 to 4/3; Szegedy
    et al., "Going Deeper with Convolutions") and flip probability of 0.5 are the defaults here. Colour factors are drawn as
    by torchvision's ``ColorJitter``, and are applied to the cropped and resized image in a fixed order.

    Args:
        size: Width and height of the rendering in pixels; one number for a square.
        train: Whether to draw at random. Without, images are resized and cropped at the centre, as for evaluation.
        scale: Least and greatest area of a random crop, as a fraction of the image's; ``None``: no random crops, training
            images are resized as for evaluation.
        ratio: Least and greatest width / height of a random crop, in pixels of the image, drawn uniformly in its logarithm.
        flip: Probability of exchanging left and right.
        brightness: ``x`` draws the factor uniformly from ``[max(0, 1 - x), 1 + x]``; 0 switches it off.
        contrast: The same for contrast.
        saturation: The same for saturation.
        mean: Subtracted from red, green and blue, after ``rescale``. The default, with ``std``, is the one of ViT's image
            processor: pixels from -1 to 1.
        std: Divides red, green and blue.
        rescale: Factor that turns pixels of 0 to 255 into the unit of ``mean`` and ``std``.
        resample: One of ``PIL.Image.Resampling``.
        shortest_edge: For evaluation, resize the shorter side to so many pixels, then cut ``size`` from the centre.
        resized: For evaluation, resize to this width and height, then cut ``size`` from the centre. Default, without
            ``shortest_edge``: resize to ``size``.
        image_column: Column of the images.
        label_column: Column that is passed on as ``labels``; ``None`` for none.

    Raises:
        UnsupportedSetupError: A setting is out of its range.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        train: bool,
        scale: tuple[float, float] | None = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        rescale: float = 1 / 255,
        resample: int = Image.Resampling.BILINEAR,
        shortest_edge: int | None = None,
        resized: tuple[int, int] | None = None,
        image_column: str = "image",
        label_column: str | None = "label",
    ) -> None:
        # Every number is converted and every tuple made anew: 1 and 1.0, or one tuple used twice, hash differently.
        self.revision = REVISION
        self.size = _pair("size", (size, size) if isinstance(size, int) else size, int)
        self.train = bool(train)
        self.scale = None if scale is None else _pair("scale", scale, float)
        self.ratio = _pair("ratio", ratio, float)
        self.flip = float(flip)
        self.brightness, self.contrast, self.saturation = float(brightness), float(contrast), float(saturation)
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.rescale = float(rescale)
        self.resample = int(resample)
        self.shortest_edge = None if shortest_edge is None else int(shortest_edge)
        self.resized = None if resized is None else _pair("resized", resized, int)
        self.image_column, self.label_column = image_column, label_column
        self.kept: tuple[str, ...] = AUGMENTATIONS
        self._check()

    def _check(self) -> None:
        def refuse(name: str, expected: str) -> None:
            raise UnsupportedSetupError(f"{name}={getattr(self, name)!r}: expected {expected}.")

        # Conditions say what is right, so that NaN is wrong.
        if not min(self.size) >= 1:
            refuse("size", "a width and a height of at least one pixel")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            refuse("scale", "least and greatest area of a crop, 0 < least <= greatest <= 1; None switches crops off")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            refuse("ratio", "least and greatest width / height of a crop, 0 < least <= greatest, as in (3/4, 4/3)")
        if not 0 <= self.flip <= 1:
            refuse("flip", "a probability from 0 to 1; 0 switches flips off")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < math.inf:
                refuse(name, "a number of at least 0, the greatest change of a factor of 1; 0 switches it off")
        if len(self.mean) != 3 or not all(map(math.isfinite, self.mean)):
            refuse("mean", "three numbers, of red, green and blue")
        if len(self.std) != 3 or not all(0 < value < math.inf for value in self.std):
            refuse("std", "three numbers above 0, of red, green and blue")
        if not math.isfinite(self.rescale):
            refuse("rescale", "a number, as in 1/255")
        if self.resample not in list(Image.Resampling):
            refuse("resample", f"one of {', '.join(f'{int(kind)} ({kind.name})' for kind in Image.Resampling)}")
        if self.shortest_edge is not None and not self.shortest_edge >= 1:
            refuse("shortest_edge", "at least one pixel, or None")
        if self.resized is not None and not min(self.resized) >= 1:
            refuse("resized", "a width and a height of at least one pixel, or None")
        if self.resized is not None and self.shortest_edge is not None:
            refuse("resized", f"None beside shortest_edge={self.shortest_edge}; give one of them")

    @classmethod
    def from_processor(cls, processor: Any, *, train: bool, **settings: Any) -> ImageTransform:
        """Make a transform that renders as a Hugging Face image processor does, with ``train`` augmented.

        Reads ``size``, ``crop_size``, ``do_center_crop``, ``resample``, ``rescale_factor``, ``do_rescale``, ``image_mean``,
        ``image_std`` and ``do_normalize`` of ``processor.to_dict()``. Images are always resized and always made RGB.

        Args:
            processor: A processor whose ``size`` is a height and a width, or a ``shortest_edge``.
            train: Whether to draw at random.
            settings: Further arguments of ``ImageTransform``; they replace what the processor says.

        Raises:
            UnsupportedSetupError: The processor names no size of this kind, or a setting is out of its range.
        """
        found = processor.to_dict()
        size = dict(found.get("size") or {})
        crop = dict(found.get("crop_size") or {}) if found.get("do_center_crop") else size
        shortest = size.get("shortest_edge")
        output = tuple(crop.get(side) or crop.get("shortest_edge") for side in ("width", "height"))
        resample = found.get("resample")
        read: dict[str, Any] = {
            "resample": Image.Resampling.BILINEAR if resample is None else resample,
            "rescale": found["rescale_factor"] if found.get("do_rescale", True) else 1.0,
            "mean": found["image_mean"] if found.get("do_normalize", True) else (0.0, 0.0, 0.0),
            "std": found["image_std"] if found.get("do_normalize", True) else (1.0, 1.0, 1.0),
        }
        # A size of the caller's own replaces the processor's resizing as well, which was meant for another size.
        if "size" not in settings:
            resized = None if shortest else (size.get("width"), size.get("height"))
            if None in output or (resized is not None and None in resized):
                raise UnsupportedSetupError(
                    f"{type(processor).__name__} has size={size} and crop_size={crop}: expected a height and a width, or "
                    "a shortest_edge. Give the size in pixels yourself: from_processor(..., size=(width, height))."
                )
            read |= {"size": output, "shortest_edge": shortest, "resized": None if resized == output else resized}
        return cls(train=train, **{**read, **settings})

    # ---- What is drawn ----

    @property
    def augmentations(self) -> tuple[str, ...]:
        """Those of ``("crop", "flip", "colour")`` that are switched on, in this order; none without ``train``."""
        on = {"crop": self.scale is not None, "flip": self.flip > 0, "colour": self._jitters}
        return tuple(name for name in AUGMENTATIONS if self.train and name in self.kept and on[name])

    @property
    def _jitters(self) -> bool:
        return max(self.brightness, self.contrast, self.saturation) > 0

    def only(self, augmentation: str) -> ImageTransform:
        """Return the same transform with only one random part left, to measure what this part alone changes.

        Under the same random state it draws for this part what the whole transform draws. Without ``"crop"``, images are
        resized and cropped as for evaluation.

        Args:
            augmentation: ``"crop"``, ``"flip"`` or ``"colour"``.

        Raises:
            UnsupportedSetupError: ``augmentation`` is none of these.
        """
        if augmentation not in AUGMENTATIONS:
            raise UnsupportedSetupError(
                f"There is no augmentation {augmentation!r}. Choose one of: {', '.join(AUGMENTATIONS)}."
            )
        other = copy.copy(self)
        other.kept = tuple(name for name in self.kept if name == augmentation)
        return other

    def draw(self, width: int, height: int) -> ViewParameters:
        """Draw the parameters of one view from Python's ``random``: crop, then flip, then colour.

        Parts that ``only`` left out are drawn too, and thrown away, so that the others come out the same. Without ``train``
        nothing is drawn.

        Args:
            width: Of the image, in pixels.
            height: Of the image, in pixels.

        Raises:
            DataError: The image has no pixels.
        """
        if width < 1 or height < 1:
            raise DataError(f"The image has {width} x {height} pixels: remove its row, there is nothing to render.")
        box = self._evaluation_box(width, height)
        if not self.train:
            return ViewParameters(*box)
        if self.scale is not None:
            crop = self._draw_crop(self.scale, width, height)
            box = crop if "crop" in self.kept else box
        flip = random.random() < self.flip and "flip" in self.kept
        factors = [1.0, 1.0, 1.0]
        if self._jitters:
            # All three, so that switching one off leaves the others as they were.
            widths = (self.brightness, self.contrast, self.saturation)
            drawn = [random.uniform(max(0.0, 1 - width), 1 + width) for width in widths]
            factors = drawn if "colour" in self.kept else factors
        return ViewParameters(*box, flip, *factors)

    def parameters(self, seed: int, sample_index: int, view: int, width: int, height: int) -> ViewParameters:
        """Recover what this transform draws for a view, from its key and the image's size alone.

        Args:
            seed: Seed of the views.
            sample_index: Row of the training data set.
            view: Number of the view. Where ``train_transform`` and ``eval_transform`` are two, ask the one that renders it.
            width: Of the image, in pixels.
            height: Of the image, in pixels.

        Raises:
            DataError: The image has no pixels.
        """
        with seeded(seed, sample_index, view):
            return self.draw(width, height)

    def _draw_crop(self, scale: tuple[float, float], width: int, height: int) -> Box:
        """``torchvision.transforms.RandomResizedCrop.get_params``, with Python's generator."""
        least, greatest = self.ratio
        for _ in range(CROP_ATTEMPTS):
            area = width * height * random.uniform(*scale)
            ratio = math.exp(random.uniform(math.log(least), math.log(greatest)))
            across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < across <= width and 0 < down <= height:
                left, top = random.randint(0, width - across), random.randint(0, height - down)
                break
        else:
            # The middle, as much of it as the ratio allows.
            across = max(1, min(width, round(height * greatest)))
            down = max(1, min(height, round(width / least)))
            left, top = (width - across) // 2, (height - down) // 2
        return left / width, top / height, (left + across) / width, (top + down) / height

    # ---- How it is rendered ----

    def _evaluation_size(self, width: int, height: int) -> tuple[int, int]:
        if self.shortest_edge is None:
            return self.resized or self.size
        # Rounded down, as in transformers' get_resize_output_image_size.
        shortest = min(width, height)
        return int(self.shortest_edge * width / shortest), int(self.shortest_edge * height / shortest)

    def _evaluation_corner(self, width: int, height: int) -> tuple[int, int]:
        """Left and upper edge of the centre crop in pixels of the resized image; below 0 where that is too small."""
        across, down = self._evaluation_size(width, height)
        return (across - self.size[0]) // 2, (down - self.size[1]) // 2

    def _evaluation_box(self, width: int, height: int) -> Box:
        across, down = self._evaluation_size(width, height)
        left, top = self._evaluation_corner(width, height)
        return left / across, top / down, (left + self.size[0]) / across, (top + self.size[1]) / down

    def render(self, image: Image.Image, parameters: ViewParameters) -> torch.Tensor:
        """Render one view; the same arguments give the same bits.

        The box of evaluation is rendered as the image processor does: resized, then cropped. Any other box is cropped, its
        edges rounded to whole pixels, then resized, as by torchvision.

        Args:
            image: An image of any mode; it is converted to RGB.
            parameters: Drawn for an image of this size.

        Returns:
            Shape ``(3, height, width)``, ``float32``: ``(pixels * rescale - mean) / std``.

        Raises:
            DataError: The crop holds no pixel of the image.
        """
        image = image.convert("RGB")
        width, height = image.size
        box = parameters.geometry()[:4]
        # Less than any pixel of an image that PIL opens, more than what float32 loses on the way through a file.
        if all(abs(a - b) < 1e-6 for a, b in zip(box, self._evaluation_box(width, height), strict=True)):
            left, top = self._evaluation_corner(width, height)
            image = image.resize(self._evaluation_size(width, height), self.resample)
            image = image.crop((left, top, left + self.size[0], top + self.size[1]))
        else:
            edges = tuple(round(edge * side) for edge, side in zip(box, (width, height) * 2, strict=True))
            if not (edges[0] < edges[2] and edges[1] < edges[3]):
                raise DataError(
                    f"The crop {box} of an image of {width} x {height} pixels is empty: expected left < right and "
                    "top < bottom, at least a pixel apart. Draw parameters for this image's size."
                )
            image = image.crop(edges).resize(self.size, self.resample)
        if parameters.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for enhance, factor in (
            (ImageEnhance.Brightness, parameters.brightness),
            (ImageEnhance.Contrast, parameters.contrast),
            (ImageEnhance.Color, parameters.saturation),
        ):
            if factor != 1:
                image = enhance(image).enhance(factor)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
        mean, std = torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)
        return (pixels * self.rescale - mean) / std

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Draw and render one view of each image of a batch, as ``Dataset.set_transform`` wants it.

        Args:
            batch: Columns of rows, among them PIL images in ``image_column``.

        Returns:
            ``pixel_values``, a list of tensors as of ``render``, and ``labels``, the ``label_column`` as it came.

        Raises:
            DataError: A column is missing, or an image is none.
        """
        for option, column in (("image_column", self.image_column), ("label_column", self.label_column)):
            if column is not None and column not in batch:
                advice = " or None" if option == "label_column" else ""
                raise DataError(
                    f"The rows have no column {column!r} but {', '.join(map(repr, batch)) or 'none'}: set {option} to one "
                    f"of them{advice}. (Trainer drops columns the model does not take: remove_unused_columns=False.)"
                )
        recorder = _recorder.get()
        pixel_values = []
        for image in batch[self.image_column]:
            if not isinstance(image, Image.Image):
                raise DataError(
                    f"Column {self.image_column!r} holds {type(image).__name__}, not PIL images: cast it with "
                    "dataset.cast_column(name, datasets.Image()), and remove rows without an image."
                )
            parameters = self.draw(*image.size)
            pixel_values.append(self.render(image, parameters))
            if recorder is not None:
                recorder.append(parameters)
        labels = {} if self.label_column is None else {"labels": batch[self.label_column]}
        return {"pixel_values": pixel_values, **labels}
