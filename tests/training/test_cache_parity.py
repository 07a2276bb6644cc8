"""A cache is a fast path: cached training against frozen, uncached training."""

from __future__ import annotations

import copy

import pytest
import torch
from support.parity import assert_same, parameters_of
from support.tiny import Recorder, make_trainer, tiny_model, tiny_vit
from transformers import Trainer


def run(train_dataset, mode: str, model=None, **settings):
    cache = {"mode": mode, "num_views": 2, **settings.pop("cache", {})}
    trainer = make_trainer(model or tiny_vit(), train_dataset, cache=cache, **settings)
    trainer.train()
    return trainer


@pytest.mark.by_default(1)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"dataloader_num_workers": 2},
        {"schedule": "0:0,1:2,3:4"},
        {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 3, "label_smoothing_factor": 0.1},
    ],
    ids=["plain", "accumulation", "bf16", "workers", "unfrozen-first", "scheduler"],
)
def test_cached_and_uncached_training_are_the_same_to_the_bit(train_dataset, settings) -> None:
    """50 rows in batches of 10: build and training batches have one shape."""
    live = run(train_dataset, "never", **settings)
    cached = run(train_dataset, "always", **settings)
    assert cached._run.step is not None
    assert live._run.step is None
    assert len(live.losses) == 20
    assert live.losses == cached.losses
    assert_same(parameters_of(live.model), parameters_of(cached.model))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deit", "clip", "beit", "data2vec-vision", "dinov2_with_registers"])
def test_cached_training_of_other_families(train_dataset, family) -> None:
    live = run(train_dataset, "never", tiny_model(family), num_train_epochs=3)
    cached = run(train_dataset, "always", tiny_model(family), num_train_epochs=3)
    assert live.losses == cached.losses
    assert_same(parameters_of(live.model), parameters_of(cached.model))


@pytest.mark.slow
def test_dropout_in_the_prefix_is_off_and_in_the_suffix_is_on(train_dataset) -> None:
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    live = run(train_dataset, "never", tiny_vit(**dropout))
    cached = run(train_dataset, "always", tiny_vit(**dropout))
    assert live.losses == cached.losses
    without = run(train_dataset, "always", tiny_vit(), cache={"cache_dir": "other"})
    assert without.losses[0] != cached.losses[0]


@pytest.mark.slow
def test_other_batch_shapes_stay_within_the_stated_bound(train_dataset) -> None:
    """Where a kernel sums in another order, per-step losses agree to 1e-5 relative."""
    live = run(train_dataset, "never", per_device_train_batch_size=7)
    cached = run(train_dataset, "always", per_device_train_batch_size=7, cache={"build_batch_size": 3})
    torch.testing.assert_close(torch.tensor(live.losses), torch.tensor(cached.losses), rtol=1e-5, atol=1e-6)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}])
def test_without_freeze_config_the_numbers_are_those_of_trainer(train_dataset, eval_dataset, settings) -> None:
    def trained(cls):
        trainer = make_trainer(tiny_vit(), train_dataset, eval_dataset, schedule=None, cls=Recorder, **settings)
        if cls is Trainer:
            trainer = Trainer(
                model=tiny_vit(), args=trainer.args, train_dataset=train_dataset, eval_dataset=eval_dataset
            )
        trainer.train()
        return trainer

    ours, theirs = trained(Recorder), trained(Trainer)
    history = [
        {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
        for entry in ours.state.log_history
    ]
    expected = [
        {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
        for entry in theirs.state.log_history
    ]
    assert history == expected
    assert len([entry for entry in history if "loss" in entry]) == ours.state.max_steps
    assert_same(parameters_of(ours.model), parameters_of(theirs.model))


@pytest.mark.parametrize("freeze", [{}, {"token_keep": 0.5}])
def test_a_cache_that_was_built_before_is_that_of_a_bf16_run(train_dataset, freeze) -> None:
    """Nobody has prepared the model for autocast then."""
    settings = {"schedule": "0:2", "bf16": True, "freeze": freeze}
    built = make_trainer(tiny_vit(), train_dataset, **settings)
    built.build_cache()
    assert "forward" not in vars(built.model)
    trainer = run(train_dataset, "always", **settings, cache={"num_views": 1})
    assert [one.cache for one in trainer._record.decisions] == ["found"]


def test_prefix_does_not_move_and_suffix_does(train_dataset) -> None:
    model = tiny_vit()
    before = parameters_of(copy.deepcopy(model))
    trainer = run(train_dataset, "always", model, schedule="0:2")
    frozen = trainer._run.current.split.prefix_parameters().keys()
    after = parameters_of(trainer.model)
    assert len(frozen) > 30
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in frozen), name
