"""Views: seeded renderings of the user's images by the user's own, opaque transform."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from ..codecs.predictor import WHOLE
from ..errors import DataError, UnrepeatableTransformError, UnsupportedSetupError
from .geometry import ViewParameters, recorded
from .seeding import seeded

__all__ = ["ViewDataset", "ViewKey", "check_repeatable", "with_rgb_images"]

#: (sample index, view): samplers yield it, and data sets take it. View 0 is the base view.
ViewKey = tuple[int, int]


def with_rgb_images(dataset: Any) -> Any:
    """Return a ``datasets.Dataset`` that decodes its one image column to RGB.

    Grayscale, palette and RGBA images among RGB ones would otherwise fail in the transform or the model, hours into a run.
    The data set comes back unchanged if it is of another type, if its column has a mode already, or if it has several image
    columns (masks, say).
    """
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if len(columns) != 1 or dataset.features[columns[0]].mode is not None:
        return dataset
    return dataset.cast_column(columns[0], datasets.Image(mode="RGB", decode=dataset.features[columns[0]].decode))


class ViewDataset(Dataset):  # type: ignore[type-arg]
    """Renders views live: item ``(i, v)`` is sample ``i`` of the user's data set, drawn under ``seeded(seed, i, v)``.

    Args:
        dataset: A ``datasets.Dataset`` with its ``set_transform``/``with_transform``, or any map-style data set.
        seed: Seed of the views.
        train_transform: Renders all views but view 0. Together with ``eval_transform`` it replaces the data set's own
            transform. Both take and return a batch dict, as for ``Dataset.set_transform``.
        eval_transform: Renders view 0.

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
                f"train_transform and eval_transform need a datasets.Dataset, got {type(dataset).__name__}. Pass one, or apply "
                "one transform inside your data set."
            )
        self.dataset = dataset
        self.seed = seed
        self._base = dataset if eval_transform is None else dataset.with_transform(eval_transform)
        self._augmented = dataset if train_transform is None else dataset.with_transform(train_transform)
        self._geometry = False

    def with_geometry(self) -> ViewDataset:
        """Return the same views with items ``(example, geometry)``, for ``CheckedCollator.with_geometry``.

        ``geometry`` is the five numbers of ``ViewParameters.geometry``, or ``WHOLE`` where they are unknown.
        """
        views = copy.copy(self)
        views._geometry = True
        return views

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._base)

    def __getitem__(self, key: int | ViewKey) -> Any:
        """Render one view; a bare sample index means view 0.

        Raises:
            DataError: The row could not be read or transformed; the message names the row.
        """
        example, parameters = self.render(key)
        if not self._geometry:
            return example
        return example, WHOLE if parameters is None else parameters.geometry()

    def render(self, key: int | ViewKey) -> tuple[Any, ViewParameters | None]:
        """Render one view; return it with the parameters that an ``ImageTransform`` drew for it.

        The parameters are ``None`` if no ``ImageTransform`` rendered it, or if one rendered several images.

        Raises:
            DataError: The row could not be read or transformed; the message names the row.
        """
        sample_index, view = (key, 0) if isinstance(key, int) else key
        try:
            with seeded(self.seed, sample_index, view), recorded() as drawn:
                example = (self._base if view == 0 else self._augmented)[sample_index]
            # If several images were rendered, nothing says which of them the tokens show.
            return example, drawn[0] if len(drawn) == 1 else None
        except Exception as error:
            raise DataError(
                f"Row {sample_index} of the training data set could not be rendered (view {view}): "
                f"{type(error).__name__}: {error}. Check that the row's image is intact and that the transform finds "
                "its columns; remove a bad row with dataset.select or dataset.filter and start again: finished "
                "shards of a cache are kept."
            ) from error

    def __getitems__(self, keys: Sequence[int | ViewKey]) -> list[Any]:
        """Render several views, in order.

        Raises:
            DataError: A row could not be read or transformed; the message names the row.
        """
        return [self[key] for key in keys]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


def check_repeatable(views: ViewDataset, num_views: int, num_samples: int = 8) -> None:
    """Render a few views twice, and check that both renderings are equal.

    A transform with a random generator of its own gives two different images, since only the global generators of Python,
    NumPy and torch are seeded. Its views could not be rendered again after a resume, nor checked against the cache.

    Args:
        views: The views to render.
        num_views: Views per sample that the run stores or trains on. View 1 is rendered only if there are at least two.
        num_samples: Number of samples to render, from row 0 on.

    Raises:
        UnrepeatableTransformError: Two renderings of one view differ.
        DataError: A row could not be read or transformed.
    """
    for sample_index in range(min(num_samples, len(views))):
        for view in range(min(max(num_views, 1), 2)):
            if not _same(views[sample_index, view], views[sample_index, view]):
                raise UnrepeatableTransformError(
                    f"The training transform gave two different results for row {sample_index}, view {view}, under "
                    "the same state of random, numpy.random and torch. It has a random generator of its own: let it "
                    "use one of the global ones, or seed it in each call from one of them."
                )
