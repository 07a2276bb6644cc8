"""What would fail at the first evaluation fails before anything is built."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import Recorder, Rows, TinyTransform, make_trainer, tiny_vit
from transformers import default_data_collator

from hf_freezecache.errors import DataError, UnsupportedSetupError

EACH_EPOCH = {"eval_strategy": "epoch", "num_train_epochs": 1}


def refused(trainer, match: str, error: type[Exception] = DataError) -> None:
    with pytest.raises(error, match=match):
        trainer.train()
    assert not Path("caches").exists()
    assert trainer.state.global_step == 0


def without_labels(batch):
    return {"pixel_values": TinyTransform(False)(batch)["pixel_values"]}


def narrow(batch):
    return {**TinyTransform(False)(batch), "pixel_values": [torch.zeros(1, 16, 16) for _ in batch["image"]]}


@pytest.mark.by_default(3)
@pytest.mark.parametrize("kind", ["missing column", "dict", "shape", "label", "rows"])
def test_an_evaluation_set_that_fails_is_named(train_dataset, eval_dataset, images, kind) -> None:
    wrong_labels = [{**eval_dataset[row], "labels": 4} for row in range(3)]
    sets = {
        "missing column": eval_dataset.rename_column("image", "picture"),
        "dict": {"good": eval_dataset, "bad": eval_dataset.rename_column("image", "picture")},
        "shape": images.with_transform(narrow),
        "label": Rows(wrong_labels),
        "rows": Rows([{"image": 1}]),
    }
    matches = {"missing column": "KeyError: 'image'", "dict": "evaluation set 'bad' .*KeyError: 'image'"}
    trainer = make_trainer(tiny_vit(), train_dataset, sets[kind], **EACH_EPOCH)
    refused(trainer, matches.get(kind, "The evaluation set would fail at the first evaluation"))


@pytest.mark.by_default(2)
@pytest.mark.parametrize("bad", [4, -1, None])
def test_a_bad_label_late_in_an_evaluation_set(train_dataset, images, bad) -> None:
    labels = [bad if row == 37 else row % 4 for row in range(50)]
    rows = images.remove_columns("label").add_column("label", labels).with_transform(TinyTransform(False))
    match = (
        "Row 37 of the evaluation set, which has label=None" if bad is None else f"row 37 has label={bad}, .*evaluation"
    )
    refused(make_trainer(tiny_vit(), train_dataset, rows, **EACH_EPOCH), match)


@pytest.mark.slow
def test_a_collator_that_leaves_bad_rows_out_of_an_evaluation(train_dataset, images) -> None:
    labels = [None if row == 37 else row % 4 for row in range(50)]
    rows = images.remove_columns("label").add_column("label", labels).with_transform(TinyTransform(False))

    def collate(examples):
        return default_data_collator([example for example in examples if example["labels"] is not None])

    make_trainer(tiny_vit(), train_dataset, rows, trainer={"data_collator": collate}, **EACH_EPOCH).train()


def test_columns_are_removed_as_trainer_does(images, train_dataset, eval_dataset) -> None:
    """The default of ``TrainingArguments`` removes the image column, which plain ``Trainer`` notices at step 0."""
    settings = {**EACH_EPOCH, "remove_unused_columns": True}
    refused(
        make_trainer(tiny_vit(), train_dataset, **settings | {"eval_strategy": "no"}), r"\['image'\] of the training"
    )
    ready = [{**train_dataset[row]} for row in range(50)]
    trainer = make_trainer(tiny_vit(), Rows(ready), eval_dataset, cache={"dataset_id": "rows"}, **settings)
    refused(trainer, r"removes the columns \['image'\].*remove_unused_columns=False")


@pytest.mark.slow
def test_a_run_that_will_not_evaluate_is_not_asked(train_dataset, eval_dataset) -> None:
    make_trainer(tiny_vit(), train_dataset, eval_dataset.rename_column("image", "picture"), num_train_epochs=1).train()


@pytest.mark.slow
def test_good_sets_are_evaluated_as_ever(train_dataset, eval_dataset) -> None:
    """Nothing of the trial shows: not in the log, the losses, or what the user's code counts."""

    class Counting(Recorder):
        predicted = 0

        def prediction_step(self, *args, **kwargs):
            self.predicted += 1
            return super().prediction_step(*args, **kwargs)

    def metrics(prediction):
        calls.append(len(prediction.predictions))
        return {"accuracy": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}

    runs = []
    for eval_strategy in ("epoch", "no"):
        calls: list[int] = []
        trainer = make_trainer(
            tiny_vit(hidden_dropout_prob=0.1),
            train_dataset,
            {"a": eval_dataset, "b": Rows([eval_dataset[row] for row in range(3)])},
            cls=Counting,
            trainer={"compute_metrics": metrics},
            **EACH_EPOCH | {"eval_strategy": eval_strategy},
        )
        trainer.train()
        runs.append(trainer.losses)
        assert calls == ([20, 3] if eval_strategy == "epoch" else [])
        assert trainer.predicted == (4 if eval_strategy == "epoch" else 0)
    assert runs[0] == runs[1]
    assert [e["eval_a_accuracy"] >= 0 for e in trainer.state.log_history if "eval_a_accuracy" in e] == []


@pytest.mark.slow
def test_data_that_can_be_read_once_are_left_alone(train_dataset, eval_dataset) -> None:
    class Once(torch.utils.data.IterableDataset):
        def __init__(self) -> None:
            self.rows = iter([eval_dataset[row] for row in range(20)])

        def __iter__(self):
            return self.rows

    trainer = make_trainer(tiny_vit(), train_dataset, Once(), **EACH_EPOCH)
    trainer.train()
    assert [entry["eval_loss"] > 0 for entry in trainer.state.log_history if "eval_loss" in entry] == [True]


@pytest.mark.slow
def test_an_evaluation_of_the_users_own_is_not_refused(train_dataset, eval_dataset, caplog) -> None:
    class Own(Recorder):
        def evaluate(self, *args, **kwargs):
            return {}

    bad = eval_dataset.rename_column("image", "picture")
    make_trainer(tiny_vit(), train_dataset, bad, cls=Own, **EACH_EPOCH).train()
    assert "Own overrides evaluate, which may do otherwise" in caplog.text


@pytest.mark.by_default(2)
@pytest.mark.parametrize(
    ("kind", "metric", "fine"),
    [
        ("one", "loss", True),
        ("one", "accuracy", False),
        ("several", "loss", False),
        ("several", "eval_a_loss", True),
        ("unlabelled", "loss", False),
        ("metrics", "accuracy", True),
    ],
)
@pytest.mark.by_default(1)
def test_the_metric_of_the_best_model_must_be_given(train_dataset, images, eval_dataset, kind, metric, fine) -> None:
    sets = {"several": {"a": eval_dataset, "b": eval_dataset}, "unlabelled": images.with_transform(without_labels)}
    trainer = make_trainer(
        tiny_vit(),
        train_dataset,
        sets.get(kind, eval_dataset),
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        trainer={"compute_metrics": lambda prediction: {"accuracy": 1.0}} if kind == "metrics" else {},
        **EACH_EPOCH | {"save_strategy": "epoch"},
    )
    if fine:
        trainer.train()
    else:
        refused(trainer, f"metric_for_best_model='{metric}' is not among", UnsupportedSetupError)
