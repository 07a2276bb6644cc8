"""Blocks of which queries, keys and values train alone."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.parity import assert_resumes_everywhere, assert_same, parameters_of
from support.tiny import PAIR, Recorder, make_trainer, tiny_model, tiny_vit
from torch import nn

from hf_freezecache import FreezeConfig
from hf_freezecache.errors import UnsupportedSetupError
from hf_freezecache.model.attention_inputs import attention_inputs
from hf_freezecache.model.split import Splits
from hf_freezecache.report.cost import unfrozen_rate, unfrozen_seconds
from hf_freezecache.report.figures import figures_of
from hf_freezecache.report.text import describe_schedule

QKV = re.compile(r"\.(q_proj|k_proj|v_proj|query|key|value)\.")
BEHIND = re.compile(r"^(classifier|vit\.layernorm)\.")


def trainer_on(images: Any, mode: str = "always", model: Any = None, cls: type = Recorder, **settings: Any) -> Any:
    freeze = {"block_weights": "qkv", **settings.pop("freeze", {})}
    settings = {"schedule": "0:2", "num_train_epochs": 2, "freeze": freeze, "trainer": PAIR, **settings}
    model = tiny_vit() if model is None else model
    return make_trainer(model, images, cls=cls, cache={"mode": mode}, **settings)


def trained(*args: Any, resume: Any = None, **settings: Any) -> Any:
    trainer = trainer_on(*args, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def changed(model: nn.Module) -> set[str]:
    before = parameters_of(tiny_vit())
    return {name for name, value in parameters_of(model).items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize(("schedule", "first"), [("0:0", 0), ("0:2", 2), ("0:4,1:1", 1)])
def test_queries_keys_values_and_the_head_train_and_nothing_else(images, schedule, first) -> None:
    run = trained(images, schedule=schedule)
    names = [name for name, _ in run.model.named_parameters()]
    expected = {
        name
        for name in names
        if BEHIND.match(name) or (QKV.search(name) and int(re.search(r"\.(\d+)\.", name)[1]) >= first)
    }
    assert changed(run.model) == expected
    held = sum(len(group["params"]) for group in run.optimizer.param_groups)
    assert held == len(expected)
    # The model is given back as it came.
    assert all(parameter.requires_grad for parameter in run.model.parameters())


@pytest.mark.parametrize("family", ["vit", "deit", "beit", "dinov2", "clip", "siglip", "data2vec-vision", "ijepa"])
def test_the_layers_are_found_whatever_they_are_called(family) -> None:
    model = tiny_model(family)
    splits = Splits(model)
    names = {layer: name for name, layer in model.named_modules()}
    found = sorted(names[layer] for layer in attention_inputs(splits))
    expected = sorted(
        name
        for block in splits.blocks
        for layer, name in names.items()
        if isinstance(layer, nn.Linear) and layer in set(block.modules()) and QKV.search(f".{name.rpartition('.')[2]}.")
    )
    assert found == expected
    assert len(found) == 3 * splits.num_blocks


class FusedAttention(nn.Module):
    """Makes all three with one layer."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        queries, keys, values = self.qkv(states).chunk(3, -1)
        return self.proj((queries @ keys.transpose(1, 2) / 4).softmax(-1) @ values), None


def test_one_layer_for_all_three_is_found() -> None:
    model = tiny_vit()
    for block in model.vit.layers:
        block.attention = FusedAttention(block.attention)
    assert attention_inputs(Splits(model)) == [block.attention.qkv for block in model.vit.layers]


class ByFunctionAttention(FusedAttention):
    """Its layer of queries, keys and values is never called: only the one behind the attention is."""

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        made = nn.functional.linear(states, self.qkv.weight, self.qkv.bias)
        queries, keys, values = made.chunk(3, -1)
        return self.proj((queries @ keys.transpose(1, 2) / 4).softmax(-1) @ values), None


def test_a_layer_behind_the_attention_is_not_taken_for_one_in_front(images) -> None:
    model = tiny_vit()
    for block in model.vit.layers:
        block.attention = ByFunctionAttention(block.attention)
    assert attention_inputs(Splits(model)) == []
    with pytest.raises(UnsupportedSetupError, match="none was found"):
        trained(images, model=model)


def test_cached_equals_live_to_the_bit(images) -> None:
    live, cached = (trained(images, mode, schedule="0:4,1:2,2:0", num_train_epochs=3) for mode in ("never", "always"))
    assert live.losses == cached.losses
    assert_same(parameters_of(live.model), parameters_of(cached.model))


class Thawing(Recorder):
    """A callback of some users does this, to train a head first."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 1:
            self.model.requires_grad_(True)
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("own", [False, True])
def test_a_callback_that_thaws_everything_changes_nothing(images, own) -> None:
    model = tiny_vit()
    optimizers = {"optimizers": (torch.optim.AdamW(model.parameters(), lr=1e-3), None)} if own else {}
    run = trainer_on(images, schedule="0:2,1:0", model=model, trainer={**PAIR, **optimizers}, cls=Thawing)
    run.train()
    assert all(QKV.search(name) or BEHIND.match(name) for name in changed(run.model))
    qkv = sum(p.numel() for name, p in run.model.named_parameters() if QKV.search(name))
    behind = sum(p.numel() for name, p in run.model.named_parameters() if BEHIND.match(name))
    assert [one.trainable_parameters for one in run._record.decisions] == [qkv // 2 + behind, qkv + behind]


def test_an_optimizer_of_ones_own_gets_its_parameters_back(images) -> None:
    model = tiny_vit()
    own = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = trainer_on(images, model=model, trainer={**PAIR, "optimizers": (own, None)})
    run.train()
    assert len(own.param_groups[0]["params"]) < len(list(model.parameters()))
    run.freeze_config = FreezeConfig(schedule="0:0")
    run.train()
    assert len(own.param_groups[0]["params"]) == len(list(model.parameters()))


def test_resuming_with_other_weights_is_refused(images) -> None:
    settings = {"save_strategy": "epoch", "output_dir": "whole"}
    trained(images, **settings)
    with pytest.raises(UnsupportedSetupError, match=r"block_weights='qkv', and this run has 'all'"):
        trained(images, resume="whole/checkpoint-5", freeze={"block_weights": "all"}, output_dir="again")


def test_blocks_that_the_user_froze_to_the_same_are_no_adapters(images) -> None:
    model = tiny_vit(intermediate_size=64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(QKV.search(name) or BEHIND.match(name)))
    run = trained(images, model=model, schedule="0:0", save_strategy="epoch")
    assert run._record.decisions[0].trained_share < 0.25
    trained(images, model=model, schedule="0:0", output_dir="again", resume="out/checkpoint-5")


def test_what_it_costs(images) -> None:
    run = trained(images, schedule="0:4,1:0")
    head, rest = run._record.decisions
    parts = [p for block in run.model.vit.layers for p in block.parameters()]
    share = sum(p.numel() for n, p in run.model.named_parameters() if QKV.search(n)) / sum(p.numel() for p in parts)
    assert rest.trained_share == pytest.approx(share)
    assert rest.predicted["live_passes"] == pytest.approx(4 * (2 + share))
    assert head.predicted["live_passes"] == 4
    assert "queries, keys and values train alone" in describe_schedule(figures_of(run._record))
    # An epoch that trained a part of the weights is not taken for one that trained all.
    rate, epoch = unfrozen_rate(run._record), run._record.epochs[-1]
    assert rate.images_per_second == pytest.approx(epoch.images_per_second * (2 + share) / 3)
    seconds = unfrozen_seconds(run._record, rate)
    assert seconds[-1] - seconds[-2] == pytest.approx(epoch.images / rate.images_per_second)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["always", "never"])
def test_resuming_at_every_checkpoint(images, mode) -> None:
    settings = {"schedule": "0:4,1:0,3:1", "num_train_epochs": 5}
    assert_resumes_everywhere(partial(trained, images, mode, **settings))


def test_training_twice(images) -> None:
    run = trained(images)
    first = parameters_of(run.model)
    run.train()
    assert all(parameter.requires_grad for parameter in run.model.parameters())
    moved = {name for name, value in parameters_of(run.model).items() if not torch.equal(value, first[name])}
    assert moved
    assert all(QKV.search(name) or BEHIND.match(name) for name in moved)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_what_cannot_be_is_refused_before_anything_is_built(images) -> None:
    with pytest.raises(UnsupportedSetupError, match="block_weights"):
        FreezeConfig(schedule="0:0", block_weights="mlp")
    model = tiny_vit()
    for block in model.vit.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(block.attention, name).requires_grad_(False)
    with pytest.raises(UnsupportedSetupError, match=r"none requires a gradient.*Remove block_weights"):
        trained(images, model=model)
    model = tiny_vit()
    for block in model.vit.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(block.attention, name, NoLinear(getattr(block.attention, name)))
    with pytest.raises(UnsupportedSetupError, match=r"none was found.*torch\.nn\.Linear"):
        trained(images, model=model)
    peft = pytest.importorskip("peft")
    for rank in (8, 96):  # more of a block trains than does not
        config = peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        with pytest.raises(UnsupportedSetupError, match="adapters train in their place"):
            trained(images, model=peft.get_peft_model(tiny_vit(), config))
    assert not list(Path.cwd().rglob("index.json"))


class NoLinear(nn.Module):
    """A linear layer by another name."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states, self.weight, self.bias)
