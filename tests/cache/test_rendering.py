"""A build decodes each row once for all its views, and stores what a build of one view after the other stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from support import build_views
from support.build_views import PLANS, ROWS, VIEWS, Prefixes, StoppedError, build, counting
from support.children import run_group
from support.tiny import IMAGE_SIZE

from hf_freezecache.cache import rendering, shard_writer
from hf_freezecache.cache.index import INDEX_NAME, shard_name, table_name
from hf_freezecache.cache.verify import verify_cache


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def decodes(monkeypatch, tmp_path) -> Callable[[], int]:
    """Return the number of images decoded since the last call, by all processes."""
    log = tmp_path / "decodes"
    monkeypatch.setattr(datasets.Image, "decode_example", counting(log))

    def count() -> int:
        number = log.stat().st_size
        log.write_bytes(b"")
        return number

    return count


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory) -> Callable[[str], dict[str, bytes]]:
    """Return the files of a build of one view after the other, which shares nothing."""
    built: dict[str, dict[str, bytes]] = {}

    def files(name: str) -> dict[str, bytes]:
        if name not in built:
            folder = tmp_path_factory.mktemp("one-by-one")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(rendering, "MOST_RENDERED_BYTES", 0)
                build(folder, PLANS[name]())
            built[name] = files_of(folder)
        return built[name]

    return files


def assert_sound(folder: Path, expected: dict[str, bytes]) -> None:
    assert files_of(folder) == expected
    for directory in folder.glob("k*"):
        assert verify_cache(directory) == []


@pytest.mark.by_default(3)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("workers", [0, 2])
def test_each_row_is_decoded_once_and_all_files_are_the_same(tmp_path, one_by_one, decodes, name, workers) -> None:
    expected = one_by_one(name)
    decodes()
    prefixes = Prefixes()
    build(tmp_path / "caches", PLANS[name](), prefixes, num_workers=workers)
    assert decodes() == ROWS
    assert prefixes.calls == VIEWS * (3 + 1), "one call per batch and view, for all caches"
    assert_sound(tmp_path / "caches", expected)


def test_a_build_of_one_view_after_the_other_decodes_rows_again(tmp_path, decodes, monkeypatch) -> None:
    monkeypatch.setattr(rendering, "MOST_RENDERED_BYTES", 0)
    build(tmp_path / "caches", PLANS["one"]())
    assert decodes() == ROWS * VIEWS


def test_views_that_take_too_much_memory_at_once_are_built_in_turns(tmp_path, one_by_one, decodes, monkeypatch) -> None:
    expected = one_by_one("predicted")
    decodes()
    batch = 3 * 3 * IMAGE_SIZE * IMAGE_SIZE * 4
    monkeypatch.setattr(rendering, "MOST_RENDERED_BYTES", 2 * batch)
    build(tmp_path / "caches", PLANS["predicted"](), num_workers=2)
    assert decodes() == 2 * ROWS  # views 0 and 1, then view 2
    assert_sound(tmp_path / "caches", expected)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fail_at", range(1, 13))
def test_an_interrupted_build_goes_on(tmp_path, one_by_one, decodes, fail_at, workers) -> None:
    """Nine calls for the first shard of all views, three for the other."""
    name = "two, one predicted"
    expected = one_by_one(name)
    with pytest.raises(StoppedError):
        build(tmp_path / "caches", PLANS[name](), Prefixes(fail_at), num_workers=workers)
    assert not list(tmp_path.rglob("*.tmp"))
    decodes()
    reports = build(tmp_path / "caches", PLANS[name](), num_workers=workers)
    kept = VIEWS if fail_at > 9 else 0
    assert [(report.kept_shards, report.built_shards) for report in reports] == [(kept, 6 - kept)] * 2
    assert decodes() == (3 if kept else ROWS)
    assert_sound(tmp_path / "caches", expected)


@pytest.mark.by_default(2)
@pytest.mark.parametrize("name", ["one", "predicted"])
@pytest.mark.parametrize("missing", range(1, 2**VIEWS))
def test_views_that_are_there_stay(tmp_path, one_by_one, decodes, name, missing) -> None:
    """The first shard lacks some of its views, and the second one another."""
    expected = one_by_one(name)
    (plan,) = PLANS[name]()
    (report,) = build(tmp_path / "caches", [plan])
    (report.directory / INDEX_NAME).unlink()
    lacking = [view for view in range(VIEWS) if missing >> view & 1]
    for view in lacking:
        (report.directory / shard_name(view, 0)).unlink()
    (report.directory / table_name((lacking[0] + 1) % VIEWS, 1)).unlink()
    stay = {path: path.stat().st_mtime_ns for path in report.directory.glob("view-*/shard-00000*")}
    decodes()
    (again,) = build(tmp_path / "caches", [plan])
    assert again.built_shards == len(lacking) + 1
    assert decodes() == ROWS
    assert {path: path.stat().st_mtime_ns for path in stay} == stay
    assert_sound(tmp_path / "caches", expected)


def test_shards_that_one_view_has_finished_are_kept_whatever_comes_of_the_next(tmp_path, monkeypatch) -> None:
    genuine, written = shard_writer.write_shard_header, []

    def failing(file, *args):
        written.append(file.name)
        if len(written) == 3:
            raise StoppedError
        return genuine(file, *args)

    monkeypatch.setattr(shard_writer, "write_shard_header", failing)
    with pytest.raises(StoppedError):
        build(tmp_path, PLANS["one"]())
    (report,) = build(tmp_path, PLANS["one"]())
    assert report.kept_shards == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "predicted"])
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_the_same(tmp_path, one_by_one, name, processes) -> None:
    expected = one_by_one(name)
    run_group(build_views.main, name, folders=[tmp_path] * processes)
    # Two processes build a shard each. Of three, each builds two views; predicted ones come after all base views.
    decodes = {("one", 3): 8 + 8 + 3 + 3, ("predicted", 3): 11 + 8 + 8 + 3}
    assert (tmp_path / "decodes").stat().st_size == decodes.get((name, processes), ROWS)
    assert_sound(tmp_path / "caches", expected)
