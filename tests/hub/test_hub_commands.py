"""``push`` and ``pull`` of the command line, against a server that speaks the Hub's protocol."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from support.commands import assert_one_line, call
from support.hub_repository import REPO
from support.tiny import TinyTransform, make_trainer, tiny_vit

from hf_freezecache.errors import (
    HubError,
)

#: Of the HTTP client, about how huggingface_hub uploads large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


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
