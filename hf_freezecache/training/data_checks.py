"""Looks at the training data before a run does any work."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn

from ..config import CacheConfig
from ..data.collators import CheckedCollator, Collator, check_label_values
from ..data.hashing import arrow_rows
from ..data.layout import ChunkLayout
from ..data.seeding import seeded
from ..data.task import IMAGE_CLASSIFICATION, task_of
from ..data.training_data import TrainingData, UserCode
from ..data.views import ViewDataset, check_repeatable
from ..distributed.process_group import ProcessGroup
from ..errors import DataError, UnsupportedSetupError
from .runtime import Runtime

__all__ = [
    "check_batch",
    "check_collator",
    "check_labels",
    "check_same_rows",
    "check_views",
    "num_classes",
    "prepare_data",
]

logger = logging.getLogger(__name__)


def check_labels(dataset: Any, num_labels: int | None, columns: Sequence[str]) -> None:
    """Check that there are rows, and that the integer label column of a ``datasets.Dataset`` holds classes of the model.

    Args:
        dataset: Anything; only ``datasets.Dataset`` is looked at.
        num_labels: Classes of the model; ``None`` leaves label values unchecked.
        columns: Names a label column may have; the first that exists and holds integers is checked.

    Raises:
        DataError: There are no rows, or a label lies outside ``[0, num_labels)`` and is not -100.
    """
    if len(dataset) == 0:
        raise DataError("The training data set has no rows.")
    if num_labels is None or not isinstance(dataset, datasets.Dataset):
        return
    for name in columns:
        if name not in dataset.features or not str(dataset.features[name].dtype).startswith(("int", "uint")):
            continue
        labels = arrow_rows(dataset).select_columns([name])[:][name].to_numpy()
        positions = np.flatnonzero(((labels < 0) | (labels >= num_labels)) & (labels != -100))
        if len(positions):
            raise DataError(
                f"Labels out of range: row {positions[0]} has {name}={labels[positions[0]]:.0f}, but the model has "
                f"{num_labels} classes, so labels must lie in [0, {num_labels}) ({len(positions)} such rows). Give the model "
                "num_labels=..., or remap the labels."
            )
        return


def check_same_rows(dataset: Any, process_group: ProcessGroup, num_rows: int = 16) -> None:
    """Refuse data sets that differ between processes: each builds shards of one cache, from rows it finds by number.

    Collective. Of a ``datasets.Dataset`` the content of a few rows is compared, of others only the length.

    Raises:
        UnsupportedSetupError: They differ.
    """
    if process_group.size == 1:
        return
    found = str(len(dataset))
    if isinstance(dataset, datasets.Dataset):
        rows = sorted({place * (len(dataset) - 1) // (num_rows - 1) for place in range(num_rows)})
        cells = [cell for column in arrow_rows(dataset).select(rows)[:].columns for cell in column.to_pylist()]
        # Machines may hold copies of one file in folders of their own.
        plain = [
            {**cell, "path": Path(cell["path"]).name} if isinstance(cell, dict) and cell.get("path") else cell
            for cell in cells
        ]
        found += f" {hashlib.sha256(repr(plain).encode()).hexdigest()}"
    everyone = process_group.gather(found)
    if len(set(everyone)) > 1:
        lengths = [int(each.split()[0]) for each in everyone]
        what = f"they have {lengths} rows" if len(set(lengths)) > 1 else "rows of the same number differ"
        raise UnsupportedSetupError(
            f"train_dataset is not the same on all processes: {what}. Give every process the same rows in the same order: seed "
            "shuffle() and train_test_split(), and do not shard the data set by rank; the trainer does that."
        )


def check_batch(
    views: ViewDataset, collate: Collator, label_names: Sequence[str] | None, num_labels: int | None
) -> dict[str, Any]:
    """Render and collate the first few rows, and check what comes out.

    Args:
        views: Renders the rows.
        collate: The user's collator.
        label_names: Names under which the model takes labels.
        num_labels: Classes of the model; ``None`` leaves label values unchecked.

    Returns:
        The batch.

    Raises:
        DataError: Images or labels are missing; something is no tensor; a label is out of range.
    """
    examples = views.__getitems__([(row, 0) for row in range(min(2, len(views)))])
    keys = sorted(examples[0]) if isinstance(examples[0], dict) else type(examples[0]).__name__
    hint = (
        f"The transform returned {keys}. With a transform that needs other columns set "
        "TrainingArguments(remove_unused_columns=False), and let transform and data_collator return pixel_values and "
        "labels."
    )
    with seeded(0, 0, 0):
        try:
            batch = dict(collate(examples))
        except Exception as error:
            raise DataError(
                f"The data_collator failed on the first rows: {type(error).__name__}: {error}. {hint}"
            ) from error
    pixel_values = batch.get("pixel_values")
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.dim() != 4:
        found = (
            sorted(batch) if pixel_values is None else f"pixel_values of {getattr(pixel_values, 'shape', pixel_values)}"
        )
        raise DataError(
            "A training batch must hold images as pixel_values (batch, channels, height, width); found "
            f"{found}. Is the image column missing? {hint}"
        )
    if label_names and not any(name in batch for name in label_names):
        raise DataError(f"A training batch must hold {' or '.join(label_names)}; found {sorted(batch)}. {hint}")
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or len(value) != len(examples):
            raise DataError(
                f"The data_collator returned {name!r} as {type(value).__name__}; everything it returns must be a tensor "
                "with one entry per sample, to be stored with the sample."
            )
    check_label_values(batch, label_names, num_labels)
    return batch


def check_collator(views: ViewDataset, collate: Collator, trials: int = 32) -> None:
    """Refuse a collator that mixes samples (Mixup, CutMix) or draws random numbers of its own.

    Collates two samples together and one alone, a few times under different random states: the first sample must come
    out the same.

    Raises:
        DataError: It does not.
    """
    if len(views) < 2:
        return
    first, second = views[0, 0], views[1, 0]
    with seeded(0, 0, 0):
        alone = collate([first])
    for trial in range(trials):
        with seeded(trial + 1, 0, 0):
            together = collate([first, second])
        for name, value in alone.items():
            if not torch.equal(together[name][:1], value):
                raise DataError(
                    f"The data_collator gives a sample another {name!r} when it is collated with another sample, or in "
                    "another draw. Hidden states are cached sample by sample, so a collator that mixes samples (Mixup, "
                    "CutMix) or augments cannot be cached: remove it, augment in the data set's transform, or train with "
                    "CacheConfig(mode='never') without freeze stages."
                )


def num_classes(model: nn.Module) -> int | None:
    """Return the number of classes of a model, or ``None`` if its labels are not classes."""
    task = task_of(model) or IMAGE_CLASSIFICATION
    return task.num_classes(getattr(model, "config", None))


def check_views(views: ViewDataset, num_views: int, cached: bool) -> ViewDataset:
    """Draw a few views, and return what renders the rows of a run: one by one, or whole batches of them.

    Args:
        views: Renders the rows one by one.
        num_views: Views per sample that the run stores or trains on.
        cached: Whether the run has stages that train from a cache.

    Raises:
        DataError: The transform mixes the rows of its batch, and the run has cached stages.
        UnrepeatableTransformError: The transform has a random generator of its own.
    """
    if not check_repeatable(views, num_views):
        return views
    if not cached:
        logger.warning(
            "The training transform mixes the rows of its batch: it gets whole batches, as under Trainer. No stage of such a "
            "run could be cached."
        )
        return views.rendered_together()
    raise DataError(
        "The training transform gives a row another result when it is rendered together with other rows: it mixes the rows of "
        "its batch (Mixup, CutMix, a norm over the batch, padding to the largest). Hidden states are cached row by row. Let it "
        "treat each row by itself, and mix cached batches with CacheConfig(feature_augmentation='mixup:0.2'); or train without "
        "a cache with CacheConfig(mode='never')."
    )


def prepare_data(
    runtime: Runtime,
    config: CacheConfig,
    dataset: Any,
    transforms: tuple[Any, Any],
    layout: ChunkLayout,
    seed: int,
    cached: bool = True,
) -> TrainingData:
    """Draw a few views, refuse what would fail later, and return the training data.

    Args:
        runtime: The trainer.
        config: The user's settings of caches.
        dataset: The data set that the user passed.
        transforms: The user's ``train_transform`` and ``eval_transform``, or ``(None, None)``.
        layout: Which sample lies in which chunk.
        seed: Seed of the views.
        cached: Whether the run has stages that train from a cache.

    Raises:
        DataError: The transform or the collator gives batches that cannot be used, or the transform mixes rows.
        UnrepeatableTransformError: The transform has a random generator of its own.
        UnsupportedSetupError: The data set differs between processes, or only one transform was given.
    """
    check_same_rows(dataset, runtime.everyone)
    views = ViewDataset(dataset, seed, *transforms)
    collate = CheckedCollator(runtime.collate, runtime.label_names, runtime.num_classes)
    code = UserCode(dataset, transforms, runtime.raw_collator)
    before = code.walks() if cached and config.transform_id is None else {}
    views = check_views(views, config.num_views, cached)
    batch = check_batch(views, collate, runtime.label_names, runtime.num_classes)
    check_collator(views, collate)
    code = code.without_what_changed_since(before)
    parameters = inspect.signature(runtime.model.forward).parameters
    not_inputs = {"pixel_values", *runtime.label_names}
    return TrainingData(
        dataset=dataset,
        views=views,
        collate=collate,
        code=code,
        layout=layout,
        view_seed=seed,
        has_classes=runtime.num_classes is not None,
        example_batch=batch,
        image_shape=tuple(batch["pixel_values"].shape[1:]),  # type: ignore[arg-type]
        prefix_inputs=frozenset(name for name in batch if name in parameters and name not in not_inputs),
        batch_spec=json.dumps(sorted((name, str(v.dtype), list(v.shape[1:])) for name, v in batch.items())),
    )
