"""``schedule="auto"`` where adapters train in place of the blocks' weights."""

from __future__ import annotations

import logging

import pytest
import torch
from support.auto import auto_trainer
from support.parity import assert_same, parameters_of
from support.tiny import PAIR, tiny_vit

from hf_freezecache.auto_schedule import choose
from hf_freezecache.report.figures import figures_of


def with_lora() -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_vit(), config)


def test_blocks_of_which_little_trains_have_adapters(train_dataset) -> None:
    """Norms alone, say: no gradients of the large matrices are needed, whoever made the model so."""
    model = tiny_vit()
    for name, parameter in model.vit.named_parameters():
        parameter.requires_grad_("norm" in name)
    trainer = auto_trainer(train_dataset, model, freeze={"budget": 0.5}, num_train_epochs=6)
    choice = choose(4, 6, 0.5, adapters=True, epoch_steps=5)
    assert trainer.freeze_config.schedule == f"0:{choice.split_point}"
    assert (trainer.freeze_config.layer_decay, trainer.freeze_config.lr_scale) == (None, None)
    assert trainer.args.num_train_epochs == choice.num_epochs
    assert "epochs of all adapters" in trainer._record.chosen


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_keep_the_share_of_tokens_that_the_user_set(train_dataset) -> None:
    freeze = {"budget": 0.5, "unfrozen_token_keep": 0.5}
    settings = {"num_train_epochs": 4, "per_device_train_batch_size": 1}
    freezing = auto_trainer(train_dataset, with_lora(), freeze, **settings).freeze_config
    assert (freezing.schedule, freezing.unfrozen_token_keep) == ("0:0", 0.5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_keep_the_rate_and_train_from_the_first_epoch(train_dataset, caplog) -> None:
    caplog.set_level(logging.INFO, "hf_freezecache")
    trainer = auto_trainer(
        train_dataset, with_lora(), freeze={"budget": 0.5}, num_train_epochs=6, label_names=["labels"]
    )
    choice = choose(4, 6, 0.5, adapters=True, epoch_steps=5)
    assert choice.head_epochs == 0
    assert trainer.freeze_config.schedule == f"0:{choice.split_point}"
    assert (trainer.freeze_config.layer_decay, trainer.freeze_config.lr_scale) == (None, None)
    lines = [record.getMessage() for record in caplog.records if "auto" in record.name]
    assert lines[0] == "schedule='auto' may spend 3 epochs of all adapters (budget=0.5 of 6)"
    assert "layer_decay" not in lines[1]
    trainer.train()
    assert trainer.state.epoch == choice.num_epochs
    assert [stage["trained_from"] for stage in figures_of(trainer._record)["stages"]] == ["cache"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_part_of_an_epoch_may_be_chosen(train_dataset) -> None:
    settings = {"per_device_train_batch_size": 2, "label_names": ["labels"], "num_train_epochs": 2}
    trainer = auto_trainer(train_dataset, with_lora(), freeze={"budget": 0.9}, **settings)
    choice = choose(4, 2, 0.9, adapters=True, epoch_steps=25)
    assert choice.num_epochs % 1
    trainer.train()
    assert trainer.state.global_step == -(-25 * choice.num_epochs // 1)
    assert trainer.state.epoch == pytest.approx(choice.num_epochs, abs=0.05)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_where_steps_are_enough_adapters_of_all_blocks_train(images) -> None:
    settings = {"per_device_train_batch_size": 1, "label_names": ["labels"], "num_train_epochs": 3}
    trainer = auto_trainer(images, with_lora(), freeze={"budget": 0.5}, trainer=PAIR, **settings)
    assert (trainer.freeze_config.schedule, trainer.freeze_config.plain_epochs) == ("0:0", 2)
    assert ": 1.5 epochs without frozen blocks, " in trainer._record.chosen
    trainer.train()
    assert trainer.state.global_step == 75
    assert [stage["trained_from"] for stage in figures_of(trainer._record)["stages"]] == ["images"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_that_are_resumed_are_the_same_to_the_bit(train_dataset) -> None:
    settings = {"freeze": {"budget": 0.5}, "num_train_epochs": 6, "label_names": ["labels"], "save_strategy": "epoch"}
    whole = auto_trainer(train_dataset, with_lora(), **settings)
    whole.train()
    resumed = auto_trainer(train_dataset, with_lora(), **settings)
    resumed.train(resume_from_checkpoint="out/checkpoint-5")
    assert_same(parameters_of(whole.model), parameters_of(resumed.model))
