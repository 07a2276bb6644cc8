"""The model card: its metadata, its honesty, what it never says, and what a push would upload."""

from __future__ import annotations

import fnmatch
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from support.hub_client import connect, needs_validation
from support.hub_server import HubServer
from support.tiny import make_trainer, tiny_vit
from support.tiny_runs import log_history, partial_record, record, write_plain_run
from transformers import AutoModelForImageClassification, trainer

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.errors import RunError
from hf_freezecache.report.figures import (
    figures_of,
    read_baseline,
)
from hf_freezecache.report.model_card import (
    card_arguments,
    render_card,
)
from hf_freezecache.report.page import PLOT_NAME
from hf_freezecache.report.record import (
    RUN_NAME,
    read_run,
)

CARDS = Path(__file__).parents[2] / "model_cards"
COMMITTED = sorted(path.parent.name for path in CARDS.glob(f"*/{RUN_NAME}"))
FULL = {
    "model_name": "flowers",
    "model_id": "someone/flowers",
    "license": "apache-2.0",
    "language": "en",
    "tags": "vision",
    "finetuned_from": "facebook/deit-tiny-patch16-224",
    "tasks": "image-classification",
    "dataset_tags": "someone/flower_photos",
    "dataset": "Flower photos",
    "dataset_args": "default",
}


def render(baseline: Any = None, plot: str | None = None, known: Any = None, **given: Any) -> str:
    return render_card(
        figures_of(known or record(), baseline), card_arguments(**{"model_name": "flowers", **given}), plot
    )


def check_card(text: str) -> dict[str, Any]:
    """What every card must pass; returns its metadata."""
    card = ModelCard(text)
    metadata = yaml.safe_load(text.split("---\n")[1])
    # Read by huggingface_hub and written again, nothing changes and nothing is lost.
    assert str(card) == text
    assert card.data.to_dict() == metadata
    for forbidden in (
        "unknown",
        "more information needed",
        "todo",
        "[more",
        "none",
        "undefined",
        "{{",
        "{%",
        "nan%",
        "your ",
    ):
        assert forbidden not in re.sub(r"\| none \|", "", text.lower()), forbidden
    assert metadata["library_name"] == "transformers"
    for result in metadata.get("model-index", [{"results": []}])[0]["results"]:
        assert set(result) == {"task", "dataset", "metrics"}
        assert all(result["dataset"][name] for name in ("name", "type"))
        assert re.fullmatch(r"[\w.-]+(/[\w.-]+)?", result["dataset"]["type"])
        assert all(isinstance(metric["value"], (int, float)) for metric in result["metrics"])
    # A table has as many cells in each row, or is no table.
    for table in re.findall(r"(?m)(?:^\|.*\n)+", text):
        assert len({row.count("|") for row in table.splitlines()}) == 1, table
    assert not re.search(r"\n{4,}| \n", text)
    return metadata


# ---- Metadata ----


def test_metadata_hold_what_was_given() -> None:
    metadata = check_card(render(**FULL))
    assert metadata["license"] == "apache-2.0"
    assert metadata["language"] == ["en"]
    assert metadata["base_model"] == "facebook/deit-tiny-patch16-224"
    assert metadata["pipeline_tag"] == "image-classification"
    assert metadata["datasets"] == ["someone/flower_photos"]
    assert metadata["metrics"] == ["accuracy"]
    assert metadata["tags"] == ["vision", "hf_freezecache", "generated_from_trainer"]
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == "flowers"
    (result,) = results
    assert (result.dataset_name, result.dataset_type, result.dataset_config) == (
        *("Flower photos", "someone/flower_photos", "default"),
    )
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.75)


def test_nothing_is_guessed() -> None:
    text = render()
    metadata = check_card(text)
    assert set(metadata) == {"library_name", "metrics", "tags"}
    assert "dataset" not in text.lower()
    assert "license" not in text.lower()


@pytest.mark.parametrize("missing", ["tasks", "dataset"])
def test_no_results_without_task_or_data(missing) -> None:
    given = {**FULL, missing: None}
    if missing == "dataset":
        given["dataset_tags"] = None
    metadata = check_card(render(**given))
    assert "model-index" not in metadata


def test_metrics_the_hub_does_not_know_are_in_the_text_only() -> None:
    history = [{**entry} for entry in log_history()]
    for entry in history:
        if "eval_accuracy" in entry:
            entry["eval_roundness"] = entry.pop("eval_accuracy")
    text = render(known=record(log_history=history), **FULL)
    metadata = check_card(text)
    assert "model-index" not in metadata
    assert "| roundness | 0.75 |" in text


def test_names_that_are_no_repository_are_left_out() -> None:
    metadata = check_card(render(finetuned_from="/home/me/model", dataset_tags="../data", tasks="image-classification"))
    assert "base_model" not in metadata
    assert "datasets" not in metadata


# ---- Words ----


def test_the_card_tells_stages_cost_and_limits() -> None:
    text = render(**FULL, plot=PLOT_NAME)
    assert "0 of 12 blocks frozen from epoch 0, 6 from epoch 2" in text
    assert "| 1 | 6 of 12 | 2 | built cache | 20.0 | 10 s | 4.00 s | 1.9 MiB | 2.50 | 0.002 |" in text
    assert "Not measured: no run without freezing was recorded" in text
    assert "This is an estimate, not a measurement." in text
    assert "Do not train like this" in text
    assert f"]({PLOT_NAME})" in text
    assert 'model="someone/flowers"' in text
    assert "| accuracy | 75.00% |" in text
    assert f"]({PLOT_NAME})" not in render(**FULL)


def test_the_card_compares_with_a_baseline(tmp_path) -> None:
    text = render(read_baseline(write_plain_run(tmp_path / "plain")), **FULL)
    check_card(text)
    assert "-5.00 points of accuracy against the baseline 'plain'" in text
    assert "39 s against the baseline's 40 s, a factor of 1.03" in text
    assert "| accuracy | 75.00% | 80.00% |" in text
    assert "estimate" not in text


@pytest.mark.parametrize("epoch", [0, 0.5, 1, 1.5, 2, 3])
def test_cards_of_partial_runs(epoch) -> None:
    text = render(known=partial_record(epoch, global_step=15))
    check_card(text)
    assert "**Training did not finish: the figures are those of step 15 of 40.**" in text
    assert ("The run was not evaluated." in text) == (epoch < 1)


# ---- From the trainer ----


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trained(train_dataset, eval_dataset, **settings: Any) -> FreezeCacheTrainer:
    run = make_trainer(
        tiny_vit(),
        train_dataset,
        eval_dataset,
        eval_strategy="epoch",
        num_train_epochs=3,
        trainer={"compute_metrics": accuracy},
        **settings,
    )
    run.train()
    return run


@pytest.mark.slow
def test_create_model_card(train_dataset, eval_dataset) -> None:
    run = trained(train_dataset, eval_dataset)
    assert not Path("out/README.md").exists()
    run.create_model_card(dataset="tiny images", tags=["mine"])
    text = Path("out/README.md").read_text()
    metadata = check_card(text)
    assert metadata["pipeline_tag"] == "image-classification"
    measured = [entry["eval_accuracy"] for entry in run.state.log_history if "eval_accuracy" in entry]
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == measured[-1]
    assert Path("out", PLOT_NAME).read_bytes().startswith(b"\x89PNG")
    known = read_run(Path("out"))
    assert render_card(figures_of(known), known.card, PLOT_NAME) == text
    # Tags of a card that is there stay, as with Trainer.
    run.create_model_card(license="mit")
    metadata = check_card(Path("out/README.md").read_text())
    assert metadata["tags"][0] == "mine"
    assert metadata["license"] == "mit"


def test_a_card_before_training_says_that_nothing_was_recorded(train_dataset) -> None:
    make_trainer(tiny_vit(), train_dataset).create_model_card()
    text = Path("out/README.md").read_text()
    check_card(text)
    assert "Training was not recorded." in text
    assert "1 of 4 blocks frozen from epoch 0, 3 from epoch 2" in text


def test_without_freezing_the_card_is_trainers(train_dataset) -> None:
    run = make_trainer(tiny_vit(), train_dataset, schedule=None)
    run.create_model_card(model_name="plain")
    assert "generated automatically according to the information the Trainer" in Path("out/README.md").read_text()
    assert not Path("out", RUN_NAME).exists()


def test_a_wrong_baseline_is_named(train_dataset) -> None:
    with pytest.raises(RunError, match="nowhere does not exist"):
        make_trainer(tiny_vit(), train_dataset).create_model_card(baseline="nowhere")
    assert not Path("out/README.md").exists()


@pytest.mark.slow
def test_without_matplotlib_the_card_has_no_plot(train_dataset, monkeypatch, caplog) -> None:
    run = make_trainer(tiny_vit(), train_dataset, num_train_epochs=1)
    run.train()
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    run.create_model_card()
    assert PLOT_NAME not in Path("out/README.md").read_text()
    assert "The model card shows no plot" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("drawing")
def test_push_to_hub_uploads_an_ordinary_model_and_no_cache(train_dataset, eval_dataset, monkeypatch, tmp_path) -> None:
    plain = write_plain_run(tmp_path / "plain")
    run = trained(
        train_dataset, eval_dataset, save_strategy="epoch", cache={"num_views": 2}, hub_model_id="someone/tiny"
    )
    uploads: list[dict[str, Any]] = []
    monkeypatch.setattr(
        FreezeCacheTrainer, "init_hf_repo", lambda self, **kwargs: setattr(self, "hub_model_id", "someone/tiny")
    )

    class Api:
        def upload_folder(self, **settings: Any) -> None:
            uploads.append(settings)

    if hasattr(trainer, "hf_api"):
        monkeypatch.setattr(trainer, "hf_api", lambda *args, **kwargs: Api())
    else:  # transformers before 5.20
        monkeypatch.setattr(trainer, "upload_folder", Api().upload_folder)
    run.push_to_hub(dataset="tiny images", baseline=plain)
    (upload,) = uploads
    folder = Path(upload["folder_path"])
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    sent = {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in upload["ignore_patterns"])}
    assert sent == {
        *("README.md", "config.json", "model.safetensors", "training_args.bin", RUN_NAME),
        *(f"freezecache_report/{name}" for name in ("report.html", "timeline.png", "cost.png", "storage.png")),
    }
    caches = {path.name for path in Path("caches").rglob("*") if path.is_file()}
    assert "index.json" in caches
    assert not caches & {Path(name).name for name in sent}
    assert not any(part in name for name in sent for part in ("shard", "view-", "index.json", "caches"))
    card = (folder / "README.md").read_text()
    check_card(card)
    assert 'model="someone/tiny"' in card
    assert "against the baseline 'plain'" in card
    assert len(AutoModelForImageClassification.from_pretrained(folder).config.id2label) == 4
    # No path of this machine leaves it, other than in Trainer's own arguments.
    for name in sent - {"training_args.bin", "model.safetensors"}:
        assert str(tmp_path).encode() not in (folder / name).read_bytes(), name


# ---- The cards of this repository ----


def test_there_are_cards() -> None:
    assert len(COMMITTED) >= 2
    assert all(name in (CARDS / "README.md").read_text() for name in COMMITTED)


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_cards_are_what_the_code_renders(name) -> None:
    known = read_run(CARDS / name)
    text = (CARDS / name / "README.md").read_text()
    metadata = check_card(text)
    assert render_card(figures_of(known), known.card, PLOT_NAME) == text
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["type"] == "accuracy"
    assert "license" not in metadata
    assert known.complete
    assert (CARDS / name / PLOT_NAME).read_bytes().startswith(b"\x89PNG")
    files = {str(path.relative_to(CARDS / name)) for path in (CARDS / name).rglob("*") if path.is_file()}
    assert files == {"README.md", PLOT_NAME, RUN_NAME}
    assert not re.search(r"/(tmp|home|root|work)/", (CARDS / name / RUN_NAME).read_text())


def test_the_script_renders_committed_cards(tmp_path) -> None:
    name = COMMITTED[0]
    shutil.copytree(CARDS / name, tmp_path / name, ignore=shutil.ignore_patterns("README.md", "*.png"))
    runpy.run_path(str(CARDS / "render.py"))["main"](tmp_path)
    assert (tmp_path / name / "README.md").read_text() == (CARDS / name / "README.md").read_text()
    assert (tmp_path / name / PLOT_NAME).read_bytes().startswith(b"\x89PNG")


@needs_validation
@pytest.mark.parametrize("name", COMMITTED)
def test_committed_cards_pass_the_endpoint_that_a_push_asks(name, tmp_path, monkeypatch) -> None:
    with HubServer(tmp_path / "server") as server:
        connect(server, tmp_path / "home", monkeypatch)
        card = ModelCard.load(CARDS / name / "README.md")
        card.validate()
        card.data.license = "none of them"
        with pytest.raises(ValueError, match="license"):
            card.validate()


def test_the_hubs_validation_is_not_asked(monkeypatch) -> None:
    """It would need the network; what it checks offline is checked above."""
    monkeypatch.setattr(huggingface_hub.repocard, "get_session", None)
    check_card(render(**FULL))
