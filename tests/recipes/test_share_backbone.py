"""``recipes/share_backbone.py`` as a user runs it, against the server on the loopback: share, then train without images."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from support.hub_client import connect
from support.hub_server import HubServer
from support.tiny import PROCESSOR, tiny_vit
from transformers import AutoModelForImageClassification

RECIPE = Path(__file__).parents[2] / "recipes" / "share_backbone.py"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning", "ignore:'pin_memory':UserWarning")
def test_heads_are_trained_where_there_are_no_images(images, tmp_path, monkeypatch, capsys) -> None:
    tiny_vit().save_pretrained("model")
    Path("model/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    images.select(range(30)).to_parquet("data/train.parquet")
    images.select(range(30, 50)).to_parquet("data/test.parquet")

    def run(*arguments: str) -> list[str]:
        common = [
            "--model",
            str(tmp_path / "model"),
            "--repo_id",
            "user/tiny",
            "--epochs",
            "8",
            "--learning_rate",
            "1e-2",
        ]
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments, *common])
        capsys.readouterr()
        runpy.run_path(str(RECIPE), run_name="__main__")
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]

    with HubServer(tmp_path / "server") as server:
        connect(server, tmp_path / "home", monkeypatch)
        told = run(
            "share", "--data", "data", "--split_point", "2", "--views", "2", "--codec", "lossless", "--license", "mit"
        )
        assert [line.split(" built")[0].split(",")[0] for line in told] == [
            "train: 30 images in 2 views",
            "test: 20 images in 1 views",
        ]
        assert all(server.repo(f"user/tiny-{split}").private for split in ("train", "test"))
        assert b"license: mit" in server.read("user/tiny-train", "README.md")
        shutil.rmtree("data")
        shutil.rmtree("caches")
        connect(server, tmp_path / "elsewhere", monkeypatch)
        told = run("train", "--output_dir", "heads")
    assert told[0].startswith("pulled and checked")
    reached = [float(line.split("accuracy ")[1].split()[0]) for line in told[1:]]
    assert len(reached) == 3
    assert max(reached) > 0.5
    classes = [AutoModelForImageClassification.from_pretrained(f"heads/head-{n}").config.num_labels for n in range(3)]
    assert classes == [4, 2, 2]
