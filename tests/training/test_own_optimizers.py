"""Going on from a checkpoint, optimizers and schedulers that are the user's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.parity import assert_same, parameters_of
from support.tiny import make_trainer, tiny_vit

from hf_freezecache.errors import UnsupportedSetupError

# ---- Going on ----


@pytest.mark.by_default(1)
@pytest.mark.parametrize("changed", [{"per_device_train_batch_size": 5}, {"gradient_accumulation_steps": 1}])
def test_a_run_whose_epochs_have_more_steps_is_not_resumed_where_fewer_blocks_are_frozen(
    train_dataset, changed
) -> None:
    """The optimizer of the checkpoint knows the blocks no more that this epoch trains: they would stay as they are, unseen."""
    settings = {"schedule": "0:0,2:2", "num_train_epochs": 4, "save_strategy": "steps", "save_steps": 1}
    settings |= {"gradient_accumulation_steps": 2} if "gradient_accumulation_steps" in changed else {}
    whole = make_trainer(tiny_vit(), train_dataset, **settings)
    whole.train()
    step = whole.state.max_steps // 2 + 1
    resumed = make_trainer(tiny_vit(), train_dataset, output_dir="again", **{**settings, **changed})
    with pytest.raises(UnsupportedSetupError, match=r"epochs had fewer|more steps now.*Resume with the batch size"):
        resumed.train(resume_from_checkpoint=f"out/checkpoint-{step}")
    # In the stage of the checkpoint it goes on.
    same = make_trainer(tiny_vit(), train_dataset, output_dir="again", **{**settings, **changed})
    same.train(resume_from_checkpoint=f"out/checkpoint-{whole.state.max_steps}")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_with_a_name_is_resumed(train_dataset) -> None:
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        return peft.get_peft_model(tiny_vit(), config, adapter_name="digits")

    settings = {"schedule": "0:2", "num_train_epochs": 2, "save_strategy": "epoch"}
    whole = make_trainer(adapted(), train_dataset, **settings)
    whole.train()
    for asked in (True, "out/checkpoint-5"):
        resumed = make_trainer(adapted(), train_dataset, **settings)
        resumed.train(resume_from_checkpoint=asked)
        assert_same(parameters_of(resumed.model), parameters_of(whole.model))


# ---- Optimizers ----


@pytest.mark.by_default(2)
@pytest.mark.parametrize("collected", [list, iter, tuple])
@pytest.mark.parametrize("schedule", ["0:0,1:2", "0:2,1:0"])
def test_groups_of_an_optimizers_class_and_arguments_stay(train_dataset, collected, schedule) -> None:
    model = tiny_vit()
    groups = [
        {"params": collected(model.vit.parameters()), "lr": 1e-5},
        {"params": collected(model.classifier.parameters()), "lr": 1e-2},
    ]
    asked = (torch.optim.AdamW, {"params": collected(groups), "lr": 1e-3, "weight_decay": 0.0})
    trainer = make_trainer(
        model, train_dataset, None, schedule, num_train_epochs=2, trainer={"optimizer_cls_and_kwargs": asked}
    )
    for _ in range(2):
        trainer.train()
        found = [(group["initial_lr"], len(group["params"])) for group in trainer.optimizer.param_groups]
        assert [rate for rate, _ in found] == [1e-5, 1e-2]
        assert found[1][1] == 2
        trained_too = sum(p.requires_grad for p in model.vit.parameters()) if schedule == "0:2,1:0" else None
        assert trained_too is None or found[0][1] == trained_too
    assert set(groups[0]) == {"params", "lr"}  # the user's own are as they were


def test_auto_keeps_to_the_steps_of_a_scheduler_of_the_users_own(train_dataset) -> None:
    def made(freeze: dict[str, Any], **settings: Any):
        model = tiny_vit()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        # Raises on a step more.
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=30)
        own = {"optimizers": (optimizer, scheduler)}
        return make_trainer(
            model, train_dataset, None, "auto", trainer=own, freeze=freeze, num_train_epochs=6, **settings
        )

    trainer = made({})
    assert trainer.args.num_train_epochs == 6
    trainer.train()
    assert trainer.state.global_step == 30
    with pytest.raises(UnsupportedSetupError, match="learning-rate scheduler that was passed"):
        made({"budget": 0.5})
    assert made({}, max_steps=30).args.max_steps == 30
