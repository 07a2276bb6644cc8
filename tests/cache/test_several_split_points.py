"""Caches of several split points that are written in one pass are those of separate builds, whatever happens meanwhile."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import build_two, tiny_cache, tiny_copies
from torch.utils.data import default_collate

from hf_freezecache.cache.index import INDEX_NAME, shard_name
from hf_freezecache.cache.lock import build_lock
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.cache.writer import build_caches
from hf_freezecache.data.collators import CheckedCollator
from hf_freezecache.errors import CacheLockedError, UnsupportedSetupError

#: Batches of two: shards of six rows and of two, in two views.
CALLS = 2 * (3 + 1)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def separate(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The files of each cache, built by itself, by name of the cache."""
    folder = tmp_path_factory.mktemp("separate")
    shallow, deep = build_two.make_plans()
    tiny_cache.build(folder, shallow, batch_size=2)
    tiny_cache.build(folder, deep, batch_size=2, prefix=lambda pixel_values: 3 * tiny_cache.prefix(pixel_values))
    return {plan.name: files_of(folder / plan.name) for plan in (shallow, deep)}


def assert_same(cache_dir: Path, separate: dict[str, dict[str, bytes]]) -> None:
    assert {path.name: files_of(path) for path in cache_dir.glob("k*")} == separate
    for path in cache_dir.glob("k*"):
        assert verify_cache(path) == []


def test_one_pass_writes_what_separate_builds_write(tmp_path, separate) -> None:
    prefixes = build_two.Prefixes()
    reports = build_two.build(tmp_path, prefixes)
    assert_same(tmp_path, separate)
    assert prefixes.calls == CALLS, "one prefix call per batch"
    assert [report.built_shards for report in reports] == [4, 4]
    assert [report.total_bytes for report in reports] == [
        CacheReader(report.directory).index.total_bytes for report in reports
    ]
    assert [CacheReader(report.directory).index.split_point for report in reports] == [2, 5]


@pytest.mark.slow
@pytest.mark.parametrize("die_at", [6])
def test_a_killed_pass_goes_on_where_it_stopped(tmp_path, separate, die_at) -> None:
    """Call 6 is of the second batch of view 1: both shards of view 0 are finished in both caches."""
    process = subprocess.run(
        [sys.executable, build_two.__file__, str(tmp_path), str(die_at)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob(f"*/{INDEX_NAME}"))
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("k*/view-*/*.safetensors")}
    assert len(finished) == 4
    prefixes = build_two.Prefixes()
    reports = build_two.build(tmp_path, prefixes)
    assert_same(tmp_path, separate)
    assert [(report.kept_shards, report.built_shards) for report in reports] == [(2, 2), (2, 2)]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert prefixes.calls == CALLS // 2


def test_each_cache_gets_only_what_it_lacks(tmp_path, separate) -> None:
    shallow, deep = (report.directory for report in build_two.build(tmp_path, build_two.Prefixes()))
    (shallow / INDEX_NAME).unlink()
    (deep / INDEX_NAME).unlink()
    (shallow / shard_name(0, 1)).unlink()
    (deep / shard_name(1, 0)).write_bytes(b"damaged")
    prefixes = build_two.Prefixes()
    reports = build_two.build(tmp_path, prefixes)
    assert_same(tmp_path, separate)
    assert [(report.kept_shards, report.built_shards) for report in reports] == [(3, 1), (3, 1)]
    assert prefixes.calls == 1 + 3


def test_a_finished_cache_is_skipped(tmp_path, separate) -> None:
    shallow, deep = build_two.make_plans()
    directory = tiny_cache.build(tmp_path, shallow, batch_size=2).directory
    times = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    prefixes = build_two.Prefixes()
    reports = build_two.build(tmp_path, prefixes)
    assert_same(tmp_path, separate)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == times
    assert [(report.kept_shards, report.built_shards) for report in reports] == [(4, 0), (0, 4)]
    assert prefixes.calls == CALLS
    build_two.build(tmp_path, prefixes)
    assert prefixes.calls == CALLS, "nothing is left to build"
    assert CacheReader(tmp_path / deep.name).index.calibration == {"bits": 8}


def test_predicted_views_and_others_in_one_pass(tmp_path) -> None:
    copies = tiny_copies.make_plan()
    whole = dataclasses.replace(
        copies,
        split_point=4,
        copies=None,
        copies_calibration=None,
        fingerprint=tiny_cache.make_plan(copies="whole").fingerprint,
    )

    def prefixes(pixel_values: torch.Tensor) -> dict[int, torch.Tensor]:
        states = tiny_copies.prefix(pixel_values)
        return {2: states, 4: -states}

    collate = CheckedCollator(default_collate)
    build_caches(tmp_path, [whole, copies], tiny_copies.Views(), collate, prefixes, batch_size=4)
    alone = tiny_copies.build(tmp_path / "alone").directory
    assert files_of(tmp_path / copies.name) == files_of(alone)
    ours, theirs = CacheReader(tmp_path / whole.name), CacheReader(alone)
    for view in range(3):
        assert torch.equal(ours.read_chunk(view, 1).hidden_states, -theirs.read_chunk(view, 1).hidden_states)


def test_shards_give_way_once_all_caches_have_them(tmp_path, separate) -> None:
    consumed = []

    def consume(shard: int) -> None:
        for plan in build_two.make_plans():
            assert all((tmp_path / plan.name / shard_name(view, shard)).is_file() for view in range(2))
            # The next shard is not begun: room is made as soon as it can be.
            assert not any((tmp_path / plan.name / shard_name(view, shard + 1)).exists() for view in range(2))
        consumed.append(shard)

    build_two.build(tmp_path, build_two.Prefixes(), consume=consume)
    assert consumed == [0, 1]
    assert_same(tmp_path, separate)


def test_nothing_is_written_while_another_run_has_one_of_the_locks(tmp_path) -> None:
    deep = build_two.make_plans()[1]
    with build_lock(tmp_path, deep), pytest.raises(CacheLockedError, match=deep.name):
        build_two.build(tmp_path, build_two.Prefixes())
    assert not [path for path in tmp_path.rglob("k*/*") if path.is_file()]
    build_two.build(tmp_path, build_two.Prefixes())


@pytest.mark.parametrize("change", ["layout", "views", "twice"])
def test_plans_of_different_data_are_refused(tmp_path, change) -> None:
    shallow, deep = build_two.make_plans()
    if change == "twice":
        deep = shallow
    else:
        changes = {"layout": {"layout": dataclasses.replace(deep.layout, chunk_size=4)}, "views": {"num_views": 1}}
        deep = dataclasses.replace(deep, **changes[change])
    with pytest.raises(UnsupportedSetupError, match="cannot be built in one pass"):
        build_two.build(tmp_path, build_two.Prefixes(), [shallow, deep])
    assert list(tmp_path.iterdir()) == []


def test_a_prefix_that_leaves_out_a_split_point_is_refused(tmp_path) -> None:
    with pytest.raises(UnsupportedSetupError, match=r"split points \[2\], expected those of \[5\] too"):
        build_two.build(tmp_path, lambda pixel_values: {2: tiny_cache.prefix(pixel_values)})
