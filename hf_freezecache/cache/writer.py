"""Builds caches: renders views, runs the prefix, encodes chunks and writes shards, through ``datasets.map``."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor
from tqdm.auto import tqdm

from ..data.collators import CheckedCollator
from ..data.seeding import preserved_random_state
from ..distributed.process_group import ProcessGroup
from ..errors import UnsupportedSetupError
from .commit import (
    SCRATCH,
    Build,
    BuildReport,
    Unit,
)
from .encoder import Encoder
from .index import (
    atomic_write,
    load_index,
    shard_name,
    table_name,
)
from .lock import (
    SINGLE_PROCESS,
    build_lock,
    os_errors_as_cache_errors,
)
from .rendering import Batch, Together, ViewRenderer
from .shard_writer import (
    BaseShard,
    CachePlan,
    FreshBase,
    ShardWriter,
)

__all__ = ["BuildReport", "build_cache", "build_caches"]


def is_image(name: str) -> bool:
    """Say whether an entry of a batch is only for the prefix, and not stored beside the hidden states."""
    return name == "pixel_values"


def build_cache(
    cache_dir: Path,
    plan: CachePlan,
    views: Any,
    collate: CheckedCollator,
    prefix: Callable[..., Tensor],
    **settings: Any,
) -> BuildReport:
    """Build one cache; see ``build_caches``.

    Args:
        cache_dir: Folder of caches; this one is ``cache_dir / plan.name``.
        plan: What to store.
        views: As for ``build_caches``.
        collate: As for ``build_caches``.
        prefix: (**inputs) -> hidden states (batch, tokens, hidden), without gradients, on any device.
        settings: The keyword arguments of ``build_caches``.
    """

    def prefixes(**inputs: Any) -> dict[int, Tensor]:
        return {plan.split_point: prefix(**inputs)}

    return build_caches(cache_dir, [plan], views, collate, prefixes, **settings)[0]


def build_caches(
    cache_dir: Path,
    plans: Sequence[CachePlan],
    views: Any,
    collate: CheckedCollator,
    prefixes: Callable[..., Mapping[int, Tensor]],
    *,
    batch_size: int,
    num_workers: int = 0,
    prefix_inputs: frozenset[str] = frozenset(),
    is_input: Callable[[str], bool] = is_image,
    show_progress: bool = False,
    process_group: ProcessGroup = SINGLE_PROCESS,
    lock_timeout: float = 0.0,
    consume: Callable[[int], None] | None = None,
) -> list[BuildReport]:
    """Build caches of one data set in one pass, or what is missing of them, and commit each. Collective.

    Each image is read and decoded once for all its views, if ``ViewDataset.reads_once``: shards of one number are then written
    at once. Each batch goes through the prefix once, whatever the number of split points. Every cache is a directory with its
    own lock, index and commit, and is byte for byte what a build of this cache alone gives.

    Finished caches are left alone. Finished shards are kept, whatever ends a build; the next call builds what is missing.
    Memory does not grow with the number of samples, but holds a rendered batch of each view (see ``ViewRenderer``).

    Each process builds a run of the shards. Batches never reach over the end of a shard, so what is written does not depend
    on the number of processes: byte for byte where each computes with as many threads, to the rounding of the prefix
    otherwise.

    Args:
        cache_dir: Folder of caches; they are ``cache_dir / plan.name``.
        plans: What to store. All plans must have the same samples, views, chunks and shards.
        views: Renders the views; or any data set with items by ``(sample index, view)``, such as an earlier cache.
        collate: The user's collator, checked: list of rendered examples -> dict with ``pixel_values`` (batch, channels, height,
            width) and tensors (batch, ...) that are stored beside the hidden states.
        prefixes: (**inputs) -> hidden states (batch, tokens, hidden) by split point, without gradients, on any device. Its
            inputs are the entries of a batch that ``is_input`` or ``prefix_inputs`` name.
        batch_size: Images per prefix call.
        num_workers: Processes that render ahead of the device; 0 renders in this one.
        prefix_inputs: Names of the extras that the prefix takes as arguments, and that are stored as well.
        is_input: Says by name what is only for the prefix, and not stored. Default: ``pixel_values``.
        show_progress: Show a progress bar over all views and samples.
        process_group: Processes that build together.
        lock_timeout: Seconds to wait for another run that builds one of these caches.
        consume: Called with the number of each shard once all its views are durable in all caches; for making room. Shards
            are then built in all views before the next begins.

    Returns:
        One report per plan.

    Raises:
        CacheLockedError: Another live process is building one of these caches.
        CacheWriteError: A folder cannot be written, or the disk is full.
        DataError: A row cannot be rendered, or its hidden states are not finite or of another shape.
        UnsupportedSetupError: The plans cannot be built in one pass.
    """
    started = time.perf_counter()
    _check_plans(plans)
    builds = [Build(plan, BuildReport(cache_dir / plan.name)) for plan in plans]
    with ExitStack() as stack:
        # All runs take the locks in one order, so that no two wait for each other.
        for plan in sorted(plans, key=lambda plan: plan.name):
            stack.enter_context(build_lock(cache_dir, plan, process_group, lock_timeout))
        stack.enter_context(preserved_random_state())
        one_pass = _Pass(
            builds,
            views,
            collate,
            prefixes,
            batch_size,
            num_workers,
            prefix_inputs,
            is_input,
            show_progress,
            process_group,
            consume,
        )
        one_pass.run()
    for build in builds:
        build.report.seconds = time.perf_counter() - started
    return [build.report for build in builds]


def _check_plans(plans: Sequence[CachePlan]) -> None:
    """Refuse plans whose batches, shards or extras would differ.

    Raises:
        UnsupportedSetupError: They cannot be built in one pass.
    """
    shared = {(plan.image_shape, plan.num_views, plan.layout, plan.shard_chunks, plan.num_tokens) for plan in plans}
    if len(shared) != 1 or len({plan.name for plan in plans}) != len(plans):
        raise UnsupportedSetupError(
            f"Caches {[plan.name for plan in plans]} cannot be built in one pass: they must be different caches of one data "
            "set with one image shape, number of views, chunk size, shard size and number of tokens. Build them one by one."
        )


@dataclass
class _Pass:
    """One pass over a data set; see ``build_caches`` for its attributes."""

    builds: list[Build]
    views: Any
    collate: CheckedCollator
    prefixes: Callable[..., Mapping[int, Tensor]]
    batch_size: int
    num_workers: int
    prefix_inputs: frozenset[str]
    is_input: Callable[[str], bool]
    show_progress: bool
    process_group: ProcessGroup
    consume: Callable[[int], None] | None
    renderer: ViewRenderer = field(init=False)
    encoders: list[Encoder] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Prepare rendering."""
        self.renderer = ViewRenderer(self.views, self.collate, self.plan, self.batch_size, self.num_workers)

    @property
    def plan(self) -> CachePlan:
        """Any plan: its samples, views, chunks and shards are those of all plans."""
        return self.builds[0].plan

    def run(self) -> None:
        """Build and commit all caches that are not finished. Collective."""
        process_group, plan = self.process_group, self.plan
        units = [(view, shard) for view in range(plan.num_views) for shard in range(plan.num_shards)]
        begun = process_group.on_main_process(lambda: [build.begin() for build in self.builds])
        finished = [build for build, unfinished in zip(self.builds, begun, strict=True) if not unfinished]
        for build in finished:
            build.report.kept_shards = len(units)
        sizes = process_group.on_main_process(lambda: [load_index(build.directory).total_bytes for build in finished])
        for build, size in zip(finished, sizes, strict=True):
            build.report.total_bytes = size
        self.builds = [build for build, unfinished in zip(self.builds, begun, strict=True) if unfinished]
        if not self.builds:
            return
        for build in self.builds:
            build.find_missing(units, process_group)
        pending = {unit for build in self.builds for unit in build.missing}
        # Any of the directories will do for all errors of the file system: they share a disk.
        directory = self.builds[0].directory
        if self.consume is not None:
            with process_group.fail_together(), os_errors_as_cache_errors(directory):
                finished_shards = set(range(plan.num_shards)) - {shard for _, shard in pending}
                for shard in process_group.split_between(sorted(finished_shards)):
                    self.consume(shard)
        for share in self._shares(pending):
            with process_group.fail_together(), os_errors_as_cache_errors(directory):
                self._build_units(share)
        for build in self.builds:
            build.report.built_shards = sum(process_group.gather(build.report.built_shards))
            build.commit(units, process_group)

    def _shares(self, pending: set[Unit]) -> list[list[Unit]]:
        """Return what this process builds, one list after the other: runs of sample indices.

        Where the views of a row share what was read of it, they follow each other, shard by shard.

        Views that are predicted need the base view's shard: one process builds each shard in all views, or, with fewer shards
        than processes, all processes finish the base views first. Where shards of an earlier cache are deleted, one process
        builds each shard in all views, one shard after the other.
        """
        process_group, at_once = self.process_group, self.renderer.views_at_once > 1
        by_shard = sorted(pending, key=lambda unit: unit[::-1])
        shards = sorted({shard for _, shard in pending})
        predicts = self.plan.num_views > 1 and any(build.plan.views.needs_base(1) for build in self.builds)
        if self.consume is not None or (at_once and predicts and len(shards) >= process_group.size):
            mine = set(process_group.split_between(shards))
            return [[unit for unit in by_shard if unit[1] in mine]]
        phases = [by_shard if at_once else sorted(pending)]
        if predicts:
            phases = [[unit for unit in phases[0] if (unit[0] == 0) == base] for base in (True, False)]
        return [process_group.split_between(phase) for phase in phases]

    def _build_units(self, units: Sequence[Unit]) -> None:
        """Write this process's shards, one after the other; those that share their rows at once."""
        groups = self.renderer.together(units)
        rendered = self.renderer.render(groups)
        last_views = {shard: view for view, shard in sorted(units)}
        bars_enabled = datasets.are_progress_bars_disabled() is False
        bar = self._progress_bar(units)
        datasets.disable_progress_bars()
        try:
            with bar, ExitStack() as stack:
                self.encoders = [stack.enter_context(closing(Encoder())) for _ in self.builds]
                for shard, views in groups:
                    self._build_group((shard, views), rendered, bar)
                    if self.consume is not None and last_views[shard] in views:
                        self.consume(shard)
        finally:
            if bars_enabled:
                datasets.enable_progress_bars()

    def _progress_bar(self, units: Sequence[Unit]) -> Any:
        process_group, plan = self.process_group, self.plan
        left = sum(len(plan.rows(shard)) for _, shard in units)
        total = left if process_group.size > 1 else plan.layout.num_samples * plan.num_views
        split_points = " and ".join(str(build.plan.split_point) for build in self.builds)
        return tqdm(
            total=total,
            initial=total - left,
            desc=f"Caching {split_points} frozen blocks"
            + (f" (process 1 of {process_group.size})" if process_group.size > 1 else ""),
            unit="view",
            disable=not self.show_progress or not process_group.is_main_process,
        )

    def _build_group(self, group: Together, rendered: Iterator[list[Batch]], bar: Any) -> None:
        """Write shards of one number, and their index tables, in every cache that lacks them."""
        shard, views = group
        with ExitStack() as stack:
            # A view that is finished stays, whatever comes of the others.
            files = {view: stack.enter_context(ExitStack()) for view in views}
            writers: dict[int, list[ShardWriter]] = {view: [] for view in views}
            for build, encoder in zip(self.builds, self.encoders, strict=True):
                missing = [view for view in views if (view, shard) in build.missing]
                predicted = [view for view in missing if build.plan.views.needs_base(view)]
                fresh = FreshBase(build.plan.codec, len(predicted)) if 0 in missing and predicted else None
                for view in missing:
                    file = files[view].enter_context(atomic_write(build.directory / shard_name(view, shard)))
                    writer = ShardWriter(file, build.plan, view, shard, encoder)
                    if view in predicted:
                        writer.base = fresh or BaseShard(build.directory, build.plan, shard)
                    elif view == 0:
                        writer.fresh = fresh
                    writers[view].append(writer)
            for view, table in zip(views, self._map_group(shard, writers, rendered, bar), strict=True):
                for writer in writers[view]:
                    writer.finish()
                files[view].close()
                # The table comes last: with it, the shard counts as finished.
                for build in self.builds:
                    if (view, shard) in build.missing:
                        with atomic_write(build.directory / table_name(view, shard)) as file:
                            table.to_parquet(file)
                        build.report.built_shards += 1

    def _map_group(
        self, shard: int, writers: Mapping[int, Sequence[ShardWriter]], rendered: Iterator[list[Batch]], bar: Any
    ) -> Iterator[Any]:
        """Rewrite the rows of shards of one number into hidden states; yield the rows of each view's index table.

        The first table comes when all views are computed: batch by batch, one view after the other.
        """
        plan = self.plan
        chunk_size, first_chunk = plan.layout.chunk_size, shard * plan.shard_chunks
        columns: dict[int, deque[dict[str, Any]]] = {view: deque() for view in writers}

        def cache_rows(rows: dict[str, list[int]], positions: list[int], view: int) -> dict[str, Any]:
            if not columns[view]:
                for each, stored in self._cache_batches(rows["sample_index"], writers, rendered, bar).items():
                    columns[each].append(stored)
            places: dict[str, Any] = {
                "sample_index": rows["sample_index"],
                "view": [view] * len(positions),
                "shard": [shard] * len(positions),
                "chunk": [first_chunk + position // chunk_size for position in positions],
                "row": [position % chunk_size for position in positions],
            }
            return places | columns[view].popleft()

        # The map runs over indices, not over the user's data set: its transform must run once, under seeded states.
        indices = datasets.Dataset.from_dict({"sample_index": plan.rows(shard)})
        scratch = self.builds[0].directory / SCRATCH
        for place, view in enumerate(writers):
            name = f"view-{view:02d}-shard-{shard:05d}.arrow"
            yield indices.map(
                cache_rows,
                batched=True,
                with_indices=True,
                batch_size=self.batch_size,
                fn_kwargs={"view": view},
                load_from_cache_file=False,  # a hit would skip the writing of the shard
                # Views after the first have no work left: in memory, a disk that is full by now does not stop their tables.
                cache_file_name=None if place else str(scratch / name),
                keep_in_memory=place > 0,
                new_fingerprint=f"{plan.fingerprint.digest[:32]}-{view}-{shard}",
            )

    def _cache_batches(
        self,
        sample_indices: list[int],
        writers: Mapping[int, Sequence[ShardWriter]],
        rendered: Iterator[list[Batch]],
        bar: Any,
    ) -> dict[int, dict[str, list[Any]]]:
        """Write the next batch of each view; return the columns of the index tables that come from the collator, by view."""
        columns = {}
        started = time.perf_counter()
        batches = next(rendered)
        render_seconds = time.perf_counter() - started
        for view, (keys, batch) in zip(writers, batches, strict=True):
            if keys != [(sample_index, view) for sample_index in sample_indices]:
                raise AssertionError("rendered samples arrived out of order")
            started = time.perf_counter()
            states = self._hidden_states(batch, [writer.plan.split_point for writer in writers[view]])
            for build in self.builds:
                build.report.render_seconds += render_seconds
                build.report.prefix_seconds += time.perf_counter() - started
            render_seconds = 0.0
            extras = {name: value for name, value in batch.items() if not self.is_input(name)}
            for writer in writers[view]:
                writer.append(states[writer.plan.split_point], extras)
            bar.update(len(keys))
            columns[view] = {name: value.tolist() for name, value in extras.items() if value.dim() == 1}
        return columns

    def _hidden_states(self, batch: Mapping[str, Any], split_points: Sequence[int]) -> dict[int, Tensor]:
        """Return the hidden states of a batch by split point, (batch, tokens, hidden) on the CPU."""
        names = [name for name in batch if self.is_input(name) or name in self.prefix_inputs]
        states = self.prefixes(**{name: batch[name] for name in names})
        missing = sorted(set(split_points) - states.keys())
        if missing:
            raise UnsupportedSetupError(
                f"The prefix gave hidden states of split points {sorted(states)}, expected those of {missing} too."
            )
        for encoder in self.encoders:
            encoder.follow(next(iter(states.values())).device)
        return {point: states[point].detach().to("cpu") for point in set(split_points)}
