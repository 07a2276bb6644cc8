"""Reads the chunks of an epoch in threads, in its order, before the samples in them are asked for."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from .sampler import ChunkKey

__all__ = ["ReadAhead", "ReadingOrder", "StoredOrder"]

Chunk = TypeVar("Chunk")


class ReadingOrder(Protocol):
    """Says in which order chunks are read, as a ``ChunkSampler`` does."""

    @property
    def epoch(self) -> int:
        """The epoch. Another one has another order."""

    def windows(self, rank: int = 0) -> list[list[ChunkKey]]:
        """Return the chunks that a process reads, window by window; within a window any may come first."""


@dataclass(frozen=True)
class StoredOrder:
    """View 0 of a cache, read once from the first chunk to the last, in batches that are dealt to processes in turn.

    Attributes:
        num_samples: Samples of the cache.
        chunk_size: Samples per chunk, a multiple of ``batch_size``.
        batch_size: Samples per batch.
        processes: Processes that read.
        epoch: Always 0.
    """

    num_samples: int
    chunk_size: int
    batch_size: int
    processes: int = 1
    epoch: int = 0

    def windows(self, rank: int = 0) -> list[list[ChunkKey]]:
        """Return the chunks in which a process has a batch, one by one."""
        starts = range(rank * self.batch_size, self.num_samples, self.processes * self.batch_size)
        return [[(0, chunk)] for chunk in dict.fromkeys(start // self.chunk_size for start in starts)]


class ReadAhead(Generic[Chunk]):
    """Chunks that are being read, or have been read and nobody has taken yet.

    The order is the sampler's. A chunk of a window that lies elsewhere, as after a resume, begins anew there. What is read does not
    depend on the threads, only when it is.

    Args:
        read: Reads and decodes one chunk. It is called from several threads.
        sampler: Its order is followed.
        rank: Process of the run whose stream is followed.
        threads: Threads that read, at least one.
        within_window: Chunks of a window are read once the first sample of it is asked for, not before: steps that take all cores then wait
            for none.
    """

    def __init__(
        self,
        read: Callable[[ChunkKey], Chunk],
        sampler: ReadingOrder,
        rank: int,
        threads: int,
        within_window: bool = False,
    ) -> None:
        self.read = read
        self.sampler = sampler
        self.rank = rank
        self.within_window = within_window
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="freezecache-read")
        # Without this, a training that ends early would read on what is still queued.
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self._epoch: int | None = None
        self._windows: list[list[ChunkKey]] = []
        self._windows_of: dict[ChunkKey, list[int]] = {}
        self._window = 0
        #: With the number of its window: a chunk may be in several.
        self._queue: deque[tuple[int, ChunkKey]] = deque()
        self._reading: dict[ChunkKey, Future[Chunk]] = {}

    def __len__(self) -> int:
        """Return the number of chunks that are being read or wait to be taken."""
        return len(self._reading)

    def __contains__(self, key: ChunkKey) -> bool:
        """Return whether a chunk has samples of this epoch."""
        return key in self._windows_of

    def follow(self) -> bool:
        """Turn to the sampler's epoch; return whether it is another one."""
        if self._epoch == self.sampler.epoch:
            return False
        self._epoch = self.sampler.epoch
        self._windows = self.sampler.windows(self.rank)
        self._windows_of = {}
        for number, window in enumerate(self._windows):
            for key in window:
                self._windows_of.setdefault(key, []).append(number)
        self._window = len(self._windows)
        self._go_to(0)
        return True

    def turn_to(self, key: ChunkKey) -> None:
        """Leave out what lies before the window of a chunk, and put that chunk first."""
        # Where rows come several times in an epoch it is the next turn: the order never goes back.
        turns = self._windows_of.get(key, [self._window])
        window = next((turn for turn in turns if turn >= self._window), turns[-1])
        if window != self._window:
            self._go_to(window)
        # Mostly it is being read: looking for it in the queue would take the time of all chunks ahead, for each of them.
        if key not in self._reading and (window, key) in self._queue:
            self._queue.remove((window, key))
            self._queue.appendleft((window, key))

    def take(self, key: ChunkKey) -> Chunk:
        """Return a chunk; wait for it if need be.

        Raises:
            CacheCorruptError: What ``read`` raised for this chunk.
        """
        future = self._reading.pop(key, None)
        if future is not None:
            return future.result()
        if (self._window, key) in self._queue:
            self._queue.remove((self._window, key))
        if self._reading:  # it takes the room of the last one
            last, future = self._reading.popitem()
            future.cancel()
            self._queue.appendleft((self._window, last))
        return self.read(key)

    def read_on(self, held: Collection[ChunkKey], room: int) -> None:
        """Start to read the next chunks.

        Args:
            held: Chunks that need not be read.
            room: So many chunks may be read or wait.
        """
        while self._queue and len(self._reading) < room:
            if self.within_window and self._queue[0][0] != self._window:
                break
            _, key = self._queue.popleft()
            if key not in held and key not in self._reading:
                self._reading[key] = self._pool.submit(self.read, key)

    def _go_to(self, window: int) -> None:
        """Leave out what lies before a window: samples come window by window, and a resumed epoch skips some."""
        if window < self._window:
            numbered = itertools.islice(enumerate(self._windows), window, None)
            self._queue = deque((number, key) for number, later in numbered for key in later)
        while self._queue and self._queue[0][0] < window:
            self._queue.popleft()
        for key in [key for key in self._reading if max(self._windows_of.get(key, [-1])) < window]:
            self._reading.pop(key).cancel()
        self._window = window
