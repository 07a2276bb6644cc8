"""What users do beside the ordinary: freeze for themselves, iterate over batches in callbacks, count inputs, other optimizers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.parity import assert_same, parameters_of
from support.tiny import Recorder, make_trainer, tiny_vit
from transformers import Trainer, TrainerCallback

from hf_freezecache.model.split import find_blocks


class Freezing(TrainerCallback):
    """Freezes and thaws parameters by name, at the start of an epoch or of the run (epoch -1)."""

    def __init__(self, prefix: str, freeze_at: int | None, thaw_at: int | None) -> None:
        self.prefix, self.epochs = prefix, {freeze_at: False, thaw_at: True}
        self.values: list[torch.Tensor] = []

    def _set(self, model, when: int) -> None:
        if when in self.epochs:
            for name, parameter in model.named_parameters():
                if name.startswith(self.prefix):
                    parameter.requires_grad_(self.epochs[when])

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._set(model, -1)

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        self._set(model, round(state.epoch))

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.values.append(model.classifier.weight.detach().clone())


def changes(values: list[torch.Tensor]) -> list[bool]:
    return [not torch.equal(before, after) for before, after in pairwise(values)]


@pytest.mark.by_default(2)
@pytest.mark.parametrize("mode", ["always", "never"])
@pytest.mark.parametrize("own", [False, True], ids=["optimizer-of-trainer", "own-optimizer"])
@pytest.mark.by_default(1)
def test_a_head_that_a_callback_thaws_is_trained(own, mode, train_dataset) -> None:
    """A first stage that freezes must not take what the user froze out of the optimizer, nor must a second."""
    model = tiny_vit()
    callback = Freezing("classifier", None if own else -1, 3)
    if own:  # frozen from the start, and in the optimizer all the same
        model.classifier.requires_grad_(False)
    settings = {"optimizers": (torch.optim.AdamW(model.parameters(), lr=1e-2), None)} if own else {}
    settings["callbacks"] = [callback]
    make_trainer(model, train_dataset, schedule="0:1,1:2", trainer=settings, cache={"mode": mode}).train()
    assert changes(callback.values) == [False, False, True]


@pytest.mark.slow
def test_a_head_frozen_before_is_in_no_optimizer_of_trainer(train_dataset) -> None:
    """``Trainer`` makes its optimizer of what requires gradients then; here it is the same."""
    optimizers = []
    for cls in (Recorder, Trainer):
        model = tiny_vit()
        model.classifier.requires_grad_(False)
        trainer = make_trainer(model, train_dataset, schedule="0:0", num_train_epochs=1, max_steps=1)
        if cls is Trainer:
            trainer = Trainer(model, trainer.args, train_dataset=train_dataset)
        trainer.train()
        known = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        optimizers.append({name for name, p in model.named_parameters() if id(p) in known})
    assert optimizers[0] == optimizers[1]
    assert "classifier.weight" not in optimizers[0]


def test_what_the_user_froze_stays_frozen_before_and_behind_the_split(train_dataset) -> None:
    model = tiny_vit()
    inside, behind = (find_blocks(model)[1][number].layernorm_before.weight for number in (0, 3))
    before = inside.clone(), behind.clone()
    for parameter in (inside, behind):
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = make_trainer(model, train_dataset, schedule="0:0,1:2", trainer={"optimizers": (optimizer, None)})
    trainer.train()
    assert torch.equal(inside, before[0])
    assert torch.equal(behind, before[1])
    assert not inside.requires_grad
    assert not behind.requires_grad
    assert find_blocks(model)[1][0].layernorm_after.weight.requires_grad  # what the schedule froze is as it was
    assert any(parameter is behind for group in optimizer.param_groups for parameter in group["params"])


@pytest.mark.slow
def test_frozen_blocks_that_a_callback_thaws_stay_frozen(train_dataset, caplog) -> None:
    def run(callbacks):
        trainer = make_trainer(
            tiny_vit(),
            train_dataset,
            schedule="0:2",
            num_train_epochs=2,
            cache={"mode": "never"},
            trainer={"callbacks": callbacks},
        )
        trainer.train()
        return trainer

    quiet = run([])
    assert "stay frozen" not in caplog.text
    thawing = run([Freezing("vit", None, 1)])
    assert "required gradients again: they stay frozen" in caplog.text
    assert thawing.losses == quiet.losses
    assert_same(parameters_of(thawing.model), parameters_of(quiet.model))
    assert all(parameter.requires_grad for parameter in thawing.model.parameters())


class OwnOptimizer(Recorder):
    """Makes its optimizer of all parameters, whether they require gradients or not."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        return self.optimizer


@pytest.mark.slow
def test_resume_with_an_optimizer_that_a_subclass_makes(train_dataset) -> None:
    settings = {"schedule": "0:1,1:2", "num_train_epochs": 3, "save_strategy": "epoch", "cls": OwnOptimizer}
    whole = make_trainer(tiny_vit(), train_dataset, **settings)
    whole.train()
    resumed = make_trainer(tiny_vit(initializer_range=0.5), train_dataset, output_dir="again", **settings)
    resumed.train(resume_from_checkpoint="out/checkpoint-10")
    assert resumed.losses == whole.losses[10:]
    assert_same(parameters_of(resumed.model), parameters_of(whole.model))


@pytest.mark.slow
def test_parameters_added_to_the_users_optimizer_survive_a_second_training(train_dataset) -> None:
    model = tiny_vit()
    added = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p is not model.classifier.bias], lr=1e-3)
    settings = {"optimizers": (optimizer, None)}
    trainer = make_trainer(model, train_dataset, schedule="0:0,1:2", num_train_epochs=2, trainer=settings)
    trainer.train()
    optimizer.param_groups[0]["params"].append(model.classifier.bias)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [added]})
    trainer.lr_scheduler = None
    trainer.train()
    assert any(parameter is added for parameter in optimizer.param_groups[1]["params"])
    assert any(parameter is model.classifier.bias for parameter in optimizer.param_groups[0]["params"])


@pytest.mark.by_default(1)
@pytest.mark.parametrize("count", ["all", "non_padding", "no"])
@pytest.mark.slow
def test_inputs_of_cached_batches_are_counted_as_those_of_images(count, train_dataset, caplog) -> None:
    seen = []
    for mode in ("always", "never"):
        trainer = make_trainer(
            tiny_vit(),
            train_dataset,
            schedule="0:2",
            num_train_epochs=1,
            cache={"mode": mode},
            include_num_input_tokens_seen=count,
        )
        trainer.train()
        seen.append(trainer.state.num_input_tokens_seen)
    assert seen[0] == seen[1] == (0 if count == "no" else len(train_dataset) * 3 * 16 * 16)
    assert "Tried to track" not in caplog.text


class Looking(TrainerCallback):
    """Runs the model on what it finds in ``train_dataloader``, at every occasion."""

    def __init__(self) -> None:
        self.labels: list[list[int]] = []
        self.loaders: list[int] = []

    def look(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        training = model.training
        model.eval()
        self.loaders.append(len(train_dataloader))
        with torch.no_grad():
            labels = []
            for batch in train_dataloader:
                assert set(batch) == {"pixel_values", "labels"}
                assert batch["pixel_values"].std() > 0.1
                assert torch.isfinite(model(**batch).loss)
                labels += batch["labels"].tolist()
        self.labels.append(sorted(labels))
        model.train(training)

    on_train_begin = on_epoch_begin = on_epoch_end = on_train_end = look


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["always", "never"])
def test_callbacks_find_batches_of_images(mode, train_dataset) -> None:
    losses = []
    for callbacks in ([], [Looking()]):
        trainer = make_trainer(
            tiny_vit(hidden_dropout_prob=0.1),
            train_dataset,
            schedule="0:0,1:2",
            num_train_epochs=2,
            cache={"mode": mode},
            trainer={"callbacks": callbacks},
        )
        trainer.train()
        losses.append(trainer.losses)
    assert losses[0] == losses[1]
    (looking,) = callbacks
    assert looking.labels == [sorted(row["labels"] for row in train_dataset)] * 6
    assert looking.loaders == [5] * 6


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD in short: gradients are taken at ``y``, and evaluation sees the average ``x``."""

    def __init__(self, parameters, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    def _move(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                weight = 1 - group["beta"] if train else 1 - 1 / group["beta"]
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.data.lerp_(self.state[parameter]["z"], weight)
                group["train_mode"] = train

    def train(self) -> None:
        self._move(True)

    def eval(self) -> None:
        self._move(False)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("not in train mode")
            weight = 1 / (group["k"] + 1)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    z = self.state[parameter].setdefault("z", parameter.clone())
                    parameter.lerp_(z, weight)
                    parameter.add_(parameter.grad, alpha=group["lr"] * (group["beta"] * (1 - weight) - 1))
                    z.sub_(parameter.grad, alpha=group["lr"])
            group["k"] += 1


class Averages(TrainerCallback):
    """Notes what evaluation would see of the first block, at the end of the first epoch."""

    def on_epoch_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if round(state.epoch) == 1:
            optimizer.eval()
            self.block = parameters_of(find_blocks(model)[1][0])
            optimizer.train()


@pytest.mark.slow
def test_schedule_free_optimizers(train_dataset, eval_dataset) -> None:
    trained = []
    for mode in ("always", "never"):
        model, averages = tiny_vit(), Averages()
        optimizer = ScheduleFree(model.parameters())
        trainer = make_trainer(
            model,
            train_dataset,
            eval_dataset,
            schedule="0:0,1:1,2:2",
            num_train_epochs=3,
            cache={"mode": mode},
            trainer={"optimizers": (optimizer, None), "callbacks": [averages]},
            lr_scheduler_type="constant",
        )
        trainer.train()
        assert optimizer.param_groups[0]["train_mode"]
        trainer.evaluate()
        assert not optimizer.param_groups[0]["train_mode"]
        for name, value in parameters_of(find_blocks(model)[1][0]).items():  # frozen as evaluation saw it
            torch.testing.assert_close(value, averages.block[name])
        trained.append((trainer.losses, parameters_of(model)))
    assert trained[0][0] == trained[1][0]
    assert_same(trained[0][1], trained[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["even_batches", "split_batches", "dispatch_batches", "use_seedable_sampler"])
def test_settings_of_accelerates_loaders(setting, train_dataset) -> None:
    losses = []
    for mode in ("always", "never"):
        accelerator_config = {setting: setting in ("split_batches", "dispatch_batches")}
        trainer = make_trainer(
            tiny_vit(),
            train_dataset,
            schedule="0:2",
            num_train_epochs=2,
            cache={"mode": mode, "cache_dir": str(Path("caches").absolute())},
            accelerator_config=accelerator_config,
            per_device_train_batch_size=7,
        )
        trainer.train()
        losses.append(trainer.losses)
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2 * -(-len(train_dataset) // 7)


def test_a_model_card_ignores_arguments_that_it_does_not_know(train_dataset, monkeypatch) -> None:
    """Those of a newer ``Trainer.create_model_card``."""
    trainer = make_trainer(tiny_vit(), train_dataset)

    def newer(self, license=None, model_name=None, finetuned_from=None, tasks=None, tags=None, shoe_size=None, **more):
        raise AssertionError

    monkeypatch.setattr(Trainer, "create_model_card", newer)
    trainer.create_model_card(license="mit", shoe_size=47, other=1)
    card = Path("out/README.md").read_text()
    assert "license: mit" in card
    assert "47" not in card
