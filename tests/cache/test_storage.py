"""Caches read through fsspec: from memory, from file:// and from a store that counts what it sends."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from support import hostile, tiny_cache
from torch.utils.data import DataLoader

from hf_freezecache.cache.index import (
    INDEX_NAME,
    load_index,
    shard_name,
    table_name,
)
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.cache.storage import (
    LocalStorage,
    RemoteStorage,
    open_storage,
)
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.data.collators import collate_cached
from hf_freezecache.dataset import CachedDataset
from hf_freezecache.errors import (
    CacheCorruptError,
    CacheMismatchError,
    UnsupportedSetupError,
)

URL = "memory://bucket/cache"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    return hostile.sound_caches(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def memory() -> Iterator[Any]:
    yield fsspec.filesystem("memory")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def upload(cache: Path, filesystem: Any, folder: str = "/bucket/cache") -> None:
    for path in sorted(p for p in cache.rglob("*") if p.is_file()):
        filesystem.pipe_file(f"{folder}/{path.relative_to(cache).as_posix()}", path.read_bytes())


def assert_same(first: Any, second: Any) -> None:
    for view in range(2):
        for row in range(8):
            ours, theirs = (CachedDataset.from_pretrained(place)[row, view] for place in (first, second))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["lossless", "int8", "transform"])
def test_a_cache_in_memory_is_read_as_from_disk(memory, sound, name) -> None:
    upload(sound[name], memory)
    assert_same(URL, sound[name])
    assert verify_cache(URL) == []
    assert verify_cache(URL + "/") == []
    assert load_index(open_storage(URL)) == load_index(sound[name])


def test_copies_in_memory_are_read(memory, sound) -> None:
    upload(sound["copies"], memory)
    hostile.read_all(URL)
    assert verify_cache(URL) == []


@pytest.mark.parametrize("prefix", ["file://", "local://"])
def test_an_address_of_this_machine_is_a_local_path(sound, prefix) -> None:
    url = f"{prefix}{sound['lossless']}"
    assert open_storage(url) == LocalStorage(sound["lossless"])
    assert_same(url, sound["lossless"])
    assert verify_cache(url) == []


def test_links_are_refused_by_an_address_of_this_machine_too(sound, tmp_path) -> None:
    cache = hostile.make_hostile("shard_that_links_out_of_the_cache", sound, tmp_path)
    with pytest.raises(CacheCorruptError, match="outside of the cache"):
        CachedDataset.from_pretrained(f"file://{cache}")


def test_the_fingerprint_of_a_remote_cache_is_checked(memory, sound) -> None:
    upload(sound["lossless"], memory)
    CacheReader(URL, tiny_cache.make_plan().fingerprint)
    with pytest.raises(CacheMismatchError, match=f"Cache {URL} .*differ: data"):
        CacheReader(URL, tiny_cache.make_plan(data="others").fingerprint)


# ---- Errors name the address ----


@pytest.mark.parametrize("url", ["memory://nothing/here", "memory://bucket"])
def test_no_cache_at_an_address(memory, sound, url) -> None:
    upload(sound["lossless"], memory)
    with pytest.raises(CacheCorruptError, match=f"{url} is no finished cache"):
        CachedDataset.from_pretrained(url)
    assert url in verify_cache(url)[0]


@pytest.mark.parametrize("url", ["nosuch://bucket/cache", "nosuch::memory://bucket"])
def test_unknown_protocols_are_refused(url) -> None:
    with pytest.raises(UnsupportedSetupError, match=f"{url} cannot be opened"):
        CachedDataset.from_pretrained(url)
    assert url in verify_cache(url)[0]


@pytest.mark.parametrize("name", [shard_name(1, 0), table_name(0, 1)])
def test_missing_damaged_and_foreign_files_are_named(memory, sound, name) -> None:
    upload(sound["lossless"], memory)
    raw = memory.cat_file(f"/bucket/cache/{name}")
    memory.pipe_file(f"/bucket/cache/{name}", raw[:-1])
    with pytest.raises(CacheCorruptError, match=f"{URL}/{name} has {len(raw) - 1} bytes, expected {len(raw)}"):
        CacheReader(URL)
    memory.pipe_file(f"/bucket/cache/{name}", raw[:-1] + bytes([raw[-1] ^ 1]))
    assert [f"{URL}/{name} is altered" in problem for problem in verify_cache(URL)] == [True]
    memory.rm_file(f"/bucket/cache/{name}")
    with pytest.raises(CacheCorruptError, match=f"{URL}/{name} is missing"):
        CacheReader(URL)
    memory.pipe_file("/bucket/cache/more", b"x")
    assert verify_cache(URL) == [f"{URL}/{name} is missing.", f"{URL}/more does not belong to the cache."]


def test_a_remote_cache_that_vanishes_says_so(memory, sound) -> None:
    upload(sound["lossless"], memory)
    dataset = CachedDataset.from_pretrained(URL)
    memory.rm("/bucket/cache", recursive=True)
    with pytest.raises(CacheCorruptError, match=f"{URL}/view-00/shard-00000.safetensors is missing.*Check the address"):
        dataset[2]


@pytest.mark.slow
def test_hostile_caches_are_refused_from_a_store_too(memory, sound, tmp_path) -> None:
    for number, name in enumerate(
        [
            "hidden_states_of_nan",
            "frame_of_four_gigabytes_of_zeros",
            "header_of_60_megabytes",
            "index_of_a_million_lists",
        ]
    ):
        (tmp_path / str(number)).mkdir()
        upload(hostile.make_hostile(name, sound, tmp_path / str(number)), memory, f"/bucket/{number}")
        with pytest.raises(CacheCorruptError, match=f"memory://bucket/{number}"):
            hostile.read_all(f"memory://bucket/{number}")
        assert verify_cache(f"memory://bucket/{number}")


# ---- Only what is needed is fetched ----


class Counted(AbstractFileSystem):
    """A store of local files that, like that of the Hub, has no way of its own to fetch a range."""

    protocol = "counted"
    cachable = False
    sent: list[tuple[str, int, int]] = []  # noqa: RUF012
    listed: list[str] = []  # noqa: RUF012
    failing: Exception | None = None

    def ls(self, path: str, detail: bool = True, **settings: Any) -> list[Any]:
        if Counted.failing is not None:
            raise Counted.failing
        place = Path(self._strip_protocol(path))
        self.listed.append(str(place))
        if not place.exists():
            raise FileNotFoundError(place)
        found = sorted(place.iterdir()) if place.is_dir() else [place]
        entries = [
            {"name": str(p), "size": p.stat().st_size, "type": "directory" if p.is_dir() else "file"} for p in found
        ]
        return entries if detail else [entry["name"] for entry in entries]

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> Any:
        settings = {name: value for name, value in settings.items() if name in ("block_size", "cache_type")}
        return CountedFile(self, path, mode, **settings)


class CountedFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        if Counted.failing is not None:
            raise Counted.failing
        Counted.sent.append((Path(self.path).name, start, end - start))
        return Path(self.path).read_bytes()[start:end]


@pytest.fixture
def counted() -> Iterator[type[Counted]]:
    fsspec.register_implementation("counted", Counted, clobber=True)
    Counted.sent.clear()
    Counted.listed.clear()
    yield Counted
    Counted.failing = None


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    """Twenty chunks in a shard of some 230 KB, of states that do not compress."""
    plan = tiny_cache.make_plan(num_samples=60, chunk_size=3, shard_chunks=20, num_views=1)

    def noise(pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(pixel_values), 16, 64, generator=torch.Generator().manual_seed(1))

    return tiny_cache.build(tmp_path_factory.mktemp("larger"), plan, prefix=noise).directory


def test_a_chunk_fetches_its_own_range_and_the_head_once(counted, larger) -> None:
    url, shard = f"counted://{larger}", larger / shard_name(0, 0)
    dataset = CachedDataset.from_pretrained(url)
    index = (larger / INDEX_NAME).stat().st_size
    assert counted.sent == [(INDEX_NAME, 0, index)]
    # The size of the index, and one listing of each folder, however many files there are.
    assert len(counted.listed) <= 8
    counted.sent.clear()
    reader = dataset.reader
    reader.read_chunk(0, 3)
    offsets, record = reader._headers[0, 0].frame_offsets[3], reader.index.files[shard_name(0, 0)]
    own = int(offsets[-1] - offsets[0])
    assert counted.sent == [
        (shard.name, 0, record.header_bytes),
        (shard.name, record.header_bytes + int(offsets[0]), own),
    ]
    assert own < shard.stat().st_size / 15
    assert shard.stat().st_size > 200_000
    counted.sent.clear()
    first = reader.read_chunk(0, 3)
    assert [size for _, _, size in counted.sent] == [own]
    assert torch.equal(first.hidden_states, CacheReader(larger).read_chunk(0, 3).hidden_states)


def test_a_state_is_fetched_once(counted, sound) -> None:
    CacheReader(f"counted://{sound['transform']}")
    sizes = {name: (sound["transform"] / name).stat().st_size for name in (INDEX_NAME, "codec.safetensors")}
    assert counted.sent == [(name, 0, size) for name, size in sizes.items()]


def test_verify_of_a_counted_store_is_sound(counted, larger) -> None:
    assert verify_cache(f"counted://{larger}") == []


@pytest.mark.parametrize("error", [ConnectionError("reset"), RuntimeError("503"), PermissionError(13, "denied")])
def test_errors_of_a_store_name_the_address(counted, larger, error) -> None:
    url = f"counted://{larger}"
    dataset = CachedDataset.from_pretrained(url)
    counted.failing = error
    with pytest.raises(
        CacheCorruptError, match=f"{url}/view-00/shard-00000.safetensors cannot be read: .*Check"
    ) as caught:
        dataset[0]
    assert type(error).__name__ in str(caught.value)
    with pytest.raises(CacheCorruptError, match=url):
        CachedDataset.from_pretrained(url)
    assert url in verify_cache(url)[0]
    counted.failing = None
    assert dataset[0]["labels"].item() == 0


# ---- Workers ----


def test_readers_of_both_kinds_are_pickled_small(memory, sound) -> None:
    upload(sound["lossless"], memory)
    for place in (URL, sound["lossless"]):
        dataset = CachedDataset.from_pretrained(place)
        dataset[2]
        again = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(again[2]["hidden_states"], CachedDataset.from_pretrained(place)[2]["hidden_states"])
    assert isinstance(again.reader.storage, LocalStorage)


@pytest.mark.parametrize("remote", [True, False])
def test_workers_of_a_loader_read(memory, sound, remote) -> None:
    upload(sound["lossless"], memory)
    dataset = CachedDataset.from_pretrained(URL if remote else sound["lossless"])
    assert isinstance(dataset.reader.storage, RemoteStorage) == remote
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=collate_cached, multiprocessing_context="fork")
    rows = torch.cat([batch["labels"] for batch in loader])
    assert rows.tolist() == [row % 3 for row in range(8)]


def test_a_relative_path_and_a_path_object(sound, monkeypatch) -> None:
    monkeypatch.chdir(sound["lossless"].parent)
    assert_same(sound["lossless"].name, sound["lossless"])
    assert verify_cache(Path(sound["lossless"].name)) == []
