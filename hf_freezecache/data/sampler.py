"""The order in which cached and live training read samples: chunk by chunk, in one stream per process."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler
from typing_extensions import override

from ..errors import UnsupportedSetupError
from .layout import ChunkLayout, epoch_view
from .views import ViewKey

__all__ = ["ChunkKey", "ChunkSampler", "OpenedSampler"]

#: (view, chunk).
ChunkKey = tuple[int, int]


class ChunkSampler(Sampler[ViewKey]):
    """Shuffles in two levels by ``(seed, epoch)``: permutes the chunks, then the samples within a window of chunks.

    Yields ``(sample index, view)``. Cached and live training of a stage use the same sampler, so both see the same samples in
    the same views and the same order.

    With several processes, one process reads each chunk in an epoch. The sampler interleaves the streams of the processes as
    accelerate deals batches: global batch ``i`` goes to process ``i % num_processes``. All streams are filled up to whole
    batches and to one length, with samples of their own last window. So up to ``chunk_size + batch_size - 1`` samples per
    process come twice. accelerate would fill up with the first samples of the epoch, whose chunks would be read again.

    Args:
        layouts: Which sample lies in which chunk; one layout for each group of processes that shares a folder of caches.
        seed: Seed of the order.
        view_seed: Seed of the choice of views.
        num_views: Number of stored views, or 0 for a new view in every epoch.
        window: Number of chunks whose samples are mixed.
        group_of_rank: Group of each process of the run, in the order of ranks. Group ``g`` reads ``layouts[g]``.
        batch_size: Samples per batch of one process. It matters only with several processes.
        drop_last: Drop the last samples in place of filling up. It matters only with several processes.

    Attributes:
        plain_from: First epoch of those at the end of a run that show the base view; the epochs before show the others, if there
            are any. ``None`` where all epochs show all views in turn.
        share: Share of the rows that epochs show, ``ChunkLayout.part``. They have as many samples as ever: each row comes so many times
            more often, all others in between.

    Raises:
        UnsupportedSetupError: A group has fewer chunks than processes, or ``drop_last`` leaves a process without a batch.
    """

    def __init__(
        self,
        layouts: Sequence[ChunkLayout],
        seed: int,
        view_seed: int,
        num_views: int,
        window: int,
        group_of_rank: Sequence[int] = (0,),
        batch_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        self.layouts = layouts
        self.seed = seed
        self.view_seed = view_seed
        self.num_views = num_views
        self.window = window
        self.group_of_rank = tuple(group_of_rank)
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.epoch = 0
        self.plain_from: int | None = None
        self.share = 1.0
        #: Batches per process and epoch; 0 for a single process, whose last batch may be short.
        self.num_batches = self._count_batches() if len(self.group_of_rank) > 1 else 0

    def _count_batches(self) -> int:
        longest, shortest = 0, None
        for group, layout in enumerate(self.layouts):
            readers, size = self.group_of_rank.count(group), layout.chunk_size
            chunks_each, extra_chunks = divmod(layout.num_chunks, readers)
            if chunks_each == 0:
                raise UnsupportedSetupError(
                    f"{readers} processes share {layout.num_samples} rows in {layout.num_chunks} chunks; each needs a chunk of "
                    f"its own. Set CacheConfig(chunk_size=...) to at most {max(layout.num_samples // readers, 1)}, or "
                    "start fewer processes."
                )
            missing = layout.num_chunks * size - layout.num_samples  # samples that the short chunk lacks
            # `_deal` gives the short chunk to a process with an extra chunk, if there is one.
            most = least = chunks_each * size
            if extra_chunks:
                most += size - (missing if extra_chunks == 1 else 0)
            else:
                least -= missing
            longest = max(longest, most)
            shortest = least if shortest is None else min(shortest, least)
        if self.drop_last and (shortest or 0) < self.batch_size:
            raise UnsupportedSetupError(
                f"dataloader_drop_last=True leaves nothing: a process reads {shortest} samples in an epoch, fewer than a batch "
                f"of {self.batch_size}. Set it to False, or per_device_train_batch_size to at most {shortest}."
            )
        return (shortest or 0) // self.batch_size if self.drop_last else -(-longest // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order ``iter`` yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of samples of all processes, including those that come twice."""
        if self.num_batches:
            return self.num_batches * self.batch_size * len(self.group_of_rank)
        return self.layouts[0].num_samples

    def __iter__(self) -> Iterator[ViewKey]:
        """Yield the keys of the epoch that is set now, whatever is set meanwhile."""
        yield from copy.copy(self)._keys()

    def _keys(self) -> Iterator[ViewKey]:
        if len(self.group_of_rank) == 1:
            windows, generator = self._windows(0)
            yield from itertools.chain.from_iterable(self._mix(0, windows, generator))
            return
        streams = [self._stream(rank) for rank in range(len(self.group_of_rank))]
        for _ in range(self.num_batches):
            for stream in streams:
                yield from itertools.islice(stream, self.batch_size)

    def windows(self, rank: int = 0) -> list[list[ChunkKey]]:
        """Return the chunks that a process reads in this epoch, with their views, window by window.

        Samples of a window come before those of the next.

        Args:
            rank: The process.
        """
        (windows, _), shown = self._windows(rank), self._num_shown(self.group_of_rank[rank])
        return [
            list(dict.fromkeys((self._view(chunk), chunk % shown) for chunk in window.tolist())) for window in windows
        ]

    def _num_shown(self, group: int) -> int:
        """Return the number of chunks that epochs show: chunk ``i`` of an epoch is ``i`` modulo that number."""
        layout = self.layouts[group]
        return layout.num_chunks if self.share == 1 else layout.part(self.share).num_chunks

    def _by_turns(self, chunks: npt.NDArray[np.int64], group: int) -> npt.NDArray[np.int64]:
        """Return an order in which each chunk that is shown comes once before any comes again."""
        return chunks[np.argsort(chunks // self._num_shown(group), kind="stable")]

    def _windows(self, rank: int) -> tuple[list[npt.NDArray[np.int64]], np.random.Generator]:
        """Return the chunks of a process in this epoch, window by window, and what mixes their samples."""
        if len(self.group_of_rank) == 1:
            generator = np.random.default_rng([self.seed & (2**64 - 1), 0x5A, self.epoch])
            chunks = self._by_turns(generator.permutation(self.layouts[0].num_chunks), 0)
            return [chunks[start : start + self.window] for start in range(0, len(chunks), self.window)], generator
        group = self.group_of_rank[rank]
        group_ranks = [other for other, other_group in enumerate(self.group_of_rank) if other_group == group]
        chunks = self._deal(group)[group_ranks.index(rank) :: len(group_ranks)]
        generator = np.random.default_rng([self.seed & (2**64 - 1), 0x5B, self.epoch, rank])
        # Windows of nearly equal length: the last one fills up the stream, so it must not be a small remainder.
        return np.array_split(chunks, -(-len(chunks) // self.window)), generator

    def _view(self, chunk: int) -> int:
        """Return the view that a chunk is read in, in this epoch."""
        if self.plain_from is None:
            return epoch_view(self.view_seed, self.epoch, chunk, self.num_views)
        if self.epoch >= self.plain_from:
            return 0
        if self.num_views < 2:
            return epoch_view(self.view_seed, self.epoch, chunk, self.num_views)
        return 1 + epoch_view(self.view_seed, self.epoch, chunk, self.num_views - 1)

    def _mix(
        self, group: int, windows: Sequence[npt.NDArray[np.int64]], generator: np.random.Generator
    ) -> Iterator[list[ViewKey]]:
        """Yield the shuffled keys of one window of chunks after the other."""
        layout, shown = self.layouts[group], self._num_shown(group)
        for window in windows:
            # As many samples as the chunk itself would have: the last one may be short.
            sample_indices = [layout.members(chunk % shown)[: len(layout.members(chunk))] for chunk in window.tolist()]
            views = [
                np.full(len(samples), self._view(chunk))
                for chunk, samples in zip(window.tolist(), sample_indices, strict=True)
            ]
            keys = np.stack([np.concatenate(sample_indices), np.concatenate(views)], axis=1)
            yield list(map(tuple, generator.permutation(keys).tolist()))

    def _deal(self, group: int) -> npt.NDArray[np.int64]:
        """Return the chunks of a group in this epoch's order; its processes take them in turn."""
        layout, readers = self.layouts[group], self.group_of_rank.count(group)
        generator = np.random.default_rng([self.seed & (2**64 - 1), 0x5A, self.epoch, group])
        chunks = self._by_turns(generator.permutation(layout.num_chunks), group)
        # The short chunk goes to a process with an extra chunk: the streams then differ least in length.
        short = int(np.flatnonzero(chunks == layout.num_chunks - 1)[0])
        turn, reader = divmod(short, readers)
        extra_chunks = layout.num_chunks % readers
        if extra_chunks and reader >= extra_chunks:
            chunks[[short, turn * readers]] = chunks[[turn * readers, short]]
        return chunks

    def _stream(self, rank: int) -> Iterator[ViewKey]:
        """Yield the keys of one process, without end: all of its samples, then those of its last window again and again."""
        windows, generator = self._windows(rank)
        keys: list[ViewKey] = []
        for keys in self._mix(self.group_of_rank[rank], windows, generator):
            yield from keys
        yield from itertools.cycle(keys)


@dataclass(frozen=True)
class _OpenedLayout:
    """The opened chunks of a layout, numbered from 0."""

    layout: ChunkLayout
    chunks: tuple[int, ...]

    @property
    def num_chunks(self) -> int:
        return len(self.chunks)

    @property
    def num_samples(self) -> int:
        return sum(len(self.members(chunk)) for chunk in range(len(self.chunks)))

    def members(self, chunk: int) -> npt.NDArray[np.int64]:
        return self.layout.members(self.chunks[chunk])


class OpenedSampler(ChunkSampler):
    """Shuffles the opened chunks of a cache, and yields each of them in each opened view in turn.

    Args:
        layout: Layout of the whole cache.
        chunks: Numbers of the opened chunks.
        views: Numbers of the opened views.
        seed: Seed of the order, and of the order of the views.
        window: Number of chunks whose samples are mixed.
    """

    def __init__(
        self, layout: ChunkLayout, chunks: tuple[int, ...], views: tuple[int, ...], seed: int, window: int
    ) -> None:
        opened: Any = _OpenedLayout(layout, chunks)
        self.views = views
        self._chunks = chunks
        super().__init__([opened], seed, seed, len(views), window)

    @override
    def windows(self, rank: int = 0) -> list[list[ChunkKey]]:
        opened = super().windows(rank)
        return [[(self.views[view], self._chunks[chunk]) for view, chunk in window] for window in opened]

    def __iter__(self) -> Iterator[ViewKey]:
        """Yield the keys of one epoch."""
        for sample_index, view in super().__iter__():
            yield sample_index, self.views[view]
