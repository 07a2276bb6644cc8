"""Collators: the user's own with our checks around it, and that of cached samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..codecs.array_names import is_packed
from ..errors import DataError
from .chunk_samples import ChunkSamples
from .geometry import GEOMETRY_NAME
from .views import ViewKey

__all__ = ["CheckedCollator", "Collator", "check_label_values", "collate_cached", "split_packed"]

#: Turns a list of examples into a batch: a dict of tensors (batch, ...).
Collator = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class CheckedCollator:
    """Calls the user's collator and checks the labels of each batch; carries geometry and keys beside the batch.

    Attributes:
        collate: The user's collator.
        label_names: Names under which the model takes labels.
        num_labels: Number of classes of the model; ``None`` leaves labels unchecked.
        geometry: Whether the items are those of ``ViewDataset.with_geometry``, ``(example, five numbers)``. The batch then
            holds the numbers as ``GEOMETRY_NAME``, (batch, 5) float32.
    """

    collate: Collator
    label_names: tuple[str, ...] = ()
    num_labels: int | None = None
    geometry: bool = False

    def with_geometry(self) -> CheckedCollator:
        """Return the collator for items of ``ViewDataset.with_geometry``."""
        return replace(self, geometry=True)

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        """Collate examples, or ``(example, geometry)`` with ``geometry``.

        Raises:
            DataError: A label is out of range.
        """
        if not self.geometry:
            return self._collate(items)
        batch = self._collate([example for example, _ in items])
        return {**batch, GEOMETRY_NAME: torch.tensor([numbers for _, numbers in items], dtype=torch.float32)}

    def collate_keyed(self, items: list[tuple[ViewKey, Any]]) -> tuple[list[ViewKey], dict[str, Any]]:
        """Collate items that carry their keys; return the keys, in order, and the batch.

        Raises:
            DataError: The user's collator failed, or a label is out of range. The message names the rows.
        """
        keys = [key for key, _ in items]
        try:
            return keys, self([item for _, item in items])
        except Exception as error:
            raise DataError(
                f"The data_collator failed on rows {[sample_index for sample_index, _ in keys]} (view {keys[0][1]}): "
                f"{type(error).__name__}: {error}. Let the transform give all images one size and one number of channels, and "
                "valid labels. Finished shards of a cache are kept for a run with the same data set and settings; what is "
                "changed has a cache of its own, built anew."
            ) from error

    def _collate(self, examples: list[Any]) -> dict[str, Any]:
        batch = dict(self.collate(examples))
        check_label_values(batch, self.label_names, self.num_labels)
        return batch


def check_label_values(batch: Mapping[str, Any], label_names: Sequence[str] | None, num_labels: int | None) -> None:
    """Check that integer class labels (batch,) lie in ``[0, num_labels)`` or are -100.

    Args:
        batch: A collated batch.
        label_names: Names under which the model takes labels.
        num_labels: Number of classes of the model; ``None`` checks nothing.

    Raises:
        DataError: A label is out of range.
    """
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

    Packed samples are stacked likewise. Samples of a chunk with tokens that are stored exactly have more tensors than others:
    these are zero for samples that lack them.
    """
    if isinstance(items, ChunkSamples):
        return items.batch()
    names = {name: item[name] for item in reversed(items) for name in item}
    return {
        name: torch.stack([item[name] if name in item else torch.zeros_like(like) for item in items])
        for name, like in sorted(names.items())
    }


def split_packed(batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a batch into the packed tensors, which ``ViewCodec.dequantize`` takes, and the rest."""
    packed = {name: value for name, value in batch.items() if is_packed(name)}
    return packed, {name: value for name, value in batch.items() if not is_packed(name)}
