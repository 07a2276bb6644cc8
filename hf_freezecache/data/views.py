"""Views: seeded renderings of the user's images by the user's own, opaque transform."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..codecs.predictor import WHOLE
from ..errors import DataError, UnrepeatableTransformError, UnsupportedSetupError
from .geometry import ViewParameters, recorded
from .image_transform import ImageTransform
from .row_reader import DecodedRow, RowReader, can_share_rows
from .seeding import random_states, seeded

__all__ = ["ViewDataset", "ViewKey", "check_repeatable", "same_examples", "views_differ", "with_transform"]

#: (sample index, view): samplers yield it, and data sets take it. View 0 is the base view.
ViewKey = tuple[int, int]


def with_transform(dataset: Any, transform: Callable[..., Any]) -> Any:
    """Return a ``datasets.Dataset`` with another transform. ``with_transform`` would copy the one that it has."""
    other = copy.copy(dataset)
    other.set_transform(transform)
    return other


class ViewDataset(Dataset):  # type: ignore[type-arg]
    """Renders views live: item ``(i, v)`` is sample ``i`` of the user's data set, drawn under ``seeded(seed, i, v)``.

    The user's own transform is called, not a copy, and with what the data set holds: nothing is converted before.

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
        self._base = dataset if eval_transform is None else with_transform(dataset, eval_transform)
        self._augmented = dataset if train_transform is None else with_transform(dataset, train_transform)
        self._geometry = False
        self._together = False
        self._reader: RowReader | None = None

    def with_geometry(self) -> ViewDataset:
        """Return the same views with items ``(example, geometry)``, for ``CheckedCollator.with_geometry``.

        ``geometry`` is the five numbers of ``ViewParameters.geometry``, or ``WHOLE`` where they are unknown.
        """
        views = copy.copy(self)
        views._geometry = True
        return views

    def rendered_together(self) -> ViewDataset:
        """Return views whose transform gets all rows of a batch in one call, as under ``Trainer``.

        It is for transforms that mix the rows of a batch. A view then depends on the batch that it is in, so none can be
        cached. Each batch is drawn under ``seeded(seed, i, v)`` of its first item.
        """
        views = copy.copy(self)
        views._together = True
        return views

    def reading_once(self) -> ViewDataset:
        """Return the same views; ``render_views`` reads and decodes each row once, if ``reads_once`` says so.

        It is to be made anew for each pass: a change of the data set's format does not show.
        """
        views = copy.copy(self)
        views._reader = None
        if not self._together and can_share_rows(self._base, self._augmented):
            views._reader = RowReader(self._base)
        return views

    @property
    def reads_once(self) -> bool:
        """Whether the views of a row share what was read and decoded."""
        return self._reader is not None

    def render_among(self, key: ViewKey, others: Sequence[int]) -> tuple[Any, Any]:
        """Render a view in one call with other rows, after it, as ``Trainer`` would.

        Where the rows are never rendered together, or cannot be, the view is rendered alone.

        Args:
            key: The view.
            others: The other rows.

        Returns:
            The view, and the random states that the call left behind.
        """
        source = self._augmented if key[1] else self._base
        with seeded(self.seed, *key):
            if _takes_batches(source):
                with suppress(Exception):  # a transform may take one row at a time, and that is what it gets
                    return source.__getitems__([key[0], *others])[0], random_states()
        return self[key], None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._base)

    def __getitem__(self, key: int | ViewKey) -> Any:
        """Render one view; a bare sample index means view 0.

        Raises:
            DataError: The row could not be read or transformed; the message names the row.
        """
        return self._item(*self.render(key))

    def _item(self, example: Any, parameters: ViewParameters | None) -> Any:
        if not self._geometry:
            return example
        return example, WHOLE if parameters is None else parameters.geometry()

    def render_views(self, sample_index: int, views: Sequence[int]) -> list[Any]:
        """Render several views of one row; return their items, equal to the bit to those of ``__getitem__``.

        Each view gets a copy of what was decoded, as transforms may change an image in place. A row that cannot be copied is
        read again for each view.

        Raises:
            DataError: The row could not be read or transformed; the message names the row.
        """
        row = None
        if self._reader is not None and len(views) > 1:
            with suppress(Exception):  # it is read again below, where the message is made
                row = self._reader.read(sample_index)
        items = []
        for left, view in zip(reversed(range(len(views))), views, strict=True):
            key = sample_index, view
            if row is None:
                items.append(self[key])
                continue
            transform = _transform_of(self._augmented if view else self._base)
            copied = row.copied(transform) if left else None
            items.append(self._render_row(copied or row, key, transform))
            if copied is None:  # the view has used the row itself: it is nobody else's
                row = None
        return items

    def _render_row(self, row: DecodedRow, key: ViewKey, transform: Any) -> Any:
        """Render a view of a row that was read; it belongs to this view alone."""
        try:
            with seeded(self.seed, *key), recorded() as drawn:
                example = row.transformed(transform)
        except Exception:  # it fails again, where the message is made
            return self[key]
        return self._item(example, _only(drawn))

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
            return example, _only(drawn)
        except Exception as error:
            modes = _image_modes(self.dataset, sample_index)
            raise DataError(
                f"Row {sample_index} of the training data set could not be rendered (view {view}): "
                f"{type(error).__name__}: {error}. {modes}Check that the row's image is intact and that the transform finds "
                "its columns; remove a bad row with dataset.select or dataset.filter. Finished shards of a cache are kept "
                "for a run with the same data set and settings; a changed data set has a cache of its own, built anew."
            ) from error

    def __getitems__(self, keys: Sequence[int | ViewKey]) -> list[Any]:
        """Render several views, in order.

        Raises:
            DataError: A row could not be read or transformed; the message names the row.
        """
        if not self._together:
            return [self[key] for key in keys]
        pairs = [(key, 0) if isinstance(key, int) else key for key in keys]
        examples: dict[int, Any] = {}
        try:
            with seeded(self.seed, *pairs[0]):
                for source in {id(each): each for each in (self._base, self._augmented)}.values():
                    rows = {
                        place: row
                        for place, (row, view) in enumerate(pairs)
                        if source is (self._augmented if view else self._base)
                    }
                    if rows:
                        examples |= zip(rows, source.__getitems__(list(rows.values())), strict=True)
        except Exception as error:
            raise DataError(
                f"Rows {[row for row, _ in pairs]} of the training data set could not be rendered together: "
                f"{type(error).__name__}: {error}. Check that their images are intact and that the transform finds its columns."
            ) from error
        return [examples[place] for place in range(len(pairs))]


def _only(drawn: list[ViewParameters]) -> ViewParameters | None:
    """Return the parameters of the only image of a view. Of several, nothing says which of them the tokens show."""
    return drawn[0] if len(drawn) == 1 else None


def _transform_of(source: datasets.Dataset) -> Any:
    return source.format["format_kwargs"]["transform"]


def _takes_batches(source: Any) -> bool:
    """Say whether rows of a data set are rendered in one call under ``Trainer``, by code that is not known."""
    if not isinstance(source, datasets.Dataset):
        return hasattr(source, "__getitems__")
    transform = (source.format["format_kwargs"] or {}).get("transform")
    return transform is not None and type(transform) is not ImageTransform


def _image_modes(dataset: Any, row: int) -> str:
    """Say in which modes the images of a row are, if one is not RGB: many transforms take nothing else."""
    try:
        plain = copy.copy(dataset)
        plain.set_format(None)
        modes = {column: value.mode for column, value in plain[row].items() if isinstance(value, Image.Image)}
    except Exception:  # the data set is of another type, or the image is broken
        return ""
    if all(mode == "RGB" for mode in modes.values()):
        return ""
    found = ", ".join(f"that in {column!r} has mode {mode!r}" for column, mode in modes.items())
    return (
        f"Of its images {found}: if the transform expects RGB, let it call image.convert('RGB'), as images are passed to it "
        "as they are stored. "
    )


def same_examples(a: Any, b: Any) -> bool:
    """Say whether two rendered examples, or batches of them, are equal to the bit; NaN equals NaN."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_examples(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_examples(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.shape != b.shape:
            return False
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


#: Rows whose views are compared: a flip alone leaves three views of eight rows alike once in 65,536 times.
_ROWS = 8


def views_differ(views: ViewDataset, num_rows: int = _ROWS) -> bool:
    """Return whether two augmented views of a row may differ: a transform that draws nothing gives one image over and over.

    Args:
        views: Renders the views.
        num_rows: How many rows are compared, from row 0 on. Of a transform that draws nothing each is rendered four times.

    Raises:
        DataError: A row could not be read or transformed.
    """
    rows = range(min(num_rows, len(views)))
    return any(not same_examples(views[row, 1], views[row, view]) for row in rows for view in (2, 3))


#: How often a rendering is repeated that differs from the same one among other rows.
_CONFIRMATIONS = 5
#: Other rows that the first row is rendered with.
_BESIDE = 7


def check_repeatable(views: ViewDataset, num_views: int, num_samples: int = 8) -> bool:
    """Render a few views twice, alone and in one call with other rows; check that both renderings are equal.

    A transform with a random generator of its own gives two different images, since only the global generators of Python,
    NumPy and torch are seeded. Its views could not be rendered again after a resume, nor checked against the cache.

    A transform that mixes the rows of its batch gives other images with other rows. One that draws for all rows at once may,
    too: so the row is rendered with two pairs of rows under the same random states. Where the two calls drew different
    amounts, nothing is concluded.

    Args:
        views: The views to render.
        num_views: Views per sample that the run stores or trains on. View 1 is rendered only if there are at least two.
        num_samples: Number of samples to render, from row 0 on.

    Returns:
        Whether the transform mixes rows.

    Raises:
        UnrepeatableTransformError: Two renderings of one view differ.
        DataError: A row could not be read or transformed.
    """
    rows = min(num_samples, len(views))
    for row in range(rows):
        for view in range(min(max(num_views, 1), 2)):
            # The first row among many: a mosaic takes four.
            beside = min(_BESIDE if row == 0 else 2, max(rows - 1, 2))
            alone, pair = views[row, view], [(row + 1 + place) % rows for place in range(beside)]
            together, drawn = views.render_among((row, view), pair)
            if same_examples(alone, together):
                continue
            # A few times: two draws of a flip are equal half of the time, and would be taken for rows that are mixed.
            if not all(
                same_examples(alone, views[row, view])
                and same_examples(together, views.render_among((row, view), pair)[0])
                for _ in range(_CONFIRMATIONS)
            ):
                raise UnrepeatableTransformError(
                    f"The training transform gave two different results for row {row}, view {view}, under "
                    "the same state of random, numpy.random and torch. It has a random generator of its own: let it "
                    "use one of the global ones, or seed it in each call from one of them."
                )
            others = [row] * beside
            if 2 * beside < len(views):
                others = [(row + 1 + beside + place) % len(views) for place in range(beside)]
            among_others, drawn_again = views.render_among((row, view), others)
            if drawn == drawn_again and not same_examples(together, among_others):
                return True
    return False
