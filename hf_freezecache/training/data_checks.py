"""Looks at the training data before a run does any work."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn

from ..config import CacheConfig
from ..data.code_walk import CodeWalk
from ..data.collators import CheckedCollator, Collator, check_label_values
from ..data.hashing import arrow_rows
from ..data.layout import ChunkLayout
from ..data.seeding import seeded
from ..data.task import IMAGE_CLASSIFICATION, task_of
from ..data.training_data import TrainingData, UserCode
from ..data.views import ViewDataset, check_repeatable, same_examples
from ..distributed.process_group import ProcessGroup
from ..errors import DataError, UnsupportedSetupError
from .label_check import check_label_rows, has_several_labels
from .observed_call import observed_call
from .remembered import Remembered
from .runtime import Runtime

__all__ = [
    "check_batch",
    "check_collator",
    "check_same_rows",
    "check_views",
    "name_of_checks",
    "num_classes",
    "prepare_data",
    "with_columns_removed",
]

logger = logging.getLogger(__name__)

#: Data and code that were found to be in order. Views are rendered some fifty times to find that out.
_SOUND: Remembered[bool] = Remembered(64)


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
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.dim() not in (3, 4):
        found = (
            sorted(batch) if pixel_values is None else f"pixel_values of {getattr(pixel_values, 'shape', pixel_values)}"
        )
        raise DataError(
            "A training batch must hold images as pixel_values (batch, channels, height, width), or as patches (batch, "
            "patches, values); found "
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
            if not same_examples(together[name][:1], value):
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


def with_columns_removed(trainer: Any) -> Any:
    """Return a trainer's training data without the columns that ``Trainer`` removes before a transform of the data set.

    ``train_transform`` and ``eval_transform``, which ``Trainer`` does not have, see all columns.

    Raises:
        DataError: The transform needs a removed column, or no column would be left.
    """
    dataset = trainer.train_dataset
    if not isinstance(dataset, datasets.Dataset) or trainer._transforms != (None, None):
        return dataset
    removed: list[str] = []
    try:
        kept = trainer._remove_unused_columns(dataset, description="training")
        removed = [name for name in dataset.column_names if name not in kept.column_names]
        if not removed:
            return dataset
        with seeded(0, 0, 0):
            kept[0]
        return kept
    except Exception as error:
        if not trainer.args.remove_unused_columns or not (removed or isinstance(error, ValueError)):
            return dataset  # whatever is wrong with the row, `check_repeatable` finds it
        try:
            with seeded(0, 0, 0):
                dataset[0]
        except Exception:
            return dataset
        raise DataError(
            f"Trainer removes the columns {removed or dataset.column_names} of the training data set before its transform runs, "
            f"since the model takes no arguments of these names. Without them row 0 cannot be rendered: "
            f"{type(error).__name__}: {error}. Set TrainingArguments(remove_unused_columns=False)."
        ) from error


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


def name_of_checks(dataset: Any, walks: Mapping[str, CodeWalk], *others: Any) -> Hashable:
    """Return a name of what checks of data and code depend on; ``None`` where something of it is not known.

    Args:
        dataset: The data set.
        walks: Walks over the code that renders it, as ``UserCode.walks`` gives them.
        others: What else they depend on.
    """
    # Of data sets of other types nothing tells whether their rows are still the same.
    fingerprint = dataset._fingerprint if isinstance(dataset, datasets.Dataset) else None
    if fingerprint is None or len(walks) < 2 or any(walk.unseen for walk in walks.values()):
        return None
    return (fingerprint, *sorted((name, walk.digest) for name, walk in walks.items()), *others)


def prepare_data(
    runtime: Runtime,
    config: CacheConfig,
    dataset: Any,
    transforms: tuple[Any, Any],
    layout: ChunkLayout,
    seed: int,
    cached: bool = True,
    num_shown: int | None = None,
) -> TrainingData:
    """Draw a few views, refuse what would fail later, and return the training data.

    The same data and code as of an earlier trainer of this process are taken for sound.

    Args:
        runtime: The trainer.
        config: The user's settings of caches.
        dataset: The data set that the user passed.
        transforms: The user's ``train_transform`` and ``eval_transform``, or ``(None, None)``.
        layout: Which sample lies in which chunk.
        seed: Seed of the views.
        cached: Whether the run has stages that train from a cache.
        num_shown: Views of a sample that the run shows; ``None`` for those that it stores.

    Raises:
        DataError: The transform or the collator gives batches that cannot be used, or the transform mixes rows.
        UnrepeatableTransformError: The transform has a random generator of its own.
        UnsupportedSetupError: The data set differs between processes, or only one transform was given.
    """
    check_same_rows(dataset, runtime.everyone)
    views = ViewDataset(dataset, seed, *transforms)
    collate = CheckedCollator(runtime.collate, runtime.label_names, runtime.num_classes)
    code = UserCode(dataset, transforms, runtime.raw_collator)
    # What is stored may be less than what other stages render. Walks take a while: mostly it is the same, and walked once.
    stored, walked = code.of_views(config.num_views), cached and config.transform_id is None
    codes = [code] if stored is code else [code, stored]
    before = [each.walks() if walked else {} for each in codes]
    spec: Any = (type(runtime.model), runtime.args.remove_unused_columns, runtime.label_names, runtime.num_classes)
    num_shown = max(num_shown or 1, config.num_views)
    name = name_of_checks(dataset, before[0], seed, num_shown, *spec)
    if not (sound := bool(_SOUND.get(name))):
        views = check_views(views, num_shown, cached)
    batch = check_batch(views, collate, runtime.label_names, runtime.num_classes)
    if not sound:
        check_collator(views, collate)
    codes = [each.without_what_changed_since(walks) for each, walks in zip(codes, before, strict=True)]
    code, stored = codes[0], codes[-1]
    if cached and (changing := sorted(set().union(*stored.changing.values()))):
        logger.warning(
            "The training transform changes by itself as it renders (%s). A cached stage shows views as they are rendered when "
            "the cache is built. If such a change is to be seen in later epochs, train them with CacheConfig(mode='never').",
            ", ".join(changing[:3]),
        )
    if not sound:
        check_label_rows(views.dataset, lambda row: views[row, 0], collate, batch)
        _SOUND.keep(None if any(code.changing.values()) else name, True)
    with runtime.rehearsing() as trainer:
        call, prefix_inputs = observed_call(trainer, runtime.model, batch, runtime.label_names)
    constants = {name: repr(value) for name, value in sorted(call.items()) if not isinstance(value, torch.Tensor)}
    spec = sorted((name, str(v.dtype), list(v.shape[1:])) for name, v in batch.items())
    return TrainingData(
        dataset=dataset,
        views=views,
        collate=collate,
        code=stored,
        layout=layout,
        view_seed=seed,
        has_classes=runtime.num_classes is not None and not has_several_labels(batch, runtime.label_names),
        example_batch=batch,
        image_shape=tuple(batch["pixel_values"].shape[1:]),  # type: ignore[arg-type]
        call=call,
        prefix_inputs=prefix_inputs,
        batch_spec=json.dumps([*spec, constants] if constants else spec),
        code_of_more=None if stored is code else code,
    )
