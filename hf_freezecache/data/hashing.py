"""Hashes of the user's data and code."""

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
    """SHA-256 over the content of a ``datasets.Dataset``, row by row in logical order.

    Content, not ``Dataset._fingerprint``: that one changes when equal data are loaded again, and does not change when
    an image file that a row merely points to is edited. For such files size and modification time are hashed.

    Raises:
        UnsupportedSetupError: The data set is of another kind.
    """
    import datasets  # late, like below: readers need no `datasets`, which takes long to import

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


def _sources(thing: Any) -> list[str]:
    """Return hashes of the files that define a transform, or the parts of a tuple of them.

    What can be imported is pickled by name only, so an edit of its code would go unseen. Installed packages are left
    out: their versions change together with far more than a transform.
    """
    parts = (
        list(thing) if isinstance(thing, (tuple, list)) else list(thing.values()) if isinstance(thing, dict) else None
    )
    if parts is not None:
        return [source for part in parts for source in _sources(part)]
    owner = thing if hasattr(thing, "__qualname__") else type(thing)
    path = getattr(sys.modules.get(getattr(owner, "__module__", "")), "__file__", None)
    if path is None or owner.__module__ == "__main__" or {"site-packages", "dist-packages"} & set(Path(path).parts):
        return []
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest()] if Path(path).is_file() else []


def hash_object(thing: Any, what: str) -> str:
    """Hash code and state of a transform or collator with ``datasets``' own hasher.

    Raises:
        UnsupportedSetupError: It cannot be hashed.
    """
    from datasets.fingerprint import Hasher

    hasher: Callable[[Any], str] = Hasher.hash
    try:
        return hasher((thing, _sources(thing)))
    except Exception as error:
        raise UnsupportedSetupError(
            f"The {what} cannot be hashed ({type(error).__name__}: {error}), so a cache could go stale unseen when it "
            "changes. Give it a name with CacheConfig(transform_id=...), and change the name whenever you change the "
            "transform or the collator."
        ) from error
