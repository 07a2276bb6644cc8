"""Labels are judged by what transform and collator make of them, and bad ones late in the data set are found early."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from support.tiny import TinyTransform, make_trainer, tiny_vit, with_head
from torch.utils.data import Dataset, Subset

from hf_freezecache.errors import DataError
from hf_freezecache.training.label_check import suspicious_rows


def pixels(batch):
    return TinyTransform(False)({"image": batch["image"], "label": batch["image"]})["pixel_values"]


def labelled(images, labels, feature="int64", name="label", label=lambda value: value):
    """The images with other labels, and a transform that gives ``label(value)`` of each."""
    features = datasets.Features({"image": datasets.Image(), name: datasets.Value(feature)})
    dataset = datasets.Dataset.from_dict({"image": images["image"], name: labels}, features=features)
    return dataset.with_transform(
        lambda batch: {"pixel_values": pixels(batch), "labels": [label(value) for value in batch[name]]}
    )


def trainer_on(dataset, model=None, **settings):
    cache = {"transform_id": "t", "dataset_id": "d"}
    return make_trainer(
        model or tiny_vit(), dataset, schedule="0:2", num_train_epochs=1, **{"cache": cache, **settings}
    )


def refused(dataset, match: str, **settings) -> None:
    trainer = trainer_on(dataset, **settings)
    with pytest.raises(DataError, match=match):
        trainer.train()
    assert not Path("caches").exists()
    assert trainer.state.global_step == 0


def with_one(bad, row: int = 37) -> list:
    labels = [place % 4 for place in range(50)]
    labels[row] = bad
    return labels


def test_labels_that_the_transform_maps(images) -> None:
    dataset = labelled(images, [row % 4 + 1 for row in range(50)], label=lambda value: value - 1)
    trainer = trainer_on(dataset)
    trainer.train()
    assert trainer.state.global_step == 5


@pytest.mark.slow
def test_labels_that_the_collator_maps(images) -> None:
    def collate(examples):
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.tensor([example["labels"] - 1 for example in examples]),
        }

    dataset = labelled(images, [row % 4 + 1 for row in range(50)])
    refused(dataset, r"row \d+ has label=4, but the model has 4 classes")
    trainer_on(dataset, trainer={"data_collator": collate}).train()


def test_another_column_called_labels(images) -> None:
    dataset = images.add_column("labels", [7 * row for row in range(50)]).with_transform(TinyTransform(False))
    trainer_on(dataset).train()


@pytest.mark.by_default(1)
@pytest.mark.parametrize("bad", [4, -1, 1000])
def test_one_label_late_in_the_data_is_named(images, bad) -> None:
    refused(labelled(images, with_one(bad)), rf"row 37 has label={bad}, but the model has 4 classes")


def test_one_label_that_the_transform_spoils(images) -> None:
    dataset = labelled(images, [row % 4 + 1 if row != 41 else 0 for row in range(50)], label=lambda value: value - 1)
    refused(dataset, "row 41 has label=0, of which transform and data_collator make labels=-1")


@pytest.mark.by_default(1)
@pytest.mark.parametrize("name", ["label", "species"])
def test_one_null(images, name) -> None:
    refused(
        labelled(images, with_one(None), name=name), rf"Row 37 .*has {name}=None, gets nothing as labels; the first"
    )


def test_one_null_that_a_collator_cannot_stack(images) -> None:
    def collate(examples):
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }

    refused(
        labelled(images, with_one(None)),
        r"Row 37 .*has label=None, cannot be made a sample: \w+Error",
        trainer={"data_collator": collate},
    )


def test_one_null_as_a_float(images) -> None:
    """An own collator may make NaN of nothing, and one dtype of the batch that holds it."""

    def collate(examples):
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.from_numpy(
                np.array([e["labels"] if e["labels"] is not None else np.nan for e in examples])
            ),
        }

    dataset = labelled(images, with_one(None))
    refused(dataset, r"Row 37 .*label=None, gets torch.float64 \(\) as labels", trainer={"data_collator": collate})


@pytest.mark.slow
def test_nulls_that_are_given_a_label(images) -> None:
    dataset = labelled(images, with_one(None), label=lambda value: -100 if value is None else value)
    trainer_on(dataset).train()


def test_a_rare_name_that_has_no_number(images) -> None:
    names = ["abcd"[row % 4] for row in range(50)]
    names[43] = "D"
    refused(labelled(images, names, "string", label="abcd".index), "Row 43 .*has label=D, cannot")


@pytest.mark.parametrize("kind", ["subset", "targets"])
def test_data_sets_with_targets(images, kind) -> None:
    class Folder(Dataset):
        targets = with_one(9)

        def __len__(self) -> int:
            return 50

        def __getitem__(self, row):
            return {"pixel_values": pixels({"image": [images[row]["image"]]})[0], "labels": self.targets[row]}

    dataset = Folder() if kind == "targets" else Subset(Folder(), range(49, 9, -1))
    refused(dataset, f"row {37 if kind == 'targets' else 12} has targets=9, but the model has 4 classes")


@pytest.mark.slow
@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_a_label_for_each_class(images, problem_type) -> None:
    """transformers takes floating-point labels for several classes, whatever the configuration says."""
    dataset = labelled(images, [row % 4 for row in range(50)], label=lambda value: torch.eye(4)[value])
    model = tiny_vit(problem_type=problem_type)
    cached = trainer_on(dataset, model)
    cached.train()
    live = trainer_on(dataset, tiny_vit(problem_type=problem_type), cache={"mode": "never"})
    live.train()
    assert cached.losses == live.losses
    assert not cached._run.data.has_classes


@pytest.mark.slow
def test_a_head_with_more_classes_than_labels(images) -> None:
    dataset = labelled(images, [row % 3 for row in range(50)])
    trainer_on(dataset, with_head(1000)).train()


def test_suspicious_rows_of_columns() -> None:
    rows = datasets.Dataset.from_dict(
        {
            "path": [f"{row}.jpg" for row in range(600)],
            "label": [row % 4 for row in range(599)] + [-100],
            "score": [0.5] * 300 + [float("nan")] + [0.25] * 299,
            "text": ["x" * 1000 if row else None for row in range(600)],
        },
    )
    assert suspicious_rows(rows, 4) == {
        0: "label=0",
        3: "label=3",
        599: "label=-100",
        1: "label=1",
        300: "score=nan",
        301: "score=0.25",
    }
    assert suspicious_rows(rows.select([]), 4) == {}
    assert suspicious_rows([1, 2, 3], 4) == {}
    shuffled = rows.shuffle(seed=0)
    (row,) = [row for row, cell in suspicious_rows(shuffled, 4).items() if cell == "label=-100"]
    assert shuffled[row]["label"] == -100
