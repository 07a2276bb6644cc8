"""What was said of a cache, or of a repository, stays: cards, licences, metadata, privacy."""

from __future__ import annotations

import re

import pytest
from huggingface_hub import DatasetCard, HfApi
from support import tiny_cache
from support.hub_repository import REPO, assert_no_rows, make_folder, shards_of

from hf_freezecache import CachedDataset
from hf_freezecache.cache.index import load_index
from hf_freezecache.errors import (
    CacheCorruptError,
    CacheMismatchError,
    HubError,
    UnsupportedSetupError,
)
from hf_freezecache.hub import push as pushing
from hf_freezecache.hub.provenance import Provenance

#: Of the HTTP client, about how huggingface_hub uploads large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


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
