"""``schedule="auto"``: what the trainer makes of the choice, what the user may fix, and what a resumed run does."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from support.parity import assert_same, parameters_of
from support.tiny import make_trainer, tiny_model, tiny_vit, training_arguments

from hf_freezecache import CacheConfig, FreezeCacheTrainer, FreezeConfig
from hf_freezecache.errors import ScheduleError, UnsupportedSetupError
from hf_freezecache.report.figures import figures_of
from hf_freezecache.report.text import describe_schedule


def auto_trainer(rows: Any, model: Any = None, freeze: dict[str, Any] | None = None, **settings: Any) -> Any:
    return make_trainer(tiny_vit() if model is None else model, rows, schedule="auto", freeze=freeze, **settings)


def test_a_budget_chooses_epochs_views_tokens_and_rates(train_dataset, caplog) -> None:
    caplog.set_level(logging.INFO, "hf_freezecache")
    trainer = auto_trainer(train_dataset, freeze={"budget": 0.5}, num_train_epochs=3)
    freezing, caching = trainer.freeze_config, trainer.cache_config
    assert (freezing.schedule, freezing.token_keep) == ("0:3", 0.5)
    assert (freezing.layer_decay, freezing.lr_scale, caching.num_views) == (0.75, "auto", 2)
    assert trainer.args.num_train_epochs == 8
    lines = [record.getMessage() for record in caplog.records if "auto" in record.name]
    assert len(lines) == 2
    assert lines[0] == "schedule='auto' may spend 1.5 epochs of full fine-tuning (budget=0.5 of 3)"
    trainer.train()
    assert trainer.state.epoch == 8
    figures = figures_of(trainer._record)
    assert "8 epochs behind 3 frozen blocks" in figures["freezing"]["chosen"]
    assert "chosen by schedule='auto'" in describe_schedule(figures)
    assert figures["stages"][0]["token_keep"] == 0.5


def test_what_the_user_sets_stays(train_dataset) -> None:
    fixed = {"token_keep": 0.75, "layer_decay": 0.9, "lr_scale": "2"}
    trainer = auto_trainer(train_dataset, freeze=fixed, cache={"num_views": 1}, num_train_epochs=3)
    freezing = trainer.freeze_config
    assert (freezing.token_keep, freezing.layer_decay, freezing.lr_scale) == (0.75, 0.9, "2")
    assert trainer.cache_config.num_views == 1
    assert trainer.args.num_train_epochs == 3
    assert auto_trainer(train_dataset, num_train_epochs=3).cache_config.num_views == 2
    whole = auto_trainer(train_dataset, freeze={"budget": 0.5, "token_keep": 1}, num_train_epochs=3)
    assert whole.freeze_config.token_keep == 1


def test_the_arguments_of_the_user_stay_and_give_the_same_choice_again(train_dataset) -> None:
    args = training_arguments(num_train_epochs=3)
    trainers = [
        FreezeCacheTrainer(
            model=tiny_vit(), args=args, train_dataset=train_dataset, freeze_config=FreezeConfig("auto", budget=0.5)
        )
        for _ in range(2)
    ]
    assert args.num_train_epochs == 3
    assert [trainer.args.num_train_epochs for trainer in trainers] == [8, 8]


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit(train_dataset) -> None:
    settings = {"freeze": {"budget": 0.4}, "num_train_epochs": 3, "save_strategy": "epoch"}
    whole = auto_trainer(train_dataset, **settings)
    whole.train()
    resumed = auto_trainer(train_dataset, **settings)
    resumed.train(resume_from_checkpoint="out/checkpoint-15")
    assert_same(parameters_of(whole.model), parameters_of(resumed.model))


@pytest.mark.slow
def test_a_model_that_needs_all_tokens_gets_them(train_dataset, caplog) -> None:
    trainer = auto_trainer(
        train_dataset, tiny_model("beit", use_relative_position_bias=True), freeze={"budget": 0.5}, num_train_epochs=3
    )
    trainer.train()
    assert trainer._record.decisions[0].token_keep == 1
    assert "schedule='auto' trains on all tokens" in caplog.text


def test_a_budget_needs_the_rule(train_dataset) -> None:
    with pytest.raises(UnsupportedSetupError, match=r"budget=0\.5 is for schedule='auto'"):
        FreezeConfig("0:1", budget=0.5)
    with pytest.raises(UnsupportedSetupError, match="max_steps=4 fixes how long to train"):
        auto_trainer(train_dataset, freeze={"budget": 0.5}, max_steps=4)
    with pytest.raises(ScheduleError, match="Set budget to at least"):
        auto_trainer(train_dataset, freeze={"budget": 0.1}, num_train_epochs=1)
    with pytest.raises(UnsupportedSetupError, match="expected a number above 0 and at most 1"):
        FreezeConfig("auto", budget=1.5)


def test_views_of_a_written_schedule_stay_one() -> None:
    assert CacheConfig().num_views == 1
    assert CacheConfig() == CacheConfig(num_views=1)
