"""Finds labels that would stop a run late: it judges what transform and collator make of the rows that look suspicious."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor
from torch.utils.data import Subset

from ..data.collators import CheckedCollator
from ..data.hashing import arrow_rows
from ..data.seeding import seeded
from ..errors import DataError

__all__ = ["check_label_rows", "has_several_labels", "suspicious_rows"]

#: Rows that are rendered, at most.
_MOST_ROWS = 32
#: A column with more different values than this among its first rows does not hold classes.
_MOST_CLASSES = 256
_FIRST_ROWS = 4096
#: Values of a column of classes of which a row is rendered: the rarest.
_RAREST = 4
_LONGEST_TEXT = 256


def has_several_labels(batch: Mapping[str, Any], label_names: Sequence[str]) -> bool:
    """Say whether each sample has a label per class, (batch, classes) floating-point: several classes, or soft ones."""
    labels = [batch[name] for name in label_names if isinstance(batch.get(name), Tensor)]
    return any(label.dim() == 2 and label.is_floating_point() for label in labels)


def check_label_rows(
    dataset: Any,
    render: Callable[[int], Any],
    collate: CheckedCollator,
    example_batch: Mapping[str, Any],
    what: str = "training data set",
    beside: Sequence[Any] = (),
) -> None:
    """Render and collate rows whose columns hold suspicious values, and check what comes out.

    What a column holds says little: the transform, or the collator, may map it. So the rows are judged by their labels in a
    batch, which must be classes of the model, or -100, of the dtype and shape of those of the first rows.

    Args:
        dataset: The data set, whose columns are looked at.
        render: Gives a row as the collator takes it.
        collate: The user's collator, with the names of labels and the number of classes.
        example_batch: The first rows, rendered and collated.
        what: The data set in words.
        beside: Rendered rows that are collated before each of these.

    Raises:
        DataError: A row cannot be rendered or collated, or its label is none that the model takes. The message names the row
            and what its column holds.
    """
    names = [name for name in collate.label_names if isinstance(example_batch.get(name), Tensor)]
    for row, cell in suspicious_rows(dataset, collate.num_labels).items():
        try:
            example = render(row)
            with seeded(0, 0, 0):
                batch = dict(collate.collate([*beside, example]))
        except Exception as error:
            raise DataError(
                f"Row {row} of the {what}, which has {cell}, cannot be made a sample: {type(error).__name__}: {error}. "
                "Remove such rows with dataset.filter, or let transform and data_collator give them a label (-100 is ignored by "
                "the loss)."
            ) from error
        for name in names:
            found, like = batch.get(name), example_batch[name]
            if not isinstance(found, Tensor) or found.dtype != like.dtype or found.shape[1:] != like.shape[1:]:
                raise DataError(
                    f"Row {row} of the {what}, which has {cell}, gets {_in_words(found)} as {name}; the first rows get "
                    f"{_in_words(like)}. Remove such rows with dataset.filter, or let transform and data_collator give all rows "
                    f"{name} of one dtype and shape (-100 is ignored by the loss)."
                )
            value = _wrong_class(found, collate.num_labels)
            if value is not None:
                made = (
                    "" if cell.endswith(f"={value}") else f", of which transform and data_collator make {name}={value}"
                )
                raise DataError(
                    f"Labels out of range: row {row} has {cell}{made}, but the model has {collate.num_labels} classes, so labels "
                    f"must lie in [0, {collate.num_labels}). Give the model num_labels=..., or remap the labels. (The row is of "
                    f"the {what}.)"
                )


def _in_words(labels: Any) -> str:
    if labels is None:
        return "nothing"
    return f"{labels.dtype} {tuple(labels.shape[1:])}" if isinstance(labels, Tensor) else type(labels).__name__


def _wrong_class(labels: Tensor, num_labels: int | None) -> int | None:
    """Return the first of some labels, (batch,), that is no class of the model; ``None`` if there is none."""
    if num_labels is None or labels.dim() != 1 or labels.is_floating_point():
        return None
    wrong = labels[((labels < 0) | (labels >= num_labels)) & (labels != -100)]
    return int(wrong[0]) if len(wrong) else None


def suspicious_rows(dataset: Any, num_labels: int | None) -> dict[int, str]:
    """Return rows that are likelier than others to get a bad label, with what makes them so, as ``column=value``.

    These are, of each column of single values: a row that holds nothing, those of the smallest and of the largest number, and
    rows of the rarest classes. Columns of labels come first.

    Args:
        dataset: A ``datasets.Dataset``, a data set with ``targets`` or ``labels`` as those of torchvision, or a ``Subset`` of
            one; of others nothing is known.
        num_labels: Classes of the model, if labels are classes.
    """
    rows: dict[int, str] = {}
    for name, column in _columns(dataset):
        for row in _rows_of_column(column, num_labels):
            if len(rows) < _MOST_ROWS:
                rows.setdefault(row, f"{name}={column[row].as_py()}")
    return rows


def _columns(dataset: Any) -> Iterator[tuple[str, Any]]:
    """Yield names and values of columns of single values, as arrow arrays."""
    if isinstance(dataset, datasets.Dataset):
        for name in sorted(dataset.features, key=lambda name: "label" not in name):
            if _is_of_single_values(dataset, name):
                yield name, arrow_rows(dataset).select_columns([name])[:][name]
        return
    indices: Any = slice(None)
    whole: Any = dataset
    if isinstance(dataset, Subset):
        indices, whole = np.asarray(list(dataset.indices), dtype=np.int64), dataset.dataset
    for name in ("targets", "labels"):
        values = getattr(whole, name, None)
        if not isinstance(values, (list, tuple, np.ndarray, Tensor)) or len(values) != len(whole):
            continue
        try:
            array = np.asarray(values)[indices]
            if array.ndim == 1:
                yield name, pa.array(array.tolist())
        except (ValueError, TypeError, pa.ArrowException):  # not of single values
            continue


def _is_of_single_values(dataset: datasets.Dataset, name: str) -> bool:
    """Say whether a column holds numbers, truth values or short texts, which are cheap to read."""
    feature = dataset.features[name]
    if not isinstance(feature, (datasets.Value, datasets.ClassLabel)) or len(dataset) == 0:
        return False
    kind = str(feature.dtype)
    if kind in ("string", "large_string"):
        first = arrow_rows(dataset).select_columns([name])[:16][name].to_pylist()
        return max((len(text) for text in first if text is not None), default=0) <= _LONGEST_TEXT
    return kind == "bool" or kind.startswith(("int", "uint", "float"))


def _rows_of_column(column: Any, num_labels: int | None) -> list[int]:
    """Return the suspicious rows of a column."""
    rows = []
    if column.null_count:
        rows.append(pc.index(pc.is_null(column), pa.scalar(True)).as_py())
    kind = column.type
    valid = np.flatnonzero(~np.asarray(pc.is_null(column)))
    if len(valid) == 0:
        return rows
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values: npt.NDArray[Any] = pc.drop_null(column).to_numpy(zero_copy_only=False)
        rows += [int(valid[place]) for place in np.flatnonzero(values != values)[:1]]
        known = np.flatnonzero((values == values) & (values != -100))
        if len(known):
            some = values[known]
            wrong = known[(some < 0) | (some >= (num_labels or np.inf))]
            rows += [int(valid[place]) for place in [*wrong[:1], known[np.argmin(some)], known[np.argmax(some)]]]
    if pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        rows += _rows_of_rarest(column)
    return list(dict.fromkeys(rows))


def _rows_of_rarest(column: Any) -> list[int]:
    """Return rows of the rarest values, if the column has few different ones."""
    if len(pc.unique(column[:_FIRST_ROWS])) > _MOST_CLASSES:
        return []
    counts = sorted(pc.value_counts(column).to_pylist(), key=lambda count: count["counts"])
    rarest = [count["values"] for count in counts if count["values"] is not None][:_RAREST]
    return [pc.index(column, pa.scalar(value, column.type)).as_py() for value in rarest]
