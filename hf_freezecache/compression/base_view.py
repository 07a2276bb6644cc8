"""Chooses the codec of a stage, and where its states come from, by measuring on calibration images."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache.codec_state import CodecState
from ..cache.reader import CacheReader
from ..codecs import (
    Codec,
    make_codec,
)
from ..config import CacheConfig
from ..data.collators import collate_cached, split_packed
from ..data.geometry import GEOMETRY_NAME
from ..data.training_data import TrainingData
from ..data.views import ViewDataset, ViewKey
from ..dataset import CachedDataset
from ..errors import UnsupportedSetupError
from ..model.split import Split, Splits
from ..model.tokens import token_grid
from .distortion import DistortionMeter
from .step_search import Calibration, calibrate, fit_codec, rate_at

__all__ = ["CodecChooser", "Runner", "Sample", "check_rows", "promoted", "requested_codec"]

logger = logging.getLogger(__name__)

#: Runs a function of tensors on the training device, in eval mode, without gradients, under the run's autocast.
Runner = Callable[..., Any]
#: A promoted cache may be this much larger than one made from the images, which takes longer.
_PROMOTED_BITS = 1.1


def requested_codec(config: CacheConfig, split_point: int) -> tuple[Codec, float | None, float | None]:
    """Return the codec that a user asks for at a split point, its distortion budget, and its rate in bits per element.

    At most one of budget and rate is a number. Of a codec with fixed steps, neither is.

    Raises:
        UnsupportedSetupError: There is no such codec, ``bits_per_element`` cannot be read, or the codec has no step to choose.
    """
    codec = make_codec("transform" if config.codec == "auto" else config.codec or "lossless")
    if config.gradient_weight:
        codec = codec.with_gradient_weight(config.gradient_weight)
    if config.bits_per_element is None:
        return codec, config.max_distortion if config.codec == "auto" else None, None
    if not codec.has_step_size:
        raise UnsupportedSetupError(
            f"bits_per_element={config.bits_per_element!r} needs a codec with 'transform', whose step can be chosen; codec="
            f"{config.codec!r} has none. Set codec='auto' or 'transform', or remove bits_per_element."
        )
    return codec, None, rate_at(str(config.bits_per_element), split_point)


def check_rows(count: int, head_rows: float = 1.0) -> None:
    """Refuse data sets on which no lossy codec can be calibrated.

    Args:
        count: Rows that there are.
        head_rows: Share of all rows that they may be.

    Raises:
        UnsupportedSetupError: Fewer than 4 rows.
    """
    if count < 4:
        leaves, more = (
            (f"head_rows={head_rows:g} leaves", "Raise it, or use") if head_rows < 1 else ("the data set has", "Use")
        )
        raise UnsupportedSetupError(
            f"A lossy codec is calibrated on at least 4 rows, {leaves} {count}. {more} codec='lossless'."
        )


@dataclass
class Sample:
    """Exact states of the calibration images.

    Attributes:
        keys: Which images, in which view.
        states: (samples, tokens, hidden), on the CPU.
        extras: Further inputs of the model, (samples, ...).
        geometry: Where each view lies in its image, (samples, 5).
    """

    keys: list[ViewKey]
    states: Tensor
    extras: dict[str, Tensor]
    geometry: Tensor

    @property
    def middle(self) -> int:
        """Where the images to fit on end, and those to measure on begin."""
        return len(self.keys) // 2


def promoted(
    run: Runner, earlier: Split, stop: int, source: CacheReader, packed: dict[str, Tensor], extras: dict[str, Tensor]
) -> Tensor:
    """Return the states at a later split point from those of an earlier cache, through the blocks between.

    Args:
        run: Runs a function on the training device.
        earlier: The model, split where the earlier cache was made.
        stop: The later split point.
        source: The earlier cache.
        packed: A packed batch of it, for ``ViewCodec.dequantize``.
        extras: Further inputs of the model.

    Returns:
        (batch, tokens, hidden), on the training device.
    """

    def advance(packed: dict[str, Tensor], **extras: Tensor) -> Tensor:
        # In full precision whatever the autocast: what follows is stored.
        with torch.autocast(next(iter(packed.values())).device.type, enabled=False):
            states = source.views.dequantize(packed, source.dtype)
        return earlier.run_blocks(states, stop, **extras)

    return run(advance, packed=packed, **extras)  # type: ignore[no-any-return]


@dataclass
class CodecChooser:
    """Chooses codec and source of a stage.

    Attributes:
        config: What the user asks for.
        data: The training data.
        splits: The splits of the model.
        run: Runs a function on the training device.
        batch_size: Images per prefix call.
        head_rows: Share of the rows that a cache behind all blocks holds.
    """

    config: CacheConfig
    data: TrainingData
    splits: Splits
    run: Runner
    batch_size: int
    head_rows: float = 1.0
    _samples: tuple[Split, dict[bool, Sample]] | None = None

    def asked_share(self, split_point: int) -> float:
        """Return the share of the rows that stages behind a split point are to train on."""
        return self.head_rows if split_point == self.splits.num_blocks else 1.0

    def at(self, split_point: int) -> CodecChooser:
        """Return what chooses for a split point, of whose cache the layout may be a part of the data's."""
        part = self.data.layout.part(self.asked_share(split_point))
        return self if part is self.data.layout else replace(self, data=replace(self.data, layout=part))

    def rows_shares(self, split_point: int) -> tuple[float, float]:
        """Return the share of the rows that stages behind a split point train on: as it is asked for, and as whole chunks make it."""
        shown = self.at(split_point).data.layout.num_samples
        return self.asked_share(split_point), shown / self.data.layout.num_samples

    def choose(self, split: Split, source: CacheReader | None) -> tuple[CodecState[Codec], CacheReader | None]:
        """Fit and calibrate a lossy codec at a split point, and decide between the images and an earlier cache.

        Args:
            split: The split.
            source: An earlier cache from which the states could be computed; ``None`` if there is none.

        Returns:
            Codec and report; and ``source`` if it is to be used.

        Raises:
            UnsupportedSetupError: Too few rows, or the states cannot be encoded as asked.
        """
        started = time.perf_counter()
        config = self.config
        check_rows(self.data.layout.num_samples)
        sample = self.calibration_sample(split)
        middle = sample.middle
        meter = self.meter(split, sample, middle)
        requested, budget, rate = requested_codec(config, split.split_point)
        prefix_tokens, grid = self.token_grid(split, sample)
        gradients = self.gradients(split, sample, meter) if requested.needs_gradients else None
        settings: dict[str, Any] = {"chunk_size": config.chunk_size, "budget": budget, "target_bits": rate}
        codec = fit_codec(requested, sample.states[:middle], prefix_tokens, grid, gradients)
        num_fit = middle if codec is not requested else 0
        codec, report = calibrate(codec, meter, num_fit, **settings)
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

    def keys(self, *, copies: bool = False) -> list[ViewKey]:
        """Return the calibration images: a random sample of rows, in the views of one codec in turn.

        Args:
            copies: Whether the views are those beyond the first, if these have a codec of their own.
        """
        layout = self.data.layout
        count = min(self.config.calibration_samples, layout.num_samples)
        rows = np.random.default_rng([self.data.view_seed & (2**64 - 1), 0xCA]).permutation(layout.total_samples)
        rows = rows[layout.position[rows] >= 0]
        views = range(max(self.config.num_views, 1))
        if self.config.copies_apart:
            views = views[1:] if copies else views[:1]
        return [(int(row), views[place % len(views)]) for place, row in enumerate(rows[:count])]

    def calibration_sample(self, split: Split, *, copies: bool = False) -> Sample:
        """Return the exact states of ``keys(copies=copies)``; computed once per split."""
        if self._samples is None or self._samples[0] is not split:
            self._samples = (split, {})
        found = self._samples[1]
        if copies not in found:
            found[copies] = self.sample(split, self.keys(copies=copies))
        return found[copies]

    def forget_samples(self) -> None:
        """Let go of the exact states of calibration images, which may take gigabytes."""
        self._samples = None

    def token_grid(self, split: Split, sample: Sample) -> tuple[int, tuple[int, int]]:
        """Return the number of prefix tokens, and (height, width) of the patches."""
        return token_grid(sample.states.shape[1], self.data.image_shape, getattr(split.model, "config", None))

    def promoted(self, split: Split, source: CacheReader, sample: Sample) -> Tensor:
        """Return the states of a sample as they come from an earlier cache, (samples, tokens, hidden), on the CPU."""
        earlier = self.splits.at(source.index.split_point)
        dataset, parts = CachedDataset(source, packed=True), []
        for part in self._batches(sample.keys):
            packed, _ = split_packed(collate_cached(dataset.__getitems__(sample.keys[part])))
            own = {extra: value[part] for extra, value in sample.extras.items()}
            parts.append(promoted(self.run, earlier, split.split_point, source, packed, own).cpu())
        return torch.cat(parts)

    def _batches(self, items: Sequence[Any]) -> Iterator[slice]:
        for start in range(0, len(items), self.batch_size):
            yield slice(start, start + self.batch_size)

    def outputs(self, split: Split, states: Tensor, extras: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what the suffix makes of states: (outputs, features), (samples, ...), on the CPU.

        Args:
            split: The model, split where the states are.
            states: (samples, tokens, hidden).
            extras: Further inputs of the model, (samples, ...).
        """
        found = [
            self.run(split.logits_and_features, hidden_states=states[part], **{n: v[part] for n, v in extras.items()})
            for part in self._batches(range(len(states)))
        ]
        return torch.cat([f[0].cpu() for f in found]), torch.cat([f[1].cpu() for f in found])

    def meter(self, split: Split, sample: Sample, start: int) -> DistortionMeter:
        """Return the meter of the images of a sample from ``start`` on."""
        extras = {name: value[start:] for name, value in sample.extras.items()}
        run = partial(self.outputs, split, extras=extras)
        return DistortionMeter(sample.states[start:], run, self.data.has_classes)

    def sample(self, split: Split, keys: list[ViewKey], views: ViewDataset | None = None) -> Sample:
        """Compute the exact states of images; of ``views``, if given, in place of the data's own."""
        rendered = (self.data.views if views is None else views).with_geometry()
        collate = self.data.collate.with_geometry()
        states: list[Tensor] = []
        extras: list[dict[str, Tensor]] = []
        geometry: list[Tensor] = []
        for part in self._batches(keys):
            batch = collate([rendered[key] for key in keys[part]])
            own = {name: batch[name] for name in sorted(batch.keys() & self.data.prefix_inputs)}
            states.append(self.run(split.prefix, pixel_values=batch["pixel_values"], **own).cpu())
            extras.append(own)
            geometry.append(batch[GEOMETRY_NAME])
        joined = {name: torch.cat([e[name] for e in extras]) for name in extras[0]}
        return Sample(keys, torch.cat(states), joined, torch.cat(geometry))

    def _compare(
        self,
        split: Split,
        source: CacheReader,
        sample: Sample,
        meter: DistortionMeter,
        codec: Codec,
        report: Calibration,
        fit: tuple[Codec, int, tuple[int, int], Tensor | None],
        settings: dict[str, Any],
    ) -> tuple[Codec, Calibration, CacheReader | None]:
        """Measure promotion from an earlier cache against the images; return codec, report and source of the better."""
        name = f"cache of split point {source.index.split_point}"
        middle, states = sample.middle, self.promoted(split, source, sample)
        alone, _ = meter(states[middle:])
        limit = self.config.max_distortion
        sources = {
            "images": {"distortion": report.distortion, "relative_error": report.relative_error},
            name: {"distortion": alone, "relative_error": meter.relative_error(states[middle:])},
        }
        take, budget = None, settings["budget"]
        if alone <= limit or self.config.build_from == "previous_cache":
            requested, prefix_tokens, grid, gradients = fit
            fitted = fit_codec(requested, states[:middle], prefix_tokens, grid, gradients)
            if self.config.build_from == "previous_cache" and budget is not None:
                # No step can undo what the earlier cache lost: spend as much again.
                settings = {**settings, "budget": max(budget, 2 * alone)}
            other, other_report = calibrate(
                fitted, meter, report.num_fit, states=states[middle:], fallback=False, **settings
            )
            sources[name] = {"distortion": other_report.distortion, "relative_error": other_report.relative_error}
            cheap = other_report.distortion <= limit and (
                other_report.bits_per_element <= _PROMOTED_BITS * report.bits_per_element
            )
            if cheap or self.config.build_from == "previous_cache":
                take = (other, dataclasses.replace(other_report, source=name, budget=budget))
            if take is not None and other_report.distortion > limit:
                logger.warning(
                    "build_from='previous_cache': states from the %s have a distortion of %.3g, over the budget of %g.",
                    name,
                    other_report.distortion,
                    limit,
                )
        for which, errors in sources.items():
            logger.info("States from the %s: distortion %.3g, relative error %.3g.", which, *errors.values())
        if take is None:
            logger.info("The %s is not both within a distortion of %g and small: going from the images.", name, limit)
            return codec, dataclasses.replace(report, sources=sources), None
        return take[0], dataclasses.replace(take[1], sources=sources), source

    def gradients(self, split: Split, sample: Sample, meter: DistortionMeter) -> Tensor:
        """Return how the output moves with the states of the images to fit on.

        For logits: gradients of the log-likelihood of labels drawn from the model's own prediction, whose second moment is
        the Fisher information. For features: gradients of a random projection of the standardised features.
        """
        generator = torch.Generator().manual_seed(self.data.view_seed & (2**63 - 1))

        def gradient(hidden_states: Tensor, **extras: Tensor) -> Tensor:
            with torch.enable_grad():
                states = hidden_states.detach().clone().requires_grad_(True)
                logits, features = split.logits_and_features(states, **extras)
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


def _words(report: Calibration) -> str:
    return (
        f"{report.bits_per_element:.2f} bits per element, distortion {report.distortion:.3g} ({report.measure}"
        f"{'' if report.budget is None else f', budget {report.budget:g}'}), "
        f"{'' if report.agreement is None else f'agreement {report.agreement:.1%}, '}relative error "
        f"{report.relative_error:.3f}, from the {report.source}, on {report.num_test} images (fitted on {report.num_fit} "
        f"others, {report.trials} settings tried)"
    )
