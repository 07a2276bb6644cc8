"""Pushes and pulls that end in the middle, and go on."""

from __future__ import annotations

import multiprocessing
import time

import pytest
from support.hub_repository import REPO, assert_no_rows, shards_of

from hf_freezecache import CachedDataset
from hf_freezecache.cache.index import load_index
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.errors import (
    CacheCorruptError,
    HubError,
)
from hf_freezecache.hub import pull as pulling
from hf_freezecache.hub import push as pushing

#: Of the HTTP client, about how huggingface_hub uploads large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.mark.slow
def test_an_interrupted_push_is_no_cache_and_goes_on(server, cache, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pushing, "COMMIT_FILES", 4)
    monkeypatch.setattr(pushing, "GROUP_FILES", 1)
    server.fail_after = 7
    with pytest.raises(HubError, match=r"storage limit.*goes on from there"):
        pushing.push_cache(cache, REPO)
    assert server.num_uploads == 7
    with pytest.raises(CacheCorruptError, match="holds no finished cache"):
        CachedDataset.from_pretrained(REPO)
    assert b"# Unfinished" in server.read(REPO, "README.md")
    assert [path for path in server.files(REPO) if path.endswith(".parquet")]
    assert_no_rows(server, tmp_path)  # least of all those of several views in one table
    server.fail_after = None
    report = pushing.push_cache(cache, REPO)
    assert list(server.repo(REPO).titles.values()).count("Begin a cache") == 1
    assert b"# Unfinished" not in server.read(REPO, "README.md")
    assert report.kept_files == 4  # three more were sent, not committed
    assert shards_of(server) == dict.fromkeys(load_index(cache).files, 1)
    assert len(CachedDataset.from_pretrained(REPO)) == 24


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_push_goes_on(server, cache, monkeypatch) -> None:
    """A process is killed while the server holds its sixth upload."""
    monkeypatch.setattr(pushing, "COMMIT_FILES", 2)
    monkeypatch.setattr(pushing, "GROUP_FILES", 2)
    server.hang_after = 5
    process = multiprocessing.get_context("fork").Process(target=pushing.push_cache, args=(cache, REPO))
    process.start()
    deadline = time.monotonic() + 60
    while server.num_uploads < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert server.num_uploads == 5
    assert "index.json" not in server.files(REPO)
    server.hang_after = None
    server.release.set()
    report = pushing.push_cache(cache, REPO)
    assert report.kept_files == 4
    again = [path for path, count in shards_of(server).items() if count > 1]
    assert len(again) <= 1, again  # the one that hung may have arrived after all
    assert set(shards_of(server)) == set(load_index(cache).files)


def test_an_interrupted_pull_fetches_the_rest(server, cache, tmp_path, monkeypatch) -> None:
    pushing.push_cache(cache, REPO)
    real = pulling.snapshot_download

    def interrupted(*args, allow_patterns, **kwargs):
        real(*args, allow_patterns=allow_patterns[:9], **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(pulling, "snapshot_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pulling.pull_cache(REPO, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    monkeypatch.setattr(pulling, "snapshot_download", real)
    pulling.pull_cache(REPO, tmp_path / "pulled")
    assert {server.downloads[name] for name in load_index(cache).files} == {1}
    assert verify_cache(tmp_path / "pulled") == []
