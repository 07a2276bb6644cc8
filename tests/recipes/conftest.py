"""What the recipes find: a folder with a tiny model and a tiny data set."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny import PROCESSOR, tiny_vit

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def workspace(images, tmp_path, monkeypatch) -> Path:
    """Go into a folder that has ``model`` and ``data``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    tiny_vit().save_pretrained("model")
    Path("model/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    images.select(range(30)).to_parquet("data/train.parquet")
    images.select(range(30, 50)).to_parquet("data/test.parquet")
    return tmp_path


@pytest.fixture
def run_recipe(monkeypatch, capsys) -> Callable[..., list[str]]:
    """Run a recipe in this process, by its path in ``recipes/``; return the lines that it prints, without Trainer's logs."""

    def run(name: str, *arguments: str) -> list[str]:
        script = RECIPES / name
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.syspath_prepend(str(script.parent))
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]

    return run
