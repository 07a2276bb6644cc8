"""``offload_prefix=True``: weights of frozen blocks leave the device while a stage trains from a cache, and nothing else changes."""

from __future__ import annotations

import logging

import pytest
import torch
from support.other_place import other_place, places_of
from support.parity import assert_same, parameters_of
from support.tiny import FAMILIES, Recorder, TinyTransform, make_trainer, tiny_model, tiny_vit
from transformers import AutoModelForImageClassification, TrainerCallback

from hf_freezecache import CacheConfig
from hf_freezecache.errors import UnsupportedSetupError

#: Of the tiny models, and what holds their blocks.
STAGES = {"schedule": "0:1,2:3", "num_train_epochs": 4}


class Placed(Recorder):
    """Notes where parameters are after each step."""

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.places = [*getattr(self, "places", []), places_of(self.model)]
        return loss

    def away(self, step: int) -> set[str]:
        return {name for name, place in self.places[step].items() if place == "host"}


@pytest.fixture
def elsewhere():
    with other_place():
        yield


def trained(images, offload: bool, model=None, resume=None, cache=None, cls=Placed, callbacks=(), **settings):
    trainer = make_trainer(
        tiny_vit() if model is None else model,
        images.with_transform(TinyTransform(True)),
        images.select(range(20)).with_transform(TinyTransform(False)),
        cls=cls,
        cache={"num_views": 2, "offload_prefix": offload, **(cache or {})},
        trainer={"callbacks": list(callbacks)},
        **{**STAGES, **settings},
    )
    trainer.train(resume_from_checkpoint=resume)
    assert set(places_of(trainer.model).values()) == {"device"}
    return trainer


def metrics_of(trainer) -> list[float]:
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def assert_equal_runs(a, b) -> None:
    assert a.losses == b.losses
    assert metrics_of(a) == metrics_of(b)
    assert_same(parameters_of(a.model), parameters_of(b.model))


SAVING = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # the first, whose weights were other ones
}


@pytest.mark.parametrize("cache_eval", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_evaluations_checkpoints_and_the_best_model_are_the_same(images, elsewhere, cache_eval) -> None:
    images, cache = images.select(range(20)), {"cache_eval": cache_eval}
    plain = trained(images, False, cache=cache, **SAVING, output_dir="plain")
    offloaded = trained(images, True, cache=cache, **SAVING, output_dir="offloaded")
    assert_equal_runs(plain, offloaded)
    steps = len(plain.losses) // 4
    blocks = [
        {name.split(".layers.")[-1].split(".")[0] for name in offloaded.away(step) if ".layers." in name}
        for step in range(4 * steps)
    ]
    # The first step of a stage looks at what is read.
    assert blocks == [set()] + [{"0"}] * (2 * steps - 1) + [set()] + [{"0", "1", "2"}] * (2 * steps - 1)
    assert any("embeddings" in name for name in offloaded.away(1))
    assert not any(
        "classifier" in name or ("layernorm" in name and "layers" not in name) for name in offloaded.away(-1)
    )
    saved = [
        AutoModelForImageClassification.from_pretrained(f"{run.args.output_dir}/checkpoint-{2 * steps}")
        for run in (plain, offloaded)
    ]
    assert_same(*(parameters_of(model.float()) for model in saved))


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 7, 12])
def test_a_resumed_run_ends_the_same(images, elsewhere, at) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    plain = trained(images, False)
    trained(images, True, output_dir="first", **saving)
    resumed = trained(images, True, resume=f"first/checkpoint-{at}", output_dir="second")
    assert resumed.losses == plain.losses[at:]
    assert_same(parameters_of(resumed.model), parameters_of(plain.model))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["0:4,1:1,2:0,3:2", "0:2,2:2", "0:0,1:3"])
def test_stages_that_thaw(images, elsewhere, schedule) -> None:
    plain, offloaded = (trained(images, offload, schedule=schedule) for offload in (False, True))
    assert_equal_runs(plain, offloaded)
    assert offloaded.away(-1)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(images, elsewhere, family) -> None:
    plain, offloaded = (
        trained(images, offload, tiny_model(family), eval_strategy="epoch") for offload in (False, True)
    )
    assert_equal_runs(plain, offloaded)
    assert offloaded.away(-1)


@pytest.mark.parametrize("error", [pytest.param(ValueError, marks=pytest.mark.slow), KeyboardInterrupt])
def test_an_error_brings_them_back(images, elsewhere, error) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            if state.global_step == 3:
                assert "host" in places_of(model).values()
                raise error

    model = tiny_vit()
    before = parameters_of(model)
    with pytest.raises(error):
        trained(images.select(range(40)), True, model, callbacks=[Fails()], schedule="0:3")
    assert set(places_of(model).values()) == {"device"}
    frozen = {name for name in before if (".layers.3" not in name and "embeddings" in name) or ".layers.0" in name}
    assert_same({name: before[name] for name in frozen}, {name: parameters_of(model)[name] for name in frozen})
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
def test_callbacks_read_right_values_and_run_the_model(images, elsewhere) -> None:
    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            values = {name: p.detach().float() for name, p in model.named_parameters()}
            self.sums = [*getattr(self, "sums", []), sum(float(value.sum()) for value in values.values())]
            if state.global_step % 2:
                self.places = [*getattr(self, "places", []), set(places_of(model).values())]
                with torch.no_grad():
                    logits = model(pixel_values=torch.zeros(1, 3, 16, 16)).logits
                self.sums.append(float(logits.sum()))
                assert set(places_of(model).values()) == {"device"}

    looks = Looks(), Looks()
    plain, offloaded = (
        trained(images, offload, callbacks=[look], schedule="0:2")
        for offload, look in zip((False, True), looks, strict=True)
    )
    assert_equal_runs(plain, offloaded)
    assert looks[0].sums == looks[1].sums
    assert looks[1].places == [{"device"}] + [{"device", "host"}] * (len(looks[1].places) - 1)


@pytest.mark.slow
def test_what_a_loss_reads_stays(images, elsewhere) -> None:
    class Decays(Placed):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = loss + 0.01 * next(model.parameters()).pow(2).sum()
            return (loss, outputs) if return_outputs else loss

    plain, offloaded = (trained(images, offload, cls=Decays, schedule="0:2") for offload in (False, True))
    assert_equal_runs(plain, offloaded)
    assert next(iter(plain.places[0])) not in offloaded.away(-1)
    assert offloaded.away(-1)


@pytest.mark.slow
def test_parameters_that_the_suffix_holds_too_stay(images, elsewhere) -> None:
    def tied():
        model = tiny_vit()
        model.vit.layers[3].layernorm_before = model.vit.layers[0].layernorm_before
        model.vit.layers[1].layernorm_after.weight.data = model.vit.layers[1].layernorm_before.weight.data
        return model

    plain, offloaded = (trained(images, offload, tied(), schedule="0:2") for offload in (False, True))
    assert_equal_runs(plain, offloaded)
    assert not any(
        "0.layernorm_before" in name or ("1.layernorm" in name and "weight" in name) for name in offloaded.away(-1)
    )
    assert any("1.layernorm_after.bias" in name for name in offloaded.away(-1))


def test_there_is_nowhere_to_go(train_dataset, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_freezecache"):
        rows, stages = train_dataset.select(range(10)), "0:1,1:2"
        trainer = make_trainer(tiny_vit(), rows, schedule=stages, cache={"offload_prefix": True}, num_train_epochs=2)
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "offload" in record.getMessage()]
    assert said == ["offload_prefix=True has no effect: the device, cpu, has no memory but the host's."]
    with pytest.raises(UnsupportedSetupError, match="offload_prefix=True acts in cached stages, but mode='never'"):
        CacheConfig(offload_prefix=True, mode="never")
