"""Loaders, data sets and transforms that are the user's own, and what callbacks look at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny import Recorder, TinyTransform, make_trainer, tiny_vit
from support.user_trainers import assert_cached_as_live, trained
from torch import nn
from torch.utils.data import ConcatDataset, Dataset
from transformers import TrainerCallback

from hf_freezecache.data.layout import ChunkLayout
from hf_freezecache.data.sampler import ChunkSampler
from hf_freezecache.errors import CacheMismatchError, UnsupportedSetupError
from hf_freezecache.stages import Stage
from hf_freezecache.training import runtime as runtime_module
from hf_freezecache.training.adapter import start_run

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
