"""A training transform whose draws are known: random resized crop, flip and colour, seeded and repeatable."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance

from ..errors import DataError, UnsupportedSetupError
from .geometry import CentreCrop, ViewParameters, crop_and_flip, random_crop, record
from .seeding import seeded

__all__ = ["ImageTransform"]

#: In the order in which they are drawn.
AUGMENTATIONS = ("crop", "flip", "colour")
#: Part of the hashed state, and so of every fingerprint. Raise it when the same settings give other pixels or draws.
REVISION = 2


def _pair(name: str, value: Any, kind: type) -> tuple[Any, Any]:
    try:
        first, second = value
        return kind(first), kind(second)
    except (TypeError, ValueError) as error:
        raise UnsupportedSetupError(f"{name}={value!r} is no pair of numbers.") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in mode RGB.

    Raises:
        DataError: Its mode cannot be converted.
    """
    if image.mode == "RGB":  # a large image takes as long to copy as to crop and resize
        return image
    if image.mode.startswith("I;16"):  # Pillow would turn all above 255 white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(
            f"An image has mode {image.mode!r}, 32 bits a pixel, of which nothing says what is black and what is white. Store "
            "it with 8 or 16 bits a channel, or scale it in a transform of your own."
        )
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise DataError(
            f"An image has mode {image.mode!r}, which cannot be converted to RGB: {error}. Store it in another mode, or "
            "convert it in a transform of your own."
        ) from error


class ImageTransform:
    """Renders images for a vision transformer; with ``train`` it crops, flips and colours them at random.

    Pass it to ``Dataset.set_transform``, or as ``train_transform``/``eval_transform``. It draws from Python's ``random`` alone:
    under ``seeding.seeded(seed, sample_index, view)`` the draws depend on these three numbers and on the size of the image.
    All state is plain numbers and names, so equal settings hash alike in any process.

    Colour factors are drawn as by torchvision's ``ColorJitter``, and are applied in a fixed order to the cropped and resized
    image.

    Source: Crops and their defaults (area 0.08 to 1, aspect ratio 3/4 to 4/3) and the flip probability of 0.5 are those of
    torchvision's ``RandomResizedCrop``, after Szegedy et al., "Going Deeper with Convolutions".

    Args:
        size: Width and height of the rendering in pixels; one number for a square.
        train: Whether to draw at random. If not, images are resized and cropped at the centre, as for evaluation.
        scale: Least and greatest area of a random crop, as a fraction of the image's. ``None`` switches random crops off:
            training images are then resized as for evaluation.
        ratio: Least and greatest width / height of a random crop, in pixels of the image. Its logarithm is drawn uniformly.
        flip: Probability of a left-right flip.
        brightness: ``x`` draws the factor uniformly from ``[max(0, 1 - x), 1 + x]``; 0 switches it off.
        contrast: The same for contrast.
        saturation: The same for saturation.
        mean: It is subtracted from red, green and blue, after ``rescale``. The default, together with that of ``std``, is the
            one of ViT's image processor: pixels from -1 to 1.
        std: It divides red, green and blue.
        rescale: Factor that turns pixels of 0 to 255 into the unit of ``mean`` and ``std``.
        resample: One of ``PIL.Image.Resampling``.
        shortest_edge: For evaluation, the shorter side is resized to this many pixels, and ``size`` is cut from the centre.
        resized: For evaluation, images are resized to this width and height, and ``size`` is cut from the centre. Default,
            without ``shortest_edge``: images are resized to ``size``.
        image_column: Name of the column of images.
        label_column: Name of the column that is passed on as ``labels``; ``None`` for none.

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
        # Every number is converted and every tuple made anew: 1 and 1.0 hash differently, and so does a tuple used twice.
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

        # The conditions say what is right, so that NaN is refused.
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
            settings: Further arguments of ``ImageTransform``; they override the processor.

        Raises:
            UnsupportedSetupError: The processor has a size of another kind, or a setting is out of its range.
        """
        config = processor.to_dict()
        size = dict(config.get("size") or {})
        crop = dict(config.get("crop_size") or {}) if config.get("do_center_crop") else size
        shortest = size.get("shortest_edge")
        output = tuple(crop.get(side) or crop.get("shortest_edge") for side in ("width", "height"))
        resample = config.get("resample")
        from_config: dict[str, Any] = {
            "resample": Image.Resampling.BILINEAR if resample is None else resample,
            "rescale": config["rescale_factor"] if config.get("do_rescale", True) else 1.0,
            "mean": config["image_mean"] if config.get("do_normalize", True) else (0.0, 0.0, 0.0),
            "std": config["image_std"] if config.get("do_normalize", True) else (1.0, 1.0, 1.0),
        }
        # A size in `settings` replaces the processor's resizing too, which was meant for the processor's size.
        if "size" not in settings:
            resized = None if shortest else (size.get("width"), size.get("height"))
            if None in output or (resized is not None and None in resized):
                raise UnsupportedSetupError(
                    f"{type(processor).__name__} has size={size} and crop_size={crop}: expected a height and a width, or "
                    "a shortest_edge. Give the size in pixels yourself: from_processor(..., size=(width, height))."
                )
            from_config |= {
                "size": output,
                "shortest_edge": shortest,
                "resized": None if resized == output else resized,
            }
        return cls(train=train, **{**from_config, **settings})

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
        """Return the same transform with a single augmentation left, to measure the effect of this one.

        Under the same random state it draws the same numbers for this augmentation as the whole transform does. Without
        ``"crop"``, images are resized and cropped as for evaluation.

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

        Augmentations that ``only`` left out are drawn too, and discarded, so that the others stay the same. Without ``train``
        nothing is drawn.

        Args:
            width: Width of the image in pixels.
            height: Height of the image in pixels.

        Raises:
            DataError: The image has no pixels.
        """
        if width < 1 or height < 1:
            raise DataError(f"The image has {width} x {height} pixels: remove its row, there is nothing to render.")
        box = self._centre_crop(width, height).box
        if not self.train:
            return ViewParameters(*box)
        if self.scale is not None:
            crop = random_crop(width, height, self.scale, self.ratio)
            box = crop if "crop" in self.kept else box
        flip = random.random() < self.flip and "flip" in self.kept
        factors = [1.0, 1.0, 1.0]
        if self._jitters:
            # All three are drawn, so that switching one off leaves the others as they were.
            changes = (self.brightness, self.contrast, self.saturation)
            drawn = [random.uniform(max(0.0, 1 - change), 1 + change) for change in changes]
            factors = drawn if "colour" in self.kept else factors
        return ViewParameters(*box, flip, *factors)

    def parameters(self, seed: int, sample_index: int, view: int, width: int, height: int) -> ViewParameters:
        """Draw the parameters of a view again, from its key and the size of the image alone.

        Args:
            seed: Seed of the views.
            sample_index: Row of the training data set.
            view: Number of the view. ``eval_transform`` renders view 0 if there is one, ``train_transform`` the others.
            width: Width of the image in pixels.
            height: Height of the image in pixels.

        Raises:
            DataError: The image has no pixels.
        """
        with seeded(seed, sample_index, view):
            return self.draw(width, height)

    # ---- How it is rendered ----

    def _centre_crop(self, width: int, height: int) -> CentreCrop:
        """Return the crop of evaluation for an image of ``width`` x ``height`` pixels."""
        if self.shortest_edge is None:
            return CentreCrop(self.resized or self.size, self.size)
        # Rounded down, as in transformers' get_resize_output_image_size.
        shortest = min(width, height)
        resized = int(self.shortest_edge * width / shortest), int(self.shortest_edge * height / shortest)
        return CentreCrop(resized, self.size)

    def render(self, image: Image.Image, parameters: ViewParameters) -> torch.Tensor:
        """Render one view; the same arguments give the same bits.

        Args:
            image: An image of any mode but ``"I"`` and ``"F"``, whose range is unknown; it is converted to RGB. Of 16 bits
                the upper 8 are used.
            parameters: What was drawn for an image of this size.

        Returns:
            Shape ``(3, height, width)``, ``float32``: ``(pixels * rescale - mean) / std``.

        Raises:
            DataError: The crop contains no pixel of the image, or the image has a mode that cannot be converted to RGB.
        """
        image = _to_rgb(image)
        image = crop_and_flip(image, parameters, self._centre_crop(*image.size), self.resample)
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
            DataError: A column is missing, an image is none, or its mode cannot be converted to RGB.
        """
        for option, column in (("image_column", self.image_column), ("label_column", self.label_column)):
            if column is not None and column not in batch:
                advice = " or None" if option == "label_column" else ""
                raise DataError(
                    f"The rows have no column {column!r} but {', '.join(map(repr, batch)) or 'none'}: set {option} to one "
                    f"of them{advice}. (Trainer drops columns the model does not take: remove_unused_columns=False.)"
                )
        pixel_values = []
        for image in batch[self.image_column]:
            if not isinstance(image, Image.Image):
                raise DataError(
                    f"Column {self.image_column!r} holds {type(image).__name__}, not PIL images: cast it with "
                    "dataset.cast_column(name, datasets.Image()), and remove rows without an image."
                )
            parameters = self.draw(*image.size)
            pixel_values.append(self.render(image, parameters))
            record(parameters)
        labels = {} if self.label_column is None else {"labels": batch[self.label_column]}
        return {"pixel_values": pixel_values, **labels}
