"""Parts of a cache, folders that it is pulled into, and copies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from support import tiny_cache
from support.hub_repository import REPO, states

from hf_freezecache import CachedDataset
from hf_freezecache.cache.index import load_index
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.errors import (
    CacheCorruptError,
    CacheWriteError,
    HubError,
    UnsupportedSetupError,
)
from hf_freezecache.hub import pull as pulling
from hf_freezecache.hub import push as pushing
from hf_freezecache.hub.provenance import Provenance, read_provenance

#: Of the HTTP client, about how huggingface_hub uploads large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.mark.slow
def test_parts_of_a_cache(server, cache, tmp_path) -> None:
    pushing.push_cache(cache, REPO)
    whole = CachedDataset.from_pretrained(cache)
    part = CachedDataset.from_pretrained(REPO, views=[1], shards=[0, 2])
    assert sorted(name for name in server.downloads if name.startswith("view")) == [
        "view-01/shard-00000.safetensors",
        "view-01/shard-00002.safetensors",
    ]
    rows = part.sample_indices
    assert len(set(rows.tolist())) == 12
    keys = [(int(row), 1) for row in rows]
    assert torch.equal(states(part, keys), states(whole, keys))
    other = next(row for row in range(24) if row not in rows)
    with pytest.raises(IndexError, match=r"View 1, shard \d of .* was left out.*views \[1\], shards \[0, 2\]"):
        part[other, 1]
    with pytest.raises(IndexError, match="View 0"):
        part[int(rows[0])]
    seen = list(part.sampler(seed=0, window=2))
    assert sorted(seen) == sorted(keys)
    assert sorted(row for row, _ in whole.sampler(seed=0)) == list(range(24))
    with pytest.raises(IndexError, match=r"views \[2\] were asked for; the cache has views 0 to 1"):
        CachedDataset.from_pretrained(REPO, views=[2])

    pulling.pull_cache(REPO, tmp_path / "part", views=[0])
    with pytest.raises(CacheCorruptError, match=r"view-01.* is missing.*only some views or shards were fetched"):
        CachedDataset.from_pretrained(tmp_path / "part")
    assert torch.equal(
        CachedDataset.from_pretrained(tmp_path / "part", views=[0])[7]["hidden_states"], whole[7]["hidden_states"]
    )


@pytest.mark.slow
def test_offline_what_was_fetched_is_used(server, cache, monkeypatch) -> None:
    pushing.push_cache(cache, REPO)
    CachedDataset.from_pretrained(REPO, views=[0])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(CachedDataset.from_pretrained(REPO, views=[0])) == 24
    with pytest.raises(CacheCorruptError, match="view-01"):
        CachedDataset.from_pretrained(REPO)
    with pytest.raises(HubError, match="not in the local cache"):
        CachedDataset.from_pretrained("user/other")


@pytest.mark.slow
def test_a_folder_wins_over_a_repository(server, cache, monkeypatch) -> None:
    pushing.push_cache(cache, REPO)
    asked = len(server.requests)
    (Path("user")).mkdir()
    shutil.copytree(cache, REPO)
    assert CachedDataset.from_pretrained(REPO).reader.directory == Path(REPO)
    assert len(server.requests) == asked
    with pytest.raises(UnsupportedSetupError, match="local"):
        CachedDataset.from_pretrained(REPO, revision="main")
    with pytest.raises(CacheCorruptError, match="no finished cache"):
        CachedDataset.from_pretrained("nowhere/at/all")
    assert len(server.requests) == asked


@pytest.mark.slow
def test_a_pull_overwrites_nothing(server, cache, tmp_path) -> None:
    pushing.push_cache(cache, REPO)
    target = tmp_path / "pulled"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CacheWriteError, match="not empty"):
        pulling.pull_cache(REPO, target)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]
    (target / "notes.txt").unlink()
    pulling.pull_cache(REPO, target)
    fetched = dict(server.downloads)
    assert pulling.pull_cache(REPO, target).files == 17  # checks what is there
    assert {name: count for name, count in server.downloads.items() if name != "index.json"} == {
        name: count for name, count in fetched.items() if name != "index.json"
    }


@pytest.mark.slow
def test_a_pull_mends_what_is_there(server, cache, tmp_path) -> None:
    """A damaged or missing file is fetched again, and what was left out when a part was pulled; nothing else is."""
    pushing.push_cache(cache, REPO)
    target = tmp_path / "pulled"
    assert pulling.pull_cache(REPO, target, views=[0]).files == 9
    damaged, lost = "view-00/shard-00001.safetensors", "index/view-00/part-00003.parquet"
    for whole in (False, True):
        content = bytearray((cache / damaged).read_bytes())
        content[-1] ^= 1
        (target / damaged).write_bytes(content)
        (target / lost).unlink()
        server.alter(REPO, damaged, 9)
        with pytest.raises(CacheCorruptError, match=damaged):
            pulling.pull_cache(REPO, target, views=[0])
        assert (target / damaged).read_bytes() == bytes(content)  # no worse than before
        server.alter(REPO, damaged, 9)
        server.downloads.clear()
        report = pulling.pull_cache(REPO, target, views=None if whole else [0])
        sent = {name for name in server.downloads if name != "index.json"}
        more = {name for name in load_index(cache).files if whole and "view-01" in name}
        assert sent == {damaged, *more}  # the lost one came with the pull that was refused
        assert report.kept_files == report.files - len(sent) - 1
    assert verify_cache(target) == []


@pytest.mark.slow
def test_a_pull_into_the_folder_where_one_stands(server, cache, tmp_path, monkeypatch) -> None:
    pushing.push_cache(cache, REPO)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    name = "view-01/shard-00002.safetensors"
    server.alter(REPO, name, 9)
    with pytest.raises(CacheCorruptError, match=name):  # an interrupted pull into it, which goes on
        pulling.pull_cache(REPO, ".")
    assert not list(tmp_path.glob(".here*"))  # where one stands may be a disk of its own
    server.alter(REPO, name, 9)
    fetched = dict(server.downloads)
    pulling.pull_cache(REPO, ".")
    assert [path for path, count in server.downloads.items() if count > fetched[path]] == [name]
    assert verify_cache(".") == []
    assert len(CachedDataset.from_pretrained(Path())) == 24
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    CachedDataset.from_pretrained(tmp_path / "here").save_pretrained(".")
    assert verify_cache(".") == []


@pytest.mark.slow
def test_a_pull_keeps_words_and_takes_none_of_another_cache(server, cache, tmp_path, monkeypatch) -> None:
    pushing.push_cache(cache, REPO, provenance=Provenance(license="mit"))
    other = tiny_cache.build(tmp_path / "others", tiny_cache.make_plan(10, data="other rows")).directory
    pushing.push_cache(other, "user/other")
    name = "view-01/shard-00002.safetensors"
    server.alter(REPO, name, 9)
    for target in (tmp_path / "new", tmp_path / "empty"):
        if target.name == "empty":
            target.mkdir()
        with pytest.raises(CacheCorruptError, match=name):
            pulling.pull_cache(REPO, target)
        pulling.pull_cache("user/other", target)
        assert read_provenance(target) == Provenance()
        assert verify_cache(target) == []
    server.alter(REPO, name, 9)
    # What is known here stays; where nothing is, it is taken.
    copy = CachedDataset.from_pretrained(cache).save_pretrained(tmp_path / "copy")
    (copy / name).unlink()
    pulling.pull_cache(REPO, copy)
    assert read_provenance(copy) == Provenance(license="mit")
    (copy / "provenance.json").unlink()
    assert pulling.pull_cache(REPO, copy).kept_files == 17
    assert read_provenance(copy) == Provenance(license="mit")
    (copy / "provenance.json").write_text('{"license": "mine"}')
    (copy / name).unlink()
    pulling.pull_cache(REPO, copy)
    assert read_provenance(copy) == Provenance(license="mine")
    # Where nothing can be written, a sound cache is one without them.
    (copy / "provenance.json").unlink()
    (copy / ".freezecache-pull").write_text("root may write into any folder")
    assert pulling.pull_cache(REPO, copy).kept_files == 17
    assert read_provenance(copy) == Provenance()
    # A folder of another name is somebody's own.
    (tmp_path / "own" / ".pull").mkdir(parents=True)
    (tmp_path / "own" / ".pull" / "mine").write_text("mine")
    with pytest.raises(CacheWriteError, match="not empty"):
        pulling.pull_cache(REPO, tmp_path / "own")
    # A folder in which a pull was begun is no place for it where somebody put words of his own.
    (tmp_path / "theirs" / ".freezecache-pull").mkdir(parents=True)
    (tmp_path / "theirs" / "provenance.json").write_text("mine")
    with pytest.raises(CacheWriteError, match="not empty"):
        pulling.pull_cache(REPO, tmp_path / "theirs")
    assert (tmp_path / "theirs" / "provenance.json").read_text() == "mine"


@pytest.mark.slow
def test_a_pull_through_links_and_back(server, cache, tmp_path, monkeypatch) -> None:
    pushing.push_cache(cache, REPO)
    monkeypatch.chdir(tmp_path)
    Path("index.json").write_text("mine")
    with pytest.raises(CacheWriteError, match="not empty"):
        pulling.pull_cache(REPO, "new/..")
    assert Path("index.json").read_text() == "mine"
    Path("link").symlink_to("far/away")
    assert pulling.pull_cache(REPO, "link").directory == Path("link")
    assert verify_cache("far/away") == []
    assert not list(tmp_path.rglob(".*pull*"))


@pytest.mark.slow
def test_words_that_are_too_long_are_left_where_they_are(server, cache, tmp_path, monkeypatch) -> None:
    pushing.push_cache(cache, REPO, provenance=Provenance(license="mit"))
    monkeypatch.setattr(pulling, "MAX_BYTES", 10)
    pulling.pull_cache(REPO, tmp_path / "pulled")
    CachedDataset.from_pretrained(REPO)
    assert "provenance.json" not in server.downloads


def test_save_pretrained_copies_checked_files_or_nothing(cache, tmp_path) -> None:
    CachedDataset.from_pretrained(cache).save_pretrained(tmp_path / "new" / "copy")
    assert verify_cache(tmp_path / "new/copy") == []
    with pytest.raises(CacheWriteError, match="not empty"):
        CachedDataset.from_pretrained(cache).save_pretrained(tmp_path / "new" / "copy")
    dataset = CachedDataset.from_pretrained(cache)
    path = cache / "view-01/shard-00003.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CacheCorruptError, match=r"shard-00003.* cannot be copied"):
        dataset.save_pretrained(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir() if "other" in path.name) == []
    part = CachedDataset.from_pretrained(cache, views=[0])
    part.save_pretrained(tmp_path / "part")
    assert len(CachedDataset.from_pretrained(tmp_path / "part", views=[0])) == 24
