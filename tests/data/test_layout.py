"""Where samples lie, in which order they are read, and how little is read for it."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_cache
from torch.utils.data import BatchSampler, DataLoader

import hf_freezecache.data.layout as layout_module
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.data.collators import collate_cached
from hf_freezecache.data.layout import (
    ChunkLayout,
    epoch_view,
)
from hf_freezecache.data.sampler import ChunkSampler
from hf_freezecache.dataset import CachedDataset
from hf_freezecache.errors import CacheCorruptError

SEEDS = st.integers(-(2**63), 2**64 - 1)
#: Views that six epochs show of chunks 0, 1 and 10**6 by seeds 0 and -1. A change of them changes every training from a cache.
WRITTEN_DOWN = [
    [1, 2, 0, 0, 2, 1],
    [1, 0, 2, 2, 0, 1],
    [1, 0, 2, 1, 2, 0],
    [0, 2, 1, 1, 2, 0],
    [0, 1, 2, 0, 1, 2],
    [1, 2, 0, 1, 0, 2],
]
LAYOUTS = st.builds(ChunkLayout, st.integers(1, 300), st.integers(1, 40), SEEDS)


@given(LAYOUTS)
def test_layout_is_a_permutation_and_chunks_partition_it(layout) -> None:
    everything = np.arange(layout.num_samples)
    assert np.array_equal(np.sort(layout.order), everything)
    assert np.array_equal(layout.order[layout.position], everything)
    assert np.array_equal(layout.position[layout.order], everything)
    members = [layout.members(chunk) for chunk in range(layout.num_chunks)]
    assert np.array_equal(np.concatenate(members), layout.order)
    assert [len(rows) for rows in members[:-1]] == [layout.chunk_size] * (layout.num_chunks - 1)
    assert 1 <= len(members[-1]) <= layout.chunk_size
    for chunk, rows in enumerate(members):
        assert set(layout.position[rows] // layout.chunk_size) == {chunk}
    assert len(layout.members(layout.num_chunks)) == 0


@given(LAYOUTS)
def test_layout_is_a_function_of_its_fields(layout) -> None:
    twin = ChunkLayout(layout.num_samples, layout.chunk_size, layout.seed)
    assert twin == layout
    assert np.array_equal(twin.order, layout.order)
    # The order does not depend on the chunk size, so a cache keeps its order when it is cut anew.
    assert np.array_equal(ChunkLayout(layout.num_samples, 7, layout.seed).order, layout.order)


def test_chunks_are_no_runs_of_neighbours_and_seeds_differ() -> None:
    orders = [ChunkLayout(1000, 32, seed).order for seed in range(5)]
    for a, b in itertools.combinations(orders, 2):
        assert np.count_nonzero(a == b) < 10
    assert np.count_nonzero(np.abs(np.diff(orders[0])) == 1) < 10
    # Sorted labels, ten classes: no chunk is of one class.
    for chunk in range(31):
        assert len(set(ChunkLayout(1000, 32, 0).members(chunk) // 100)) >= 5


@given(seed=SEEDS, chunk=st.integers(0, 10**6), num_views=st.integers(2, 9), cycle=st.integers(0, 1000))
def test_views_are_balanced_over_cycles(seed, chunk, num_views, cycle) -> None:
    epochs = range(cycle * num_views, (cycle + 1) * num_views)
    assert sorted(epoch_view(seed, epoch, chunk, num_views) for epoch in epochs) == list(range(num_views))


@given(seed=SEEDS, chunk=st.integers(0, 10**6), num_views=st.integers(2, 9), epoch=st.integers(0, 1000))
def test_views_are_in_range_and_pure(seed, chunk, num_views, epoch) -> None:
    state = np.random.get_state()[1].copy()
    view = epoch_view(seed, epoch, chunk, num_views)
    assert type(view) is int
    assert 0 <= view < num_views
    assert epoch_view(seed, epoch, chunk, num_views) == view
    assert np.array_equal(np.random.get_state()[1], state)


@given(seed=SEEDS, chunk=st.integers(0, 10**6), num_views=st.integers(2, 9), start=st.integers(0, 100))
def test_views_are_never_constant(seed, chunk, num_views, start) -> None:
    """Not over any run of epochs as long as two cycles, wherever it starts; a view may repeat only across a border."""
    views = [epoch_view(seed, epoch, chunk, num_views) for epoch in range(start, start + 2 * num_views)]
    assert max(len(list(run)) for _, run in itertools.groupby(views)) <= 2
    assert len(set(views)) == num_views


def test_chunks_and_cycles_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_view(0, epoch, chunk, 4) for epoch in range(4)) for chunk in range(200)}
    assert len(orders) == 24
    cycles = {tuple(epoch_view(0, 4 * cycle + turn, 5, 4) for turn in range(4)) for cycle in range(200)}
    assert len(cycles) == 24
    first = Counter(epoch_view(seed, 0, 0, 4) for seed in range(400))
    assert min(first.values()) > 60


@given(seed=SEEDS, chunk=st.integers(0, 1000))
def test_without_stored_views_every_epoch_has_a_new_one(seed, chunk) -> None:
    views = [epoch_view(seed, epoch, chunk, 0) for epoch in range(50)]
    assert len(set(views)) == 50
    assert 0 not in views  # view 0 may be the eval rendering
    assert [epoch_view(seed, epoch, chunk, 1) for epoch in range(50)] == [0] * 50


# ---- The sampler ----


def sampler_of(layout: ChunkLayout, seed: int = 0, view_seed: int = 0, num_views: int = 2, window: int = 3):
    return ChunkSampler([layout], seed, view_seed, num_views, window)


@given(LAYOUTS, SEEDS, st.integers(0, 4), st.integers(1, 12), st.integers(0, 50))
def test_each_epoch_has_every_sample_once_in_the_view_of_its_chunk(layout, seed, num_views, window, epoch) -> None:
    sampler = ChunkSampler([layout], seed, seed, num_views, window)
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert len(sampler) == len(keys) == layout.num_samples
    assert sorted(row for row, _ in keys) == list(range(layout.num_samples))
    assert all(type(row) is int and type(view) is int for row, view in keys)
    for row, view in keys:
        assert view == epoch_view(seed, epoch, int(layout.position[row]) // layout.chunk_size, num_views)
    assert list(sampler) == keys


@given(LAYOUTS, SEEDS, st.integers(0, 4), st.integers(0, 8))
def test_plain_epochs_show_the_base_view_and_those_before_the_others(layout, seed, num_views, plain_from) -> None:
    sampler, shown = ChunkSampler([layout], seed, seed, num_views, 3), []
    sampler.plain_from = plain_from
    for epoch in range(plain_from + 3):
        sampler.set_epoch(epoch)
        views = dict(sampler)
        assert views.keys() == set(range(layout.num_samples))
        windows = {chunk: view for window in sampler.windows() for view, chunk in window}
        assert all(view == windows[int(layout.position[row]) // layout.chunk_size] for row, view in views.items())
        shown.append(views)
    for views in shown[plain_from:]:
        assert set(views.values()) == {0}
    for start in range(0, plain_from, max(num_views - 1, 1)):
        cycle = shown[start : min(start + max(num_views - 1, 1), plain_from)]
        for row in range(layout.num_samples):
            views = [views[row] for views in cycle]
            assert len(set(views)) == len(views)
            expected = {0} if num_views == 1 else {start + 1} if num_views == 0 else set(range(1, num_views))
            assert set(views) <= expected


@given(LAYOUTS, SEEDS, st.integers(1, 12), st.integers(0, 50), st.integers(1, 64))
def test_at_any_time_at_most_a_window_of_chunks_is_open(layout, seed, window, epoch, batch_size) -> None:
    """A chunk is open from its first sample to its last. A batch may reach over into the next window."""
    sampler = ChunkSampler([layout], seed, seed, 2, window)
    sampler.set_epoch(epoch)
    chunks = [int(layout.position[row]) // layout.chunk_size for row, _ in sampler]
    first = {chunk: chunks.index(chunk) for chunk in set(chunks)}
    last = {chunk: position for position, chunk in enumerate(chunks)}

    def open_during(start: int, stop: int) -> int:
        return sum(first[chunk] < stop and last[chunk] >= start for chunk in first)

    assert max(open_during(position, position + 1) for position in range(len(chunks))) <= window
    spill = min(batch_size, window)
    for start in range(0, len(chunks), batch_size):
        stop = min(start + batch_size, len(chunks))
        if batch_size <= layout.chunk_size:  # else one batch alone may span several windows
            assert open_during(start, stop) <= window + spill


def order_of(layout: ChunkLayout, epoch: int, **settings) -> list[int]:
    sampler = sampler_of(layout, **settings)
    sampler.set_epoch(epoch)
    return [row for row, _ in sampler]


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    layout = ChunkLayout(200, 8, 0)
    orders = [order_of(layout, epoch, seed=seed) for epoch in range(4) for seed in range(4)]
    for a, b in itertools.combinations(orders, 2):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 20
    torch.manual_seed(9)
    np.random.seed(9)
    assert order_of(layout, 2, seed=3) == orders[2 * 4 + 3]
    # Another view seed or number of views shows other views in the same order.
    assert order_of(layout, 2, seed=3, view_seed=5, num_views=0) == orders[2 * 4 + 3]


def test_samples_of_a_window_are_mixed() -> None:
    layout = ChunkLayout(64, 8, 0)
    chunks = [int(layout.position[row]) // 8 for row in order_of(layout, 0, window=4)]
    for start in (0, 32):
        assert len(set(chunks[start : start + 32])) == 4
        changes = sum(a != b for a, b in itertools.pairwise(chunks[start : start + 32]))
        assert changes > 15
    one = [int(layout.position[row]) // 8 for row in order_of(layout, 0, window=1)]
    assert sum(a != b for a, b in itertools.pairwise(one)) == 7
    assert [row for row in order_of(layout, 0, window=1) if layout.position[row] < 8] != layout.members(0).tolist()


# ---- The views that epochs show ----


@given(LAYOUTS, SEEDS, st.integers(2, 6), st.integers(0, 20))
def test_every_sample_shows_every_view_once_per_cycle_of_epochs(layout, seed, num_views, cycle) -> None:
    """So views are balanced per sample, and no sample is ever stuck with one of them."""
    sampler = ChunkSampler([layout], seed, seed, num_views, 3)
    shown: dict[int, list[int]] = {row: [] for row in range(layout.num_samples)}
    for epoch in range(cycle * num_views, (cycle + 1) * num_views):
        sampler.set_epoch(epoch)
        for row, view in sampler:
            shown[row].append(view)
    assert all(sorted(views) == list(range(num_views)) for views in shown.values())


@given(LAYOUTS, SEEDS, st.integers(2, 6), st.integers(0, 50), st.integers(1, 9), st.integers(1, 40))
def test_views_depend_on_no_window_no_order_and_no_batch(layout, seed, num_views, epoch, window, batch_size) -> None:
    def views(order_seed: int, window: int, batches: int | None) -> dict[int, int]:
        sampler = ChunkSampler([layout], order_seed, seed, num_views, window)
        sampler.set_epoch(epoch)
        if batches is None:
            return dict(iter(sampler))
        return dict(itertools.chain.from_iterable(BatchSampler(sampler, batches, drop_last=False)))

    expected = views(0, 3, None)
    assert views(7, window, batch_size) == expected
    # One chunk, one view; and chunks do not all show the same one.
    by_chunk = [{expected[row] for row in layout.members(chunk).tolist()} for chunk in range(layout.num_chunks)]
    assert all(len(seen) == 1 for seen in by_chunk)
    if layout.num_chunks >= 40:
        assert len(set.union(*by_chunk)) > 1


def test_views_are_the_same_in_another_process() -> None:
    """Written down, and computed by an interpreter that hashes otherwise and has drawn random numbers."""
    code = (
        "import numpy, random, runpy, sys; numpy.random.seed(5); random.seed(5)\n"
        "epoch_view = runpy.run_path(sys.argv[1])['epoch_view']\n"
        "print([[epoch_view(seed, epoch, chunk, 3) for epoch in range(6)] for seed in (0, -1) for chunk in (0, 1, 10**6)])"
    )
    # The module alone, which needs no torch.
    command = [sys.executable, "-c", code, layout_module.__file__]
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    here = [[epoch_view(seed, epoch, chunk, 3) for epoch in range(6)] for seed in (0, -1) for chunk in (0, 1, 10**6)]
    assert json.loads(found.stdout) == here == WRITTEN_DOWN


# ---- The data set over a cache ----

NUM_SAMPLES, CHUNK_SIZE, WINDOW = 45, 4, 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> CacheReader:
    plan = tiny_cache.make_plan(NUM_SAMPLES, CHUNK_SIZE, shard_chunks=4)
    return CacheReader(tiny_cache.build(tmp_path_factory.mktemp("caches"), plan, batch_size=16).directory)


def expected_item(row: int, view: int) -> dict[str, torch.Tensor]:
    views = tiny_cache.make_views(tiny_cache.make_plan(NUM_SAMPLES))
    rendered = views[row, view]
    return {
        "hidden_states": tiny_cache.prefix(rendered["pixel_values"][None])[0],
        "labels": torch.tensor(rendered["labels"]),
        "mask": rendered["mask"],
        "weights": rendered["weights"],
    }


def assert_item(found: dict[str, torch.Tensor], row: int, view: int) -> None:
    expected = expected_item(row, view)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), (name, row, view)


def test_items_are_found_by_sample_index_and_view(cache) -> None:
    dataset = CachedDataset(cache)
    assert len(dataset) == NUM_SAMPLES
    for row in range(NUM_SAMPLES):
        assert_item(dataset[row], row, 0)
        assert_item(dataset[row, 1], row, 1)
    assert not torch.equal(dataset[3]["hidden_states"], dataset[3, 1]["hidden_states"])
    keys = [(7, 1), 0, (7, 0), (7, 1), np.int64(44)]
    for item, (row, view) in zip(dataset.__getitems__(keys), [(7, 1), (0, 0), (7, 0), (7, 1), (44, 0)], strict=True):
        assert_item(item, row, view)


@pytest.mark.parametrize("key", [NUM_SAMPLES, -1, (0, 2), (0, -1), (NUM_SAMPLES, 0)])
def test_what_is_not_in_the_cache_is_an_index_error(cache, key) -> None:
    with pytest.raises(IndexError, match="holds 45 samples in 2 views"):
        CachedDataset(cache)[key]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 10, 45])
def test_each_chunk_is_decoded_once_per_epoch_and_memory_is_bounded(cache, batch_size, monkeypatch) -> None:
    max_chunks = WINDOW + min(batch_size, WINDOW)
    dataset = CachedDataset(cache, max_chunks)
    sampler = sampler_of(cache.layout, window=WINDOW)
    held: list[int] = []
    read_chunk = CacheReader.read_chunk

    def counted(self, view, chunk):
        held.append(len(dataset._chunks) + 1)
        return read_chunk(self, view, chunk)

    monkeypatch.setattr(CacheReader, "read_chunk", counted)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        rows = []
        loader = DataLoader(
            dataset, batch_sampler=BatchSampler(sampler, batch_size, drop_last=False), collate_fn=collate_cached
        )
        keys = iter(list(sampler))
        for batch in loader:
            assert batch.keys() == {"hidden_states", "labels", "mask", "weights"}
            for position in range(len(batch["labels"])):
                row, view = next(keys)
                assert_item({name: value[position] for name, value in batch.items()}, row, view)
                rows.append(row)
        assert sorted(rows) == list(range(NUM_SAMPLES))
        assert dataset.decoded_chunks == (epoch + 1) * cache.layout.num_chunks
        assert len(dataset._chunks) == 0  # read to their end, they make room at once
    assert max(held) <= max_chunks
    assert max(held) >= WINDOW


def test_at_most_max_chunks_are_held_in_any_order(cache) -> None:
    dataset = CachedDataset(cache, max_chunks=2)
    generator = np.random.default_rng(0)
    for row in generator.integers(0, NUM_SAMPLES, 200).tolist():
        assert_item(dataset[row], row, 0)
        assert len(dataset._chunks) <= 2
        assert dataset._chunks.keys() == dataset._unread.keys()


def test_workers_take_no_decoded_chunks_along(cache) -> None:
    dataset = CachedDataset(cache)
    dataset[0]
    assert len(dataset._chunks) == 1
    twin = pickle.loads(pickle.dumps(dataset))
    assert len(twin._chunks) == len(twin._unread) == 0
    assert_item(twin[0], 0, 0)
    # The original still knows what it holds and what of it is unread.
    assert_item(dataset[0], 0, 0)
    assert dataset.decoded_chunks == 1


def test_worker_processes_yield_the_same_batches(cache) -> None:
    def batches(num_workers: int) -> list[dict[str, torch.Tensor]]:
        sampler = BatchSampler(sampler_of(cache.layout, window=WINDOW), 10, drop_last=False)
        dataset = CachedDataset(cache, 6)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_cached, num_workers=num_workers)
        return list(loader)

    alone, helped = batches(0), batches(2)
    assert len(alone) == 5
    for a, b in zip(alone, helped, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_from_pretrained_opens_a_directory_and_refuses_others(cache, tmp_path) -> None:
    assert_item(CachedDataset.from_pretrained(str(cache.directory))[5], 5, 0)
    with pytest.raises(CacheCorruptError, match="no finished cache"):
        CachedDataset.from_pretrained(tmp_path)
