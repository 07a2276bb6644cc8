"""Finds the cheapest codec setting that meets a distortion budget, or a rate, at one split point.

Half of the calibration images fit the codec, the other half measure its distortion; see ``distortion``.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..by_split_point import parse_by_split_point
from ..codecs import PRESETS, Codec
from ..errors import UnsupportedSetupError
from .distortion import DistortionMeter

__all__ = ["Calibration", "calibrate", "fit_codec", "rate_at", "roundtrip"]

logger = logging.getLogger(__name__)

#: Step sizes that one search tries at most.
_MAX_TRIALS = 10
#: Bits per element above which int8 is tried too.
_INT8_BITS = 6.0
#: The search ends when this share of the budget is used.
_CLOSE = 0.9


@dataclass(frozen=True)
class Calibration:
    """What a codec was chosen for, and what it was measured to cost on images that it was not fitted on.

    Attributes:
        chosen_by: ``"distortion"``, ``"rate"`` or ``"user"``.
        measure: What the distortion is one of; see ``DistortionMeter.measure``.
        budget: The distortion asked for, or ``None``.
        target_bits: The bits per element asked for, or ``None``.
        distortion: The distortion that was measured.
        agreement: Share of images whose largest output stays the same; ``None`` for a single output.
        relative_error: Root-mean-square error of the decoded states over the root-mean-square of the exact ones.
        worst_error: The largest such ratio of any single image.
        bits_per_element: Bits per element of the encoded samples, without what is stored once per cache.
        num_fit: Number of images that the codec was fitted on; 0 if it has nothing to fit.
        num_test: Number of images that it was measured on.
        trials: Number of settings that were tried.
        source: Where the states come from: ``"images"``, or ``"cache of split point k"``.
        sources: Distortion and relative error of each source that was compared, with the new codec applied. For an earlier
            cache that exceeds the budget by itself they are without it.
    """

    chosen_by: str
    measure: str
    budget: float | None
    target_bits: float | None
    distortion: float
    agreement: float | None
    relative_error: float
    worst_error: float
    bits_per_element: float
    num_fit: int
    num_test: int
    trials: int
    source: str = "images"
    sources: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as JSON can hold them."""
        return dataclasses.asdict(self)


def fit_codec(
    codec: Codec,
    sample: Tensor,
    prefix_tokens: int,
    grid: tuple[int, int],
    gradients: Tensor | None = None,
) -> Codec:
    """Fit a codec as ``Codec.fit`` does, and turn its errors into ours.

    Args:
        codec: The codec; it is returned as it is if nothing in it needs to be fitted.
        sample: (samples, tokens, hidden).
        prefix_tokens: Number of leading tokens that are no patches.
        grid: (height, width) of the patches.
        gradients: Gradients of the loss, like ``sample``; needed if ``codec.needs_gradients``.

    Raises:
        UnsupportedSetupError: The sample cannot be fitted; the message says why.
    """
    try:
        return codec.fit(sample, prefix_tokens, grid, gradients)
    except ValueError as error:
        raise UnsupportedSetupError(f"The codec could not be fitted: {error}.") from error


def roundtrip(codec: Codec, states: Tensor, chunk_size: int) -> tuple[Tensor, float]:
    """Encode states chunk by chunk; return the decoded states, and bits per element."""
    decoded, stored_bytes = [], 0
    for start in range(0, len(states), chunk_size):
        chunk = states[start : start + chunk_size]
        frames = codec.encode(chunk)
        stored_bytes += sum(map(len, frames))
        decoded.append(codec.decode(frames, chunk.shape, chunk.dtype))
    return torch.cat(decoded), 8 * stored_bytes / max(states.numel(), 1)


@dataclass(frozen=True)
class _Trial:
    codec: Codec
    distortion: float
    agreement: float | None
    relative_error: float
    worst_error: float
    bits: float


def calibrate(
    codec: Codec,
    meter: DistortionMeter,
    num_fit: int,
    *,
    chunk_size: int,
    states: Tensor | None = None,
    budget: float | None = None,
    target_bits: float | None = None,
    fallback: bool = True,
    offset: Tensor | None = None,
) -> tuple[Codec, Calibration]:
    """Choose the step size of a fitted codec, and measure it.

    With ``budget`` the search is for the largest step size whose distortion is within it. Where that takes more than 6 bits
    per element, or no step size is fine enough, int8 is tried as well, and lossless is the answer if int8 is too coarse. With
    ``target_bits`` the search is for the smallest step size that needs no more. With neither, the codec is only measured.

    Args:
        codec: The fitted codec.
        meter: Meter made from the exact states of images that the codec was not fitted on.
        num_fit: Number of images that the codec was fitted on, for the report.
        chunk_size: Samples per chunk, on which the rate depends.
        states: States to encode in place of the exact ones, e.g. those from an earlier lossy cache.
        budget: Largest distortion.
        target_bits: Largest number of bits per element of the encoded samples.
        offset: What is added after decoding: the predicted states, if ``states`` are residuals.
        fallback: Whether lossless may be the answer. If not, the finest setting that was tried is, though over budget.

    Returns:
        The codec to use, and the report.

    Raises:
        UnsupportedSetupError: The states cannot be encoded, or the codec has no step size to choose.
    """
    states = meter.exact if states is None else states
    trials: list[_Trial] = []

    def attempt(candidate: Codec) -> _Trial:
        decoded, bits = roundtrip(candidate, states, chunk_size)
        decoded = decoded if offset is None else decoded + offset
        trial = _Trial(candidate, *meter(decoded), meter.relative_error(decoded), meter.worst_error(decoded), bits)
        logger.debug("Calibration: %s", trial)
        trials.append(trial)
        return trial

    try:
        if budget is not None:
            best = _by_distortion(codec, budget, attempt, trials, fallback)
        elif target_bits is not None:
            best = _by_rate(codec, target_bits, attempt, trials)
        else:
            best = attempt(codec)
    except ValueError as error:
        raise UnsupportedSetupError(f"The codec could not encode the calibration images: {error}.") from error
    report = Calibration(
        chosen_by="distortion" if budget is not None else "user" if target_bits is None else "rate",
        measure=meter.measure,
        budget=budget,
        target_bits=target_bits,
        distortion=best.distortion,
        agreement=best.agreement,
        relative_error=best.relative_error,
        worst_error=best.worst_error,
        bits_per_element=best.bits,
        num_fit=num_fit,
        num_test=len(meter.exact),
        trials=len(trials),
    )
    return best.codec, report


def _search(
    codec: Codec,
    attempt: Callable[[Codec], _Trial],
    share: Callable[[_Trial], float],
    octaves: Callable[[_Trial], float],
    *,
    coarser_is_worse: bool,
) -> list[_Trial]:
    """Try step sizes; return the trials within the target.

    Args:
        codec: The fitted codec, with a step size to begin at.
        attempt: Encodes and measures.
        share: Returns the share of the target that a trial uses; up to 1 it is within the target.
        octaves: Returns the binary logarithm of the factor by which the step size should change to end the search.
        coarser_is_worse: Whether a larger step size uses more of the target, or less.

    Raises:
        UnsupportedSetupError: The codec has no step size.
    """
    if codec.step_size is None:
        raise UnsupportedSetupError(
            "The codec has no step size that could be chosen for a rate or a distortion. Use codec='auto', or a pipeline with a "
            "step that has one, such as 'transform'."
        )
    good: list[_Trial] = []
    start = position = math.log2(codec.step_size)
    low, high = -math.inf, math.inf
    for _ in range(_MAX_TRIALS):
        try:
            candidate = codec.with_step_size(2.0**position)
        except ValueError:  # too fine
            break
        trial = attempt(candidate)
        used = share(trial)
        if used <= 1:
            good.append(trial)
        if _CLOSE <= used <= 1:
            break
        if (used <= 1) == coarser_is_worse:
            low = position
        else:
            high = position
        guess = position + min(max(octaves(trial), -3.0), 3.0)
        if math.isfinite(low) and math.isfinite(high):
            if high - low < 0.01:
                break
            guess = min(max(guess, low + 0.2 * (high - low)), high - 0.2 * (high - low))
        if abs(guess - start) > 24:
            break
        position = guess
    return good


def _by_distortion(
    codec: Codec, budget: float, attempt: Callable[[Codec], _Trial], trials: list[_Trial], fallback: bool
) -> _Trial:
    aim = (1 + _CLOSE) / 2 * budget
    good = _search(
        codec,
        attempt,
        lambda trial: trial.distortion / budget,
        # Distortion grows with the square of the step size, until it saturates.
        lambda trial: (
            0.5 * math.log2(aim / trial.distortion)
            if 0 < trial.distortion < math.inf
            else math.copysign(3.0, -trial.distortion)
        ),
        coarser_is_worse=True,
    )
    # One scale per channel cannot beat a basis at rates below int8's, some 6.5 bits.
    if not good or min(trial.bits for trial in good) > _INT8_BITS:
        int8 = attempt(PRESETS["int8"])
        good += [int8] if int8.distortion <= budget else []
    if not good and not fallback:
        return min(trials, key=lambda trial: trial.distortion)
    if not good:
        logger.warning(
            "No lossy setting is within a distortion of %g at this split point (int8 has %.3g): the cache is lossless.",
            budget,
            int8.distortion,
        )
        return attempt(PRESETS["lossless"])
    return min(good, key=lambda trial: trial.bits)


def _by_rate(codec: Codec, target_bits: float, attempt: Callable[[Codec], _Trial], trials: list[_Trial]) -> _Trial:
    aim = (1 + _CLOSE) / 2 * target_bits
    good = _search(
        codec,
        attempt,
        lambda trial: trial.bits / target_bits,
        # An octave of the step size saves a bit where there are several, and less where there are few.
        lambda trial: (trial.bits - aim) / min(1.0, max(trial.bits, 0.2)),
        coarser_is_worse=False,
    )
    if not good:
        # Prefix tokens in fp16 set a floor. Hours into a run the coarsest setting is better than an end.
        least = min(trials, key=lambda trial: trial.bits)
        logger.warning("No step reaches %g bits per element at this split point: %.2f it is.", target_bits, least.bits)
        return least
    return max(good, key=lambda trial: trial.bits)


def rate_at(bits_per_element: str, split_point: int) -> float:
    """Return the bits per element that a user asks for at a split point.

    Args:
        bits_per_element: As ``parse_rates`` takes it.
        split_point: At least 1.

    Raises:
        UnsupportedSetupError: The text cannot be read, or says nothing about this split point.
    """
    rates = [rate for start, rate in parse_rates(bits_per_element) if start <= split_point]
    if not rates:
        raise UnsupportedSetupError(
            f"bits_per_element={bits_per_element!r} says nothing about split point {split_point}; begin it with '0:'."
        )
    return rates[-1]


def parse_rates(bits_per_element: str) -> Sequence[tuple[int, float]]:
    """Read ``"2.5"``, or ``"0:4.0,6:2.5"``: from which split point on how many bits per element.

    Raises:
        UnsupportedSetupError: The text cannot be read; the message says why.
    """
    expected = "one number above 0 and up to 16, e.g. '2.5', or split_point:bits pairs, e.g. '0:4.0,6:2.5,9:1.5'"
    return parse_by_split_point("bits_per_element", bits_per_element, 16, expected)
