"""Measures a lossy cache that is there with today's suffix, which may not be the one that its codec was calibrated with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ..cache.reader import CacheReader
from ..data.collators import collate_cached
from ..dataset import CachedDataset
from ..model.split import Split
from .base_view import CodecChooser, Sample
from .distortion import DistortionMeter

__all__ = ["Looks", "Pairs", "look", "measure", "read_pairs"]

#: Images with their exact states, and what a cache stores of them, (samples, tokens, hidden): of the base view under ``""``, and of views
#: beyond it under ``"copy_"``, if these have a codec of their own.
Pairs = Mapping[str, tuple[Sample, Tensor]]
#: Under the same names, what a suffix makes of both: (outputs, features), each (samples, ...).
Looks = Mapping[str, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]


def read_pairs(chooser: CodecChooser, split: Split, reader: CacheReader, most: int | None = None) -> Pairs:
    """Return exact and stored states of the images that calibration measures on.

    They depend on the prefix and on the cache, not on the suffix.

    Args:
        chooser: Chooses the images, and computes their states.
        split: The model, split where the cache was made.
        reader: The cache.
        most: At most so many images; default all that calibration measures on.
    """
    found: dict[str, tuple[Sample, Tensor]] = {}
    dataset, position = CachedDataset(reader), reader.layout.position
    for prefix, copies in (("", False), ("copy_", True)) if chooser.config.copies_apart else (("", False),):
        keys = chooser.keys(copies=copies)
        # In stored order, each chunk is decoded once.
        keys = sorted(keys[len(keys) // 2 :][:most], key=lambda key: (key[1], position[key[0]]))
        sample = chooser.sample(split, keys)
        stored = torch.cat([collate_cached(dataset.__getitems__([key]))["hidden_states"] for key in sample.keys])
        found[prefix] = sample, stored
    return found


def look(chooser: CodecChooser, split: Split, pairs: Pairs) -> Looks:
    """Return what the suffix makes of exact and stored states."""
    return {
        prefix: (chooser.outputs(split, sample.states, sample.extras), chooser.outputs(split, stored, sample.extras))
        for prefix, (sample, stored) in pairs.items()
    }


def measure(pairs: Pairs, looks: Looks, classes: bool) -> dict[str, float | None]:
    """Return ``distortion``, ``agreement`` and ``relative_error`` of a cache, with the prefixes of ``pairs``.

    Args:
        pairs: Exact and stored states.
        looks: What today's suffix makes of them.
        classes: Whether the outputs are logits of exclusive classes.

    Raises:
        DataError: The outputs of the exact states are not finite.
    """
    found: dict[str, float | None] = {}
    for prefix, (sample, stored) in pairs.items():
        meter = DistortionMeter(sample.states, partial(_told, looks[prefix], stored), classes)
        distortion, agreement = meter(stored)
        own = {"distortion": distortion, "agreement": agreement, "relative_error": meter.relative_error(stored)}
        found |= {prefix + name: value for name, value in own.items()}
    return found


def _told(
    looks: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], stored: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Stand in for the suffix, which has seen both already."""
    return looks[1] if states is stored else looks[0]
