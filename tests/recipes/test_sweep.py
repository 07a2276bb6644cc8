"""``recipes/sweep.py`` as a user runs it, and ``recipes/benchmarks/sweeping.py`` over it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from support.tiny import PROCESSOR, tiny_vit
from transformers import AutoModelForImageClassification

RECIPES = Path(__file__).parents[2] / "recipes"
OPTIONS = [
    "--model",
    "model",
    "--data",
    "data",
    "--split_point",
    "2",
    "--epochs",
    "2",
    "--learning_rates",
    "1e-2",
    "1e-5",
]


@pytest.fixture
def prepared(images, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_vit().save_pretrained("model")
    Path("model/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    images.select(range(30)).to_parquet("data/train.parquet")
    images.select(range(30, 50)).to_parquet("data/test.parquet")


def run(script: Path, monkeypatch, capsys, *options: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", [str(script), *OPTIONS, *options])
    monkeypatch.syspath_prepend(str(script.parent))
    capsys.readouterr()
    runpy.run_path(str(script), run_name="__main__")
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]


@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
def test_all_runs_share_one_cache_and_the_best_is_kept(prepared, monkeypatch, capsys) -> None:
    told = run(RECIPES / "sweep.py", monkeypatch, capsys, "--seeds", "0", "1", "--output_dir", "out")
    assert len(told) == 5
    assert len(list(Path("caches").glob("k02-*"))) == 2  # of the training images, and of the test images
    reached = {line.split(":")[0]: line.split("accuracy ")[1].split(",")[0] for line in told[:4]}
    assert told[4].startswith("best: learning rate")
    assert told[4].split("accuracy ")[1].split(",")[0] == max(reached.values(), key=lambda one: float(one[:-1]))
    assert AutoModelForImageClassification.from_pretrained("out/best").config.num_labels == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_sweep_is_compared_with_as_many_plain_runs(prepared, monkeypatch, capsys) -> None:
    pytest.importorskip("peft")
    options = ("--seeds", "0", "--plain_runs", "1", "--plain_rates", "1e-3", "1e-2", "--json", "record.json")
    told = run(RECIPES / "benchmarks" / "sweeping.py", monkeypatch, capsys, *options)
    results = json.loads(Path("record.json").read_text())["results"]
    assert len(results["runs"]["cached"]) == 2
    for arm in ("full", "lora"):
        (one,) = results["runs"][arm]
        assert results[arm]["sweep_over_as_many_runs"] == pytest.approx(
            results["sweep_seconds"] / (2 * one["seconds"]), rel=0.05
        )
    assert any("2 runs over one cache" in line for line in told)
