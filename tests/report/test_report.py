"""What a run leaves behind, the figures made of it, the page, and the command that draws it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from PIL import Image
from support.commands import assert_one_line, call
from support.tiny import make_trainer, tiny_vit, training_arguments
from support.tiny_runs import EPOCHS, decision, decisions, live, log_history, partial_record, record, write_plain_run
from transformers import Trainer, TrainerCallback

from hf_freezecache.report.callback import ReportCallback
from hf_freezecache.report.figures import (
    figures_of,
    read_baseline,
)
from hf_freezecache.report.page import (
    PAGE_NAME,
    REPORT_FOLDER,
    render_page,
    write_report,
)
from hf_freezecache.report.record import (
    RUN_NAME,
    Epoch,
    RunRecord,
    read_run,
    write_run,
)
from hf_freezecache.report.text import (
    accuracy_cost,
    describe_schedule,
    duration,
    how_it_ended,
    size_words,
    stage_account,
    time_cost,
    when_not_to_use,
)

#: Before 5.19 transformers reports the images and steps of the whole schedule, whichever of them a call did.
LOGS_THE_WHOLE = Version(transformers.__version__) < Version("5.19")
PICTURES = ["timeline", "cost", "storage"]


# ---- Figures ----


def test_figures_of_a_run() -> None:
    figures = figures_of(record())
    assert json.loads(json.dumps(figures)) == figures
    first, second = figures["stages"]
    assert (first["split_point"], first["start_epoch"], first["end_epoch"]) == (0, 0, 2)
    assert (second["split_point"], second["train_seconds"], second["entering_seconds"]) == (6, 10, 4)
    assert (first["has_cache"], second["has_cache"]) == (False, True)
    assert (second["passes_spent"], second["end_epoch"]) == (48, 4)
    assert second["images_per_second"] == 20
    assert figures["result"]["value"] == 0.75
    assert figures["result"]["images"] == 200
    assert figures["loss"] == [[0.5, 2.0], [1.5, 1.0], [2.5, 0.5]]
    assert figures["cost"]["seconds"] == 34
    assert figures["cost"]["no_freezing_seconds"] == 40
    assert not figures["cost"]["no_freezing_measured"]
    # train(): 40 s and 1 s of checks, less four evaluations of half a second.
    assert figures["cost"]["whole_seconds"] == 39
    assert figures["comparison"] is None


def test_the_result_is_that_of_the_model_that_came_out() -> None:
    assert figures_of(record(best_step=20))["result"]["value"] == 0.8
    after = {"epoch": 4, "step": 40, "eval_accuracy": 0.81, "eval_loss": 0.6}
    assert figures_of(record(best_step=20, log_history=[*log_history(), after]))["result"]["value"] == 0.81
    assert figures_of(record(log_history=[]))["result"] is None


def test_a_baseline_is_compared_by_measured_figures(tmp_path) -> None:
    figures = figures_of(record(), read_baseline(write_plain_run(tmp_path / "plain")))
    compared = figures["comparison"]
    assert compared["difference"] == pytest.approx(-0.05)
    assert compared["standard_error"] == pytest.approx(math.hypot(*(math.sqrt(p * (1 - p) / 200) for p in (0.75, 0.8))))
    assert compared["speedup"] == pytest.approx(40 / 39, abs=1e-4)
    assert compared["caveats"] == []
    assert figures["cost"]["no_freezing_basis"] == "baseline"
    assert figures["cost"]["no_freezing_seconds"] == pytest.approx(40)
    assert "-5.00 points of accuracy against the baseline 'plain'" in accuracy_cost(figures)
    assert "say little" in accuracy_cost(figures)
    assert "39 s against the baseline's 40 s" in time_cost(figures)
    assert "estimate" not in time_cost(figures)


def test_a_checkpoint_of_a_baseline_has_no_time_and_the_report_says_so(tmp_path) -> None:
    folder = write_plain_run(tmp_path / "plain")
    state = json.loads((folder / "trainer_state.json").read_text())
    state["log_history"] = [entry for entry in state["log_history"] if "train_runtime" not in entry]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    figures = figures_of(record(), read_baseline(folder))
    assert figures["comparison"]["speedup"] is None
    assert "trainer.save_state() after train() keeps it" in accuracy_cost(figures)


def test_a_run_in_pieces_is_compared_by_the_rate_of_the_baseline(tmp_path) -> None:
    known = record(log_history=log_history()[:-1], complete=False)
    text = time_cost(figures_of(known, read_baseline(write_plain_run(tmp_path / "plain"))))
    assert "At the images per second measured in the baseline run 'plain', evaluation left out: 40 s." in text
    assert "estimate" not in text


def test_an_unequal_baseline_is_told(tmp_path) -> None:
    folder = write_plain_run(tmp_path / "plain")
    state = json.loads((folder / "trainer_state.json").read_text())
    state["train_batch_size"] = 20
    state["log_history"][-1] |= {"epoch": 8, "train_samples_per_second": 1600 / 41}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    write_run(folder, RunRecord(name="plain", decisions=[live(0, 0, 3, "mode='never'")]))
    figures = figures_of(record(), read_baseline(folder))
    assert len(figures["comparison"]["caveats"]) == 4
    for words in ("froze up to 3 blocks", "8 epochs", "200 images", "batch size of 20"):
        assert words in accuracy_cost(figures)
    # What froze blocks says nothing of training without freezing.
    assert figures["cost"]["no_freezing_basis"] == "unfrozen epochs"


def old_log(resumed: bool, stopped: bool) -> list[dict[str, Any]]:
    """The log of six epochs of 10 steps, as transformers before 5.19 writes it; in the second part of it, or in one piece."""
    losses = [2.0, 1.6, 1.3, 1.1, 1.0, 0.9]
    done = 3 if stopped else 6
    own = losses[3:done] if resumed else losses[:done]
    runtime = 2.0 * len(own)
    end = {
        "epoch": float(done),
        "step": 10 * done,
        "train_runtime": runtime,
        "train_samples_per_second": round(600 / runtime, 3),
        "train_steps_per_second": round(60 / runtime, 3),
        "train_loss": sum(own) / done,
    }
    return [{"epoch": n + 1.0, "step": 10 * n + 10, "loss": loss} for n, loss in enumerate(losses[:done])] + [end]


@pytest.mark.parametrize(("resumed", "stopped"), [(False, False), (True, False), (False, True)])
def test_a_baseline_of_an_older_transformers(resumed, stopped) -> None:
    """It reports images and steps of the whole schedule, whether they were trained on in this call or at all."""
    log = old_log(resumed, stopped)
    Path("old").mkdir()
    Path("old/trainer_state.json").write_text(json.dumps({"global_step": log[-1]["step"], "log_history": log}))
    found = read_baseline(Path("old"))
    assert found["seconds"] == (None if resumed else log[-1]["train_runtime"])
    assert found["images_per_second"] == (None if resumed else pytest.approx(50, rel=0.01))
    assert found["train_images"] == (None if resumed else 100)


@pytest.mark.parametrize("odd", [None, "x"])
def test_losses_that_are_no_numbers_say_nothing(odd) -> None:
    log = [
        {**entry, **{name: odd for name in ("loss", "train_loss") if name in entry}} for entry in old_log(False, False)
    ]
    Path("old").mkdir()
    Path("old/trainer_state.json").write_text(json.dumps({"global_step": 60, "log_history": log}))
    assert read_baseline(Path("old"))["seconds"] == 12


@pytest.mark.slow
def test_a_resumed_baseline_is_not_timed_as_a_whole(images, train_dataset, eval_dataset) -> None:
    """Of plain ``Trainer``, which logs the time of the last call alone. Its rate is still that of its own steps."""

    def train(**settings: Any) -> None:
        args = training_arguments(num_train_epochs=6, save_strategy="epoch", eval_strategy="epoch")
        run = Trainer(tiny_vit(), args, train_dataset=train_dataset, eval_dataset=eval_dataset)
        run.train(**settings)
        run.save_state()

    train()
    whole = read_baseline(Path("out"))
    assert whole["train_images"] == len(images)
    assert whole["seconds"] > 0
    train(resume_from_checkpoint="out/checkpoint-25")
    resumed = read_baseline(Path("out"))
    assert (resumed["seconds"], resumed["epochs"]) == (None, 6)
    if LOGS_THE_WHOLE:
        assert resumed["images_per_second"] is None  # how much of it was done before is not to be known
        return
    assert resumed["train_images"] == pytest.approx(len(images), rel=0.01)
    last = read_run(Path("out")).log_history[-1]
    evaluated = [entry["eval_runtime"] for entry in read_run(Path("out")).log_history if "eval_runtime" in entry]
    # One epoch, without the evaluation at its end, and that alone.
    assert resumed["images_per_second"] == pytest.approx(50 / (last["train_runtime"] - evaluated[-1]), rel=0.02)
    figures = figures_of(record(), resumed)
    assert figures["comparison"]["speedup"] is None
    assert figures["cost"]["no_freezing_basis"] == "baseline"


@pytest.mark.slow
def test_a_run_that_was_stopped_early_names_no_stage_as_done(train_dataset) -> None:
    class Stop(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            control.should_training_stop = state.epoch >= 2

    run = make_trainer(
        tiny_vit(),
        train_dataset,
        schedule="0:1,1:2,3:3",
        save_strategy="epoch",
        num_train_epochs=4,
        trainer={"callbacks": [Stop()]},
    )
    run.train()
    figures = figures_of(read_run(Path("out")))
    schedule = "1 of 4 blocks frozen from epoch 0, 2 from epoch 1, 3 from epoch 3 (not reached)"
    assert describe_schedule(figures) == schedule
    run.create_model_card()
    ending = "Training was stopped early, after 2 epochs, step 10 of 20."
    for text in (render_page(figures), Path("out/README.md").read_text()):
        assert ending in text
        assert schedule in text
    assert how_it_ended(figures_of(record())) is None
    assert "not reached" not in describe_schedule(figures_of(record()))


def test_a_schedule_tells_what_was_asked_of_learning_rates() -> None:
    asked = {"schedule": "0:0,2:6", "layer_decay": 0.75, "lr_scale": "auto"}
    first, second = decisions()
    scaled = record(freezing=asked, decisions=[first, dataclasses.replace(second, lr_scale=1.5)])
    words = describe_schedule(figures_of(scaled))
    assert words.endswith("6 from epoch 2; layer_decay 0.75; lr_scale auto (1, 1.5 by stage)")
    accounts = [stage_account(stage) for stage in figures_of(scaled)["stages"]]
    assert ["Learning rates were multiplied by 1.5." in account for account in accounts] == [False, True]


def test_a_baseline_that_was_evaluated_after_its_state_was_saved(tmp_path) -> None:
    folder = write_plain_run(tmp_path / "plain")
    state = json.loads((folder / "trainer_state.json").read_text())
    state["log_history"] = [entry for entry in state["log_history"] if "eval_loss" not in entry]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    results = {
        "eval_accuracy": 0.9,
        "eval_loss": 0.1,
        "eval_runtime": 1.0,
        "eval_samples_per_second": 200,
        "epoch": 4.0,
    }
    (folder / "all_results.json").write_text(json.dumps(results))
    assert read_baseline(folder)["result"]["value"] == 0.9


def test_a_run_that_was_slower_says_so() -> None:
    slower = [*EPOCHS[:3], Epoch(1, 4, 2.0, 50.0, 0.0, 79.0)]
    assert "took 1.98 times the estimated time" in when_not_to_use(figures_of(record(epochs=slower)))[0]
    assert "times the" not in when_not_to_use(figures_of(record()))[0]


def test_where_all_blocks_train_in_the_end_nothing_is_said_of_what_caches_and_frozen_blocks_keep_from_them() -> None:
    last = {"split_point": 0, "trained_from": "images"}
    queries = record(decisions=[decision(0, 0, 12), decision(1, 2, 0)], freezing={"block_weights": "qkv"})
    assert figures_of(queries)["stages"][1].items() >= last.items()
    said = [
        [line.partition(":")[0] for line in when_not_to_use(figures_of(one))]
        for one in (queries, record(unfrozen=False))
    ]
    assert said[0][-1] == "In runs of a few epochs"
    assert said[1][-3:-1] == [
        "In runs of a few epochs",
        "When every epoch must show new images, or the collator mixes samples",
    ]
    assert said[1][-1].startswith("When data differ much")


def test_words_for_figures() -> None:
    assert [duration(s) for s in (0.5, 42.4, 599, 660, 9000)] == ["0.50 s", "42 s", "599 s", "11.0 min", "2.5 h"]
    assert [size_words(n) for n in (0, 2048, 3 * 2**30)] == ["0 B", "2.0 KiB", "3.0 GiB"]


# ---- The page ----


class Parsed(HTMLParser):
    """What a page refers to, and whether its elements are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing() -> None:
    page = render_page(figures_of(record()))
    parsed = Parsed(page)
    assert parsed.open == []
    tags = [tag for tag, _ in parsed.found]
    assert "script" not in tags
    assert "img" not in tags
    for tag, attributes in parsed.found:
        for name in ("src", "href", "xlink:href", "data", "srcset"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (tag, target)
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    drawn = [attributes for tag, attributes in parsed.found if tag == "svg"]
    assert [attributes["role"] for attributes in drawn] == ["img"] * 3
    assert all(len(attributes["aria-label"]) > 40 for attributes in drawn)
    ids = [attributes["id"] for _, attributes in parsed.found if attributes.get("id")]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="#|url\(#)([^)"]+)', page))
    assert used <= set(ids)
    assert "prefers-color-scheme: dark" in page
    assert "estimated, not measured" in page
    # Colours are the page's, so that they change with it.
    assert not re.search("#0072b2|#1b1b1b|#dadada", page.partition("<main>")[2], re.I)


def test_names_are_text_and_no_markup() -> None:
    page = render_page(figures_of(record(name="<script>alert(1)</script>", device='"><img src=x>')))
    assert "<script" not in page
    assert "<img" not in page


@pytest.mark.slow
@pytest.mark.parametrize("unfrozen", [True, False])
def test_page_and_pictures_of_partial_runs(tmp_path, unfrozen) -> None:
    """Whatever was logged so far can be drawn."""
    assert "Training did not finish" in render_page(figures_of(record(unfrozen, complete=False, log_history=[])))
    for epoch in (0, 0.5, 1, 2, 2.5, 3):
        assert "Training did not finish" in render_page(figures_of(partial_record(epoch, unfrozen)))
    page = write_report(figures_of(record(unfrozen)), tmp_path)
    assert page == tmp_path / REPORT_FOLDER / PAGE_NAME
    assert sorted(path.name for path in page.parent.iterdir()) == sorted([PAGE_NAME, *(f"{n}.png" for n in PICTURES)])
    for name in PICTURES:
        with Image.open(page.parent / f"{name}.png") as picture:
            assert picture.size[0] == 840
            assert len(picture.convert("RGB").getcolors(2**20)) > 20


@pytest.mark.slow
def test_a_page_is_the_same_each_time() -> None:
    assert render_page(figures_of(record())) == render_page(figures_of(record()))


# ---- What training writes ----


@pytest.mark.usefixtures("drawing")
def test_a_run_that_saves_writes_record_and_report(train_dataset, eval_dataset) -> None:
    trainer = make_trainer(
        tiny_vit(), train_dataset, eval_dataset, save_strategy="epoch", eval_strategy="epoch", num_train_epochs=3
    )
    trainer.train()
    folder = Path("out") / REPORT_FOLDER
    assert {path.name for path in folder.iterdir()} == {PAGE_NAME, "timeline.png", "cost.png", "storage.png"}
    found = read_run(Path("out"))
    assert found.complete
    assert found.log_history == trainer.state.log_history
    assert [made.split_point for made in found.decisions] == [1, 3]
    assert found.model["num_blocks"] == 4
    assert found.data == {"train_images": 50, "image_shape": [3, 16, 16]}
    assert str(Path.cwd()) not in (Path("out") / RUN_NAME).read_text()
    figures = figures_of(found)
    epochs = figures["epochs"]
    assert [epoch["split_point"] for epoch in epochs] == [1, 1, 3]
    assert epochs[-1]["cumulative_seconds"] <= found.log_history[-1]["train_runtime"]
    assert all(stage["entering_seconds"] >= stage["build_seconds"] > 0 for stage in figures["stages"])
    before = (folder / PAGE_NAME).read_text()
    trainer.evaluate()
    assert len(read_run(Path("out")).log_history) == len(found.log_history) + 1
    assert (folder / PAGE_NAME).read_text() != before


@pytest.mark.slow
def test_a_run_that_does_not_save_writes_nothing(train_dataset) -> None:
    make_trainer(tiny_vit(), train_dataset, num_train_epochs=1).train()
    assert not (Path("out") / RUN_NAME).exists()
    trainer = make_trainer(
        tiny_vit(), train_dataset, num_train_epochs=1, trainer={"callbacks": [ReportCallback(always=True)]}
    )
    trainer.train()
    assert read_run(Path("out")).complete
    callbacks = trainer.callback_handler.callbacks
    assert len([callback for callback in callbacks if isinstance(callback, ReportCallback)]) == 1


@pytest.mark.slow
def test_without_the_callback_nothing_is_written(train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, num_train_epochs=1, save_strategy="epoch")
    trainer.remove_callback(ReportCallback)
    trainer.train()
    assert not (Path("out") / RUN_NAME).exists()


@pytest.mark.slow
def test_a_resumed_run_keeps_stages_and_adds_up(train_dataset) -> None:
    settings = {"save_strategy": "epoch", "schedule": "0:1,1:2,3:3", "cache": {"num_views": 2}}
    make_trainer(tiny_vit(), train_dataset, **settings).train()
    whole = figures_of(read_run(Path("out")))
    again = make_trainer(tiny_vit(), train_dataset, **settings)
    again.train(resume_from_checkpoint="out/checkpoint-10")
    found = read_run(Path("out"))
    assert [made.split_point for made in found.decisions] == [1, 2, 3]
    resumed = figures_of(found)
    assert [stage["split_point"] for stage in resumed["stages"]] == [1, 2, 3]
    assert [epoch["cumulative_seconds"] for epoch in resumed["epochs"][:2]] == [
        epoch["cumulative_seconds"] for epoch in whole["epochs"][:2]
    ]
    until = [epoch["cumulative_seconds"] for epoch in resumed["epochs"]]
    assert until == sorted(until)
    assert len(until) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("drawing")
def test_without_matplotlib_training_finishes_and_says_how_to_get_the_report(
    train_dataset, monkeypatch, caplog
) -> None:
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    make_trainer(tiny_vit(), train_dataset, num_train_epochs=1, save_strategy="epoch").train()
    assert "hf-freezecache report out" in caplog.text
    assert "pip install 'hf-freezecache[report]'" in caplog.text
    assert read_run(Path("out")).complete


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_does_not_stop_training(train_dataset, caplog) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, num_train_epochs=1, save_strategy="epoch")
    (Path("out") / RUN_NAME).mkdir(parents=True)
    trainer.train()
    assert "could not be written" in caplog.text
    assert trainer.state.global_step == 5


@pytest.mark.slow
def test_every_reporting_callback_gets_the_figures(train_dataset) -> None:
    from transformers import TrainerCallback

    class Board(TrainerCallback):
        logged: dict = {}  # noqa: RUF012

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            self.logged |= logs

    make_trainer(
        tiny_vit(),
        train_dataset,
        cache={"num_views": 2, "codec": "fp16", "copies": "residual", "calibration_samples": 16},
        num_train_epochs=3,
        trainer={"callbacks": [Board()]},
    ).train()
    names = {name.removeprefix("freezecache/") for name in Board.logged if name.startswith("freezecache/")}
    assert names >= {
        *("split_point", "cache_bytes", "bits_per_element", "distortion", "stage", "train_images_per_second"),
        *("epoch_seconds", "cumulative_seconds", "no_freezing_seconds_estimated"),
    }
    assert all(isinstance(Board.logged[f"freezecache/{name}"], (int, float)) for name in names)


# ---- The command ----


@pytest.fixture
def run_dir(tmp_path) -> Path:
    write_run(tmp_path / "flowers", record())
    return tmp_path / "flowers"


@pytest.mark.slow
def test_report_draws_the_page(run_dir, tmp_path) -> None:
    status, out, err = call("report", run_dir)
    assert (status, err) == (0, "")
    page = run_dir / REPORT_FOLDER / PAGE_NAME
    assert str(page) in out
    assert re.search(r"^schedule: +0 of 12 blocks frozen from epoch 0, 6 from epoch 2$", out, re.MULTILINE)
    assert "Not measured: no run without freezing" in out
    assert page.is_file()
    plain = write_plain_run(tmp_path / "plain")
    status, out, _ = call("report", run_dir, "--baseline", plain, "--output-dir", tmp_path / "elsewhere")
    assert status == 0
    assert "-5.00 points" in out
    text = (tmp_path / "elsewhere" / REPORT_FOLDER / PAGE_NAME).read_text()
    assert "measured in the baseline run &#39;plain&#39;" in text
    assert "estimated" not in text


def test_report_of_a_run_of_plain_trainer(tmp_path) -> None:
    status, out, _ = call("report", write_plain_run(tmp_path / "plain"))
    assert status == 0
    assert "no block frozen" in out
    assert "A run of plain Trainer" in (tmp_path / "plain" / REPORT_FOLDER / PAGE_NAME).read_text()


def test_report_prints_json_and_draws_nothing(run_dir, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = call("report", run_dir, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == figures_of(record())
    assert not (run_dir / REPORT_FOLDER).exists()
    status, out, err = call("report", run_dir)
    assert (status, out) == (1, "")
    assert_one_line(err)
    assert "pip install 'hf-freezecache[report]'" in err


def test_report_without_a_run_is_one_line(run_dir, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, words in (("nowhere", "does not exist"), ("file", "is a file"), ("empty", "holds no training run")):
        for arguments in ([tmp_path / name], [run_dir, "--baseline", tmp_path / name]):
            status, out, err = call("report", *arguments)
            assert (status, out) == (1, "")
            assert_one_line(err)
            assert words in err
            assert name in err
    assert call("report")[0] == 2


def test_an_empty_record_can_be_drawn() -> None:
    render_page(figures_of(RunRecord(name="nothing")))
