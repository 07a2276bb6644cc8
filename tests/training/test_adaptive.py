"""Stages that a policy decides while the run trains: what it looks at, what a checkpoint keeps, and what others make of it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import many
from support.children import run_group
from support.parity import assert_same, parameters_of
from support.tiny import Recorder, make_trainer, tiny_vit

from hf_freezecache.adaptive_policies import AutoFreeze
from hf_freezecache.errors import UnsupportedModelError, UnsupportedSetupError
from hf_freezecache.report.figures import figures_of
from hf_freezecache.report.page import render_page
from hf_freezecache.report.text import describe_schedule
from hf_freezecache.training.adaptive import SIGNAL_NAME
from hf_freezecache.training.checkpoints import STATE_NAME
from hf_freezecache.training.signals import GradientSums
from hf_freezecache.training.stage import StageRunner

POLICY = AutoFreeze(percentile=60)
#: Freezes one block of four from epoch 2 on, and three in epoch 4.
SETTINGS: dict[str, Any] = {"schedule": "autofreeze(percentile=60)", "num_train_epochs": 5, "learning_rate": 1e-2}


def trained(rows: Any, mode: str = "always", resume: Any = None, model: Any = None, **settings: Any) -> Any:
    cache = {"mode": mode, "num_views": 2, **settings.pop("cache", {})}
    trainer = make_trainer(tiny_vit() if model is None else model, rows, cache=cache, **{**SETTINGS, **settings})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def decided(trainer: Any) -> list[tuple[int, int]]:
    return [(made.start_epoch, made.split_point) for made in trainer._record.decisions]


class Summing(Recorder):
    """Adds up the gradients of each block by itself, after each backward pass that completes those of a step."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        if isinstance(self._run, StageRunner) and self.accelerator.sync_gradients:
            sums = self.__dict__.setdefault("sums", {}).setdefault(int(self.state.epoch or 0), {})
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    sums.setdefault(name, []).append(parameter.grad.clone())
        return loss

    def sizes(self, epoch: int) -> list[float]:
        found = [0.0] * 4
        for name, gradients in self.sums[epoch].items():
            if ".layers." in name or ".layer." in name:
                place = int(name.split(".layers." if ".layers." in name else ".layer.")[1].split(".")[0])
                found[place] += float(torch.stack(gradients).mean(0).abs().sum())
        return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, module_rows: Any) -> Any:
    """A run that saves after every third step, epochs of five; and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    settings = {"output_dir": str(folder / "out"), "save_strategy": "steps", "save_steps": 3, "cls": Summing}
    return trained(module_rows, cache={"cache_dir": str(folder / "caches")}, **settings), folder


@pytest.fixture(scope="module")
def module_rows() -> Any:
    return many.data()


def test_stages_follow_from_the_gradients_of_the_epochs_before(whole) -> None:
    trainer, _ = whole
    stages = decided(trainer)
    assert len(stages) > 2  # or the other tests would show little
    history = trainer._run.adaptive.history
    assert len(history) == 4
    for epoch, sizes in enumerate(history):
        assert sizes == pytest.approx(trainer.sizes(epoch), rel=1e-5)
    frozen, expected = 0, [(0, 0)]
    for epoch in range(2, 5):
        point = POLICY.decide(history[:epoch], frozen)[0]
        if point > frozen:
            expected.append((epoch, point))
        frozen = point
    assert stages == expected
    assert [made.trained_from for made in trainer._record.decisions] == ["images"] + ["cache"] * (len(stages) - 1)
    assert trainer._record.decisions[2].built_from == stages[1][1]  # the cache of the stage before
    assert all(made.reason.startswith("autofreeze: gradients of block") for made in trainer._record.decisions[1:])


def test_cached_equals_live(whole, module_rows) -> None:
    cached, live = whole[0], trained(module_rows, "never")
    assert live.losses == cached.losses
    assert decided(live) == decided(cached)
    assert_same(parameters_of(live.model), parameters_of(cached.model))


@pytest.mark.by_default(1)
@pytest.mark.parametrize("step", [12, 15, 3, 6, 9, 18, 21, 24, 25])
def test_a_resumed_run_is_the_same_to_the_bit(whole, module_rows, step) -> None:
    """Within an interval, and at the end of one, where the decision is still to be made."""
    trainer, folder = whole
    checkpoint = folder / "out" / f"checkpoint-{step}"
    state = json.loads((checkpoint / STATE_NAME).read_text())["adaptive"]
    assert (state["steps"], len(state["history"])) == ((step - 1) % 5 + 1, (step - 1) // 5)
    assert (checkpoint / SIGNAL_NAME).is_file()
    resumed = trained(module_rows, resume=str(checkpoint), cache={"cache_dir": str(folder / "caches")})
    assert_same(parameters_of(trainer.model), parameters_of(resumed.model))
    assert decided(resumed) == decided(trainer)
    assert [made.reason for made in resumed._record.decisions] == [made.reason for made in trainer._record.decisions]
    assert resumed._run.adaptive.history == trainer._run.adaptive.history
    assert not any(made.built_shards for made in resumed._record.decisions if made.start_epoch * 5 >= step)


def test_reports_tell_of_the_stages_that_were_decided(whole) -> None:
    trainer, _ = whole
    figures = figures_of(trainer._record)
    assert trainer._record.planned_stages == []  # runs of other seeds may decide otherwise
    words = describe_schedule(figures)
    assert words.startswith("0 of 4 blocks frozen from epoch 0")
    for epoch, point in decided(trainer)[1:]:
        assert f"{point} from epoch {epoch}" in words
    assert "autofreeze: gradients of block" in render_page(figures)


@pytest.mark.slow
def test_two_processes_decide_alike_and_resume_exactly(tmp_path) -> None:
    run_group(many.main, "adaptive:8", folders=[tmp_path] * 2)
    found = [json.loads((tmp_path / f"found-{rank}-of-2.json").read_text())["adaptive:8"] for rank in range(2)]
    first = found[0]["always"]
    assert [stage["split_point"] for stage in first["stages"]] == sorted({s["split_point"] for s in first["stages"]})
    assert len(first["stages"]) > 1
    for each in found:
        for run in (each["always"], each["never"], *each["resumed"].values()):
            assert run["digest"] == first["digest"]
        assert [stage["split_point"] for stage in each["always"]["stages"]] == [
            stage["split_point"] for stage in first["stages"]
        ]


# ---- The signal ----


def test_gradients_of_a_step_are_those_of_all_its_batches(train_dataset) -> None:
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 5, "max_grad_norm": 1e-3}
    trainer = trained(train_dataset, "never", cls=Summing, num_train_epochs=3, **settings)
    assert trainer._run.adaptive.signal.steps == 5
    for epoch, sizes in enumerate(trainer._run.adaptive.history):
        assert sizes == pytest.approx(trainer.sizes(epoch), rel=1e-5)


def test_the_scale_of_fp16_is_taken_out_and_steps_that_overflow_are_left_out() -> None:
    """With the scaler of torch, here for the CPU."""
    block, sums, plain = torch.nn.Linear(3, 2), GradientSums(), GradientSums()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        loss = block(torch.full((4, 3), step + 1.0)).square().mean()
        block.zero_grad()
        loss.backward(retain_graph=True)
        if step != 1:
            plain.note_step([block], None)
        block.zero_grad()
        scaler.scale(loss).backward()
        if step == 1:
            block.weight.grad[0, 0] = torch.inf
        sums.note_step([block], scaler)
        scaler._scale.mul_(2)  # as it does by itself after many steps
    plain.steps = 3
    assert sums.take(1) == pytest.approx(plain.take(1))
    assert sums.take(1) == [0.0]


# ---- What others make of it ----


class InBackward(Recorder):
    """Takes each gradient as soon as it is there, as optimizers do that step within the backward pass."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self._run, StageRunner):
            for parameter in self.model.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        return super().training_step(*args, **kwargs)


def test_what_goes_by_no_gradients_says_so(train_dataset, caplog) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, cls=InBackward, cache={"mode": "never"}, **SETTINGS)
    with pytest.raises(UnsupportedSetupError, match="goes by the gradients of the blocks, but after the backward pass"):
        trainer.train()
    make_trainer(tiny_vit(), train_dataset, schedule="autofreeze(every=2)", num_train_epochs=4)
    assert "autofreeze(every=2) decides first at the beginning of epoch 4, from 0, and the run has 4" in caplog.text


class Looking(Recorder):
    """Its loss needs the images."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs) * (2 + inputs["pixel_values"].mean())


def test_what_cannot_be_cached_is_found_before_anything_is_decided(train_dataset) -> None:
    """A stage may have any number of frozen blocks: all are rehearsed."""
    with pytest.raises(UnsupportedModelError, match="behind 1 frozen blocks"):
        trained(train_dataset, cls=Looking)
    assert not Path("caches").exists() or not any(Path("caches").iterdir())
    trainer = trained(train_dataset, "auto", cls=Looking, num_train_epochs=3)
    assert sorted(trainer._run.refusals) == [1, 2, 3]
    assert [made.trained_from for made in trainer._record.decisions] == ["images"] * len(decided(trainer))


def test_there_is_no_cache_to_build_before_anything_is_decided(train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, **SETTINGS)
    with pytest.raises(UnsupportedSetupError, match="give build_cache a split_point"):
        trainer.build_cache()
    assert trainer.build_cache(2).reader.index.split_point == 2


@pytest.mark.slow
def test_a_checkpoint_of_another_schedule(whole, module_rows, caplog, tmp_path) -> None:
    _, folder = whole
    checkpoint = folder / "out" / "checkpoint-18"
    state = json.loads((checkpoint / STATE_NAME).read_text())
    stages = [tuple(pair) for pair in state["adaptive"]["stages"]]
    resumed = trained(
        module_rows, resume=str(checkpoint), schedule="autofreeze(percentile=0)", cache={"cache_dir": str(tmp_path)}
    )
    assert decided(resumed) == stages  # those that were decided stay
    assert "begins to look anew" in caplog.text
    with pytest.raises(UnsupportedSetupError, match="the schedule now asks for 0"):
        trained(module_rows, resume=str(checkpoint), schedule="0:0")


@pytest.mark.slow
def test_a_damaged_state_is_refused(whole, module_rows, tmp_path) -> None:
    _, folder = whole
    for number, damage in enumerate(
        (
            lambda path: (path / SIGNAL_NAME).unlink(),
            lambda path: (path / STATE_NAME).write_text(
                (path / STATE_NAME).read_text().replace('"history": [[', '"history": [["x", ')
            ),
        )
    ):
        copied = tmp_path / f"checkpoint-{number}"
        shutil.copytree(folder / "out" / "checkpoint-18", copied)
        damage(copied)
        with pytest.raises(UnsupportedSetupError, match="What the schedule had decided cannot be read"):
            trained(module_rows, resume=str(copied))


def test_views_are_chosen_for_the_epochs_that_may_be_frozen(train_dataset, caplog) -> None:
    caplog.set_level(logging.INFO, "hf_freezecache")
    for epochs, views in ((4, 1), (6, 2), (10, 4)):
        trainer = make_trainer(
            tiny_vit(), train_dataset, schedule="autofreeze", num_train_epochs=epochs, cache={"num_views": "auto"}
        )
        assert trainer.cache_config.num_views == views
