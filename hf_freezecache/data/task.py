"""Tasks: what their labels are, and by which names transformers and the Hub know them.

To add one, write a ``Task`` and name it in ``TASKS``. What its head sees, the features, is found by ``Split.logits_and_features``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .soft_labels import soft_cross_entropy

__all__ = ["IMAGE_CLASSIFICATION", "TASKS", "Task", "task_of"]


def _num_exclusive_classes(config: Any) -> int | None:
    if getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        return None
    count = getattr(config, "num_labels", None)
    return count if count is not None and count > 1 else None


@dataclass(frozen=True)
class Task:
    """What is particular to a task.

    Attributes:
        tag: The task's name on the Hub.
        title: The task's name for people.
        model_suffix: How the class names of its models end.
        auto_class: Name of the class of transformers that loads its models.
        num_classes: Gives the number of classes of a model's configuration; ``None`` if labels are not exclusive classes.
        soft_loss: The loss of (logits, soft labels, label smoothing, number of items), for samples that are mixed.
    """

    tag: str
    title: str
    model_suffix: str
    auto_class: str
    num_classes: Callable[[Any], int | None]
    soft_loss: Callable[[Tensor, Tensor, float, Tensor | int | None], Tensor]


IMAGE_CLASSIFICATION = Task(
    tag="image-classification",
    title="Image Classification",
    model_suffix="ForImageClassification",
    auto_class="AutoModelForImageClassification",
    num_classes=_num_exclusive_classes,
    soft_loss=soft_cross_entropy,
)

#: Extension point: tag -> task.
TASKS: dict[str, Task] = {task.tag: task for task in (IMAGE_CLASSIFICATION,)}


def task_of(model: nn.Module) -> Task | None:
    """Return the task of a model, by the name of its class; ``None`` for a class that no task names."""
    return next((task for task in TASKS.values() if type(model).__name__.endswith(task.model_suffix)), None)
