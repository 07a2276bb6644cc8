"""Reading ahead in threads: the same samples, each chunk once, in bounded memory, and nothing left behind."""

from __future__ import annotations

import gc
import pickle
import threading
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_cache
from support.tiny import make_trainer, tiny_vit
from torch.utils.data import BatchSampler
from transformers import TrainerCallback

from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.data.layout import ChunkLayout
from hf_freezecache.data.read_ahead import StoredOrder
from hf_freezecache.data.sampler import ChunkSampler, OpenedSampler
from hf_freezecache.dataset import CachedDataset
from hf_freezecache.errors import CacheCorruptError

ROWS, WINDOW = 45, 3


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> CacheReader:
    plan = tiny_cache.make_plan(num_samples=ROWS, chunk_size=3)
    return CacheReader(tiny_cache.build(tmp_path_factory.mktemp("cache"), plan).directory)


def sampler_of(reader: CacheReader, processes: int = 1, batch_size: int = 4) -> ChunkSampler:
    return ChunkSampler([reader.layout], 5, 6, 2, WINDOW, (0,) * processes, batch_size)


@given(
    rows=st.integers(12, 90),
    processes=st.integers(1, 4),
    chunk=st.integers(1, 3),
    window=st.integers(1, 5),
    batch=st.integers(1, 9),
    seed=st.integers(-5, 2**70),
    epoch=st.integers(0, 5),
)
def test_samples_come_window_by_window(rows, processes, chunk, window, batch, seed, epoch) -> None:
    layout = ChunkLayout(rows, chunk, seed)
    sampler = ChunkSampler([layout], seed, seed + 1, 2, window, (0,) * processes, batch)
    sampler.set_epoch(epoch)
    batches = list(BatchSampler(sampler, batch, False))
    for rank in range(processes):
        windows = sampler.windows(rank)
        of = {key: number for number, window in enumerate(windows) for key in window}
        keys = [key for dealt in batches[rank::processes] for key in dealt]
        seen = [of[view, int(layout.position[row]) // chunk] for row, view in keys]
        assert seen == sorted(seen)
        assert set(seen) == set(range(len(windows)))
        assert {(view, int(layout.position[row]) // chunk) for row, view in keys} == of.keys()


def test_windows_of_an_opened_part_are_its_chunks_and_views(reader) -> None:
    sampler = OpenedSampler(reader.layout, (9, 2, 4), (1,), 0, 2)
    windows = sampler.windows()
    assert [len(window) for window in windows] == [2, 1]
    assert {key for window in windows for key in window} == {(1, 9), (1, 2), (1, 4)}


@pytest.mark.parametrize("within_window", [False, True])
@pytest.mark.parametrize(("threads", "batch_size", "processes"), [(1, 4, 1), (3, 1, 1), (2, 10, 1), (2, 4, 2)])
def test_samples_are_the_same_each_chunk_is_read_once_and_memory_is_bounded(
    reader, threads, batch_size, processes, within_window, monkeypatch
) -> None:
    max_chunks = WINDOW + min(batch_size, WINDOW)
    sampler = sampler_of(reader, processes, batch_size)
    datasets = [CachedDataset(reader, max_chunks, packed=True, keep_read=processes > 1) for _ in range(processes)]
    plain = CachedDataset(reader, reader.layout.num_chunks * 2, packed=True, keep_read=True)
    for rank, dataset in enumerate(datasets):
        dataset.read_ahead(sampler, rank, threads, within_window)
    read: Counter[tuple[int, int]] = Counter()
    decode = CacheReader.entropy_decode_chunk
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected = [plain.__getitems__(keys) for keys in BatchSampler(sampler, batch_size, False)]
        read.clear()
        with monkeypatch.context() as patch:
            patch.setattr(
                CacheReader,
                "entropy_decode_chunk",
                lambda self, view, chunk: (read.update([(view, chunk)]), decode(self, view, chunk))[1],
            )
            for number, keys in enumerate(BatchSampler(sampler, batch_size, False)):
                dataset = datasets[number % processes]
                for found, item in zip(dataset.__getitems__(keys), expected[number], strict=True):
                    assert found.keys() == item.keys()
                    assert all(torch.equal(found[name], item[name]) for name in item)
                assert len(dataset._chunks) + len(dataset._ahead) <= max_chunks
                assert dataset._chunks.keys() == dataset._unread.keys()
        assert max(read.values()) == 1
        assert len(read) == reader.layout.num_chunks or (processes > 1 and epoch)  # some are there from before


@pytest.mark.parametrize(("threads", "processes", "share"), [(1, 1, 0.5), (3, 1, 0.2), (2, 2, 0.4)])
def test_of_a_part_of_the_rows_chunks_are_read_once_for_each_window_that_shows_them(
    reader, threads, processes, share, monkeypatch
) -> None:
    sampler, max_chunks = sampler_of(reader, processes), 2 * WINDOW
    sampler.share = share
    datasets = [CachedDataset(reader, max_chunks, packed=True, keep_read=processes > 1) for _ in range(processes)]
    plain = CachedDataset(reader, reader.layout.num_chunks * 2, packed=True, keep_read=True)
    for rank, dataset in enumerate(datasets):
        dataset.read_ahead(sampler, rank, threads)
    read: list[tuple[int, int]] = []
    decode = CacheReader.entropy_decode_chunk
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(BatchSampler(sampler, 4, False))
        expected = [plain.__getitems__(keys) for keys in batches]
        read.clear()
        with monkeypatch.context() as patch:
            patch.setattr(
                CacheReader,
                "entropy_decode_chunk",
                lambda self, view, chunk: (read.append((view, chunk)), decode(self, view, chunk))[1],
            )
            for number, keys in enumerate(batches):
                dataset = datasets[number % processes]
                for found, item in zip(dataset.__getitems__(keys), expected[number], strict=True):
                    assert all(torch.equal(found[name], item[name]) for name in item)
                assert len(dataset._chunks) + len(dataset._ahead) <= max_chunks
        windows = [window for rank in range(processes) for window in sampler.windows(rank)]
        # A chunk that ends one turn and begins the next in one window may be read again there.
        assert len(read) <= sum(map(len, windows)) + len(windows)


def test_chunks_of_the_next_window_are_read_while_this_one_is_used(reader) -> None:
    sampler = sampler_of(reader)
    dataset = CachedDataset(reader, 2 * WINDOW, packed=True)
    dataset.read_ahead(sampler, threads=1)
    keys = list(sampler)
    dataset[keys[0]]
    assert len(dataset._chunks) == 1
    assert set(dataset._ahead._reading) == {key for window in sampler.windows()[:2] for key in window} - set(
        dataset._chunks
    )


def test_within_a_window_all_chunks_are_read_with_the_first_and_none_beyond(reader) -> None:
    sampler = sampler_of(reader)
    dataset = CachedDataset(reader, 2 * WINDOW, packed=True)
    dataset.read_ahead(sampler, threads=2, within_window=True)
    for window in sampler.windows():
        keys = [(int(reader.layout.members(chunk)[row]), view) for view, chunk in window for row in (0, 1)]
        dataset[keys[0]]
        assert set(dataset._ahead._reading) | dataset._chunks.keys() == set(window)
        for key in keys:
            dataset[key]
        assert not dataset._ahead
        dataset._chunks.clear()
        dataset._unread.clear()


@pytest.mark.parametrize("threads", [0, 1, 2])
@pytest.mark.parametrize("held", [0, 1, 5, 1000])
def test_what_is_held_is_read_once_and_takes_no_more_than_its_room(reader, held, threads, monkeypatch) -> None:
    sampler, layout = sampler_of(reader), reader.layout
    plain = CachedDataset(reader, layout.num_chunks * 2, packed=True, keep_read=True)
    chunks = layout.num_chunks * reader.index.num_views
    sizes = [sum(part.nbytes for part in plain._read((0, chunk)).values()) for chunk in range(layout.num_chunks)]
    room = int(held * max(sizes) * 1.2)
    dataset = CachedDataset(reader, 2 * WINDOW, packed=True, held_bytes=room)
    dataset.read_ahead(sampler, threads=threads)
    read: list[tuple[int, int]] = []
    decode = CacheReader.entropy_decode_chunk
    monkeypatch.setattr(
        CacheReader, "entropy_decode_chunk", lambda self, *key: (read.append(key), decode(self, *key))[1]
    )
    epochs = 3 * reader.index.num_views
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        expected_of = {key: plain[key] for key in sampler}
        read.clear()
        there = set(dataset._held)
        for key in sampler:
            found, expected = dataset[key], expected_of[key]
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            in_memory = sum(part.nbytes for parts in dataset._held.values() for part in parts.values())
            assert in_memory == room - dataset._room_to_hold <= room
            assert len(dataset._chunks) + (len(dataset._ahead) if threads else 0) <= 2 * WINDOW
        assert there.isdisjoint(read)
        assert max(Counter(read).values(), default=1) == 1
    assert min(held, chunks) <= len(dataset._held) <= chunks
    # Each chunk that is not held is read in each epoch that shows it, the others in one.
    assert (
        dataset.decoded_chunks == len(dataset._held) + (chunks - len(dataset._held)) * epochs // reader.index.num_views
    )


def test_no_chunk_outlives_its_stage_and_the_last_is_let_go_with_training(train_dataset) -> None:
    held: list[dict[int, int]] = []

    def alive() -> dict[int, int]:
        gc.collect()
        # Not by isinstance: some objects of torch warn when they are asked for their class.
        caches = [one for one in gc.get_objects() if type(one) is CachedDataset and one.packed and one.held_bytes]
        return {one.reader.index.split_point: len(one._held) + len(one._chunks) for one in caches}

    class Looks(TrainerCallback):
        def on_epoch_end(self, *args, **kwargs) -> None:
            held.append(alive())

    trainer = make_trainer(tiny_vit(), train_dataset, cache={"chunk_size": 10}, schedule="0:1,2:2", num_train_epochs=3)
    trainer.add_callback(Looks())
    trainer.train()
    assert held == [{1: 5}, {1: 5}, {2: 5}]
    assert not any(alive().values())


def test_a_worker_holds_chunks_of_its_own(reader) -> None:
    dataset = CachedDataset(reader, 2 * WINDOW, packed=True, held_bytes=2**30)
    dataset[0]
    copied = pickle.loads(pickle.dumps(dataset))
    assert len(dataset._held) == 1
    assert not copied._held
    assert copied._room_to_hold == 2**30


@pytest.mark.parametrize("skipped", [1, 7, 20, 44])
def test_an_epoch_that_goes_on_in_its_midst_reads_only_what_lies_ahead(reader, skipped) -> None:
    sampler = sampler_of(reader)
    dataset = CachedDataset(reader, 2 * WINDOW, packed=True)
    dataset.read_ahead(sampler, threads=2)
    keys = list(sampler)
    for key in keys[:3]:
        dataset[key]
    for key in keys[skipped:]:
        dataset[key]
    assert len(dataset._ahead) <= WINDOW  # chunks of its first window may have been read for nothing
    sampler.set_epoch(1)
    for key in sampler:
        dataset[key]
        assert len(dataset._chunks) + len(dataset._ahead) <= 2 * WINDOW
    assert not dataset._ahead


def test_damage_is_told_where_the_chunk_is_needed(tmp_path) -> None:
    plan = tiny_cache.make_plan(num_samples=ROWS, chunk_size=3)
    directory = tiny_cache.build(tmp_path, plan).directory
    reader = CacheReader(directory)
    sampler = sampler_of(reader)
    windows = sampler.windows()
    view, chunk = windows[1][0]
    decode = CacheReader.entropy_decode_chunk

    class Damaged(CacheReader):
        def entropy_decode_chunk(self, *key):
            if key == (view, chunk):
                raise CacheCorruptError(f"chunk {chunk} is damaged")
            return decode(self, *key)

    dataset = CachedDataset(Damaged(directory), 2 * WINDOW, packed=True)
    dataset.read_ahead(sampler, threads=1)
    keys = list(sampler)
    first = next(n for n, (row, v) in enumerate(keys) if (v, int(reader.layout.position[row]) // 3) == (view, chunk))
    assert first >= 3 * WINDOW
    for key in keys[:first]:
        dataset[key]
    with pytest.raises(CacheCorruptError, match=f"chunk {chunk} is damaged"):
        dataset[keys[first]]


def test_no_thread_outlives_its_data_set(reader) -> None:
    dataset = CachedDataset(reader, 2 * WINDOW, packed=True)
    dataset.read_ahead(sampler_of(reader), threads=2)
    dataset[next(iter(sampler_of(reader)))]
    started = list(dataset._ahead._pool._threads)
    assert len(started) == 2
    del dataset
    gc.collect()
    for thread in started:
        thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.mark.parametrize(("memory_gb", "times"), [(0, 2), (0.25, 1)])
def test_workers_of_the_user_become_threads_and_each_chunk_is_decoded_once(
    memory_gb, times, train_dataset, monkeypatch
) -> None:
    decoded: Counter[tuple[str, int, int]] = Counter()
    decode = CacheReader.entropy_decode_chunk

    def counted(self, view, chunk):
        name = threading.current_thread().name
        if name.startswith("freezecache-read"):
            decoded[name[:16], view, chunk] += 1
        return decode(self, view, chunk)

    cache = {"num_views": 1, "chunk_size": 8, "memory_gb": memory_gb}
    monkeypatch.setattr(CacheReader, "entropy_decode_chunk", counted)
    trainer = make_trainer(
        tiny_vit(), train_dataset, cache=cache, schedule="0:2", num_train_epochs=2, dataloader_num_workers=2
    )
    trainer.train()
    assert len(decoded) == 7  # 50 rows in chunks of 8
    assert set(decoded.values()) == {times}  # in two epochs


@given(rows=st.integers(1, 60), batch=st.integers(1, 7), batches=st.integers(1, 4), processes=st.integers(1, 4))
def test_an_evaluation_reads_the_chunks_of_its_batches_in_order(rows, batch, batches, processes) -> None:
    order, chunk_size = StoredOrder(rows, batch * batches, batch, processes), batch * batches
    dealt = list(BatchSampler(range(rows), batch, False))
    for rank in range(processes):
        needed = sorted({row // chunk_size for keys in dealt[rank::processes] for row in keys})
        assert order.windows(rank) == [[(0, chunk)] for chunk in needed]


def test_chunks_of_an_evaluation_are_decoded_once_and_ahead_of_it(train_dataset, eval_dataset, monkeypatch) -> None:
    decoded: Counter[tuple[str, int]] = Counter()
    most: list[int] = []
    decode, get = CacheReader.entropy_decode_chunk, CachedDataset.__getitems__

    def counted(self, view, chunk):
        if self.layout.num_samples == 20:
            decoded[threading.current_thread().name[:16], chunk] += 1
        return decode(self, view, chunk)

    def watched(self, keys):
        samples = get(self, keys)
        if self.packed and len(self) == 20:
            most.append(len(self._chunks) + len(self._ahead or ()))
        return samples

    monkeypatch.setattr(CacheReader, "entropy_decode_chunk", counted)
    monkeypatch.setattr(CachedDataset, "__getitems__", watched)
    settings = {"schedule": "0:2", "eval_strategy": "epoch", "num_train_epochs": 2, "per_device_eval_batch_size": 2}
    cache = {"num_views": 1, "chunk_size": 2, "shard_chunks": 4, "cache_eval": True, "build_num_workers": 0}
    trainer = make_trainer(tiny_vit(), train_dataset, eval_dataset, cache=cache, **settings)
    trainer.args.dataloader_num_workers = 2
    trainer.train()
    ahead = {chunk: times for (name, chunk), times in decoded.items() if name == "freezecache-read"}
    assert ahead == dict.fromkeys(range(10), 2) | {0: ahead[0]}
    assert max(most) == 4  # two, and one for each thread
