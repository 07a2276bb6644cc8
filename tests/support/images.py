"""Images of four classes that a tiny model learns to tell apart."""

from __future__ import annotations

import datasets
import numpy as np
from PIL import Image

from support.tiny import IMAGE_SIZE, NUM_CLASSES


def make_images(rows: int, seed: int = 0) -> datasets.Dataset:
    """Images whose class shows: brighter in one corner of four, noise elsewhere."""
    generator = np.random.default_rng(seed)
    images, labels = [], []
    for row in range(rows):
        label = row % NUM_CLASSES
        pixels = generator.integers(0, 120, (IMAGE_SIZE, IMAGE_SIZE, 3))
        half = IMAGE_SIZE // 2
        top, left = divmod(label, 2)
        pixels[top * half : (top + 1) * half, left * half : (left + 1) * half] += 110
        images.append(Image.fromarray(pixels.astype(np.uint8)))
        labels.append(label)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
