"""Several runs of one setting: mean and spread on card, page and command line, and runs that are refused."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_runs import eval_log, log_history, record, write_plain_run
from typer.testing import CliRunner

from hf_freezecache.cli.app import app
from hf_freezecache.errors import RunError
from hf_freezecache.report.figures import figures_of
from hf_freezecache.report.model_card import card_arguments, render_card
from hf_freezecache.report.record import RunRecord, read_run, write_run
from hf_freezecache.report.seeds import read_baselines, read_seeds

TRAINING = {"num_train_epochs": 4, "per_device_train_batch_size": 10, "precision": "fp32"}
CARD = card_arguments(model_name="flowers", tasks="image-classification", dataset="Flower photos")


def run(seed: int, accuracy: float = 0.75, **settings: Any) -> RunRecord:
    """A run that ended at an accuracy."""
    history = [*log_history(), eval_log(4, accuracy, 1.0 - accuracy, 40)]
    known: dict[str, Any] = {"name": f"flowers-{seed}", "log_history": history, "training": {**TRAINING, "seed": seed}}
    return record(**{**known, **settings})


def write(folder: Path, made: RunRecord) -> Path:
    write_run(folder, made)
    return folder


@pytest.fixture
def others(tmp_path: Path) -> list[Path]:
    """Runs of seeds 2 and 1, at 60% and 90%."""
    return [write(tmp_path / "two", run(2, 0.6)), write(tmp_path / "one", run(1, 0.9))]


@pytest.fixture
def baselines(tmp_path: Path) -> list[Path]:
    return [write_plain_run(tmp_path / f"plain-{number}", 0.7 + number / 10) for number in range(2)]


def test_mean_and_spread_are_of_this_run_and_the_others(others) -> None:
    known = run(0, 0.75)
    spread = figures_of(known, seeds=read_seeds(known, others))["seeds"]
    assert spread["seeds"] == [0, 1, 2]
    assert [entry["value"] for entry in spread["runs"]] == [0.75, 0.9, 0.6]
    found = spread["metrics"]["accuracy"]
    assert found["mean"] == pytest.approx(0.75)
    assert found["standard_deviation"] == pytest.approx(statistics.stdev([0.75, 0.9, 0.6]))
    assert (found["lowest"], found["highest"]) == (0.6, 0.9)
    assert spread["loss"]["mean"] == pytest.approx(0.25)


def test_one_run_has_no_spread() -> None:
    assert figures_of(run(0))["seeds"] is None
    assert "standard deviation" not in render_card(figures_of(run(0)), CARD)


def test_the_card_shows_both_spreads(others, baselines, tmp_path) -> None:
    known = run(0, 0.75, card=CARD)
    known.seeds, known.baseline = read_seeds(known, others), read_baselines(baselines)
    # A card is made of its run's record alone.
    figures = figures_of(read_run(write(tmp_path / "zero", known)))
    text = render_card(figures, CARD)
    assert "| this model, seed 0 | mean of 3 runs, seeds 0, 1, 2 | standard deviation | lowest to highest |" in text
    assert "| accuracy | 75.00% | 75.00% | 15.00% | 60.00% to 90.00% |" in text
    assert (
        "| accuracy, mean ± standard deviation | 75.00% ± 15.00%, 3 runs, seeds 0, 1, 2 | 75.00% ± 7.07%, 2 runs |"
        in text
    )
    # sqrt(0.15^2 / 3 + 0.0707^2 / 2)
    assert "+0.00 points of accuracy against the baseline 'plain-0' without freezing, of the means" in text
    assert "the difference has a standard error of 10 points" in text
    metadata = yaml.safe_load(text.split("---\n")[1])
    own, mean = metadata["model-index"][0]["results"][0]["metrics"]
    assert (own["type"], own["value"], own["name"]) == ("accuracy", 0.75, "Accuracy")
    assert (mean["type"], mean["value"]) == ("accuracy", 0.75)
    assert mean["name"] == "Accuracy (mean over 3 runs, seeds 0, 1, 2; standard deviation 0.1500)"


def test_seeds_beside_one_baseline_run(others, baselines) -> None:
    known = run(0, 0.9)
    text = render_card(figures_of(known, read_baselines(baselines[:1]), read_seeds(known, others)), CARD)
    assert "one run each" in text
    assert "mean of 3 runs" in text


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (
            {"training": {**TRAINING, "seed": 1, "precision": "bf16"}},
            r"training\.precision \('bf16' there, 'fp32' here\)",
        ),
        (
            {"training": {**TRAINING, "seed": 1, "learning_rate": 0.1}},
            r"training\.learning_rate \(0\.1 there, None here\)",
        ),
        ({"data": {"train_images": 200, "image_shape": [3, 16, 16]}}, r"data\.train_images \(200 there, 100 here\)"),
        ({"model": {"class": "Other", "num_blocks": 12, "parameters": 1000}}, r"model\.class"),
        ({"freezing": {"schedule": "0:6"}}, r"freezing\.schedule \('0:6' there, '0:0,2:6' here\)"),
        ({"card": {**CARD, "dataset": ["Other photos"]}}, r"card\.dataset"),
        ({"complete": False}, "Training did not end"),
        ({"log_history": []}, "was not evaluated"),
        ({"training": {**TRAINING, "seed": 0}}, "has the seed 0, as this run has"),
    ],
)
def test_other_runs_are_refused(tmp_path, changed, named) -> None:
    other = dataclasses.replace(run(1), **changed)
    with pytest.raises(RunError, match=named):
        read_seeds(run(0, card=CARD), write(tmp_path / "other", other))


def test_a_run_of_the_same_seed_given_twice_is_refused(others) -> None:
    with pytest.raises(RunError, match=r"has the seed 2, as .*two has"):
        read_seeds(run(0), [*others, others[0]])


def test_runs_evaluated_on_other_images_are_refused(tmp_path) -> None:
    history = [*log_history(), {**eval_log(4, 0.5, 0.5, 40), "eval_samples_per_second": 200.0}]
    with pytest.raises(RunError, match="was evaluated on 100 images, this run on 200"):
        read_seeds(run(0), write(tmp_path / "other", run(1, log_history=history)))


def test_runs_of_plain_trainer_have_no_seed(baselines) -> None:
    with pytest.raises(RunError, match="without a record"):
        read_seeds(run(0), baselines)


def test_baselines_are_of_one_setting(baselines) -> None:
    state = json.loads((baselines[1] / "trainer_state.json").read_text())
    (baselines[1] / "trainer_state.json").write_text(json.dumps({**state, "train_batch_size": 20}))
    with pytest.raises(
        RunError, match=r"plain-1 is no run of the setting of .*plain-0: batch_size \(20 there, 10 here\)"
    ):
        read_baselines(baselines)
    with pytest.raises(RunError, match="given twice"):
        read_baselines([baselines[0], baselines[0]])


def test_the_report_tells_of_the_seeds(others, baselines, tmp_path) -> None:
    folder = write(tmp_path / "zero", run(0, 0.75))
    options = [word for other in others for word in ("--seeds", str(other))]
    options += [word for other in baselines for word in ("--baseline", str(other))]
    done = CliRunner().invoke(app, ["report", str(folder), *options, "--json"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.output)
    assert figures["seeds"]["metrics"]["accuracy"]["mean"] == pytest.approx(0.75)
    assert len(figures["baseline"]["spread"]["runs"]) == 2
    done = CliRunner().invoke(app, ["report", str(folder), "--seeds", str(folder)])
    assert done.exit_code == 1
    assert "has the seed 0" in done.output


@pytest.mark.slow
def test_the_page_tells_of_the_seeds(others, baselines) -> None:
    from hf_freezecache.report.page import render_page

    known = run(0, 0.75)
    page = render_page(figures_of(known, read_baselines(baselines), read_seeds(known, others)))
    assert "<h2>Other seeds</h2>" in page
    assert "75.00% ± 15.00% (mean and standard deviation) over 3 runs, seeds 0, 1, 2, from 60.00% to 90.00%." in page
    assert "<td>75.00% ± 7.07%, 2 runs</td>" in page
