"""Soft labels of mixed samples, and the loss that takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import DataError

__all__ = ["class_targets", "soft_cross_entropy"]


def class_targets(labels: Any, num_classes: int) -> Tensor:
    """Return one-hot rows (batch, classes) float32; the row of a sample without a label (-100) is zero.

    Raises:
        DataError: ``labels`` is not a tensor (batch,) of integers.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        kind = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(
            "feature_augmentation mixes samples, for which a batch must hold one integer class per sample as labels (batch,); "
            f"found {kind}. Leave mixup and cutmix out, or let the data_collator return such labels."
        )
    labels = labels.long().unsqueeze(1)
    targets = torch.zeros(len(labels), num_classes, device=labels.device)
    return targets.scatter_(1, labels.clamp(min=0), (labels != -100).float())


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, num_items: Tensor | int | None = None
) -> Tensor:
    """Return the cross-entropy with soft labels; for one-hot targets it equals ``Trainer``'s with hard labels.

    The weight of a row is the sum of its targets, so a sample without a label has no weight.

    Args:
        logits: (batch, classes).
        targets: (batch, classes) float32.
        label_smoothing: As in ``TrainingArguments.label_smoothing_factor``.
        num_items: Number of labels in all batches of an optimizer step, by which the sum is divided. Default: the labels of
            this batch.

    Raises:
        DataError: The shapes of logits and targets differ.
    """
    if logits.shape != targets.shape:
        raise DataError(
            f"Mixing samples needs logits (batch, classes) = {tuple(targets.shape)}, but the model gave "
            f"{tuple(logits.shape)}. Leave mixup and cutmix out for this model."
        )
    weights = targets.sum(1, keepdim=True)
    smoothed = (1 - label_smoothing) * targets + label_smoothing / targets.shape[1] * weights
    total = -(smoothed * torch.log_softmax(logits.float(), dim=1)).sum()
    if isinstance(num_items, Tensor):
        num_items = num_items.to(total.device)
    return total / (weights.sum() if num_items is None else num_items)
