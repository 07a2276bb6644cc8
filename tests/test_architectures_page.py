"""``.ci/architectures.py``, which writes ``docs/architectures.md``."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "architectures.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architectures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["architectures"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["architectures"]


@pytest.mark.slow
def test_rows_say_what_a_cached_run_does(tmp_path) -> None:
    page = tmp_path / "page.md"
    command = [sys.executable, str(SCRIPT), str(page), "^(ViTFor|ViTMAEModel|ResNetFor|TimmWrapper)"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    text = page.read_text()
    assert f"transformers {transformers.__version__} and torch {torch.__version__}" in text
    sections = re.findall(r"^## (\w+).*?: (\d+)$", text, flags=re.MULTILINE)
    assert sections == [("Exact", "1"), ("Refused", "2"), ("Not", "1")]
    assert "| `ViTForImageClassification` | `vit.layers`, 4 | exact for every k |" in text
    assert "| `ResNetForImageClassification` |  | refused: no blocks with attention |" in text
    assert re.search(r"\| `ViTMAEModel` \| `\S+`, 4 \| refused: .*random numbers are drawn before the split", text)
    assert "| `TimmWrapperForImageClassification` |  | needs the package timm |" in text


@pytest.mark.parametrize("fault", ["losses", "parameters", "RuntimeError", "no cache was written", "refused after"])
def test_a_class_that_differs_without_a_refusal_is_wrong(script, monkeypatch, tmp_path, fault) -> None:
    def train(model, rows, mode, split_point, folder):
        wrong = mode == "always" and split_point == 2
        if wrong and fault == "RuntimeError":
            raise RuntimeError("no such tensor")
        if mode == "always" and not (wrong and fault == "no cache was written"):
            (folder / "caches").mkdir(parents=True)
            (folder / "caches" / "index.json").touch()
        if wrong and fault == "refused after":
            (folder / "caches" / "shard-00000.safetensors").touch()
            raise script.FreezeCacheError("not this one")
        trained = {name: value + 1 for name, value in model.state_dict().items()}
        if wrong and fault == "parameters":
            trained["classifier.bias"] += 1
        return script.Result([1.5 if wrong and fault == "losses" else 1.0], trained)

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "classes", lambda: [transformers.ViTForImageClassification])
    page = tmp_path / "page.md"
    assert script.main(page, "") == 1
    assert "## Wrong: 1" in page.read_text()
    assert re.search(rf"WRONG: 2 frozen blocks\W.*{fault}", page.read_text())


def test_a_class_may_be_exact_up_to_some_number_of_blocks(script, monkeypatch, tmp_path) -> None:
    def train(model, rows, mode, split_point, folder):
        if mode == "always" and split_point > 2:
            message = f"X cannot be trained from a cache behind {split_point} frozen blocks: states leave early. Freeze others."
            raise script.FreezeCacheError(message)
        (folder / "caches").mkdir(parents=True)
        (folder / "caches" / "index.json").touch()
        return script.Result([1.0], {name: value + 1 for name, value in model.state_dict().items()})

    monkeypatch.setattr(script, "train", train)
    row = script.try_class(transformers.ViTForImageClassification, tmp_path)
    assert (row.kind, row.text) == ("partly", "exact up to 2 of 4; k = 3 to 4 refused: states leave early")


@pytest.mark.slow
def test_the_committed_page_has_every_class(script) -> None:
    text = (ROOT / "docs" / "architectures.md").read_text()
    if f"transformers {transformers.__version__} " not in text:
        pytest.skip("the page was made with another version of transformers")
    names = re.findall(r"^\| `(\w+)`", text, flags=re.MULTILINE)
    assert sorted(names) == sorted(cls.__name__ for cls in script.classes())
    assert "WRONG" not in text
