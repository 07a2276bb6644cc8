"""Builds a cache: renders views, runs the prefix, encodes chunks and writes shards, through ``datasets.map``."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..codecs import DTYPES
from ..codecs.entropy import check_frame
from ..data.collators import CheckedCollator
from ..data.geometry import GEOMETRY_NAME
from ..data.seeding import preserved_random_state
from ..data.views import ViewKey
from ..distributed.process_group import ProcessGroup
from ..errors import (
    CacheCorruptError,
    DataError,
)
from .codec_state import (
    CodecState,
    load_copies,
    load_state,
    save_state,
)
from .commit import (
    has_state,
    make_index,
    shard_records,
)
from .index import (
    CODEC_NAME,
    CONSUMED_NAME,
    COPIES_NAME,
    INDEX_NAME,
    ExtraSpec,
    ShardHeader,
    atomic_write,
    fsync_directory,
    load_index,
    read_chunk_frames,
    read_extra,
    read_shard_header,
    save_index,
    shard_name,
    table_name,
)
from .lock import (
    SINGLE_PROCESS,
    build_lock,
    os_errors_as_cache_errors,
)
from .shard_writer import (
    CachePlan,
    ShardWriter,
)

__all__ = ["BuildReport", "build_cache"]

logger = logging.getLogger(__name__)

#: Where ``datasets.map`` writes; gone with the build.
_SCRATCH = ".build"


@dataclass
class BuildReport:
    """What a build cost. Seconds are those of the calling process.

    Attributes:
        directory: The cache.
        total_bytes: Bytes of all its files but ``index.json``.
        seconds: Wall-clock of the whole call.
        render_seconds: Spent waiting for rendered images.
        prefix_seconds: Spent in the prefix.
        built_shards: Shards written by this call.
        kept_shards: Shards found complete.
    """

    directory: Path
    total_bytes: int = 0
    seconds: float = 0.0
    render_seconds: float = 0.0
    prefix_seconds: float = 0.0
    built_shards: int = 0
    kept_shards: int = 0


@dataclass(frozen=True)
class _Keyed(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A view data set whose items carry their keys."""

    views: Any

    def __getitem__(self, key: ViewKey) -> tuple[ViewKey, Any]:
        return key, self.views[key]


def _finished(directory: Path, plan: CachePlan, view: int, shard: int) -> bool:
    """Say whether a shard and its index part are there, of this cache, and sound to the last frame.

    Only a resumed build asks; what it keeps gets its hashes afterwards, so damage must be found now.
    """
    part, path = directory / table_name(view, shard), directory / shard_name(view, shard)
    if not part.is_file():
        return False
    rows = plan.rows(shard)
    try:
        head = read_shard_header(path)
        identity = (head.metadata.get("fingerprint"), head.metadata.get("view"), head.metadata.get("shard"))
        if identity != (plan.fingerprint.digest, str(view), str(shard)) or not np.array_equal(
            head.sample_indices, rows
        ):
            return False
        if json.loads(head.metadata["codec"]) != plan.views.stored_dict(view):  # calibrated anew
            return False
        if not np.array_equal(pq.read_table(part, columns=["sample_index"])["sample_index"].to_numpy(), rows):
            raise ValueError(f"{part} does not list the rows of its shard")
        with path.open("rb") as file:
            file.seek(head.header_bytes)
            for ends in head.frame_offsets.tolist():
                for start, end in itertools.pairwise(ends):
                    check_frame(file.read(end - start))
    except (CacheCorruptError, ValueError, OSError, KeyError, pa.ArrowException) as error:
        logger.warning("Rebuilding shard %s: %s", path, error)
        return False
    return True


def _batches(plan: CachePlan, units: Sequence[tuple[int, int]], batch_size: int) -> Iterator[list[ViewKey]]:
    for view, shard in units:
        rows = plan.rows(shard).tolist()
        for start in range(0, len(rows), batch_size):
            yield [(sample_index, view) for sample_index in rows[start : start + batch_size]]


def is_image(name: str) -> bool:
    """Say whether a part of a batch is consumed by the prefix, and not stored beside the hidden states."""
    return name == "pixel_values"


def _ensure_state(directory: Path, plan: CachePlan) -> None:
    """Write the states of codecs unless they are there. Before any shard, so that no shard is ever without them."""
    states: list[tuple[str, Callable[[Path, str], CodecState[Any]], CodecState[Any]]] = []
    if has_state(plan):
        states.append((CODEC_NAME, load_state, CodecState(plan.codec, plan.calibration or {})))
    if plan.copies is not None:
        states.append((COPIES_NAME, load_copies, CodecState(plan.copies, plan.copies_calibration or {})))
    for name, load, state in states:
        with suppress(CacheCorruptError):
            if load(directory / name, plan.fingerprint.digest).codec == state.codec:
                continue
        save_state(directory / name, plan.fingerprint.digest, state)


@dataclass
class _BaseShard:
    """Hidden states and geometry of the base view of a shard's chunks, as a reader will decode them.

    Calls come from the encoder's thread, chunk by chunk; the shard of the base view is complete before any other begins.
    """

    directory: Path
    plan: CachePlan
    shard: int
    head: ShardHeader | None = None

    def __call__(self, position: int) -> tuple[Tensor, Tensor]:
        path, plan = self.directory / shard_name(0, self.shard), self.plan
        if self.head is None:
            self.head = read_shard_header(path)
        metadata = self.head.metadata
        first = (self.shard * plan.shard_chunks + position) * plan.layout.chunk_size
        samples = min(plan.layout.chunk_size, plan.layout.num_samples - first)
        shape, dtype = (samples, *json.loads(metadata["hidden_shape"])), DTYPES[metadata["dtype"]]
        extras = [
            ExtraSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in json.loads(metadata["extras"])
        ]
        place = [spec.name for spec in extras].index(GEOMETRY_NAME)
        try:
            frames = read_chunk_frames(path, self.head, position)
            split = len(frames) - len(extras)
            return plan.codec.decode(frames[:split], shape, dtype), read_extra(
                extras[place], frames[split + place], samples
            )
        except ValueError as error:
            raise CacheCorruptError(f"{path} is damaged in chunk {position}: {error}. Delete it to rebuild.") from error


@dataclass(frozen=True)
class _Source:
    """Where hidden states come from; see ``build_cache``."""

    views: Any
    collate: CheckedCollator
    prefix: Callable[..., Tensor]
    prefix_inputs: frozenset[str]
    is_input: Callable[[str], bool]


def build_cache(
    cache_dir: Path,
    plan: CachePlan,
    views: Any,
    collate: CheckedCollator,
    prefix: Callable[..., Tensor],
    *,
    batch_size: int,
    num_workers: int = 0,
    prefix_inputs: frozenset[str] = frozenset(),
    is_input: Callable[[str], bool] = is_image,
    show_progress: bool = False,
    processes: ProcessGroup = SINGLE_PROCESS,
    lock_timeout: float = 0.0,
    consume: Callable[[int], None] | None = None,
) -> BuildReport:
    """Build a cache, or the rest of one whose build was interrupted, and commit it. Collective.

    Finished shards are kept, whatever ends a build; the next call goes on behind them. Memory does not grow with the
    number of samples.

    Each process builds a run of the shards. Batches never reach over the end of a shard, so what is
    written does not depend on how many processes there are: byte for byte where each computes with as many threads, to
    the rounding of the prefix otherwise.

    Args:
        cache_dir: Folder of caches; this one is ``cache_dir / plan.name``.
        plan: What to store.
        views: Renders the views; or any data set with items by ``(sample index, view)``, such as an earlier cache.
        collate: The user's collator, checked: list of rendered examples -> dict with ``pixel_values`` (batch, channels, height,
            width) and tensors (batch, ...) that are stored beside the hidden states.
        prefix: (**inputs) -> hidden states (batch, tokens, hidden), without gradients, on any device. Its inputs are
            those parts of a batch that ``is_input`` or ``prefix_inputs`` name.
        batch_size: Images per prefix call.
        num_workers: ProcessGroup that render ahead of the device; 0 renders in this one.
        prefix_inputs: Names of the extras that the prefix takes as arguments, and that are stored as well.
        is_input: Says by name what is only for the prefix, and not stored. Default: ``pixel_values``.
        show_progress: Show a progress bar over all views and samples.
        processes: Those that build together.
        lock_timeout: Seconds to wait for another run that builds this cache.
        consume: Called with the number of each shard once all its views are durable; for making room. Shards are then
            built in all views before the next begins.

    Raises:
        CacheLockedError: Another live process is building this cache.
        CacheWriteError: The folder cannot be written, or the disk is full.
        DataError: A row cannot be rendered, or its hidden states are not finite or of another shape.
    """
    started = time.perf_counter()
    report = BuildReport(cache_dir / plan.name)
    source = _Source(views, collate, prefix, prefix_inputs, is_input)
    with build_lock(cache_dir, plan, processes, lock_timeout), preserved_random_state():
        _build(plan, source, batch_size, num_workers, processes, consume, show_progress, report)
    report.seconds = time.perf_counter() - started
    return report


def _sweep(directory: Path) -> None:
    """Remove what killed builds left half written; the caller holds the lock."""
    shutil.rmtree(directory / _SCRATCH, ignore_errors=True)
    for path in directory.rglob("*.tmp"):
        path.unlink(missing_ok=True)


def _build(
    plan: CachePlan,
    source: _Source,
    batch_size: int,
    num_workers: int,
    processes: ProcessGroup,
    consume: Callable[[int], None] | None,
    show_progress: bool,
    report: BuildReport,
) -> None:
    directory = report.directory

    def begin() -> bool:
        with os_errors_as_cache_errors(directory):
            if (directory / INDEX_NAME).is_file():  # finished by another run since this one looked
                return False
            _sweep(directory)
            _ensure_state(directory, plan)
            (directory / _SCRATCH).mkdir()
            return True

    everything = [(view, shard) for view in range(plan.num_views) for shard in range(plan.num_shards)]
    if not processes.on_main_process(begin):
        report.kept_shards = len(everything)
        report.total_bytes = processes.on_main_process(lambda: load_index(directory).total_bytes)
        return
    with processes.fail_together(), os_errors_as_cache_errors(directory):
        missing = [unit for unit in processes.split_between(everything) if not _finished(directory, plan, *unit)]
    pending = {unit for part in processes.gather(missing) for unit in part}
    report.kept_shards = len(everything) - len(pending)
    if report.kept_shards and processes.is_main_process:
        logger.info("Going on with %s: %d of %d shards are finished.", directory, report.kept_shards, len(everything))
    if consume is not None:
        with processes.fail_together(), os_errors_as_cache_errors(directory):
            for shard in processes.split_between(sorted(set(range(plan.num_shards)) - {shard for _, shard in pending})):
                consume(shard)
    for units in _shares(plan, pending, processes, by_shard=consume is not None):
        with processes.fail_together(), os_errors_as_cache_errors(directory):
            _build_units(plan, units, source, batch_size, num_workers, consume, show_progress, processes, report)
    report.built_shards = sum(processes.gather(report.built_shards))
    with processes.fail_together(), os_errors_as_cache_errors(directory):
        records = [shard_records(directory, plan, view, shard) for view, shard in processes.split_between(everything)]
    found = [record for part in processes.gather(records) for record in part]

    def commit() -> int:
        with os_errors_as_cache_errors(directory):
            index = make_index(directory, plan, found)
            _sweep(directory)
            save_index(directory, index)
            (directory / CONSUMED_NAME).unlink(missing_ok=True)
            fsync_directory(directory.parent)
            return index.total_bytes

    report.total_bytes = processes.on_main_process(commit)


def _shares(
    plan: CachePlan, pending: set[tuple[int, int]], processes: ProcessGroup, by_shard: bool
) -> list[list[tuple[int, int]]]:
    """Return what this process builds, (view, shard), one list after the other: runs of sample indices.

    Views that are predicted need the base view's shard: all processes finish those first. Where shards of an earlier
    cache give way, each is built in all views by one process, one shard after the other.
    """
    if by_shard:
        mine = set(processes.split_between(sorted({shard for _, shard in pending})))
        return [sorted((unit for unit in pending if unit[1] in mine), key=lambda unit: unit[::-1])]
    predicted = plan.num_views > 1 and plan.views.needs_base(1)
    phases = (
        [[unit for unit in sorted(pending) if (unit[0] == 0) == first] for first in (True, False)]
        if predicted
        else [sorted(pending)]
    )
    return [processes.split_between(phase) for phase in phases]


def _build_units(
    plan: CachePlan,
    units: Sequence[tuple[int, int]],
    source: _Source,
    batch_size: int,
    num_workers: int,
    consume: Callable[[int], None] | None,
    show_progress: bool,
    processes: ProcessGroup,
    report: BuildReport,
) -> None:
    """Write this process's shards, one after the other."""
    directory = report.directory
    loader = DataLoader(
        _Keyed(source.views),
        batch_sampler=list(_batches(plan, units, batch_size)),
        collate_fn=source.collate.collate_keyed,
        num_workers=num_workers,
        # A generator of its own: starting workers must not move the global one.
        generator=torch.Generator(),
    )
    rendered = iter(loader)
    last_views = {shard: view for view, shard in sorted(units)}
    bars_enabled = datasets.are_progress_bars_disabled() is False
    left = sum(len(plan.rows(shard)) for _, shard in units)
    total = left if processes.size > 1 else plan.layout.num_samples * plan.num_views
    bar = tqdm(
        total=total,
        initial=total - left,
        desc=f"Caching {plan.split_point} frozen blocks"
        + (f" (process 1 of {processes.size})" if processes.size > 1 else ""),
        unit="view",
        disable=not show_progress or not processes.is_main_process,
    )
    datasets.disable_progress_bars()
    try:
        with bar, ThreadPoolExecutor(1) as executor:
            for view, shard in units:
                with atomic_write(directory / shard_name(view, shard)) as file:
                    base = _BaseShard(directory, plan, shard) if plan.views.needs_base(view) else None
                    writer = ShardWriter(file, plan, view, shard, executor, base)
                    index = _map_shard(writer, rendered, source, batch_size, directory / _SCRATCH, bar, report)
                    writer.finish()
                with atomic_write(directory / table_name(view, shard)) as file:
                    index.to_parquet(file)
                report.built_shards += 1
                if consume is not None and view == last_views[shard]:
                    consume(shard)
    finally:
        if bars_enabled:
            datasets.enable_progress_bars()


def _map_shard(
    writer: ShardWriter,
    rendered: Iterator[tuple[list[ViewKey], dict[str, Any]]],
    source: _Source,
    batch_size: int,
    scratch: Path,
    bar: Any,
    report: BuildReport,
) -> Any:
    """Rewrite the rows of one shard into hidden states; return the rows of the index."""
    plan, view, shard = writer.plan, writer.view, writer.shard
    chunk_size, first_chunk = plan.layout.chunk_size, shard * plan.shard_chunks

    def cache_rows(rows: dict[str, list[int]], positions: list[int]) -> dict[str, Any]:
        started = time.perf_counter()
        keys, batch = next(rendered)
        if keys != [(sample_index, view) for sample_index in rows["sample_index"]]:
            raise AssertionError("rendered samples arrived out of order")
        extras = {name: value for name, value in batch.items() if not source.is_input(name)}
        inputs = {name: value for name, value in batch.items() if source.is_input(name) or name in source.prefix_inputs}
        rendered_at = time.perf_counter()
        hidden_states = source.prefix(**inputs).detach().to("cpu")
        report.render_seconds += rendered_at - started
        report.prefix_seconds += time.perf_counter() - rendered_at
        if hidden_states.dtype not in DTYPES.values():
            raise DataError(f"Hidden states of dtype {hidden_states.dtype} cannot be stored; expected a float dtype.")
        finite = torch.isfinite(hidden_states).flatten(1).all(dim=1)
        if not bool(finite.all()):
            bad = [index for index, good in zip(rows["sample_index"], finite.tolist(), strict=True) if not good]
            raise DataError(
                f"The frozen prefix gave NaN or infinite hidden states for rows {bad[:5]} (view {view}). Check these "
                "images, the transform's normalisation and the model's weights; with fp16 try bf16 or fp32."
            )
        writer.append(hidden_states, extras)
        bar.update(len(keys))
        columns: dict[str, Any] = {
            "sample_index": rows["sample_index"],
            "view": [view] * len(positions),
            "shard": [shard] * len(positions),
            "chunk": [first_chunk + position // chunk_size for position in positions],
            "row": [position % chunk_size for position in positions],
        }
        return columns | {name: value.tolist() for name, value in extras.items() if value.dim() == 1}

    # Bound to rows of indices, not to the user's data set: its transform must run under seeded states, and once.
    index = datasets.Dataset.from_dict({"sample_index": plan.rows(shard)})
    return index.map(
        cache_rows,
        batched=True,
        with_indices=True,
        batch_size=batch_size,
        load_from_cache_file=False,  # a hit would skip the writing of the shard
        cache_file_name=str(scratch / f"view-{view:02d}-shard-{shard:05d}.arrow"),
        new_fingerprint=f"{plan.fingerprint.digest[:32]}-{view}-{shard}",
    )
