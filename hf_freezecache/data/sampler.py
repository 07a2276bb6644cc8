"""The order in which cached and live training read samples: chunk by chunk, one stream for each process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from ..errors import UnsupportedSetupError
from .layout import (
    ChunkLayout,
    epoch_view,
)
from .views import ViewKey

__all__ = ["ChunkSampler", "OpenedSampler"]


class ChunkSampler(Sampler[ViewKey]):
    """Shuffles in two levels by ``(seed, epoch)``: permutes the chunks, then the samples within a window of chunks.

    Yields ``(sample index, view)``. Cached and live training of a stage use the same sampler, so that they see the
    same samples in the same order in the same views.

    With several processes, each chunk goes to one of them in an epoch. The sampler interleaves their streams in the
    order in which accelerate deals batches, global batch ``i`` to process ``i % processes``, and fills all streams up to
    whole batches and one length with samples of their own last window: up to ``chunk_size + batch_size - 1`` samples
    for each process come twice. accelerate would do the same with samples from the beginning of the epoch, whose chunks
    would have to be read again.

    Args:
        layouts: Which sample lies in which chunk; one layout for each part of the data set.
        seed: Seed of the order.
        view_seed: Seed of the choice of views.
        num_views: Stored views, or 0 for a new view in every epoch.
        window: Chunks whose samples are mixed.
        group_of_rank: Part that each process reads, in the order of ranks.
        batch_size: Samples per batch of one process. Matters to several processes only.
        drop_last: Leave samples out in place of filling up. Matters to several processes only.

    Raises:
        UnsupportedSetupError: There are fewer chunks than processes that read them, or ``drop_last`` leaves no batch.
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
        #: Batches of one process in an epoch; 0 if there is but one, whose last batch may be short.
        self.num_batches = self._count_batches() if len(self.group_of_rank) > 1 else 0

    def _count_batches(self) -> int:
        longest, shortest = 0, None
        for part, layout in enumerate(self.layouts):
            readers, size = self.group_of_rank.count(part), layout.chunk_size
            whole, left = divmod(layout.num_chunks, readers)
            if whole == 0:
                raise UnsupportedSetupError(
                    f"{readers} processes share {layout.num_samples} rows in {layout.num_chunks} chunks; each needs a chunk of "
                    f"its own. Set CacheConfig(chunk_size=...) to at most {max(layout.num_samples // readers, 1)}, or "
                    "start fewer processes."
                )
            missing = layout.num_chunks * size - layout.num_samples  # from the one short chunk
            # `_deal` gives the short chunk to a process with one chunk more than others, if there is one.
            most = whole * size if not left else (whole + 1) * size - (missing if left == 1 else 0)
            least = whole * size - (0 if left else missing)
            longest = max(longest, most)
            shortest = least if shortest is None else min(shortest, least)
        if self.drop_last and (shortest or 0) < self.batch_size:
            raise UnsupportedSetupError(
                f"dataloader_drop_last=True leaves nothing: a process reads {shortest} samples in an epoch, fewer than a batch "
                f"of {self.batch_size}. Set it to False, or per_device_train_batch_size to at most {shortest}."
            )
        return (shortest or 0) // self.batch_size if self.drop_last else -(-longest // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order ``iter`` gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of samples, those that come twice included."""
        if self.num_batches:
            return self.num_batches * self.batch_size * len(self.group_of_rank)
        return self.layouts[0].num_samples

    def __iter__(self) -> Iterator[ViewKey]:
        """Yield the keys of one epoch."""
        if len(self.group_of_rank) == 1:
            generator = np.random.default_rng([self.seed & (2**64 - 1), 0x5A, self.epoch])
            chunks = generator.permutation(self.layouts[0].num_chunks)
            windows = [chunks[start : start + self.window] for start in range(0, len(chunks), self.window)]
            yield from itertools.chain.from_iterable(self._mix(self.layouts[0], windows, generator))
            return
        streams = [self._stream(rank) for rank in range(len(self.group_of_rank))]
        for _ in range(self.num_batches):
            for stream in streams:
                yield from itertools.islice(stream, self.batch_size)

    def _mix(
        self, layout: ChunkLayout, windows: Sequence[npt.NDArray[np.int64]], generator: np.random.Generator
    ) -> Iterator[list[ViewKey]]:
        """Yield the shuffled keys of one window of chunks after the other."""
        for window in windows:
            members = [layout.members(chunk) for chunk in window.tolist()]
            views = [
                np.full(len(rows), epoch_view(self.view_seed, self.epoch, chunk, self.num_views))
                for chunk, rows in zip(window.tolist(), members, strict=True)
            ]
            keys = np.stack([np.concatenate(members), np.concatenate(views)], axis=1)
            yield list(map(tuple, generator.permutation(keys).tolist()))

    def _deal(self, part: int) -> npt.NDArray[np.int64]:
        """Return the chunks of a part in this epoch's order; the processes that read it take them in turn."""
        layout, readers = self.layouts[part], self.group_of_rank.count(part)
        chunks = np.random.default_rng([self.seed & (2**64 - 1), 0x5A, self.epoch, part]).permutation(layout.num_chunks)
        # The short chunk goes to a process that has one chunk more, lest others wait for longer than need be.
        place = int(np.flatnonzero(chunks == layout.num_chunks - 1)[0])
        row, reader = divmod(place, readers)
        left = layout.num_chunks % readers
        if left and reader >= left:
            chunks[[place, row * readers]] = chunks[[row * readers, place]]
        return chunks

    def _stream(self, rank: int) -> Iterator[ViewKey]:
        """Yield the keys of one process, without end: after its own samples, those of its last window again."""
        part = self.group_of_rank[rank]
        peers = [other for other, its_part in enumerate(self.group_of_rank) if its_part == part]
        chunks = self._deal(part)[peers.index(rank) :: len(peers)]
        # Windows of about one length: what fills the end comes from the last one, which must not be a rest of few.
        windows = np.array_split(chunks, -(-len(chunks) // self.window))
        generator = np.random.default_rng([self.seed & (2**64 - 1), 0x5B, self.epoch, rank])
        keys: list[ViewKey] = []
        for keys in self._mix(self.layouts[part], windows, generator):
            yield from keys
        yield from itertools.cycle(keys)


@dataclass(frozen=True)
class _OpenedLayout:
    """The chunks of a layout that were opened, numbered anew."""

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
    """Shuffles what was opened of a cache, and shows each chunk each view in turn.

    Args:
        layout: Of the whole cache.
        chunks: Numbers of the chunks that were opened.
        views: Numbers of the views that were opened.
        seed: Of the order, and of the turns of the views.
        window: Chunks whose samples are mixed.
    """

    def __init__(
        self, layout: ChunkLayout, chunks: tuple[int, ...], views: tuple[int, ...], seed: int, window: int
    ) -> None:
        opened: Any = _OpenedLayout(layout, chunks)
        self.views = views
        super().__init__([opened], seed, seed, len(views), window)

    def __iter__(self) -> Iterator[ViewKey]:
        """Yield the keys of one epoch."""
        for sample_index, view in super().__iter__():
            yield sample_index, self.views[view]
