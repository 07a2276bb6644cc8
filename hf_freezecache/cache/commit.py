"""Makes the index that commits a cache, and compares a new one with those that are there."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from ..errors import (
    CacheCorruptError,
    DataError,
    FreezeCacheError,
)
from .fingerprint import Fingerprint
from .index import (
    CODEC_NAME,
    COPIES_NAME,
    INDEX_NAME,
    CacheIndex,
    ExtraSpec,
    FileRecord,
    ShardHeader,
    file_sha256,
    load_index,
    read_shard_header,
    shard_name,
    table_name,
)
from .shard_writer import CachePlan

__all__ = ["explain_miss", "has_state", "make_index", "shard_records"]

logger = logging.getLogger(__name__)


def has_state(plan: CachePlan) -> bool:
    """Say whether the cache holds a codec's state: all lossy ones, and those that calibration found no lossy codec for."""
    return plan.calibration is not None or not plan.codec.lossless


def _record(directory: Path, name: str, head: ShardHeader | None = None) -> FileRecord:
    path = directory / name
    header_bytes = 0 if head is None else head.header_bytes
    return FileRecord(
        path.stat().st_size,
        file_sha256(path),
        header_bytes,
        file_sha256(path, header_bytes) if header_bytes else "",
    )


def shard_records(
    directory: Path, plan: CachePlan, view: int, shard: int
) -> tuple[dict[str, FileRecord], dict[str, str]]:
    """Return the records of a shard and its index part, and the shard's metadata.

    Raises:
        CacheCorruptError: The shard is damaged, or another run has written it with another codec.
    """
    names = shard_name(view, shard), table_name(view, shard)
    head = read_shard_header(directory / names[0])
    if json.loads(head.metadata["codec"]) != plan.views.stored_dict(view):
        # A process of a run that was killed in part went on writing, with the codec of that run.
        raise CacheCorruptError(
            f"{directory / names[0]} was written with another codec, by another run. See that no other run writes "
            f"{directory}, and start again: this shard will be rebuilt."
        )
    return {names[0]: _record(directory, names[0], head), names[1]: _record(directory, names[1])}, head.metadata


def make_index(
    directory: Path, plan: CachePlan, found: Sequence[tuple[dict[str, FileRecord], dict[str, str]]]
) -> CacheIndex:
    """Return the index of a cache whose files are all there.

    Args:
        directory: The cache.
        plan: What it holds.
        found: What ``shard_records`` gave, for every shard of every view.

    Raises:
        DataError: The shards hold different things.
    """
    files = {name: record for records, _ in found for name, record in records.items()}
    if has_state(plan):
        files[CODEC_NAME] = _record(directory, CODEC_NAME)
    if plan.copies is not None:
        files[COPIES_NAME] = _record(directory, COPIES_NAME)
    # All shards must agree on what they hold, which processes learnt apart from each other.
    described = {tuple(metadata[name] for name in ("extras", "hidden_shape", "dtype")) for _, metadata in found}
    if len(described) > 1:
        raise DataError(
            f"The shards of {directory} hold different things: {sorted(described)}. Let the transform give all images one "
            "size, and the collator one set of names, dtypes and shapes; then delete the folder and start again."
        )
    extras_json, shape_json, dtype = described.pop()
    extras = [ExtraSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in json.loads(extras_json)]
    tokens, width = json.loads(shape_json)
    return CacheIndex(
        fingerprint=plan.fingerprint.parts,
        split_point=plan.split_point,
        num_views=plan.num_views,
        image_shape=plan.image_shape,
        hidden_shape=(tokens, width),
        dtype=dtype,
        codec=plan.codec.to_dict(),
        num_samples=plan.layout.num_samples,
        chunk_size=plan.layout.chunk_size,
        shard_chunks=plan.shard_chunks,
        layout_seed=plan.layout.seed,
        extras=tuple(extras),
        files=files,
        calibration=plan.calibration or {} if has_state(plan) else None,
        copies=None if plan.copies is None else plan.copies.to_dict(),
        copies_calibration=None if plan.copies is None else plan.copies_calibration or {},
        part=plan.layout.part,
    )


def explain_miss(cache_dir: Path, fingerprint: Fingerprint) -> str | None:
    """Say in which parts the most similar finished cache differs, or ``None`` if there is no other cache."""
    nearest: tuple[int, Path, list[str]] | None = None
    for path in sorted(cache_dir.glob(f"k*/{INDEX_NAME}")):
        try:
            parts = load_index(path.parent).fingerprint
        except (FreezeCacheError, OSError) as error:
            logger.warning("Passing over a cache that cannot be read: %s", error)
            continue
        different = fingerprint.difference(Fingerprint(parts))
        if nearest is None or len(different) < nearest[0]:
            nearest = (len(different), path.parent, different)
    if nearest is None:
        return None
    return f"the nearest cache, {nearest[1]}, differs in: {', '.join(nearest[2])}"
