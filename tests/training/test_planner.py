"""Planner rules: one more is a function and its name."""

from __future__ import annotations

import pytest
from support.tiny import make_trainer, tiny_vit

from hf_freezecache.training.planner import PLANNER_RULES, Outlook


@pytest.mark.usefixtures("always_paying")
def test_a_rule_decides_that_a_stage_is_trained_without_a_cache(train_dataset, monkeypatch) -> None:
    def too_short(outlook: Outlook) -> str | None:
        short = outlook.config.mode == "auto" and outlook.passes["cached_passes"] > outlook.passes["live_passes"]
        return "Building a cache takes more block passes than it saves." if short else None

    monkeypatch.setattr("hf_freezecache.training.planner.PLANNER_RULES", [*PLANNER_RULES, too_short])
    trainer = make_trainer(
        tiny_vit(), train_dataset, schedule="0:1,3:3", num_train_epochs=4, cache={"mode": "auto", "num_views": 2}
    )
    trainer.train()
    first, second = trainer._record.decisions
    assert first.cache == "built"  # 2 views for 3 epochs
    assert (second.cache, second.trained_from) == ("none", "images")
    assert second.reason == "Building a cache takes more block passes than it saves."
