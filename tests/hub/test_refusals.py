"""What is not pushed, and not read after a pull."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from support.hub_repository import REPO

from hf_freezecache import CachedDataset
from hf_freezecache.cache.index import load_index
from hf_freezecache.errors import (
    CacheCorruptError,
    HubError,
    UnsupportedSetupError,
)
from hf_freezecache.hub import pull as pulling
from hf_freezecache.hub import push as pushing

#: Of the HTTP client, about how huggingface_hub uploads large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.mark.by_default(1)
@pytest.mark.parametrize("bit", [0, 1000, -1])
def test_a_shard_altered_by_one_bit_is_refused_by_name(server, cache, tmp_path, bit) -> None:
    pushing.push_cache(cache, REPO)
    name = "view-01/shard-00002.safetensors"
    size = 8 * load_index(cache).files[name].bytes
    server.alter(REPO, name, bit % size)
    for _ in range(2):  # what was refused once is not taken from the local cache the next time
        with pytest.raises(CacheCorruptError, match=rf"{REPO} is refused: {name} is altered"):
            CachedDataset.from_pretrained(REPO)
    with pytest.raises(CacheCorruptError, match=name):
        pulling.pull_cache(REPO, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    server.alter(REPO, name, bit % size)
    assert len(CachedDataset.from_pretrained(REPO)) == 24
    pulling.pull_cache(REPO, tmp_path / "pulled")


@pytest.mark.slow
def test_a_file_altered_in_the_local_download_cache_is_refused(server, cache) -> None:
    pushing.push_cache(cache, REPO)
    folder = Path(CachedDataset.from_pretrained(REPO).reader.directory)
    path = (folder / "view-00/shard-00001.safetensors").resolve()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheCorruptError, match="view-00/shard-00001"):
        CachedDataset.from_pretrained(REPO)
    assert len(CachedDataset.from_pretrained(REPO)) == 24  # it was discarded, and fetched anew


@pytest.mark.by_default(1)
@pytest.mark.parametrize("name", ["view-00/shard-00000.safetensors", "index/view-01/part-00003.parquet"])
def test_a_commit_of_other_content_is_refused_before_anything_is_fetched(server, cache, name) -> None:
    pushing.push_cache(cache, REPO)
    old = server.repo(REPO).refs["main"]
    for content in (server.read(REPO, name)[:-1] + b"x", b"short", None):
        server.replace(REPO, name, content)
        with pytest.raises(CacheCorruptError, match=f"{name} is (altered|missing)"):
            CachedDataset.from_pretrained(REPO)
        if content is not None:
            assert not [path for path in server.downloads if path.startswith("view")]
        server.repo(REPO).refs["main"] = old
    server.replace(REPO, "index.json", server.read(REPO, "index.json").replace(b"2", b"3", 1))
    with pytest.raises(CacheCorruptError, match=r"index\.json is damaged"):
        CachedDataset.from_pretrained(REPO)
    assert len(CachedDataset.from_pretrained(REPO, revision=old)) == 24


def test_missing_repository_wrong_revision_wrong_token_no_server(server, cache, tmp_path, monkeypatch) -> None:
    for name in ("user/nothing", "nobody/cache"):
        with pytest.raises(HubError, match=f"there is no data set {name} at {server.url}"):
            CachedDataset.from_pretrained(name)
    pushing.push_cache(cache, REPO)
    with pytest.raises(HubError, match="has no revision 'v9'"):
        CachedDataset.from_pretrained(REPO, revision="v9")
    for action in (
        lambda: CachedDataset.from_pretrained(REPO, token="hf_bad"),
        lambda: pushing.push_cache(cache, "user/other", token="hf_bad"),
        lambda: pulling.pull_cache(REPO, tmp_path / "pulled", token="hf_bad"),
    ):
        with pytest.raises(HubError, match="did not accept the token"):
            action()
    with pytest.raises(HubError, match="may see"):  # it is private
        CachedDataset.from_pretrained(REPO, token=False)
    with pytest.raises(HubError, match="refused it: You don't have the rights"):
        pushing.push_cache(cache, "somebody/cache")
    with pytest.raises(UnsupportedSetupError, match="user/name"):
        pushing.push_cache(cache, "user/../cache")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"Fetching user/cache failed.*127\.0\.0\.1:9"):
        CachedDataset.from_pretrained(REPO)


def test_a_repository_without_a_cache_is_refused(server) -> None:
    HfApi().create_repo("user/images", repo_type="dataset")
    with pytest.raises(CacheCorruptError, match=r"holds no finished cache: it has no index\.json"):
        CachedDataset.from_pretrained("user/images")


def test_a_damaged_or_partial_cache_is_not_pushed(server, cache) -> None:
    path = cache / "view-00/shard-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CacheCorruptError, match=r"not pushed.*shard-00001.* altered"):
        pushing.push_cache(cache, REPO)
    path.unlink()
    with pytest.raises(CacheCorruptError, match="shard-00001"):
        CachedDataset.from_pretrained(cache, shards=[0]).push_to_hub(REPO)
    assert server.repos == {}
