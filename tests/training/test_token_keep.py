"""Steps on some of the patch tokens: cached equals live, whatever the process, and models that cannot are refused."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.parity import assert_resumes_everywhere, assert_same, parameters_of
from support.tiny import Recorder, make_trainer, tiny_model, tiny_vit
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, ViTForImageClassification, set_seed

from hf_freezecache.data.kept_tokens import KEPT_TOKENS
from hf_freezecache.errors import UnsupportedModelError
from hf_freezecache.model.probe import find_blocks
from hf_freezecache.report.figures import figures_of
from hf_freezecache.report.text import stage_account
from hf_freezecache.training.fewer_tokens import why_not_fewer_tokens

#: The tiny models have CLS and 16 patches.
HALF = {"token_keep": 0.5}


def trainer_on(rows: Any, mode: str, model: Any = None, cls: type = Recorder, **settings: Any) -> Any:
    cache = {"mode": mode, "num_views": 2, **settings.pop("cache", {})}
    settings = {"num_train_epochs": 2, "schedule": "0:0,1:2", "freeze": HALF, **settings}
    return make_trainer(tiny_vit() if model is None else model, rows, cls=cls, cache=cache, **settings)


def trained(rows: Any, mode: str, model: Any = None, cls: type = Recorder, resume: Any = None, **settings: Any) -> Any:
    trainer = trainer_on(rows, mode, model, cls, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Watching(Recorder):
    """Keeps the shape of what reaches the first block that trains, and what a loss and the collator of the user's own see."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.names = getattr(self, "names", set()) | set(inputs)
        blocks, shapes = find_blocks(self.model)[1], self.__dict__.setdefault("shapes", [])
        handle = blocks[-1].register_forward_pre_hook(lambda block, args: shapes.append(tuple(args[0].shape)))
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            handle.remove()


def test_cached_equals_live_to_the_bit(train_dataset, eval_dataset) -> None:
    """An unfrozen stage sees all tokens, and so does evaluation."""
    runs = [trained(train_dataset, mode, cls=Watching) for mode in ("never", "always")]
    live, cached = runs
    assert live.losses == cached.losses
    assert_same(parameters_of(live.model), parameters_of(cached.model))
    for run in runs:
        assert run.shapes == [(10, 17, 16)] * 5 + [(10, 9, 16)] * 5
        assert run.names == {"pixel_values", "labels"}
        run.shapes.clear()
        run.evaluate(eval_dataset)
        assert set(run.shapes) == {(8, 17, 16), (4, 17, 16)}
        assert [decision.token_keep for decision in run._record.decisions] == [1.0, 0.5]
    # 6 operations per trainable parameter and token, and 2 per frozen one where frozen blocks run.
    step, model = cached._run.step, cached.model
    split = cached._run.current.split
    trains = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in split.prefix_parameters().values())
    for parameter in split.prefix_parameters().values():
        parameter.requires_grad_(False)
    packed = next(iter(cached._run.current.loader))
    assert step.floating_point_ops(packed) == 6 * 10 * 9 * trains
    assert cached._run.current.decision.predicted == {
        "cached_passes": 3 * 2 * 0.5 + 2 * 2,
        "live_passes": 3 * 2 * 0.5 + 2,
    }
    whole = figures_of(cached._record)
    assert "a random 50% of the patch tokens" in stage_account(whole["stages"][1])
    assert "patch tokens" not in stage_account(whole["stages"][0])


SETTINGS: dict[str, dict[str, Any]] = {
    "views and stages": {"num_train_epochs": 6, "schedule": "0:0,1:1,3:3,5:4", "cache": {"num_views": 3}},
    "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "num_train_epochs": 3},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "a quarter": {"freeze": {"token_keep": 0.25}},
    "one patch": {"freeze": {"token_keep": 0.01}},
    "nearly all": {"freeze": {"token_keep": 0.99}},
}


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing:FutureWarning"
)  # the new name is not in the oldest transformers
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_cached_equals_live_under_other_settings(train_dataset, settings) -> None:
    live, cached = (trained(train_dataset, mode, **settings) for mode in ("never", "always"))
    assert live.losses == cached.losses
    assert_same(parameters_of(live.model), parameters_of(cached.model))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deit", "vit_msn", "ijepa", "dinov2", "dinov2_with_registers", "siglip", "clip"])
def test_families_whose_blocks_ignore_the_order_of_patches(train_dataset, family) -> None:
    live, cached = (trained(train_dataset, mode, tiny_model(family)) for mode in ("never", "always"))
    assert live.losses == cached.losses
    assert_same(parameters_of(live.model), parameters_of(cached.model))


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_leaves_the_same_tokens(train_dataset, monkeypatch) -> None:
    from hf_freezecache.errors import CacheWriteError
    from hf_freezecache.training.stage_cache import StageCache

    live = trained(train_dataset, "never")

    def full(self, split):
        raise CacheWriteError("No space is left.")

    monkeypatch.setattr(StageCache, "open", full)
    fallen_back = trained(train_dataset, "auto")
    assert fallen_back._record.decisions[-1].trained_from == "images"
    assert fallen_back.losses == live.losses


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_tokens(train_dataset) -> None:
    settings = {"schedule": "0:2", "save_strategy": "steps", "save_steps": 7}
    whole = trained(train_dataset, "always", output_dir="whole", **settings)
    resumed = trained(train_dataset, "always", output_dir="again", resume="whole/checkpoint-7", **settings)
    assert resumed.losses == whole.losses[7:]
    assert_same(parameters_of(resumed.model), parameters_of(whole.model))


@pytest.mark.slow
def test_caches_do_not_depend_on_the_tokens(train_dataset) -> None:
    runs = [
        trained(train_dataset, "always", freeze={"token_keep": keep}, schedule="0:2", num_train_epochs=1)
        for keep in (0.5, 0.25, 1.0)
    ]
    assert [run._record.decisions[0].cache for run in runs] == ["built", "found", "found"]
    assert len({run.losses[0] for run in runs}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["always", "never"])
def test_resuming_at_every_checkpoint(train_dataset, mode) -> None:
    settings = {"num_train_epochs": 4, "schedule": "0:0,1:1,2:3"}
    assert_resumes_everywhere(partial(trained, train_dataset, mode, **settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    "cache",
    [
        {"codec": "auto", "num_views": 3, "copies": "residual"},
        {"codec": "int8"},
        {"codec": "transform", "bits_per_element": 4.0},
        {"codec": "auto", "num_views": 3, "copies": "sensitive"},
        {"codec": "auto", "num_views": 3, "copies": "full"},
    ],
    ids=str,
)
def test_lossy_caches(train_dataset, cache) -> None:
    cached = trained(train_dataset, "always", schedule="0:2", num_train_epochs=2, cache=cache)
    live = trained(
        train_dataset, "never", schedule="0:2", num_train_epochs=2, cache={"num_views": cache.get("num_views", 2)}
    )
    torch.testing.assert_close(torch.tensor(cached.losses), torch.tensor(live.losses), rtol=0.05, atol=0.05)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("text", ["cutmix:1.0,brightness:0.2", "mixup:0.5", "token_dropout:0.3"])
def test_feature_augmentation_sees_all_tokens(train_dataset, text) -> None:
    model, shapes = tiny_vit(), []
    find_blocks(model)[1][-1].register_forward_pre_hook(lambda block, args: shapes.append(tuple(args[0].shape)))
    trained(train_dataset, "always", model, schedule="0:2", max_steps=2, cache={"feature_augmentation": text})
    assert shapes[-2:] == [(10, 9, 16)] * 2


# ---- Models that cannot ----


class Convolving(ViTForImageClassification):
    """A head that puts the patches back into their grid, whatever their number."""

    def __init__(self, config):
        super().__init__(config)
        self.mixer = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, pixel_values=None, labels=None, **kwargs):
        tokens = self.vit(pixel_values).last_hidden_state
        logits = self.classifier(self.mixer(tokens[:, 1:].transpose(1, 2)).relu().mean(2))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if labels is not None else {"logits": logits}


class Biased(ViTForImageClassification):
    """A bias by position that is zero at first, as a new one is, and fits any number of tokens."""

    def __init__(self, config):
        super().__init__(config)
        self.bias = nn.Parameter(torch.zeros(64, 16))

    def forward(self, pixel_values=None, labels=None, **kwargs):
        tokens = self.vit(pixel_values).last_hidden_state
        logits = self.classifier((tokens[:, 1:] * (1 + self.bias[: tokens.shape[1] - 1])).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if labels is not None else {"logits": logits}


def custom(kind: type) -> Any:
    set_seed(0)
    return kind(tiny_vit().config)


def family(name: str, **sizes: Any) -> Any:
    config = AutoConfig.for_model(name, image_size=16, patch_size=2, num_labels=4, **sizes)
    set_seed(0)
    return AutoModelForImageClassification.from_config(config)


CANNOT = {
    "a zero bias": lambda: custom(Biased),
    "a position bias": lambda: tiny_model("beit", use_relative_position_bias=True),
    "a grid in the head": lambda: custom(Convolving),
    "tuples and a bias": lambda: tiny_model("data2vec-vision", use_relative_position_bias=True),
    "windows": lambda: family("swin", embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2),
}


@pytest.mark.by_default(2)
@pytest.mark.parametrize("mode", ["never", "always", "auto"])
@pytest.mark.parametrize("make", CANNOT.values(), ids=CANNOT)
def test_models_that_know_where_a_patch_lies_are_refused(train_dataset, make, mode) -> None:
    trainer = trainer_on(train_dataset, mode, make(), schedule="0:1", num_train_epochs=1)
    with pytest.raises(UnsupportedModelError, match=r"token_keep=0\.5 behind 1 frozen blocks: .*Set FreezeConfig"):
        trainer.train()
    assert not list(Path("caches").rglob("*.safetensors"))


def test_a_training_step_that_does_not_call_ours_is_refused(train_dataset) -> None:
    class Own(Recorder):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs = {name: value for name, value in inputs.items() if name != KEPT_TOKENS}
            loss = self.compute_loss(model, inputs)
            loss.backward()
            return loss.detach()

    with pytest.raises(UnsupportedModelError, match="training_step does not hand its batch to that of its base class"):
        trained(train_dataset, "never", cls=Own, schedule="0:2", num_train_epochs=1)


@pytest.mark.slow
def test_one_may_ask_beforehand(train_dataset, caplog) -> None:
    answers = {}
    for name in ("vit", "beit"):
        model = tiny_model(name, **({"use_relative_position_bias": True} if name == "beit" else {}))
        trainer = trained(train_dataset, "never", model, schedule="0:2", max_steps=1, freeze={})
        run = trainer._run
        with caplog.at_level(logging.WARNING):
            answers[name] = why_not_fewer_tokens(run.splits.at(2), 0.5, run.runtime, run.data.example_batch)
    assert answers["vit"] is None
    assert "9 of 17 tokens do not run" in answers["beit"] or "where each patch lies" in answers["beit"]
