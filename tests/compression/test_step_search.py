"""The cheapest codec within a budget is found, and what it costs is measured as stated."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_freezecache.codecs import (
    PRESETS,
    Codec,
    Pack,
    Transform,
    Zstd,
)
from hf_freezecache.compression.distortion import DistortionMeter
from hf_freezecache.compression.step_search import calibrate, fit_codec, parse_rates, rate_at
from hf_freezecache.errors import (
    DataError,
    UnsupportedSetupError,
)

TOKENS, HIDDEN, GRID = 17, 16, (4, 4)
CHUNK = 16


def states_of(samples: int, seed: int = 0, offset: float = 1.0) -> Tensor:
    """(samples, 17, 16) fp32: an offset per position, and noise that is correlated across channels and neighbours."""
    fixed = torch.Generator().manual_seed(99)
    mean = offset * torch.randn(TOKENS, HIDDEN, generator=fixed)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=fixed) * 2.0 ** -torch.arange(HIDDEN)[:, None].div(3)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, TOKENS, HIDDEN, generator=generator)
    smooth = noise + noise.roll(1, 1) + noise.mean(1, keepdim=True)
    return mean + smooth @ mixing


def suffix_of(classes: int = 5, confidence: float = 0.0) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A random linear map of all tokens to 8 features, and a head on them whose logits are as large as asked."""
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(TOKENS * HIDDEN, 8, generator=generator) / 30
    head = torch.randn(8, classes, generator=generator) * confidence
    centre = states_of(64, seed=1).flatten(1).mean(0)

    def outputs(states: Tensor) -> tuple[Tensor, Tensor]:
        found = (states.flatten(1) - centre) @ features
        return found @ head, found

    return outputs


def meter_of(samples: int = 16, **suffix: float) -> DistortionMeter:
    return DistortionMeter(states_of(samples, seed=2), suffix_of(**suffix))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fitted() -> Codec:
    return fit_codec(PRESETS["transform"], states_of(16), 1, GRID)


# ---- What is measured ----


@pytest.mark.parametrize(
    ("classes", "confidence", "measure"),
    [
        (5, 0.0, "features"),  # says the same of every image
        (5, 0.05, "features"),
        (5, 10.0, "logits and features"),
        (2, 0.0, "features"),
        (2, 10.0, "logits and features"),  # half of ln 2, where 0.5 nats are nearly all there is
        (1, 10.0, "features"),  # one output is a regression
    ],
)
def test_logits_count_where_they_say_something(classes, confidence, measure) -> None:
    assert meter_of(classes=classes, confidence=confidence).measure == measure


@pytest.mark.parametrize(
    ("counts", "measure"),
    [
        ([8, 2], "logits and features"),
        ([17, 3], "logits and features"),  # 0.42 nats; half of ln 2 is 0.35
        ([17, 3, 0], "features"),  # among three classes 0.5 are asked for
        ([9, 1], "features"),  # 0.33
        ([3, 2, 1], "logits and features"),
    ],
)
def test_the_bound_is_half_a_nat_or_half_of_what_two_classes_allow(counts, measure) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    logits = 40.0 * torch.nn.functional.one_hot(labels, len(counts))
    meter = DistortionMeter(torch.zeros(len(labels), 1, 1), lambda states: (logits, logits))
    shares = [count / len(labels) for count in counts if count]
    assert meter.information == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert meter.measure == measure


def test_outputs_that_are_no_classes_are_not_compared_as_classes() -> None:
    exact, outputs = states_of(16, seed=2), suffix_of(confidence=10.0)
    assert DistortionMeter(exact, outputs, classes=False).measure == "features"
    maps = DistortionMeter(exact, lambda states: (states, states.flatten(1)))
    assert maps.measure == "features"
    distortion, agreement = maps(exact)
    assert (distortion, agreement) == (0.0, 1.0)


@pytest.mark.parametrize("confidence", [0.0, 10.0])
def test_exact_states_cost_nothing(confidence) -> None:
    meter = meter_of(confidence=confidence)
    assert meter(meter.exact) == (0.0, 1.0)
    assert meter.relative_error(meter.exact) == 0.0


def test_relative_error_is_that_of_the_states() -> None:
    meter = meter_of()
    assert meter.relative_error(meter.exact * 1.25) == pytest.approx(0.25, rel=1e-6)
    assert meter.relative_error(torch.zeros_like(meter.exact)) == pytest.approx(1.0)
    assert DistortionMeter(torch.zeros(2, 1, 1), lambda s: (s.flatten(1), s.flatten(1))).relative_error(
        torch.zeros(2, 1, 1)
    ) == pytest.approx(0.0)


@pytest.mark.parametrize("larger", ["logits", "features"])
def test_the_fidelity_is_the_larger_of_both(larger) -> None:
    """Images 0..3 of four classes; each state's first value moves the logits, its second the feature."""
    exact = torch.stack([torch.arange(4.0), torch.tensor([-1.0, 1.0, -1.0, 1.0])], 1)[:, None]

    def outputs(states: Tensor) -> tuple[Tensor, Tensor]:
        distance = (states[:, 0, :1] - torch.arange(4.0)).abs()
        return -8.0 * distance, states[:, 0, 1:]

    meter = DistortionMeter(exact, outputs)
    assert meter.measure == "logits and features"
    moved = exact + torch.tensor([0.4, 0.1] if larger == "logits" else [0.01, 0.5])
    log_p, log_q = (outputs(states)[0].double().log_softmax(-1) for states in (exact, moved))
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    error = 0.01 if larger == "logits" else 0.25  # the feature's variance is 1
    assert (kl > error) == (larger == "logits")
    distortion, agreement = meter(moved)
    assert distortion == pytest.approx(max(kl, error), rel=1e-5)
    assert agreement == 1.0
    # Image 3 is nearest to class 3 whatever is added; the others now belong to the next class.
    assert meter(exact + torch.tensor([0.9, 0.0]))[1] == 0.25


def test_features_count_in_units_of_their_variance() -> None:
    exact = torch.tensor([[[-1.0, -100.0]], [[1.0, 100.0]]])
    meter = DistortionMeter(exact, lambda states: (torch.zeros(2, 1), states.flatten(1)))
    assert meter(exact + torch.tensor([0.5, 0.0]))[0] == pytest.approx(0.125)
    assert meter(exact + torch.tensor([0.0, 50.0]))[0] == pytest.approx(0.125)


def test_constant_features_are_left_out() -> None:
    exact = torch.tensor([[[-1.0, 3.0, 0.0]], [[1.0, 3.0, 0.0]]])
    meter = DistortionMeter(exact, lambda states: (torch.zeros(2, 1), states.flatten(1)))
    assert meter(exact + torch.tensor([0.5, 9.0, 9.0]))[0] == pytest.approx(0.25)


def test_outputs_that_never_change_leave_the_states_to_judge_by() -> None:
    """Otherwise anything would do."""
    exact = states_of(4)
    meter = DistortionMeter(exact, lambda states: (torch.zeros(len(states), 3), torch.ones(len(states), 5)))
    assert meter.measure == "states"
    assert meter(exact * 1.1)[0] == pytest.approx(0.01, rel=1e-3)
    assert meter(exact)[0] == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite(value) -> None:
    exact = states_of(6)

    def outputs(states):
        logits = states.flatten(1)[:, :4].clone()
        logits[3] = value
        return logits, logits

    with pytest.raises(DataError, match=r"NaN or infinite for 1 of 6 calibration images, at positions \[3\]"):
        DistortionMeter(exact, outputs)
    meter = DistortionMeter(exact, lambda states: (states.flatten(1)[:, :4], states.flatten(1)[:, :4]))
    assert meter(exact.clone().index_fill_(0, torch.tensor([2]), value))[0] == math.inf


def test_a_single_output_has_no_agreement() -> None:
    meter = DistortionMeter(states_of(4), lambda states: (states.flatten(1)[:, :1], states.flatten(1)))
    assert meter(meter.exact)[1] is None


# ---- Calibration to a distortion ----


@pytest.mark.parametrize("confidence", [0.0, 3.0])
@pytest.mark.parametrize("budget", [0.3, 0.1, 0.03])
def test_a_budget_is_kept_and_used(fitted, confidence, budget) -> None:
    meter = meter_of(64, confidence=confidence)
    codec, report = calibrate(fitted, meter, 16, chunk_size=64, budget=budget)
    assert 0.8 * budget <= report.distortion <= budget
    assert (report.chosen_by, report.measure, report.budget, report.target_bits) == (
        "distortion",
        meter.measure,
        budget,
        None,
    )
    assert (report.num_fit, report.num_test, report.source, report.sources) == (16, 64, "images", {})
    # The report is about the codec that is returned.
    frames = codec.encode(meter.exact)
    decoded = codec.decode(frames, meter.exact.shape, meter.exact.dtype)
    assert (report.distortion, report.agreement) == meter(decoded)
    assert report.relative_error == meter.relative_error(decoded)
    assert report.bits_per_element == 8 * sum(map(len, frames)) / meter.exact.numel()
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_a_smaller_budget_never_takes_fewer_bits(fitted, caplog) -> None:
    meter = meter_of(confidence=10.0)
    bits = [
        calibrate(fitted, meter, 16, chunk_size=CHUNK, budget=budget)[1].bits_per_element
        for budget in (1.0, 0.3, 0.1, 0.01, 1e-4, 1e-6)
    ]
    assert bits == sorted(bits)
    assert 1 < bits[0] < bits[2] < bits[3] < bits[-1]


def test_the_search_ends_soon_from_far_away(fitted) -> None:
    """Its first step may be wrong by a factor of a thousand."""
    meter = meter_of()
    for factor in (1e-3, 1e3):
        far = fitted.with_step_size(fitted.step_size * factor)
        _, report = calibrate(far, meter, 16, chunk_size=CHUNK, budget=0.1)
        assert 0.8 * 0.1 <= report.distortion <= 0.1
        assert report.trials <= 10


def test_int8_is_taken_where_a_step_needs_more(caplog) -> None:
    """Independent channels of different sizes, equally important: a step per channel beats one step for all."""
    generator = torch.Generator().manual_seed(0)
    sizes = 2.0 ** torch.arange(HIDDEN) / 2**8
    signs = torch.randint(0, 2, (2, 32, TOKENS, HIDDEN), generator=generator) * 2.0 - 1.0
    sample, exact = signs * sizes * (1 + 0.1 * torch.rand(signs.shape, generator=generator))
    codec = fit_codec(PRESETS["transform"], sample, 1, GRID)
    meter = DistortionMeter(
        exact, lambda states: (torch.zeros(len(states), 1), states.flatten(1) / sizes.repeat(TOKENS))
    )
    chosen, report = calibrate(codec, meter, 32, chunk_size=32, budget=3e-5)
    assert chosen == PRESETS["int8"]
    assert 0 < report.distortion <= 3e-5
    assert caplog.text == ""


@pytest.mark.parametrize("offset", [1.0, 1e3], ids=["small mean", "mean of a thousand spreads"])
def test_lossless_where_nothing_is_within_the_budget(caplog, offset) -> None:
    """States that are wrong from the start: no step brings them nearer to the exact ones."""
    meter = meter_of()
    other = states_of(16, seed=3, offset=offset)
    codec = fit_codec(PRESETS["transform"], states_of(16, offset=offset), 1, GRID)
    with caplog.at_level(logging.WARNING):
        chosen, report = calibrate(codec, meter, 16, chunk_size=CHUNK, states=other, budget=1e-3)
    assert chosen == PRESETS["lossless"]
    assert "No lossy setting is within a distortion of 0.001 at this split point (int8 has " in caplog.text
    assert (report.distortion, report.agreement) == meter(other)
    assert report.relative_error == meter.relative_error(other)


# ---- Calibration to a rate, and none ----


@pytest.mark.parametrize("target", [8.0, 4.0, 2.5, 2.0])
def test_a_rate_is_kept_and_used(fitted, target) -> None:
    meter = meter_of(64)
    codec, report = calibrate(fitted, meter, 16, chunk_size=64, target_bits=target)
    assert 0.85 * target <= report.bits_per_element <= target
    assert (report.chosen_by, report.budget, report.target_bits) == ("rate", None, target)
    assert 8 * sum(map(len, codec.encode(meter.exact))) / meter.exact.numel() == report.bits_per_element


def test_a_rate_that_no_step_reaches_gives_the_lowest_with_a_warning(fitted, caplog) -> None:
    """The class token alone takes a seventeenth of 16 bits. The run goes on."""
    with caplog.at_level(logging.WARNING):
        _, report = calibrate(fitted, meter_of(), 16, chunk_size=CHUNK, target_bits=0.5)
    assert 0.5 < report.bits_per_element < 3
    assert (
        f"No step reaches 0.5 bits per element at this split point: {report.bits_per_element:.2f} it is" in caplog.text
    )


def test_without_a_fallback_the_finest_setting_is_taken(fitted) -> None:
    meter = meter_of()
    chosen, report = calibrate(
        fitted, meter, 16, chunk_size=CHUNK, states=states_of(16, seed=3), budget=1e-3, fallback=False
    )
    assert not chosen.lossless
    assert report.distortion > 1e-3
    assert report.worst_error >= report.relative_error


@pytest.mark.parametrize("codec", ["lossless", "fp16", "int8", "fitted"])
def test_without_a_target_the_codec_is_only_measured(fitted, codec) -> None:
    given = fitted if codec == "fitted" else PRESETS[codec]
    meter = meter_of()
    chosen, report = calibrate(given, meter, 5, chunk_size=7)
    assert chosen is given
    assert (report.chosen_by, report.trials, report.num_fit) == ("user", 1, 5)
    assert (report.distortion == 0) == (codec == "lossless")
    frames = [frame for start in (0, 7, 14) for frame in given.encode(meter.exact[start : start + 7])]
    assert report.bits_per_element == 8 * sum(map(len, frames)) / meter.exact.numel()


def test_given_states_are_encoded_and_compared_with_the_exact_ones(fitted) -> None:
    meter = meter_of()
    given = meter.exact + 0.05 * states_of(16, seed=4)
    _, report = calibrate(PRESETS["lossless"], meter, 16, chunk_size=CHUNK, states=given)
    assert (report.distortion, report.agreement) == meter(given)
    assert report.relative_error == meter.relative_error(given) > 0
    alone = report.distortion
    _, report = calibrate(fitted, meter, 16, chunk_size=CHUNK, states=given, budget=4 * alone)
    assert 0.8 * 4 * alone <= report.distortion <= 4 * alone


@pytest.mark.parametrize("target", [{"budget": 0.1}, {"target_bits": 2.0}])
@pytest.mark.parametrize("codec", ["lossless", "fp16", "int8", "transform"])
def test_a_target_needs_a_fitted_step_size(codec, target) -> None:
    with pytest.raises(UnsupportedSetupError, match="no step size that could be chosen"):
        calibrate(PRESETS[codec], meter_of(), 16, chunk_size=CHUNK, **target)


@pytest.mark.parametrize("target", [{}, {"budget": 0.1}, {"target_bits": 2.0}])
def test_states_that_cannot_be_encoded_are_refused(fitted, target) -> None:
    states = states_of(16, seed=2)
    states[3, 2, 1] = math.nan
    with pytest.raises(UnsupportedSetupError, match=r"could not encode the calibration images: .*NaN"):
        calibrate(fitted, meter_of(), 16, chunk_size=CHUNK, states=states, **target)


# ---- Fitting ----


def test_codecs_without_anything_to_fit_are_returned_as_they_are(fitted) -> None:
    sample = states_of(1)
    for codec in (PRESETS["lossless"], PRESETS["fp16"], PRESETS["int4"], fitted):
        assert fit_codec(codec, sample, 1, GRID) is codec


def test_fitting_fits_the_transform_and_keeps_the_other_steps() -> None:
    asked = Codec((Transform(gradient_weight=0.5), Pack(), Zstd(3)))
    sample = states_of(16)
    codec = fit_codec(asked, sample, 1, GRID, gradients=torch.ones_like(sample) + 0.1 * states_of(16, 8))
    assert codec.steps[1:] == asked.steps[1:]
    first = codec.steps[0]
    assert isinstance(first, Transform)
    assert (first.prefix_tokens, first.grid, first.gradient_weight) == (1, GRID, 0.5)
    assert first.tensors().keys() == {"basis", "scale", "mean"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample": states_of(1)}, "at least 2 samples"),
        ({"sample": states_of(16).index_fill(0, torch.tensor([3]), math.nan)}, "NaN"),
        ({"sample": states_of(16).index_fill(0, torch.tensor([3]), math.inf)}, "NaN or inf"),
        ({"grid": (4, 5)}, "do not form a grid of 4 x 5"),
        ({"prefix_tokens": 17}, "17 tokens with 17 prefix tokens"),
        ({"codec": Codec((Transform(gradient_weight=1.0), Pack(), Zstd()))}, "needs gradients"),
    ],
    ids=["one sample", "NaN", "inf", "grid", "no patches", "no gradients"],
)
def test_samples_that_cannot_be_fitted_are_refused(change, words) -> None:
    arguments = {
        "codec": PRESETS["transform"],
        "sample": states_of(16),
        "prefix_tokens": 1,
        "grid": GRID,
        **change,
    }
    with pytest.raises(UnsupportedSetupError, match=words):
        fit_codec(**arguments)


# ---- Compression schedules ----


@pytest.mark.parametrize(
    ("split_point", "bits"), [(1, 4.0), (5, 4.0), (6, 2.5), (8, 2.5), (9, 1.5), (12, 1.5), (24, 1.5)]
)
def test_rates_hold_from_their_split_point_on(split_point, bits) -> None:
    assert rate_at("0:4.0,6:2.5,9:1.5", split_point) == bits


def test_a_schedule_that_begins_late_says_nothing_before() -> None:
    assert rate_at("3:2", 3) == 2.0
    with pytest.raises(UnsupportedSetupError, match=r"'3:2' says nothing about split point 2; begin it with '0:'"):
        rate_at("3:2", 2)


@pytest.mark.parametrize(("text", "bits"), [("2.5", 2.5), ("3", 3.0), (" 16 ", 16.0)])
def test_one_rate_holds_everywhere(text, bits) -> None:
    assert [rate_at(text, split_point) for split_point in (1, 6, 24)] == [bits] * 3


@pytest.mark.parametrize(
    "rates",
    [
        *(
            "",
            "17",
            "0",
            "-1",
            "nan",
            "4,2",
            "0:",
            ":4",
            "0:4,",
            "0:4;6:2",
            "0:x",
            "x:4",
            "-1:4",
            "1.5:4",
            "0:4:5",
            "0:4,6",
        ),
        *("0:0", "0:-1", "0:16.1", "0:nan", "0:inf", "cubic", "Linear"),
    ],
)
def test_rates_that_cannot_be_read_are_refused(rates) -> None:
    for read in (parse_rates, lambda text: rate_at(text, 3)):
        with pytest.raises(UnsupportedSetupError) as caught:
            read(rates)
        for word in (f"bits_per_element={rates!r}", "one number above 0 and up to 16", "split_point:bits pairs"):
            assert word in str(caught.value)


@pytest.mark.parametrize("rates", ["6:2,0:4", "0:4,0:3", "0:4,6:2,6:2"])
def test_split_points_must_rise(rates) -> None:
    with pytest.raises(UnsupportedSetupError, match="rising split points, each once"):
        parse_rates(rates)


@given(
    st.dictionaries(
        st.integers(0, 200), st.floats(0, 16, exclude_min=True, allow_subnormal=False), min_size=1, max_size=8
    ),
    st.sampled_from(["", " "]),
)
def test_rates_are_read_as_written(rates, space) -> None:
    written = sorted(rates.items())
    text = ",".join(f"{space}{start}:{space}{bits!r}" for start, bits in written)
    assert list(parse_rates(text)) == written
    for start, bits in written:
        assert rate_at(text, start) == bits
