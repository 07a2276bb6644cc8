"""Chooses how views beyond the first are stored: directly, or as what their base view does not predict of them."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache.codec_state import CodecState
from ..cache.reader import CacheReader
from ..codecs import Codec, CopyCodec, Pack, Predictor, Select, Transform, Zstd, make_codec
from ..config import CacheConfig
from ..model.split import Split
from .base_view import CodecChooser, requested_codec
from .distortion import DistortionMeter
from .step_search import Calibration, calibrate, fit_codec, roundtrip

__all__ = ["choose_copies", "keeps_copies"]

logger = logging.getLogger(__name__)

#: Pull towards the identity, and whether channels mix, of the predictors that are tried. Measured on DeiT-Tiny: least squares
#: over all channels needs the fewest bits at split points 3 and 6; half the way to the identity does at 9 and 11.
_PREDICTORS = ((0.0, True), (0.5, True), (0.5, False))
#: Shares of channels and tokens that a search for a hard selection tries; the last is found to 1/64.
_SHARE_TRIALS = 6
#: Share of the first view's bits that the others take together by default: calibration measures on a sample.
_TOGETHER = 0.97
#: Bytes stored beside each view of a row: geometry, sample index, labels, and its row of the index. Measured: 62 with 200 rows
#: in one shard, fewer with more.
_ROW_BYTES = 62
#: Step size of a hard selection over that of the direct codec: rounding then spends a quarter of what the budget allows for.
_SELECTED_STEP_SIZE = 0.5


@dataclass(frozen=True)
class _Views:
    """Samples that the codec of copies is chosen on: the first half to fit, the second to measure.

    Attributes:
        base: Base views as they are decoded, (samples, tokens, hidden).
        states: The other views as the cache will encode them, (samples, tokens, hidden): computed from the images, or from an
            earlier cache.
        geometry: Geometries of base view and view, (samples, 2, 5).
    """

    base: Tensor
    states: Tensor
    geometry: Tensor

    @property
    def middle(self) -> int:
        return len(self.base) // 2


@dataclass(frozen=True)
class _Choice:
    storage: str
    codec: CopyCodec
    report: Calibration


def keeps_copies(chooser: CodecChooser, split: Split, source: CacheReader) -> bool:
    """Say whether views beyond the first, computed from an earlier cache, leave half of ``max_distortion``.

    No codec can give back what that cache has lost: where it has used up the budget, the images are the better source.
    """
    sample = chooser.calibration_sample(split, copies=True)
    middle = sample.middle
    alone, _ = chooser.meter(split, sample, middle)(chooser.promoted(split, source, sample)[middle:])
    logger.info("Further views from the cache of split point %d: distortion %.3g.", source.index.split_point, alone)
    return alone <= chooser.config.max_distortion / 2


def choose_copies(
    chooser: CodecChooser, split: Split, base: CodecState[Codec], source: CacheReader | None
) -> CodecState[CopyCodec]:
    """Fit and calibrate the codec of views beyond the first.

    Args:
        chooser: The chooser of the base view's codec.
        split: The split.
        base: The codec of the base view.
        source: The earlier cache that the states come from; ``None`` if they come from the images.

    Returns:
        The codec, and the report of its ``Calibration`` with two more entries: ``storage`` ("direct", "residual" or
        "sensitive"), and ``tried``, what was measured of each kind of storage.

    Raises:
        UnsupportedSetupError: The states cannot be encoded as asked.
    """
    started = time.perf_counter()
    config = chooser.config
    base_sample, sample = (chooser.calibration_sample(split, copies=copies) for copies in (False, True))
    base_states, states = base_sample.states, sample.states
    if source is not None:
        base_states, states = (chooser.promoted(split, source, views) for views in (base_sample, sample))
    decoded, _ = roundtrip(base.codec, base_states, config.chunk_size)
    views = _Views(decoded, states, torch.stack([base_sample.geometry, sample.geometry], 1))
    meter = chooser.meter(split, sample, sample.middle)
    prefix_tokens, grid = chooser.token_grid(split, sample)
    budget, rate = _budgets(config, base.calibration, sample.states, len(chooser.data.views))
    if source is not None and budget is not None:
        # No step can undo what the earlier cache lost: spend as much again.
        asked, (alone, _) = budget, meter(states[sample.middle :])
        budget = max(budget, 2 * alone)
        if budget > asked:
            logger.warning(
                "Further views from the cache of split point %d have a distortion of %.3g already; a budget of %g cannot be kept, "
                "%.3g is aimed at. Set build_from='auto' to compute them from the images.",
                source.index.split_point,
                alone,
                asked,
                budget,
            )
    requested, _, _ = requested_codec(config, split.split_point)
    if not requested.has_step_size:
        requested = make_codec("transform")
    gradients = chooser.gradients(split, sample, meter) if requested.needs_gradients else None

    search = _Search(views, meter, requested, prefix_tokens, grid, gradients, config.chunk_size, budget, rate)
    direct = search.direct()
    if rate is not None and direct.report.distortion < config.max_distortion:
        # There is room for more than the first view has: its distortion is enough.
        budget, rate = config.max_distortion, None
        search = dataclasses.replace(search, budget=budget, rate=None)
        direct = search.direct()
    tried = {"direct": direct}
    if config.copies in ("auto", "residual"):
        residual = search.residual(direct)
        tried["residual"] = residual
        # A prediction that saves nothing would cost the reading of the base view.
        chosen = residual if _cost(residual.report, budget) < _cost(direct.report, budget) else direct
        if (
            config.copies == "auto"
            and (selected := search.selected(direct, residual, within=chosen.report)) is not None
        ):
            chosen = tried["sensitive"] = selected
    else:
        selected = search.selected(direct, search.residual(direct))
        assert selected is not None
        chosen = tried["sensitive"] = selected

    report = chosen.report.to_dict()
    report["storage"] = chosen.storage
    report["tried"] = {
        name: {"bits_per_element": choice.report.bits_per_element, "distortion": choice.report.distortion}
        for name, choice in tried.items()
    }
    if source is not None:
        report["source"] = f"cache of split point {source.index.split_point}"
    logger.info(
        "Calibrated copies in %.1f s at split point %d: %s, %.2f bits per element at a distortion of %.3g (%s); stored directly "
        "%.2f at %.3g.",
        time.perf_counter() - started,
        split.split_point,
        chosen.storage,
        chosen.report.bits_per_element,
        chosen.report.distortion,
        f"budget {budget:g}" if budget is not None else f"budget {rate:g} bits",
        direct.report.bits_per_element,
        direct.report.distortion,
    )
    return CodecState(chosen.codec, report)


def _budgets(
    config: CacheConfig, base: Mapping[str, Any], states: Tensor, rows: int
) -> tuple[float | None, float | None]:
    """Return distortion and bits per element that views beyond the first are given; one of them is ``None``.

    They share what a lossy first view takes, less what comes with them: the predictor once, and rows of the index.
    Beside a lossless first view, whose bytes would be far too many, they are given ``max_distortion``.

    Args:
        config: What the user asks for.
        base: Calibration of the first view.
        states: (samples, tokens, hidden), for the shape.
        rows: Rows of the data set.
    """
    if "bits_per_element" not in base:  # the first view is lossless
        return config.max_distortion, None
    _, tokens, hidden = states.shape
    others = config.num_views - 1
    overhead = 8 * ((hidden + 2 * tokens) / (tokens * rows) + others * _ROW_BYTES / (tokens * hidden))
    together = _TOGETHER * base["bits_per_element"]
    # Where a data set is so small that the predictor outweighs its views, no rate keeps the promise.
    return None, max(together - overhead, together / 4) / others


def _cost(report: Calibration, budget: float | None) -> tuple[bool, float]:
    """Return what to keep low: bits at a given distortion, distortion at given bits."""
    if budget is None:
        return False, report.distortion
    return report.distortion > budget, report.bits_per_element


@dataclass
class _Search:
    views: _Views
    meter: DistortionMeter
    requested: Codec
    prefix_tokens: int
    grid: tuple[int, int]
    gradients: Tensor | None
    chunk_size: int
    budget: float | None
    rate: float | None

    def _calibrate(
        self, codec: Codec, states: Tensor, offset: Tensor | None, fallback: bool
    ) -> tuple[Codec, Calibration]:
        return calibrate(
            codec,
            self.meter,
            self.views.middle,
            chunk_size=self.chunk_size,
            states=states,
            budget=self.budget,
            target_bits=self.rate,
            fallback=fallback,
            offset=offset,
        )

    def direct(self) -> _Choice:
        """Store views as the base view is stored, with a fit and a step size for them alone."""
        middle, states = self.views.middle, self.views.states
        codec = fit_codec(self.requested, states[:middle], self.prefix_tokens, self.grid, self.gradients)
        codec, report = self._calibrate(codec, states[middle:], None, fallback=True)
        return _Choice("direct", CopyCodec(codec), report)

    def _predicted(self, predictor: Predictor) -> tuple[Tensor, Tensor]:
        """Return residuals and predictions of all views."""
        views = self.views
        residuals = CopyCodec(self.requested, predictor).residual(views.states, views.base, views.geometry)
        return residuals, predictor(views.base.float(), views.geometry).to(residuals.dtype)

    def residual(self, direct: _Choice) -> _Choice:
        """Store residuals, with the predictor that serves best."""
        views, middle = self.views, self.views.middle
        step_size = direct.codec.codec.step_size
        choices: list[_Choice] = []
        for pull, full in _PREDICTORS:
            predictor = Predictor(pull, full, self.prefix_tokens, self.grid)
            predictor = predictor.fit(views.base[:middle], views.geometry[:middle], views.states[:middle])
            residuals, predicted = self._predicted(predictor)
            codec = fit_codec(self.requested, residuals[:middle], self.prefix_tokens, self.grid, self.gradients)
            # From the step size of the direct codec on, it does not take many trials; where it is too fine, from another.
            if step_size is not None:
                with suppress(ValueError):
                    codec = codec.with_step_size(step_size)
            codec, report = self._calibrate(codec, residuals[middle:], predicted[middle:], fallback=False)
            logger.debug("Predictor with pull %g, full %s: %s", pull, full, report)
            choices.append(_Choice("residual", CopyCodec(codec, predictor), report))
        return min(choices, key=lambda choice: _cost(choice.report, self.budget))

    def selected(self, direct: _Choice, residual: _Choice, within: Calibration | None = None) -> _Choice | None:
        """Store residuals of the least similar channels and tokens, the rest as predicted.

        Args:
            direct: The choice whose step size is a guide.
            residual: The choice whose predictor is used.
            within: Calibration that must be beaten. ``None`` says that a choice is made in any case.
        """
        views, middle = self.views, self.views.middle
        assert residual.codec.predictor is not None
        predictor = residual.codec.predictor
        residuals, predicted = self._predicted(predictor)
        patches = views.states[:middle, self.prefix_tokens :].double()
        error = residuals[:middle, self.prefix_tokens :].double().square().mean((0, 1))
        similarity = 1 - error / (patches - patches.mean(0)).square().mean((0, 1)).clamp_min(1e-30)
        ranking = torch.argsort(similarity, stable=True)
        step_size = direct.codec.codec.step_size
        plain = Transform(step=None if step_size is None else step_size * _SELECTED_STEP_SIZE)
        plain = plain.fit(residuals[:middle], self.prefix_tokens, rotate=False)

        def build(share: float) -> Codec:
            channels = sorted(ranking[: round(share * len(ranking))].tolist())
            select = Select(tuple(channels), round(share * patches.shape[1]), self.prefix_tokens)
            return Codec((select, plain, Pack(), Zstd(matches="skip")))

        def bits(share: float) -> float:
            return roundtrip(build(share), residuals[middle:], self.chunk_size)[1]

        def measured(share: float) -> Calibration:
            _, report = calibrate(
                build(share),
                self.meter,
                middle,
                chunk_size=self.chunk_size,
                states=residuals[middle:],
                offset=predicted[middle:],
            )
            return dataclasses.replace(report, budget=self.budget, target_bits=self.rate)

        limit = self.rate if within is None else within.bits_per_element
        if limit is not None:
            share = _bisect(lambda share: bits(share) <= limit, largest=True)
            report = measured(share)
            if within is not None and not _cost(report, self.budget) < _cost(within, self.budget):
                return None
        else:
            assert self.budget is not None
            reports: dict[float, Calibration] = {}

            def enough(share: float) -> bool:
                reports[share] = measured(share)
                return self.budget is not None and reports[share].distortion <= self.budget

            share = _bisect(enough, largest=False)
            report = reports.get(share) or measured(share)
            if report.distortion > self.budget:
                logger.warning(
                    "copies='sensitive': with all channels and tokens the distortion is %.3g, over the budget of %g.",
                    report.distortion,
                    self.budget,
                )
        return _Choice("sensitive", CopyCodec(build(share), predictor), report)


def _bisect(holds: Callable[[float], bool], *, largest: bool) -> float:
    """Return the largest share in [0, 1] for which ``holds`` is true, or the smallest; ``holds`` changes its mind once."""
    low, high = 0.0, 1.0
    if largest and holds(1.0):
        return 1.0
    for _ in range(_SHARE_TRIALS):
        share = (low + high) / 2
        if holds(share) == largest:
            low = share
        else:
            high = share
    return low if largest else high
