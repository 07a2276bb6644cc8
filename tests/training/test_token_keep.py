"""Steps on some of the patch tokens: cached equals live, whatever the process, and models that cannot are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.parity import assert_same, parameters_of
from support.tiny import Recorder, TinyTransform, make_trainer, tiny_model, tiny_vit

from hf_freezecache import CacheConfig, FreezeConfig


def trained(
    rows: Any, mode: str, model: Any = None, keep: float = 0.5, resume: Any = None, **settings: Any
) -> Recorder:
    settings = {"num_train_epochs": 3, "schedule": "0:0,1:1,2:3", **settings}
    trainer = make_trainer(
        tiny_vit() if model is None else model,
        rows,
        cache={"mode": mode, "num_views": 2, **settings.pop("cache", {})},
        **settings,
    )
    trainer.freeze_config = FreezeConfig(trainer.freeze_config.schedule, token_keep=keep)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_cached_equals_live_to_the_bit(train_dataset) -> None:
    live, cached = (trained(train_dataset, mode) for mode in ("never", "always"))
    assert len(live.losses) == 15
    assert live.losses == cached.losses
    assert_same(parameters_of(live.model), parameters_of(cached.model))
    whole = trained(train_dataset, "always", keep=1.0)
    assert whole.losses[:5] == cached.losses[:5]
    assert not set(whole.losses[5:]) & set(cached.losses[5:])
