"""Soft labels: one-hot rows of classes, and a cross-entropy that equals ``Trainer``'s where the labels are hard."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.tiny import NUM_CLASSES
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.trainer_pt_utils import LabelSmoother

from hf_freezecache.data.soft_labels import class_targets, soft_cross_entropy
from hf_freezecache.errors import DataError


def test_targets_are_one_hot_rows_and_zero_without_a_label() -> None:
    targets = class_targets(torch.tensor([2, -100, 0]), 4)
    assert targets.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert targets.dtype == torch.float32


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.long), [1, 2], None])
def test_labels_that_are_no_classes_are_refused(labels) -> None:
    with pytest.raises(DataError, match="one integer class per sample"):
        class_targets(labels, 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("labels", [[0, 3, 1, 1], [0, -100, 1, -100]])
def test_cross_entropy_of_one_hot_targets_is_that_of_trainer(smoothing, num_items, labels) -> None:
    logits, labels = torch.randn(4, NUM_CLASSES, requires_grad=True), torch.tensor(labels)
    if smoothing and "num_items_in_batch" not in inspect.signature(LabelSmoother.__call__).parameters:
        pytest.skip("this version of transformers smooths labels without counting items")
    if smoothing:
        expected = LabelSmoother(smoothing)({"logits": logits}, labels.clone(), num_items_in_batch=num_items)
    else:
        expected = fixed_cross_entropy(logits, labels, num_items)
    found = soft_cross_entropy(logits, class_targets(labels, NUM_CLASSES), smoothing, num_items)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_cross_entropy_of_soft_targets_is_linear_in_them() -> None:
    logits = torch.randn(1, NUM_CLASSES)
    a, b, mixed = (
        soft_cross_entropy(logits, torch.tensor([row]), 0.1)
        for row in ([1.0, 0, 0, 0], [0, 0, 1.0, 0], [0.3, 0, 0.7, 0])
    )
    torch.testing.assert_close(mixed, 0.3 * a + 0.7 * b)
    with pytest.raises(DataError, match=r"the model gave \(1, 4\)"):
        soft_cross_entropy(logits, torch.ones(2, 4))
