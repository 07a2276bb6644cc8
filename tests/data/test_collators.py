"""The checked collator: it calls the user's collator, checks labels, and carries geometry and keys beside the batch."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchFeature

from hf_freezecache.data.collators import CheckedCollator, check_label_values
from hf_freezecache.data.geometry import GEOMETRY_NAME
from hf_freezecache.data.image_transform import ImageTransform
from hf_freezecache.data.views import ViewDataset
from hf_freezecache.errors import DataError


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    assert all(isinstance(example, dict) for example in examples), "the user's collator gets examples and nothing else"
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def examples_of(*labels: int) -> list[dict[str, Any]]:
    return [{"pixel_values": torch.full((3, 2, 2), float(row)), "labels": label} for row, label in enumerate(labels)]


CHECKED = CheckedCollator(collate, ("labels",), 4)


@given(st.lists(st.integers(-102, 6), min_size=1, max_size=6))
def test_labels_are_classes_of_the_model_or_missing(labels) -> None:
    examples = examples_of(*labels)
    wrong = [label for label in labels if label != -100 and not 0 <= label < 4]
    if not wrong:
        expected = collate(examples)
        batch = CHECKED(examples)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
        return
    with pytest.raises(DataError, match=rf"found labels={wrong[0]}, but the model has 4 classes.*\[0, 4\)"):
        CHECKED(examples)


@pytest.mark.parametrize("labels", [torch.tensor([7.5]), torch.tensor([[7, 9]]), "text", None])
def test_only_integers_of_one_per_sample_are_taken_for_classes(labels) -> None:
    check_label_values({"labels": labels}, ("labels",), 4)


def test_without_classes_or_names_of_labels_nothing_is_checked() -> None:
    batch = {"labels": torch.tensor([9])}
    check_label_values(batch, ("labels",), None)
    check_label_values(batch, None, 4)
    check_label_values(batch, ("start_positions",), 4)


def test_geometry_comes_beside_the_users_batch(images) -> None:
    training, evaluation = (ImageTransform(8, train=train, scale=(0.2, 0.5)) for train in (True, False))
    views = ViewDataset(images, 5, training, evaluation)
    keys = [(3, 0), (3, 1), (7, 2)]
    batch = CHECKED.with_geometry()([views.with_geometry()[key] for key in keys])
    numbers = batch.pop(GEOMETRY_NAME)
    expected = CHECKED([views[key] for key in keys])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert numbers.dtype == torch.float32
    assert numbers[0].tolist() == [0, 0, 1, 1, 0]
    drawn = [training.parameters(5, row, view, 16, 16).geometry() for row, view in keys[1:]]
    torch.testing.assert_close(numbers[1:], torch.tensor(drawn))
    assert not isinstance(views[3, 1], tuple), "the views themselves stay as they are"


def test_views_of_an_unknown_geometry_count_as_the_whole_image(images) -> None:
    rows = images.with_transform(lambda batch: {"pixel_values": batch["image"], "labels": batch["label"]})
    assert ViewDataset(rows, 5).with_geometry()[3, 2][1] == (0, 0, 1, 1, 0)


def test_keys_come_beside_the_batch_in_the_order_of_the_items() -> None:
    keys = [(9, 1), (2, 1), (5, 1)]
    # As a worker process gets it.
    collate_keyed = pickle.loads(pickle.dumps(CHECKED.collate_keyed))
    carried, batch = collate_keyed(list(zip(keys, examples_of(3, 0, -100), strict=True)))
    assert carried == keys
    assert batch["labels"].tolist() == [3, 0, -100]


@pytest.mark.parametrize(
    ("examples", "cause"),
    [(examples_of(0, 4), "DataError: Labels out of range: found labels=4"), ([{"labels": 0}, {}], "KeyError")],
)
def test_where_keys_are_known_a_failure_names_the_rows(examples, cause) -> None:
    items = list(zip([(9, 1), (2, 1)], examples, strict=True))
    with pytest.raises(DataError, match=rf"data_collator failed on rows \[9, 2\] \(view 1\): {cause}") as caught:
        CHECKED.collate_keyed(items)
    assert caught.value.__cause__ is not None


def test_any_mapping_will_do_as_the_users_batch() -> None:
    batch = CheckedCollator(lambda examples: BatchFeature(collate(examples)))(examples_of(1, 2))
    assert type(batch) is dict
    assert batch["labels"].tolist() == [1, 2]
