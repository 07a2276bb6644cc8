"""A split model is the model: same outputs, same gradients, and nothing left behind."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import FAMILIES, IMAGE_SIZE, NUM_CLASSES, tiny_model, tiny_vit
from torch import nn
from transformers import ViTForImageClassification, ViTModel

from hf_freezecache import (
    Split,
    split_model,
)
from hf_freezecache.errors import UnsupportedModelError
from hf_freezecache.model.freeze import freeze
from hf_freezecache.model.split import find_blocks, first_tensor
from hf_freezecache.model.tokens import token_grid

NUM_BLOCKS = 4
POSITION_BIASES = [
    (family, bias)
    for family in ("beit", "data2vec-vision")
    for bias in ("use_shared_relative_position_bias", "use_relative_position_bias")
]


def batch_of(height: int = IMAGE_SIZE, width: int = IMAGE_SIZE) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.randn(3, 3, height, width, generator=generator),
        "labels": torch.tensor([0, 3, 1]),
    }


def assert_exact(model: nn.Module, split: Split, batch: dict[str, torch.Tensor], **extra) -> None:
    with torch.no_grad():
        whole = model(**batch, **extra)
        hidden_states = split.prefix(batch["pixel_values"], **extra)
        cut = split.suffix(hidden_states, batch["labels"], **extra)
    assert hidden_states.dim() == 3
    assert hidden_states.shape[0] == 3
    assert whole.loss is not None
    assert torch.equal(cut.logits, whole.logits)
    assert torch.equal(cut.loss, whole.loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_split_point_of_every_family_is_exact(family) -> None:
    model, batch = tiny_model(family).eval(), batch_of()
    for split_point in range(NUM_BLOCKS + 1):
        split = split_model(model, split_point)
        assert (split.split_point, split.num_blocks) == (split_point, NUM_BLOCKS)
        assert split.verify(batch) == 0.0
        assert_exact(model, split, batch)


@pytest.mark.parametrize(("family", "bias"), POSITION_BIASES)
def test_relative_position_biases_are_exact(family, bias) -> None:
    model, batch = tiny_model(family, **{bias: True}).eval(), batch_of()
    for split_point in range(NUM_BLOCKS + 1):
        assert_exact(model, split_model(model, split_point), batch)


@pytest.mark.parametrize(("family", "bias"), POSITION_BIASES)
@pytest.mark.parametrize("size", [(24, 24), (16, 24)])
def test_families_that_read_the_image_size_get_the_true_one(family, bias, size) -> None:
    """Their position biases depend on height and width, which the suffix sees on the placeholder only."""
    model, batch = tiny_model(family, **{bias: True}).eval(), batch_of(*size)
    for split_point in (0, 2, NUM_BLOCKS):
        assert_exact(model, split_model(model, split_point), batch)


@pytest.mark.by_default(3)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(24, 24), (16, 24)])
def test_interpolated_position_codes_are_exact(family, size) -> None:
    model, batch = tiny_model(family).eval(), batch_of(*size)
    for split_point in (0, 2, NUM_BLOCKS):
        split = split_model(model, split_point)
        split.prefix_modules()
        assert_exact(model, split, batch, interpolate_pos_encoding=True)


@pytest.mark.by_default(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_on_images_of_another_size_may_come_first(family) -> None:
    model, batch = tiny_model(family).eval(), batch_of(24, 24)
    assert_exact(model, split_model(model, 2), batch, interpolate_pos_encoding=True)


@pytest.mark.by_default(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_suffix_are_those_of_the_model(family) -> None:
    batch = batch_of()
    for split_point in range(NUM_BLOCKS + 1):
        model = tiny_model(family)
        split = split_model(model, split_point)
        freeze(split)
        frozen = split.prefix_parameters().keys()
        model.train()
        torch.manual_seed(5)  # BEiT and Data2Vec drop whole paths at random; the frozen prefix draws nothing
        model(**batch).loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        assert {name for name in frozen if expected[name] is not None} == set()
        model.zero_grad()
        with torch.no_grad():
            hidden_states = split.prefix(batch["pixel_values"])
        torch.manual_seed(5)
        split.suffix(hidden_states, batch["labels"]).loss.backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        assert sum(g is not None for g in found.values()) >= 2
        for name, gradient in expected.items():
            assert (gradient is None) == (found[name] is None), name
            assert gradient is None or torch.equal(gradient, found[name]), name


@pytest.mark.by_default(3)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split_point", [0, 2, NUM_BLOCKS])
def test_suffix_uses_what_is_injected_and_nothing_of_the_prefix(family, split_point) -> None:
    model, batch = tiny_model(family).eval(), batch_of()
    split = split_model(model, split_point)
    with torch.no_grad():
        hidden_states = split.prefix(batch["pixel_values"])
        exact = split.suffix(hidden_states).logits
        other = split.suffix(hidden_states.roll(1, dims=0)).logits
        assert torch.equal(other, exact.roll(1, dims=0))
        assert not torch.equal(other, exact)
        for parameter in split.prefix_parameters().values():
            parameter.fill_(float("nan"))
        assert torch.equal(split.suffix(hidden_states).logits, exact)


def test_prefix_modules_of_the_suffix_never_run() -> None:
    model, batch = tiny_vit().eval(), batch_of()
    split = split_model(model, 2)
    split.prefix_modules()  # traces the model once, on a blank image
    hidden_states = split.prefix(batch["pixel_values"])
    ran: list[int] = []
    for number, block in enumerate(find_blocks(model)[1]):
        # On a submodule: instance patches of the blocks themselves still call hooks.
        first_child = next(block.children())
        first_child.register_forward_hook(lambda *_, number=number: ran.append(number))
    split.suffix(hidden_states)
    assert sorted(set(ran)) == [2, 3]
    ran.clear()
    split.prefix(batch["pixel_values"])
    assert sorted(set(ran)) == [0, 1]


def snapshot(model: nn.Module) -> tuple:
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [name for name, _ in model.named_modules()],
        {name: module.training for name, module in model.named_modules()},
        {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        [name for name, module in model.named_modules() if "forward" in vars(module)],
        [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks],
    )


def assert_same_snapshot(before: tuple, after: tuple) -> None:
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]
    assert after[4] == []


@pytest.mark.by_default(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_unchanged_after_use(family) -> None:
    model, batch = tiny_model(family), batch_of()
    model.train()
    blocks = find_blocks(model)[1]
    blocks[1].eval()
    next(blocks[0].parameters()).requires_grad_(False)
    before = snapshot(model)
    for split_point in (0, 2, NUM_BLOCKS):
        split = split_model(model, split_point)
        split.verify(batch)
        split.prefix_parameters()
        with torch.no_grad():
            split.suffix(split.prefix(batch["pixel_values"]))
    assert_same_snapshot(before, snapshot(model))


def test_model_is_unchanged_after_an_error_in_the_suffix() -> None:
    model = tiny_vit()
    before = snapshot(model)
    split = split_model(model, 2)
    with pytest.raises(RuntimeError):
        split.suffix(torch.zeros(3, 17, 5))
    with pytest.raises(ValueError, match="doesn't match"):
        split.prefix(torch.zeros(3, 3, 9, 9))
    assert_same_snapshot(before, snapshot(model))


@pytest.mark.by_default(4)
@pytest.mark.parametrize(
    ("family", "overrides"), [*((f, {}) for f in FAMILIES), *((f, {b: True}) for f, b in POSITION_BIASES)]
)
@pytest.mark.parametrize("split_point", [0, 2, NUM_BLOCKS])
def test_prefix_parameters_are_those_the_hidden_states_depend_on(family, overrides, split_point) -> None:
    """Seen by changing them one at a time; parameters of prefix modules that matter for nothing count as well."""
    model, batch = tiny_model(family, **overrides).eval(), batch_of()
    split = split_model(model, split_point)
    members = {p for module in split.prefix_modules() for p in module.parameters()}
    frozen = split.prefix_parameters()
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p in members} <= frozen.keys()
    assert list(frozen) == [name for name in parameters if name in frozen]
    assert all(frozen[name] is parameters[name] for name in frozen)
    with torch.no_grad():
        before = split.prefix(batch["pixel_values"])
        for name, parameter in parameters.items():
            kept = parameter.clone()
            # Times three, as an offset alone may be lost in a softmax.
            parameter.mul_(3).add_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))
            matters = not torch.equal(split.prefix(batch["pixel_values"]), before)
            parameter.copy_(kept)
            if matters:
                assert name in frozen, name
            elif name in frozen:
                assert parameter in members, name
    assert len(frozen) < len(parameters)


class LoosePositions(nn.Module):
    """Position codes that belong to no module that runs before the blocks, and a parameter used by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PlainViT()
        self.config = self.inner.config
        self.positions = nn.Parameter(torch.randn(8))
        self.inner.embeddings.unused = nn.Parameter(torch.randn(8))
        self.inner.embeddings.register_forward_hook(lambda module, args, output: output + self.positions)

    def forward(self, pixel_values):
        return self.inner(pixel_values)


def test_prefix_parameters_may_lie_outside_of_the_prefix_modules() -> None:
    split = split_model(LoosePositions(), 1)
    assert "positions" in split.prefix_parameters()
    assert "inner.embeddings.unused" in split.prefix_parameters()
    assert len(split.prefix_parameters()) == 2 + 2 + 2


@pytest.mark.by_default(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_grow_block_by_block(family) -> None:
    model = tiny_model(family)
    prefixes = [set(split_model(model, split_point).prefix_parameters()) for split_point in range(NUM_BLOCKS + 1)]
    name, blocks = find_blocks(model)
    for split_point, block in enumerate(blocks):
        added = prefixes[split_point + 1] - prefixes[split_point]
        assert added == {f"{name}.{split_point}.{child}" for child, _ in block.named_parameters()}


def test_placeholder_takes_no_memory_and_has_the_true_shape() -> None:
    split = split_model(tiny_vit(), 2)
    assert split.placeholder(1000).shape == (1000, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert split.placeholder(1000).untyped_storage().nbytes() == 4
    split.prefix(torch.zeros(1, 3, 16, 24), interpolate_pos_encoding=True)
    assert split.placeholder(2).shape == (2, 3, 16, 24)


def test_half_precision_model_is_exact() -> None:
    model, batch = tiny_vit().eval().to(torch.bfloat16), batch_of()
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    split = split_model(model, 2)
    assert split.verify(batch) == 0.0
    assert split.prefix(batch["pixel_values"]).dtype == torch.bfloat16


def test_tracing_works_within_no_grad() -> None:
    model = tiny_vit()
    expected = split_model(model, 2).prefix_parameters().keys()
    with torch.no_grad():
        assert split_model(model, 2).prefix_parameters().keys() == expected
    with torch.inference_mode(False), torch.autocast("cpu", torch.bfloat16):
        assert split_model(model, 2).prefix_parameters().keys() == expected


@pytest.mark.parametrize("split_point", [-1, NUM_BLOCKS + 1, 2.0, "2", None])
def test_impossible_split_points_are_refused(split_point) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        split_model(tiny_vit(), split_point)
    message = str(caught.value)
    assert repr(split_point) in message
    assert "4 blocks" in message
    assert "from 0 to 4" in message
    assert isinstance(caught.value, ValueError)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))

    def forward(self, pixel_values):
        return self.stages(pixel_values)


class NoLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)


class SelfAttention(nn.Module):
    def forward(self, hidden_states):
        return hidden_states


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states):
        return hidden_states + self.linear(self.attention(hidden_states))


class PlainViT(nn.Module):
    """No configuration, no transformers; ``order`` says which blocks run."""

    def __init__(self, order=(0, 1, 2), embed=True) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=(4, 8), num_channels=3)
        self.order, self.embed = order, embed
        self.embeddings = nn.Linear(32, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, pixel_values):
        hidden_states = pixel_values.flatten(2)
        hidden_states = self.embeddings(hidden_states) if self.embed else hidden_states[:, :, :8]
        for number in self.order:
            hidden_states = self.blocks[number](hidden_states)
        return self.head(hidden_states.mean(1))


def test_any_model_of_this_shape_is_split() -> None:
    model = PlainViT()
    for split_point in range(4):
        split = split_model(model, split_point)
        assert split.blocks_name == "blocks"
        assert split.image_shape == (3, 4, 8)
        assert split.verify({"pixel_values": torch.randn(2, 3, 4, 8)}) == 0.0
        assert len(split.prefix_parameters()) == 2 + 2 * split_point


@pytest.mark.parametrize(("model", "found"), [(ConvNet(), "['stages']"), (NoLists(), "no list of modules at all")])
def test_a_model_without_attention_is_refused_and_told_what_was_looked_for(model, found) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        split_model(model, 1)
    message = str(caught.value)
    assert type(model).__name__ in message
    assert (
        "looked for a ModuleList or Sequential of at least two modules of one class that contain attention" in message
    )
    assert found in message


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (PlainViT(order=(0, 1)), "ran 2 times"),
        (PlainViT(order=(0, 1, 2, 2)), "ran 4 times"),
        (PlainViT(embed=False), "0 modules ran before"),
    ],
    ids=["skips a block", "repeats a block", "no embeddings"],
)
def test_a_model_whose_blocks_do_not_run_once_each_is_refused(model, words) -> None:
    split = split_model(model, 1)
    with pytest.raises(UnsupportedModelError, match=words):
        split.prefix_parameters()
    assert "forward" not in vars(model.embeddings)


def test_a_model_that_cannot_be_traced_is_refused_with_the_reason() -> None:
    model = tiny_vit()
    model.config.image_size = 20
    with pytest.raises(UnsupportedModelError, match=r"\(1, 3, 20, 20\) failed with ValueError: Input image size"):
        split_model(model, 2).prefix_parameters()


class ShortcutViT(ViTForImageClassification):
    """Looks at the image again behind the encoder, which no suffix can reproduce."""

    def forward(self, pixel_values=None, **kwargs):
        output = super().forward(pixel_values=pixel_values, **kwargs)
        output.logits = output.logits + pixel_values.mean(dim=(1, 2, 3))[:, None]
        return output


class DriftingViT(ViTForImageClassification):
    """Gives other logits in each call."""

    strength = 1.0
    calls = 0

    def forward(self, pixel_values=None, **kwargs):
        output = super().forward(pixel_values=pixel_values, **kwargs)
        self.calls += 1
        output.logits = output.logits + self.strength * self.calls
        return output


@pytest.mark.parametrize("split_point", [0, 2, NUM_BLOCKS])
def test_a_model_that_its_split_does_not_reproduce_is_refused_with_the_difference(split_point) -> None:
    batch = batch_of()
    model = ShortcutViT(tiny_vit().config)
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"ShortcutViT cannot be split .* \(largest difference nan,"):
        split_model(model, split_point).verify(batch)
    assert all(module.training for module in model.modules())
    drifting = DriftingViT(tiny_vit().config)
    with pytest.raises(UnsupportedModelError, match=r"DriftingViT cannot be split .* \(largest difference [12],"):
        split_model(drifting, split_point).verify(batch)


def test_tolerance_of_verify_is_relative_and_zero_on_a_cpu() -> None:
    batch = batch_of()
    model = DriftingViT(tiny_vit().config)
    model.strength = 1e-5
    with torch.no_grad():
        model.classifier.weight.mul_(0.01)  # a head with small outputs
    split = split_model(model, 2)
    split.prefix_modules()
    with pytest.raises(UnsupportedModelError, match="expected at most 0 relative"):
        split.verify(batch)
    largest = model(pixel_values=batch["pixel_values"]).logits.abs().max().item()
    assert largest < 0.1
    with pytest.raises(UnsupportedModelError):
        split.verify(batch, tolerance=0.5e-5 / largest)
    assert 0 < split.verify(batch, tolerance=2e-5 / largest) < 3e-5


def test_verify_refuses_nan_and_other_shapes() -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(UnsupportedModelError, match="largest difference nan"):
        split_model(model, 2).verify(batch_of())


@pytest.mark.by_default(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_state_dicts_of_a_frozen_model_are_ordinary(family, tmp_path) -> None:
    model, batch = tiny_model(family), batch_of()
    keys = list(model.state_dict())
    split = split_model(model, 2)
    freeze(split)
    split.suffix(split.prefix(batch["pixel_values"]), batch["labels"]).loss.backward()
    twin = copy.deepcopy(model)
    assert list(model.state_dict()) == list(twin.state_dict()) == keys
    fresh = tiny_model(family)
    fresh.load_state_dict(twin.state_dict())
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        assert torch.equal(twin.eval()(**batch).logits, expected)
        assert torch.equal(fresh.eval()(**batch).logits, expected)
        assert torch.equal(split_model(twin, 2).suffix(split.prefix(batch["pixel_values"])).logits, expected)
    # A copy made while a suffix runs would take patched modules along; afterwards it must not.
    assert not any("forward" in vars(module) for module in twin.modules())


# The new name of `gradient_checkpointing_enable` does not exist in the oldest supported transformers.
OLD_NAME = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")


@pytest.mark.by_default(3)
@OLD_NAME
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_gives_the_same_gradients(family) -> None:
    batch = batch_of()

    def gradients(checkpointing: bool) -> tuple[dict[str, torch.Tensor], float]:
        model = tiny_model(family)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        split = split_model(model, 2)
        freeze(split)
        with torch.no_grad():
            hidden_states = split.prefix(batch["pixel_values"])
        torch.manual_seed(5)
        loss = split.suffix(hidden_states, batch["labels"]).loss
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loss.item()

    plain, checkpointed = gradients(False), gradients(True)
    assert plain[1] == checkpointed[1]
    assert len(plain[0]) > 10
    assert plain[0].keys() == checkpointed[0].keys()
    for name, gradient in plain[0].items():
        assert torch.equal(gradient, checkpointed[0][name]), name


# ---- From one split point to a later one ----


@pytest.mark.by_default(4)
@pytest.mark.parametrize(
    ("family", "overrides"), [*((f, {}) for f in FAMILIES), *((f, {b: True}) for f, b in POSITION_BIASES)]
)
def test_blocks_between_two_split_points_give_the_later_prefix(family, overrides) -> None:
    model, batch = tiny_model(family, **overrides).eval(), batch_of()
    with torch.no_grad():
        prefixes = [split_model(model, k).prefix(batch["pixel_values"]) for k in range(NUM_BLOCKS + 1)]
        for start in range(NUM_BLOCKS):
            for stop in range(start + 1, NUM_BLOCKS + 1):
                found = split_model(model, start).run_blocks(prefixes[start], stop)
                assert torch.equal(found, prefixes[stop]), (start, stop)


@pytest.mark.parametrize("family", ["vit", "beit", "data2vec-vision", "clip"])
def test_blocks_between_know_the_size_of_the_images(family) -> None:
    """As told: a split that never saw an image reads it from the model's configuration."""
    overrides = {} if family in ("vit", "clip") else {"use_relative_position_bias": True}
    model, pixel_values = tiny_model(family, **overrides).eval(), batch_of(16, 24)["pixel_values"]
    extra = {"interpolate_pos_encoding": True}
    with torch.no_grad():
        earlier, expected = (split_model(model, k).prefix(pixel_values, **extra) for k in (1, 3))
        split = split_model(model, 1, image_shape=(3, 16, 24))
        assert torch.equal(split.run_blocks(earlier, 3, **extra), expected)


@pytest.mark.parametrize("stop", [-1, 0, 1, 2, NUM_BLOCKS + 1])
def test_blocks_between_must_lie_behind_the_split_point(stop) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"from block 2 to {stop}; expected 3 to {NUM_BLOCKS}"):
        split_model(tiny_vit(), 2).run_blocks(torch.zeros(3, 17, 16), stop)


@pytest.mark.by_default(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_unchanged_after_between_and_outputs(family) -> None:
    model, batch = tiny_model(family), batch_of()
    model.train()
    before = snapshot(model)
    with torch.no_grad():
        hidden_states = split_model(model, 1).prefix(batch["pixel_values"])
        split_model(model, 1).run_blocks(hidden_states, 3)
        split_model(model, 1).logits_and_features(hidden_states)
        with pytest.raises(RuntimeError):
            split_model(model, 1).run_blocks(torch.zeros(3, 17, 5), 3)
        with pytest.raises(RuntimeError):
            split_model(model, 1).logits_and_features(torch.zeros(3, 17, 5))
    assert_same_snapshot(before, snapshot(model))


# ---- What the head saw ----


@pytest.mark.by_default(3)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split_point", [0, 2, NUM_BLOCKS])
def test_outputs_are_the_logits_and_what_the_head_makes_them_of(family, split_point) -> None:
    model, batch = tiny_model(family).eval(), batch_of()
    split = split_model(model, split_point)
    with torch.no_grad():
        logits, features = split.logits_and_features(split.prefix(batch["pixel_values"]))
        assert torch.equal(logits, model(batch["pixel_values"]).logits)
        assert features.dim() == 2
        assert torch.equal(model.classifier(features), logits)


def test_without_a_head_the_output_stands_for_the_features() -> None:
    model, pixel_values = ViTModel(tiny_vit().config, add_pooling_layer=False).eval(), batch_of()["pixel_values"]
    split = split_model(model, 2)
    with torch.no_grad():
        output, features = split.logits_and_features(split.prefix(pixel_values))
        assert torch.equal(output, model(pixel_values).last_hidden_state)
    assert torch.equal(features, output.flatten(1))


def test_the_last_layer_of_a_deep_head_is_the_head() -> None:
    model = PlainViT()
    model.head = nn.Sequential(nn.Linear(8, NUM_CLASSES), nn.Tanh(), nn.Linear(NUM_CLASSES, NUM_CLASSES))
    split, pixel_values = split_model(model, 1), torch.randn(5, 3, 4, 8)
    with torch.no_grad():
        output, features = split.logits_and_features(split.prefix(pixel_values))
        assert torch.equal(output, model(pixel_values))
        assert torch.equal(model.head[2](features), output)
        assert features.abs().max() < 1


class HeadlessViT(nn.Module):
    """Its only linear layer outside the blocks makes the embeddings, as wide as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PlainViT()
        self.inner.head = nn.Identity()
        self.config = self.inner.config

    def forward(self, pixel_values):
        return self.inner(pixel_values)


def test_embeddings_are_not_taken_for_the_head() -> None:
    split = split_model(HeadlessViT(), 1)
    pixel_values = torch.randn(5, 3, 4, 8)
    with torch.no_grad():
        output, features = split.logits_and_features(split.prefix(pixel_values))
    assert torch.equal(features, output)


# ---- How tokens lie on the image ----


@pytest.mark.parametrize(
    ("family", "overrides", "size", "expected"),
    [
        ("vit", {}, (16, 16), (1, (4, 4))),
        ("vit", {}, (16, 24), (1, (4, 6))),
        ("vit", {}, (32, 12), (1, (8, 3))),
        ("deit", {}, (16, 16), (2, (4, 4))),
        ("siglip", {}, (16, 16), (0, (4, 4))),
        ("clip", {}, (24, 16), (1, (6, 4))),
        ("ijepa", {}, (16, 16), (0, (4, 4))),
        ("dinov2_with_registers", {"num_register_tokens": 4}, (16, 16), (5, (4, 4))),
    ],
)
def test_tokens_of_models_lie_on_their_images(family, overrides, size, expected) -> None:
    model = tiny_model(family, **overrides).eval()
    with torch.no_grad():
        hidden_states = split_model(model, 2).prefix(batch_of(*size)["pixel_values"], interpolate_pos_encoding=True)
    assert token_grid(hidden_states.shape[1], (3, *size), model.config) == expected
    # The proportions of the image tell the same.
    assert token_grid(hidden_states.shape[1], (3, *size)) == expected


@pytest.mark.parametrize(
    ("num_tokens", "size", "patch_size", "expected"),
    [
        (197, (224, 224), 16, (1, (14, 14))),
        (198, (224, 224), 16, (2, (14, 14))),
        (261, (224, 224), 14, (5, (16, 16))),
        (50, (224, 224), 32, (1, (7, 7))),
        (50, (224, 224), None, (1, (7, 7))),
        (50, (224, 224), (32, 32), (1, (7, 7))),  # not a number: by proportions
        (50, (224, 224), 0, (1, (7, 7))),
        (50, (225, 230), 32, (1, (7, 7))),  # what is left of the last patch is cut off
        (50, (225, 230), None, (0, (1, 50))),
        (49, (224, 224), 16, (0, (7, 7))),  # merged patches
        (37, (96, 100), 16, (1, (6, 6))),
        (6, (40, 100), 20, (0, (1, 6))),  # fewer tokens than patches
        (66, (224, 224), 32, (2, (8, 8))),  # 49 patches would leave 17 prefix tokens
        (16, (16, 16), 1, (0, (4, 4))),
        (1, (224, 224), None, (0, (1, 1))),
        (3, (64, 48), None, (0, (1, 3))),  # 2 rows of one and a half
        (27, (64, 48), None, (15, (4, 3))),
    ],
)
def test_tokens_lie_on_a_grid_of_the_images_proportions(num_tokens, size, patch_size, expected) -> None:
    config = None if patch_size is None else SimpleNamespace(patch_size=patch_size)
    assert token_grid(num_tokens, (3, *size), config) == expected
    assert token_grid(num_tokens, (3, *size), SimpleNamespace(vision_config=config)) == expected


@given(st.integers(1, 400), st.integers(1, 12), st.integers(1, 12), st.integers(1, 20), st.none() | st.integers(-1, 40))
def test_every_token_is_a_prefix_token_or_has_its_place(num_tokens, height, width, scale, patch_size) -> None:
    height, width = scale * height, scale * width
    config = SimpleNamespace(patch_size=patch_size)
    prefix_tokens, (rows, columns) = token_grid(num_tokens, (3, height, width), config)
    assert 0 <= prefix_tokens <= 16
    assert min(rows, columns) > 0
    assert prefix_tokens + rows * columns == num_tokens


def test_first_tensor_finds_it_in_any_output() -> None:
    tensor = torch.ones(2)
    for output in (tensor, (None, tensor, torch.zeros(1)), [tensor], {"loss": None, "logits": tensor}):
        assert first_tensor(output) is tensor


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_model(tiny_vit(), 2).verify(batch_of())
