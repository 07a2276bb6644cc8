"""The processes of a run that share one folder of caches. Talks through ``torch.distributed``; alone, it costs nothing."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from .. import errors
from ..errors import (
    FreezeCacheError,
    PeerError,
)

__all__ = ["ProcessGroup", "find_process_group"]

_T = TypeVar("_T")

#: How long one process may wait for another, which may be building for hours. One that died is noticed at once: its
#: connections close.
_PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that build and read one folder of caches together; a single one by default.

    Every method but ``split_between`` and ``rows_of_groups`` is collective: all processes of the group call it, in the same order.

    Attributes:
        rank: Number of this process in its group.
        size: ProcessGroup in the group.
        group_index: Number of the group; 0 where all processes share one folder.
        num_groups: Groups in the run.
        main_rank: Rank of the group's first process among all processes of the run.
        group_of_rank: Group of every process of the run, in the order of ranks.
        group: Gloo process group, whatever the backend that gradients take; ``None`` for a single process.
    """

    rank: int = 0
    size: int = 1
    group_index: int = 0
    num_groups: int = 1
    main_rank: int = 0
    group_of_rank: tuple[int, ...] = (0,)
    group: Any = None

    @property
    def is_main_process(self) -> bool:
        """Whether this process does what only one should."""
        return self.rank == 0

    def rows_of_groups(self, num_rows: int) -> list[tuple[int, int]]:
        """Return the rows of each group, (start, stop): as many as its share of the processes of the run."""
        total, ends = len(self.group_of_rank), [0]
        for group in range(self.num_groups):
            ends.append(ends[-1] + self.group_of_rank.count(group))
        return [(num_rows * a // total, num_rows * b // total) for a, b in itertools.pairwise(ends)]

    def broadcast(self, value: _T) -> _T:
        """Return the main process's value on every process; values of others are ignored."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self.main_rank, group=self.group)
        return box[0]

    def gather(self, value: _T) -> list[_T]:
        """Return the values of all processes, in the order of ranks, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Run a block in which processes may fail apart from each other; if any did, fail on all of them.

        No process waits for ever for one that has given up: each says at the end of the block how it went.

        Raises:
            FreezeCacheError: On the processes that did not fail themselves: the first failure of another, as the same
                class where it is one of ours, as ``PeerError`` otherwise.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        found = self.gather(None if failure is None else (type(failure).__name__, str(failure)))
        if failure is not None:
            raise failure
        for rank, other in enumerate(found):
            if other is not None:
                name, message = other
                kind = getattr(errors, name, None)
                if isinstance(kind, type) and issubclass(kind, FreezeCacheError):
                    raise kind(f"Process {rank}: {message}")
                raise PeerError(f"Process {rank} failed with {name}: {message}")

    def on_main_process(self, function: Callable[[], _T]) -> _T:
        """Call a function on the main process alone; return what it gave, or fail as it failed, on every process."""
        value: Any = None
        with self.fail_together():
            if self.is_main_process:
                value = function()
        return self.broadcast(value)

    def split_between(self, items: Sequence[_T]) -> list[_T]:
        """Return this process's run of the items: contiguous, and as long as the others' or one longer."""
        start, stop = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return list(items[start:stop])


def find_process_group(world_size: int, local_rank: int, per_node: bool) -> ProcessGroup:
    """Return the processes that share a folder of caches with this one. Collective.

    Args:
        world_size: ProcessGroup of the run.
        local_rank: Number of this process on its machine.
        per_node: Whether each machine has a folder of its own.
    """
    if world_size == 1 or not dist.is_initialized():
        return ProcessGroup()
    # Not the backend of the gradients: NCCL's gives up on a process that builds for longer than `ddp_timeout`.
    everyone = dist.new_group(backend="gloo", timeout=_PATIENCE)
    rank = dist.get_rank()
    if not per_node:
        return ProcessGroup(rank, world_size, group_of_rank=(0,) * world_size, group=everyone)
    local_ranks: list[int] = [0] * world_size
    dist.all_gather_object(local_ranks, local_rank, group=everyone)
    # Launchers number the processes of a machine one after the other, beginning with its local rank 0.
    starts = [index for index, local in enumerate(local_ranks) if local == 0]
    members = [list(range(start, stop)) for start, stop in zip(starts, [*starts[1:], world_size], strict=True)]
    # Every process has to take part in making every group.
    groups = [dist.new_group(ranks, backend="gloo", timeout=_PATIENCE) for ranks in members]
    node = next(number for number, ranks in enumerate(members) if rank in ranks)
    ranks = members[node]
    group_of_rank = tuple(number for number, part in enumerate(members) for _ in part)
    return ProcessGroup(rank - ranks[0], len(ranks), node, len(members), ranks[0], group_of_rank, groups[node])
