"""``docs/format.md`` is enough to write a reader: one that shares no code with this package reads the same values."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support import hostile, independent_reader, tiny_cache, tiny_copies
from torch.utils.data import default_collate

from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.cache.writer import build_cache
from hf_freezecache.codecs import PRESETS, STEPS, Cast, Codec, CopyCodec, Pack, Predictor, Quantize, Zstd
from hf_freezecache.data.collators import CheckedCollator

GOLDEN = Path(__file__).parents[1] / "golden"
DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
GOLDEN_CACHES = {"lossless": "v2/k02-61fcedc61c1e8f04", "copies": "v2-copies/k02-c9721ff71de814c4"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    return hostile.sound_caches(tmp_path_factory.mktemp("sound"))


def assert_reads_the_same(directory: Path, tolerance: float = 0.0) -> None:
    reader, other = CacheReader(directory), independent_reader.Cache(directory)
    for view in range(reader.index.num_views):
        chunks = list(other.chunks(view))
        assert len(chunks) == reader.layout.num_chunks
        for chunk, (rows, states, extras) in enumerate(chunks):
            decoded = reader.read_chunk(view, chunk)
            assert rows == reader.members(chunk).tolist()
            expected = decoded.hidden_states.numpy()
            assert (states.dtype, states.shape) == (expected.dtype, expected.shape)
            np.testing.assert_allclose(states, expected, rtol=0, atol=tolerance)
            assert sorted(extras) == sorted(decoded.extras)
            for name, values in extras.items():
                assert np.array_equal(values, decoded.extras[name].numpy()), name


@pytest.mark.parametrize("name", ["lossless", "copies"])
def test_golden_caches_are_read(name) -> None:
    assert_reads_the_same(GOLDEN / GOLDEN_CACHES[name])


@pytest.mark.parametrize("name", ["int8", "few_tokens"])
def test_built_caches_are_read(sound, name) -> None:
    assert_reads_the_same(sound[name])


def test_a_cache_of_a_fitted_transform_is_read(sound) -> None:
    """To the rounding of float32: the document leaves the order of sums open."""
    assert_reads_the_same(sound["transform"], 1e-5)


def test_tokens_that_are_stored_as_they_are_are_read(tmp_path) -> None:
    """One patch and one prefix token that no step of the transform can keep."""

    def prefix(pixel_values: torch.Tensor) -> torch.Tensor:
        states = hostile.prefix(pixel_values)
        states[pixel_values[:, 0, 0, 0] == 7, 3, 2] = 1e20
        states[pixel_values[:, 0, 0, 0] == 5, 0, 1] = -1e20
        return states

    plan = dataclasses.replace(tiny_cache.make_plan(codec="outliers"), codec=hostile.fitted(), calibration={})
    directory = tiny_cache.build(tmp_path, plan, prefix=prefix).directory
    assert_reads_the_same(directory, 1e-5)
    largest = [float(abs(states).max()) for _, states, _ in independent_reader.Cache(directory).chunks(0)]
    assert largest == [float(np.float32(1e20))] * 2 + [pytest.approx(1, abs=0.5)]


def test_views_that_are_predicted_across_channels_are_read(tmp_path) -> None:
    plan = tiny_copies.make_plan()
    keys = [(row, view) for row in range(5) for view in (0, 1)]
    states = tiny_copies.prefix(torch.stack([tiny_copies.Views()[key]["pixel_values"] for key in keys]))
    geometry = torch.tensor(tiny_copies.GEOMETRIES[:2]).expand(5, 2, 5)
    predictor = Predictor(0.5, True, 1, (2, 2)).fit(states[0::2], geometry, states[1::2])
    plan = dataclasses.replace(plan, copies=CopyCodec(PRESETS["int8"], predictor))
    directory = build_cache(
        tmp_path, plan, tiny_copies.Views(), CheckedCollator(default_collate), tiny_copies.prefix, batch_size=4
    ).directory
    assert_reads_the_same(directory, 1e-5)


@pytest.mark.parametrize("codec", ["fp16", "int4", "zones", "cast then int8"])
def test_caches_of_other_codecs_are_read(tmp_path, codec) -> None:
    """``zones``: enough positions for several ranges, and values for all classes and exceptions."""
    made = {
        "zones": Codec((Quantize(8), Pack(3), Zstd())),
        "cast then int8": Codec((Cast("F16"), Quantize(8), Pack(), Zstd())),
    }.get(codec) or PRESETS[codec]

    def prefix(pixel_values: torch.Tensor) -> torch.Tensor:
        row, draw = pixel_values[:, 0, 0, :].T
        tokens, hidden = torch.arange(50.0)[:, None], torch.arange(8.0)
        waves = torch.sin(row[:, None, None] * (tokens + 1) / 3 + draw[:, None, None] * (hidden + 1) / 40)
        # Higher powers leave more values near zero, and a few large ones.
        return waves ** (1 + 4 * hidden.long())

    plan = dataclasses.replace(tiny_cache.make_plan(codec=codec), codec=made, calibration={})
    assert_reads_the_same(tiny_cache.build(tmp_path, plan, prefix=prefix).directory)


@pytest.mark.parametrize("name", ["int8", "transform", "few_tokens"])
def test_hashes_are_those_of_the_document(sound, name) -> None:
    directory = sound[name]
    document = json.loads((directory / "index.json").read_text())
    assert (directory / "index.json").read_text() == json.dumps(document, sort_keys=True, indent=1) + "\n"
    checksum = document.pop("checksum")
    assert hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest() == checksum
    digest = hashlib.sha256(json.dumps(document["fingerprint"], sort_keys=True).encode()).hexdigest()
    assert directory.name == f"k{document['split_point']:02d}-{digest[:16]}"
    order = np.random.default_rng([document["layout_seed"], 0xC4]).permutation(document["num_samples"])
    stored = [row for rows, _, _ in independent_reader.Cache(directory).chunks(0) for row in rows]
    assert stored == order.tolist()
    for path, record in document["files"].items():
        content = (directory / path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (record["bytes"], record["sha256"])
        if path.startswith("view"):
            header = content[: record["header_bytes"]]
            assert hashlib.sha256(header).hexdigest() == record["header_sha256"]
            metadata, _ = independent_reader.read_safetensors(directory / path)
            assert metadata["fingerprint"] == digest
        else:
            assert (record["header_bytes"], record["header_sha256"]) == (0, "")


def keys_of_table(start: str) -> set[str]:
    """The names in the first column of the first table behind a text."""
    rows = DOCUMENT.read_text().split(start)[1].split("|---", 1)[1].split("\n\n")[0].splitlines()[1:]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_the_document_names_every_key(sound) -> None:
    required = set(json.loads((sound["lossless"] / "index.json").read_text()))
    optional = {"calibration", "copies", "copies_calibration", "rows"}
    assert keys_of_table("\n## index.json\n") == required | optional
    metadata, _ = independent_reader.read_safetensors(sound["transform"] / "codec.safetensors")
    assert keys_of_table("\n### States of codecs\n") == set(json.loads(metadata["hf_freezecache"]))
    metadata, _ = independent_reader.read_safetensors(sound["transform"] / "view-00" / "shard-00000.safetensors")
    assert keys_of_table("The metadata (`__metadata__` of the JSON header) are texts:") == set(metadata)


def test_the_document_names_every_step() -> None:
    assert set(re.findall(r"^\*\*(\w+)\b", DOCUMENT.read_text(), re.M)) - {"Unknown"} == set(STEPS)


def test_the_independent_reader_is_independent() -> None:
    tree = ast.parse(Path(independent_reader.__file__).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported == {
        "__future__",
        "collections",
        "itertools",
        "json",
        "math",
        "numpy",
        "pathlib",
        "struct",
        "typing",
        "zstandard",
    }
