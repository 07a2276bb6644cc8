"""Caches pushed to and pulled from a server that speaks the Hub's protocol, and everything that can go wrong between."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import DatasetCard, HfApi, constants
from safetensors.torch import load, save
from support import tiny_cache
from support.commands import assert_one_line, call
from support.hub_client import connect, environment, needs_validation
from support.hub_server import HubServer
from support.stand_ins import MODEL, publish
from support.tiny import TinyTransform, make_trainer, tiny_vit, training_arguments
from transformers import AutoModelForImageClassification, Trainer

from hf_freezecache import (
    CachedDataset,
    FreezeCacheTrainer,
    SuffixModel,
)
from hf_freezecache.cache.index import load_index
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.errors import (
    CacheCorruptError,
    CacheMismatchError,
    CacheWriteError,
    HubError,
    UnsupportedSetupError,
)
from hf_freezecache.hub import (
    pull as pulling,
)
from hf_freezecache.hub import (
    push as pushing,
)
from hf_freezecache.hub.provenance import (
    Provenance,
    read_provenance,
)

REPO = "user/cache"

#: Of the HTTP client, about how huggingface_hub uploads large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def server(tmp_path, monkeypatch):
    with HubServer(tmp_path / "server") as server:
        connect(server, tmp_path / "home", monkeypatch)
        yield server


@pytest.fixture
def cache(tmp_path) -> Path:
    """24 samples in 2 views: 4 shards each, and as many parts of the index."""
    return tiny_cache.build(tmp_path / "caches", tiny_cache.make_plan(24)).directory


def states(dataset: CachedDataset, keys: list) -> torch.Tensor:
    return torch.stack([item["hidden_states"] for item in dataset.__getitems__(keys)])


def shards_of(server: HubServer) -> dict[str, int]:
    return {path: count for path, count in server.uploads.items() if path.endswith((".safetensors", ".parquet"))}


# ---- There and back ----


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


# ---- Interruptions ----


def assert_no_rows(server: HubServer, home: Path) -> None:
    """Another process, which has plain ``datasets``, loads nothing."""
    code = f"import datasets; print(datasets.load_dataset('{REPO}'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(server, home / "elsewhere"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    assert "No (supported) data files found" in done.stderr


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


# ---- Refusals ----


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


@pytest.mark.slow
def test_privacy(server, cache) -> None:
    pushing.push_cache(cache, "user/open", private=False)
    assert not server.repo("user/open").private
    with pytest.raises(HubError, match=r"public, and hidden states can reveal.*private=False"):
        pushing.push_cache(cache, "user/open")
    HfApi().create_repo("user/images", repo_type="dataset", private=False)
    with pytest.raises(HubError, match="public"):
        pushing.push_cache(cache, "user/images")
    assert set(server.files("user/images")) == {".gitattributes"}


@pytest.mark.slow
def test_another_cache_is_replaced_only_if_asked(server, cache, tmp_path) -> None:
    pushing.push_cache(cache, REPO)
    plan = tiny_cache.make_plan(10, num_views=1, data="other rows")
    other = tiny_cache.build(tmp_path / "caches", plan).directory
    old = server.repo(REPO).refs["main"]
    with pytest.raises(CacheMismatchError, match=r"holds another cache, which differs in: data\. .*--overwrite"):
        pushing.push_cache(other, REPO)
    assert server.repo(REPO).refs["main"] == old
    server.fail_after = server.num_uploads + 1
    with pytest.raises(HubError):
        pushing.push_cache(other, REPO, overwrite=True)
    with pytest.raises(CacheCorruptError, match="no finished cache"):  # never an index beside another's shards
        CachedDataset.from_pretrained(REPO)
    assert_no_rows(server, tmp_path)
    server.fail_after = None
    pushing.push_cache(other, REPO)
    assert set(server.files(REPO)) == {*load_index(other).files, "index.json", "README.md", ".gitattributes"}
    assert len(CachedDataset.from_pretrained(REPO)) == 10
    assert len(CachedDataset.from_pretrained(REPO, revision=old)) == 24


@pytest.mark.slow
def test_another_data_set_is_not_written_over(server, cache) -> None:
    card = b"---\nlicense: mit\n---\n# My pictures"
    server.publish(REPO, make_folder(cache.parent / "theirs", {"data/train.parquet": b"rows"}), "dataset")
    server.publish("user/told", make_folder(cache.parent / "told", {"README.md": card}), "dataset")
    for name, what in ((REPO, "holds data/train.parquet"), ("user/told", "has a card that is not one of a cache")):
        server.repo(name).private = True
        before = dict(server.files(name))
        with pytest.raises(CacheMismatchError, match=f"{name} is another data set: it {what}.*--overwrite"):
            pushing.push_cache(cache, name)
        assert server.files(name) == before
    pushing.push_cache(cache, "user/told", overwrite=True)
    assert len(CachedDataset.from_pretrained("user/told")) == 24


@pytest.mark.slow
def test_a_repository_made_by_hand_keeps_its_licence(server, cache) -> None:
    """As the Hub's own page makes one: the licence that was chosen there, and nothing else."""
    made = {"README.md": b"---\nlicense: cc-by-4.0\n---\n", ".gitattributes": b"*.bin filter=lfs diff=lfs -text"}
    server.publish(REPO, make_folder(cache.parent / "made", made), "dataset")
    server.repo(REPO).private = True
    pushing.push_cache(cache, REPO)
    assert DatasetCard(server.read(REPO, "README.md").decode()).data.license == "cc-by-4.0"
    assert server.read(REPO, ".gitattributes").startswith(made[".gitattributes"] + b"\n*.safetensors filter=lfs")
    assert all(blob.lfs for path, blob in server.files(REPO).items() if path in load_index(cache).files)
    assert pushing.push_cache(cache, REPO).uploaded == []


@pytest.mark.slow
@pytest.mark.parametrize("sent", [0, 5, 16])
def test_what_a_repository_said_outlives_an_interrupted_push(server, cache, monkeypatch, sent) -> None:
    """Nor need what was given to the first call be given again."""
    monkeypatch.setattr(pushing, "GROUP_FILES", 1)
    monkeypatch.setattr(pushing, "COMMIT_FILES", 16 if sent else 4)
    made = b"---\nlicense: mit\nextra_gated_prompt: Ask first.\ntags: [mine]\n---\n"
    server.publish(REPO, make_folder(cache.parent / "made", {"README.md": made}), "dataset")
    server.repo(REPO).private = True
    server.fail_after = sent
    if sent == 16:  # the last commit does not arrive
        real = HfApi.create_commit
        server.fail_after = None

        def cut(self, repo_id, operations, **settings):
            if any(operation.path_in_repo == "index.json" for operation in operations):
                raise KeyboardInterrupt
            return real(self, repo_id, operations, **settings)

        monkeypatch.setattr(HfApi, "create_commit", cut)
    given = Provenance(dataset_name="somebody/pictures", model_id="somebody/vit", model_revision="b" * 40)
    with pytest.raises((HubError, KeyboardInterrupt)):
        pushing.push_cache(cache, REPO, provenance=given)
    server.fail_after = None
    if sent == 16:
        monkeypatch.setattr(HfApi, "create_commit", real)
    pushing.push_cache(cache, REPO)
    card = server.read(REPO, "README.md").decode()
    data = DatasetCard(card).data
    assert (data.license, data.extra_gated_prompt, data.tags[-1]) == ("mit", "Ask first.", "mine")
    assert data.source_datasets == ["somebody/pictures"]
    assert f'from_pretrained("somebody/vit", revision="{"b" * 40}")' in card
    assert "| licence of the source | mit |" in card
    assert set(shards_of(server).values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("license: [mit, cc-by-4.0]", {"license": ["mit", "cc-by-4.0"]}),
        ("license: other\nlicense_name: ours", {"license": "other", "license_name": "ours"}),
        ("language: en\npretty_name: Mine", {"language": "en", "pretty_name": "Mine"}),
        ("tags: [hf-freezecache]\nlicense: [mit]\npretty_name: Mine", {"license": ["mit"], "pretty_name": "Mine"}),
        ("on: 1\nself: 2\nget: 3\nto_yaml: 4\nto_dict: 5\nignore_metadata_errors: 6\nx: y", {"x": "y"}),
        ("tags: abc\nconfigs: 3\ndataset_info: x\nx: [1, {y: z}]", {"x": [1, {"y": "z"}]}),
    ],
)
def test_metadata_that_are_not_ours_stay(server, cache, told, kept) -> None:
    made = make_folder(cache.parent / "made", {"README.md": f"---\n{told}\n---\n".encode()})
    server.publish(REPO, made, "dataset")
    server.repo(REPO).private = True
    pushing.push_cache(cache, REPO)
    pushing.push_cache(cache, REPO, provenance=Provenance(model_id="somebody/vit"))
    data = DatasetCard(server.read(REPO, "README.md").decode()).data.to_dict()
    assert {name: data.get(name) for name in kept} == kept
    assert b"licence of the source" not in server.read(REPO, "README.md")
    pushing.push_cache(cache, REPO, provenance=Provenance(license="cc0-1.0"))
    data = DatasetCard(server.read(REPO, "README.md").decode()).data.to_dict()
    assert data["license"] == "cc0-1.0"
    assert "license_name" not in data


def test_our_tag_alone_does_not_make_a_card_ours(server, cache) -> None:
    card = b"---\ntags: [hf-freezecache]\nlicense: mit\n---\n# My results\n"
    server.publish(REPO, make_folder(cache.parent / "made", {"README.md": card}), "dataset")
    server.publish("user/words", make_folder(cache.parent / "words", {"provenance.json": b'{"mine": 1}'}), "dataset")
    for name in (REPO, "user/words"):
        server.repo(name).private = True
        before = dict(server.files(name))
        with pytest.raises(CacheMismatchError, match="is another data set"):
            pushing.push_cache(cache, name)
        assert server.files(name) == before


@pytest.mark.slow
def test_a_licence_stays_that_of_whom_it_was_given_for(server, cache) -> None:
    """Neither the name of another one, nor what an earlier push said, stands beside or above what was given last."""

    def metadata() -> dict:
        return DatasetCard(server.read(REPO, "README.md").decode()).data.to_dict()

    made = b"---\nlicense: other\nlicense_name: ours\nlicense_link: http://x\n---\n"
    server.publish(REPO, make_folder(cache.parent / "made", {"README.md": made}), "dataset")
    server.repo(REPO).private = True
    pushing.push_cache(cache, REPO, provenance=Provenance(license="terms of the images"))
    assert metadata()["license"] == "other"
    assert not {"license_name", "license_link"} & metadata().keys()
    pushing.push_cache(cache, REPO, provenance=Provenance(dataset_name="a/b", license="mit"))
    for edited in ("license: cc-by-nc-4.0", "license: other\nlicense_name: ours", "license: [mit, cc0-1.0]"):
        card = re.sub("license: mit", edited, server.read(REPO, "README.md").decode())
        server.replace(REPO, "README.md", card.encode())
        pushing.push_cache(cache, REPO, provenance=Provenance(model_id="somebody/vit"))
        assert metadata()["license"] == {"[": ["mit", "cc0-1.0"], "o": "other"}.get(edited[9], "cc-by-nc-4.0")
        assert b"| licence of the source | mit" not in server.read(REPO, "README.md")
        pushing.push_cache(cache, REPO, provenance=Provenance(license="mit"))
        assert metadata()["license"] == "mit"
        assert "license_name" not in metadata()


def test_gitattributes_in_another_encoding_are_completed(server, cache) -> None:
    made = make_folder(cache.parent / "made", {".gitattributes": b"\xff x\n"})
    server.publish(REPO, made, "dataset")
    server.repo(REPO).private = True
    pushing.push_cache(cache, REPO)
    assert server.read(REPO, ".gitattributes").startswith(b"\xff x\n*.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [
        b"---\na: [b\n---\n",
        b"---\nx: " + b"[" * 3000 + b"\n---\n",
        b"---\n- a\n---\n",
        b"---\nx: !!python/object:os.system\n---\n",
        b"\xff",
    ],
)
def test_a_card_that_cannot_be_read_is_not_written_over(server, cache, broken) -> None:
    server.publish(REPO, make_folder(cache.parent / "made", {"README.md": broken}), "dataset")
    server.repo(REPO).private = True
    with pytest.raises(CacheMismatchError, match="a card that is not one of a cache"):
        pushing.push_cache(cache, REPO)
    assert server.read(REPO, "README.md") == broken
    pushing.push_cache(cache, REPO, overwrite=True)
    assert len(CachedDataset.from_pretrained(REPO)) == 24


@pytest.mark.slow
def test_what_was_given_once_stays_and_goes_on_with_the_cache(server, cache, tmp_path) -> None:
    pushing.push_cache(cache, REPO, provenance=Provenance(dataset_name="somebody/pictures", license="mit"))
    pushing.push_cache(cache, REPO, provenance=Provenance(model_id="somebody/vit"))
    card = server.read(REPO, "README.md").decode()
    for words in ("| source data set | somebody/pictures |", "license: mit", "| model | somebody/vit |"):
        assert words in card
    CachedDataset.from_pretrained(REPO).push_to_hub("user/copy")
    assert server.read("user/copy", "README.md").decode() == card.replace(REPO, "user/copy")
    pushing.push_cache(cache, REPO, provenance=Provenance(dataset_name="others"))
    assert "mit" not in server.read(REPO, "README.md").decode()


@pytest.mark.slow
def test_nothing_of_a_cache_that_is_replaced_is_said_of_the_next(server, cache, tmp_path) -> None:
    other = tiny_cache.build(tmp_path / "others", tiny_cache.make_plan(10, data="other rows")).directory
    given = Provenance(dataset_name="somebody/pictures", license="mit")
    server.fail_after = 0
    with pytest.raises(HubError):
        pushing.push_cache(cache, "user/begun", provenance=given)
    assert "provenance.json" in server.files("user/begun")
    server.fail_after = None
    pushing.push_cache(cache, REPO, provenance=given)
    for name in (REPO, "user/begun"):
        pushing.push_cache(other, name, overwrite=name == REPO)
        assert "provenance.json" not in server.files(name)
        card = server.read(name, "README.md").decode()
        assert "somebody/pictures" not in card
        assert "mit\n" not in card


@pytest.mark.slow
def test_a_licence_that_the_hub_refuses_is_refused_before_anything_is_sent(server, cache) -> None:
    with pytest.raises(UnsupportedSetupError, match=r"does not take the card.*\n.*license.*cc-by-4\.0"):
        pushing.push_cache(cache, REPO, provenance=Provenance(license="apache2"))
    assert server.num_uploads == 0
    pushing.push_cache(cache, REPO, provenance=Provenance(license="apache-2.0"))


@pytest.mark.slow
def test_a_shard_that_is_gone_is_sent_again_and_the_card_stays(server, cache) -> None:
    CachedDataset.from_pretrained(cache).push_to_hub(REPO, license="mit", dataset_name="somebody/pictures")
    card = server.read(REPO, "README.md")
    name = "view-01/shard-00002.safetensors"
    server.replace(REPO, name, None)
    report = pushing.push_cache(cache, REPO)
    assert report.uploaded == [name]
    assert server.read(REPO, "README.md") == card
    assert pushing.push_cache(cache, REPO, provenance=Provenance(license="cc-by-4.0")).commits == 1
    assert DatasetCard(server.read(REPO, "README.md").decode()).data.license == "cc-by-4.0"
    assert len(CachedDataset.from_pretrained(REPO)) == 24


def make_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


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


# ---- Parts, copies, places ----


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


# ---- Training from what was pulled ----


@pytest.mark.slow
def test_a_suffix_trained_from_a_pulled_cache_is_the_one_trained_beside_it(server, images, tmp_path) -> None:
    rows = images.select(range(40))
    trainer = make_trainer(
        tiny_vit(), rows.with_transform(TinyTransform(augment=True)), schedule="0:2", cache={"num_views": 2}
    )
    local = trainer.build_cache()
    report = trainer.push_cache_to_hub(REPO, dataset_name="user/pictures", license="cc-by-4.0")
    assert report.private
    card = server.read(REPO, "README.md").decode()
    assert "license: cc-by-4.0" in card
    assert "- user/pictures" in card
    again = make_trainer(
        tiny_vit(), rows.with_transform(TinyTransform(augment=True)), schedule="0:2", cache={"num_views": 2}
    )
    assert again.build_cache().reader.directory == local.reader.directory
    weights = []
    for cached in (local, CachedDataset.from_pretrained(REPO)):
        model = tiny_vit()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        suffix = SuffixModel.for_cache(model, cached)
        run = FreezeCacheTrainer(model=suffix, args=training_arguments(num_train_epochs=3), train_dataset=cached)
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert sum(losses[-4:]) < sum(losses[:4])
        after = model.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved
        assert not any(name in moved for name in suffix.split.prefix_parameters())
        model.save_pretrained("saved")
        assert torch.equal(
            type(model).from_pretrained("saved").state_dict()["classifier.weight"], after["classifier.weight"]
        )
        weights.append(after)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


PLAIN = """
import sys
import datasets, transformers
assert "hf_freezecache" not in sys.modules
rows = datasets.load_dataset("user/cache", split="train")
assert len(rows) == 20 and rows.features["labels"].names == ["a", "b", "c", "d"], rows
assert {"sample_index", "view", "shard", "chunk", "row", "labels"} == set(rows.column_names)
assert sorted(rows["sample_index"]) == list(range(20))
assert all(row["labels"] == row["sample_index"] % 4 and row["view"] == 0 for row in rows)
assert set(datasets.load_dataset("user/cache", "view-01", split="train")["view"]) == {1}
model = transformers.AutoModelForImageClassification.from_pretrained("user/model")
assert "hf_freezecache" not in sys.modules
"""

TRAIN = """
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments
from hf_freezecache import CachedDataset, SuffixModel

cached = CachedDataset.from_pretrained("user/cache")
model = AutoModelForImageClassification.from_pretrained("user/model")
args = TrainingArguments("out", use_cpu=True, num_train_epochs=1, report_to="none", disable_tqdm=True)
Trainer(model=SuffixModel.for_cache(model, cached), args=args, train_dataset=cached).train()
model.save_pretrained("trained")
AutoModelForImageClassification.from_pretrained("trained")
"""


@pytest.mark.slow
def test_the_card_names_the_model_of_the_hub_until_its_frozen_blocks_are_trained(
    server, images, tmp_path, monkeypatch
) -> None:
    publish(server, tmp_path / "published")

    def pushed(schedule: str, repo_id: str) -> str:
        model = AutoModelForImageClassification.from_pretrained(MODEL, num_labels=4, ignore_mismatched_sizes=True)
        rows = images.select(range(20)).with_transform(TinyTransform(augment=True))
        trainer = make_trainer(
            model, rows, schedule=schedule, num_train_epochs=2, cache={"cache_dir": repo_id.partition("/")[2]}
        )
        trainer.train()
        trainer.push_cache_to_hub(repo_id)
        return server.read(repo_id, "README.md").decode()

    card = pushed("0:2", "user/first")
    found = re.search(rf'from_pretrained\("{MODEL}", revision="([0-9a-f]{{40}})"\)', card)
    assert found, card
    base = AutoModelForImageClassification.from_pretrained(
        MODEL, revision=found[1], num_labels=4, ignore_mismatched_sizes=True
    )
    SuffixModel.for_cache(base, CachedDataset.from_pretrained("user/first"))
    assert MODEL not in pushed("0:0,1:2", "user/unfrozen")
    assert MODEL not in pushed("0:1,1:2", "user/deeper")


@pytest.mark.slow
def test_a_model_that_was_trained_before_is_not_taken_for_that_of_the_hub(server, images, tmp_path) -> None:
    """It keeps its name. So what was fetched is compared: of whichever commit that was, and drawing no random number."""
    publish(server, tmp_path / "published")
    weights = load(server.read(MODEL, "model.safetensors", "model"))
    headless = save({name: weight for name, weight in weights.items() if "classifier" not in name}, {"format": "pt"})
    server.replace(MODEL, "model.safetensors", headless, "model")  # its head is drawn on loading
    old = server.repo(MODEL, "model").refs["main"]
    server.replace(MODEL, "config.json", server.read(MODEL, "config.json", "model") + b"\n", "model")
    model = AutoModelForImageClassification.from_pretrained(
        MODEL, revision=old, num_labels=4, ignore_mismatched_sizes=True
    )
    rows = images.select(range(20)).with_transform(TinyTransform(augment=True))

    def card() -> str:
        trainer = make_trainer(model, rows, schedule="0:2", cache={"cache_dir": str(tmp_path / "caches")})
        (Path(trainer.build_cache().reader.directory) / "provenance.json").unlink()
        before = torch.get_rng_state()
        trainer.push_cache_to_hub(REPO, overwrite=True)  # looks again
        assert torch.equal(torch.get_rng_state(), before)
        return server.read(REPO, "README.md").decode()

    assert f'from_pretrained("{MODEL}", revision="{old}")' in card()
    Trainer(model=model, args=training_arguments(max_steps=1), train_dataset=rows).train()
    assert MODEL not in card()


@pytest.mark.slow
@pytest.mark.parametrize("writable", [True, False])
def test_the_trainer_tells_the_card_what_it_knows(server, images, writable) -> None:
    """Also where nothing can be written beside the cache; and what is given stands in its place."""
    rows = images.select(range(20)).with_transform(TinyTransform(augment=True))
    trainer = make_trainer(tiny_vit(), rows, schedule="0:2")
    cache = Path(trainer.build_cache().reader.directory)
    if not writable:
        (cache / "provenance.json").unlink()
        (cache / "provenance.json").mkdir()  # root may write into any folder
    trainer.push_cache_to_hub(REPO)
    names = {"0": "a", "1": "b", "2": "c", "3": "d"}
    for given in (names, {name: name.upper() for name in names}):
        if given is not names:
            trainer.push_cache_to_hub(REPO, label_names=list(given.values()), token=server.token)
        features = DatasetCard(server.read(REPO, "README.md").decode()).data.dataset_info["features"]
        labels = next(feature for feature in features if feature["name"] == "labels")
        assert labels["dtype"]["class_label"]["names"] == given


def test_no_cache_is_pushed_with_a_model_wherever_it_came_from(server, images, cache, tmp_path, caplog) -> None:
    rows = images.select(range(20)).with_transform(TinyTransform(augment=True))
    trainer = make_trainer(tiny_vit(), rows, schedule="0:2", num_train_epochs=1, hub_model_id="user/model")
    trainer.train()
    CachedDataset.from_pretrained(cache).save_pretrained("out/copy")
    with pytest.raises(UnsupportedSetupError, match=r"A cache lies in out/copy.*move it elsewhere"):
        trainer.push_to_hub()
    trainer._push_from_checkpoint("out/checkpoint-2")
    assert "Checkpoint not pushed. A cache lies in out/copy" in caplog.text
    assert server.uploads == {}


def test_a_suffix_is_not_pushed_as_if_it_were_a_model(server, cache) -> None:
    cached = CachedDataset.from_pretrained(cache)
    suffix = SuffixModel(tiny_vit(), 2)
    trainer = FreezeCacheTrainer(model=suffix, args=training_arguments(), train_dataset=cached)
    with pytest.raises(UnsupportedSetupError, match=r"suffix\.model\.push_to_hub"):
        trainer.push_to_hub()


@pytest.mark.slow
@needs_validation
def test_another_process_loads_index_and_model_without_us_and_trains_with_us(server, images, tmp_path) -> None:
    rows = images.select(range(20)).with_transform(TinyTransform(augment=True))
    trainer = make_trainer(tiny_vit(), rows, schedule="0:2", cache={"num_views": 2}, num_train_epochs=1)
    trainer.train()
    trainer.push_cache_to_hub(REPO)
    trainer.model.push_to_hub("user/model")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN + TRAIN],
        env=environment(server, tmp_path / "elsewhere"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ---- Command line ----


def test_push_and_pull_from_the_command_line(server, cache, tmp_path) -> None:
    status, out, err = call("push", cache, REPO)
    assert status == 0, err
    assert out.startswith(f"pushed: {server.url}/datasets/{REPO} (private), 16 files sent")
    assert server.repo(REPO).private
    status, out, _ = call("push", cache, REPO, "--json")
    assert (status, json.loads(out)["uploaded"], json.loads(out)["kept_files"]) == (0, [], 16)
    status, out, err = call("pull", REPO, tmp_path / "pulled")
    assert status == 0, err
    assert out.startswith(f"pulled: {tmp_path}/pulled, 17 files checked, ")
    assert call("verify", tmp_path / "pulled")[0] == 0
    status, out, _ = call("pull", REPO, tmp_path / "part", "--views", "0", "--shards", "1,2", "--json")
    assert status == 0
    assert json.loads(out)["files"] == 5
    assert json.loads(out)["revision"] == server.repo(REPO).refs["main"]
    status, out, _ = call("push", cache, "user/open", "--public")
    assert (status, server.repo("user/open").private) == (0, False)
    assert "(public)" in out


@pytest.mark.slow
def test_errors_on_the_command_line_are_one_line(server, cache, tmp_path) -> None:
    call("push", cache, REPO)
    server.alter(REPO, "view-00/shard-00000.safetensors", 7)
    for words, arguments in {
        "there is no data set": ("pull", "user/nothing", tmp_path / "x"),
        "has no revision 'v2'": ("pull", REPO, tmp_path / "x", "--revision", "v2"),
        "shard-00000.safetensors is altered": ("pull", REPO, tmp_path / "x"),
        "were asked for": ("pull", REPO, tmp_path / "x", "--views", "7"),
        "does not exist": ("push", tmp_path / "nowhere", REPO),
        "refused it": ("push", cache, "somebody/else"),
    }.items():
        status, out, err = call(*arguments)
        assert (status, out) == (1, ""), words
        assert_one_line(err)
        assert words in err
    assert call("pull", REPO, tmp_path / "x", "--views", "one")[0] == 2
    with pytest.raises(HubError):
        call("pull", "user/nothing", tmp_path / "x", "--debug")


def test_index_of_what_was_pushed_lists_labels(server, images) -> None:
    """In this process the labels of the parquet files are those of the images."""
    rows = images.select(range(20)).with_transform(TinyTransform(augment=False))
    cached = make_trainer(tiny_vit(), rows, schedule="0:1").build_cache()
    table = datasets.Dataset.from_parquet(str(Path(cached.reader.directory) / "index/view-00/part-00000.parquet"))
    assert [label == row % 4 for row, label in zip(table["sample_index"], table["labels"], strict=True)].count(
        False
    ) == 0
