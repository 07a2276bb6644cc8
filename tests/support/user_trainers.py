"""Trains as a user of ``Trainer`` does, on images and from a cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from support.parity import assert_same, parameters_of
from support.tiny import make_trainer, tiny_vit


def trained(rows, mode: str = "always", **settings: Any):
    cache = {"mode": mode, "cache_dir": f"caches-{mode}", **settings.pop("cache", {})}
    model = tiny_vit(**settings.pop("model", {}))
    trainer = make_trainer(model, rows, cache=cache, **{"schedule": "0:2", "num_train_epochs": 2, **settings})
    trainer.train()
    return trainer


def assert_cached_as_live(rows, **settings: Any):
    """Train on images and from a cache; losses and weights must be the same."""
    live, cached = (trained(rows, mode, **settings) for mode in ("never", "always"))
    assert [one.trained_from for one in cached._record.decisions if one.split_point] == ["cache"]
    np.testing.assert_equal(cached.losses, live.losses)  # NaN in the same places
    assert_same(parameters_of(cached.model), parameters_of(live.model))
    return live, cached
