"""Which views and shards of a cache somebody wants: a part of a cache can be fetched, opened and copied by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .index import (
    CODEC_NAME,
    COPIES_NAME,
    CacheIndex,
    shard_name,
    table_name,
)

__all__ = ["Selection"]


@dataclass(frozen=True)
class Selection:
    """Some views and shards of a cache.

    Attributes:
        views: Numbers of the views; ``None`` is all.
        shards: Numbers of the shards, the same in each view; ``None`` is all.
    """

    views: tuple[int, ...] | None = None
    shards: tuple[int, ...] | None = None

    @classmethod
    def of(cls, views: Sequence[int] | None = None, shards: Sequence[int] | None = None) -> Selection:
        """Return a selection of any sequences of numbers."""
        return cls(
            None if views is None else tuple(sorted(set(views))), None if shards is None else tuple(sorted(set(shards)))
        )

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self.views is None and self.shards is None

    def chosen_views(self, index: CacheIndex) -> tuple[int, ...]:
        """Return the numbers of the views.

        Raises:
            IndexError: The cache has no such view, or none was chosen.
        """
        return _checked("view", self.views, index.num_views)

    def chosen_shards(self, index: CacheIndex) -> tuple[int, ...]:
        """Return the numbers of the shards.

        Raises:
            IndexError: The cache has no such shard, or none was chosen.
        """
        return _checked("shard", self.shards, index.num_shards)

    def files(self, index: CacheIndex) -> list[str]:
        """Return the names of the files that are needed beside ``index.json``, sorted.

        The first view is needed by those that are stored as what it does not predict of them.

        Raises:
            IndexError: The cache has no such view or shard.
        """
        views = set(self.chosen_views(index))
        if index.copies is not None and index.copies.get("configuration", {}).get("predictor") is not None:
            views.add(0)
        names = {name for name in (CODEC_NAME, COPIES_NAME) if name in index.files}
        for view in views:
            for shard in self.chosen_shards(index):
                names |= {shard_name(view, shard), table_name(view, shard)}
        return sorted(names)


def _checked(what: str, chosen: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    if chosen is None:
        return tuple(range(count))
    if not chosen or not all(0 <= number < count for number in chosen):
        raise IndexError(f"{what}s {list(chosen)} were asked for; the cache has {what}s 0 to {count - 1}.")
    return chosen
