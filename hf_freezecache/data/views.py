"""Views: seeded renderings of the user's images by the user's own, opaque transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import (
    DataError,
    UnrepeatableTransformError,
    UnsupportedSetupError,
)
from .geometry import WHOLE_IMAGE, ViewParameters, recorded
from .seeding import (
    preserved_random_state,
    seeded,
)

__all__ = [
    "GeometryCollator",
    "GeometryViews",
    "ViewDataset",
    "ViewKey",
    "check_repeatable",
    "preserved_random_state",
    "seeded",
    "with_rgb_images",
]

#: (sample index, view): what samplers yield and data sets are asked for. View 0 is the base view.
ViewKey = tuple[int, int]


def _is_image(feature: Any) -> bool:
    return isinstance(feature, datasets.Image)


def with_rgb_images(dataset: Any) -> Any:
    """Let a ``datasets.Dataset`` with exactly one undecided image column decode it to RGB.

    Grayscale, palette and RGBA images among RGB ones otherwise fail in the transform or the model, hours into a run.
    Data sets with several image columns (masks, say) are left alone.
    """
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    columns = [name for name, feature in dataset.features.items() if _is_image(feature)]
    if len(columns) != 1 or dataset.features[columns[0]].mode is not None:
        return dataset
    return dataset.cast_column(columns[0], datasets.Image(mode="RGB", decode=dataset.features[columns[0]].decode))


class ViewDataset(Dataset):  # type: ignore[type-arg]
    """Renders views live: item ``(i, v)`` is sample ``i`` of the user's data set, drawn under ``seeded(seed, i, v)``.

    Args:
        dataset: A ``datasets.Dataset`` with its ``set_transform``/``with_transform``, or any map-style data set.
        seed: Seed of the views.
        train_transform: If given with ``eval_transform``, replaces the data set's own transform; both take and return
            a batch dict, as for ``Dataset.set_transform``. Then view 0 is the eval rendering, others are training ones.
        eval_transform: See ``train_transform``.

    Raises:
        UnsupportedSetupError: Only one of the transforms was given, or the data set cannot take transforms.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        train_transform: Callable[..., Any] | None = None,
        eval_transform: Callable[..., Any] | None = None,
    ) -> None:
        if (train_transform is None) != (eval_transform is None):
            raise UnsupportedSetupError(
                "train_transform and eval_transform go together: view 0 is rendered by eval_transform, the others by "
                "train_transform. Give both, or set one transform on the data set with set_transform."
            )
        if train_transform is not None and not isinstance(dataset, datasets.Dataset):
            raise UnsupportedSetupError(
                f"train_transform and eval_transform need a datasets.Dataset, got {type(dataset).__name__}."
            )
        self.dataset = dataset
        self.seed = seed
        self._base = dataset if eval_transform is None else dataset.with_transform(eval_transform)
        self._augmented = dataset if train_transform is None else dataset.with_transform(train_transform)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._base)

    def __getitem__(self, key: int | ViewKey) -> Any:
        """Render one view; a bare sample index means view 0.

        Raises:
            DataError: Reading or transforming the row failed; the message names the row.
        """
        return self.render(key)[0]

    def render(self, key: int | ViewKey) -> tuple[Any, ViewParameters | None]:
        """Render one view; return it with the parameters that an ``ImageTransform`` drew for it, ``None`` if none did.

        Raises:
            DataError: As for ``[key]``.
        """
        sample_index, view = (key, 0) if isinstance(key, int) else key
        try:
            with seeded(self.seed, sample_index, view), recorded() as drawn:
                example = (self._base if view == 0 else self._augmented)[sample_index]
            # Of a transform that renders several images nobody knows which one the tokens show.
            return example, drawn[0] if len(drawn) == 1 else None
        except Exception as error:
            raise DataError(
                f"Row {sample_index} of the training data set could not be rendered (view {view}): "
                f"{type(error).__name__}: {error}. Check that the row's image is intact and that the transform finds "
                "its columns; remove a bad row with dataset.select or dataset.filter and start again: finished "
                "parts of a cache are kept."
            ) from error

    def __getitems__(self, keys: Sequence[int | ViewKey]) -> list[Any]:
        """Render several views, in order."""
        return [self[key] for key in keys]


class GeometryViews(Dataset):  # type: ignore[type-arg]
    """The items of a ``ViewDataset``, each with its place in the image: ``(example, geometry)``.

    ``geometry`` are the five numbers of ``ViewParameters.geometry``; those of the whole image where nobody knows.
    """

    def __init__(self, views: ViewDataset) -> None:
        self.views = views

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.views)

    def __getitem__(self, key: int | ViewKey) -> tuple[Any, tuple[float, ...]]:
        """Render one view."""
        example, parameters = self.views.render(key)
        return example, (parameters or WHOLE_IMAGE).geometry()


@dataclass(frozen=True)
class GeometryCollator:
    """Collates items of ``GeometryViews``: the user's batch, and ``name`` (batch, 5) float32 beside it."""

    collate: Callable[[list[Any]], dict[str, Any]]
    name: str

    def __call__(self, items: list[tuple[Any, tuple[float, ...]]]) -> dict[str, Any]:
        """Collate."""
        batch = dict(self.collate([example for example, _ in items]))
        return {**batch, self.name: torch.tensor([geometry for _, geometry in items], dtype=torch.float32)}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


def check_repeatable(views: ViewDataset, num_views: int, num_samples: int = 8) -> None:
    """Draw a few views twice.

    A transform with a generator of its own (seeded neither by Python's, NumPy's nor torch's global state) gives two
    different images: its views could not be drawn again after a resume, nor checked against the cache.

    Raises:
        UnrepeatableTransformError: Two draws of one view differ.
    """
    for sample_index in range(min(num_samples, len(views))):
        for view in range(min(max(num_views, 1), 2)):
            if not _same(views[sample_index, view], views[sample_index, view]):
                raise UnrepeatableTransformError(
                    f"The training transform gave two different results for row {sample_index}, view {view}, under "
                    "the same state of random, numpy.random and torch. It has a random generator of its own: let it "
                    "use one of the global ones, or seed it in each call from one of them."
                )
