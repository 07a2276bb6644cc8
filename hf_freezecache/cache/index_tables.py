"""Index tables: parquet files beside the shards, for the Hub's viewer and ``load_dataset``. Training never reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .schema import max_table_bytes
from .storage import StoredFile

__all__ = ["check_table"]


def _same(value: Any, expected: Any) -> bool:
    if type(value) is not type(expected):
        return False
    return bool(value == expected) or (isinstance(value, float) and math.isnan(value) and math.isnan(expected))


def check_table(file: StoredFile, expected: Mapping[str, Sequence[Any]]) -> None:
    """Compare an index table with what it must hold. Memory grows with that, and not with what the table claims to hold.

    Args:
        file: The table.
        expected: Column -> plain values.

    Raises:
        ValueError: It is no such table, has other columns, or another value; the message names row and column.
        CacheCorruptError: It cannot be read.
    """
    rows, size = len(next(iter(expected.values()))), file.size() or 0
    most = max_table_bytes(rows, len(expected))
    if size > most:
        raise ValueError(f"{size} bytes for {rows} rows, expected at most {most}")
    try:
        table = pq.ParquetFile(
            pa.BufferReader(file.read(0, size)), thrift_string_size_limit=2**20, thrift_container_size_limit=10**5
        )
        metadata = table.metadata
        claimed = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
        if metadata.num_rows != rows or not 0 <= claimed <= most:
            raise ValueError(f"{metadata.num_rows} rows of {claimed} bytes, expected {rows}")
        columns = table.schema_arrow.names
        if sorted(columns) != sorted(expected):
            raise ValueError(f"columns {columns[:20]}, expected {sorted(expected)}")
        row = 0
        for batch in table.iter_batches(batch_size=4096, use_threads=False):
            if row + len(batch) > rows:
                raise ValueError(f"more than {rows} rows")
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                if not (
                    pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or column.type == pa.bool_()
                ):
                    raise ValueError(f"column {name!r} of {column.type}, expected numbers")
                for position, value in enumerate(column.to_pylist(), start=row):
                    if not _same(value, expected[name][position]):
                        raise ValueError(f"row {position} has {name} {value!r}, expected {expected[name][position]!r}")
            row += len(batch)
        if row != rows:
            raise ValueError(f"{row} rows, expected {rows}")
    except (pa.ArrowException, MemoryError, OSError) as error:
        raise ValueError(f"not a table that can be read ({error})") from error
