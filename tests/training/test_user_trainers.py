"""What users of ``Trainer`` do around training: their own loaders, optimizers, batches, generators and callbacks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import many
from support.children import run_group
from support.parity import assert_same, parameters_of
from support.tiny import Recorder, TinyTransform, make_trainer, tiny_vit
from torch import nn
from torch.utils.data import ConcatDataset, Dataset
from transformers import TrainerCallback

from hf_freezecache.data.layout import ChunkLayout
from hf_freezecache.data.sampler import ChunkSampler
from hf_freezecache.errors import CacheMismatchError, UnsupportedModelError, UnsupportedSetupError
from hf_freezecache.stages import Stage
from hf_freezecache.training import evaluation_comparison as comparison
from hf_freezecache.training import runtime as runtime_module
from hf_freezecache.training.adapter import start_run
from hf_freezecache.training.cache_check import spot_check
from hf_freezecache.training.placement import place_model
from hf_freezecache.training.step_outcome import StepOutcome, difference


def trained(rows, mode: str = "always", **settings: Any):
    cache = {"mode": mode, "cache_dir": f"caches-{mode}", **settings.pop("cache", {})}
    model = tiny_vit(**settings.pop("model", {}))
    trainer = make_trainer(model, rows, cache=cache, **{"schedule": "0:2", "num_train_epochs": 2, **settings})
    trainer.train()
    return trainer


def assert_cached_as_live(rows, **settings: Any):
    """Train on images and from a cache; losses and weights must be the same."""
    live, cached = (trained(rows, mode, **settings) for mode in ("never", "always"))
    assert [one.trained_from for one in cached._record.decisions if one.split_point] == ["cache"]
    np.testing.assert_equal(cached.losses, live.losses)  # NaN in the same places
    assert_same(parameters_of(cached.model), parameters_of(live.model))
    return live, cached


# ---- Going on ----


@pytest.mark.by_default(1)
@pytest.mark.parametrize("changed", [{"per_device_train_batch_size": 5}, {"gradient_accumulation_steps": 1}])
def test_a_run_whose_epochs_have_more_steps_is_not_resumed_where_fewer_blocks_are_frozen(
    train_dataset, changed
) -> None:
    """The optimizer of the checkpoint knows the blocks no more that this epoch trains: they would stay as they are, unseen."""
    settings = {"schedule": "0:0,2:2", "num_train_epochs": 4, "save_strategy": "steps", "save_steps": 1}
    settings |= {"gradient_accumulation_steps": 2} if "gradient_accumulation_steps" in changed else {}
    whole = make_trainer(tiny_vit(), train_dataset, **settings)
    whole.train()
    step = whole.state.max_steps // 2 + 1
    resumed = make_trainer(tiny_vit(), train_dataset, output_dir="again", **{**settings, **changed})
    with pytest.raises(UnsupportedSetupError, match=r"epochs had fewer|more steps now.*Resume with the batch size"):
        resumed.train(resume_from_checkpoint=f"out/checkpoint-{step}")
    # In the stage of the checkpoint it goes on.
    same = make_trainer(tiny_vit(), train_dataset, output_dir="again", **{**settings, **changed})
    same.train(resume_from_checkpoint=f"out/checkpoint-{whole.state.max_steps}")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_with_a_name_is_resumed(train_dataset) -> None:
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        return peft.get_peft_model(tiny_vit(), config, adapter_name="digits")

    settings = {"schedule": "0:2", "num_train_epochs": 2, "save_strategy": "epoch"}
    whole = make_trainer(adapted(), train_dataset, **settings)
    whole.train()
    for asked in (True, "out/checkpoint-5"):
        resumed = make_trainer(adapted(), train_dataset, **settings)
        resumed.train(resume_from_checkpoint=asked)
        assert_same(parameters_of(resumed.model), parameters_of(whole.model))


# ---- Optimizers ----


@pytest.mark.by_default(2)
@pytest.mark.parametrize("collected", [list, iter, tuple])
@pytest.mark.parametrize("schedule", ["0:0,1:2", "0:2,1:0"])
def test_groups_of_an_optimizers_class_and_arguments_stay(train_dataset, collected, schedule) -> None:
    model = tiny_vit()
    groups = [
        {"params": collected(model.vit.parameters()), "lr": 1e-5},
        {"params": collected(model.classifier.parameters()), "lr": 1e-2},
    ]
    asked = (torch.optim.AdamW, {"params": collected(groups), "lr": 1e-3, "weight_decay": 0.0})
    trainer = make_trainer(
        model, train_dataset, None, schedule, num_train_epochs=2, trainer={"optimizer_cls_and_kwargs": asked}
    )
    for _ in range(2):
        trainer.train()
        found = [(group["initial_lr"], len(group["params"])) for group in trainer.optimizer.param_groups]
        assert [rate for rate, _ in found] == [1e-5, 1e-2]
        assert found[1][1] == 2
        trained_too = sum(p.requires_grad for p in model.vit.parameters()) if schedule == "0:2,1:0" else None
        assert trained_too is None or found[0][1] == trained_too
    assert set(groups[0]) == {"params", "lr"}  # the user's own are as they were


def test_auto_keeps_to_the_steps_of_a_scheduler_of_the_users_own(train_dataset) -> None:
    def made(freeze: dict[str, Any], **settings: Any):
        model = tiny_vit()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        # Raises on a step more.
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=30)
        own = {"optimizers": (optimizer, scheduler)}
        return make_trainer(
            model, train_dataset, None, "auto", trainer=own, freeze=freeze, num_train_epochs=6, **settings
        )

    trainer = made({})
    assert trainer.args.num_train_epochs == 6
    trainer.train()
    assert trainer.state.global_step == 30
    with pytest.raises(UnsupportedSetupError, match="learning-rate scheduler that was passed"):
        made({"budget": 0.5})
    assert made({}, max_steps=30).args.max_steps == 30


# ---- Loaders ----


@pytest.mark.parametrize("name", ["get_train_dataloader", "_get_train_sampler", "_get_dataloader"])
def test_a_loader_set_on_the_trainer_itself_is_refused(train_dataset, name) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:2")
    setattr(trainer, name, lambda *args, **kwargs: None)
    with pytest.raises(UnsupportedSetupError, match=f"overrides {name}"):
        trainer.train()


def test_a_class_with_loaders_of_its_own_is_refused(train_dataset) -> None:
    class Own(Recorder):
        def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
            return super()._get_dataloader(*args, **kwargs)

    with pytest.raises(UnsupportedSetupError, match="overrides _get_dataloader"):
        make_trainer(tiny_vit(), train_dataset, schedule="0:2", cls=Own)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_that_has_begun_keeps_its_order_and_its_views(processes) -> None:
    sampler = ChunkSampler([ChunkLayout(60, 4, 0)], 1, 2, 3, 2, (0,) * processes, 4)
    sampler.set_epoch(2)
    expected = list(sampler)
    begun = iter(sampler)
    first = [next(begun) for _ in range(5)]
    sampler.set_epoch(0)
    assert first + list(begun) == expected
    assert list(sampler) != expected


@pytest.mark.by_default(1)
@pytest.mark.parametrize("schedule", ["0:0", "0:2"])
def test_a_callback_that_looks_at_a_batch_within_an_epoch_changes_nothing(train_dataset, schedule) -> None:
    class Looks(TrainerCallback):
        batches = 0

        def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
            self.batches += len(next(iter(train_dataloader))["labels"]) > 0

    def run(callbacks):
        cache = {"num_views": 3, "shuffle_window": 2, "chunk_size": 4}
        return trained(
            train_dataset, schedule=schedule, num_train_epochs=3, cache=cache, trainer={"callbacks": callbacks}
        )

    looks = Looks()
    assert run([looks]).losses == run([]).losses
    assert looks.batches == 15


class Annealed(Recorder):
    """Weighs the loss by the number of batches."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * (1 + self.state.global_step / len(self.get_train_dataloader()))


def test_a_loss_may_ask_for_the_loader(train_dataset) -> None:
    live, _ = assert_cached_as_live(train_dataset, cls=Annealed)
    assert len(live.losses) == 10


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


# ---- Data ----


class MissingTransform(TinyTransform):
    """Gives two targets for each image, of which some are missing."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        targets = [torch.tensor([float(label), float("nan") if label % 2 else 1.0]) for label in batch["label"]]
        return {**super().__call__(batch), "labels": targets}


class Regression(Recorder):
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        labels = inputs.pop("labels")
        outputs, there = model(**inputs), ~labels.isnan()
        loss = (outputs.logits[:, :2][there] - labels[there]).square().mean()
        return (loss, outputs) if return_outputs else loss


def test_labels_that_are_missing_are_equal(images) -> None:
    rows = images.with_transform(MissingTransform(True))

    def run():
        return trained(rows, cls=Regression, num_train_epochs=1)

    first, again = run(), run()
    assert [one.cache for one in (first._record.decisions[0], again._record.decisions[0])] == ["built", "found"]
    assert first.losses == again.losses
    assert first.losses == [
        pytest.approx(loss) for loss in trained(rows, "never", cls=Regression, num_train_epochs=1).losses
    ]


class Wrapped(Dataset):
    """Rows of other data sets, under a name of its own."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, row: int) -> Any:
        return self.inner[row]


class Transformed(Dataset):
    def __init__(self, rows: Any, transform: Any) -> None:
        self.rows, self.transform = list(rows), transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return {name: values[0] for name, values in self.transform({k: [v] for k, v in self.rows[row].items()}).items()}


@pytest.mark.slow
def test_many_parts_are_looked_into_and_a_circle_ends(images) -> None:
    def cached(strength: float):
        parts = [Wrapped(Transformed(images.select(range(4)), TinyTransform(True))) for _ in range(11)]
        parts.append(Wrapped(Transformed(images.select(range(6)), TinyTransform(True, strength))))
        rows = Wrapped(ConcatDataset(parts))
        rows.parent = rows.inner.parent = rows
        cache = {"dataset_id": "rows", "cache_dir": "caches"}
        return trained(rows, num_train_epochs=1, cache=cache)._record.decisions[0].cache

    assert [cached(0.2), cached(0.2), cached(0.2000001)] == ["built", "found", "built"]


@pytest.mark.by_default(1)
@pytest.mark.parametrize(
    "wrap", [Wrapped, lambda rows: ConcatDataset([rows]), lambda rows: [Wrapped(rows)]], ids=["one", "several", "list"]
)
def test_a_transform_behind_a_wrapper_is_seen(images, wrap) -> None:
    def cached(strength: float):
        inner = wrap(Transformed(images, TinyTransform(True, strength)))
        rows = Wrapped(ConcatDataset(inner)) if isinstance(inner, list) else inner
        trainer = trained(rows, num_train_epochs=1, cache={"dataset_id": "rows", "cache_dir": "caches"})
        return trainer._record.decisions[0].cache

    assert [cached(0.1), cached(0.1), cached(0.1000001)] == ["built", "found", "built"]


@pytest.mark.by_default(1)
@pytest.mark.parametrize("rows", [40, 45])
def test_more_or_fewer_rows_under_one_name_are_refused(images, rows) -> None:
    def run(count: int):
        dataset = Wrapped(images.select(range(count)).with_transform(TinyTransform(False)))
        return trained(dataset, num_train_epochs=1, cache={"dataset_id": "rows", "cache_dir": "caches"})

    run(42)
    with pytest.raises(CacheMismatchError, match=f"is of 42 rows, and the data set has {rows}"):
        run(rows)


class WeighedTransform(TinyTransform):
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = super().__call__({"image": batch["pixel_values"], "label": batch["labels"]})
        return {**found, "sample_weight": [float(label) for label in batch["labels"]]}


class Weighs(Recorder):
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        weights = inputs.pop("sample_weight")
        outputs = model(pixel_values=inputs["pixel_values"])
        losses = nn.functional.cross_entropy(outputs.logits, inputs["labels"], reduction="none")
        loss = (losses * weights).mean()
        return (loss, outputs) if return_outputs else loss


def test_what_a_transform_gives_stays_where_trainer_removes_columns(images) -> None:
    rows = images.rename_columns({"image": "pixel_values", "label": "labels"}).with_transform(WeighedTransform(False))
    settings = {"cls": Weighs, "remove_unused_columns": True, "cache": {"num_views": 1}}
    assert_cached_as_live(rows, **settings)


def test_unused_parameters_are_looked_for_where_forward_or_loss_are_the_users_own(train_dataset, monkeypatch) -> None:
    class OwnForward(type(tiny_vit())):
        pass

    class OwnLoss(Recorder):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    def looks(model: nn.Module, cls: type, **settings: Any) -> bool:
        trainer = make_trainer(model, train_dataset, None, "0:2", cls=cls, **settings)
        run = start_run(trainer, [Stage(0, 0, 2)], 1, None)
        monkeypatch.setattr(runtime_module, "is_replicated", lambda accelerator: True)
        monkeypatch.setattr(runtime_module, "unwrapped", lambda accelerator, wrapped: wrapped)
        trainer.accelerator.ddp_handler = SimpleNamespace(find_unused_parameters=None)
        run.runtime.unwrap(trainer.model, run.data.example_batch)
        return bool(trainer.accelerator.ddp_handler.find_unused_parameters)

    assert not looks(tiny_vit(), Recorder)
    assert looks(tiny_vit(), OwnLoss)
    assert looks(tiny_vit(), Recorder, trainer={"compute_loss_func": lambda *args, **kwargs: None})
    own = tiny_vit()
    own.__class__ = OwnForward
    assert looks(own, Recorder)


# ---- Evaluating, precision, devices ----


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
