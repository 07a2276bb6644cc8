"""``schedule="auto"``: what a budget pays for, and what it refuses."""

from __future__ import annotations

import pytest
from support.auto import QKV, SeesEarlierBlocks, auto_trainer
from support.tiny import PAIR, tiny_vit

from hf_freezecache import FreezeConfig
from hf_freezecache.errors import ScheduleError, UnsupportedSetupError
from hf_freezecache.report.figures import figures_of


@pytest.mark.by_default(13)
@pytest.mark.parametrize(
    "freeze",
    [
        {"block_weights": "qkv"},
        {"block_weights": "all"},
        {},
        {"head_rows": 0.1},
        {"block_weights": "qkv", "head_rows": 0.3},
    ],
    ids=["queries", "frozen", "free", "frozen, few rows", "queries, few rows"],
)
@pytest.mark.parametrize(("epochs", "budget"), [(1.2, 1.0), (2.5, 0.9), (1.0, 1.0), (3.0, 0.35)])
@pytest.mark.parametrize("batch", [10, 16, 50])
def test_a_budget_is_not_passed_whatever_epochs_and_batches_are(images, freeze, epochs, budget, batch) -> None:
    """Steps are whole, the last of an epoch may be a small one, and the user's last epoch a part of one."""
    settings = {"num_train_epochs": epochs, "per_device_train_batch_size": batch, "trainer": PAIR}
    trainer = auto_trainer(images, freeze={**freeze, "budget": budget}, cache={"mode": "always"}, **settings)
    trainer.train()
    figures = figures_of(trainer._record)
    assert f"(budget={budget:g} of {epochs:g})" in figures["freezing"]["chosen"]
    assert 0 < sum(stage["passes_spent"] for stage in figures["stages"]) / 12 <= epochs * budget * 1.001


@pytest.mark.parametrize("head_rows", [None, 0.2])
def test_nor_where_the_head_has_to_see_images_in_each_epoch(images, head_rows) -> None:
    needy, settings = SeesEarlierBlocks(tiny_vit().config), {"num_train_epochs": 1, "trainer": PAIR}
    trainer = auto_trainer(images, needy, freeze={**QKV, "budget": 0.9, "head_rows": head_rows}, **settings)
    trainer.train()
    figures = figures_of(trainer._record)
    assert [stage["trained_from"] for stage in figures["stages"]] == ["images", "images"]
    assert 0.7 < sum(stage["passes_spent"] for stage in figures["stages"]) / 12 <= 0.9


def test_without_a_budget_a_part_of_an_epoch_stays_one(images) -> None:
    trainer = auto_trainer(
        images, model=tiny_vit(hidden_size=192, intermediate_size=768), num_train_epochs=2.5, trainer=PAIR
    )
    assert (trainer.freeze_config.schedule, trainer.freeze_config.plain_epochs) == ("0:4,2:0", 3)
    assert trainer.args.num_train_epochs == 4.5
    assert trainer._record.chosen.startswith("schedule='auto' keeps the 2.5 epochs asked for: ")


def test_a_budget_needs_the_rule(train_dataset) -> None:
    with pytest.raises(UnsupportedSetupError, match=r"budget=0\.5 is for schedule='auto'"):
        FreezeConfig("0:1", budget=0.5)
    with pytest.raises(UnsupportedSetupError, match="max_steps=4 fixes how long to train"):
        auto_trainer(train_dataset, freeze={"budget": 0.5}, max_steps=4)
    with pytest.raises(ScheduleError, match="Set budget to at least"):
        auto_trainer(train_dataset, freeze={"budget": 0.1}, num_train_epochs=1)
    with pytest.raises(UnsupportedSetupError, match="expected a number above 0 and at most 1"):
        FreezeConfig("auto", budget=1.5)


def test_small_budgets_of_long_runs_are_fine(train_dataset) -> None:
    trainer = auto_trainer(train_dataset, freeze={"budget": 3e-7}, num_train_epochs=4000000)
    assert trainer.freeze_config.lr_scale.endswith("4:1e+03")
