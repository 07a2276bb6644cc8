"""Builds a cache: renders views, runs the prefix, encodes chunks and writes shards, through ``datasets.map``."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..codecs import DTYPES
from ..codecs.entropy import check_frame
from ..errors import CacheCorruptError, CacheLockedError, CacheWriteError, DataError, FreezeCacheError
from ..views import ViewKey, preserved_random_state
from .fingerprint import Fingerprint
from .format import (
    CODEC_NAME,
    COPIES_NAME,
    GEOMETRY_NAME,
    INDEX_NAME,
    CacheIndex,
    ExtraSpec,
    FileRecord,
    ShardHead,
    atomic_write,
    file_sha256,
    fsync_directory,
    load_index,
    part_name,
    read_chunk_frames,
    read_extra,
    read_shard_head,
    save_index,
    shard_name,
)
from .shard import CachePlan, ShardWriter
from .state import CodecState, load_copies, load_state, save_state

__all__ = ["BuildReport", "CachePlan", "RenderCollator", "build_cache", "explain_miss", "writing"]

logger = logging.getLogger(__name__)


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
class RenderCollator:
    """Collates rendered views with the user's collator, and keeps the keys beside the batch."""

    collate: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, items: list[tuple[ViewKey, Any]]) -> tuple[list[ViewKey], dict[str, Any]]:
        """Return keys and collated batch.

        Raises:
            DataError: The collator failed, or refused the batch; the message names the rows.
        """
        keys = [key for key, _ in items]
        try:
            return keys, self.collate([example for _, example in items])
        except Exception as error:
            raise DataError(
                f"The data_collator failed on rows {[sample_index for sample_index, _ in keys]} (view {keys[0][1]}): "
                f"{type(error).__name__}: {error}. Let the transform give all images one size and valid labels; finished "
                "shards of the cache are kept."
            ) from error


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
    part, path = directory / part_name(view, shard), directory / shard_name(view, shard)
    if not part.is_file():
        return False
    rows = plan.rows(shard)
    try:
        head = read_shard_head(path)
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
            file.seek(head.head_bytes)
            for ends in head.frame_offsets.tolist():
                for start, end in itertools.pairwise(ends):
                    check_frame(file.read(end - start))
    except (CacheCorruptError, ValueError, OSError, KeyError, pa.ArrowException) as error:
        logger.warning("Rebuilding shard %s: %s", path, error)
        return False
    return True


def _record(directory: Path, name: str, head: ShardHead | None = None) -> FileRecord:
    path = directory / name
    head_bytes = 0 if head is None else head.head_bytes
    return FileRecord(
        path.stat().st_size,
        file_sha256(path),
        head_bytes,
        file_sha256(path, head_bytes) if head_bytes else "",
    )


def _index(directory: Path, plan: CachePlan) -> CacheIndex:
    files: dict[str, FileRecord] = {}
    for view in range(plan.num_views):
        for shard in range(plan.num_shards):
            head = read_shard_head(directory / shard_name(view, shard))
            files[shard_name(view, shard)] = _record(directory, shard_name(view, shard), head)
            files[part_name(view, shard)] = _record(directory, part_name(view, shard))
    if _has_state(plan):
        files[CODEC_NAME] = _record(directory, CODEC_NAME)
    if plan.copies is not None:
        files[COPIES_NAME] = _record(directory, COPIES_NAME)
    extras = [ExtraSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in json.loads(head.metadata["extras"])]
    tokens, width = json.loads(head.metadata["hidden_shape"])
    return CacheIndex(
        fingerprint=plan.fingerprint.parts,
        split_point=plan.split_point,
        num_views=plan.num_views,
        image_shape=plan.image_shape,
        hidden_shape=(tokens, width),
        dtype=head.metadata["dtype"],
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


def _batches(plan: CachePlan, units: Sequence[tuple[int, int]], batch_size: int) -> Iterator[list[ViewKey]]:
    for view, shard in units:
        rows = plan.rows(shard).tolist()
        for start in range(0, len(rows), batch_size):
            yield [(sample_index, view) for sample_index in rows[start : start + batch_size]]


def is_image(name: str) -> bool:
    """Say whether a part of a batch is consumed by the prefix, and not stored beside the hidden states."""
    return name == "pixel_values"


def _has_state(plan: CachePlan) -> bool:
    """Say whether the cache holds a codec's state: all lossy ones, and those that calibration found no lossy codec for."""
    return plan.calibration is not None or not plan.codec.lossless


def _ensure_state(directory: Path, plan: CachePlan) -> None:
    """Write the states of codecs unless they are there. Before any shard, so that no shard is ever without them."""
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


@dataclass
class _BaseShard:
    """Hidden states and geometry of the base view of a shard's chunks, as a reader will decode them.

    Calls come from the encoder's thread, chunk by chunk; the shard of the base view is complete before any other begins.
    """

    directory: Path
    plan: CachePlan
    shard: int
    head: ShardHead | None = None

    def __call__(self, position: int) -> tuple[Tensor, Tensor]:
        path, plan = self.directory / shard_name(0, self.shard), self.plan
        if self.head is None:
            self.head = read_shard_head(path)
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


def build_cache(
    cache_dir: Path,
    plan: CachePlan,
    views: Any,
    collate: Callable[[list[Any]], dict[str, Any]],
    prefix: Callable[..., Tensor],
    *,
    batch_size: int,
    num_workers: int = 0,
    prefix_inputs: frozenset[str] = frozenset(),
    is_input: Callable[[str], bool] = is_image,
    show_progress: bool = False,
) -> BuildReport:
    """Build a cache, or the rest of one whose build was interrupted, and commit it.

    Finished shards are kept, whatever ends a build; the next call goes on behind them. Memory does not grow with the
    number of samples.

    Args:
        cache_dir: Folder of caches; this one is ``cache_dir / plan.name``.
        plan: What to store.
        views: Renders the views; or any data set with items by ``(sample index, view)``, such as an earlier cache.
        collate: The user's collator: list of rendered examples -> dict with ``pixel_values`` (batch, channels, height,
            width) and tensors (batch, ...) that are stored beside the hidden states.
        prefix: (**inputs) -> hidden states (batch, tokens, hidden), without gradients, on any device. Its inputs are
            those parts of a batch that ``is_input`` or ``prefix_inputs`` name.
        batch_size: Images per prefix call.
        num_workers: Processes that render ahead of the device; 0 renders in this one.
        prefix_inputs: Names of the extras that the prefix takes as arguments, and that are stored as well.
        is_input: Says by name what is only for the prefix, and not stored. Default: ``pixel_values``.
        show_progress: Show a progress bar over all views and samples.

    Raises:
        CacheLockedError: Another live process is building this cache.
        CacheWriteError: The folder cannot be written, or the disk is full.
        DataError: A row cannot be rendered, or its hidden states are not finite or of another shape.
    """
    started = time.perf_counter()
    report = BuildReport(cache_dir / plan.name)
    with writing(cache_dir, plan), preserved_random_state():
        _build(plan, views, collate, prefix, batch_size, num_workers, prefix_inputs, is_input, show_progress, report)
    report.seconds = time.perf_counter() - started
    return report


@contextmanager
def writing(cache_dir: Path, plan: CachePlan) -> Iterator[None]:
    """Hold the lock of a cache, in its directory, which is made; say what to do about errors of the file system.

    Raises:
        CacheLockedError: Another live process holds it.
        CacheWriteError: The folder cannot be written, or the disk is full.
    """
    directory = cache_dir / plan.name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache_dir / f".{plan.name}.lock", timeout=0):
            yield
    except filelock.Timeout:
        raise CacheLockedError(
            f"{directory} is being written by another live process. Wait for it to finish and start again, or give "
            "this run another cache_dir."
        ) from None
    except FreezeCacheError:
        raise
    except OSError as error:
        free = shutil.disk_usage(next(p for p in [directory, *directory.parents] if p.is_dir())).free
        raise CacheWriteError(
            f"The cache {directory} could not be written: {error} ({free / 2**20:.0f} MiB are free there). Its finished "
            "shards are kept: make room or permit writing, or choose another cache_dir, and start again."
        ) from error


def _build(
    plan: CachePlan,
    views: Any,
    collate: Callable[[list[Any]], dict[str, Any]],
    prefix: Callable[..., Tensor],
    batch_size: int,
    num_workers: int,
    prefix_inputs: frozenset[str],
    is_input: Callable[[str], bool],
    show_progress: bool,
    report: BuildReport,
) -> None:
    directory = report.directory
    units = [(view, shard) for view in range(plan.num_views) for shard in range(plan.num_shards)]
    if (directory / INDEX_NAME).is_file():  # finished by another process since this one looked
        report.kept_shards, report.total_bytes = len(units), load_index(directory).total_bytes
        return
    scratch = directory / ".build"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    _ensure_state(directory, plan)
    pending = [unit for unit in units if not _finished(directory, plan, *unit)]
    report.kept_shards = len(units) - len(pending)
    if report.kept_shards:
        logger.info("Going on with %s: %d of %d shards are finished.", directory, report.kept_shards, len(units))
    loader = DataLoader(
        _Keyed(views),
        batch_sampler=list(_batches(plan, pending, batch_size)),
        collate_fn=RenderCollator(collate),
        num_workers=num_workers,
        # A generator of its own: starting workers must not move the global one.
        generator=torch.Generator(),
    )
    rendered = iter(loader)
    bars_enabled = datasets.are_progress_bars_disabled() is False
    rows_done = sum(len(plan.rows(shard)) for unit in units if unit not in pending for shard in unit[1:])
    bar = tqdm(
        total=plan.layout.num_samples * plan.num_views,
        initial=rows_done,
        desc=f"Caching {plan.split_point} frozen blocks",
        unit="view",
        disable=not show_progress,
    )
    datasets.disable_progress_bars()
    try:
        with bar, ThreadPoolExecutor(1) as executor:
            for view, shard in pending:
                with atomic_write(directory / shard_name(view, shard)) as file:
                    base = _BaseShard(directory, plan, shard) if plan.views.needs_base(view) else None
                    writer = ShardWriter(file, plan, view, shard, executor, base)
                    index = _map_shard(
                        writer, rendered, prefix, batch_size, prefix_inputs, is_input, scratch, bar, report
                    )
                    writer.finish()
                with atomic_write(directory / part_name(view, shard)) as file:
                    index.to_parquet(file)
                report.built_shards += 1
    finally:
        if bars_enabled:
            datasets.enable_progress_bars()
    shutil.rmtree(scratch, ignore_errors=True)
    index_json = _index(directory, plan)
    save_index(directory, index_json)
    fsync_directory(directory.parent)
    report.total_bytes = index_json.total_bytes


def _map_shard(
    writer: ShardWriter,
    rendered: Iterator[tuple[list[ViewKey], dict[str, Any]]],
    prefix: Callable[..., Tensor],
    batch_size: int,
    prefix_inputs: frozenset[str],
    is_input: Callable[[str], bool],
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
        extras = {name: value for name, value in batch.items() if not is_input(name)}
        inputs = {name: value for name, value in batch.items() if is_input(name) or name in prefix_inputs}
        rendered_at = time.perf_counter()
        hidden_states = prefix(**inputs).detach().to("cpu")
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
