"""The build of one cache around the building loop: what it keeps of an earlier build, and the commit.

The loop itself is in ``writer``, which would be too long with this. Nothing here renders, computes or encodes.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..codecs.entropy import check_frame
from ..distributed.process_group import ProcessGroup
from ..errors import (
    CacheCorruptError,
    DataError,
    FreezeCacheError,
)
from .codec_state import (
    CodecState,
    load_copies,
    load_state,
    save_state,
)
from .fingerprint import CODE, Fingerprint
from .index import (
    CODEC_NAME,
    CONSUMED_NAME,
    COPIES_NAME,
    INDEX_NAME,
    CacheIndex,
    FileRecord,
    fsync_directory,
    load_index,
    save_index,
    shard_name,
    table_name,
)
from .lock import os_errors_as_cache_errors
from .shard_file import (
    ExtraSpec,
    ShardHeader,
    file_sha256,
    read_shard_header,
)
from .shard_writer import CachePlan, cache_name

__all__ = ["SCRATCH", "Build", "BuildReport", "Unit", "explain_miss", "find_finished"]

logger = logging.getLogger(__name__)


#: Folder in a cache where ``datasets.map`` writes. It goes away with the build.
SCRATCH = ".build"
#: Caches with up to so many views are looked for where fewer are asked for.
_MOST_VIEWS = 64
#: (view, shard): what one shard holds, and what is built at once.
Unit = tuple[int, int]


@dataclass
class BuildReport:
    """What a build cost. Seconds are those of the calling process; caches that were built in one pass share them.

    Attributes:
        directory: The cache.
        total_bytes: Bytes of all its files but ``index.json``.
        seconds: Wall-clock seconds of the whole call.
        render_seconds: Seconds of waiting for rendered images.
        prefix_seconds: Seconds in the prefix.
        built_shards: Shards that this call wrote.
        kept_shards: Finished shards that this call found.
    """

    directory: Path
    total_bytes: int = 0
    seconds: float = 0.0
    render_seconds: float = 0.0
    prefix_seconds: float = 0.0
    built_shards: int = 0
    kept_shards: int = 0


def _has_state(plan: CachePlan) -> bool:
    """Say whether there is a ``codec.safetensors``: of each lossy codec, and where calibration found no lossy one."""
    return plan.calibration is not None or not plan.codec.lossless


def _ensure_states(directory: Path, plan: CachePlan) -> None:
    """Write the states of codecs unless they exist. This comes before any shard, so that no shard is ever without them."""
    states: list[tuple[str, Callable[[Path, str], CodecState[Any]], CodecState[Any]]] = []
    if _has_state(plan):
        states.append((CODEC_NAME, load_state, CodecState(plan.codec, plan.calibration or {})))
    if plan.copies is not None:
        states.append((COPIES_NAME, load_copies, CodecState(plan.copies, plan.copies_calibration or {})))
    for name, load, state in states:
        with suppress(CacheCorruptError):
            if load(directory / name, plan.fingerprint.digest).codec == state.codec:
                continue
        save_state(directory / name, plan.fingerprint.digest, state)


def _shard_is_finished(directory: Path, plan: CachePlan, view: int, shard: int) -> bool:
    """Say whether a shard and its index table exist, belong to this cache, and are sound to the last frame.

    Only a resumed build asks. It takes the hashes of what it keeps afterwards, so damage must show now.
    """
    table, path = directory / table_name(view, shard), directory / shard_name(view, shard)
    if not table.is_file():
        return False
    rows = plan.rows(shard)
    try:
        header = read_shard_header(path)
        identity = tuple(header.metadata.get(name) for name in ("fingerprint", "view", "shard"))
        if identity != (plan.fingerprint.digest, str(view), str(shard)):
            return False
        if not np.array_equal(header.sample_indices, rows):
            return False
        if json.loads(header.metadata["codec"]) != plan.views.stored_dict(view):  # calibrated anew
            return False
        if not np.array_equal(pq.read_table(table, columns=["sample_index"])["sample_index"].to_numpy(), rows):
            raise ValueError(f"{table} does not list the rows of its shard")
        with path.open("rb") as file:
            file.seek(header.header_bytes)
            for ends in header.frame_offsets.tolist():
                for start, end in itertools.pairwise(ends):
                    check_frame(file.read(end - start))
    except (CacheCorruptError, ValueError, OSError, KeyError, pa.ArrowException) as error:
        logger.warning("Rebuilding shard %s: %s", path, error)
        return False
    return True


def _record(directory: Path, name: str, header: ShardHeader | None = None) -> FileRecord:
    path = directory / name
    header_bytes = 0 if header is None else header.header_bytes
    return FileRecord(
        path.stat().st_size,
        file_sha256(path),
        header_bytes,
        file_sha256(path, header_bytes) if header_bytes else "",
    )


def _shard_records(
    directory: Path, plan: CachePlan, view: int, shard: int
) -> tuple[dict[str, FileRecord], dict[str, str]]:
    """Return the records of a shard and its index table, and the shard's metadata.

    Raises:
        CacheCorruptError: The shard is damaged, or another run has written it with another codec.
    """
    names = shard_name(view, shard), table_name(view, shard)
    header = read_shard_header(directory / names[0])
    if json.loads(header.metadata["codec"]) != plan.views.stored_dict(view):
        # A process of a run that was killed in part went on writing, with the codec of that run.
        raise CacheCorruptError(
            f"{directory / names[0]} was written with another codec, by another run. See that no other run writes "
            f"{directory}, and start again: this shard will be rebuilt."
        )
    return {names[0]: _record(directory, names[0], header), names[1]: _record(directory, names[1])}, header.metadata


def _make_index(
    directory: Path, plan: CachePlan, shards: Sequence[tuple[dict[str, FileRecord], dict[str, str]]]
) -> CacheIndex:
    """Return the index of a cache whose files are all written.

    Args:
        directory: The cache.
        plan: What it holds.
        shards: What ``_shard_records`` gave for every shard of every view.

    Raises:
        DataError: The shards hold different things.
    """
    files = {name: record for records, _ in shards for name, record in records.items()}
    if _has_state(plan):
        files[CODEC_NAME] = _record(directory, CODEC_NAME)
    if plan.copies is not None:
        files[COPIES_NAME] = _record(directory, COPIES_NAME)
    # Processes that wrote apart from each other must have stored the same kind of thing.
    names = ("extras", "num_tokens", "hidden_shape", "dtype")
    contents = {tuple(metadata[name] for name in names) for _, metadata in shards}
    if len(contents) > 1:
        raise DataError(
            f"The shards of {directory} hold different things: {sorted(contents)}. Let the transform give all images one "
            "size, and the collator one set of names, dtypes and shapes; then delete the folder and start again."
        )
    extras_json, num_tokens, shape_json, dtype = contents.pop()
    extras = [ExtraSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in json.loads(extras_json)]
    stored_tokens, hidden = json.loads(shape_json)
    return CacheIndex(
        fingerprint=plan.fingerprint.components,
        split_point=plan.split_point,
        num_views=plan.num_views,
        image_shape=plan.image_shape,
        num_tokens=int(num_tokens),
        hidden_shape=(stored_tokens, hidden),
        dtype=dtype,
        codec=plan.codec.to_dict(),
        num_samples=plan.layout.num_samples,
        chunk_size=plan.layout.chunk_size,
        shard_chunks=plan.shard_chunks,
        layout_seed=plan.layout.seed,
        extras=tuple(extras),
        files=files,
        calibration=plan.calibration or {} if _has_state(plan) else None,
        copies=None if plan.copies is None else plan.copies.to_dict(),
        copies_calibration=None if plan.copies is None else plan.copies_calibration or {},
        rows=plan.layout.rows,
    )


@dataclass
class Build:
    """One cache of a pass.

    Attributes:
        plan: What it is to hold.
        report: What building it cost.
        missing: Units that no build has finished, the same on all processes.
    """

    plan: CachePlan
    report: BuildReport
    missing: set[Unit] = field(default_factory=set)

    @property
    def directory(self) -> Path:
        """The directory of the cache."""
        return self.report.directory

    def begin(self) -> bool:
        """Prepare the directory, on the main process; say whether there is anything to build."""
        with os_errors_as_cache_errors(self.directory):
            if (self.directory / INDEX_NAME).is_file():  # finished by another run since the caller looked
                return False
            self.sweep()
            _ensure_states(self.directory, self.plan)
            (self.directory / SCRATCH).mkdir()
            return True

    def sweep(self) -> None:
        """Remove what killed builds left half written. The caller holds the lock."""
        shutil.rmtree(self.directory / SCRATCH, ignore_errors=True)
        for path in self.directory.rglob("*.tmp"):
            path.unlink(missing_ok=True)

    def find_missing(self, units: Sequence[Unit], process_group: ProcessGroup) -> None:
        """Look which units an earlier build has finished. Collective."""
        directory = self.directory
        with process_group.fail_together(), os_errors_as_cache_errors(directory):
            mine = [
                unit
                for unit in process_group.split_between(units)
                if not _shard_is_finished(directory, self.plan, *unit)
            ]
        self.missing = {unit for missing in process_group.gather(mine) for unit in missing}
        self.report.kept_shards = len(units) - len(self.missing)
        if self.report.kept_shards and process_group.is_main_process:
            logger.info(
                "Going on with %s: %d of %d shards are finished.", directory, self.report.kept_shards, len(units)
            )

    def commit(self, units: Sequence[Unit], process_group: ProcessGroup) -> None:
        """Write the index of a cache whose shards are all written. Collective."""
        with process_group.fail_together(), os_errors_as_cache_errors(self.directory):
            mine = [_shard_records(self.directory, self.plan, *unit) for unit in process_group.split_between(units)]
        shards = [record for records in process_group.gather(mine) for record in records]

        def write_index() -> int:
            with os_errors_as_cache_errors(self.directory):
                index = _make_index(self.directory, self.plan, shards)
                self.sweep()
                save_index(self.directory, index)
                (self.directory / CONSUMED_NAME).unlink(missing_ok=True)
                fsync_directory(self.directory.parent)
                return index.total_bytes

        self.report.total_bytes = process_group.on_main_process(write_index)


def find_finished(
    cache_dir: Path, split_point: int, fingerprint: Fingerprint, num_views: int, more_views: Mapping[str, str] | None
) -> Fingerprint | None:
    """Return the fingerprint of a finished cache: the one asked for, or the same with more views; ``None`` without one.

    Args:
        cache_dir: Folder of caches.
        split_point: Number of frozen blocks.
        fingerprint: The fingerprint asked for.
        num_views: Number of views that it asks for.
        more_views: Components that are others in a cache with more views, beside their number; ``None`` if it does not hold the
            same views, as it does without loss.
    """
    for number in range(num_views, max(num_views, 0 if more_views is None else _MOST_VIEWS) + 1):
        others = (more_views or {}) if number > num_views else {}
        candidate = Fingerprint({**fingerprint.components, **others, "number of views": str(number)})
        if (cache_dir / cache_name(split_point, candidate) / INDEX_NAME).is_file():
            return candidate
    return None


def explain_miss(cache_dir: Path, fingerprint: Fingerprint) -> str | None:
    """Say in which components the most similar finished cache differs; ``None`` if there is no other cache."""
    nearest: tuple[int, Path, list[str]] | None = None
    by_code_alone = 0
    for path in sorted(cache_dir.glob(f"k*/{INDEX_NAME}")):
        try:
            other = Fingerprint(load_index(path.parent).fingerprint)
        except (FreezeCacheError, OSError) as error:
            logger.warning("Passing over a cache that cannot be read: %s", error)
            continue
        different = fingerprint.difference(other)
        by_code_alone += bool(different) and set(different) <= CODE
        if nearest is None or len(different) < nearest[0]:
            nearest = (len(different), path.parent, different)
    if nearest is None:
        return None
    # Once, it was likely edited. Twice, it is likely hashed differently in each process.
    hint = (
        f". {by_code_alone} caches differ in nothing else: if you have not changed the code, something in it differs from process "
        "to process. Give it a name with CacheConfig(transform_id=...), and change the name whenever you change the code"
    )
    return f"the nearest cache, {nearest[1]}, differs in: {', '.join(nearest[2])}{hint if by_code_alone > 1 else ''}"
