"""Checks on the user's arguments and data before a run does any work."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn

from ..data.collators import Collator, check_label_values
from ..data.seeding import seeded
from ..data.views import ViewDataset
from ..distributed.process_group import ProcessGroup
from ..errors import (
    CacheWriteError,
    DataError,
    UnsupportedSetupError,
)
from ..model.suffix import SuffixModel

__all__ = [
    "check_arguments",
    "check_batch",
    "check_cache_dir",
    "check_collator",
    "check_labels",
    "check_pushed",
    "check_same_rows",
    "check_writable",
]


def check_arguments(args: Any) -> None:
    """Refuse ``TrainingArguments`` whose meaning cached training cannot keep.

    Raises:
        UnsupportedSetupError: With the argument, the reason and what to do.
    """
    if args.n_gpu > 1:
        raise UnsupportedSetupError(
            f"One process sees {args.n_gpu} GPUs, on which Trainer would use torch.nn.DataParallel: it copies the model, "
            "prefix and all, to each of them in every step, and cached training does not support it. Start one process for "
            f"each GPU (accelerate launch --num_processes {args.n_gpu} ..., or torchrun --nproc_per_node {args.n_gpu} ...), "
            "or let CUDA_VISIBLE_DEVICES name one."
        )
    if args.world_size > 1 and not torch.distributed.is_initialized():
        raise UnsupportedSetupError(
            f"world_size is {args.world_size}, but these processes do not talk through torch.distributed. Use torchrun or "
            "accelerate launch with DistributedDataParallel."
        )
    if args.torch_compile:
        raise UnsupportedSetupError(
            "torch_compile=True would compile one batch's hidden states into the suffix; cached training does not "
            "support it. Leave it out."
        )
    if args.auto_find_batch_size:
        raise UnsupportedSetupError("auto_find_batch_size restarts the epoch loop; set the batch size instead.")
    if getattr(args, "train_sampling_strategy", "random") != "random":
        raise UnsupportedSetupError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} cannot be kept: cached training shuffles by "
            "chunks. Use 'random'."
        )
    # The names differ over transformers versions; either may be None.
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise UnsupportedSetupError(
                f"{name} sets use_reentrant=True: with a frozen prefix that gives no gradients at all, without an "
                "error. Set it to False, the default."
            )


def check_cache_dir(cache_dir: Path, output_dir: Path) -> None:
    """Refuse caches where ``push_to_hub`` would upload them.

    Raises:
        UnsupportedSetupError: ``cache_dir`` is ``output_dir`` or lies inside it.
    """
    cache_dir, output_dir = cache_dir.resolve(), output_dir.resolve()
    if cache_dir == output_dir or output_dir in cache_dir.parents:
        raise UnsupportedSetupError(
            f"cache_dir {cache_dir} lies inside output_dir {output_dir}, all of which push_to_hub uploads. Caches can "
            "reveal training images: choose a cache_dir elsewhere."
        )


def check_pushed(output_dir: Path, model: nn.Module) -> None:
    """Refuse to upload what is no ordinary model, or has a cache beside it, such as one that was pulled or copied there.

    Raises:
        UnsupportedSetupError: A cache lies inside ``output_dir``, or ``model`` is the suffix of another.
    """
    shard = next(output_dir.rglob("view-*/shard-*.safetensors"), None)
    if shard is not None:
        raise UnsupportedSetupError(
            f"A cache lies in {shard.parents[1]}, inside output_dir {output_dir}, all of which would be uploaded with the model. "
            "Caches can reveal training images: move it elsewhere, and push again."
        )
    if isinstance(model, SuffixModel):
        raise UnsupportedSetupError(
            "The Trainer's model is a SuffixModel, of which the Hub would get no model that loads. Push the whole model that "
            "it trains: suffix.model.push_to_hub(repo_id)."
        )


def check_writable(cache_dir: Path) -> None:
    """Make the folder of caches and write to it once, before a run that will need it hours later.

    Raises:
        CacheWriteError: It cannot be made or written.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir) as file:
            file.write(b"0")
    except OSError as error:
        raise CacheWriteError(
            f"The folder of caches {cache_dir} could not be written: {error}. Permit writing, or choose another cache_dir."
        ) from error


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
        labels = dataset.with_format("arrow").select_columns([name])[:][name].to_numpy()
        positions = np.flatnonzero(((labels < 0) | (labels >= num_labels)) & (labels != -100))
        if len(positions):
            raise DataError(
                f"Labels out of range: row {positions[0]} has {name}={labels[positions[0]]:.0f}, but the model has "
                f"{num_labels} classes, so labels must lie in [0, {num_labels}) ({len(positions)} such rows). Give the model "
                "num_labels=..., or remap the labels."
            )
        return


def check_same_rows(dataset: Any, processes: ProcessGroup, num_rows: int = 16) -> None:
    """Refuse data sets that differ between processes: each builds shards of one cache, from rows it finds by number.

    Collective. Of a ``datasets.Dataset`` the content of a few rows is compared, of others only the length.

    Raises:
        UnsupportedSetupError: They differ.
    """
    if processes.size == 1:
        return
    found = str(len(dataset))
    if isinstance(dataset, datasets.Dataset):
        rows = sorted({place * (len(dataset) - 1) // (num_rows - 1) for place in range(num_rows)})
        cells = [cell for column in dataset.with_format("arrow").select(rows)[:].columns for cell in column.to_pylist()]
        # Machines may hold copies of one file in folders of their own.
        plain = [
            {**cell, "path": Path(cell["path"]).name} if isinstance(cell, dict) and cell.get("path") else cell
            for cell in cells
        ]
        found += f" {hashlib.sha256(repr(plain).encode()).hexdigest()}"
    everyone = processes.gather(found)
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
    examples = [views[row, 0] for row in range(min(2, len(views)))]
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
