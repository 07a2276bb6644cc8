"""What a user's trainer does with batches, losses and random numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import many
from support.children import run_group
from support.tiny import Recorder, TinyTransform
from support.user_trainers import assert_cached_as_live, trained
from torch import nn

from hf_freezecache.errors import UnsupportedModelError

# ---- Batches ----


class Shifts(Recorder):
    """Changes labels, and adds an entry that the loss takes out."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(super()._prepare_inputs(inputs))
        if "labels" in inputs:
            inputs["labels"] = (inputs["labels"] + 1) % 4
        inputs["weight"] = 2.0
        return inputs

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        weight = inputs.pop("weight")
        return super().compute_loss(model, inputs, *args, **kwargs) * weight


def test_batches_are_prepared_once(train_dataset) -> None:
    live, _ = assert_cached_as_live(train_dataset, cls=Shifts)
    plain = trained(train_dataset, "never")
    assert live.losses[0] != plain.losses[0]


class ShiftsLabels(Recorder):
    """Asks for labels, which what frozen blocks take has not."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(super()._prepare_inputs(inputs))
        return inputs | {"labels": (inputs["labels"] + 1) % 4}


class Brightens(Recorder):
    """Changes images."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(super()._prepare_inputs(inputs))
        return inputs | {"pixel_values": inputs["pixel_values"] + 0.5}


class ShiftsInPlace(Recorder):
    """Changes the tensors of its batch, and looks at images."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        assert inputs["pixel_values"].shape[1] == 3
        inputs["labels"].add_(1).remainder_(4)
        return inputs


class ShiftedTransform(TinyTransform):
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return super().__call__({**batch, "label": [(label + 1) % 4 for label in batch["label"]]})


@pytest.mark.by_default(1)
@pytest.mark.parametrize("cls", [ShiftsLabels, ShiftsInPlace])
def test_preparing_may_ask_for_labels(train_dataset, cls) -> None:
    assert_cached_as_live(train_dataset, cls=cls)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("shifts", [ShiftsLabels, ShiftsInPlace])
@pytest.mark.parametrize("augmentation", ["mixup:1", "token_flip:0.5"])
def test_labels_that_are_mixed_are_those_of_the_prepared_batch(images, augmentation, shifts) -> None:
    cache = {"feature_augmentation": augmentation, "num_views": 1}
    losses = [
        trained(images.with_transform(transform), cls=cls, cache={**cache, "cache_dir": cls.__name__}).losses
        for cls, transform in ((shifts, TinyTransform(False)), (Recorder, ShiftedTransform(False)))
    ]
    assert losses[0] == losses[1]


class Interpolates(Recorder):
    """Adds an argument that frozen blocks take."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return dict(super()._prepare_inputs(inputs)) | {"interpolate_pos_encoding": torch.tensor(True)}


@pytest.mark.slow
def test_inputs_of_frozen_blocks_that_are_added_to_batches_are_named(train_dataset) -> None:
    with pytest.raises(
        UnsupportedModelError, match="frozen blocks take interpolate_pos_encoding, which _prepare_inputs"
    ):
        trained(train_dataset, cls=Interpolates)
    losses = [trained(train_dataset, mode, cls=Interpolates).losses for mode in ("auto", "never")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_images_that_are_changed_in_each_step_are_not_cached(train_dataset) -> None:
    with pytest.raises(UnsupportedModelError, match=r"pixel_values is read \(add\)"):
        trained(train_dataset, cls=Brightens)
    assert trained(train_dataset, "auto", cls=Brightens).losses == trained(train_dataset, "never", cls=Brightens).losses


class NotANumber(Recorder):
    """Gives a loss that is no number in one step, with gradients that are."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss + float("nan") if self.state.global_step == 3 else loss


@pytest.mark.by_default(1)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_of_a_loss_that_is_no_number_count_once(train_dataset, accumulation) -> None:
    settings = {
        "gradient_accumulation_steps": accumulation,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "num_train_epochs": 4,
    }
    live, _ = assert_cached_as_live(train_dataset, cls=NotANumber, model={"hidden_dropout_prob": 0.1}, **settings)
    assert sum(np.isnan(live.losses)) == accumulation


class LooksOnce(NotANumber):
    """Fails when a step is taken again, as a loss does that asks a model for its wrapper."""

    asked = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.asked += self.state.global_step == 3
        if self.state.global_step == 3 and self.asked > 1:
            raise AttributeError("module")
        return super().compute_loss(*args, **kwargs)


def test_a_second_look_that_fails_ends_nothing(train_dataset) -> None:
    trainer = trained(train_dataset, cls=LooksOnce, num_train_epochs=4, max_grad_norm=0.0, optim="sgd")
    assert trainer.asked == 2
    assert np.isnan(trainer.losses).tolist() == [step == 3 for step in range(20)]


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_process_keeps_the_others_in_step(tmp_path) -> None:
    run_group(many.main, "not_a_number:never", "not_a_number:always", folders=[tmp_path] * 2)
    for rank in range(2):
        found = json.loads((tmp_path / f"found-{rank}-of-2.json").read_text())
        assert found["not_a_number:always"] == found["not_a_number:never"]
        assert found["not_a_number:always"]["losses"].count("nan") == rank


# ---- Random numbers ----


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    return float(generator.random() if hasattr(generator, "random") else generator.random_sample())


class Draws(Recorder):
    """Weighs each batch at random, by a generator of its own."""

    make: Callable[[], Any]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "generator"):
            self.generator = type(self).make()
        return super().compute_loss(*args, **kwargs) * (1 + draw(self.generator))


@pytest.mark.by_default(2)
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.Generator().manual_seed(3),
        lambda: np.random.default_rng(3),
        lambda: np.random.RandomState(3),
        lambda: random.Random(3),
    ],
    ids=["torch", "numpy", "RandomState", "random"],
)
@pytest.mark.parametrize("early", [True, False])
def test_a_generator_of_the_trainers_own_draws_as_in_training_alone(train_dataset, make, early) -> None:
    class Own(Draws):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if early:
                self.generator = make()

    Own.make = staticmethod(make)
    live, _ = assert_cached_as_live(train_dataset, cls=Own)
    first = trained(train_dataset, "never").losses[0]
    assert live.losses[0] / first == pytest.approx(1 + draw(make()))  # rehearsing has drawn nothing


@pytest.mark.slow
def test_a_generator_without_a_state_is_no_obstacle(train_dataset) -> None:
    class Own(Recorder):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.generator = random.SystemRandom()

    assert_cached_as_live(train_dataset, cls=Own)


class Holder:
    """An object of the user's own with a generator in it."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(5)


@pytest.mark.slow
def test_a_generator_within_an_object_of_the_users_own_draws_as_in_training_alone(train_dataset) -> None:
    class Own(Recorder):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.holder = Holder()

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * (1 + draw(self.holder.generator))

    assert_cached_as_live(train_dataset, cls=Own)
