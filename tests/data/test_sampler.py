"""Streams of chunks for several processes: who reads what, how often, and in which order accelerate deals it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_cache
from torch.utils.data import BatchSampler

from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.data.layout import ChunkLayout
from hf_freezecache.data.sampler import ChunkSampler
from hf_freezecache.dataset import CachedDataset
from hf_freezecache.distributed.process_group import ProcessGroup
from hf_freezecache.errors import UnsupportedSetupError


def make(
    rows: int,
    chunk: int,
    window: int,
    batch: int,
    group_of_rank: tuple[int, ...],
    seed: int = 0,
    drop_last: bool = False,
    num_views: int = 2,
) -> ChunkSampler:
    process_group = ProcessGroup(group_of_rank=group_of_rank, num_groups=max(group_of_rank) + 1)
    layouts = [ChunkLayout.of_rows(rows, chunk, seed, *run) for run in process_group.rows_of_groups(rows)]
    return ChunkSampler(layouts, seed, seed + 1, num_views, window, group_of_rank, batch, drop_last)


def dealt(sampler: ChunkSampler, batch: int, processes: int, drop_last: bool = False) -> list[list[list[tuple]]]:
    """Return the batches of each process, as accelerate deals them."""
    batches = BatchSampler(sampler, batch, drop_last)
    return [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]


SHAPES = {
    "chunk": st.integers(1, 7),
    "window": st.integers(1, 5),
    "batch": st.integers(1, 9),
    "seed": st.integers(-5, 2**70),
    "epoch": st.integers(0, 5),
}


@given(rows=st.integers(12, 90), processes=st.integers(2, 4), **SHAPES)
def test_every_sample_is_seen_and_every_chunk_has_one_reader(
    rows, processes, chunk, window, batch, seed, epoch
) -> None:
    chunks = -(-rows // chunk)
    if chunks < processes:
        with pytest.raises(UnsupportedSetupError, match=f"{processes} processes share {rows} rows in {chunks} chunks"):
            make(rows, chunk, window, batch, (0,) * processes, seed)
        return
    sampler = make(rows, chunk, window, batch, (0,) * processes, seed)
    sampler.set_epoch(epoch)
    layout = sampler.layouts[0]
    streams = dealt(sampler, batch, processes)
    assert {len(stream) for stream in streams} == {sampler.num_batches}
    assert sum(len(keys) for stream in streams for keys in stream) == len(sampler)
    seen = Counter(row for stream in streams for keys in stream for row, _ in keys)
    assert sorted(seen) == list(range(rows))
    # What fills the end is one chunk and one batch of each process at most.
    assert len(sampler) - rows <= processes * (chunk + batch)
    readers = [{int(layout.position[row]) // chunk for keys in stream for row, _ in keys} for stream in streams]
    assert sum(map(len, readers)) == chunks
    views = {(int(layout.position[row]) // chunk, view) for stream in streams for keys in stream for row, view in keys}
    assert len(views) == chunks  # one view of a chunk in an epoch
    again = make(rows, chunk, window, batch, (0,) * processes, seed)
    again.set_epoch(epoch)
    assert list(again) == list(sampler)


@given(rows=st.integers(12, 90), processes=st.integers(2, 4), **SHAPES)
def test_dropping_the_last_batch_repeats_nothing(rows, processes, chunk, window, batch, seed, epoch) -> None:
    if -(-rows // chunk) < processes:
        return
    try:
        sampler = make(rows, chunk, window, batch, (0,) * processes, seed, drop_last=True)
    except UnsupportedSetupError as error:
        assert "leaves nothing" in str(error)  # noqa: PT017
        assert rows // processes < batch + chunk
        return
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert len(keys) == len(sampler) == sampler.num_batches * batch * processes > 0
    assert max(Counter(row for row, _ in keys).values()) == 1


@given(rows=st.integers(12, 90), group_of_rank=st.sampled_from([(0, 1), (0, 0, 1), (0, 0, 1, 1), (0, 1, 2)]), **SHAPES)
def test_a_machine_trains_on_its_own_rows(rows, group_of_rank, chunk, window, batch, seed, epoch) -> None:
    try:
        sampler = make(rows, chunk, window, batch, group_of_rank, seed)
    except UnsupportedSetupError:
        return
    sampler.set_epoch(epoch)
    streams = dealt(sampler, batch, len(group_of_rank))
    # Machines with more processes have more rows: nobody's rows come more often than it takes to fill the end.
    assert len(sampler) - rows <= len(group_of_rank) * (2 * chunk + batch)
    for group, layout in enumerate(sampler.layouts):
        rows_read = {
            row for rank, stream in enumerate(streams) if group_of_rank[rank] == group for k in stream for row, _ in k
        }
        assert rows_read == set(layout.order.tolist())
    assert sorted(row for layout in sampler.layouts for row in layout.order.tolist()) == list(range(rows))


@given(
    rows=st.integers(12, 90),
    group_of_rank=st.sampled_from([(0,), (0, 0), (0, 0, 0), (0, 1), (0, 0, 1)]),
    share=st.floats(0.01, 1.0),
    num_views=st.integers(0, 3),
    **SHAPES,
)
def test_of_a_part_of_the_rows_each_comes_as_often_as_any(
    rows, group_of_rank, share, num_views, chunk, window, batch, seed, epoch
) -> None:
    try:
        whole, sampler = (make(rows, chunk, window, batch, group_of_rank, seed, num_views=num_views) for _ in range(2))
    except UnsupportedSetupError:
        return
    sampler.share = share
    for one in (whole, sampler):
        one.set_epoch(epoch)
    assert len(list(sampler)) == len(sampler) == len(list(whole))
    streams = dealt(sampler, batch, len(group_of_rank))
    for group, layout in enumerate(sampler.layouts):
        part = layout.part(share)
        assert part.order.tolist() == layout.order[: part.num_samples].tolist()
        # Whole chunks, and not one more than are asked for.
        assert part.num_samples >= min(share * layout.num_samples, 1) - 1e-6
        assert part.num_chunks == layout.num_chunks or part.num_chunks <= share * layout.num_chunks + 1
        keys = [k for rank, stream in enumerate(streams) if group_of_rank[rank] == group for b in stream for k in b]
        seen = Counter(row for row, _ in keys)
        assert set(seen) <= set(part.order.tolist())
        assert len(seen) >= min(part.num_samples, layout.num_samples)
        if len(group_of_rank) == 1:  # else, and in the last batch, some fill the end
            keys = list(sampler)
            seen = Counter(row for row, _ in keys)
            assert max(seen.values()) - min(seen.values()) <= 1
            # All of the part come before any comes again, but for those that are mixed with the next turn.
            first = [row for row, _ in keys[: part.num_samples + window * chunk]]
            assert set(first) == set(part.order.tolist())
        # What is to be read ahead is what comes.
        for rank, stream in enumerate(streams):
            if group_of_rank[rank] == group:
                chunks = {(view, int(layout.position[row]) // chunk) for b in stream for row, view in b}
                assert chunks == {key for ahead in sampler.windows(rank) for key in ahead}
    if share == 1:
        assert list(sampler) == list(whole)


@pytest.mark.parametrize("processes", [1, 2])
def test_turns_over_a_part_come_one_after_the_other_and_the_last_chunk_stays_short(processes) -> None:
    sampler = make(44, 3, 1, 4, (0,) * processes)  # 15 chunks, the last of two rows
    sampler.share = 0.3
    for epoch in range(4):
        sampler.set_epoch(epoch)
        read = [[chunk for _, chunk in window] for rank in range(processes) for window in sampler.windows(rank)]
        if processes == 1:
            order = [chunk for (chunk,) in read]
            assert [sorted(order[start : start + 5]) for start in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
            assert len(list(sampler)) == 44
        assert Counter(chunk for window in read for chunk in window) == dict.fromkeys(range(5), 3)


@pytest.mark.by_default(1)
@pytest.mark.parametrize(("processes", "batch", "window"), [(2, 4, 2), (3, 2, 3), (2, 16, 1), (4, 3, 2)])
def test_each_chunk_is_decoded_once_in_an_epoch_over_all_processes(tmp_path, processes, batch, window) -> None:
    plan = tiny_cache.make_plan(num_samples=45, chunk_size=3)
    reader = CacheReader(tiny_cache.build(tmp_path, plan).directory)
    sampler = ChunkSampler([reader.layout], 1, 2, 2, window, (0,) * processes, batch)
    datasets = [CachedDataset(reader, window + min(batch, window), keep_read=True) for _ in range(processes)]
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for dataset, stream in zip(datasets, dealt(sampler, batch, processes), strict=True):
            for keys in stream:
                dataset.__getitems__(keys)
        decoded = sum(dataset.decoded_chunks for dataset in datasets)
        # A chunk that is still there from the end of the epoch before is not decoded again.
        assert decoded == reader.layout.num_chunks or (epoch and decoded <= (epoch + 1) * reader.layout.num_chunks)


def test_orders_change_with_epoch_and_process() -> None:
    sampler = make(64, 4, 2, 4, (0, 0))
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(tuple(sampler))
        first, second = dealt(sampler, 4, 2)
        assert first != second
    assert len(set(epochs)) == 3


def test_layouts_of_groups_are_runs_of_one_permutation() -> None:
    whole = ChunkLayout(11, 4, 3)
    layouts = [
        ChunkLayout.of_rows(11, 4, 3, *rows)
        for rows in ProcessGroup(group_of_rank=(0, 1, 2), num_groups=3).rows_of_groups(11)
    ]
    assert np.array_equal(np.concatenate([layout.order for layout in layouts]), whole.order)
    assert [layout.num_samples for layout in layouts] == [3, 4, 4]
    for layout in layouts:
        assert np.array_equal(np.flatnonzero(layout.position >= 0), np.sort(layout.order))
        assert np.array_equal(layout.order[layout.position[layout.order]], layout.order)
    assert ChunkLayout.of_rows(11, 4, 3, 0, 11) == whole
    assert ProcessGroup(group_of_rank=(0, 0, 0, 1), num_groups=2).rows_of_groups(100) == [(0, 75), (75, 100)]


@given(st.lists(st.integers()), st.integers(1, 9))
def test_items_are_split_between_processes_into_runs_of_one_length(items, size) -> None:
    runs = [ProcessGroup(rank, size).split_between(items) for rank in range(size)]
    assert [item for run in runs for item in run] == items
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
