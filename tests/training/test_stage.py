"""Stages: each has an identity and one decision, all share one trace of the model, and the hooks they need are there."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.tiny import make_trainer, tiny_vit
from transformers import Trainer

from hf_freezecache import CacheConfig
from hf_freezecache.errors import UnsupportedSetupError
from hf_freezecache.model import split as split_module
from hf_freezecache.schedules import Stage, plan_stages
from hf_freezecache.training.checkpoints import STATE_NAME
from hf_freezecache.training.hooks import (
    TRAINER_ATTRIBUTES,
    TRAINER_HOOKS,
    check_trainer_attributes,
    missing_hooks,
)
from hf_freezecache.training.planner import predict_passes


@pytest.fixture
def traces(monkeypatch) -> Counter:
    """Counts how often each model is traced."""
    counted: Counter = Counter()
    trace_model = split_module.trace_model

    def counting(model, *args):
        counted[id(model)] += 1
        return trace_model(model, *args)

    monkeypatch.setattr(split_module, "trace_model", counting)
    return counted


def test_one_trace_of_a_model_serves_all_stages_promotions_and_a_resume(train_dataset, traces) -> None:
    settings = {"schedule": "0:1,1:2,2:3", "num_train_epochs": 3, "save_strategy": "epoch"}
    trainer = make_trainer(tiny_vit(), train_dataset, cache={"num_views": 2}, **settings)
    trainer.train()
    assert [decision.built_from for decision in trainer._record.decisions] == [0, 1, 2]
    assert list(traces.values()) == [1]
    again = make_trainer(tiny_vit(), train_dataset, cache={"num_views": 2}, **settings)
    again.train(resume_from_checkpoint="out/checkpoint-5")
    assert list(traces.values()) == [1, 1]  # another model


@pytest.mark.slow
def test_lossy_promotions_take_one_trace_too(train_dataset, traces) -> None:
    cache = {"codec": "auto", "num_views": 2, "build_from": "previous_cache", "calibration_samples": 16}
    make_trainer(tiny_vit(), train_dataset, cache=cache, schedule="0:1,1:3", num_train_epochs=2).train()
    assert list(traces.values()) == [1]


def test_two_stages_with_one_split_point_are_two(train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:2,1:2,2:3", num_train_epochs=3, save_strategy="epoch")
    trainer.train()
    decisions = trainer._record.decisions
    assert [(d.stage, d.start_epoch, d.split_point, d.cache) for d in decisions] == [
        (0, 0, 2, "built"),
        (1, 1, 2, "found"),
        (2, 2, 3, "built"),
    ]
    assert [epoch.stage for epoch in trainer._record.epochs] == [0, 1, 2]
    logged = [entry["freezecache/stage"] for entry in trainer.state.log_history if "freezecache/stage" in entry]
    assert logged == [0, 1, 2]
    stages = [
        Stage(**json.loads((Path("out") / f"checkpoint-{step}" / STATE_NAME).read_text())["stage"])
        for step in (5, 10, 15)
    ]
    assert stages == [Stage(0, 0, 2), Stage(1, 1, 2), Stage(2, 2, 3)]


@pytest.mark.slow
def test_a_resumed_run_knows_the_decisions_and_epochs_before(train_dataset) -> None:
    settings = {"schedule": "0:1,2:3", "num_train_epochs": 4, "save_strategy": "epoch"}
    whole = make_trainer(tiny_vit(), train_dataset, **settings)
    whole.train()
    resumed = make_trainer(tiny_vit(), train_dataset, **settings)
    resumed.train(resume_from_checkpoint="out/checkpoint-15")
    assert [d.stage for d in resumed._record.decisions] == [0, 1]
    assert resumed._record.decisions[0] == whole._record.decisions[0]
    assert [epoch.stage for epoch in resumed._record.epochs] == [0, 0, 1, 1]
    assert resumed._record.epochs[:3] == whole._record.epochs[:3]


@pytest.mark.slow
def test_progress_of_another_schedule_is_left_behind(train_dataset, caplog) -> None:
    settings = {"num_train_epochs": 4, "save_strategy": "epoch"}
    make_trainer(tiny_vit(), train_dataset, schedule="0:0,1:2", **settings).train()
    resumed = make_trainer(tiny_vit(), train_dataset, schedule="0:2", **settings)
    resumed.train(resume_from_checkpoint="out/checkpoint-10")
    assert "saved under another schedule" in caplog.text
    assert [(d.stage, d.split_point) for d in resumed._record.decisions] == [(0, 2)]
    assert [epoch.stage for epoch in resumed._record.epochs] == [0, 0]


@pytest.mark.slow
def test_finding_a_cache_takes_time_that_is_told(train_dataset) -> None:
    settings = {"schedule": "0:2", "num_train_epochs": 1}
    for cache in ("built", "found"):
        trainer = make_trainer(tiny_vit(), train_dataset, **settings)
        trainer.train()
        (decision,) = trainer._record.decisions
        assert decision.cache == cache
        assert decision.build_seconds > 0


@pytest.mark.parametrize(
    ("settings", "trained_from", "reason"),
    [
        ({"mode": "always"}, "cache", "mode='always'"),
        ({"mode": "auto"}, "cache", "mode='auto'"),
        ({"mode": "never"}, "images", "mode='never'"),
    ],
)
@pytest.mark.usefixtures("always_paying")
@pytest.mark.by_default(2)
def test_a_decision_says_what_a_stage_did_and_why(train_dataset, settings, trained_from, reason) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, cache=settings, schedule="0:0,1:2", num_train_epochs=3)
    trainer.train()
    unfrozen, frozen = trainer._record.decisions
    assert (unfrozen.trained_from, unfrozen.reason) == ("images", "No block is frozen.")
    assert frozen.trained_from == trained_from
    assert reason in frozen.reason
    assert (frozen.cache_bytes > 0) == (trained_from == "cache")


def test_passes_are_counted() -> None:
    stages = [Stage(0, 0, 0), Stage(1, 2, 6), Stage(2, 5, 9)]
    # 12 blocks, 3 epochs: 6 blocks trained at 3 passes each; 6 frozen ones once for each of 2 views, or in every epoch.
    config = CacheConfig(num_views=2)
    assert predict_passes(stages[1], stages, 8, 12, config) == {"cached_passes": 54.0 + 12, "live_passes": 54.0 + 18}
    assert predict_passes(stages[0], stages, 8, 12, config) == {"cached_passes": 72.0, "live_passes": 72.0}
    assert predict_passes(stages[2], stages, 4, 12, config)["live_passes"] == 0.0  # the run ends before


@pytest.mark.parametrize(
    ("schedule", "settings", "views"),
    [
        ("0:6,2:9", {}, [6, 3]),  # the second from the first
        ("0:6,2:9", {"build_from": "images"}, [6, 9]),
        ("0:12,2:6", {}, [12, 0]),  # both in one pass
        ("0:12,2:6", {"consume_previous_cache": True}, [12, 6]),
        ("0:6,2:0,4:9", {}, [6, 0, 9]),  # blocks in front of the second split point have trained since
        ("0:12,2:9,3:6,4:8", {}, [12, 0, 0, 2]),
        ("0:6,2:9,4:6", {"consume_previous_cache": True}, [6, 3, 0]),  # the first is needed again, and kept
    ],
)
def test_what_building_is_predicted_to_take(schedule, settings, views) -> None:
    stages, config = plan_stages(schedule, 6, 12), CacheConfig(num_views=1, **settings)
    predicted = [predict_passes(stage, stages, 6, 12, config) for stage in stages]
    ends = [*(stage.start_epoch for stage in stages[1:]), 6]
    trained = [3 * (12 - one.split_point) * (end - one.start_epoch) for one, end in zip(stages, ends, strict=True)]
    assert [one["cached_passes"] - passes for one, passes in zip(predicted, trained, strict=True)] == views


@pytest.mark.parametrize("hook", TRAINER_HOOKS, ids=lambda hook: hook.name)
def test_the_installed_trainer_has_each_hook(hook, train_dataset, monkeypatch) -> None:
    """A canary for each: a version of transformers without it, or with other parameters, is refused by name."""
    assert missing_hooks(Trainer) == []
    method = getattr(Trainer, hook.name)
    assert hook.parameters <= set(inspect.signature(method).parameters)
    if hook.parameters:
        monkeypatch.setattr(Trainer, hook.name, lambda self: None)
        with pytest.raises(UnsupportedSetupError, match=rf"parameters .* of {hook.name} \("):
            make_trainer(tiny_vit(), train_dataset)
    monkeypatch.delattr(Trainer, hook.name)
    with pytest.raises(UnsupportedSetupError, match=rf"{hook.name} \("):
        make_trainer(tiny_vit(), train_dataset)


@pytest.mark.parametrize("path", TRAINER_ATTRIBUTES)
def test_private_attributes_are_there_or_named(path, train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset)
    check_trainer_attributes(trainer)
    owner = trainer.accelerator if path.startswith("accelerator.") else trainer
    delattr(owner, path.rpartition(".")[2])
    with pytest.raises(UnsupportedSetupError, match=rf"lacks what.*{path} \("):
        check_trainer_attributes(trainer)


def test_every_private_override_is_a_hook_or_nobody_calls_it() -> None:
    """What ``FreezeCacheTrainer`` overrides of ``Trainer``'s private parts is in the table, and it defines no others."""
    from hf_freezecache import FreezeCacheTrainer

    private = {name for name in vars(FreezeCacheTrainer) if name.startswith("_") and not name.startswith("__")}
    assert private <= {hook.name for hook in TRAINER_HOOKS}
    own = {name for name, value in vars(FreezeCacheTrainer).items() if inspect.isfunction(value)}
    assert {name for name in own if not hasattr(Trainer, name)} == {"build_cache", "push_cache_to_hub"}


def test_the_trainer_keeps_few_private_attributes(train_dataset) -> None:
    trainer, plain = make_trainer(tiny_vit(), train_dataset), make_trainer(tiny_vit(), train_dataset, schedule=None)
    names = {name for name in vars(trainer) if name.startswith("_")}
    reference = Trainer(tiny_vit(), plain.args, train_dataset=train_dataset)
    assert len(names - set(vars(reference))) <= 8


def _new_model():  # Trainer calls functions with parameters with the trial
    return tiny_vit()


def test_a_new_model_of_model_init_is_split_and_frozen(train_dataset) -> None:
    trainer = make_trainer(None, train_dataset, schedule="0:2", num_train_epochs=1, trainer={"model_init": _new_model})
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert trainer._run.current.split.model is trainer.model
    fresh = tiny_vit()
    frozen = trainer._run.current.split.prefix_parameters()
    for name, parameter in fresh.named_parameters():
        same = torch.equal(parameter, trainer.model.get_parameter(name))
        assert same == (name in frozen), name
