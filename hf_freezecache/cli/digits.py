"""Real images without a download: scikit-learn's scans of handwritten digits, and two tasks on them for the demo."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

__all__ = ["DigitTask", "DigitTransform", "load_digit_images", "other_scans", "unseen_digits"]

TEST_FRACTION = 0.3
#: In the task of unseen digits, those below this number are learned first.
KNOWN_DIGITS = 6


@dataclass(frozen=True)
class DigitTransform:
    """Transform for ``Dataset.set_transform``: images to ``pixel_values`` in [-1, 1].

    Attributes:
        augment: Rotate by up to 15 degrees and shift by up to 2 pixels, drawn by Python's ``random``.
    """

    augment: bool

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return ``pixel_values``, tensors (3, height, width), and ``labels`` of a batch of rows."""
        pixel_values = []
        for image in batch["image"]:
            if self.augment:
                shift = (random.randint(-2, 2), random.randint(-2, 2))
                image = image.rotate(random.uniform(-15, 15), Image.Resampling.BILINEAR, translate=shift)
            pixels = np.array(image, dtype=np.float32) / 127.5 - 1
            pixel_values.append(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
        return {"pixel_values": pixel_values, "labels": list(batch["label"])}


def load_digit_images(image_size: int, max_images: int | None = None) -> datasets.Dataset:
    """Return scikit-learn's digits, real scans of handwriting, as ``image`` (RGB, PNG) and ``label`` (0-9).

    Args:
        image_size: Side to which the 8 x 8 scans are enlarged, pixels.
        max_images: Keep only the first of the 1,797.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.clip(digits.images * (255 / 16), 0, 255).astype(np.uint8)[:max_images]
    images = [
        Image.fromarray(scan).resize((image_size, image_size), Image.Resampling.BICUBIC).convert("RGB")
        for scan in pixels
    ]
    columns = {"image": images, "label": digits.target[:max_images].tolist()}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(columns, features=features)


@dataclass(frozen=True)
class DigitTask:
    """What a backbone learns first, and what it is then fine-tuned for. Labels count from 0.

    Attributes:
        name: What it is called.
        first: Images that the backbone learns, augmented.
        first_words: What is on them.
        num_first: Their classes.
        train: Images to fine-tune on, augmented.
        words: What is on them.
        num_classes: Their classes.
        test: Held-out images of these classes.
    """

    name: str
    first: datasets.Dataset
    first_words: str
    num_first: int
    train: datasets.Dataset
    words: str
    num_classes: int
    test: datasets.Dataset


def _parts(
    digits: datasets.Dataset, labels: npt.NDArray[np.int64], first: npt.NDArray[np.int64], others: npt.NDArray[np.int64]
) -> list[datasets.Dataset]:
    """Return the first images, and training and held-out images of the others."""
    images, held_out = digits.select_columns(["image"]), round(len(others) * TEST_FRACTION)
    parts = []
    for rows, augment in ((first, True), (others[held_out:], True), (others[:held_out], False)):
        part = images.select(rows).flatten_indices(keep_in_memory=True)
        part = part.add_column("label", (labels[rows] - labels[rows].min()).tolist())
        parts.append(part.with_transform(DigitTransform(augment)))
    return parts


def other_scans(image_size: int, seed: int, max_images: int | None = None) -> DigitTask:
    """A backbone learns the ten digits on the first half of the scans, and is fine-tuned, with a new head, on the second half.

    Features carry over: what the backbone knows is what the task needs.

    Args:
        image_size: Side of the images, pixels.
        seed: Of the division into training and held-out images.
        max_images: Use only so many scans.
    """
    digits = load_digit_images(image_size, max_images)
    half = len(digits) // 2
    others = half + np.random.default_rng(seed).permutation(len(digits) - half)
    first, train, test = _parts(digits, np.array(digits["label"]), np.arange(half), others)
    return DigitTask("other scans", first, "the ten digits", 10, train, "other scans of the ten digits", 10, test)


def unseen_digits(image_size: int, seed: int, max_images: int | None = None) -> DigitTask:
    """A backbone learns some digits, and is fine-tuned on the others, which it has never seen: features carry over badly.

    Args:
        image_size: Side of the images, pixels.
        seed: Of the division into training and held-out images.
        max_images: Use only so many scans.
    """
    digits = load_digit_images(image_size, max_images)
    labels = np.array(digits["label"])
    order = np.random.default_rng(seed).permutation(len(digits))
    known = labels[order] < KNOWN_DIGITS
    first, train, test = _parts(digits, labels, order[known], order[~known])
    words = (f"the digits 0-{KNOWN_DIGITS - 1}", f"the digits {KNOWN_DIGITS}-9")
    return DigitTask("unseen digits", first, words[0], KNOWN_DIGITS, train, words[1], 10 - KNOWN_DIGITS, test)
