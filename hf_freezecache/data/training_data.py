"""The training data as caches and stages see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
from torch import Tensor

from ..config import CacheConfig
from .collators import CheckedCollator
from .hashing import hash_dataset, hash_object
from .layout import ChunkLayout
from .views import ViewDataset

__all__ = ["TrainingData"]


@dataclass(frozen=True)
class TrainingData:
    """The training data of one run: what the user passed, and what a look at the first rows told. Complete when made.

    Attributes:
        dataset: The data set that the user passed.
        transforms: The user's ``train_transform`` and ``eval_transform``, or ``(None, None)``.
        views: Renders the views.
        collate: The user's collator, with its labels checked.
        raw_collator: The user's collator as it was passed, for hashing.
        layout: Which sample lies in which chunk.
        view_seed: Seed of the views.
        has_classes: Whether each label is one of several exclusive classes.
        example_batch: The first rows, rendered and collated: name -> (rows, ...), on the CPU.
        image_shape: (channels, height, width) of the rendered images, or (patches, values) where they come as patches.
        call: Arguments of a forward of the first row, as the trainer's loss calls the model.
        prefix_inputs: Names of the parts of a batch, beside ``pixel_values``, that the frozen blocks take.
        batch_spec: Names, dtypes and shapes of a batch, for the fingerprint.
    """

    dataset: Any
    transforms: tuple[Any, Any]
    views: ViewDataset
    collate: CheckedCollator
    raw_collator: Any
    layout: ChunkLayout
    view_seed: int
    has_classes: bool
    example_batch: dict[str, Tensor]
    image_shape: tuple[int, ...]
    call: dict[str, Any]
    prefix_inputs: frozenset[str]
    batch_spec: str

    def hashes(self, config: CacheConfig) -> dict[str, str]:
        """Return the hashes of data and code, by names that a user knows. Reads the whole data set.

        Raises:
            UnsupportedSetupError: The data set, the transform or the collator cannot be hashed.
        """
        formatted = self.dataset.format if isinstance(self.dataset, datasets.Dataset) else None
        transform = config.transform_id
        if transform is None:
            transform = hash_object((*self.transforms, formatted), "training transform")
        return {
            "dataset": config.dataset_id or hash_dataset(self.dataset),
            "transform": transform,
            "data collator": config.transform_id or hash_object(self.raw_collator, "data collator"),
        }
