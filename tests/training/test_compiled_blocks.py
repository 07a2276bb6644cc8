"""``torch_compile``: the blocks that train are compiled one by one, and what is trained does not depend on where states come from."""

from __future__ import annotations

import pytest
import torch
from accelerate.utils import DynamoBackend
from support.parity import assert_same, parameters_of
from support.tiny import make_trainer, tiny_vit
from torch._dynamo.utils import counters

SCHEDULE = "0:0,1:1,2:2"

#: torch's compiler looks at the gradients of all inputs of a graph, and torch warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    # `TrainingArguments` sets it, and leaves it.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(rows, mode="always", backend="aot_eager", **settings):
    compiling = {"torch_compile": True, "torch_compile_backend": backend} if backend else {}
    cache = {"mode": mode, "num_views": 2}
    settings = {"schedule": SCHEDULE, "num_train_epochs": 3, **settings}
    trainer = make_trainer(tiny_vit(), rows, cache=cache, **settings, **compiling)
    trainer.train()
    return trainer


def check_cached_equals_live(rows, **settings):
    cached = train(rows, **settings)
    # Blocks of one class share a graph. Others are of an evaluation, of other shapes, or of inputs without gradients.
    assert 1 <= counters["stats"]["unique_graphs"] <= 6
    live = train(rows, "never", **settings)
    assert_same(parameters_of(cached.model), parameters_of(live.model))
    assert not any("forward" in vars(module) for module in cached.model.modules())
    assert type(cached.model_wrapped) is type(cached.model)


def test_cached_equals_live_to_the_bit(train_dataset) -> None:
    check_cached_equals_live(train_dataset, schedule="0:3", num_train_epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize("token_keep", [1.0, 0.5])
def test_stages_equal_live_ones_to_the_bit(train_dataset, token_keep) -> None:
    check_cached_equals_live(train_dataset, freeze={"token_keep": token_keep})


def test_only_blocks_that_train_are_compiled(train_dataset) -> None:
    train(train_dataset, schedule="0:4", num_train_epochs=1)
    assert counters["stats"]["unique_graphs"] == 0
    train(train_dataset, backend=None, schedule="0:3", num_train_epochs=1)
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.slow
def test_accelerate_compiles_as_before_when_training_has_ended(train_dataset, eval_dataset) -> None:
    trainer = train(train_dataset, num_train_epochs=1, eval_dataset=eval_dataset)
    assert trainer.accelerator.state.dynamo_plugin.backend == DynamoBackend.AOT_EAGER
    plain = train(train_dataset, backend=None, num_train_epochs=1, eval_dataset=eval_dataset)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-5)


@pytest.mark.slow
def test_a_model_that_was_compiled_to_be_evaluated_is_trained_by_block(train_dataset, eval_dataset) -> None:
    cached, live = (
        make_trainer(
            tiny_vit(),
            train_dataset,
            schedule="0:2",
            cache={"mode": mode, "num_views": 1},
            eval_dataset=eval_dataset,
            torch_compile=True,
            torch_compile_backend="aot_eager",
        )
        for mode in ("always", "never")
    )
    for trainer in (cached, live):
        trainer.evaluate()
        trainer.train()
    assert_same(parameters_of(cached.model), parameters_of(live.model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_the_default_compiler(train_dataset) -> None:
    cached, live = (
        train(train_dataset, mode, "inductor", schedule="0:2", num_train_epochs=1) for mode in ("always", "never")
    )
    assert_same(parameters_of(cached.model), parameters_of(live.model))
