"""A step that is tried on the stand-in leaves nothing behind: not in the trainer, the model, or the random states."""

from __future__ import annotations

import collections
import random

import numpy as np
import torch
from support.tiny import make_trainer, tiny_vit
from torch import nn

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.data.collators import collate_cached
from hf_freezecache.model.split import find_blocks
from hf_freezecache.training.rehearsal_copy import rehearsing


class Meter:
    def __init__(self) -> None:
        self.count, self.seen = 0, collections.deque([0])

    def update(self) -> None:
        self.count += 1
        self.seen.append(self.count)


class Busy(FreezeCacheTrainer):
    """Changes everything that an override can reach."""

    def __init__(self, *args, **kwargs) -> None:
        self.steps, self.meter, self.counts = 0, Meter(), collections.Counter("a")
        self.history = {"loss": [1.0], "kinds": {"a"}}
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        self.steps += 1
        self.meter.update()
        self.counts["a"] += 1
        self.history["loss"].append(2.0)
        self.history["kinds"].add("b")
        self.log({"mine": 1.0})
        self.state.log_history.append({})
        self.control.should_training_stop = True
        random.random(), np.random.rand(), torch.rand(1)
        self.seen_progress = self.state.global_step / self.state.max_steps
        self.seen_rate = self.optimizer.param_groups[0]["lr"]
        self.model.calls += 1
        self.model.calls_buffer += 1
        find_blocks(self.model)[1][0].late = "new"
        self.model.classifier.weight.requires_grad_(False)
        self.model.classifier.register_forward_hook(lambda *args: None)  # in an OrderedDict
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


def state_of(trainer) -> list:
    """All that the overrides change."""
    model = trainer.model
    return [
        *(trainer.steps, trainer.meter.count, list(trainer.meter.seen), dict(trainer.counts), repr(trainer.history)),
        *(len(trainer.state.log_history), trainer.control.should_training_stop, model.config.problem_type),
        *(random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        *(model.calls, model.calls_buffer.tolist(), hasattr(find_blocks(model)[1][0], "late")),
        *(list(model.classifier._forward_hooks), list(model.vit._forward_hooks)),
        *([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]),
        *([p.grad is None for p in model.parameters()], trainer.optimizer, trainer.callback_handler.callbacks[:]),
        *(sorted(vars(trainer)), len(trainer.accelerator._dataloaders), trainer.state.max_steps),
    ]


def test_what_a_step_changes_is_put_back(train_dataset) -> None:
    model = tiny_vit(hidden_dropout_prob=0.1)
    model.calls = 0
    model.classifier.register_forward_hook(lambda *args: None)
    model.register_buffer("calls_buffer", torch.zeros(2))
    trainer = make_trainer(model, train_dataset, train_dataset, cls=Busy)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    batch = collate_cached(_tensors(train_dataset))
    before, handler = state_of(trainer), trainer.callback_handler
    with rehearsing(trainer) as stand_in:
        assert type(stand_in) is Busy
        stand_in.training_step(stand_in.model, dict(batch))
        for inputs in stand_in.get_eval_dataloader(train_dataset):
            stand_in.prediction_step(stand_in.model.eval(), inputs, prediction_loss_only=True)
            break
        assert stand_in.steps == 2
        assert stand_in.seen_progress == 0
        assert stand_in.seen_rate > 0
        assert any(p.grad is not None for p in model.parameters())
    assert state_of(trainer) == before
    assert trainer.callback_handler is handler
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def _tensors(dataset) -> list[dict[str, torch.Tensor]]:
    return [
        {"pixel_values": dataset[row]["pixel_values"], "labels": torch.tensor(dataset[row]["labels"])} for row in (0, 1)
    ]


def test_statistics_of_a_module_of_the_users_own_are_put_back(train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset)
    trainer.teacher = nn.BatchNorm1d(3)
    with rehearsing(trainer) as stand_in:
        stand_in.teacher(torch.randn(4, 3))
        assert stand_in.teacher.num_batches_tracked == 1
    assert trainer.teacher.num_batches_tracked == 0
    assert not trainer.teacher.running_mean.any()


def test_an_error_is_passed_on_and_everything_is_put_back(train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset)
    trainer.model.eval()
    try:
        with rehearsing(trainer) as stand_in:
            stand_in.model.train()
            raise KeyError("a")
    except KeyError:
        pass
    assert not trainer.model.training
