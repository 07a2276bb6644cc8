"""Caches from an attacker who knows the format: refused at once, by name, in little memory; see ``hostile.CASES``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import hostile

from hf_freezecache.cache.index import (
    INDEX_NAME,
    shard_name,
    table_name,
)
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.compression.step_search import fit_codec
from hf_freezecache.dataset import CachedDataset
from hf_freezecache.errors import (
    CacheCorruptError,
    UnsupportedSetupError,
)

SECONDS = 1.0
MEMORY = 200 * 2**20


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    return hostile.sound_caches(tmp_path_factory.mktemp("sound"))


def test_there_are_enough_cases() -> None:
    assert len(hostile.CASES) - len(hostile.ONLY_VERIFIED) >= 100


@pytest.mark.parametrize("name", ["lossless", "copies", "int8", "transform", "few_tokens"])
def test_sound_caches_are_read(sound, name) -> None:
    """The other tests would pass on a reader that refuses all."""
    hostile.read_all(sound[name])
    assert verify_cache(sound[name]) == []


@pytest.mark.parametrize("name", ["lossless", "copies", "int8", "transform", "few_tokens"])
def test_sealing_a_sound_cache_leaves_it_sound(sound, name, tmp_path) -> None:
    """So that what is refused is the tampering, and not the tools."""
    cache = Path(shutil.copytree(sound[name], tmp_path / "cache"))
    hostile.Shard(cache).write()
    if name == "transform":
        hostile.set_transform(cache)
    if name == "copies":
        hostile.set_predictor(cache)
        hostile.seal(cache, copies_calibration={"storage": "residual"})
    if name == "few_tokens":
        hostile.set_tokens(cache, 8)
    hostile.read_all(cache)
    assert verify_cache(cache) == []


@pytest.mark.by_default(42)
@pytest.mark.parametrize("name", hostile.CASES)
def test_refused(sound, name, tmp_path) -> None:
    cache = hostile.make_hostile(name, sound, tmp_path)
    if name in hostile.ONLY_VERIFIED:
        hostile.read_all(cache)
    else:
        started = time.perf_counter()
        with pytest.raises((CacheCorruptError, UnsupportedSetupError)) as caught:
            hostile.read_all(cache)
        seconds = time.perf_counter() - started
        assert str(cache) in str(caught.value) or isinstance(caught.value, UnsupportedSetupError)
        assert len(str(caught.value)) < 3000
        assert seconds < SECONDS
    started = time.perf_counter()
    problems = verify_cache(cache)
    assert time.perf_counter() - started < (3 if name.endswith("nothing") else SECONDS)
    assert problems
    assert all(isinstance(problem, str) and len(problem) < 3000 for problem in problems)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux")
def test_no_case_takes_much_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "support.hostile"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert peaks.keys() == hostile.CASES.keys()
    assert {name: peak for name, peak in peaks.items() if peak > MEMORY} == {}


# ---- Links that are meant ----


def hub_layout(cache: Path, repo: Path) -> Path:
    """As ``huggingface_hub`` keeps what it downloads: a snapshot of links into blobs."""
    snapshot, blobs = repo / "snapshots" / "0123abc", repo / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(p for p in sorted(cache.rglob("*")) if p.is_file()):
        shutil.copy(path, blobs / f"{number:040x}")
        link = snapshot / path.relative_to(cache)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / f"{number:040x}", link.parent))
    return snapshot


def test_a_snapshot_of_the_hub_is_read(sound, tmp_path) -> None:
    snapshot = hub_layout(sound["transform"], tmp_path / "datasets--user--name")
    hostile.read_all(snapshot)
    assert verify_cache(snapshot) == []


def test_a_link_of_a_snapshot_to_elsewhere_is_refused(sound, tmp_path) -> None:
    snapshot = hub_layout(sound["lossless"], tmp_path / "datasets--user--name")
    shutil.move(snapshot.parents[1] / "blobs", tmp_path / "blobs")
    (snapshot.parents[1] / "blobs").symlink_to(tmp_path / "blobs")
    with pytest.raises(CacheCorruptError, match="outside of the cache"):
        CacheReader(snapshot)
    assert "outside of the cache" in verify_cache(snapshot)[0]


def test_blobs_beside_another_folder_are_outside(sound, tmp_path) -> None:
    snapshot = hub_layout(sound["lossless"], tmp_path / "repo")
    other = snapshot.parent.rename(snapshot.parents[1] / "caches") / snapshot.name
    with pytest.raises(CacheCorruptError, match="outside of the cache"):
        CacheReader(other)


def test_links_within_a_cache_and_to_it_are_fine(sound, tmp_path) -> None:
    cache = Path(shutil.copytree(sound["lossless"], tmp_path / "disk" / "cache"))
    (cache / shard_name(0, 0)).rename(cache / "moved")
    (cache / shard_name(0, 0)).symlink_to("../moved")
    (tmp_path / "link").symlink_to(cache, target_is_directory=True)
    hostile.read_all(tmp_path / "link")
    assert verify_cache(tmp_path / "link") == [f"{tmp_path / 'link' / 'moved'} does not belong to the cache."]


def test_verify_names_links_and_pipes_that_do_not_belong(sound, tmp_path) -> None:
    cache = Path(shutil.copytree(sound["lossless"], tmp_path / "cache"))
    (cache / "more").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(cache / "pipe")
    assert verify_cache(cache) == [f"{cache / name} does not belong to the cache." for name in ("more", "pipe")]


# ---- Files that go away ----


@pytest.fixture
def opened(sound, tmp_path) -> CachedDataset:
    cache = Path(shutil.copytree(sound["lossless"], tmp_path / "cache"))
    dataset = CachedDataset.from_pretrained(cache)
    dataset[2]  # of the first chunk, whose shard's header is known from now on
    return dataset


def test_a_cache_deleted_while_in_use_says_what_to_do(opened) -> None:
    shutil.rmtree(opened.reader.directory)
    for row in (2, 3, 0):  # of a chunk that was read, of a shard that was opened, and of another
        opened._chunks.clear()
        with pytest.raises(
            CacheCorruptError, match=r"shard-0000\d.safetensors is missing.*run the same training again"
        ):
            opened[row]
    with pytest.raises(CacheCorruptError, match="no finished cache"):
        CacheReader(opened.reader.directory)
    assert "no finished cache" in verify_cache(opened.reader.directory)[0]


def test_a_file_that_shrinks_while_in_use_is_damage(opened) -> None:
    opened._chunks.clear()
    os.truncate(opened.reader.directory / shard_name(0, 0), opened.reader._headers[0, 0].header_bytes + 10)
    with pytest.raises(CacheCorruptError, match=r"shard-00000.safetensors is damaged in chunk 0: \d+ bytes left of"):
        opened[2]


@pytest.mark.parametrize("call", ["open", "pread"])
def test_errors_of_the_disk_name_the_file(opened, monkeypatch, call) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    opened._chunks.clear()
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CacheCorruptError, match=r"shard-00000.safetensors cannot be read: .*Input/output error.*Check"):
        opened[2]
    monkeypatch.undo()
    assert opened[2]["labels"].item() == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(sound, tmp_path) -> None:
    cache = Path(shutil.copytree(sound["lossless"], tmp_path / "cache"))
    for name in (INDEX_NAME, shard_name(0, 0)):
        (cache / name).chmod(0)
        with pytest.raises(CacheCorruptError, match=re.escape(f"{cache / name} cannot be read")):
            hostile.read_all(cache)
        assert any(name in problem for problem in verify_cache(cache))
        (cache / name).chmod(0o600)


# ---- What the finite check lets through ----


@pytest.mark.by_default(6)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("codec", ["lossless", "bf16", "fp16", "int8", "int4", "transform"])
def test_large_values_of_honest_caches_are_read(tmp_path, dtype, codec) -> None:
    """Bounds are far from tight: where they say nothing, decoding does."""
    import dataclasses

    from support import tiny_cache

    from hf_freezecache.codecs import PRESETS

    largest = min(torch.finfo(dtype).max, 6e4 if codec in ("fp16", "transform") else 1e38)

    def states(pixel_values: torch.Tensor) -> torch.Tensor:
        return (hostile.prefix(pixel_values).double() * 0.9 * largest).to(dtype)

    chosen = (
        fit_codec(PRESETS[codec], states(torch.rand(32, 1, 1, 2) * 8), 1, (2, 2))
        if codec == "transform"
        else PRESETS[codec]
    )
    plan = dataclasses.replace(tiny_cache.make_plan(), codec=chosen, calibration=None if chosen.lossless else {})
    cache = tiny_cache.build(tmp_path, plan, prefix=states).directory
    hostile.read_all(cache)
    assert verify_cache(cache) == []
    assert table_name(0, 0) in CacheReader(cache).index.files


@pytest.mark.parametrize("name", ["shard_that_is_a_pipe", "index_that_is_a_pipe", "shard_that_is_a_folder"])
def test_what_is_no_file_is_called_that(sound, name, tmp_path) -> None:
    """Its size would give it away too, but nobody should have to open it for that."""
    cache = hostile.make_hostile(name, sound, tmp_path)
    with pytest.raises(CacheCorruptError, match="is no regular file"):
        CacheReader(cache)
    assert "is no regular file" in verify_cache(cache)[0]
