"""Hashes of the training data, and of the code and state of transforms and collators."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import UnsupportedSetupError

__all__ = ["hash_dataset", "hash_object"]


def hash_dataset(dataset: Any) -> str:
    """Return the SHA-256 of the content of a ``datasets.Dataset``, row by row in logical order.

    ``Dataset._fingerprint`` would not do: it changes when equal data are loaded again, and stays when an image file changes
    to which a row merely points. For such files the size and the time of the last change are hashed.

    Raises:
        UnsupportedSetupError: The data set is of another type.
    """
    import datasets  # imported here: readers of a cache do not need `datasets`, which takes long to import

    if not isinstance(dataset, datasets.Dataset):
        raise UnsupportedSetupError(
            f"The content of a {type(dataset).__name__} cannot be hashed, so a cache of it could go stale unseen. Pass a "
            "datasets.Dataset, or give a name for these data with CacheConfig(dataset_id=...), and change the name "
            "whenever the data change."
        )
    digest = hashlib.sha256(f"{len(dataset)} {dataset.features}".encode())
    for table in dataset.with_format("arrow").iter(batch_size=256):
        for name, column in zip(table.column_names, table.columns, strict=True):
            column = column.combine_chunks()
            if isinstance(column, pa.ChunkedArray):
                column = pa.concat_arrays(column.chunks)
            digest.update(pa.record_batch([column], names=[name]).serialize())
            if pa.types.is_struct(column.type) and {"bytes", "path"} <= {field.name for field in column.type}:
                for row in np.flatnonzero(column.field("bytes").is_null().to_numpy(zero_copy_only=False)):
                    path = column.field("path")[int(row)].as_py()
                    if path is not None and Path(path).exists():
                        status = Path(path).stat()
                        digest.update(f"{status.st_size} {status.st_mtime_ns};".encode())
    return digest.hexdigest()


def _source_hashes(code: Any) -> list[str]:
    """Return hashes of the files that define a transform or collator, or each member of a tuple, list or dict of them.

    The hasher pickles importable code by name only, so it would not see an edit of that code. Files of installed packages are
    not hashed: their versions change for many reasons that leave the transform as it is.
    """
    if isinstance(code, dict):
        code = list(code.values())
    if isinstance(code, (tuple, list)):
        return [source for member in code for source in _source_hashes(member)]
    definition = code if hasattr(code, "__qualname__") else type(code)
    path = getattr(sys.modules.get(getattr(definition, "__module__", "")), "__file__", None)
    if (
        path is None
        or definition.__module__ == "__main__"
        or {"site-packages", "dist-packages"} & set(Path(path).parts)
    ):
        return []
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest()] if Path(path).is_file() else []


def hash_object(code: Any, what: str) -> str:
    """Return a hash of the code and state of a transform or collator, by ``datasets``' own hasher.

    Args:
        code: The transform or collator, or a tuple of them.
        what: Its name in the message of an error, such as ``"training transform"``.

    Raises:
        UnsupportedSetupError: The hasher cannot pickle it.
    """
    from datasets.fingerprint import Hasher

    hasher: Callable[[Any], str] = Hasher.hash
    try:
        return hasher((code, _source_hashes(code)))
    except Exception as error:
        raise UnsupportedSetupError(
            f"The {what} cannot be hashed ({type(error).__name__}: {error}), so a cache could go stale unseen when it "
            "changes. Give it a name with CacheConfig(transform_id=...), and change the name whenever you change the "
            "transform or the collator."
        ) from error
