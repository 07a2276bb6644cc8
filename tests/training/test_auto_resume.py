"""``schedule="auto"``: what a run that goes on does with what was chosen before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.auto import QKV, SHARE, auto_trainer
from support.parity import assert_same, parameters_of
from support.tiny import PAIR, make_trainer, tiny_vit, training_arguments

from hf_freezecache import FreezeCacheTrainer, FreezeConfig
from hf_freezecache.auto_schedule import choose


@pytest.mark.by_default(1)
@pytest.mark.parametrize("other", [1e-2, 1e-5])
def test_a_run_that_is_resumed_with_another_rate_has_those_of_its_checkpoint(other, train_dataset) -> None:
    """As under ``Trainer``, whose schedulers come from the checkpoint: rates that were chosen by the old one stay."""
    settings = {"freeze": {"budget": 0.4}, "num_train_epochs": 3, "save_strategy": "epoch", "learning_rate": 1e-4}
    whole = auto_trainer(train_dataset, **settings)
    whole.train()
    rates = {log["step"]: log["learning_rate"] for log in whole.state.log_history if "learning_rate" in log}
    for epoch in (1, 2, 3):
        step = 5 * epoch
        resumed = auto_trainer(train_dataset, **{**settings, "output_dir": "again", "learning_rate": other})
        resumed.train(resume_from_checkpoint=f"out/checkpoint-{step}")
        found = {log["step"]: log["learning_rate"] for log in resumed.state.log_history if "learning_rate" in log}
        assert found == rates


def test_a_scale_that_the_user_gives_anew_holds_from_the_checkpoint_on(train_dataset) -> None:
    settings = {"num_train_epochs": 3, "save_strategy": "epoch", "learning_rate": 1e-3}
    freeze = {"budget": 0.4, "block_weights": "all"}
    first = auto_trainer(train_dataset, freeze={**freeze, "lr_scale": "2"}, **settings)
    first.train()
    again = {**settings, "output_dir": "again", "freeze": {**freeze, "lr_scale": "4"}}
    resumed = auto_trainer(train_dataset, **again)
    resumed.train(resume_from_checkpoint="out/checkpoint-5")
    rates = [
        {log["step"]: log["learning_rate"] for log in one.state.log_history if log.get("learning_rate")}
        for one in (first, resumed)
    ]
    later = [step for step in rates[0] if step > 6]
    assert later
    assert [rates[1][step] for step in later] == pytest.approx([2 * rates[0][step] for step in later])


def test_the_arguments_of_the_user_stay_and_give_the_same_choice_again(train_dataset) -> None:
    args = training_arguments(num_train_epochs=3)
    trainers = [
        FreezeCacheTrainer(
            model=tiny_vit(), args=args, train_dataset=train_dataset, freeze_config=FreezeConfig("auto", **QKV)
        )
        for _ in range(2)
    ]
    assert args.num_train_epochs == 3
    assert [trainer.args.num_train_epochs for trainer in trainers] == [
        choose(4, 3, 0.5, qkv_share=SHARE, epoch_steps=5).num_epochs
    ] * 2


def test_a_resumed_run_does_what_the_interrupted_one_chose(images, monkeypatch, caplog) -> None:
    """Another choice would follow: where steps have more images, or from a later rule."""
    settings = {"freeze": {"budget": 0.35}, "num_train_epochs": 3, "save_strategy": "epoch", "trainer": PAIR}
    whole = auto_trainer(images, **settings)
    whole.train()
    monkeypatch.setattr("hf_freezecache.training.auto._few_tokens", lambda splits: True)
    caplog.clear()
    for step in (5, 10, 15):
        resumed = auto_trainer(images, **{**settings, "output_dir": "again"})
        assert resumed.freeze_config.block_weights == "qkv"
        resumed._record.asked_epochs = None  # as if its own choice had been the epochs asked for
        resumed.train(resume_from_checkpoint=f"out/checkpoint-{step}")
        assert resumed.freeze_config == whole.freeze_config
        assert resumed.cache_config == whole.cache_config
        assert resumed.args.num_train_epochs == whole.args.num_train_epochs
        assert resumed._record.asked_epochs == whole._record.asked_epochs
        assert_same(parameters_of(whole.model), parameters_of(resumed.model))
        assert resumed._record.chosen == whole._record.chosen
        assert "Going on with what the interrupted run chose. schedule='auto' may spend" in caplog.text
    # Who asks for something else gets it, but for the rates: those of the checkpoint's optimizer are for the old learning rate.
    other = {"num_train_epochs": 4, "learning_rate": 1e-5, "freeze": {"budget": 0.35, "token_keep": 0.5}}
    longer = auto_trainer(images, **{**settings, **other})
    expected = replace(longer.freeze_config, lr_scale=whole.freeze_config.lr_scale)
    assert longer.freeze_config != expected
    longer.train(resume_from_checkpoint="out/checkpoint-5")
    assert longer.freeze_config == expected
    assert f"lr_scale={expected.lr_scale}; that is" in longer._record.chosen


def test_what_an_older_version_chose_without_knowing_all_settings_is_gone_on_with(images, monkeypatch) -> None:
    settings = {
        "freeze": QKV,
        "num_train_epochs": 2,
        "save_strategy": "epoch",
        "trainer": PAIR,
        "cache": {"chunk_size": 4},
    }
    with monkeypatch.context() as patch:
        patch.setattr("hf_freezecache.training.auto._few_rows", lambda trainer: None)
        whole = auto_trainer(images, **settings)
        whole.train()
    path = Path("out/checkpoint-5/freezecache_state.json")
    state = json.loads(path.read_text())
    for part in ("asked", "settings"):
        del state["chosen"][part]["head_rows"]
    path.write_text(json.dumps(state))
    resumed = auto_trainer(images, **{**settings, "output_dir": "again"})
    assert resumed.freeze_config.head_rows == 0.8
    resumed.train(resume_from_checkpoint=str(path.parent))
    assert resumed.freeze_config.head_rows is None
    assert_same(parameters_of(whole.model), parameters_of(resumed.model))


def test_what_max_steps_makes_of_epochs_is_not_what_was_asked(images) -> None:
    settings = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10, "trainer": PAIR}
    whole = auto_trainer(images, learning_rate=1e-4, **settings)
    whole.train()
    again = {**settings, "output_dir": "again", "per_device_train_batch_size": 25, "learning_rate": 1e-6}
    resumed = auto_trainer(images, **again)
    assert resumed.freeze_config != whole.freeze_config
    assert resumed.cache_config.num_views != whole.cache_config.num_views
    resumed.train(resume_from_checkpoint="out/checkpoint-10")
    assert resumed.freeze_config == whole.freeze_config
    assert resumed.cache_config.num_views == whole.cache_config.num_views


def test_of_an_older_checkpoint_the_rates_are_taken(images) -> None:
    settings = {"freeze": {"budget": 0.35}, "num_train_epochs": 3, "save_strategy": "epoch", "trainer": PAIR}
    auto_trainer(images, **settings).train()
    path = Path("out/checkpoint-5/freezecache_state.json")
    state = json.loads(path.read_text())
    del state["chosen"]
    path.write_text(json.dumps({**state, "lr_scale": "1:7,4:8"}))
    resumed = auto_trainer(images, **{**settings, "output_dir": "again"})
    expected = replace(resumed.freeze_config, lr_scale="1:7,4:8")
    resumed.train(resume_from_checkpoint="out/checkpoint-5")
    assert resumed.freeze_config == expected


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit(train_dataset) -> None:
    settings = {"freeze": {"budget": 0.4}, "num_train_epochs": 3, "save_strategy": "epoch"}
    whole = auto_trainer(train_dataset, **settings)
    whole.train()
    for checkpoint in (5, 10, 15):
        resumed = auto_trainer(train_dataset, **{**settings, "output_dir": "again"})
        resumed.train(resume_from_checkpoint=f"out/checkpoint-{checkpoint}")
        assert_same(parameters_of(whole.model), parameters_of(resumed.model))
        assert resumed._record.chosen == whole._record.chosen


def test_a_run_stores_the_views_that_were_chosen_and_a_resumed_one_finds_them(train_dataset) -> None:
    settings = {"schedule": "0:1,3:3", "num_train_epochs": 5, "cache": {"num_views": "auto"}}
    whole = make_trainer(tiny_vit(), train_dataset, save_strategy="epoch", **settings)
    whole.train()
    assert [made.num_views for made in whole._record.decisions] == [2, 2]
    assert whole._record.cache["num_views"] == 2
    resumed = make_trainer(tiny_vit(), train_dataset, output_dir="again", **settings)
    resumed.train(resume_from_checkpoint="out/checkpoint-20")
    assert_same(parameters_of(whole.model), parameters_of(resumed.model))
    assert [made.num_views for made in resumed._record.decisions] == [2, 2]
