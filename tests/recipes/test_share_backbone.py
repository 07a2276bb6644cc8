"""``recipes/share_backbone.py`` as a user runs it, against the server on the loopback: share, then train without images."""

from __future__ import annotations

import shutil

import pytest
from support.hub_client import connect
from support.hub_server import HubServer
from transformers import AutoModelForImageClassification


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning", "ignore:'pin_memory':UserWarning")
def test_heads_are_trained_where_there_are_no_images(workspace, run_recipe, monkeypatch) -> None:
    common = ("--model", str(workspace / "model"), "--repo_id", "user/tiny", "--epochs", "8", "--learning_rate", "1e-2")
    sharing = ("--data", "data", "--split_point", "2", "--views", "2", "--codec", "lossless", "--license", "mit")
    with HubServer(workspace / "server") as server:
        connect(server, workspace / "home", monkeypatch)
        told = run_recipe("share_backbone.py", "share", *common, *sharing)
        assert [line.split(",")[0] for line in told] == ["train: 30 images in 2 views", "test: 20 images in 1 views"]
        assert all(server.repo(f"user/tiny-{split}").private for split in ("train", "test"))
        assert b"license: mit" in server.read("user/tiny-train", "README.md")
        shutil.rmtree("data")
        shutil.rmtree("caches")
        connect(server, workspace / "elsewhere", monkeypatch)
        told = run_recipe("share_backbone.py", "train", *common, "--output_dir", "heads")
    assert told[0] == "pulled and checked: 30 and 20 images"
    reached = [float(line.split("accuracy ")[1].split()[0]) for line in told[1:]]
    assert len(reached) == 3
    assert max(reached) > 0.5
    classes = [AutoModelForImageClassification.from_pretrained(f"heads/head-{n}").config.num_labels for n in range(3)]
    assert classes == [4, 2, 2]
