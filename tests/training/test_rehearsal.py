"""Cached training is the same as training on images, or it is refused before anything is built."""

from __future__ import annotations

import copy
import functools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.parity import assert_same, parameters_of
from support.tiny import Recorder, make_trainer, tiny_vit
from torch import nn
from transformers import TrainerCallback, ViTForImageClassification, ViTModel

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.data.seeding import random_states
from hf_freezecache.errors import DataError, FreezeCacheError, UnsupportedModelError, UnsupportedSetupError
from hf_freezecache.model.split import find_blocks, first_tensor
from hf_freezecache.training.draws import drawing
from hf_freezecache.training.frozen_weights import _sum_of_bits


def losses_of(trainer_class, model, train_dataset, mode: str, cache_dir: Path, **settings) -> tuple[list[float], dict]:
    cache = {"mode": mode, "freezecache_dir": str(cache_dir)}
    settings = {"schedule": "0:2", "num_train_epochs": 1, **settings}
    trainer = make_trainer(copy.deepcopy(model), train_dataset, cls=trainer_class, cache=cache, **settings)
    trainer.train()
    return trainer.losses, parameters_of(trainer.model)


def assert_the_same_or_refused(trainer_class, model, train_dataset, tmp_path: Path) -> FreezeCacheError | None:
    """Train cached and on images; return the error of a run that is refused."""
    caches = tmp_path / "caches"
    live = losses_of(trainer_class, model, train_dataset, "never", caches)
    try:
        cached = losses_of(trainer_class, model, train_dataset, "always", caches)
    except FreezeCacheError as error:
        assert not list(caches.rglob("*.safetensors"))
        return error
    assert cached[0] == live[0]
    assert_same(cached[1], live[1])
    return None


def own_loss(function):
    """Return a trainer whose loss is ``function(trainer, model, inputs)``."""

    class OwnLoss(Recorder):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs, loss = function(self, model, dict(inputs))
            return (loss, outputs) if return_outputs else loss

    return OwnLoss


def _cross_entropy(outputs, labels):
    return nn.functional.cross_entropy(first_tensor(outputs.logits), labels)


def reads_hidden_states(trainer, model, inputs):
    labels = inputs.pop("labels")
    outputs = model(**inputs, output_hidden_states=True)
    return outputs, _cross_entropy(outputs, labels) + 0.1 * outputs.hidden_states[1].square().mean()


def reads_attentions(trainer, model, inputs):
    labels = inputs.pop("labels")
    outputs = model(**inputs, output_attentions=True)
    return outputs, _cross_entropy(outputs, labels) + outputs.attentions[0].square().mean()


def reads_pixels(trainer, model, inputs):
    outputs = model(**inputs)
    return outputs, outputs.loss + 1e-9 * inputs["pixel_values"].mean()


def mixes(trainer, model, inputs):
    labels = inputs.pop("labels")
    weight, order = torch.rand(()) * 0.5, torch.randperm(len(labels))
    pixels = inputs["pixel_values"]
    outputs = model(pixel_values=torch.lerp(pixels, pixels[order], weight))
    return outputs, (1 - weight) * _cross_entropy(outputs, labels) + weight * _cross_entropy(outputs, labels[order])


def concatenates(trainer, model, inputs):
    pixels = inputs.pop("pixel_values")
    outputs = model(pixel_values=torch.cat([pixels, pixels.flip(-1)]), labels=inputs.pop("labels").repeat(2))
    return outputs, outputs.loss


def in_two_halves(trainer, model, inputs):
    halves = [
        model(pixel_values=p, labels=y)
        for p, y in zip(inputs["pixel_values"].chunk(2), inputs["labels"].chunk(2), strict=True)
    ]
    return halves[0], sum(half.loss for half in halves) / len(halves)


def with_a_teacher(trainer, model, inputs):
    if not hasattr(trainer, "teacher"):
        trainer.teacher = tiny_vit().eval()
    with torch.no_grad():
        target = trainer.teacher(pixel_values=inputs["pixel_values"]).logits
    outputs = model(**inputs)
    return outputs, outputs.loss + (outputs.logits - target).square().mean()


REFUSED_LOSSES = [
    reads_hidden_states,
    reads_attentions,
    reads_pixels,
    mixes,
    concatenates,
    in_two_halves,
    with_a_teacher,
]


@pytest.mark.by_default(3)
@pytest.mark.parametrize("loss", REFUSED_LOSSES, ids=lambda loss: loss.__name__)
def test_a_loss_that_reads_what_a_cached_step_does_not_have_is_refused(loss, train_dataset, tmp_path) -> None:
    model = tiny_vit(attn_implementation="eager")
    error = assert_the_same_or_refused(own_loss(loss), model, train_dataset, tmp_path)
    assert isinstance(error, UnsupportedModelError)
    assert "cannot be trained from a cache behind 2 frozen blocks" in str(error)


def reads_later_states(trainer, model, inputs):
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    penalty = outputs.hidden_states[2].square().mean() + outputs.hidden_states[-1].mean() + outputs.attentions[2].mean()
    return outputs, outputs.loss + penalty


def twice(trainer, model, inputs):
    first, second = model(**inputs), model(**inputs)
    return first, first.loss + (first.logits - second.logits).square().mean()


def smooths(trainer, model, inputs):
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    return outputs, nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.1)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("loss", [reads_later_states, twice, smooths], ids=lambda loss: loss.__name__)
def test_a_loss_of_what_the_suffix_gives_is_exact(loss, train_dataset, tmp_path) -> None:
    model = tiny_vit(attn_implementation="eager", hidden_dropout_prob=0.1)
    assert assert_the_same_or_refused(own_loss(loss), model, train_dataset, tmp_path) is None


class Wrapped(nn.Module):
    """A model around a model, as users write them."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit


class MirrorsInTraining(Wrapped):
    def forward(self, pixel_values, labels=None):
        return self.vit(pixel_values=pixel_values.flip(-1) if self.training else pixel_values, labels=labels)


class JittersInTraining(Wrapped):
    def forward(self, pixel_values, labels=None):
        if self.training:
            pixel_values = torch.where(
                torch.rand(len(pixel_values), 1, 1, 1) < 0.5, pixel_values.flip(-1), pixel_values
            )
        return self.vit(pixel_values=pixel_values, labels=labels)


class ReconstructsWithLabels(Wrapped):
    def forward(self, pixel_values, labels=None):
        outputs = self.vit(pixel_values=pixel_values, labels=labels)
        if labels is not None:
            outputs.loss = outputs.loss + (outputs.logits.mean() - pixel_values.mean()).square()
        return outputs


class SkipsFromTheFirstBlock(Wrapped):
    """The path around the middle begins at zero, as in ReZero, so that at first nothing tells of it."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values, labels=None):
        outputs = self.vit(pixel_values=pixel_values, output_hidden_states=True)
        features = outputs.hidden_states[1].mean((1, 2)) * self.gate
        logits = outputs.logits + features[:, None]
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


REFUSED_MODELS = [MirrorsInTraining, JittersInTraining, ReconstructsWithLabels, SkipsFromTheFirstBlock]


@pytest.mark.by_default(2)
@pytest.mark.parametrize("wrapper", REFUSED_MODELS)
def test_a_model_that_uses_the_image_or_early_states_elsewhere_is_refused(wrapper, train_dataset, tmp_path) -> None:
    error = assert_the_same_or_refused(Recorder, wrapper(tiny_vit()), train_dataset, tmp_path)
    assert isinstance(error, UnsupportedModelError)


class MasksByTheHead(Wrapped):
    """The second block sees the tokens that the head is sure of: no gradient goes through that choice."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        find_blocks(vit)[1][1].register_forward_pre_hook(self.mask)

    def mask(self, block, args):
        sure = self.vit.classifier(args[0]).softmax(-1).amax(-1, keepdim=True) > 0.3
        return (args[0] * sure, *args[1:])

    def forward(self, pixel_values, labels=None):
        return self.vit(pixel_values=pixel_values, labels=labels)


@pytest.mark.parametrize("schedule", ["0:1", "0:2"])
def test_frozen_blocks_that_depend_on_a_trained_head_are_found(schedule, train_dataset, tmp_path) -> None:
    """They give the same in the first step. The block that is not frozen may depend on it."""
    model = MasksByTheHead(tiny_vit())
    error = losses = None
    try:
        losses = losses_of(Recorder, model, train_dataset, "always", tmp_path / "caches", schedule=schedule)
    except UnsupportedModelError as raised:
        error = str(raised)
    if schedule == "0:1":
        assert losses[0] == losses_of(Recorder, model, train_dataset, "never", tmp_path / "caches", schedule="0:1")[0]
    else:
        assert "others once the weights behind them have been trained" in error
        assert not (tmp_path / "caches").exists()


class BiasedWithoutGradients(Wrapped):
    """As in LayoutLMv3: a parameter that no gradient reaches stays as it is."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        self.bias = nn.Parameter(torch.ones(1))
        find_blocks(vit)[1][0].register_forward_pre_hook(self.add)

    def add(self, block, args):
        with torch.no_grad():
            bias = self.bias * 2
        return (args[0] + bias, *args[1:])

    def forward(self, pixel_values, labels=None):
        return self.vit(pixel_values=pixel_values, labels=labels)


def test_a_parameter_that_no_gradient_reaches_is_no_weight_that_trains(train_dataset, tmp_path) -> None:
    model = BiasedWithoutGradients(tiny_vit())
    assert assert_the_same_or_refused(Recorder, model, train_dataset, tmp_path) is None


class WakesUp(Wrapped):
    """Nothing that the blocks give reaches the head until that has been trained."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        nn.init.zeros_(vit.classifier.weight)
        find_blocks(vit)[1][-1].register_forward_hook(self.mask)

    def mask(self, block, args, output):
        hidden_states = first_tensor(output)
        return hidden_states * (self.vit.classifier(hidden_states).amax(-1, keepdim=True) > 0.1)

    def forward(self, pixel_values, labels=None):
        return self.vit(pixel_values=pixel_values, labels=labels)


def trains_on_other_images(trainer, model, inputs):
    outputs = model(pixel_values=torch.ones(inputs["pixel_values"].shape), labels=inputs["labels"])
    return outputs, outputs.loss


def test_a_loss_of_other_images_is_refused_before_the_model_wakes_up(train_dataset, tmp_path) -> None:
    error = assert_the_same_or_refused(own_loss(trains_on_other_images), WakesUp(tiny_vit()), train_dataset, tmp_path)
    assert "once weights have been trained" in str(error)


class NormalisesFirst(Wrapped):
    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        self.normalise = nn.BatchNorm2d(3, affine=False)

    def forward(self, pixel_values, labels=None):
        return self.vit(pixel_values=self.normalise(pixel_values) / 0.5, labels=labels)


@pytest.mark.slow
def test_a_normaliser_in_front_of_the_model_is_exact(train_dataset, tmp_path) -> None:
    model = NormalisesFirst(tiny_vit())
    assert assert_the_same_or_refused(Recorder, model, train_dataset, tmp_path) is None


class OnceMore(Wrapped):
    """Runs its encoder twice, so that no block runs once."""

    def forward(self, pixel_values, labels=None):
        first, second = (self.vit(pixel_values=each, labels=labels) for each in (pixel_values, pixel_values.flip(-1)))
        return {"loss": first.loss + second.loss, "logits": first.logits}


@pytest.mark.parametrize("mode", ["auto", "never"])
def test_a_model_that_cannot_be_split_is_trained_on_images_unless_a_cache_is_asked_for(
    mode, train_dataset, tmp_path
) -> None:
    caches = tmp_path / "caches"
    trainer = make_trainer(
        OnceMore(tiny_vit()), train_dataset, schedule="0:2", num_train_epochs=1, cache={"mode": mode}
    )
    frozen = [p.clone() for p in find_blocks(trainer.model)[1][1].parameters()]
    trainer.train()
    decision = trainer._record.decisions[0]
    assert (decision.trained_from, decision.cache) == ("images", "none")
    if mode == "auto":
        assert "ran 8 times for one image" in decision.reason
    assert all(map(torch.equal, frozen, find_blocks(trainer.model)[1][1].parameters()))
    assert not caches.exists()
    with pytest.raises(UnsupportedModelError, match="ran 8 times for one image"):
        make_trainer(OnceMore(tiny_vit()), train_dataset, schedule="0:2").train()
    assert not caches.exists()


@pytest.mark.parametrize("mode", ["always", "never"])
def test_a_stage_that_trains_nothing_is_refused(mode, train_dataset, tmp_path) -> None:
    model = tiny_vit()
    for parameter in model.classifier.parameters():
        parameter.requires_grad_(False)
    for parameter in model.vit.layernorm.parameters():
        parameter.requires_grad_(False)
    trainer = make_trainer(model, train_dataset, schedule="0:1,2:4", cache={"mode": mode})
    with pytest.raises(
        UnsupportedSetupError, match=r"Nothing is left to train in the stage from epoch 2.*modules_to_save"
    ):
        trainer.train()
    assert not (tmp_path / "caches").exists()


def of_another_size(trainer, model, inputs):
    outputs = model(**inputs, interpolate_pos_encoding=True)
    return outputs, outputs.loss


@pytest.mark.slow
def test_constants_that_a_loss_passes_to_the_model_reach_the_prefix(train_dataset, tmp_path) -> None:
    model = tiny_vit(image_size=32)  # the images have 16 pixels
    assert assert_the_same_or_refused(own_loss(of_another_size), model, train_dataset, tmp_path) is None


class HidesItsArguments(Wrapped):
    """As PEFT's models: its signature tells nothing of what the model inside takes."""

    def forward(self, *args, **kwargs):
        return self.vit(*args, **kwargs)


def test_inputs_that_only_kwargs_carry_reach_the_prefix(train_dataset, tmp_path) -> None:
    def collate(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        masks = pixel_values.mean(1)[:, ::4, ::4].flatten(1) > 0
        labels = torch.tensor([example["labels"] for example in examples])
        return {"pixel_values": pixel_values, "labels": labels, "bool_masked_pos": masks}

    config = tiny_vit().config
    vit = ViTForMaskedPositions(config)
    with torch.no_grad():
        vit.vit.embeddings.mask_token.normal_()
    settings = {"trainer": {"data_collator": collate}}
    live = losses_of(Recorder, HidesItsArguments(vit), train_dataset, "never", tmp_path / "caches", **settings)
    cached = losses_of(Recorder, HidesItsArguments(vit), train_dataset, "always", tmp_path / "caches", **settings)
    assert cached[0] == live[0]
    assert_same(cached[1], live[1])


class ViTForMaskedPositions(ViTForImageClassification):
    """Hides patches that the batch names."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False, use_mask_token=True)

    def forward(self, pixel_values=None, labels=None, bool_masked_pos=None, num_items_in_batch=None):
        states = self.vit(pixel_values=pixel_values, bool_masked_pos=bool_masked_pos).last_hidden_state
        logits = self.classifier(states[:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_loss_that_fails_is_refused_with_what_was_collated(train_dataset, tmp_path) -> None:
    def collate(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixel_values, "labels": torch.tensor([float(e["labels"]) for e in examples])}

    trainer = make_trainer(tiny_vit(), train_dataset, trainer={"data_collator": collate})
    with pytest.raises(DataError, match=r"A training step on the first rows fails.*labels float32 \(10,\)"):
        trainer.train()
    assert not (tmp_path / "caches").exists()


def test_a_loss_that_begins_to_read_images_later_raises_instead_of_training_on_nothing(train_dataset) -> None:
    def later(trainer, model, inputs):
        outputs = model(**inputs)
        if len(getattr(trainer, "losses", ())) == 3:
            return outputs, outputs.loss + outputs.hidden_states[0].mean()
        return outputs, outputs.loss

    model = tiny_vit(output_hidden_states=True)
    trainer = make_trainer(model, train_dataset, schedule="0:2", num_train_epochs=1, cls=own_loss(later))
    with pytest.raises(UnsupportedSetupError, match="A hidden state of a frozen block is read"):
        trainer.train()
    assert len(trainer.losses) == 3


def test_rehearsing_leaves_no_trace(train_dataset) -> None:
    """A run after a rehearsal trains on the same numbers as one without."""
    trainer = make_trainer(tiny_vit(hidden_dropout_prob=0.2), train_dataset, schedule="0:2", num_train_epochs=1)
    trainer.train()
    again = make_trainer(tiny_vit(hidden_dropout_prob=0.2), train_dataset, schedule="0:2", num_train_epochs=1)
    again_steps: list[int] = []

    def no_rehearsal(run, wrapped):
        again_steps.append(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_freezecache.training.preflight.rehearse", no_rehearsal)
        again.train()
    assert again_steps == [0]
    assert trainer.losses == again.losses
    assert_same(parameters_of(trainer.model), parameters_of(again.model))


def from_the_middle_on(trainer, model, inputs):
    outputs = model(**inputs)
    if trainer.state.epoch is not None and trainer.state.epoch > 0.4:
        return outputs, outputs.loss + inputs["pixel_values"].mean()
    return outputs, outputs.loss


@pytest.mark.slow
def test_a_loss_that_reads_images_later_in_the_run_is_refused_at_its_start(train_dataset, tmp_path) -> None:
    error = assert_the_same_or_refused(own_loss(from_the_middle_on), tiny_vit(), train_dataset, tmp_path)
    assert "pixel_values is read" in str(error)


class KeepsAnAttention(Wrapped):
    """A hook inside the first block keeps what it saw; nothing in there runs in a cached step."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        find_blocks(vit)[1][0].attention.register_forward_hook(self.keep)
        self.kept = None

    def keep(self, module, args, output):
        self.kept = output[0] if isinstance(output, tuple) else output

    def forward(self, pixel_values, labels=None):
        outputs = self.vit(pixel_values=pixel_values, labels=labels)
        outputs.loss = outputs.loss * (1 + self.kept.square().mean())
        return outputs


class AveragesItsInput(Wrapped):
    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, pixel_values, labels=None):
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * pixel_values.mean())
        return self.vit(pixel_values=pixel_values, labels=labels)


@pytest.mark.parametrize("wrapper", [KeepsAnAttention, AveragesItsInput])
@pytest.mark.slow
def test_what_is_kept_of_earlier_steps_is_not_taken_for_this_one(wrapper, train_dataset, tmp_path) -> None:
    model = wrapper(tiny_vit())
    trainer = make_trainer(model, train_dataset, schedule="0:2", num_train_epochs=1)
    with pytest.raises(UnsupportedModelError):
        trainer.train()
    assert not (tmp_path / "caches").exists()


def hardest_of_the_batch(trainer, model, inputs):
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    return outputs, nn.functional.cross_entropy(outputs.logits, labels, reduction="none").topk(4).values.mean()


@pytest.mark.slow
def test_a_loss_that_needs_a_whole_batch_gets_one(train_dataset, tmp_path) -> None:
    assert assert_the_same_or_refused(own_loss(hardest_of_the_batch), tiny_vit(), train_dataset, tmp_path) is None


class CountsLabels(Recorder):
    """Keeps state of its own in place: a tensor, and averaged weights."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if not hasattr(self, "counts"):
            self.counts = torch.ones(4)
        self.counts += torch.bincount(inputs["labels"], minlength=4)
        with torch.no_grad():
            weight = model.classifier.weight
            weight.add_(0.1).sub_(0.1)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits + self.counts.log(), labels)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.slow
def test_state_of_a_loss_is_that_of_training_alone(train_dataset, tmp_path) -> None:
    assert assert_the_same_or_refused(CountsLabels, tiny_vit(), train_dataset, tmp_path) is None
    trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:2", num_train_epochs=1, cls=CountsLabels)
    trainer.train()
    assert trainer.counts.sum() == 4 + 50


def test_frozen_blocks_that_a_callback_changes_end_a_cached_stage(train_dataset) -> None:
    class Writes(TrainerCallback):
        def on_epoch_begin(self, args, state, control, model=None, **kwargs):
            if state.epoch and state.epoch >= 1:
                next(find_blocks(model)[1][0].parameters()).data.mul_(1.01)

    settings = {"callbacks": [Writes()]}
    trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:2", num_train_epochs=3, trainer=settings)
    with pytest.raises(UnsupportedSetupError, match="weights of the first 2 blocks have changed"):
        trainer.train()
    assert trainer.state.global_step == 5


class NoisyLater(Wrapped):
    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        self.strength = 0.0

    def forward(self, pixel_values, labels=None):
        pixel_values = pixel_values * (1 + self.strength) if self.training else pixel_values
        return self.vit(pixel_values=pixel_values, labels=labels)


@pytest.mark.slow
def test_a_model_that_begins_to_augment_later_ends_a_cached_stage(train_dataset) -> None:
    class Begins(TrainerCallback):
        def on_epoch_begin(self, args, state, control, model=None, **kwargs):
            model.strength = 0.5 if state.epoch and state.epoch >= 1 else 0.0

    settings = {"callbacks": [Begins()]}
    model = NoisyLater(tiny_vit())
    trainer = make_trainer(model, train_dataset, schedule="0:2", num_train_epochs=3, trainer=settings)
    with pytest.raises(UnsupportedSetupError, match="In epoch 1 the frozen blocks no longer see the images"):
        trainer.train()
    assert trainer.state.global_step == 5


@pytest.mark.slow
def test_a_method_that_was_set_on_the_trainer_itself_is_rehearsed(train_dataset) -> None:
    def run(mode):
        settings = {"schedule": "0:2", "num_train_epochs": 1, "cache": {"mode": mode}}
        trainer = make_trainer(tiny_vit(), train_dataset, **settings)
        step, loss = trainer.training_step, trainer.compute_loss
        trainer.training_step = functools.partial(step)
        trainer.compute_loss = lambda *args, **kwargs: loss(*args, **kwargs) * 2
        trainer.train()
        return parameters_of(trainer.model)

    assert_same(run("always"), run("never"))


def test_a_loss_set_on_the_trainer_itself_is_tried_later_in_the_run_too(train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:2", num_train_epochs=1, cls=FreezeCacheTrainer)
    trainer.compute_loss = functools.partial(own_loss(from_the_middle_on).compute_loss, trainer)
    with pytest.raises(UnsupportedModelError, match="pixel_values is read"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not list(Path("caches").rglob("*.safetensors"))


def test_weights_of_another_class_of_tensors_are_summed_without_their_bits() -> None:
    class Quantized(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.view and args[0].dtype is torch.float32:
                raise NotImplementedError("no bits")
            return super().__torch_function__(func, types, args, kwargs or {})

    weights = torch.randn(5).as_subclass(Quantized)
    assert torch.equal(_sum_of_bits(weights), _sum_of_bits(weights.clone()))
    assert not torch.equal(_sum_of_bits(weights), _sum_of_bits(weights + 1))
    assert not torch.equal(_sum_of_bits(torch.ones(2)), _sum_of_bits(torch.tensor([1.0, 1.0000001])))


def test_a_rehearsal_draws_what_the_libraries_own_seeds_give_and_leaves_the_generators_as_they_were() -> None:
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    before = random_states()
    with drawing(3):
        found = draws()
    assert random_states() == before
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    assert found == draws()
