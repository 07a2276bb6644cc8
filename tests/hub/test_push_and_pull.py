"""Caches pushed to and pulled from a server that speaks the Hub's protocol."""

from __future__ import annotations

import pytest
import torch
from support import tiny_cache
from support.hub_repository import REPO, shards_of, states

from hf_freezecache import CachedDataset
from hf_freezecache.cache.index import load_index
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.errors import (
    CacheCorruptError,
    UnsupportedSetupError,
)
from hf_freezecache.hub import pull as pulling
from hf_freezecache.hub import push as pushing

#: Of the HTTP client, about how huggingface_hub uploads large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_a_pulled_cache_is_the_pushed_one(server, cache, tmp_path) -> None:
    pushed = CachedDataset.from_pretrained(cache)
    report = pushed.push_to_hub(REPO)
    assert server.repo(REPO).private
    assert report.url == f"{server.url}/datasets/{REPO}"
    assert report.revision == server.repo(REPO).refs["main"]
    assert (len(report.uploaded), report.kept_files) == (16, 0)
    assert set(server.files(REPO)) == {*load_index(cache).files, "index.json", "README.md", ".gitattributes"}
    assert all(blob.lfs for path, blob in server.files(REPO).items() if path in load_index(cache).files)
    fetched = CachedDataset.from_pretrained(REPO)
    keys = [(i, v) for i in range(24) for v in range(2)]
    assert torch.equal(states(fetched, keys), states(pushed, keys))
    pulling.pull_cache(REPO, tmp_path / "pulled")
    assert verify_cache(tmp_path / "pulled") == []
    assert (tmp_path / "pulled/index.json").read_bytes() == (cache / "index.json").read_bytes()
    assert not list(tmp_path.glob(".pulled*"))


@pytest.mark.slow
def test_a_name_alone_is_in_the_namespace_of_the_token(server, cache, tmp_path) -> None:
    """Also where the Hub has a data set of that name, of old, without an owner: only ``user/pictures`` is asked for."""
    report = pushing.push_cache(cache, "pictures")
    assert report.repo_id == "user/pictures"
    assert not [path for _, path in server.requests if path.startswith("/api/datasets/pictures")]
    assert len(CachedDataset.from_pretrained("user/pictures")) == 24


@pytest.mark.slow
def test_the_index_is_committed_last_and_in_batches(server, cache, monkeypatch) -> None:
    monkeypatch.setattr(pushing, "COMMIT_FILES", 5)
    monkeypatch.setattr(pushing, "GROUP_FILES", 2)
    report = pushing.push_cache(cache, REPO)
    history = list(server.repo(REPO).commits.values())
    assert ["index.json" in files for files in history] == [False] * (len(history) - 1) + [True]
    assert [len(files) - 1 for files in history] == [0, 1, 6, 11, 16, 17, 18]
    assert report.commits == 6


@pytest.mark.slow
def test_pushing_again_sends_nothing_and_leaves_an_edited_card(server, cache) -> None:
    pushing.push_cache(cache, REPO)
    server.replace(REPO, "README.md", b"---\nlicense: mit\n---\nedited by hand")
    before = len(server.repo(REPO).commits)
    report = pushing.push_cache(cache, REPO)
    assert (report.uploaded, report.kept_files, report.commits) == ([], 16, 0)
    assert set(shards_of(server).values()) == {1}
    assert len(server.repo(REPO).commits) == before
    assert server.read(REPO, "README.md").endswith(b"edited by hand")


@pytest.mark.slow
def test_large_files_go_in_parts(server, cache) -> None:
    server.multipart = 1000
    pushing.push_cache(cache, REPO)
    assert torch.equal(
        CachedDataset.from_pretrained(REPO)[3]["hidden_states"],
        CachedDataset.from_pretrained(cache)[3]["hidden_states"],
    )


@pytest.mark.slow
def test_many_files_are_listed_over_pages(server, tmp_path) -> None:
    cache = tiny_cache.build(tmp_path / "caches", tiny_cache.make_plan(25, 1, 1, 1)).directory
    pushing.push_cache(cache, REPO)
    assert pushing.push_cache(cache, REPO).uploaded == []
    assert len([path for _, path in server.requests if "cursor=" in path]) >= 2
    assert len(CachedDataset.from_pretrained(REPO)) == 25


def test_limits_of_the_hub(server, cache, monkeypatch) -> None:
    for name, value in (("MAX_FILE_BYTES", 100), ("MAX_FOLDER_FILES", 4), ("MAX_FILES", 16)):
        with monkeypatch.context() as patch:
            patch.setattr(pushing, name, value)
            with pytest.raises(UnsupportedSetupError, match="shard_chunks"):
                pushing.push_cache(cache, REPO)
    assert server.repos == {}


@pytest.mark.slow
def test_branches(server, cache) -> None:
    pushing.push_cache(cache, REPO, revision="draft")
    with pytest.raises(CacheCorruptError, match="no finished cache"):
        CachedDataset.from_pretrained(REPO)
    assert len(CachedDataset.from_pretrained(REPO, revision="draft")) == 24
