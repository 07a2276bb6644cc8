"""On a GPU, cached training and evaluating give what they give without a cache, as far as kernels are deterministic."""

from __future__ import annotations

import pytest
import torch
from support.tiny import Recorder, TinyTransform, make_trainer, tiny_vit

from hf_freezecache.training import stage_costs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def trained(images, mode: str, **settings):
    cache = {"mode": mode, "num_views": 2, "cache_dir": f"caches-{mode}", "cache_eval": True}
    settings = {"schedule": "0:4,1:2", "num_train_epochs": 3, "eval_strategy": "epoch", "use_cpu": False, **settings}
    trainer = make_trainer(
        tiny_vit(),
        images.with_transform(TinyTransform(True)),
        images.select(range(20)).with_transform(TinyTransform(False)),
        cache=cache,
        **settings,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return trainer.losses, losses


@pytest.mark.parametrize(("precision", "tolerance"), [(None, 1e-4), ("bf16", 2e-2), ("fp16", 2e-2)])
@pytest.mark.parametrize("token_keep", [None, 0.5])
def test_cached_equals_live(images, precision, tolerance, token_keep) -> None:
    settings = {"freeze": {"token_keep": token_keep}, **({precision: True} if precision else {})}
    live, cached = (trained(images, mode, **settings) for mode in ("never", "always"))
    assert cached[0] == pytest.approx(live[0], rel=tolerance)
    assert cached[1] == pytest.approx(live[1], rel=tolerance)


def test_threads_that_read_and_gather_change_nothing(images) -> None:
    one, several = (trained(images, "always", dataloader_num_workers=workers) for workers in (0, 2))
    assert several[0] == pytest.approx(one[0], rel=1e-4)
    assert several[1] == pytest.approx(one[1], rel=1e-4)


@pytest.mark.parametrize("argument", ["bf16_full_eval", "fp16_full_eval"])
def test_a_model_that_waits_on_the_cpu_is_trained(images, argument) -> None:
    trainer = make_trainer(
        tiny_vit(),
        images.with_transform(TinyTransform(True)),
        schedule="0:2",
        num_train_epochs=1,
        use_cpu=False,
        **{argument: True},
    )
    trainer.train()
    assert trainer._record.decisions[0].trained_from == "cache"


def test_what_takes_how_long_is_measured(images, monkeypatch) -> None:
    monkeypatch.setattr(stage_costs, "LEAST_SECONDS", 0.0)
    rates, measure = [], stage_costs.measure_rates
    monkeypatch.setattr(stage_costs, "measure_rates", lambda *args: rates.append(measure(*args)) or rates[-1])
    trained(images, "auto", num_train_epochs=6)
    assert rates
    for one in rates:
        assert one.block > 0
        assert (one.cores, one.encoders > 0) == (0, True)


def test_frozen_weights_leave_the_gpu(images) -> None:
    def run(offload: bool):
        held = []

        class Watched(Recorder):
            def training_step(self, *args, **kwargs):
                loss = super().training_step(*args, **kwargs)
                torch.cuda.synchronize()
                held.append(torch.cuda.memory_allocated())
                return loss

        model = tiny_vit(hidden_size=256, intermediate_size=1024)
        rows, cache = images.with_transform(TinyTransform(True)), {"offload_prefix": offload, "cache_dir": "caches"}
        trainer = make_trainer(model, rows, schedule="0:3", cache=cache, cls=Watched, num_train_epochs=2, use_cpu=False)
        torch.cuda.empty_cache()
        trainer.train()
        assert {parameter.device.type for parameter in trainer.model.parameters()} == {"cuda"}
        blocks = sum(p.numel() * p.element_size() for p in model.vit.layers[:3].parameters())
        return trainer.losses, held[-1], blocks

    plain, offloaded = run(False), run(True)
    assert offloaded[0] == pytest.approx(plain[0], rel=1e-4)
    assert plain[1] - offloaded[1] >= 0.9 * plain[2]
