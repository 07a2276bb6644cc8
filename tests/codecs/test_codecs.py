"""One checker for all codecs: round trips, bounds, declared sizes, and frames that are damaged in every bit."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pickle
import resource
import struct
import sys

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from hf_freezecache.codecs import (
    DTYPES,
    PRESETS,
    STEPS,
    Cast,
    Codec,
    Pack,
    Planes,
    Quantize,
    Step,
    Transform,
    Zstd,
    codec_from_dict,
    dtype_name,
    make_codec,
)
from hf_freezecache.codecs.entropy import (
    check_frame,
    compress_frame,
    decompress_frame,
)
from hf_freezecache.errors import UnsupportedSetupError

#: Beside the presets: other configurations, and pipelines of one's own.
CUSTOM = {
    "lossless-3": Codec((Planes(), Zstd(3))),
    "lossless-22": Codec((Planes(), Zstd(22))),
    "planes-zstd": Codec((Planes(), Zstd(2, "skip"))),
    "f32": Codec((Cast("F32"), Planes(), Zstd())),
    "int3-planes": Codec((Quantize(3), Planes(), Zstd(5))),
    "fp32-int5": Codec((Cast("F32"), Quantize(5), Pack(3), Zstd(3, "skip"))),
    "transform-weighted": Codec((Transform(gradient_weight=0.5), Pack(), Zstd(matches="skip"))),
    "transform-no-grid": Codec((Transform(step=0.01), Pack(), Zstd(matches="skip"))),
    "bf16-transform": Codec((Cast("BF16"), Transform(gradient_weight=1.0), Pack(zones=1), Zstd())),
}
LOSSLESS = {"lossless", "lossless-3", "lossless-22", "planes-zstd"}
ALL_CODECS = {**PRESETS, **CUSTOM}
LOSSY = sorted(ALL_CODECS.keys() - LOSSLESS)


@functools.lru_cache(maxsize=1000)
def codec_for(name: str, tokens: int, hidden: int) -> Codec:
    """The codec, its transform fitted for chunks of (tokens, hidden)."""
    codec = ALL_CODECS[name]
    steps = [
        fitted(step, tokens, hidden, use_grid="no-grid" not in name) if isinstance(step, Transform) else step
        for step in codec.steps
    ]
    return Codec(tuple(steps))


def fitted(transform: Transform, tokens: int, hidden: int, use_grid: bool = True) -> Transform:
    """Fitted on channels that are correlated, with a prefix token where there are two tokens or more."""
    generator = torch.Generator().manual_seed(100 * tokens + hidden)
    sample = torch.randn(5, tokens, hidden, generator=generator).cumsum(2).cumsum(1)
    prefix = int(tokens > 1)
    patches = tokens - prefix
    height = next(side for side in range(int(patches**0.5), 0, -1) if patches % side == 0)
    grid = (height, patches // height) if use_grid else None
    return transform.fit(sample, prefix, grid, torch.randn(sample.shape, generator=generator) * sample)


PARAMETERS = [
    pytest.param(codec, dtype, id=f"{codec}-{name}") for codec in ALL_CODECS for name, dtype in DTYPES.items()
]
every_codec_and_dtype = pytest.mark.parametrize(("name", "dtype"), PARAMETERS)
lossless_and_dtype = pytest.mark.parametrize(("name", "dtype"), [p for p in PARAMETERS if p.values[0] in LOSSLESS])
lossy_and_dtype = pytest.mark.parametrize(("name", "dtype"), [p for p in PARAMETERS if p.values[0] not in LOSSLESS])
every_codec = pytest.mark.parametrize("name", ALL_CODECS)
SHAPES = st.tuples(st.integers(0, 5), st.integers(1, 7), st.integers(1, 9))
SEEDS = st.integers(0, 2**32 - 1)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def rms(error: torch.Tensor) -> torch.Tensor:
    """Root-mean-square of each sample, also of numbers whose squares fp64 does not hold."""
    if not error.numel():
        return torch.zeros(len(error), dtype=torch.float64)
    peak = error.double().abs().amax((1, 2)).clamp_min(torch.finfo(torch.float64).tiny)
    return (error.double() / peak[:, None, None]).square().mean((1, 2)).sqrt() * peak


def assert_close(found: torch.Tensor, expected: torch.Tensor, least_peak: float) -> None:
    """Up to the order of additions, and what it does to the last bit of the dtype."""
    peak = max(least_peak, float(expected.abs().max()) if expected.numel() else 0.0)
    tolerance = max(1e-5, torch.finfo(expected.dtype).eps)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=peak * 1e-5)


def check_round_trip(codec: Codec, hidden_states: torch.Tensor) -> torch.Tensor:
    """What every codec promises, of any tensor that it takes."""
    before = bits(hidden_states)
    shape, dtype = tuple(hidden_states.shape), hidden_states.dtype
    frames = codec.encode(hidden_states)
    assert bits(hidden_states) == before
    limits = codec.max_frame_bytes(shape, dtype)
    assert len(frames) == len(limits)
    assert all(type(frame) is bytes and len(frame) <= most for frame, most in zip(frames, limits, strict=True))
    for frame in frames:
        check_frame(frame)
    assert codec.encode(hidden_states.clone()) == frames  # the same input gives the same file
    kept = list(frames)
    decoded = codec.decode(frames, shape, dtype)
    assert decoded.shape == shape
    assert decoded.dtype == dtype
    assert decoded.is_contiguous()
    if codec.lossless:
        assert bits(decoded) == before
    # No sample is wrong by more than the bound.
    bound = codec.error_bound(hidden_states)
    assert bound.shape == shape[:1]
    assert bound.dtype == torch.float64
    assert bool(torch.isfinite(bound).all())
    assert bool((bound == 0).all()) if codec.lossless else bool((bound > 0).all())
    if not codec.lossless:
        error = rms(decoded.double() - hidden_states.double())
        assert bool((error <= bound).all()), (error, bound)
    # Samples of one chunk can be picked before they are restored.
    arrays = codec.entropy_decode(frames, shape, dtype)
    assert all(len(array) == shape[0] for array in arrays.values())
    rows = torch.arange(shape[0]).flip(0)[::2]
    picked = codec.dequantize({name: array[rows] for name, array in arrays.items()}, dtype)
    if codec.lossless:
        assert bits(picked) == bits(decoded[rows])
    else:
        assert_close(picked, decoded[rows], 1.0 if codec.tensors() else 0.0)  # a fitted mean is added
    # Views of one buffer decode as well as bytes do.
    again = codec.decode([memoryview(bytearray(frame)) for frame in frames], shape, dtype)
    assert bits(again) == bits(decoded)
    # Memory of its own: writing to it changes neither frames nor another decoding.
    for array in (decoded, *arrays.values()):
        array.fill_(1)
    assert frames == kept
    assert bits(codec.decode(frames, shape, dtype)) == bits(again)
    return again


def test_registries_name_steps_and_codecs() -> None:
    for name, cls in STEPS.items():
        assert cls.name == name
        assert issubclass(cls, Step)
    assert set(PRESETS) == {"lossless", "fp16", "bf16", "int8", "int4", "transform"}
    assert {name for name, codec in ALL_CODECS.items() if codec.lossless} == LOSSLESS


@lossless_and_dtype
@given(shape=SHAPES, seed=SEEDS)
def test_round_trip_of_any_shape_and_any_bits(name, dtype, shape, seed) -> None:
    hidden_states = torch.empty(shape, dtype=dtype)
    raw = hidden_states.view(torch.uint8)
    raw.copy_(torch.from_numpy(np.random.default_rng(seed).integers(0, 256, tuple(raw.shape), dtype=np.uint8)))
    check_round_trip(codec_for(name, *shape[1:]), hidden_states)


def finite_states(kind: str, shape: tuple[int, ...], exponent: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "smooth":
        states = states.cumsum(2).cumsum(1)
    elif kind == "zeros":
        states = states * 0
    elif kind == "constant channels":
        states = states[:, :1].expand(shape)
    elif kind == "whole multiples":
        states = torch.round(states * 6)
    states = states * 10.0**exponent
    if kind == "outlier token" and states.numel():
        states[-1, seed % shape[1]] *= 1e12
    elif kind == "mixed scales" and states.numel():
        states = states * 10.0 ** torch.linspace(-8, 8, shape[2], dtype=torch.float64)
    elif kind == "largest" and states.numel():
        states = torch.where(states.sign() > 0, torch.inf, states)
    info = torch.finfo(dtype)
    return states.clamp(info.min, info.max).to(dtype)


KINDS = ["gaussian", "smooth", "zeros", "constant channels", "whole multiples"]
EXTREME_KINDS = ["outlier token", "mixed scales", "largest"]


def within_range_of_cast(name: str, hidden_states: torch.Tensor) -> bool:
    """Whether casts leave the states finite; they refuse them otherwise."""
    for step in ALL_CODECS[name].steps:
        if isinstance(step, Cast) and hidden_states.numel():
            cast = hidden_states.to(DTYPES[step.dtype]).to(hidden_states.dtype)
            return bool(torch.isfinite(cast).all())
    return True


@pytest.mark.by_default(6)
@every_codec_and_dtype
@given(
    shape=SHAPES,
    seed=SEEDS,
    kind=st.sampled_from(KINDS + EXTREME_KINDS),
    exponent=st.one_of(st.floats(-2, 4), st.sampled_from([-320, -310, -46, -40, -8, -7, 9, 30, 200])),
)
@example(shape=(2, 1, 1), seed=1, kind="whole multiples", exponent=1.0)  # fp32 inside, rounded to bf16 in the end
@example(shape=(2, 2, 1), seed=1, kind="mixed scales", exponent=2.25)  # the same with fp16
def test_round_trip_of_any_finite_values(name, dtype, shape, seed, kind, exponent) -> None:
    codec = codec_for(name, *shape[1:])
    hidden_states = finite_states(kind, shape, exponent, seed, dtype)
    if within_range_of_cast(name, hidden_states):
        check_round_trip(codec, hidden_states)
    else:
        with pytest.raises(ValueError, match="do not fit in"):
            codec.encode(hidden_states)


@pytest.mark.by_default(11)
@lossy_and_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_lossy_codecs_refuse_what_is_not_finite(name, dtype, bad) -> None:
    hidden_states = torch.randn(3, 5, 4).to(dtype)
    hidden_states[2, 1, 3] = bad
    with pytest.raises(ValueError, match=r"NaN or infinite values in samples \[2\] of the chunk, channels \[3\]"):
        codec_for(name, 5, 4).encode(hidden_states)


@lossless_and_dtype
def test_round_trip_of_special_values(name, dtype) -> None:
    codec = ALL_CODECS[name]
    info = torch.finfo(dtype)
    special = [
        0.0,
        -0.0,
        float("inf"),
        -float("inf"),
        float("nan"),
        info.max,
        info.min,
        info.tiny,
        -info.tiny,
        info.eps,
    ]
    subnormals = [info.smallest_normal / 2, -info.smallest_normal / 4]
    values = torch.tensor(special + subnormals, dtype=torch.float64).to(dtype)
    assert bool((values[-2:] != 0).all()), "subnormals were flushed"
    check_round_trip(codec, values.reshape(1, 3, 4))
    # NaNs with all their payloads and signs, two-byte patterns at the top of the element.
    patterns = np.zeros((2**16, dtype.itemsize), dtype=np.uint8)
    patterns[:, -2:] = np.arange(2**16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    check_round_trip(codec, torch.from_numpy(patterns.reshape(-1)).view(dtype).reshape(16, 64, 64))


@pytest.mark.by_default(16)
@every_codec_and_dtype
@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 1, 1), (1, 5, 3), (0, 1, 1)])
def test_round_trip_of_empty_and_single_samples(name, dtype, shape) -> None:
    values = torch.linspace(-2, 2, max(math.prod(shape), 1)).to(dtype)[: math.prod(shape)]
    check_round_trip(codec_for(name, *shape[1:]), values.reshape(shape))


@pytest.mark.by_default(6)
@every_codec_and_dtype
def test_round_trip_of_non_contiguous_views(name, dtype) -> None:
    whole = torch.randn(6, 8, 10).to(dtype)
    for view in (whole.transpose(1, 2), whole[::2, 1::3, ::5], whole[3:4].expand(4, 8, 10), whole.flip(0)[1:]):
        codec = codec_for(name, *view.shape[1:])
        check_round_trip(codec, view)
        assert codec.encode(view) == codec.encode(view.contiguous())


@every_codec
def test_round_trip_of_inference_tensors(name) -> None:
    """What was made in inference mode is of use outside, in a graph too."""
    codec_for.cache_clear()
    with torch.inference_mode():
        hidden_states = torch.randn(2, 5, 4)
        codec = codec_for(name, 5, 4)
        check_round_trip(codec, hidden_states)
        frames = codec.encode(hidden_states)
    codec_for.cache_clear()
    decoded = codec.decode(frames, (2, 5, 4), torch.float32)
    assert not decoded.is_inference()
    weight = torch.ones(4, requires_grad=True)
    (decoded * weight).sum().backward()
    torch.testing.assert_close(weight.grad, decoded.sum((0, 1)))


@every_codec
def test_configuration_round_trip_through_json(name) -> None:
    codec = codec_for(name, 5, 4)
    data = json.loads(json.dumps(codec.to_dict()))
    assert data.keys() == {"name", "configuration"}
    hidden_states = torch.randn(2, 5, 4)
    frames = codec.encode(hidden_states)
    for twin in (codec_from_dict(data, codec.tensors()), make_codec(codec), pickle.loads(pickle.dumps(codec))):
        assert type(twin) is type(codec)
        assert twin == codec
        assert hash(twin) == hash(codec)
        assert twin.to_dict() == codec.to_dict()
        assert twin.encode(hidden_states) == frames
        assert bits(twin.decode(frames, (2, 5, 4), torch.float32)) == bits(
            codec.decode(frames, (2, 5, 4), torch.float32)
        )


@every_codec
def test_repr_shows_the_configuration_and_codecs_are_values(name) -> None:
    codec = codec_for(name, 5, 4)
    known = {cls.__name__: cls for cls in (Codec, *STEPS.values())}
    if not codec.tensors():
        assert eval(repr(codec), known) == codec
    assert all(repr(step) in repr(codec) for step in codec.steps)
    for value in (codec, *codec.steps):
        for field in dataclasses.fields(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name, None)


@every_codec
def test_arithmetic_in_bf16_is_close(name) -> None:
    """The arithmetic of a run's autocast, and the rounding of bf16 with it."""
    codec = codec_for(name, 5, 4)
    hidden_states = torch.randn(4, 5, 4).cumsum(2)
    arrays = codec.entropy_decode(codec.encode(hidden_states), hidden_states.shape, torch.float32)
    exact, rough = codec.dequantize(arrays, torch.float32), codec.dequantize(arrays, torch.float32, torch.bfloat16)
    assert rough.dtype == torch.float32
    assert bool((rms(rough - exact) <= 0.02 * rms(exact)).all())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "gzip", "configuration": {}}, "Unknown codec 'gzip'; codecs are stored as 'pipeline'"),
        ({}, "Unknown codec None"),
        ({"name": "int8", "configuration": {}}, "Unknown codec 'int8'"),
        ({"name": "lossless", "configuration": {}}, "Unknown codec 'lossless'; codecs are stored as 'pipeline'"),
        ({"name": "pipeline", "configuration": [1]}, "does not take the configuration"),
        *(
            (
                {"name": "pipeline", "configuration": {"steps": ["planes", {"name": "zstd", "configuration": level}]}},
                words,
            )
            for level, words in [
                ({"speed": 1}, "does not take the configuration"),
                ({"level": 0}, "from 1 to 22, got 0"),
                ({"level": 23}, "from 1 to 22, got 23"),
                ({"level": 1.0}, "got 1.0"),
                ({"level": "1"}, "got '1'"),
            ]
        ),
    ],
)
def test_unknown_codecs_and_configurations_are_refused(data, words) -> None:
    with pytest.raises(UnsupportedSetupError, match=words):
        codec_from_dict(data)


def test_make_codec_takes_the_defaults() -> None:
    assert make_codec("lossless") == Codec((Planes(), Zstd()))
    with pytest.raises(UnsupportedSetupError, match="Unknown codec"):
        make_codec("auto-lossy")


def test_dtype_names_are_those_of_safetensors() -> None:
    assert {name: dtype_name(dtype) for name, dtype in DTYPES.items()} == {name: name for name in DTYPES}
    assert DTYPES["BF16"] is torch.bfloat16
    with pytest.raises((KeyError, StopIteration)):
        dtype_name(torch.int8)


# ---- Damage ----

SMALL = {
    "incompressible": torch.tensor([[[1.5, -2.25, 3e-5], [6e4, 0.1, -0.0]]]),
    "compressible": torch.ones(4, 3, 8),
    "empty": torch.zeros(0, 3, 8),
}
every_content = pytest.mark.parametrize("content", SMALL)


def unpacked_or_refused(codec: Codec, frames: list[bytes], like: torch.Tensor) -> dict[str, bytes] | None:
    """Any other exception than ``ValueError`` fails the test."""
    try:
        arrays = codec.entropy_decode(frames, like.shape, like.dtype)
    except ValueError:
        return None
    return {name: bits(array) for name, array in arrays.items()}


@pytest.mark.by_default(5)
@pytest.mark.parametrize(
    ("name", "dtype"), [p for p in PARAMETERS if p.values[0] in LOSSLESS or p.values[1] is torch.float32]
)
@every_content
def test_no_flipped_bit_gives_wrong_content(name, content, dtype) -> None:
    """zstd's header has one bit that means nothing, so a flip may decode to the right content; never to a wrong one."""
    hidden_states = SMALL[content].to(dtype)
    codec = codec_for(name, *hidden_states.shape[1:])
    frames = codec.encode(hidden_states)
    exact = unpacked_or_refused(codec, frames, hidden_states)
    assert exact is not None
    refused = total = 0
    for number, frame in enumerate(frames):
        for bit in range(8 * len(frame)):
            damaged = bytearray(frame)
            damaged[bit // 8] ^= 1 << bit % 8
            found = unpacked_or_refused(codec, [*frames[:number], bytes(damaged), *frames[number + 1 :]], hidden_states)
            assert found is None or found == exact, (number, bit)
            refused += found is None
            total += 1
    assert total > 50
    assert refused > 0.98 * total


@pytest.mark.by_default(6)
@every_codec
@every_content
def test_every_truncation_and_every_trailing_byte_is_refused(name, content) -> None:
    hidden_states = SMALL[content]
    codec = codec_for(name, *hidden_states.shape[1:])
    frames = codec.encode(hidden_states)
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"abcd"
    for number, frame in enumerate(frames):
        altered = [frame[:length] for length in range(len(frame))]
        altered += [frame + rest for rest in (b"\0", frame, skippable, compress_frame(b"", 1))]
        altered += [skippable + frame, frame[1:], b"\0" * len(frame), compress_frame(b"", 1) + frame]
        for other in altered:
            damaged = [*frames[:number], other, *frames[number + 1 :]]
            assert unpacked_or_refused(codec, damaged, hidden_states) is None, (number, other)


@every_codec
def test_wrong_numbers_and_sizes_of_frames_are_refused(name) -> None:
    hidden_states = torch.cat([SMALL["incompressible"], SMALL["incompressible"] * 0.7])
    codec = codec_for(name, *hidden_states.shape[1:])
    frames = codec.encode(hidden_states)
    for others in (frames[:-1], [*frames, frames[0]], []):
        with pytest.raises(ValueError, match=f"{len(others)} frames, expected {len(frames)}"):
            codec.entropy_decode(others, hidden_states.shape, torch.float32)
    for shape in ((2, 2, 2), (2, 2, 4), (2, 3, 3), (0, 2, 3), (1, 2, 3), (3, 2, 3)):
        assert unpacked_or_refused(codec, frames, hidden_states.new_zeros(shape)) is None, shape
    if len(codec.max_frame_bytes(hidden_states.shape, torch.float64)) != len(frames):
        assert unpacked_or_refused(codec, frames, hidden_states.double()) is None


@every_codec
def test_frames_that_hold_too_much_are_refused(name) -> None:
    """Each frame in turn with more content than the largest that shape and dtype allow."""
    hidden_states = torch.randn(2, 5, 4)
    codec = codec_for(name, 5, 4)
    frames = codec.encode(hidden_states)
    limits = codec.max_frame_bytes(hidden_states.shape, torch.float32)
    for number, limit in enumerate(limits):
        bomb = compress_frame(bytes(limit), 1)
        with pytest.raises(ValueError, match=r"zstd frame claims \d+ bytes, expected at most \d+"):
            codec.entropy_decode([*frames[:number], bomb, *frames[number + 1 :]], hidden_states.shape, torch.float32)


@every_codec
@given(data=st.data())
def test_whole_frames_of_other_content_are_decoded_or_refused(name, data) -> None:
    hidden_states = torch.randn(2, 5, 4)
    codec = codec_for(name, 5, 4)
    frames = codec.encode(hidden_states)
    number = data.draw(st.integers(0, len(frames) - 1))
    most = codec.max_frame_bytes(hidden_states.shape, torch.float32)[number]
    content = data.draw(st.binary(max_size=most))
    other = compress_frame(content, 1)
    try:
        decoded = codec.decode([*frames[:number], other, *frames[number + 1 :]], hidden_states.shape, torch.float32)
    except ValueError:
        return
    assert decoded.shape == hidden_states.shape


def test_a_frame_holds_checksum_and_content_size() -> None:
    for content in (b"", b"x", b"x" * 1000):
        parameters = zstandard.get_frame_parameters(compress_frame(content, 1))
        assert parameters.has_checksum
        assert parameters.content_size == len(content)
        assert decompress_frame(compress_frame(content, 1), len(content)) == content


@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_a_frame_without_checksum_or_content_size_is_refused(content) -> None:
    unchecked = zstandard.ZstdCompressor(write_checksum=False).compress(content)
    with pytest.raises(ValueError, match="without a checksum"):
        decompress_frame(unchecked, len(content))
    unsized = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(content)
    with pytest.raises(ValueError, match=r"claims|damaged"):
        decompress_frame(unsized, len(content))


def test_a_frame_with_a_dictionary_is_refused() -> None:
    samples = [f"sample {number} of a dictionary".encode() * 3 for number in range(200)]
    dictionary = zstandard.train_dictionary(1024, samples)
    assert dictionary.dict_id() != 0
    frame = zstandard.ZstdCompressor(dict_data=dictionary, write_checksum=True).compress(samples[0])
    with pytest.raises(ValueError, match="dictionary"):
        decompress_frame(frame, len(samples[0]))


@pytest.mark.slow
def test_a_frame_that_claims_gigabytes_takes_no_memory() -> None:
    """A bomb of 2 GiB in a few KB, and a header that claims 2**40 bytes."""
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True).compressobj(size=2**31)
    bomb = b"".join(compressor.compress(bytes(2**24)) for _ in range(128)) + compressor.flush()
    assert zstandard.get_frame_parameters(bomb).content_size == 2**31
    # Frame header: magic, descriptor (8-byte size, single segment, checksum), size; then a last block of 2**20 times 0.
    block = struct.pack("<I", (2**17 << 3) | (1 << 1) | 1)[:3] + b"\0"
    liar = struct.pack("<IBQ", 0xFD2FB528, 0b11100100, 2**40) + block + bytes(4)
    assert zstandard.get_frame_parameters(liar).content_size == 2**40
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    for frame, expected in ((bomb, 1000), (liar, 1000), (bomb, 2**31 - 1)):
        with pytest.raises(ValueError, match="claims"):
            decompress_frame(frame, expected)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < 2**26


def test_a_frame_whose_blocks_hold_more_or_less_than_it_claims_is_refused() -> None:
    good = compress_frame(b"x" * 100, 1)
    for size in (99, 101):
        altered = bytearray(good)
        assert altered[5] == 100
        altered[5] = size
        with pytest.raises(ValueError, match="damaged"):
            decompress_frame(bytes(altered), size)


@given(st.binary(max_size=200), st.integers(0, 100))
def test_any_bytes_are_decoded_or_refused_with_value_error(data, expected) -> None:
    for frame in (data, b"\x28\xb5\x2f\xfd" + data):
        try:
            content = decompress_frame(frame, expected)
        except ValueError:
            continue
        assert len(content) == expected
