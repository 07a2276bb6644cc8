"""The processes of a run that share one folder of caches, and how they talk. A single process pays nothing."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from .. import errors
from ..errors import FreezeCacheError, PeerError

__all__ = ["ProcessGroup", "find_process_group"]

_T = TypeVar("_T")

#: How long one process may wait for another, which may build for hours. A process that died is noticed at once, since its
#: connections close.
_TIMEOUT = datetime.timedelta(days=7)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that build and read one folder of caches together; by default this process alone.

    All methods are collective, except ``split_between`` and ``rows_of_groups``: every process of the group must call them, in
    the same order.

    Attributes:
        rank: Rank of this process in its group.
        size: Number of processes in the group.
        group_index: Number of the group; 0 if all processes of the run share one folder.
        num_groups: Number of groups in the run.
        main_rank: Rank of the group's main process among all processes of the run.
        group_of_rank: Group of each process of the run, in the order of ranks.
        torch_group: The group for ``torch.distributed``, with the gloo backend; ``None`` for a single process.
    """

    rank: int = 0
    size: int = 1
    group_index: int = 0
    num_groups: int = 1
    main_rank: int = 0
    group_of_rank: tuple[int, ...] = (0,)
    torch_group: Any = None

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the main process of its group: the one that does what only one process should do."""
        return self.rank == 0

    def rows_of_groups(self, num_rows: int) -> list[tuple[int, int]]:
        """Return the rows (start, stop) of each group, in proportion to its number of processes."""
        num_processes, ends = len(self.group_of_rank), [0]
        for group in range(self.num_groups):
            ends.append(ends[-1] + self.group_of_rank.count(group))
        return [
            (num_rows * start // num_processes, num_rows * stop // num_processes)
            for start, stop in itertools.pairwise(ends)
        ]

    def broadcast(self, value: _T) -> _T:
        """Return the main process's value on every process. The values of the others are ignored."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=self.main_rank, group=self.torch_group)
        return values[0]

    def gather(self, value: _T) -> list[_T]:
        """Return the values of all processes, in the order of ranks, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.torch_group)
        return values

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Run a block that may fail on some processes only; if it failed on any, fail on all of them.

        At the end of the block, the processes exchange how it went. So no process waits for ever for one that gave up.

        Raises:
            Exception: Whatever the block raised, on the processes where it failed.
            FreezeCacheError: On the other processes: the first failure, as the same class if it is one of ours.
            PeerError: On the other processes: the first failure, if its class is not ours.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failures = self.gather(None if failure is None else (type(failure).__name__, str(failure)))
        if failure is not None:
            raise failure
        for rank, peer_failure in enumerate(failures):
            if peer_failure is not None:
                name, message = peer_failure
                kind = getattr(errors, name, None)
                if isinstance(kind, type) and issubclass(kind, FreezeCacheError):
                    raise kind(f"Process {rank}: {message}")
                raise PeerError(f"Process {rank} failed with {name}: {message}")

    def on_main_process(self, function: Callable[[], _T]) -> _T:
        """Call a function on the main process alone; return its result on every process.

        Raises:
            Exception: Whatever the function raised, on the main process.
            FreezeCacheError: On the other processes, as ``fail_together``.
        """
        value: Any = None
        with self.fail_together():
            if self.is_main_process:
                value = function()
        return self.broadcast(value)

    def split_between(self, items: Sequence[_T]) -> list[_T]:
        """Return this process's run of consecutive items. The lengths of two processes differ by at most one."""
        start, stop = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return list(items[start:stop])


def find_process_group(world_size: int, local_rank: int, per_node: bool) -> ProcessGroup:
    """Return the processes that share a folder of caches with this one. Collective over all processes of the run.

    Args:
        world_size: Number of processes in the run.
        local_rank: Rank of this process on its machine.
        per_node: Whether each machine has a folder of its own.
    """
    if world_size == 1 or not dist.is_initialized():
        return ProcessGroup()
    # The backend of the gradients would not do: NCCL gives up on a process that builds for longer than `ddp_timeout`.
    world = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    rank = dist.get_rank()
    if not per_node:
        return ProcessGroup(rank, world_size, group_of_rank=(0,) * world_size, torch_group=world)
    local_ranks: list[int] = [0] * world_size
    dist.all_gather_object(local_ranks, local_rank, group=world)
    # Launchers number the processes of a machine consecutively, beginning with its local rank 0.
    starts = [index for index, local in enumerate(local_ranks) if local == 0]
    ranks_of_nodes = [list(range(start, stop)) for start, stop in zip(starts, [*starts[1:], world_size], strict=True)]
    # Every process must take part in making every group.
    torch_groups = [dist.new_group(ranks, backend="gloo", timeout=_TIMEOUT) for ranks in ranks_of_nodes]
    node = next(index for index, ranks in enumerate(ranks_of_nodes) if rank in ranks)
    ranks = ranks_of_nodes[node]
    return ProcessGroup(
        rank=rank - ranks[0],
        size=len(ranks),
        group_index=node,
        num_groups=len(ranks_of_nodes),
        main_rank=ranks[0],
        group_of_rank=tuple(index for index, node_ranks in enumerate(ranks_of_nodes) for _ in node_ranks),
        torch_group=torch_groups[node],
    )
