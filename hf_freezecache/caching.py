"""The cache of a stage: what it depends on, and finding it, or calibrating a codec and building it."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from .cache.fingerprint import Fingerprint, hash_config, hash_dataset, hash_object, hash_tensors
from .cache.format import CODEC_NAME, FORMAT_VERSION, INDEX_NAME
from .cache.layout import ChunkLayout
from .cache.reader import CacheReader
from .cache.state import CodecState, load_state, save_state
from .cache.writer import BuildReport, CachePlan, build_cache, explain_miss
from .calibration import Calibration, FidelityMeter, calibrate, fit_codec, rate_at
from .codecs import Codec, Pipeline, Transform, make_codec
from .config import CacheConfig
from .dataset import PACKED, CachedDataset, collate_cached, split_packed
from .errors import CacheCorruptError, CacheMismatchError, UnsupportedSetupError
from .splitting import Split, token_grid
from .views import ViewDataset, ViewKey, preserved_random_state

__all__ = ["Data", "StageCache", "requested_codec"]

logger = logging.getLogger(__name__)

#: Runs a function of tensors on the training device, in eval mode, without gradients, under the run's autocast.
Runner = Callable[..., Any]
#: A promoted cache may be this much larger than one made from the images, which takes longer.
_PROMOTED_BITS = 1.1


def requested_codec(config: CacheConfig, split_point: int, num_blocks: int) -> tuple[Codec, float | None, float | None]:
    """Return the codec that a user asks for at a split point, its fidelity budget, and its rate in bits per element.

    Raises:
        UnsupportedSetupError: No such codec, or the compression schedule cannot be read.
    """
    codec = make_codec("transform" if config.codec == "auto" else config.codec or "lossless")
    if config.gradient_weight and isinstance(codec, Pipeline):
        codec = Pipeline(
            tuple(
                dataclasses.replace(step, gradient_weight=config.gradient_weight)
                if isinstance(step, Transform) and not step.tensors()
                else step
                for step in codec.steps
            )
        )
    rate = None if config.compression is None else rate_at(config.compression, split_point, num_blocks)
    steps = codec.steps if isinstance(codec, Pipeline) else ()
    if rate is not None and not any(isinstance(step, Transform) for step in steps):
        raise UnsupportedSetupError(
            f"compression={config.compression!r} needs a codec with 'transform', whose step can be chosen; codec="
            f"{config.codec!r} has none."
        )
    return codec, config.fidelity if config.codec == "auto" else None, rate


@dataclass
class Data:
    """The training data as a cache sees them.

    Attributes:
        dataset: What the user passed.
        transforms: The user's ``train_transform`` and ``eval_transform``, if any.
        views: Renders them.
        collate: The user's collator, checked.
        raw_collator: The user's collator, for hashing.
        layout: Which sample goes into which chunk.
        view_seed: Seed of the views.
        image_shape: (channels, height, width).
        prefix_inputs: Parts of a batch beside ``pixel_values`` that the prefix takes.
        batch_spec: Names, dtypes and shapes of a batch, for the fingerprint.
        classes: Whether labels are exclusive classes.
    """

    dataset: Any
    transforms: tuple[Any, Any]
    views: ViewDataset
    collate: Callable[[list[Any]], dict[str, Any]]
    raw_collator: Any
    layout: ChunkLayout
    view_seed: int
    image_shape: tuple[int, int, int] = (0, 0, 0)
    prefix_inputs: frozenset[str] = frozenset()
    batch_spec: str = ""
    classes: bool = True

    def hashes(self, config: CacheConfig) -> dict[str, str]:
        """Return what data and code depend on, by names that a user knows; reads the whole data set.

        Raises:
            UnsupportedSetupError: Data, transform or collator cannot be hashed.
        """
        formatted = self.dataset.format if isinstance(self.dataset, datasets.Dataset) else None
        transform = config.transform_id
        if transform is None:
            transform = hash_object((*self.transforms, formatted), "training transform")
        return {
            "dataset": config.dataset_id or hash_dataset(self.dataset),
            "transform": transform,
            "data collator": config.transform_id or hash_object(self.raw_collator, "data collator"),
        }


@dataclass
class _Sample:
    """Exact states of the calibration images.

    Attributes:
        keys: Which images, in which view.
        states: (samples, tokens, hidden), on the CPU.
        extras: Further inputs of the model, (samples, ...).
    """

    keys: list[ViewKey]
    states: Tensor
    extras: dict[str, Tensor]

    @property
    def middle(self) -> int:
        """Where the images to fit on end, and those to measure on begin."""
        return len(self.keys) // 2


@dataclass
class StageCache:
    """Finds, or calibrates and builds, the cache of one stage after the other.

    Attributes:
        config: What the user asks for.
        data: The training data.
        run: Runs a function on the training device.
        mixed_precision: The run's autocast: ``"no"``, ``"bf16"`` or ``"fp16"``.
        batch_size: Images per prefix call.
        num_workers: Processes that render.
        show_progress: Whether to show progress bars.
        split_points: Of all stages of the run.
        previous: The cache of the stage before, once there is one.
    """

    config: CacheConfig
    data: Data
    run: Runner
    mixed_precision: str
    batch_size: int
    num_workers: int
    show_progress: bool
    split_points: tuple[int, ...]
    previous: CacheReader | None = None
    _hashes: dict[str, str] = field(default_factory=dict)

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
        tensors = {**split.prefix_parameters(), **split.prefix_buffers()}
        return Fingerprint(
            {
                "format version": str(FORMAT_VERSION),
                **self._hashes,
                "batch": self.data.batch_spec,
                "image size": "x".join(map(str, self.data.image_shape)),
                "model": f"{type(split.model).__name__} {hash_config(getattr(split.model, 'config', None))}",
                "prefix weights": hash_tensors(tensors),
                "split point": str(split.split_point),
                "number of views": str(config.num_views),
                "view seed": str(self.data.view_seed),
                "dtype": f"{self.mixed_precision} autocast, {'/'.join(dtypes)} weights",
                "codec": self._codec_request(split),
                "chunk layout": f"{layout.chunk_size} samples, {config.shard_chunks} chunks",
            }
        )

    def _codec_request(self, split: Split) -> str:
        """Return what the codec is to be, not what calibration made of it: that depends on the head, which may differ."""
        codec, budget, rate = requested_codec(self.config, split.split_point, split.num_blocks)
        request: dict[str, Any] = codec.to_dict()
        if not codec.lossless:
            request |= {"fidelity": budget, "rate": rate, "calibration samples": self.config.calibration_samples}
            earlier = [point for point in self.split_points if 0 < point < split.split_point]
            if self.config.promote != "never" and earlier:
                # States may come from a lossy cache of an earlier stage.
                request["promote"] = [self.config.promote, self.config.fidelity, *earlier]
        return json.dumps(request, sort_keys=True)

    # ---- Finding and building ----

    def open(self, split: Split) -> tuple[CacheReader, BuildReport]:
        """Find the cache of a split point, or build it.

        Raises:
            CacheMismatchError: The cache that is there does not hold what its rows give now.
            FreezeCacheError: See ``build_cache``, ``calibrate`` and ``CacheReader``.
        """
        started = time.perf_counter()
        cache_dir, config = Path(self.config.cache_dir), self.config
        fingerprint = self.fingerprint(split)
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
        if (directory / INDEX_NAME).is_file():
            reader = CacheReader(directory, fingerprint)
            self._spot_check(split, reader)
            logger.info("Using the cache %s.", directory)
            self.previous = reader
            kept = reader.index.num_shards * config.num_views
            return reader, BuildReport(directory, reader.index.total_bytes, kept_shards=kept)
        if not directory.exists():
            miss = explain_miss(cache_dir, fingerprint) if cache_dir.is_dir() else None
            logger.warning("No cache fits, building %s%s", directory, f": {miss}." if miss else ".")
        else:
            logger.warning("Going on with the unfinished cache %s.", directory)
        source = self._promotable(split)
        if codec.lossless:
            source = source if source is not None and (source.codec.lossless or config.promote == "always") else None
        else:
            state, source = self._state(split, directory, fingerprint, source)
            plan = dataclasses.replace(plan, codec=state.codec, calibration=state.calibration)
        report = self._build(split, plan, source)
        report.seconds = time.perf_counter() - started
        reader = CacheReader(directory, fingerprint)
        logger.info(
            "Cached %d views in %.1f s (%.1f s %s, %.1f s in the prefix): %.1f MiB, %.2f bits per element, in %s.",
            len(self.data.views) * config.num_views,
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

    def _build(self, split: Split, plan: CachePlan, source: CacheReader | None) -> BuildReport:
        def is_input(name: str) -> bool:
            return name == "pixel_values" or name.startswith(PACKED)

        def promote(**inputs: Tensor) -> Tensor:
            assert source is not None
            packed, extras = split_packed(inputs)
            return self._promoted(split, source, packed, extras)

        return build_cache(
            Path(self.config.cache_dir),
            plan,
            self.data.views if source is None else CachedDataset(source, packed=True),
            self.data.collate if source is None else collate_cached,
            (lambda **inputs: self.run(split.prefix, **inputs)) if source is None else promote,
            batch_size=self.batch_size,
            num_workers=self.num_workers if source is None else 0,
            prefix_inputs=self.data.prefix_inputs,
            is_input=is_input,
            show_progress=self.show_progress,
        )

    def _promoted(
        self, split: Split, source: CacheReader, packed: dict[str, Tensor], extras: dict[str, Tensor]
    ) -> Tensor:
        """Return the states at a split point from those of an earlier cache, through the blocks between."""
        earlier = Split(split.model, source.index.split_point)
        earlier.image_shape = self.data.image_shape

        def advance(packed: dict[str, Tensor], **extras: Tensor) -> Tensor:
            # In full precision whatever the autocast: what follows is stored.
            states = source.codec.restore(packed, source.dtype)
            return earlier.between(states, split.split_point, **extras)

        return self.run(advance, packed=packed, **extras)  # type: ignore[no-any-return]

    def _promotable(self, split: Split) -> CacheReader | None:
        """Return the cache of the stage before, if later states can be computed from it."""
        previous = self.previous
        if previous is None or self.config.promote == "never":
            return None
        if not 0 < previous.index.split_point < split.split_point or previous.index.num_views < self.config.num_views:
            return None
        stored = {spec.name for spec in previous.index.extras}
        return previous if self.data.prefix_inputs <= stored else None

    # ---- Calibration ----

    def _state(
        self, split: Split, directory: Path, fingerprint: Fingerprint, source: CacheReader | None
    ) -> tuple[CodecState, CacheReader | None]:
        """Return codec and source of an unfinished cache, or choose them, and write them down before any shard."""
        path = directory / CODEC_NAME
        if path.is_file():
            try:
                state = load_state(path, fingerprint.digest)
                promoted = state.calibration.get("source", "images") != "images"
                if not promoted or source is not None:
                    return state, source if promoted else None
            except CacheCorruptError as error:
                logger.warning("Calibrating again: %s", error)
        with preserved_random_state():
            state, source = self._choose(split, source)
        directory.mkdir(parents=True, exist_ok=True)
        save_state(path, fingerprint.digest, state)
        return state, source

    def _keys(self) -> list[ViewKey]:
        """Return the calibration images: a random sample of rows, views in turn."""
        count = min(self.config.calibration_samples, len(self.data.views))
        rows = np.random.default_rng([self.data.view_seed & (2**64 - 1), 0xCA]).permutation(len(self.data.views))
        return [(int(row), place % max(self.config.num_views, 1)) for place, row in enumerate(rows[:count])]

    def _batches(self, items: Sequence[Any]) -> Iterator[slice]:
        for start in range(0, len(items), self.batch_size):
            yield slice(start, start + self.batch_size)

    def _sample(self, split: Split) -> _Sample:
        keys = self._keys()
        states: list[Tensor] = []
        extras: list[dict[str, Tensor]] = []
        for part in self._batches(keys):
            batch = self.data.collate([self.data.views[key] for key in keys[part]])
            own = {name: batch[name] for name in sorted(batch.keys() & self.data.prefix_inputs)}
            states.append(self.run(split.prefix, pixel_values=batch["pixel_values"], **own).cpu())
            extras.append(own)
        return _Sample(keys, torch.cat(states), {name: torch.cat([e[name] for e in extras]) for name in extras[0]})

    def _choose(self, split: Split, source: CacheReader | None) -> tuple[CodecState, CacheReader | None]:
        started = time.perf_counter()
        config = self.config
        sample = self._sample(split)
        if len(sample.keys) < 4:
            raise UnsupportedSetupError(
                f"A lossy codec is calibrated on at least 4 rows, the data set has {len(sample.keys)}. Use codec='lossless'."
            )
        middle = sample.middle
        test_extras = {name: value[middle:] for name, value in sample.extras.items()}

        def outputs(states: Tensor) -> tuple[Tensor, Tensor]:
            found = [
                self.run(split.outputs, hidden_states=states[part], **{n: v[part] for n, v in test_extras.items()})
                for part in self._batches(range(len(states)))
            ]
            return torch.cat([f[0].cpu() for f in found]), torch.cat([f[1].cpu() for f in found])

        meter = FidelityMeter(sample.states[middle:], outputs, self.data.classes)
        requested, budget, rate = requested_codec(config, split.split_point, split.num_blocks)
        prefix_tokens, grid = token_grid(
            sample.states.shape[1], self.data.image_shape, getattr(split.model, "config", None)
        )
        gradients = self._gradients(split, sample, meter) if config.gradient_weight else None
        settings: dict[str, Any] = {"chunk_size": config.chunk_size, "budget": budget, "target_bits": rate}
        codec = fit_codec(requested, sample.states[:middle], prefix_tokens, grid, gradients)
        codec, report = calibrate(codec, meter, middle, **settings)
        used = None
        if source is not None:
            codec, report, used = self._compare(
                split, source, sample, meter, codec, report, (requested, prefix_tokens, grid, gradients), settings
            )
        logger.info(
            "Calibrated in %.1f s at split point %d: %s",
            time.perf_counter() - started,
            split.split_point,
            _words(report),
        )
        return CodecState(codec, report.to_dict()), used

    def _compare(
        self,
        split: Split,
        source: CacheReader,
        sample: _Sample,
        meter: FidelityMeter,
        codec: Codec,
        report: Calibration,
        fit: tuple[Codec, int, tuple[int, int], Tensor | None],
        settings: dict[str, Any],
    ) -> tuple[Codec, Calibration, CacheReader | None]:
        """Measure promotion from an earlier cache against the images; return codec, report and source of the better."""
        name = f"cache of split point {source.index.split_point}"
        dataset, middle = CachedDataset(source, packed=True), sample.middle
        parts = []
        for part in self._batches(sample.keys):
            packed, _ = split_packed(collate_cached(dataset.__getitems__(sample.keys[part])))
            own = {extra: value[part] for extra, value in sample.extras.items()}
            parts.append(self._promoted(split, source, packed, own).cpu())
        promoted = torch.cat(parts)
        alone, _ = meter(promoted[middle:])
        limit = self.config.fidelity
        sources = {
            "images": {"fidelity": report.fidelity, "relative_error": report.relative_error},
            name: {"fidelity": alone, "relative_error": meter.relative_error(promoted[middle:])},
        }
        take = None
        if alone <= limit or self.config.promote == "always":
            requested, prefix_tokens, grid, gradients = fit
            fitted = fit_codec(requested, promoted[:middle], prefix_tokens, grid, gradients)
            if self.config.promote == "always" and alone > limit and settings["budget"] is not None:
                # No step can undo what the earlier cache lost: spend as much again.
                settings = {**settings, "budget": 2 * alone}
            other, other_report = calibrate(fitted, meter, middle, states=promoted[middle:], **settings)
            sources[name] = {"fidelity": other_report.fidelity, "relative_error": other_report.relative_error}
            cheap = other_report.fidelity <= limit and (
                other_report.bits_per_element <= _PROMOTED_BITS * report.bits_per_element
            )
            if cheap or self.config.promote == "always":
                take = (other, dataclasses.replace(other_report, source=name))
        for which, errors in sources.items():
            logger.info("States from the %s: fidelity %.3g, relative error %.3g.", which, *errors.values())
        if take is None:
            logger.info("Promotion from the %s is not within a fidelity of %g: going from the images.", name, limit)
            return codec, dataclasses.replace(report, sources=sources), None
        return take[0], dataclasses.replace(take[1], sources=sources), source

    def _gradients(self, split: Split, sample: _Sample, meter: FidelityMeter) -> Tensor:
        """Return how the output moves with the states of the images to fit on.

        For logits: gradients of the log-likelihood of labels drawn from the model's own prediction, whose second moment is
        the Fisher information. For features: gradients of a random projection of the standardised features.
        """
        generator = torch.Generator().manual_seed(self.data.view_seed & (2**63 - 1))

        def gradient(hidden_states: Tensor, **extras: Tensor) -> Tensor:
            with torch.enable_grad():
                states = hidden_states.detach().clone().requires_grad_(True)
                logits, features = split.outputs(states, **extras)
                if meter.uses_logits:
                    scores = logits.float().log_softmax(-1)
                    labels = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator)
                    total = scores.gather(1, labels.to(scores.device)).sum()
                else:
                    scale = features.detach().float().std(0).clamp_min(1e-6)
                    signs = torch.randint(0, 2, features.shape, generator=generator).to(features.device) * 2.0 - 1.0
                    total = (features.float() / scale * signs).sum()
                return torch.autograd.grad(total, states)[0]

        middle = sample.middle
        parts = []
        for part in self._batches(range(middle)):
            place = slice(part.start, min(part.stop, middle))
            extras = {name: value[place] for name, value in sample.extras.items()}
            parts.append(self.run(gradient, hidden_states=sample.states[place], **extras).cpu())
        return torch.cat(parts)

    # ---- Checking ----

    def _spot_check(self, split: Split, reader: CacheReader, num_samples: int = 4) -> None:
        """Compute a few samples of a cache again: the fingerprint cannot see all code that data pass through."""
        dataset = CachedDataset(reader)
        # Spread over the rows, the same ones for every process.
        rows = sorted({row * (len(dataset) - 1) // max(num_samples - 1, 1) for row in range(num_samples)})
        keys = [(row, position % reader.index.num_views) for position, row in enumerate(rows)]
        with preserved_random_state():
            batch = self.data.collate([self.data.views[key] for key in keys])
            inputs = {name: batch[name] for name in batch.keys() & {"pixel_values", *self.data.prefix_inputs}}
            exact = self.run(split.prefix, **inputs).to("cpu").float()
        stored = collate_cached(dataset.__getitems__(keys))
        difference = exact - stored["hidden_states"].float()
        # bf16 rounds to 8 bits, and other batch shapes and kernels round otherwise.
        tolerance = 0.05 if self.mixed_precision in ("bf16", "fp16") else 1e-3
        if reader.codec.lossless:
            found, limit = float(difference.abs().max()), tolerance * float(exact.abs().max())
        else:
            # Single images may fare worse than the average that calibration measured.
            limit = 4 * float((reader.index.calibration or {}).get("relative_error", 1.0)) + tolerance
            found = float((difference.square().mean((1, 2)) / exact.square().mean((1, 2))).sqrt().max())
        extras = [name for name in stored if name != "hidden_states" and not torch.equal(stored[name], batch[name])]
        if not found <= limit or extras:
            raise CacheMismatchError(
                f"Cache {reader.directory} has the right fingerprint but not what rows {rows} give now (hidden states "
                f"differ by {found:.3g}, at most {limit:.3g} expected; differing extras: {extras or 'none'}). "
                "Code of the transform, the data set or the model has changed. Use another cache_dir, or delete the "
                "folder to rebuild."
            )


def _words(report: Calibration) -> str:
    return (
        f"{report.bits_per_element:.2f} bits per element, fidelity {report.fidelity:.3g} ({report.measure}"
        f"{'' if report.budget is None else f', budget {report.budget:g}'}), agreement {report.agreement:.1%}, relative error "
        f"{report.relative_error:.3f}, from the {report.source}, on {report.num_test} images (fitted on {report.num_fit} "
        f"others, {report.trials} settings tried)"
    )
