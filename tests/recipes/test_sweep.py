"""``recipes/sweep.py`` as a user runs it, and ``recipes/benchmarks/sweeping.py`` over it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification

OPTIONS = ("--model", "model", "--data", "data", "--epochs", "2")
RATES = ("--learning_rates", "1e-2", "1e-5")


@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
def test_all_runs_share_one_cache_and_the_best_is_kept(workspace, run_recipe) -> None:
    told = run_recipe("sweep.py", *OPTIONS, *RATES, *("--schedules", "0:2", "--seeds", "0", "1", "--output_dir", "out"))
    assert len(told) == 5
    assert len(list(Path("caches").glob("k02-*"))) == 2  # of the training images, and of the test images
    reached = {line.split(":")[0]: line.split("accuracy ")[1].split(",")[0] for line in told[:4]}
    assert told[4].startswith("best: schedule 0:2, learning rate")
    assert told[4].split("accuracy ")[1].split(",")[0] == max(reached.values(), key=lambda one: float(one[:-1]))
    assert AutoModelForImageClassification.from_pretrained("out/best").config.num_labels == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
def test_schedules_share_the_caches_of_their_first_stages(workspace, run_recipe) -> None:
    def built(*schedules: str) -> list[int]:
        options = ("--learning_rates", "1e-2", "--seeds", "0", "--schedules", *schedules)
        return [int(line.split()[-3]) for line in run_recipe("sweep.py", *OPTIONS, *options) if "built" in line]

    first, second, third = built("0:1", "0:1,1:3", "0:2")
    assert first > 0
    assert second == first  # those of 3 blocks alone
    assert third > 0
    assert built("0:1", "0:1,1:3") == [0, 0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_sweep_is_compared_with_as_many_plain_runs(workspace, run_recipe) -> None:
    pytest.importorskip("peft")
    options = ("--plain_runs", "1", "--plain_rates", "1e-3", "1e-2", "--json", "record.json", "--schedules", "0:2")
    told = run_recipe("benchmarks/sweeping.py", *OPTIONS, *RATES, "--seeds", "0", *options)
    record = json.loads(Path("record.json").read_text())
    results = record["results"]
    assert record["config"]["split_point"] == 2
    assert len(results["runs"]["cached"]) == 2
    for arm in ("full", "lora"):
        (one,) = results["runs"][arm]
        assert results[arm]["sweep_over_as_many_runs"] == pytest.approx(
            results["sweep_seconds"] / (2 * one["seconds"]), rel=0.05
        )
    assert any("2 runs over one cache" in line for line in told)
