"""Collators: the user's own, checked, and that of cached samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codecs.array_names import is_packed
from ..errors import DataError

__all__ = ["CheckedCollator", "collate_cached", "split_packed"]

Collator = Callable[[list[Any]], dict[str, Any]]


@dataclass(frozen=True)
class CheckedCollator:
    """The user's collator, with a look at the labels of each batch that it makes.

    Attributes:
        collate: The user's collator.
        label_names: Names under which the model takes labels.
        num_labels: Classes of the model; ``None`` checks nothing.
    """

    collate: Collator
    label_names: tuple[str, ...]
    num_labels: int | None

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Collate.

        Raises:
            DataError: A label is out of range.
        """
        batch = self.collate(examples)
        _check_label_values(batch, self.label_names, self.num_labels)
        return batch


def _check_label_values(batch: dict[str, Any], label_names: Sequence[str] | None, num_labels: int | None) -> None:
    """Raise if an integer class label of a batch lies outside ``[0, num_labels)`` and is not -100."""
    if num_labels is None:
        return
    for name in label_names or []:
        labels = batch.get(name)
        if isinstance(labels, torch.Tensor) and labels.dim() == 1 and not labels.is_floating_point():
            wrong = labels[((labels < 0) | (labels >= num_labels)) & (labels != -100)]
            if len(wrong):
                raise DataError(
                    f"Labels out of range: found {name}={wrong[0].item()}, but the model has {num_labels} classes, so labels "
                    f"must lie in [0, {num_labels}). Give the model num_labels=..., or remap the labels."
                )


def collate_cached(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples of a cache into a batch: ``hidden_states`` (batch, tokens, hidden), labels and other extras.

    Packed samples are stacked as they are. What only some of them carry, those of chunks with tokens that are stored
    as they are, is zero for the others.
    """
    names = {name: item[name] for item in reversed(items) for name in item}
    return {
        name: torch.stack([item[name] if name in item else torch.zeros_like(like) for item in items])
        for name, like in sorted(names.items())
    }


def split_packed(batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what ``ViewCodec.dequantize`` takes of a batch, and the rest of the batch."""
    packed = {name: value for name, value in batch.items() if is_packed(name)}
    return packed, {name: value for name, value in batch.items() if not is_packed(name)}
