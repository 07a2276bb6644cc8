"""The cache of a stage: what it depends on, and finding it, or calibrating a codec and building it."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache.codec_state import (
    CodecState,
    load_copies,
    load_state,
    save_state,
)
from ..cache.commit import explain_miss
from ..cache.fingerprint import Fingerprint
from ..cache.index import CODEC_NAME, CONSUMED_NAME, COPIES_NAME, FORMAT_VERSION, INDEX_NAME, shard_name, table_name
from ..cache.lock import (
    SINGLE_PROCESS,
    build_lock,
    os_errors_as_cache_errors,
)
from ..cache.reader import CacheReader
from ..cache.shard_writer import (
    CachePlan,
    cache_name,
)
from ..cache.writer import (
    BuildReport,
    build_cache,
)
from ..codecs import Codec
from ..codecs.array_names import is_packed
from ..compression.base_view import CodecChooser, Runner, check_rows, promoted, requested_codec
from ..compression.extra_views import (
    choose_copies,
    keeps_copies,
)
from ..config import CacheConfig
from ..data.collators import collate_cached, split_packed
from ..data.geometry import GEOMETRY_NAME
from ..data.training_data import Data
from ..data.views import (
    GeometryCollator,
    GeometryViews,
    preserved_random_state,
)
from ..dataset import CachedDataset
from ..distributed.process_group import ProcessGroup
from ..errors import (
    CacheCorruptError,
    CacheMismatchError,
    FreezeCacheError,
)
from ..model.hashing import hash_config, hash_prefix
from ..model.split import Split

__all__ = ["StageCache"]

logger = logging.getLogger(__name__)


@dataclass
class StageCache:
    """Finds, or calibrates and builds, the cache of one stage after the other.

    Attributes:
        config: What the user asks for.
        data: The training data.
        run: Runs a function on the training device.
        mixed_precision: The run's autocast: ``"no"``, ``"bf16"`` or ``"fp16"``.
        batch_size: Images per prefix call.
        num_workers: ProcessGroup that render.
        show_progress: Whether to show progress bars.
        split_points: Of all stages of the run.
        processes: Those that share the folder of caches. ``check`` and ``open`` are collective.
        previous: The cache that was opened last, if any.
        measured: What its states cost: distortion, agreement, relative error; empty if lossless.
    """

    config: CacheConfig
    data: Data
    run: Runner
    mixed_precision: str
    batch_size: int
    num_workers: int
    show_progress: bool
    split_points: tuple[int, ...]
    processes: ProcessGroup = SINGLE_PROCESS
    previous: CacheReader | None = None
    measured: dict[str, float | None] = field(default_factory=dict)
    _hashes: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Find what would stop a later stage.

        Raises:
            UnsupportedSetupError: Data or code cannot be hashed, or there are too few rows for a lossy codec.
        """
        self.processes.on_main_process(self.hash_data)
        lossless = requested_codec(self.config, max(self.split_points), max(self.split_points))[0].lossless
        if not lossless or self.config.copies_apart:
            check_rows(self.data.layout.num_samples)

    def hash_data(self) -> None:
        """Hash data and code, once: reading a large data set takes a while.

        Raises:
            UnsupportedSetupError: They cannot be hashed.
        """
        self._hashes = self._hashes or self.data.hashes(self.config)

    # ---- Identity ----

    def fingerprint(self, split: Split) -> Fingerprint:
        """Return what the cache of a split point depends on, in a user's words."""
        config, layout = self.config, self.data.layout
        self.hash_data()
        dtypes = sorted({str(p.dtype) for p in split.prefix_parameters().values()})
        return Fingerprint(
            {
                "format version": str(FORMAT_VERSION),
                **self._hashes,
                "batch": self.data.batch_spec,
                "image size": "x".join(map(str, self.data.image_shape)),
                "model": f"{type(split.model).__name__} {hash_config(getattr(split.model, 'config', None))}",
                "prefix weights": hash_prefix(split),
                "split point": str(split.split_point),
                "number of views": str(config.num_views),
                "view seed": str(self.data.view_seed),
                "dtype": f"{self.mixed_precision} autocast, {'/'.join(dtypes)} weights",
                "codec": self._codec_request(split),
                **self._copies_request(),
                "chunk layout": f"{layout.chunk_size} samples, {config.shard_chunks} chunks",
                **({} if layout.part is None else {"rows": "{} to {} of {}, permuted".format(*layout.part)}),
            }
        )

    def _codec_request(self, split: Split) -> str:
        """Return what the codec is to be, not what calibration made of it: that depends on the head, which may differ."""
        codec, budget, rate = requested_codec(self.config, split.split_point, split.num_blocks)
        request: dict[str, Any] = codec.to_dict()
        if not codec.lossless:
            request |= {"distortion": budget, "rate": rate, "calibration samples": self.config.calibration_samples}
            earlier = [point for point in self.split_points if 0 < point < split.split_point]
            if self.config.build_from != "images" and earlier:
                # States may come from a lossy cache of an earlier stage.
                rates = [requested_codec(self.config, point, split.num_blocks)[2] for point in earlier]
                request["build from"] = [self.config.build_from, self.config.max_distortion, earlier, rates]
        return json.dumps(request, sort_keys=True)

    def _copies_request(self) -> dict[str, str]:
        """Return what views beyond the first are to be, if that is not what the first is."""
        config = self.config
        if not config.copies_apart:
            return {}
        request = {
            "copies": config.copies,
            "distortion": config.copy_distortion,
            "budget": config.copy_budget,
            "first view's distortion": config.max_distortion,
            "samples": config.calibration_samples,
            "build from": config.build_from,
            "weight": config.gradient_weight,
        }
        return {"copies": json.dumps(request, sort_keys=True)}

    # ---- Finding and building ----

    def open(self, split: Split) -> tuple[CacheReader, BuildReport]:
        """Find the cache of a split point, or build it. Collective.

        The leader decides for all: its fingerprint, whether the cache is there, and which codec and source it is to have.

        Raises:
            CacheMismatchError: The cache that is there does not hold what its rows give now.
            FreezeCacheError: See ``build_cache``, ``calibrate`` and ``CacheReader``.
        """
        started = time.perf_counter()
        cache_dir, config, processes = Path(self.config.cache_dir), self.config, self.processes
        fingerprint = Fingerprint(processes.on_main_process(lambda: self.fingerprint(split).parts))
        codec, _, _ = requested_codec(config, split.split_point, split.num_blocks)
        plan = CachePlan(
            fingerprint,
            split.split_point,
            self.data.image_shape,
            config.num_views,
            self.data.layout,
            config.shard_chunks,
            codec,
        )
        directory = cache_dir / plan.name
        if processes.broadcast((directory / INDEX_NAME).is_file()):
            reader = self._reader(directory, fingerprint)

            def check() -> dict[str, float | None]:
                self._spot_check(split, reader)
                return self._measure(split, reader)

            self.measured = processes.on_main_process(check)
            logger.info("Using the cache %s.", directory)
            self.previous = reader
            kept = reader.index.num_shards * config.num_views
            return reader, BuildReport(directory, reader.index.total_bytes, kept_shards=kept)
        if processes.is_main_process:
            self._announce(directory, fingerprint)
        source = self._promotable(split)
        self.measured = {}
        if not codec.lossless or config.copies_apart:
            plan, used = self._fitted(split, plan, source)
            source = source if used else None
            for prefix, found in (("", plan.calibration or {}), ("copy_", plan.copies_calibration or {})):
                names = ("distortion", "agreement", "relative_error")
                self.measured |= {prefix + name: found[name] for name in names if name in found}
        report = self._build(split, plan, source)
        report.seconds = time.perf_counter() - started
        reader = self._reader(directory, fingerprint)
        say = logger.info if processes.is_main_process else logger.debug
        say(
            "Cached %d views in %.1f s (%.1f s %s, %.1f s in the prefix): %.1f MiB, %.2f bits per element, in %s.",
            self.data.layout.num_samples * config.num_views,
            report.seconds,
            report.render_seconds,
            "rendering" if source is None else f"reading the cache of split point {source.index.split_point}",
            report.prefix_seconds,
            report.total_bytes / 2**20,
            reader.index.bits_per_element,
            directory,
        )
        self.previous = reader
        return reader, report

    def _reader(self, directory: Path, fingerprint: Fingerprint, **settings: Any) -> CacheReader:
        with self.processes.fail_together():
            return CacheReader(directory, fingerprint, **settings)

    @staticmethod
    def _announce(directory: Path, fingerprint: Fingerprint) -> None:
        if directory.exists():
            logger.warning("Going on with the unfinished cache %s.", directory)
            return
        miss = explain_miss(directory.parent, fingerprint) if directory.parent.is_dir() else None
        logger.warning("No cache fits, building %s%s", directory, f": {miss}." if miss else ".")

    def _build(self, split: Split, plan: CachePlan, source: CacheReader | None) -> BuildReport:
        def is_input(name: str) -> bool:
            return name == "pixel_values" or is_packed(name)

        def promote(**inputs: Tensor) -> Tensor:
            assert source is not None
            packed, extras = split_packed(inputs)
            return promoted(self.run, split, source, packed, extras)

        views: Any = self.data.views
        collate: Callable[[list[Any]], dict[str, Any]] = self.data.collate
        if source is not None:
            views, collate = CachedDataset(source, packed=True, geometry=self.config.copies_apart), collate_cached
        elif self.config.copies_apart:
            # Also where views are stored directly: a later stage may be computed from these, and predict.
            views, collate = GeometryViews(views), GeometryCollator(collate, GEOMETRY_NAME)
        consume = None if source is None or not self.config.consume_previous_cache else self._consumer(source)
        return build_cache(
            Path(self.config.cache_dir),
            plan,
            views,
            collate,
            (lambda **inputs: self.run(split.prefix, **inputs)) if source is None else promote,
            batch_size=self.batch_size,
            num_workers=self.num_workers if source is None else 0,
            prefix_inputs=self.data.prefix_inputs,
            is_input=is_input,
            show_progress=self.show_progress,
            processes=self.processes,
            lock_timeout=self.config.lock_timeout,
            consume=consume,
        )

    def _consumer(self, source: CacheReader) -> Callable[[int], None]:
        """Return what removes a shard of an earlier cache, in all views, once the later one has it.

        The earlier cache is unfinished from here on: what needs it again builds its missing shards anew.
        """
        directory = Path(source.directory)
        # Half of it may be gone if this build fails.
        self.previous = None

        def retire() -> None:
            with os_errors_as_cache_errors(directory):
                if (directory / INDEX_NAME).is_file():
                    logger.warning(
                        "consume_previous_cache=True: the cache %s gives way to the one that is computed from it.",
                        directory,
                    )
                    (directory / INDEX_NAME).replace(directory / CONSUMED_NAME)

        self.processes.on_main_process(retire)

        def consume(shard: int) -> None:
            for view in range(source.index.num_views):
                for name in (table_name(view, shard), shard_name(view, shard)):
                    (directory / name).unlink(missing_ok=True)

        return consume

    def _promotable(self, split: Split) -> CacheReader | None:
        """Return the cache of the stage before, if later states can be computed from it. Collective."""
        if self.config.build_from == "images":
            return None
        previous = self.previous or self._earlier(split)
        if previous is None or not 0 < previous.index.split_point < split.split_point:
            return None
        stored = {spec.name for spec in previous.index.extras}
        needed = self.data.prefix_inputs | ({GEOMETRY_NAME} if self.config.copies_apart else set())
        enough = previous.index.num_views >= self.config.num_views and needed <= stored
        return previous if enough else None

    def _earlier(self, split: Split) -> CacheReader | None:
        """Find the cache of the stage before, which a run that was resumed has not opened. Collective."""
        points = [point for point in self.split_points if 0 < point < split.split_point]
        if not points:
            return None
        earlier = Split(split.model, max(points))

        def find() -> tuple[dict[str, str], Path, dict[str, Any]] | None:
            fingerprint = self.fingerprint(earlier)
            directory = Path(self.config.cache_dir) / cache_name(earlier.split_point, fingerprint)
            settings: dict[str, Any] = {}
            if not (directory / INDEX_NAME).is_file():
                if not self.config.consume_previous_cache or not (directory / CONSUMED_NAME).is_file():
                    return None
                settings = {"index_name": CONSUMED_NAME, "check_files": False}
            try:
                self._spot_check(earlier, CacheReader(directory, fingerprint, **settings))
            except FreezeCacheError as error:
                logger.warning("Passing over the cache of an earlier stage: %s", error)
                return None
            return fingerprint.parts, directory, settings

        found = self.processes.on_main_process(find)
        return None if found is None else self._reader(found[1], Fingerprint(found[0]), **found[2])

    def _chooser(self) -> CodecChooser:
        return CodecChooser(self.config, self.data, self.run, self.batch_size)

    def _fitted(self, split: Split, plan: CachePlan, source: CacheReader | None) -> tuple[CachePlan, bool]:
        """Return plan, with codecs, and whether to take the source, of an unfinished cache; or choose, and write it down.

        Collective. Before any shard: shards are of no use without the codec they were encoded with.
        """
        cache_dir = Path(self.config.cache_dir)
        directory = cache_dir / plan.name

        def fit() -> tuple[CachePlan, bool]:
            with os_errors_as_cache_errors(directory):
                found = self._unfinished(plan, directory, source)
                return self._choose(split, plan, directory, source) if found is None else found

        with build_lock(cache_dir, plan, self.processes, self.config.lock_timeout):
            return self.processes.on_main_process(fit)

    def _choose(
        self, split: Split, plan: CachePlan, directory: Path, source: CacheReader | None
    ) -> tuple[CachePlan, bool]:
        with preserved_random_state():
            chooser = self._chooser()
            apart = self.config.copies_apart
            if apart and source is not None and self.config.build_from == "auto":
                source = source if keeps_copies(chooser, split, source) else None
            if plan.codec.lossless:
                state: CodecState[Codec] = CodecState(plan.codec, {})
            else:
                state, source = chooser.choose(split, source)
                plan = dataclasses.replace(plan, codec=state.codec, calibration=state.calibration)
            if apart:
                copies = choose_copies(chooser, split, state, source)
                plan = dataclasses.replace(plan, copies=copies.codec, copies_calibration=copies.calibration)
                save_state(directory / COPIES_NAME, plan.fingerprint.digest, copies)
        if not plan.codec.lossless or plan.calibration is not None:
            # Last: what it finds of itself, the next start takes for complete.
            save_state(directory / CODEC_NAME, plan.fingerprint.digest, state)
        return plan, source is not None

    def _unfinished(
        self, plan: CachePlan, directory: Path, source: CacheReader | None
    ) -> tuple[CachePlan, bool] | None:
        """Return what ``_fitted`` does, from the codecs that a killed build has written down, if all of them are there."""
        digest, origins = plan.fingerprint.digest, set()
        wanted = [COPIES_NAME] if self.config.copies_apart else []
        wanted += [] if plan.codec.lossless else [CODEC_NAME]
        if not all((directory / name).is_file() for name in wanted):
            return None
        try:
            if CODEC_NAME in wanted:
                state = load_state(directory / CODEC_NAME, digest)
                plan = dataclasses.replace(plan, codec=state.codec, calibration=state.calibration)
                origins.add(state.calibration.get("source", "images"))
            if COPIES_NAME in wanted:
                copies = load_copies(directory / COPIES_NAME, digest)
                plan = dataclasses.replace(plan, copies=copies.codec, copies_calibration=copies.calibration)
                origins.add(copies.calibration.get("source", "images"))
        except CacheCorruptError as error:
            logger.warning("Calibrating again: %s", error)
            return None
        if origins == {"images"}:
            return plan, False
        if source is not None and origins == {f"cache of split point {source.index.split_point}"}:
            return plan, True
        logger.warning("Beginning anew: the source of this cache (%s) is gone.", ", ".join(sorted(map(str, origins))))
        return None

    # ---- Checking ----

    def _measure(self, split: Split, reader: CacheReader) -> dict[str, float | None]:
        """Measure a lossy cache with today's suffix: it may have been calibrated with another head."""
        reports = {"": reader.index.calibration, "copy_": reader.index.copies_calibration}
        if not any(reports.values()):
            return {}
        with preserved_random_state():
            measured = self._chooser().measure(split, reader)
        for prefix, report in reports.items():
            if not report:
                continue
            distortion, budget = measured[prefix + "distortion"], report.get("budget")
            what = "views beyond the first" if prefix else "its states"
            logger.info(
                "With this run's suffix the distortion of %s is %.3g, relative error %.3f.",
                what,
                distortion,
                measured[prefix + "relative_error"],
            )
            if budget is not None and distortion is not None and distortion > 1.5 * budget:
                logger.warning(
                    "The cache %s was calibrated with another suffix (distortion of %s %.3g): with this one it is %.3g, over the "
                    "budget of %g. Delete the folder to build a finer one.",
                    reader.directory,
                    what,
                    report["distortion"],
                    distortion,
                    budget,
                )
        return measured

    def _spot_check(self, split: Split, reader: CacheReader, num_samples: int = 4) -> None:
        """Compute a few samples of a cache again: the fingerprint cannot see all code that data pass through."""
        dataset = CachedDataset(reader)
        # Spread over the rows, the same ones for every process.
        there = reader.available_rows()
        if not len(there):
            return
        rows = sorted({int(there[place * (len(there) - 1) // max(num_samples - 1, 1)]) for place in range(num_samples)})
        keys = [(row, position % reader.index.num_views) for position, row in enumerate(rows)]
        with preserved_random_state():
            batch = self.data.collate([self.data.views[key] for key in keys])
            inputs = {name: batch[name] for name in batch.keys() & {"pixel_values", *self.data.prefix_inputs}}
            exact = self.run(split.prefix, **inputs).to("cpu").float()
        stored = collate_cached(dataset.__getitems__(keys))
        difference = exact - stored["hidden_states"].float()
        # bf16 rounds to 8 bits, and other batch shapes and kernels round otherwise.
        tolerance = 0.05 if self.mixed_precision in ("bf16", "fp16") else 1e-3
        if reader.views.lossless:
            found, limit = float(difference.abs().max()), tolerance * float(exact.abs().max())
        else:
            # Other images may fare somewhat worse than those that calibration measured.
            copies = reader.index.copies_calibration
            reports = [reader.index.calibration if view == 0 or copies is None else copies for _, view in keys]
            limits = torch.tensor(
                [1.5 * float((report or {}).get("worst_error", 0.0)) + tolerance for report in reports]
            )
            errors = (difference.square().mean((1, 2)) / exact.square().mean((1, 2))).sqrt()
            worst = int((errors / limits).argmax())
            found, limit = float(errors[worst]), float(limits[worst])
        extras = [name for name in stored if name != "hidden_states" and not torch.equal(stored[name], batch[name])]
        if not found <= limit or extras:
            raise CacheMismatchError(
                f"Cache {reader.directory} has the right fingerprint but not what rows {rows} give now (hidden states "
                f"differ by {found:.3g}, at most {limit:.3g} expected; differing extras: {extras or 'none'}). "
                "Code of the transform, the data set or the model has changed. Use another cache_dir, or delete the "
                "folder to rebuild."
            )
