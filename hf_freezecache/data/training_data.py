"""The training data as caches and stages see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets

from ..config import CacheConfig
from .collators import CheckedCollator
from .hashing import hash_dataset, hash_object
from .layout import ChunkLayout
from .views import ViewDataset

__all__ = ["Data"]


@dataclass
class Data:
    """The training data as a cache sees them.

    Attributes:
        dataset: What the user passed.
        transforms: The user's ``train_transform`` and ``eval_transform``, if any.
        views: Renders them.
        collate: The user's collator, checked.
        raw_collator: The user's collator, for hashing.
        layout: Which sample goes into which chunk.
        view_seed: Seed of the views.
        image_shape: (channels, height, width).
        prefix_inputs: Parts of a batch beside ``pixel_values`` that the prefix takes.
        batch_spec: Names, dtypes and shapes of a batch, for the fingerprint.
        classes: Whether labels are exclusive classes.
    """

    dataset: Any
    transforms: tuple[Any, Any]
    views: ViewDataset
    collate: CheckedCollator
    raw_collator: Any
    layout: ChunkLayout
    view_seed: int
    image_shape: tuple[int, int, int] = (0, 0, 0)
    prefix_inputs: frozenset[str] = frozenset()
    batch_spec: str = ""
    classes: bool = True

    def hashes(self, config: CacheConfig) -> dict[str, str]:
        """Return what data and code depend on, by names that a user knows; reads the whole data set.

        Raises:
            UnsupportedSetupError: Data, transform or collator cannot be hashed.
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
