"""Which sample lies in which chunk, and which view of a chunk an epoch sees. Pure functions of seeds."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ChunkLayout", "epoch_view"]


@dataclass(frozen=True)
class ChunkLayout:
    """Rows are permuted before they are cut into chunks, so a chunk is a random sample and never a run of one class.

    Attributes:
        num_samples: Rows that this layout is of.
        chunk_size: Samples per chunk; the last chunk may be smaller.
        seed: Seed of the permutation.
        rows: Which of the permuted rows these are: (start, stop, rows of the whole data set). ``None`` for all.
    """

    num_samples: int
    chunk_size: int
    seed: int
    rows: tuple[int, int, int] | None = None

    @classmethod
    def of_rows(cls, total: int, chunk_size: int, seed: int, start: int, stop: int) -> ChunkLayout:
        """Return the layout of a run of the permuted rows of a data set of ``total`` rows."""
        whole = (start, stop) == (0, total)
        return cls(stop - start, chunk_size, seed, None if whole else (start, stop, total))

    def part(self, share: float) -> ChunkLayout:
        """Return the layout of the first chunks: such a share of all, rounded up to whole ones. Their rows are a random sample."""
        chunks = max(math.ceil(share * self.num_chunks - 1e-9), 1)
        if chunks >= self.num_chunks:
            return self
        start, size = 0 if self.rows is None else self.rows[0], chunks * self.chunk_size
        return ChunkLayout(size, self.chunk_size, self.seed, (start, start + size, self.total_samples))

    @property
    def total_samples(self) -> int:
        """Rows of the whole data set."""
        return self.num_samples if self.rows is None else self.rows[2]

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        return -(-self.num_samples // self.chunk_size)

    @functools.cached_property
    def order(self) -> npt.NDArray[np.int64]:
        """Sample indices in the order in which they are stored, (num_samples,)."""
        order = np.random.default_rng([self.seed & (2**64 - 1), 0xC4]).permutation(self.total_samples)
        if self.rows is None:
            return order
        start, stop, _ = self.rows
        return order[start:stop].copy()

    @functools.cached_property
    def position(self) -> npt.NDArray[np.int64]:
        """Position in ``order`` of each sample index of the whole data set, (total_samples,); -1 for rows that are not in this layout."""
        position = np.full(self.total_samples, -1, dtype=np.int64)
        position[self.order] = np.arange(self.num_samples)
        return position

    def members(self, chunk: int) -> npt.NDArray[np.int64]:
        """Sample indices of a chunk, in stored order, (at most chunk_size,)."""
        return self.order[chunk * self.chunk_size : (chunk + 1) * self.chunk_size]


def epoch_view(seed: int, epoch: int, chunk: int, num_views: int) -> int:
    """Return the view that the samples of a chunk show in an epoch.

    In each cycle of ``num_views`` epochs a chunk shows each view once, in an order of its own, so views are balanced
    and, with at least two, never constant. ``num_views = 0`` means a view that no other epoch uses, ``epoch + 1``.
    """
    if num_views == 0:
        return epoch + 1
    if num_views == 1:
        return 0
    cycle, turn = divmod(epoch, num_views)
    return int(np.random.default_rng([seed & (2**64 - 1), 0x7E, chunk, cycle]).permutation(num_views)[turn])
