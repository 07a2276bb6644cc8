"""Rendered batches for a build. Views that are built together share what was read and decoded of a row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..data.collators import CheckedCollator
from ..data.views import ViewDataset, ViewKey
from .shard_writer import CachePlan

__all__ = ["MOST_RENDERED_BYTES", "Batch", "Together", "ViewRenderer"]

#: Bytes of rendered images that one process that renders may hold ready. With more views, a row is decoded again.
MOST_RENDERED_BYTES = 2**30
#: Loader items that one process renders ahead; as ``DataLoader`` has it.
_AHEAD = 2
#: (shard, views): shards of one number that are written at once.
Together = tuple[int, tuple[int, ...]]
#: Keys of a batch, and the batch. All are of one view.
Batch = tuple[list[ViewKey], dict[str, Any]]


@dataclass(frozen=True)
class _Batches(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Items by ``(rows, views)``: one batch of these rows for each view."""

    views: Any
    collate: CheckedCollator

    def __getitem__(self, key: tuple[list[int], tuple[int, ...]]) -> list[Batch]:
        rows, views = key
        rendered: list[list[tuple[ViewKey, Any]]] = [[] for _ in views]
        for row in rows:
            # Of what was decoded, no more than one row is in memory.
            for items, view, item in zip(rendered, views, self._render(row, views), strict=True):
                items.append(((row, view), item))
        return [self.collate.collate_keyed(items) for items in rendered]

    def _render(self, row: int, views: tuple[int, ...]) -> list[Any]:
        if isinstance(self.views, ViewDataset):
            return self.views.render_views(row, views)
        return [self.views[row, view] for view in views]


@dataclass
class ViewRenderer:
    """Renders the views of a build, ahead of the device.

    Attributes:
        views: Renders the views; see ``build_caches``.
        collate: The collator.
        plan: Says which samples lie in which shard.
        batch_size: Images per batch. Batches never reach over the end of a shard.
        num_workers: Processes that render; 0 renders in this one.
    """

    views: Any
    collate: CheckedCollator
    plan: CachePlan
    batch_size: int
    num_workers: int

    def __post_init__(self) -> None:
        """Prepare reading of rows: what the data set's transform is now is what renders all batches."""
        if isinstance(self.views, ViewDataset):
            self.views = self.views.reading_once()

    @property
    def _batch_bytes(self) -> int:
        return self.batch_size * math.prod(self.plan.image_shape) * torch.float32.itemsize

    @property
    def views_at_once(self) -> int:
        """Views of a row that are rendered one after the other; 1 if there is nothing that they could share."""
        if not (isinstance(self.views, ViewDataset) and self.views.reads_once):
            return 1
        return max(1, min(self.plan.num_views, MOST_RENDERED_BYTES // self._batch_bytes))

    def together(self, units: Sequence[tuple[int, int]]) -> list[Together]:
        """Return what is written at once, in order.

        Args:
            units: (view, shard) in the order in which they are built. Runs of one shard are written at once.
        """
        groups: list[Together] = []
        for view, shard in units:
            if groups and groups[-1][0] == shard and len(groups[-1][1]) < self.views_at_once:
                groups[-1] = (shard, (*groups[-1][1], view))
            else:
                groups.append((shard, (view,)))
        return groups

    def render(self, groups: Iterable[Together]) -> Iterator[list[Batch]]:
        """Return an iterator over the batches of shards: for each batch of rows, one batch of each view."""
        most = max((len(views) for _, views in groups), default=1)
        fits = _AHEAD * most * self._batch_bytes <= MOST_RENDERED_BYTES
        return iter(
            DataLoader(
                _Batches(self.views, self.collate),
                sampler=list(self._keys(groups)),  # type: ignore[arg-type]
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=self.num_workers,
                prefetch_factor=(_AHEAD if fits or most == 1 else 1) if self.num_workers else None,
                # With a generator of its own, starting workers does not move the global one.
                generator=torch.Generator(),
            )
        )

    def _keys(self, groups: Iterable[Together]) -> Iterator[tuple[list[int], tuple[int, ...]]]:
        for shard, views in groups:
            rows = self.plan.rows(shard).tolist()
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size], views


def _as_it_is(batches: list[Batch]) -> list[Batch]:
    return batches
