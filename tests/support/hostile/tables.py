"""Hostile index tables; training does not read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_freezecache.cache.index import table_name

from .cases import case
from .tools import edit_table, seal


@case(only_verified=True)
def table_with_another_label(cache: Path) -> None:
    edit_table(cache, "labels", lambda values: [values[0] + 1, *values[1:]])


@case(only_verified=True)
def table_with_labels_of_another_dtype(cache: Path) -> None:
    edit_table(cache, "labels", lambda values: [float(value) for value in values])


@case(only_verified=True)
def table_with_texts_for_labels(cache: Path) -> None:
    edit_table(cache, "labels", lambda values: [str(value) for value in values])


@case(only_verified=True)
def table_with_other_sample_indices(cache: Path) -> None:
    edit_table(cache, "sample_index", lambda values: values[::-1])


@case(only_verified=True)
def table_with_another_chunk(cache: Path) -> None:
    edit_table(cache, "chunk", lambda values: [value + 1 for value in values])


@case(only_verified=True)
def table_with_nothing(cache: Path) -> None:
    edit_table(cache, "row", lambda values: [None, *values[1:]])


@case(only_verified=True)
def table_with_a_column_too_many(cache: Path) -> None:
    path = cache / table_name(0, 0)
    table = pq.read_table(path)
    pq.write_table(table.append_column("notes", pa.array(["x"] * len(table))), path)
    seal(cache)


@case(only_verified=True)
def table_of_fifty_million_rows(cache: Path) -> None:
    """A few kilobytes of repetitions."""
    path = cache / table_name(0, 0)
    schema = pq.read_schema(path)
    table = pa.table({name: np.zeros(50_000 * 100, np.int64) for name in schema.names})
    pq.write_table(table, path, compression="zstd")
    seal(cache)


@case(only_verified=True)
def table_that_is_no_parquet(cache: Path) -> None:
    (cache / table_name(0, 0)).write_bytes(b"PAR1" + bytes(64) + b"\xff\xff\xff\x7fPAR1")
    seal(cache)


@case(only_verified=True)
def table_of_another_view(cache: Path) -> None:
    (cache / table_name(0, 0)).write_bytes((cache / table_name(1, 0)).read_bytes())
    seal(cache)
