"""Tasks: one more is an object and its name."""

from __future__ import annotations

import pytest
import torch
from support.tiny import make_trainer, tiny_vit
from transformers import ViTForImageClassification

from hf_freezecache.data.task import IMAGE_CLASSIFICATION, TASKS, Task, task_of


class ViTForGrading(ViTForImageClassification):
    """A model whose class no task names yet."""


def grading(calls: list[torch.Size]) -> Task:
    def soft_loss(logits, targets, label_smoothing, num_items):
        calls.append(logits.shape)
        return (logits - targets).square().mean()

    return Task(
        tag="grading",
        title="Grading",
        model_suffix="ForGrading",
        auto_class="AutoModelForImageClassification",
        num_classes=lambda config: None if config is None else config.num_labels,
        soft_loss=soft_loss,
    )


def test_a_model_has_the_task_that_its_class_names() -> None:
    assert task_of(tiny_vit()) is IMAGE_CLASSIFICATION
    assert task_of(torch.nn.Linear(2, 2)) is None


@pytest.mark.slow
def test_another_task_brings_its_loss_and_its_tag(train_dataset, monkeypatch) -> None:
    calls: list[torch.Size] = []
    monkeypatch.setitem(TASKS, "grading", grading(calls))
    model = ViTForGrading(tiny_vit().config)
    model.loss_type = "ForImageClassification"  # transformers chooses the loss by the class name, too
    # The check that mixing fits the model's own loss knows cross-entropy only, which this model has.
    trainer = make_trainer(
        model, train_dataset, schedule="0:2", cache={"feature_augmentation": "mixup:0.2"}, num_train_epochs=1
    )
    trainer.train()
    assert calls == [torch.Size([10, 4])] * 5
    trainer.create_model_card()
    assert trainer._record.card["tasks"] == ["grading"]
