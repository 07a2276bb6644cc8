"""The record of a run: what it keeps of stages and epochs, and how it is written, read and refused."""

from __future__ import annotations

import json
import re

import pytest
from support.tiny_runs import EPOCHS, decision, live, log_history, partial_record, record

from hf_freezecache.errors import RunError
from hf_freezecache.report.figures import figures_of
from hf_freezecache.report.page import render_page
from hf_freezecache.report.record import (
    RUN_NAME,
    Decision,
    RunRecord,
    progress_to_dict,
    read_run,
    restore_progress,
    write_run,
)


def test_a_record_comes_back_and_nan_is_null(tmp_path) -> None:
    written = record(log_history=[{"loss": float("nan"), "epoch": 1}])
    write_run(tmp_path / "run", written)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [RUN_NAME]
    written.log_history = [{"loss": None, "epoch": 1}]
    assert read_run(tmp_path / "run") == written
    render_page(figures_of(written))


def test_stages_of_one_split_point_are_kept_apart() -> None:
    known = RunRecord()
    for kept in (decision(1, 2, 6), decision(0, 0, 6)):
        known.keep_decision(kept)
    assert [(kept.stage, kept.split_point) for kept in known.decisions] == [(0, 6), (1, 6)]


def test_a_resumed_stage_adds_up() -> None:
    known = record()
    known.decisions[1].released_optimizer_bytes = 4096
    resumed = decision(1, 2, 6, cache="found", built_from=None, calibrated=False, build_seconds=0.5, built_shards=0)
    known.keep_decision(resumed)
    assert [kept.stage for kept in known.decisions] == [0, 1]
    assert known.decisions[1] is resumed
    assert (resumed.build_seconds, resumed.built_shards) == (3.5, 2)
    assert resumed.released_optimizer_bytes == 4096  # the optimizer of a resumed run never held it
    # This run built what it finds.
    assert (resumed.cache, resumed.built_from, resumed.calibrated) == ("built", 0, True)
    known.keep_decision(resumed)  # once more does not count twice
    assert resumed.build_seconds == 3.5
    lost = live(1, 2, 6, "The disk is full.")
    known.keep_decision(lost)
    assert (lost.cache, lost.build_seconds) == ("none", 3.5)


def test_progress_goes_through_a_checkpoint() -> None:
    document = json.loads(json.dumps(progress_to_dict(record())))
    resumed = record(decisions=[], epochs=[])
    restore_progress(resumed, document)
    assert resumed == record()
    restore_progress(resumed, {})  # a checkpoint of plain Trainer
    assert (resumed.decisions, resumed.epochs) == ([], [])


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"decisions": 3}, "not iterable"),
        ({"decisions": [{"stage": 0}]}, "start_epoch"),
        ({"decisions": [{"stage": "0", "start_epoch": 0, "split_point": 0}]}, "'stage' expected int, got str"),
        ({"decisions": [{"stage": 0, "start_epoch": 0, "split_point": 0, "mood": 1}]}, "mood"),
        ({"epochs": [vars(EPOCHS[0])]}, "stage 0"),
    ],
)
def test_damaged_progress_is_refused(document, words) -> None:
    known = record()
    with pytest.raises(RunError, match=words) as caught:
        restore_progress(known, document)
    assert "Resume from another checkpoint" in str(caught.value)
    assert known == record()


def test_a_decision_takes_no_values_of_other_types() -> None:
    with pytest.raises(Exception, match="expected int, got float"):
        Decision(0, 0, 6.0)
    with pytest.raises(Exception, match="expected str, got NoneType"):
        decision(0, 0, 6).reason = None


@pytest.mark.slow
def test_an_interrupted_run_goes_as_far_as_its_last_checkpoint(tmp_path) -> None:
    write_run(tmp_path, partial_record(2, global_step=20))
    for step in (20, 30):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        state = {"global_step": step, "epoch": step / 10, "max_steps": 40, "num_train_epochs": 4}
        state["log_history"] = partial_record(step / 10).log_history
        (folder / "trainer_state.json").write_text(json.dumps(state))
    found = read_run(tmp_path)
    assert (found.global_step, found.complete, len(found.log_history)) == (30, False, 6)
    assert figures_of(found)["epochs_done"] == 3
    page = render_page(figures_of(found))
    assert "Training did not finish" in page
    assert "step 30 of 40" in page
    # One checkpoint is the run as far as it came.
    write_run(tmp_path, record())
    early = read_run(tmp_path / "checkpoint-20")
    assert (early.global_step, early.complete, early.model["num_blocks"]) == (20, False, 12)
    assert ([epoch.epoch for epoch in early.epochs], [kept.stage for kept in early.decisions]) == ([1, 2], [0])
    assert "step 20 of 40" in render_page(figures_of(early))
    # Checkpoints of another run into the same folder are not this run.
    write_run(tmp_path, record(complete=False, log_history=[{"epoch": 0, "loss": 9.0}], global_step=0))
    assert read_run(tmp_path).global_step == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ('{"format_version": 99}', "format version 99"),
        ('{"format_version": 1, "log_history": []}', "Read it with the version of hf-freezecache that wrote it"),
        ('{"format_version": 2, "log_history": 3}', "'log_history' expected a list, got int"),
        ('{"format_version": 2, "log_history": [3]}', "log_history"),
        ('{"format_version": 2, "complete": "yes"}', "'complete' expected bool, got str"),
        ('{"format_version": 2, "decisions": [{"stage": 0}]}', "start_epoch"),
        ('{"format_version": 2, "stages": []}', "stages"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, content, words) -> None:
    (tmp_path / RUN_NAME).write_text(content)
    with pytest.raises(RunError, match=re.escape(str(tmp_path / RUN_NAME))) as caught:
        read_run(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_log_of_no_epochs_is_no_run_with_stages(tmp_path) -> None:
    """Nothing is read back out of what was logged."""
    known = record(decisions=[], epochs=[])
    known.log_history = [{"epoch": 0, "freezecache/split_point": 6, "freezecache/cache_bytes": 1}, *log_history()]
    write_run(tmp_path, known)
    figures = figures_of(read_run(tmp_path))
    assert figures["stages"] == figures["epochs"] == []
