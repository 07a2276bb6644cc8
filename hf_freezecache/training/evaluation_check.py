"""Tries an evaluation before a run does any work: the first one of its own may come hours later."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from torch.utils.data import IterableDataset

from ..data.collators import CheckedCollator
from ..errors import DataError, UnsupportedSetupError
from .data_checks import num_classes
from .label_check import check_label_rows
from .rehearsal_copy import rehearsing
from .runtime import args_without_workers

__all__ = ["check_evaluation"]

logger = logging.getLogger(__name__)

#: Rows of an evaluation set that are tried.
_ROWS = 2
#: Metrics that ``Trainer`` gives of every evaluation.
_ALWAYS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def check_evaluation(trainer: Any, base: type) -> None:
    """Run the first rows of each evaluation set through the trainer's own loader and ``prediction_step``.

    Metrics are not computed: what is right for a data set may fail on two rows. Nothing is done for a run that will not
    evaluate, and for data that can be read only once. A class that evaluates in a way of its own gets a warning.

    Args:
        trainer: The user's trainer, before its first stage.
        base: ``FreezeCacheTrainer``.

    Raises:
        DataError: An evaluation would fail; the message names the data set.
        UnsupportedSetupError: ``metric_for_best_model`` names what no evaluation gives.
    """
    args = trainer.args
    evaluates = getattr(args.eval_strategy, "value", args.eval_strategy) != "no" or getattr(
        args, "eval_on_start", False
    )
    if not (evaluates or args.load_best_model_at_end) or trainer.eval_dataset is None:
        return
    if any(parameter.device.type != args.device.type for parameter in trainer.model.parameters()):
        return  # it moves when training begins
    own = [name for name in ("evaluate", "evaluation_loop") if getattr(type(trainer), name) is not getattr(base, name)]
    several = isinstance(trainer.eval_dataset, dict)
    has_labels: dict[str, bool] = {}
    for name, dataset in trainer.eval_dataset.items() if several else [("", trainer.eval_dataset)]:
        if _is_read_once(dataset):
            continue
        where = f"The evaluation set {name!r}" if several else "The evaluation set"
        try:
            loss = _first_loss(trainer, name if several else dataset)
        except Exception as error:
            message = (
                f"{where} would fail at the first evaluation, on its first rows: {type(error).__name__}: {error}. "
                f"{_advice(trainer, dataset)}"
            )
            if not own:
                raise DataError(message) from error
            logger.warning("%s %s overrides %s, which may do otherwise.", message, type(trainer).__name__, own[0])
            return
        has_labels[name] = loss is not None
        if not own and loss is not None and type(trainer).get_eval_dataloader is base.get_eval_dataloader:  # type: ignore[attr-defined]
            with rehearsing(trainer):
                _check_labels(trainer, dataset, f"evaluation set {name!r}" if several else "evaluation set")
    if not own:
        _check_metric(trainer, has_labels)


def _is_read_once(dataset: Any) -> bool:
    """Say whether reading the first rows of a data set would take them from the run."""
    if not isinstance(dataset, IterableDataset):
        return False
    first, second = iter(dataset), iter(dataset)
    return first is second or first is dataset


def _first_loss(trainer: Any, dataset: Any) -> torch.Tensor | None:
    """Evaluate the first rows as ``Trainer.evaluation_loop`` does; return their loss, if they have labels."""
    with rehearsing(trainer) as stand_in:
        # The rows are rendered here, whatever the number of workers.
        args = stand_in.args = args_without_workers(trainer.args)
        if not getattr(args.accelerator_config, "split_batches", False):  # else a batch is divided between processes
            args.per_device_eval_batch_size = min(_ROWS, args.per_device_eval_batch_size)
        model = stand_in.model.eval()
        for inputs in _batches(stand_in.get_eval_dataloader(dataset)):
            loss_only = True if stand_in.compute_metrics is None else args.prediction_loss_only
            with stand_in.accelerator.autocast():
                loss, logits, labels = stand_in.prediction_step(model, inputs, loss_only, ignore_keys=None)
            if logits is not None and stand_in.preprocess_logits_for_metrics is not None:
                stand_in.preprocess_logits_for_metrics(logits, labels)
            return loss
    return None


def _check_labels(trainer: Any, dataset: Any, what: str) -> None:
    """Look for labels that would stop an evaluation in its midst.

    Raises:
        DataError: See ``check_label_rows``.
    """
    if isinstance(dataset, IterableDataset):
        return
    collate = trainer.data_collator
    if isinstance(dataset, datasets.Dataset):
        dataset = trainer._remove_unused_columns(dataset)
    else:
        collate = trainer._get_collator_with_removed_columns(collate)
    checked = CheckedCollator(collate, tuple(trainer.label_names or ()), num_classes(trainer.model))
    first = [dataset[row] for row in range(min(_ROWS, len(dataset)))]
    # Together with good rows: a collator may leave bad ones out.
    check_label_rows(dataset, dataset.__getitem__, checked, dict(collate(first)), what, first[:1])


def _batches(loader: Any) -> Iterator[Any]:
    """Yield the batches of a loader, which ends when it is left."""
    batches = iter(loader)
    try:
        yield from batches
    finally:
        if hasattr(batches, "close"):
            batches.close()


def _advice(trainer: Any, dataset: Any) -> str:
    """Say what to do about an evaluation that fails."""
    if not trainer.args.remove_unused_columns or not isinstance(dataset, datasets.Dataset):
        return "Try trainer.evaluate() before training."
    kept = trainer._remove_unused_columns(dataset).column_names
    removed = [name for name in dataset.column_names if name not in kept]
    if not removed:
        return "Try trainer.evaluate() before training."
    return (
        f"Trainer removes the columns {removed} before the data set's transform runs, since the model takes no argument of "
        "that name. Set TrainingArguments(remove_unused_columns=False) if the transform needs them."
    )


def _check_metric(trainer: Any, has_labels: dict[str, bool]) -> None:
    """Check that ``metric_for_best_model`` can be among the metrics: ``Trainer`` looks for it once it has evaluated.

    Raises:
        UnsupportedSetupError: No evaluation gives it.
    """
    args, several = trainer.args, isinstance(trainer.eval_dataset, dict)
    metric = args.metric_for_best_model
    best = args.load_best_model_at_end or getattr(args.save_strategy, "value", args.save_strategy) == "best"
    if metric is None or not best or not has_labels:
        return
    methods = [getattr(type(callback), "on_evaluate", None) for callback in trainer.callback_handler.callbacks]
    packages = {getattr(method, "__module__", "").partition(".")[0] for method in methods}
    if packages - {"", "transformers", "hf_freezecache"}:  # a callback of the user's own may add a metric
        return
    found = []
    for name, labels in has_labels.items():
        prefix = f"{name}_" if several else ""
        found += [prefix + each for each in (*(("loss",) if labels else ()), *_ALWAYS)]
        # What `compute_metrics` gives is unknown; it is called only where there are labels.
        if trainer.compute_metrics is not None and labels and metric.removeprefix("eval_").startswith(prefix):
            return
    if metric.removeprefix("eval_") not in found:
        raise UnsupportedSetupError(
            f"metric_for_best_model={metric!r} is not among the metrics of the evaluation, and Trainer would stop after the "
            f"first one. Expected one of {sorted(found)}, or what compute_metrics returns; a metric of one of several "
            "evaluation sets begins with the name of the set. A loss is only computed of batches that hold labels."
        )
