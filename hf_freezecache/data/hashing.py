"""Hashes of the training data with the files that they name, and of the code and state of transforms and collators."""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
import re
import weakref
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import UnsupportedSetupError
from .code_walk import CodeWalk, walk_code
from .files import looks_like_a_file, stamp

__all__ = ["arrow_rows", "hash_dataset", "hash_object", "look_into"]

logger = logging.getLogger(__name__)

#: Texts of a column that are tried as paths.
_TRIED = 8
#: Hashes of data sets that transforms hold.
_HELD: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def arrow_rows(dataset: Any) -> Any:
    """Return a ``datasets.Dataset`` whose rows are Arrow tables.

    ``with_format`` would copy the transform, which may not be possible: it may hold a lock.
    """
    rows = copy.copy(dataset)
    rows.set_format("arrow")
    return rows


def hash_dataset(dataset: Any) -> str:
    """Return the SHA-256 of the content of a ``datasets.Dataset``, row by row in logical order.

    ``Dataset._fingerprint`` would not do: it changes when equal data are loaded again, and stays when a file changes to which
    a row merely points. Of such files the size and the time of the last change are hashed: of images without bytes, and of
    texts in columns whose first texts name existing files, at any depth of lists and structs.

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
    # Names of classes are words for numbers.
    features = re.sub(r"ClassLabel\(names=\[.*?\]\)", "ClassLabel()", str(dataset.features))
    digest = hashlib.sha256(f"{len(dataset)} {features}".encode())
    files = _NamedFiles(digest)
    for table in arrow_rows(dataset).iter(batch_size=256):
        for name, column in zip(table.column_names, table.columns, strict=True):
            column = column.combine_chunks()
            if isinstance(column, pa.ChunkedArray):
                column = pa.concat_arrays(column.chunks)
            digest.update(pa.record_batch([column], names=[name]).serialize())
            files.add(column, name)
    if missing := files.missing:
        _say_once(
            f"Column {missing!r} names files that are not found from the working directory, so the fingerprint of a "
            "cache does not see when they change. Give absolute paths; or give a name for these data with "
            "CacheConfig(dataset_id=...), and change the name whenever the files change."
        )
    return digest.hexdigest()


class _NamedFiles:
    """Hashes the files that the rows of a data set name.

    Args:
        digest: Takes the size and the time of the last change of each file.

    """

    def __init__(self, digest: Any) -> None:
        self.digest = digest
        self._is_path: dict[str, bool] = {}
        self._media: set[str] = set()
        self._missing_media: list[str] = []
        self._missing_texts: list[str] = []

    @property
    def missing(self) -> str:
        """A column that names files that were not found; empty if there is none.

        Beside a column of images, names of files are likely not read by anybody.
        """
        names = self._missing_media or ([] if self._media else self._missing_texts)
        return names[0] if names else ""

    def add(self, array: pa.Array, column: str) -> None:
        """Hash the files that some rows of a column name."""
        kind = array.type
        if isinstance(array, pa.ExtensionArray):
            self.add(array.storage, column)
        elif pa.types.is_struct(kind):
            children = dict(zip([field.name for field in kind], array.flatten(), strict=True))
            if {"bytes", "path"} <= children.keys():
                self._media.add(column)
                without = np.flatnonzero(children.pop("bytes").is_null().to_numpy(zero_copy_only=False))
                if not self._stamp(children.pop("path").take(pa.array(without))):
                    self._missing_media.append(column)
            for name, child in children.items():
                self.add(child, f"{column}.{name}")
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            self.add(array.flatten(), column)
        elif pa.types.is_dictionary(kind):
            self.add(array.dictionary, column)
        elif (pa.types.is_string(kind) or pa.types.is_large_string(kind)) and self._names_files(array, column):
            self._stamp(array)

    def _names_files(self, array: pa.Array, column: str) -> bool:
        """Try the first texts of a column, once: there may be millions of texts that are no paths."""
        if column not in self._is_path:
            texts = array.drop_null().slice(0, _TRIED).to_pylist()
            if not texts:
                return False
            # A word may happen to be the name of a folder.
            found = [stamp(text) for text in texts if len(text) < 4096 and ("/" in text or "." in text or "\\" in text)]
            self._is_path[column] = any(found)
            if not any(found) and any(looks_like_a_file(text) for text in texts):
                self._missing_texts.append(column)
        return self._is_path[column]

    def _stamp(self, paths: pa.Array) -> bool:
        """Hash the files of these paths; say whether all were found."""
        stamps = [stamp(text) for text in paths.to_pylist() if text is not None]
        self.digest.update("".join(map(str, stamps)).encode())
        return None not in stamps


@functools.cache
def _say_once(text: str) -> None:
    logger.warning(text)


def _held_dataset(value: Any) -> str | None:
    """Return the hash of a data set that a transform holds, with its own transform; ``None`` of anything else."""
    import datasets

    if not isinstance(value, datasets.Dataset):
        return None
    if value not in _HELD:
        _HELD[value] = hash_dataset(value) + walk_code(value.format, special=_held_dataset).digest
    return _HELD[value]


def look_into(code: Any, what: str, skipped: frozenset[str] = frozenset()) -> CodeWalk:
    """Walk over the code and state of a transform or collator.

    Args:
        code: The transform or collator, or a tuple of them.
        what: Its name in the message of an error, such as ``"training transform"``.
        skipped: Parts that do not count; see ``changed_parts``.

    Raises:
        UnsupportedSetupError: It holds something that cannot be hashed.
    """
    try:
        return walk_code(code, skipped, _held_dataset)
    except Exception as error:
        raise UnsupportedSetupError(
            f"The {what} cannot be hashed ({type(error).__name__}: {error}), so a cache could go stale unseen when it "
            "changes. Give it a name with CacheConfig(transform_id=...), and change the name whenever you change the "
            "transform or the collator."
        ) from error


def hash_object(code: Any, what: str, skipped: frozenset[str] = frozenset()) -> str:
    """Return the digest of ``look_into``, with the same arguments and errors; what was not seen is said once."""
    walk = look_into(code, what, skipped)
    if walk.unseen:
        _say_once(
            f"The {what} reads what the fingerprint of a cache cannot see: {', '.join(walk.unseen)}. If that changes what "
            "is rendered, give it a name with CacheConfig(transform_id=...), and change the name whenever it changes."
        )
    return walk.digest
