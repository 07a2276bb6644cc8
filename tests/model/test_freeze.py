"""A frozen prefix does not move, does not draw random numbers, and costs no optimizer state."""

from __future__ import annotations

import functools

import pytest
import torch
from accelerate import Accelerator
from support.tiny import FAMILIES, IMAGE_SIZE, tiny_model, tiny_vit
from torch import nn
from transformers import ViTConfig

from hf_freezecache import split_model
from hf_freezecache.errors import UnsupportedSetupError
from hf_freezecache.model.freeze import (
    check_checkpointing,
    freeze,
    prune_optimizer,
)
from hf_freezecache.model.split import find_blocks

DROPOUT = {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4}


def batch_of(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "labels": torch.tensor([0, 3, 1, 2]),
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model.train()  # as Trainer does in every step
    optimizer.zero_grad()
    model(**batch_of(seed)).loss.backward()
    optimizer.step()


def clones(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_buffers_of_the_prefix_do_not_move(family) -> None:
    model = tiny_model(family)
    split = split_model(model, 2)
    freeze(split)
    frozen, buffers = clones(split.prefix_parameters()), clones(split.prefix_buffers())
    before = clones(dict(model.named_parameters()))
    # Weight decay and all parameters: what has no gradient must not decay either.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for number in range(3):
        step(model, optimizer, number)
    after = dict(model.named_parameters())
    assert len(frozen) >= 30
    for name, value in before.items():
        if name in frozen:
            assert torch.equal(value, after[name]), name
    blocks = {name for name in before if name.startswith(f"{split.blocks_name}.3.")}
    assert len(blocks) >= 12
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "classifier.weight" in moved
    assert len(blocks - moved) <= 1  # a key's bias moves no softmax
    for name, value in split.prefix_buffers().items():
        assert torch.equal(value, buffers[name]), name


class CountingBlock(nn.Module):
    """Block with a buffer that moves in train mode, as BatchNorm's statistics do."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, hidden_states):
        return hidden_states + self.attention(self.norm(hidden_states))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, hidden_states):
        return self.dropout(self.linear(hidden_states))


class NormViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = ViTConfig(image_size=4, num_channels=5)
        self.embeddings = nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), nn.BatchNorm1d(5), nn.Dropout(0.5))
        self.blocks = nn.ModuleList(CountingBlock() for _ in range(3))

    def forward(self, pixel_values):
        hidden_states = self.embeddings(pixel_values)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def test_running_statistics_of_the_prefix_do_not_move() -> None:
    model, images = NormViT(), torch.randn(6, 5, 4, 4)
    split = split_model(model, 2)
    before = clones(dict(model.named_buffers()))
    freeze(split)
    model.train()
    model(images)
    after = dict(model.named_buffers())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"blocks.2.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert split.prefix_buffers().keys() == before.keys() - moved


@pytest.mark.parametrize("family", ["vit", "dinov2", "beit"])
def test_prefix_is_deterministic_in_train_mode(family) -> None:
    overrides = DROPOUT if family != "dinov2" else {"hidden_dropout_prob": 0.4, "drop_path_rate": 0.5}
    model, images = tiny_model(family, **overrides), batch_of()["pixel_values"]
    split = split_model(model, 2)
    with torch.no_grad():
        expected = split.prefix(images) if not model.training else None
        model.train()
        assert not torch.equal(split.prefix(images), split.prefix(images))
        freeze(split)
        model.train()
        state = torch.get_rng_state()
        first = split.prefix(images)
        assert torch.equal(torch.get_rng_state(), state)
        model.train()
        second = split.prefix(images)
        model.eval()
        in_eval_mode = split.prefix(images)
        model.train()
        assert not torch.equal(split.suffix(first).logits, split.suffix(first).logits)
    assert torch.equal(first, second)
    assert torch.equal(first, in_eval_mode)
    assert expected is None or torch.equal(first, expected)


def test_prefix_is_in_eval_mode_after_a_forward_and_the_suffix_is_not() -> None:
    model = tiny_vit(**DROPOUT)
    split = split_model(model, 2)
    freeze(split)
    model.train()
    model(**batch_of())
    frozen = {child for module in split.prefix_modules() for child in module.modules()}
    assert len(frozen) > 20
    assert not any(child.training for child in frozen)
    rest = [child for name, child in model.named_modules() if child not in frozen]
    assert len(rest) > 20
    assert all(child.training for child in rest)


def test_freezing_drops_gradients_of_the_prefix_and_keeps_the_others() -> None:
    model = tiny_vit()
    model(**batch_of()).loss.backward()
    split = split_model(model, 2)
    freeze(split)
    frozen = split.prefix_parameters().keys()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name not in frozen), name
        assert (parameter.grad is None) == (name in frozen), name


def test_freezing_again_and_deeper_adds_one_hook_per_module() -> None:
    model = tiny_vit()
    for split_point in (1, 1, 2, 4):
        freeze(split_model(model, split_point))
    assert {len(module._forward_pre_hooks) for module in split_model(model, 4).prefix_modules()} == {1}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "vit.layernorm.weight",
        "vit.layernorm.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_thawing_undoes_one_freeze_and_leaves_what_the_user_froze() -> None:
    model = tiny_vit()
    model.vit.embeddings.cls_token.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    shallow = freeze(split_model(model, 1))
    between = {name: p.requires_grad for name, p in model.named_parameters()}
    deep = freeze(split_model(model, 3))
    deep.thaw()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == between
    shallow.thaw()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.train()
    model(**batch_of())
    assert all(module.training for module in model.modules())


def grouped(model: nn.Module) -> list[dict]:
    """Four groups, like Trainer's two of decayed and undecayed ones; the last is all of the prefix."""
    names = dict(model.named_parameters())
    biases = [p for name, p in names.items() if name.endswith("bias") and "embeddings" not in name]
    weights = [p for name, p in names.items() if not name.endswith("bias") and "embeddings" not in name]
    head = [p for name, p in names.items() if name.startswith("classifier")]
    head_set = set(head)
    return [
        {"params": [p for p in weights if p not in head_set], "weight_decay": 0.1, "lr": 0.01},
        {"params": [p for p in biases if p not in head_set], "weight_decay": 0.0, "lr": 0.02},
        {"params": head, "lr": 0.03, "name": "head"},
        {"params": [p for name, p in names.items() if "embeddings" in name], "lr": 0.04},
    ]


@pytest.mark.parametrize("accelerated", [False, True])
def test_pruning_keeps_groups_options_scheduler_and_counts_released_bytes(accelerated) -> None:
    model = tiny_vit()
    optimizer = torch.optim.AdamW(grouped(model))
    wrapped = Accelerator(cpu=True).prepare_optimizer(optimizer) if accelerated else optimizer
    assert (wrapped is optimizer) != accelerated
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 1 / (1 + number))
    step(model, optimizer, 0)
    scheduler.step()
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    orders = [list(group["params"]) for group in optimizer.param_groups]
    states = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    split = split_model(model, 3)
    freeze(split)
    frozen = set(split.prefix_parameters().values())
    # Two moments in fp32 and one fp32 counter for each.
    expected = sum(2 * 4 * p.numel() + 4 for p in frozen)

    assert prune_optimizer(wrapped, frozen) == expected

    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == options
    kept = [group["params"] for group in optimizer.param_groups]
    assert [[id(p) for p in group] for group in kept] == [[id(p) for p in order if p not in frozen] for order in orders]
    assert [len(group) > 0 for group in kept] == [True, True, True, False]
    assert optimizer.state.keys() == states.keys() - frozen
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(state[name], value) for name, value in states[parameter].items())
    assert prune_optimizer(wrapped, frozen) == 0

    step(model, optimizer, 1)
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.01 / 3, 0.02 / 3, 0.03 / 3, 0.04 / 3])
    assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()


def test_pruned_and_unpruned_optimizers_train_alike() -> None:
    def trained(prune: bool) -> dict[str, torch.Tensor]:
        model = tiny_vit()
        optimizer = torch.optim.AdamW(grouped(model))
        step(model, optimizer, 0)
        split = split_model(model, 2)
        freeze(split)
        optimizer.zero_grad()
        if prune:
            assert prune_optimizer(optimizer, split.prefix_parameters().values()) > 0
        step(model, optimizer, 1)
        return clones(dict(model.named_parameters()))

    pruned, unpruned = trained(True), trained(False)
    assert all(torch.equal(pruned[name], unpruned[name]) for name in unpruned)


def test_pruning_before_the_first_step_and_without_frozen_parameters_releases_nothing() -> None:
    model = tiny_vit()
    optimizer = torch.optim.AdamW(model.parameters())
    assert prune_optimizer(optimizer, []) == 0
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    split = split_model(model, 2)
    freeze(split)
    model.classifier.requires_grad_(False)  # by the user, who may thaw it: it stays
    assert prune_optimizer(optimizer, split.prefix_parameters().values()) == 0
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters())) - len(split.prefix_parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_is_refused(reentrant) -> None:
    model = tiny_vit()
    check_checkpointing(model)
    name, blocks = find_blocks(model)
    layer = blocks[1]
    layer._gradient_checkpointing_func = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
    if not reentrant:
        check_checkpointing(model)
        return
    with pytest.raises(UnsupportedSetupError, match=rf"'{name}.1'.*use_reentrant=True.*'use_reentrant': False"):
        check_checkpointing(model)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_as_transformers_enables_it_is_seen(reentrant) -> None:
    model = tiny_vit()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        with pytest.raises(UnsupportedSetupError, match="no gradients at all"):
            check_checkpointing(model)
    else:
        check_checkpointing(model)
