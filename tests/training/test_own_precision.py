"""Evaluating, precision and devices, as users set them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny import Recorder, TinyTransform, make_trainer, tiny_vit
from support.user_trainers import assert_cached_as_live
from torch import nn

from hf_freezecache.errors import CacheMismatchError
from hf_freezecache.training import evaluation_comparison as comparison
from hf_freezecache.training.cache_check import spot_check
from hf_freezecache.training.placement import place_model
from hf_freezecache.training.step_outcome import StepOutcome, difference


def test_a_model_that_took_the_place_of_the_trained_one_is_evaluated(images) -> None:
    rows, held_out = images.with_transform(TinyTransform(True)), images.with_transform(TinyTransform(False))
    cache = {"cache_eval": True, "cache_dir": "caches"}
    trainer = make_trainer(tiny_vit(), rows, held_out, "0:2", cache, num_train_epochs=1, eval_strategy="epoch")
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [trainer.evaluate()["eval_loss"]] == logged
    torch.manual_seed(7)
    other = tiny_vit()
    nn.init.normal_(other.classifier.weight)
    trainer.model = other
    plain = make_trainer(other, rows, held_out, None)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])


class HalfOnCpu(Recorder):
    """fp16 as on a GPU: accelerate offers it there alone."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)


@pytest.fixture
def _no_precision_left() -> Any:
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


@pytest.mark.usefixtures("_no_precision_left")
def test_fp16_is_rehearsed_without_the_scale_at_which_it_begins(train_dataset) -> None:
    """At that scale all gradients of the first steps are infinite."""
    live, cached = assert_cached_as_live(train_dataset, cls=HalfOnCpu, num_train_epochs=4)
    assert isinstance(cached.accelerator.scaler, torch.amp.GradScaler)
    assert cached.accelerator.scaler.get_scale() == live.accelerator.scaler.get_scale() < 2.0**40


def test_infinite_gradients_hide_no_difference() -> None:
    def step(first: float, second: float) -> StepOutcome:
        return StepOutcome(torch.ones(()), {"a": torch.tensor([first, 1.0]), "b": torch.tensor([second])}, {})

    infinite = float("inf")
    assert difference(step(infinite, 1.0), step(infinite, 1.0), 1e-3) is None
    assert "gradient of b differs" in str(difference(step(infinite, 1.0), step(infinite, 2.0), 1e-3))
    assert "gradient of a is infinite" in str(difference(step(infinite, 1.0), step(1.0, 1.0), 1e-3))
    assert "gradient of a is infinite" in str(difference(step(1.0, 1.0), step(float("nan"), 1.0), 1e-3))


def test_what_is_not_finite_in_an_evaluation_must_be_so_on_both_sides() -> None:
    """On an accelerator, where kernels round."""
    infinite, nan = float("inf"), float("nan")
    for exact, found, same in (
        ([1.0, -infinite, nan], [1.0 + 1e-6, -infinite, nan], True),
        ([1.0, -infinite], [2.0, -infinite], False),
        ([1.0, -infinite], [1.0, infinite], False),
        ([1.0, nan], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, nan], False),
        ([nan, infinite], [nan, infinite], True),
    ):
        assert comparison._rounded_alike(torch.tensor(exact), torch.tensor(found)) is same


@pytest.fixture
def _new_way_of_tf32() -> Any:
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"
    yield
    torch.backends.fp32_precision = before


@pytest.mark.usefixtures("_new_way_of_tf32")
@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has one way alone")
def test_products_may_be_rounded_the_new_way(images) -> None:
    """As ``tf32=True`` asks for, on a GPU."""
    rows, held_out = images.with_transform(TinyTransform(True)), images.with_transform(TinyTransform(False))
    cache = {"cache_eval": True, "cache_dir": "caches"}
    trainer = make_trainer(tiny_vit(), rows, held_out, "0:2", cache, num_train_epochs=1, eval_strategy="epoch")
    trainer.train()
    assert len(list(Path("caches").glob("k02-*"))) == 2


class HalfTransform(TinyTransform):
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = super().__call__(batch)
        return {**found, "pixel_values": [pixels.to(torch.bfloat16) for pixels in found["pixel_values"]]}


@pytest.mark.by_default(1)
@pytest.mark.parametrize("narrow", [True, False])
def test_states_of_sixteen_bits_may_be_rounded_otherwise_in_other_batches(images, narrow) -> None:
    """As by kernels that are chosen by the shape of a batch."""
    model = tiny_vit().to(torch.bfloat16) if narrow else tiny_vit()
    rows = images.with_transform(HalfTransform(False) if narrow else TinyTransform(False))
    trainer = make_trainer(model, rows, schedule="0:2", cache={"num_views": 1})
    reader, run = trainer.build_cache().reader, trainer._run
    chooser = run.cache.chooser
    rounding = replace(chooser, run=lambda function, **inputs: chooser.run(function, **inputs) * 1.004)
    if narrow:
        spot_check(rounding, run.splits.at(2), reader, "no")
    else:
        with pytest.raises(CacheMismatchError, match="hidden states"):
            spot_check(rounding, run.splits.at(2), reader, "no")


def test_a_model_that_is_still_on_the_cpu_goes_to_the_training_device() -> None:
    device = torch.device("meta")
    for parallel, expected in ((False, "meta"), (True, "cpu")):
        trainer = SimpleNamespace(
            args=SimpleNamespace(device=device), model=nn.Linear(2, 2), is_model_parallel=parallel
        )
        place_model(trainer)
        assert trainer.model.weight.device.type == expected
