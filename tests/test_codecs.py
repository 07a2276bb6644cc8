"""One checker for all codecs: round trips, declared sizes, and frames that are damaged in every bit."""

from __future__ import annotations

import dataclasses
import json
import resource
import struct
import sys

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hf_freezecache.codecs import CODECS, DTYPES, Codec, codec_from_dict, dtype_name, make_codec
from hf_freezecache.codecs.entropy import compress_frame, decompress_frame
from hf_freezecache.errors import UnsupportedSetupError

LOSSLESS = {"lossless"}
#: Configurations to try beside the default; a codec that is not here is tried with its default only.
CONFIGURATIONS = {"lossless": [{"level": 3}, {"level": 22}]}
ALL_CODECS = [
    codec_from_dict({"name": name, "configuration": configuration})
    for name in CODECS
    for configuration in [{}, *CONFIGURATIONS.get(name, [])]
]
PARAMETERS = [
    pytest.param(codec, dtype, id=f"{codec!r}-{name}") for codec in ALL_CODECS for name, dtype in DTYPES.items()
]
every_codec_and_dtype = pytest.mark.parametrize(("codec", "dtype"), PARAMETERS)
SHAPES = st.tuples(st.integers(0, 5), st.integers(1, 7), st.integers(1, 9))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def check_round_trip(codec: Codec, hidden_states: torch.Tensor) -> None:
    """What every codec promises, of any tensor."""
    before = bits(hidden_states)
    frames = codec.encode(hidden_states)
    assert bits(hidden_states) == before
    assert len(frames) == codec.num_frames(hidden_states.dtype)
    assert all(type(frame) is bytes for frame in frames)
    assert codec.encode(hidden_states.clone()) == frames  # the same input gives the same file
    kept = list(frames)
    decoded = codec.decode(frames, hidden_states.shape, hidden_states.dtype)
    assert decoded.shape == hidden_states.shape
    assert decoded.dtype == hidden_states.dtype
    assert decoded.is_contiguous()
    if type(codec).name in LOSSLESS:
        assert bits(decoded) == bits(hidden_states)
    # Views of one buffer decode as well as bytes do.
    again = codec.decode([memoryview(bytearray(frame)) for frame in frames], hidden_states.shape, hidden_states.dtype)
    assert bits(again) == bits(decoded)
    # Memory of its own: writing to it changes neither frames nor another decoding.
    decoded.fill_(1.0)
    assert frames == kept
    assert bits(codec.decode(frames, hidden_states.shape, hidden_states.dtype)) == bits(again)


def test_every_codec_says_whether_it_is_lossless() -> None:
    assert CODECS.keys() >= LOSSLESS
    for name, cls in CODECS.items():
        assert cls.name == name
        assert issubclass(cls, Codec)


@every_codec_and_dtype
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1))
def test_round_trip_of_any_shape_and_any_bits(codec, dtype, shape, seed) -> None:
    hidden_states = torch.empty(shape, dtype=dtype)
    raw = hidden_states.view(torch.uint8)
    raw.copy_(torch.from_numpy(np.random.default_rng(seed).integers(0, 256, tuple(raw.shape), dtype=np.uint8)))
    check_round_trip(codec, hidden_states)


@every_codec_and_dtype
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1))
def test_round_trip_of_smooth_values(codec, dtype, shape, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    check_round_trip(codec, torch.randn(shape, generator=generator).cumsum(-1).to(dtype))


@every_codec_and_dtype
def test_round_trip_of_special_values(codec, dtype) -> None:
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


@every_codec_and_dtype
@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 1, 1), (1, 5, 3)])
def test_round_trip_of_empty_and_single_samples(codec, dtype, shape) -> None:
    check_round_trip(
        codec, torch.linspace(-2, 2, max(int(np.prod(shape)), 1)).to(dtype)[: np.prod(shape)].reshape(shape)
    )


@every_codec_and_dtype
def test_round_trip_of_non_contiguous_views(codec, dtype) -> None:
    whole = torch.randn(6, 8, 10).to(dtype)
    for view in (whole.transpose(1, 2), whole[::2, 1::3, ::5], whole[3:4].expand(4, 8, 10), whole.flip(0)[1:]):
        check_round_trip(codec, view)
        decoded = codec.decode(codec.encode(view), view.shape, dtype)
        if type(codec).name in LOSSLESS:
            assert torch.equal(decoded, view)


def test_round_trip_of_inference_tensors() -> None:
    with torch.inference_mode():
        hidden_states = torch.randn(2, 3, 4)
        for codec in ALL_CODECS:
            check_round_trip(codec, hidden_states)


@pytest.mark.parametrize("codec", ALL_CODECS, ids=repr)
def test_configuration_round_trip_through_json(codec) -> None:
    data = json.loads(json.dumps(codec.to_dict()))
    assert data.keys() == {"name", "configuration"}
    twin = codec_from_dict(data)
    assert type(twin) is type(codec)
    assert twin == codec
    assert hash(twin) == hash(codec)
    assert twin.to_dict() == codec.to_dict()
    hidden_states = torch.randn(2, 3, 4)
    assert twin.encode(hidden_states) == codec.encode(hidden_states)


@pytest.mark.parametrize("codec", ALL_CODECS, ids=repr)
def test_repr_shows_the_configuration_and_codecs_are_values(codec) -> None:
    assert eval(repr(codec), {type(codec).__name__: type(codec)}) == codec
    for field in dataclasses.fields(codec):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(codec, field.name, None)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "gzip", "configuration": {}}, r"Unknown codec 'gzip'; known are \["),
        ({}, "Unknown codec None"),
        ({"name": "lossless", "configuration": {"speed": 1}}, "does not take the configuration"),
        ({"name": "lossless", "configuration": {"level": 0}}, "from 1 to 22, got 0"),
        ({"name": "lossless", "configuration": {"level": 23}}, "from 1 to 22, got 23"),
        ({"name": "lossless", "configuration": {"level": 1.0}}, "got 1.0"),
        ({"name": "lossless", "configuration": {"level": "1"}}, "got '1'"),
        ({"name": "lossless", "configuration": [1]}, "does not take the configuration"),
    ],
)
def test_unknown_codecs_and_configurations_are_refused(data, words) -> None:
    with pytest.raises(UnsupportedSetupError, match=words):
        codec_from_dict(data)


def test_make_codec_takes_the_defaults() -> None:
    assert make_codec("lossless") == CODECS["lossless"]()
    with pytest.raises(UnsupportedSetupError, match="Unknown codec"):
        make_codec("auto-lossy")


def test_dtype_names_are_those_of_safetensors() -> None:
    assert {name: dtype_name(dtype) for name, dtype in DTYPES.items()} == {name: name for name in DTYPES}
    assert DTYPES["BF16"] is torch.bfloat16
    with pytest.raises((KeyError, StopIteration)):
        dtype_name(torch.int8)


# ---- Damage ----

SMALL = {
    "incompressible": torch.tensor([[[1.5, -2.25, 3e-5], [7e8, 0.1, -0.0]]]),
    "compressible": torch.ones(4, 3, 8),
    "empty": torch.zeros(0, 3, 8),
}
every_codec_and_content = pytest.mark.parametrize("content", SMALL)
every_codec = pytest.mark.parametrize("codec", ALL_CODECS, ids=repr)


def decoded_or_refused(codec: Codec, frames: list[bytes], like: torch.Tensor) -> torch.Tensor | None:
    """Any other exception than ``ValueError`` fails the test."""
    try:
        return codec.decode(frames, like.shape, like.dtype)
    except ValueError:
        return None


@every_codec
@every_codec_and_content
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_no_flipped_bit_gives_wrong_content(codec, content, dtype) -> None:
    """zstd's header has one bit that means nothing, so a flip may decode to the right content; never to a wrong one."""
    hidden_states = SMALL[content].to(dtype)
    frames = codec.encode(hidden_states)
    exact = bits(codec.decode(frames, hidden_states.shape, dtype))
    refused = total = 0
    for number, frame in enumerate(frames):
        for bit in range(8 * len(frame)):
            damaged = bytearray(frame)
            damaged[bit // 8] ^= 1 << bit % 8
            found = decoded_or_refused(codec, [*frames[:number], bytes(damaged), *frames[number + 1 :]], hidden_states)
            assert found is None or bits(found) == exact, (number, bit)
            refused += found is None
            total += 1
    assert total > 50
    assert refused > 0.98 * total


@every_codec
@every_codec_and_content
def test_every_truncation_and_every_trailing_byte_is_refused(codec, content) -> None:
    hidden_states = SMALL[content]
    frames = codec.encode(hidden_states)
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"abcd"
    for number, frame in enumerate(frames):
        altered = [frame[:length] for length in range(len(frame))]
        altered += [frame + rest for rest in (b"\0", frame, skippable, compress_frame(b"", 1))]
        altered += [skippable + frame, frame[1:], b"\0" * len(frame), compress_frame(b"", 1) + frame]
        for other in altered:
            damaged = [*frames[:number], other, *frames[number + 1 :]]
            assert decoded_or_refused(codec, damaged, hidden_states) is None, (number, other)


@every_codec
def test_wrong_numbers_and_sizes_of_frames_are_refused(codec) -> None:
    hidden_states = SMALL["incompressible"]
    frames = codec.encode(hidden_states)
    assert decoded_or_refused(codec, frames[:-1], hidden_states) is None
    assert decoded_or_refused(codec, [*frames, frames[0]], hidden_states) is None
    assert decoded_or_refused(codec, [], hidden_states) is None
    for shape in ((1, 2, 2), (1, 2, 4), (0, 2, 3), (2, 2, 3)):
        assert decoded_or_refused(codec, frames, hidden_states.new_zeros(shape)) is None
    assert decoded_or_refused(codec, frames, hidden_states.double()) is None


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
