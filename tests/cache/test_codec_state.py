"""A lossy cache keeps its codec in a file of its own, and trusts nothing that it reads there."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from support import tiny_cache
from torch.utils.data import default_collate

from hf_freezecache.cache.codec_state import (
    CodecState,
    _checksum,
    load_state,
    save_state,
)
from hf_freezecache.cache.index import (
    CODEC_NAME,
    INDEX_NAME,
    FileRecord,
    load_index,
    save_index,
    shard_name,
    table_name,
)
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.cache.shard_file import file_sha256
from hf_freezecache.cache.shard_writer import CachePlan
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.codecs import (
    PRESETS,
    Codec,
)
from hf_freezecache.codecs.array_names import BASE, COPY, IS_COPY, main_array, side_array
from hf_freezecache.compression.step_search import fit_codec
from hf_freezecache.data.collators import collate_cached, split_packed
from hf_freezecache.dataset import CachedDataset
from hf_freezecache.errors import CacheCorruptError

GOLDEN_CACHE = Path(__file__).parents[1] / "golden" / "v2" / "k02-61fcedc61c1e8f04"
CALIBRATION = {
    "chosen_by": "distortion",
    "max_distortion": 0.0625,
    "source": "images",
    "sources": {},
    "target_bits": None,
}
GRID = (2, 2)
ORDER = [2, 5, 1, 3, 7, 4, 0, 6]  # the chunks are rows 2 5 1, rows 3 7 4 and rows 0 6
FINGERPRINT = tiny_cache.make_plan().fingerprint.digest


def prefix(pixel_values: torch.Tensor) -> torch.Tensor:
    """(batch, 1, 1, 2) -> (batch, 5, 6): waves of the row and of the draw; one prefix token, four patches."""
    row, draw = pixel_values[:, 0, 0, :].T
    tokens, hidden = torch.arange(5.0)[:, None], torch.arange(6.0)
    angle = row[:, None, None] * (tokens + 1) / 3 + draw[:, None, None] * (hidden + 1) / 40
    return torch.sin(angle) * 2.0**-hidden + torch.cos(tokens + hidden)


def with_outlier(pixel_values: torch.Tensor) -> torch.Tensor:
    """Row 7 has a patch, and row 5 a prefix token, that no step of its codec could keep."""
    states = prefix(pixel_values)
    states[pixel_values[:, 0, 0, 0] == 7, 3, 2] = 1e20
    states[pixel_values[:, 0, 0, 0] == 5, 0, 1] = -1e20
    return states


def fitted(seed: int = 0, step: float | None = None) -> Codec:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(32, 1, 1, 2, generator=generator) * torch.tensor([8.0, 2000.0])
    codec = fit_codec(PRESETS["transform"], prefix(images), 1, GRID)
    return codec if step is None else codec.with_step_size(step)


def plan_of(codec: Codec | None = None, **changes: Any) -> CachePlan:
    return dataclasses.replace(
        tiny_cache.make_plan(), **{"codec": codec or fitted(), "calibration": CALIBRATION, **changes}
    )


def states_of(rows: list[int], view: int, states=prefix) -> torch.Tensor:
    views = tiny_cache.make_views(tiny_cache.make_plan())
    return states(torch.stack([views[row, view]["pixel_values"] for row in rows]))


def same_codec(a: Codec, b: Codec) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return a == b and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return fitted()


@pytest.fixture
def path(tmp_path, codec) -> Path:
    save_state(tmp_path / CODEC_NAME, FINGERPRINT, CodecState(codec, CALIBRATION))
    return tmp_path / CODEC_NAME


@pytest.fixture
def cache(tmp_path, codec) -> Path:
    return tiny_cache.build(tmp_path / "caches", plan_of(codec), prefix=prefix).directory


# ---- The file alone ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_fitted_codec_comes_back(path, codec, dtype) -> None:
    state = load_state(path, FINGERPRINT)
    assert same_codec(state.codec, codec)
    assert state.calibration == CALIBRATION
    states = states_of(ORDER, 0).to(dtype)
    frames = codec.encode(states)
    assert state.codec.encode(states) == frames
    assert torch.equal(state.codec.decode(frames, states.shape, dtype), codec.decode(frames, states.shape, dtype))


def test_the_file_is_small_valid_safetensors(path, codec) -> None:
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"0.basis", "0.scale", "0.mean"}
        (document,) = map(json.loads, file.metadata().values())
        assert document.keys() == {"format_version", "fingerprint", "codec", "calibration", "tensors", "checksum"}
        assert document["codec"] == codec.to_dict()
        assert all(file.get_tensor(name).dtype == torch.uint8 for name in file.keys())  # noqa: SIM118
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["fp16", "int8", "transform"])
def test_codecs_without_tensors_come_back(tmp_path, name) -> None:
    save_state(tmp_path / "state", "a", CodecState(PRESETS[name], {}))
    assert load_state(tmp_path / "state", "a") == CodecState(PRESETS[name], {})


def test_the_state_of_another_cache_is_refused(path) -> None:
    assert load_state(path).calibration == CALIBRATION
    with pytest.raises(CacheCorruptError, match=r"codec\.safetensors belongs to another cache"):
        load_state(path, tiny_cache.make_plan(data="others").fingerprint.digest)


def flips(path: Path) -> Iterator[tuple[int, bytes]]:
    """Flip one bit of each byte in turn."""
    raw = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for position, value in enumerate(raw):
            os.pwrite(file.fileno(), bytes([value ^ 1 << position % 8]), position)
            yield position, raw
            os.pwrite(file.fileno(), bytes([value]), position)


def test_no_flipped_bit_gives_another_state_or_another_error(path, codec) -> None:
    """A build that goes on reads the file before any index vouches for it."""
    read = 0
    for position, _ in flips(path):
        try:
            state = load_state(path, FINGERPRINT)
        except CacheCorruptError:
            continue
        read += 1
        assert same_codec(state.codec, codec), position
        assert state.calibration == CALIBRATION, position
    assert read < 20  # spaces, and letters of the name of the checksum


def test_truncated_and_foreign_files_are_refused(path, tmp_path) -> None:
    raw = path.read_bytes()
    for length in [*range(0, len(raw), 13), len(raw) - 1]:
        path.write_bytes(raw[:length])
        with pytest.raises(CacheCorruptError, match="is damaged"):
            load_state(path)
    contents: list[bytes] = [
        b"hello",
        bytes(1000),
        raw + b"0",
        safetensors.torch.save({"weight": torch.zeros(3)}),
        safetensors.torch.save({}, {"format": "pt"}),
        safetensors.torch.save({}, {"format": "hf_freezecache"}),
        (GOLDEN_CACHE / shard_name(0, 0)).read_bytes(),
        (GOLDEN_CACHE / INDEX_NAME).read_bytes(),
    ]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CacheCorruptError, match="is damaged"):
            load_state(path)
    path.unlink()
    with pytest.raises(CacheCorruptError, match="is missing"):
        load_state(path)


def rewrite(path: Path, drop: str | None = None, **changes: Any) -> None:
    """Replace entries of the document, and its checksum."""
    with safe_open(path, framework="pt") as file:
        document = {**json.loads(file.metadata()["hf_freezecache"]), **changes}
        frames = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    document.pop(drop, None)
    document["checksum"] = _checksum(document)
    path.write_bytes(safetensors.torch.save(frames, {"hf_freezecache": json.dumps(document)}))


def test_the_same_state_gives_the_same_file(path, codec) -> None:
    before = path.read_bytes()
    for _ in range(8):
        save_state(path, FINGERPRINT, CodecState(codec, CALIBRATION))
        assert path.read_bytes() == before


TENSORS = {"0.basis": ["int8", [6, 6]], "0.mean": ["int32", [4, 6]], "0.scale": ["float32", [6]]}


@pytest.mark.parametrize("name", ["format_version", "codec", "calibration", "tensors", "fingerprint"])
def test_missing_metadata_is_damage(path, name) -> None:
    rewrite(path)
    load_state(path, FINGERPRINT)
    rewrite(path, drop=name)
    with pytest.raises(CacheCorruptError, match="is damaged"):
        load_state(path, FINGERPRINT)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 1},
        {"format_version": 3},
        {"codec": "not json"},
        {"codec": []},
        {"codec": {"name": "pipeline", "configuration": {"steps": ["planes", "zstd"]}}},
        {"codec": {"name": "zip"}},
        {"calibration": []},
        {"calibration": 3},
        {"tensors": []},
        {"tensors": {}},
        {"tensors": {name: spec for name, spec in TENSORS.items() if name != "0.mean"}},
        {"tensors": {**TENSORS, "0.other": ["int8", [1]]}},
        *(
            {"tensors": {**TENSORS, "0.mean": spec}}
            for spec in (
                ["int32", [24]],
                ["int32", [6, 4]],
                ["int32", [-4, -6]],
                ["int32", [-1, -24]],
                ["int32", [4.0, 6.0]],
                ["int32", [4, 6, 1]],
                ["int32", [4, "6"]],
                ["int32", []],
                ["int32", 24],
                ["int32"],
                [None, [4, 6]],
                ["float32", [4, 6]],
                ["complex64", [2, 6]],
                ["qint32", [4, 6]],
                ["nn", [4, 6]],
                ["no such dtype", [4, 6]],
                7,
            )
        ),
    ],
    ids=lambda changes: json.dumps(changes)[:60],
)
def test_metadata_that_make_no_codec_are_damage(path, changes) -> None:
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["hf_freezecache"])["tensors"] == TENSORS
    rewrite(path, **changes)
    with pytest.raises(CacheCorruptError, match="is damaged"):
        load_state(path, FINGERPRINT)


@pytest.mark.parametrize(
    "shape", [[2**40, 6], [2**62, 2**62], [2**29, 1], [16 * 2**20, 16], [2**63, 0], [10**30]], ids=str
)
def test_claimed_sizes_take_no_memory(path, shape) -> None:
    rewrite(path, tensors={**TENSORS, "0.mean": ["int32", shape]})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CacheCorruptError, match="is damaged"):
        load_state(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@pytest.mark.parametrize("claimed", [0, 1, 2**20, 2**32, 2**63, 2**64 - 1])
def test_a_header_that_claims_another_size_is_refused_unread(path, claimed) -> None:
    path.write_bytes(struct.pack("<Q", claimed) + path.read_bytes()[8:])
    with pytest.raises(CacheCorruptError, match="is damaged"):
        load_state(path)


def test_a_huge_file_is_refused_unread(path) -> None:
    os.truncate(path, 2**30 + 1)  # sparse: takes no room
    with pytest.raises(CacheCorruptError, match=f"{2**30 + 1} bytes, expected at most {2**30}"):
        load_state(path)


# ---- In a cache ----


def test_a_lossy_cache_names_its_state_and_keeps_its_calibration(cache, codec) -> None:
    index = load_index(cache)
    assert index.calibration == CALIBRATION
    assert index.codec == codec.to_dict()
    assert index.files.keys() == {
        CODEC_NAME,
        *(name(view, shard) for name in (table_name, shard_name) for view in range(2) for shard in range(2)),
    }
    assert index.files[CODEC_NAME].bytes == (cache / CODEC_NAME).stat().st_size
    assert load_state(cache / CODEC_NAME, FINGERPRINT).calibration == CALIBRATION
    assert verify_cache(cache) == []
    reader = CacheReader(cache, expected=tiny_cache.make_plan().fingerprint)
    assert same_codec(reader.codec, codec)
    assert not reader.codec.lossless


def test_a_lossless_cache_has_a_state_only_if_calibration_chose_it(tmp_path) -> None:
    """What older readers know stays as it was; where no lossy codec was good enough, the report of that is kept."""
    plain = tiny_cache.build(tmp_path / "a", tiny_cache.make_plan()).directory
    given = tiny_cache.build(tmp_path / "b", plan_of(PRESETS["lossless"])).directory
    for directory in (plain, GOLDEN_CACHE):
        document = json.loads((directory / INDEX_NAME).read_bytes())
        assert "calibration" not in document
        assert CODEC_NAME not in document["files"]
        assert not (directory / CODEC_NAME).exists()
        assert load_index(directory).calibration is None
    assert load_index(given).calibration == CALIBRATION
    assert CacheReader(given).codec == PRESETS["lossless"]
    assert verify_cache(plain) == verify_cache(given) == []
    for golden in sorted(GOLDEN_CACHE.rglob("*.safetensors")):
        name = golden.relative_to(GOLDEN_CACHE)
        assert (plain / name).read_bytes() == (given / name).read_bytes()


@pytest.mark.parametrize("calibration", [None, {}])
def test_a_codec_that_was_not_calibrated_has_a_state_too(tmp_path, calibration) -> None:
    cache = tiny_cache.build(tmp_path, plan_of(PRESETS["int8"], calibration=calibration), prefix=prefix).directory
    assert load_index(cache).calibration == {}
    assert verify_cache(cache) == []
    assert CacheReader(cache).codec == PRESETS["int8"]


@pytest.mark.parametrize("states", [prefix, with_outlier])
def test_chunks_are_what_the_codec_makes_of_the_states(tmp_path, codec, states) -> None:
    reader = CacheReader(tiny_cache.build(tmp_path, plan_of(codec), prefix=states).directory)
    for view in range(2):
        for chunk in range(3):
            rows = ORDER[3 * chunk : 3 * chunk + 3]
            exact = states_of(rows, view, states)
            decoded = reader.read_chunk(view, chunk)
            expected = codec.decode(codec.encode(exact), exact.shape, exact.dtype)
            assert torch.equal(decoded.hidden_states, expected)
            assert decoded.extras["labels"].tolist() == [row % 3 for row in rows]
            error = (decoded.hidden_states - exact).double().square().mean((1, 2)).sqrt()
            assert (error <= codec.error_bound(exact)).all()
            assert error.max() > 0


@pytest.mark.slow
def test_every_flipped_bit_of_the_state_is_found_when_a_cache_is_opened(cache) -> None:
    found = 0
    for position, _ in flips(cache / CODEC_NAME):
        with pytest.raises(CacheCorruptError, match=CODEC_NAME):
            CacheReader(cache)
        found += 1
        if position % 41 == 0:
            (problem,) = verify_cache(cache)
            assert str(cache / CODEC_NAME) in problem
    assert found == load_index(cache).files[CODEC_NAME].bytes
    assert verify_cache(cache) == []
    CacheReader(cache)


def test_a_missing_or_truncated_state_is_named(cache) -> None:
    path = cache / CODEC_NAME
    raw = path.read_bytes()
    for content in (b"", raw[:-1], raw + b"0", None):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        (problem,) = verify_cache(cache)
        assert str(path) in problem
        with pytest.raises(CacheCorruptError, match=CODEC_NAME):
            CacheReader(cache)


def bless(cache: Path, **changes: Any) -> None:
    """Let the index name the files as they are now."""
    index = load_index(cache)
    record = FileRecord((cache / CODEC_NAME).stat().st_size, file_sha256(cache / CODEC_NAME))
    save_index(cache, dataclasses.replace(index, **{"files": {**index.files, CODEC_NAME: record}, **changes}))


def test_a_state_that_the_index_does_not_mean_is_refused(cache) -> None:
    path = cache / CODEC_NAME
    save_state(path, FINGERPRINT, CodecState(fitted(seed=1), CALIBRATION))
    bless(cache)
    with pytest.raises(CacheCorruptError, match=r"holds another codec than index\.json names"):
        CacheReader(cache)
    save_state(path, "another", CodecState(fitted(), CALIBRATION))
    bless(cache)
    with pytest.raises(CacheCorruptError, match="belongs to another cache"):
        CacheReader(cache)
    assert any("belongs to another cache" in problem for problem in verify_cache(cache))


def test_a_codec_that_no_shard_was_encoded_with_is_refused(cache) -> None:
    other = fitted(seed=1)
    save_state(cache / CODEC_NAME, FINGERPRINT, CodecState(other, CALIBRATION))
    bless(cache, codec=other.to_dict())
    with pytest.raises(CacheCorruptError, match="does not hold the samples"):
        CacheReader(cache).read_chunk(0, 0)
    problems = verify_cache(cache)
    assert len(problems) == 4
    assert all("was encoded with" in problem for problem in problems)


def test_an_index_that_leaves_the_state_out_gives_no_wrong_values(cache) -> None:
    index = load_index(cache)
    files = {name: record for name, record in index.files.items() if name != CODEC_NAME}
    save_index(cache, dataclasses.replace(index, files=files, calibration=None))
    with pytest.raises(CacheCorruptError, match=r"names a lossy codec but no codec\.safetensors"):
        CacheReader(cache)
    assert verify_cache(cache) != []
    save_index(cache, dataclasses.replace(index, files=files))
    with pytest.raises(CacheCorruptError, match="files missing from it"):
        CacheReader(cache)


# ---- Packed items ----


@pytest.mark.parametrize(
    ("preset", "states"),
    [("fitted", prefix), ("fitted", with_outlier), ("int8", prefix), ("int8", with_outlier), ("fp16", prefix)],
)
def test_packed_items_restore_to_the_decoded_ones(tmp_path, codec, states, preset) -> None:
    """Rows 5 and 7 of two chunks hold tokens stored as they are, the third chunk holds none: batches mix them all."""
    plan = plan_of(codec if preset == "fitted" else PRESETS[preset])
    reader = CacheReader(tiny_cache.build(tmp_path, plan, prefix=states).directory)
    plain, packed = CachedDataset(reader), CachedDataset(reader, packed=True)
    keys = [(row, view) for row in range(8) for view in range(2)]
    random.Random(0).shuffle(keys)
    batches = [keys[:7], keys[7:], [(0, 0), (6, 1)], [(7, 0)], [(0, 1), (7, 1), (5, 0), (2, 1)]]
    for batch in batches:
        expected = collate_cached(plain.__getitems__(batch))
        collated = collate_cached(packed.__getitems__(batch))
        arrays, extras = split_packed(collated)
        assert arrays.keys() | extras.keys() == collated.keys()
        restored = reader.codec.dequantize(arrays, reader.dtype)
        assert restored.dtype == expected["hidden_states"].dtype
        assert torch.equal(restored, expected.pop("hidden_states"))
        assert extras.keys() == expected.keys() == {"labels", "mask", "weights"}
        assert all(torch.equal(extras[name], expected[name]) for name in extras)
        if preset == "fitted":
            assert (side_array(BASE, 0, "exact") in arrays) == (
                states is with_outlier and any(row not in (0, 6) for row, _ in batch)
            )
            exact = torch.cat([states_of([row], view, states) for row, view in batch])
            assert torch.equal(restored.abs() > 1e19, exact.abs() > 1e19)


def test_splitting_a_batch_keeps_what_is_not_packed() -> None:
    value, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    main, side = main_array(BASE), side_array(COPY, 0, "prefix")
    batch = {main: value, side: value, IS_COPY: value, "labels": labels, "unpacked": value, "note": "text"}
    packed, rest = split_packed(batch)
    assert packed.keys() == {main, side, IS_COPY}
    assert rest.keys() == {"labels", "unpacked", "note"}
    assert packed[main] is value
    assert rest["labels"] is labels
    assert split_packed({"labels": labels})[0] == {}


def test_collating_fills_what_only_some_items_carry() -> None:
    items = [
        {"labels": torch.tensor(1), "packed.a": torch.ones(2)},
        {"labels": torch.tensor(2), "packed.a": torch.ones(2), "packed.b": torch.tensor([True, True])},
        {"labels": torch.tensor(3), "packed.a": torch.ones(2)},
    ]
    batch = collate_cached(items)
    assert batch["labels"].tolist() == [1, 2, 3]
    assert batch["packed.a"].tolist() == [[1, 1]] * 3
    assert batch["packed.b"].tolist() == [[False, False], [True, True], [False, False]]
    assert batch["packed.b"].dtype is torch.bool
    assert "packed.b" not in collate_cached(items[:1])


# ---- Going on with a build ----


class Stop(Exception):
    pass


def interrupt(cache_dir: Path, plan: CachePlan, after: int) -> Path:
    """Stop a build in the shard behind ``after`` finished ones."""
    rows = 0

    def collate(examples: list[Any]) -> dict[str, torch.Tensor]:
        nonlocal rows
        rows += len(examples)
        if rows > (0, 6, 8, 14)[after]:
            raise Stop
        return default_collate(examples)

    with pytest.raises(Exception, match="Stop"):
        tiny_cache.build(cache_dir, plan, batch_size=2, prefix=prefix, collate=collate)
    return cache_dir / plan.name


def test_the_state_is_there_before_any_shard(tmp_path, codec) -> None:
    directory = interrupt(tmp_path, plan_of(codec), after=0)
    assert load_state(directory / CODEC_NAME, FINGERPRINT).calibration == CALIBRATION
    assert not (directory / INDEX_NAME).exists()
    assert not list(directory.rglob("shard-*.safetensors"))


def test_a_build_with_the_same_codec_keeps_finished_shards(tmp_path, codec) -> None:
    directory = interrupt(tmp_path, plan_of(codec), after=2)
    kept = {path: path.stat().st_mtime_ns for path in directory.rglob("*.safetensors")}
    assert len(kept) == 3
    # As read from the file, by another process.
    plan = plan_of(load_state(directory / CODEC_NAME, FINGERPRINT).codec)
    report = tiny_cache.build(tmp_path, plan, prefix=prefix)
    assert (report.kept_shards, report.built_shards) == (2, 2)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert verify_cache(directory) == []
    whole = tiny_cache.build(tmp_path / "whole", plan, prefix=prefix).directory
    for path in directory.rglob("shard-*.safetensors"):
        assert path.read_bytes() == (whole / path.relative_to(directory)).read_bytes()


@pytest.mark.parametrize("other", [fitted(seed=1), fitted(step=0.25), PRESETS["int8"]], ids=["fit", "step", "int8"])
def test_a_build_with_another_codec_builds_all_shards_anew(tmp_path, codec, other) -> None:
    directory = interrupt(tmp_path, plan_of(codec), after=2)
    report = tiny_cache.build(tmp_path, plan_of(other), prefix=prefix)
    assert (report.kept_shards, report.built_shards) == (0, 4)
    assert verify_cache(directory) == []
    reader = CacheReader(directory)
    assert same_codec(reader.codec, other)
    exact = states_of(ORDER[:3], 1)
    assert torch.equal(
        reader.read_chunk(1, 0).hidden_states, other.decode(other.encode(exact), exact.shape, exact.dtype)
    )


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_build_mends_a_damaged_state_and_keeps_its_shards(tmp_path, codec, damage) -> None:
    directory = interrupt(tmp_path, plan_of(codec), after=1)
    path = directory / CODEC_NAME
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw[:-1] if damage == "truncated" else raw)
    if damage == "missing":
        path.unlink()
    report = tiny_cache.build(tmp_path, plan_of(codec), prefix=prefix)
    assert (report.kept_shards, report.built_shards) == (1, 3)
    assert verify_cache(directory) == []
    assert same_codec(CacheReader(directory).codec, codec)


def test_a_build_rebuilds_a_lossy_shard_whose_frames_are_damaged(tmp_path, codec) -> None:
    directory = interrupt(tmp_path, plan_of(codec), after=2)
    path = directory / shard_name(0, 1)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert tiny_cache.build(tmp_path, plan_of(codec), prefix=prefix).kept_shards == 1
    assert verify_cache(directory) == []
