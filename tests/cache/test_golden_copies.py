"""Predicted views in a cache of old: they decode to the same values, and today's code writes the same bytes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from support import tiny_copies

from hf_freezecache.cache.codec_state import load_copies
from hf_freezecache.cache.index import COPIES_NAME, INDEX_NAME, shard_name, table_name
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.cache.shard_file import read_shard_header
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.codecs.array_names import COPY, IS_COPY
from hf_freezecache.data.geometry import GEOMETRY_NAME

GOLDEN = Path(__file__).parents[1] / "golden" / "v2-copies"
GOLDEN_CACHE = GOLDEN / "k02-c9721ff71de814c4"
#: The permutation of five rows by seed 3. Written down, not computed.
ORDER = [2, 1, 3, 4, 0]
FILES = [INDEX_NAME, COPIES_NAME, *(name(view, 0) for name in (table_name, shard_name) for view in range(3))]


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def state(numbers: list[float], factors: tuple[float, float, float] = (1.0, 2.0, 4.0)) -> list[list[float]]:
    return [[1.0, 1.0, 1.0], *([number * factor for factor in factors] for number in numbers)]


def test_golden_files_are_all_there() -> None:
    assert sorted(files_of(GOLDEN)) == sorted(["environment.json", *(f"{GOLDEN_CACHE.name}/{name}" for name in FILES)])


def test_todays_reader_reads_the_golden_copies() -> None:
    plan = tiny_copies.make_plan()
    reader = CacheReader(GOLDEN_CACHE, expected=plan.fingerprint)
    assert reader.layout.order.tolist() == ORDER
    assert reader.index.copies == plan.copies.to_dict()
    assert reader.index.copies_calibration == {"storage": "residual"}
    assert reader.index.calibration is None
    assert not reader.views.lossless
    for view in range(3):
        for chunk in range(3):
            rows = ORDER[2 * chunk : 2 * chunk + 2]
            decoded = reader.read_chunk(view, chunk)
            expected = torch.tensor([state(tiny_copies.patches(row, view)) for row in rows])
            assert torch.equal(decoded.hidden_states, expected)
            assert decoded.extras["labels"].tolist() == [row % 3 for row in rows]
            assert decoded.extras[GEOMETRY_NAME].tolist() == [list(tiny_copies.GEOMETRIES[view])] * len(rows)
    assert verify_cache(GOLDEN_CACHE) == []
    copies = load_copies(GOLDEN_CACHE / COPIES_NAME, plan.fingerprint.digest)
    assert copies.codec == plan.copies
    for name, tensor in plan.copies.tensors().items():
        assert torch.equal(copies.codec.tensors()[name], tensor)


@pytest.mark.parametrize("view", [1, 2])
def test_the_golden_copies_hold_what_is_not_predicted(view) -> None:
    """By hand: true channels less (1, 1, 0) times what the base has at this place, less a quarter; the first token whole."""
    reader = CacheReader(GOLDEN_CACHE)
    packed = reader.entropy_decode_chunk(view, 0)
    residual = reader.views.copies.codec.dequantize(packed.arrays, reader.dtype, view=COPY)
    for row, found in zip(ORDER[:2], residual.tolist(), strict=True):
        true = state(tiny_copies.patches(row, view))
        places = state(tiny_copies.moved(row, view))
        expected = [[1.0, 1.0, 1.0]]
        for token in range(1, 5):
            (a, b, c), (x, y, _) = true[token], places[token]
            expected.append([a - x - 0.25, b - y - 0.25, c - 0.25])
        assert found == expected
    assert packed.arrays[IS_COPY].tolist() == [True, True]


def test_todays_writer_writes_the_golden_copies(tmp_path) -> None:
    """As for ``v2``: byte by byte under the versions of the libraries that wrote it, else by what files say."""
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN.parent / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recorded, current = json.loads((GOLDEN / "environment.json").read_text()), module.environment()
    directory = tiny_copies.build(tmp_path / "caches", batch_size=3).directory
    assert directory.name == GOLDEN_CACHE.name
    written, golden = files_of(directory), files_of(GOLDEN_CACHE)
    assert sorted(written) == sorted(golden) == sorted(FILES)
    for name in FILES:
        if name.endswith(".safetensors") and recorded["zstd"] != current["zstd"]:
            if name == COPIES_NAME:
                assert load_copies(directory / name).codec == load_copies(GOLDEN_CACHE / name).codec
                continue
            ours, theirs = read_shard_header(directory / name), read_shard_header(GOLDEN_CACHE / name)
            assert ours.metadata == theirs.metadata
        elif name.endswith(".safetensors") or recorded == current:
            assert written[name] == golden[name], name
        elif name.endswith(".parquet"):
            assert pq.read_table(directory / name).to_pydict() == pq.read_table(GOLDEN_CACHE / name).to_pydict()
