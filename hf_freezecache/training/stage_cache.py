"""The cache of a stage, in separate steps: identify it, find it, plan it, build it, check it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..cache.commit import explain_miss, find_finished
from ..cache.consume import consumer
from ..cache.fingerprint import Fingerprint
from ..cache.index import CONSUMED_NAME, FORMAT_VERSION, INDEX_NAME, Selection
from ..cache.lock import SINGLE_PROCESS, build_lock, os_errors_as_cache_errors
from ..cache.reader import CacheReader
from ..cache.shard_writer import CachePlan, cache_name
from ..cache.writer import BuildReport, build_cache
from ..codecs.array_names import is_packed
from ..compression.base_view import CodecChooser, check_rows, promoted, requested_codec
from ..config import CacheConfig
from ..data.collators import CheckedCollator, collate_cached, split_packed
from ..data.geometry import GEOMETRY_NAME
from ..dataset import CachedDataset
from ..distributed.process_group import ProcessGroup
from ..errors import FreezeCacheError
from ..model.hashing import hash_config, hash_prefix
from ..model.split import Split
from ..model.threads import one_thread_if_small
from .cache_check import keep_measured, measure_distortion, spot_check
from .stage_codecs import choose_codecs, codec_request, copies_request, kept_codecs, name_of_source

__all__ = ["OpenedCache", "StageCache"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedCache:
    """The cache of a stage, ready to train on, and how it came about.

    Attributes:
        reader: Reads it.
        report: What finding or building it cost.
        built_from: Split point of the cache that it was computed from; 0 if it was computed from the images; ``None`` for a
            cache that was there.
        calibrated: Whether its codec was chosen by measurement in this call.
        built_ahead: Split points of caches for later stages that this call built on the way.
        built_blocks: Blocks that each view has passed through for all that this call built; less where it is not of all rows.
        distortion: What its states cost with this run's suffix; empty if lossless. See ``measure_distortion``.
    """

    reader: CacheReader
    report: BuildReport
    built_from: int | None = None
    calibrated: bool = False
    built_ahead: tuple[int, ...] = ()
    built_blocks: float = 0
    distortion: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class _Planned:
    """What is to be built: the plan with its codecs, where states come from, and whether codecs were just chosen."""

    plan: CachePlan
    source: CacheReader | None
    calibrated: bool = False


@dataclass
class StageCache:
    """Finds, or plans and builds, the cache of one stage after the other. Most methods are collective.

    Attributes:
        config: The user's settings of caches.
        chooser: Measures codecs; it holds the training data, the splits, and what runs the prefix.
        mixed_precision: The run's autocast: ``"no"``, ``"bf16"`` or ``"fp16"``.
        num_workers: Processes that render images.
        show_progress: Whether to show progress bars.
        split_points: Split points of all stages of the run, as far as they are known.
        process_group: Processes that share the folder of caches.
        current: The cache that was opened last, if any.
    """

    config: CacheConfig
    chooser: CodecChooser
    mixed_precision: str
    num_workers: int
    show_progress: bool
    split_points: tuple[int, ...]
    process_group: ProcessGroup = SINGLE_PROCESS
    current: CacheReader | None = None
    _dataset_hash: str = ""
    _cache_dir: Path = field(init=False)

    def __post_init__(self) -> None:
        """Settle the folder of caches: code of users may change the working folder during the run."""
        self._cache_dir = Path(self.config.freezecache_dir).absolute()

    def check_settings(self) -> None:
        """Refuse now what would stop a later stage.

        Raises:
            UnsupportedSetupError: Data or code cannot be hashed, or there are too few rows for a lossy codec.
        """
        self.process_group.on_main_process(self._hashes)
        lossless = requested_codec(self.config, max(self.split_points))[0].lossless
        if not lossless or self.config.copies_apart:
            check_rows(self.chooser.at(max(self.split_points)).data.layout.num_samples, self.chooser.head_rows)

    def _hashes(self) -> dict[str, str]:
        """Hash code as it is now, and data once: reading a large data set takes a while."""
        data, config = self.chooser.data, self.config
        self._dataset_hash = self._dataset_hash or data.dataset_hash(config)
        return {"dataset": self._dataset_hash, **data.code.hashes(config)}

    # ---- Identify ----

    def identify(self, split: Split) -> Fingerprint:
        """Return what the cache of a split point depends on, in a user's words.

        Raises:
            UnsupportedSetupError: Data or code cannot be hashed.
        """
        config, data = self.config, self.chooser.at(split.split_point).data
        dtypes = sorted({str(p.dtype) for p in split.prefix_parameters().values()})
        return Fingerprint(
            {
                "format version": str(FORMAT_VERSION),
                **self._hashes(),
                "batch": data.batch_spec,
                "image size": "x".join(map(str, data.image_shape)),
                "model": hash_config(getattr(split.model, "config", None)),
                "prefix weights": hash_prefix(split),
                "split point": str(split.split_point),
                "number of views": str(config.num_views),
                "view seed": str(data.view_seed),
                "dtype": f"{self.mixed_precision} autocast, {'/'.join(dtypes)} weights",
                "codec": codec_request(config, split, self.split_points),
                **copies_request(config),
                "chunk layout": f"{data.layout.chunk_size} samples, {config.shard_chunks} chunks",
                **({} if (rows := data.layout.rows) is None else {"rows": "{} to {} of {}, permuted".format(*rows)}),
            }
        )

    # ---- Find ----

    def open(self, split: Split, ahead: Sequence[Split] = ()) -> OpenedCache:
        """Find the cache of a split point, or plan and build it. Collective.

        The main process decides for all: the fingerprint, whether the cache is there, its codec and its source.

        Args:
            split: The model, split where the frozen blocks of the stage end.
            ahead: Lower split points, in rising order, of later stages that find the blocks before them as they are now. If
                there is no cache yet, theirs are built first: where a cache can be computed from the one before, the images pass
                through each block once for all of them.

        Raises:
            CacheMismatchError: The cache that is there does not hold what its rows give now.
            FreezeCacheError: See ``build_cache``, ``calibrate`` and ``CacheReader``.
        """
        started = time.perf_counter()
        fingerprint, opened = self.open_finished(split)
        if opened is None:
            if self.process_group.is_main_process:
                self._announce(self._cache_dir / cache_name(split.split_point, fingerprint), fingerprint)
            earlier = [self.open(lower) for lower in ahead]
            opened = self.build(split, self.plan(split, fingerprint), started)
            built = [one for one in earlier if one.built_from is not None]
            opened = replace(
                opened,
                built_ahead=tuple(one.reader.index.split_point for one in built),
                built_blocks=sum(one.built_blocks for one in (*built, opened)),
            )
        opened.report.seconds = time.perf_counter() - started
        self.current = opened.reader
        return opened

    def open_finished(self, split: Split) -> tuple[Fingerprint, OpenedCache | None]:
        """Return the fingerprint of the cache of a split point, and the cache, checked, if it is there. Collective.

        Raises:
            CacheMismatchError: It does not hold what its rows give now.
            CacheCorruptError: It is damaged.
            UnsupportedSetupError: Data or code cannot be hashed.
        """
        fingerprint = Fingerprint(self.process_group.on_main_process(lambda: self.identify(split).components))
        expected = self.process_group.on_main_process(lambda: self.locate(split, fingerprint))
        if expected is None:
            return fingerprint, None
        directory = self._cache_dir / cache_name(split.split_point, expected)
        selection = Selection() if expected == fingerprint else Selection.of(views=range(self.config.num_views))
        reader = self._reader(directory, expected, selection=selection)
        distortion = self.process_group.on_main_process(lambda: self.check(split, reader))
        logger.info("Using the cache %s.", directory)
        shards = reader.index.num_shards * self.config.num_views
        report = BuildReport(directory, reader.index.total_bytes, kept_shards=shards)
        return fingerprint, OpenedCache(reader, report, distortion=distortion)

    def locate(self, split: Split, fingerprint: Fingerprint) -> Fingerprint | None:
        """Return the fingerprint of a finished cache that will do, by now; see ``find_finished``."""
        config = self.config
        # A lossy codec is fitted to all views; and what another run has stored beyond this one's views is not to be consumed.
        same = requested_codec(config, split.split_point)[0].lossless and not config.copies_apart
        more_views = self.chooser.data.hashes_of_more(config) if same and not config.consume_previous_cache else None
        return find_finished(self._cache_dir, split.split_point, fingerprint, config.num_views, more_views)

    def _reader(self, directory: Path, fingerprint: Fingerprint, **settings: Any) -> CacheReader:
        with self.process_group.fail_together():
            return CacheReader(directory, fingerprint, **settings)

    @staticmethod
    def _announce(directory: Path, fingerprint: Fingerprint) -> None:
        if directory.exists():
            logger.warning("Going on with the unfinished cache %s.", directory)
            return
        miss = explain_miss(directory.parent, fingerprint) if directory.parent.is_dir() else None
        logger.warning("No cache fits, building %s%s", directory, f": {miss}." if miss else ".")

    # ---- Check ----

    def check(self, split: Split, reader: CacheReader) -> dict[str, float | None]:
        """Compare a cache with what its rows give now, and measure it with today's suffix.

        Raises:
            CacheMismatchError: It does not hold what its rows give now.
        """
        with one_thread_if_small(split.model):
            spot_check(self.chooser, split, reader, self.mixed_precision)
        return measure_distortion(self.chooser.at(split.split_point), split, reader)

    # ---- Plan ----

    def plan(self, split: Split, fingerprint: Fingerprint) -> _Planned:
        """Decide what is stored, by which codecs, and where its hidden states come from. Collective.

        Codecs are written down before any shard: shards are of no use without the codec they were encoded with.

        Raises:
            UnsupportedSetupError: The states cannot be encoded as asked.
        """
        config, chooser = self.config, self.chooser.at(split.split_point)
        codec, _, _ = requested_codec(config, split.split_point)
        plan = CachePlan(
            fingerprint,
            split.split_point,
            chooser.data.image_shape,
            config.num_views,
            chooser.data.layout,
            config.shard_chunks,
            codec,
        )
        source = self._source(split, fingerprint)
        if codec.lossless and not config.copies_apart:
            return _Planned(plan, source)
        directory = self._cache_dir / plan.name

        def choose() -> tuple[CachePlan, bool, bool]:
            with os_errors_as_cache_errors(directory):
                kept = kept_codecs(config, plan, directory, source)
                if kept is not None:
                    return *kept, False
                return *choose_codecs(chooser, split, plan, directory, source), True

        with build_lock(self._cache_dir, plan, self.process_group, config.lock_timeout):
            plan, takes_source, calibrated = self.process_group.on_main_process(choose)
        return _Planned(plan, source if takes_source else None, calibrated)

    def _source(self, split: Split, fingerprint: Fingerprint) -> CacheReader | None:
        """Return the cache of an earlier split point, if later states can be computed from it. Collective."""
        config = self.config
        if config.build_from == "images":
            return None
        earlier = self.current if self._is_below(split) else self._earlier(split)
        if earlier is None:
            return None
        stored = {spec.name for spec in earlier.index.extras}
        needed = self.chooser.data.prefix_inputs | ({GEOMETRY_NAME} if config.copies_apart else set())
        suffices = earlier.index.num_views >= config.num_views and needed <= stored
        # A callback may have changed the transform since.
        named, more = Fingerprint(earlier.index.fingerprint), self.chooser.data.hashes_of_more(config)
        return earlier if suffices and fingerprint.is_rendered_alike(named, more) else None

    def _is_below(self, split: Split) -> bool:
        """Whether the cache that was opened last lies before a split point, behind blocks that are as they were. Collective."""
        if self.current is None or not 0 < (point := self.current.index.split_point) < split.split_point:
            return False
        weights = self.process_group.on_main_process(lambda: hash_prefix(self.chooser.splits.at(point)))
        return bool(weights == self.current.index.fingerprint["prefix weights"])

    def _earlier(self, split: Split) -> CacheReader | None:
        """Find the cache of the stage before, which a run that was resumed has not opened. Collective."""
        points = [point for point in self.split_points if 0 < point < split.split_point]
        if not points:
            return None
        earlier = self.chooser.splits.at(max(points))

        def locate() -> tuple[dict[str, str], Path, dict[str, Any]] | None:
            fingerprint = self.identify(earlier)
            fingerprint = self.locate(earlier, fingerprint) or fingerprint
            directory = self._cache_dir / cache_name(earlier.split_point, fingerprint)
            settings: dict[str, Any] = {}
            if not (directory / INDEX_NAME).is_file():
                if not self.config.consume_previous_cache or not (directory / CONSUMED_NAME).is_file():
                    return None
                settings = {"index_name": CONSUMED_NAME, "check_files": False}
            try:
                spot_check(self.chooser, earlier, CacheReader(directory, fingerprint, **settings), self.mixed_precision)
            except FreezeCacheError as error:
                logger.warning("Passing over the cache of an earlier stage: %s", error)
                return None
            return fingerprint.components, directory, settings

        location = self.process_group.on_main_process(locate)
        return None if location is None else self._reader(location[1], Fingerprint(location[0]), **location[2])

    # ---- Build ----

    def build(self, split: Split, planned: _Planned, started: float) -> OpenedCache:
        """Build a planned cache, or the rest of it, and open it. Collective.

        Args:
            split: The model, split where the cache is to be made.
            planned: What ``plan`` gave.
            started: When this began, by ``time.perf_counter``.

        Raises:
            FreezeCacheError: See ``build_cache``.
        """
        plan, source = planned.plan, planned.source
        report = self._write(split, plan, source)
        report.seconds = time.perf_counter() - started
        reader = self._reader(report.directory, plan.fingerprint)
        (logger.info if self.process_group.is_main_process else logger.debug)(
            "Cached %d views in %.1f s (%.1f s %s, %.1f s in the prefix): %.1f MiB, %.2f bits per element, in %s.",
            plan.layout.num_samples * plan.num_views,
            report.seconds,
            report.render_seconds,
            "rendering" if source is None else f"reading the {name_of_source(source)}",
            report.prefix_seconds,
            report.total_bytes / 2**20,
            reader.index.bits_per_element,
            report.directory,
        )
        reports = {"": plan.calibration or {}, "copy_": plan.copies_calibration or {}}
        distortion = {
            prefix + name: calibration[name]
            for prefix, calibration in reports.items()
            for name in ("distortion", "agreement", "relative_error")
            if name in calibration
        }
        self.process_group.on_main_process(lambda: keep_measured(self.chooser, split, reader, distortion))
        built_from = 0 if source is None else source.index.split_point
        blocks = (split.split_point - built_from) * plan.layout.num_samples / self.chooser.data.layout.num_samples
        return OpenedCache(reader, report, built_from, planned.calibrated, (), blocks, distortion)

    def _write(self, split: Split, plan: CachePlan, source: CacheReader | None) -> BuildReport:
        """Compute and write all shards that are missing."""
        chooser, data = self.chooser, self.chooser.data
        views: Any = data.views
        collate = data.collate
        prefix: Callable[..., Tensor] = lambda **inputs: chooser.run(split.prefix, **inputs)  # noqa: E731
        if source is not None:
            earlier = chooser.splits.at(source.index.split_point)
            views = CachedDataset(source, packed=True, geometry=self.config.copies_apart)
            collate = CheckedCollator(collate_cached)

            def prefix(**inputs: Tensor) -> Tensor:
                packed, extras = split_packed(inputs)
                return promoted(chooser.run, earlier, split.split_point, source, packed, extras)

        elif self.config.copies_apart:
            # Also where views are stored directly: a later stage may be computed from these, and predict.
            views, collate = views.with_geometry(), collate.with_geometry()
        consume = None
        if source is not None and self.config.consume_previous_cache and plan.layout == source.layout:
            later = self.split_points[self.split_points.index(split.split_point) + 1 :]
            if source.index.split_point not in later:
                self.current = None  # half of it may be gone if this build fails
                consume = consumer(source, self.process_group)
        return build_cache(
            self._cache_dir,
            plan,
            views,
            collate,
            prefix,
            batch_size=chooser.batch_size,
            num_workers=self.num_workers if source is None else 0,
            prefix_inputs=data.prefix_inputs,
            is_input=lambda name: name == "pixel_values" or is_packed(name),
            show_progress=self.show_progress,
            process_group=self.process_group,
            lock_timeout=self.config.lock_timeout,
            consume=consume,
        )
