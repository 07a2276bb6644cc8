"""``doctor`` and ``prune``: what they see, what they delete, and what they leave alone."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
from support import hold_lock, tiny_cache
from support.commands import assert_one_line, call
from transformers import Trainer

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.cli import doctor
from hf_freezecache.cli.prune import DAY, caches_of, delete
from hf_freezecache.errors import CacheLockedError


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of a finished cache of two blocks, an unfinished one of four, and what is no cache."""
    caches = tmp_path / "caches"
    finished = tiny_cache.build(caches, tiny_cache.make_plan()).directory
    unfinished = caches / "k04-0123456789abcdef"
    shutil.copytree(finished, unfinished)
    (unfinished / "index.json").unlink()
    (caches / f".{finished.name}.measured.json").write_text("{}")
    (caches / "notes").mkdir()
    (caches / "notes" / "mine.txt").write_text("mine")
    return caches


def finished_in(folder: Path) -> Path:
    (found,) = [cache for cache in caches_of(folder) if cache.finished]
    return found.path


# ---- doctor ----


def test_doctor_finds_a_sound_machine_sound(folder) -> None:
    status, out, err = call("doctor", folder)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    for package in ("torch", "transformers", "zstandard"):
        assert any(line.split()[1:] == [package, importlib.metadata.version(package)] for line in lines)
    assert any("hooks of Trainer" in line and "relied on are there" in line for line in lines)
    assert any("free" in line for line in lines)
    assert any(finished_in(folder).name in line and "2 blocks, 8 samples, 2 views" in line for line in lines)
    assert any("k04-0123456789abcdef" in line and "unfinished" in line for line in lines)
    assert f"hf-freezecache prune {folder} --unfinished --yes" in out
    before = sorted(folder.rglob("*"))
    status, out, _ = call("doctor", folder, "--json")
    assert [one["ok"] for one in json.loads(out)] == [True] * len(lines)
    assert sorted(folder.rglob("*")) == before


def test_doctor_looks_where_a_folder_would_be_made(tmp_path) -> None:
    status, out, _ = call("doctor", tmp_path / "not" / "yet")
    assert status == 0
    assert "it does not exist yet" in out
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").write_text("x")
    status, out, _ = call("doctor", tmp_path / "file")
    assert status == 1
    assert "is a file" in out


def test_doctor_names_a_damaged_cache(folder) -> None:
    index = finished_in(folder) / "index.json"
    index.write_text(index.read_text()[:-20])
    status, out, _ = call("doctor", folder)
    assert status == 1
    (bad,) = [line for line in out.splitlines() if line.startswith("BAD")]
    assert index.parent.name in bad
    assert "of caches that cannot be opened, see above: delete their folders" in out


def test_doctor_names_a_wrong_and_a_missing_package(monkeypatch, tmp_path) -> None:
    version = importlib.metadata.version

    def found(name: str) -> str:
        if name == "zstandard":
            raise importlib.metadata.PackageNotFoundError(name)
        return "5.3.0" if name == "transformers" else version(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", found)
    status, out, _ = call("doctor", tmp_path)
    assert status == 1
    bad = {line.split()[1]: line for line in out.splitlines() if line.startswith("BAD")}
    assert bad.keys() == {"transformers", "zstandard"}
    assert "5.3.0, expected >=5.4" in bad["transformers"]
    assert "pip install 'zstandard>=" in bad["zstandard"]


def test_doctor_misses_a_hook_that_trainer_has_lost(monkeypatch, tmp_path) -> None:
    hooks = doctor.overridden(FreezeCacheTrainer)
    assert {"training_step", "compute_loss", "evaluation_loop", "_save_checkpoint"} <= set(hooks)
    assert "__init__" in hooks
    monkeypatch.delattr(Trainer, "_maybe_log_save_evaluate")
    status, out, _ = call("doctor", tmp_path)
    assert status == 1
    (bad,) = [line for line in out.splitlines() if line.startswith("BAD")]
    assert "has no _maybe_log_save_evaluate" in bad


# ---- prune ----


def test_nothing_is_deleted_unless_that_is_asked_for(folder) -> None:
    before = sorted(folder.rglob("*"))
    assert call("prune", folder)[0] == 2
    status, out, _ = call("prune", folder, "--all")
    assert status == 0
    assert out.count("would delete") == 2
    assert "Nothing was deleted" in out
    assert sorted(folder.rglob("*")) == before


def test_unfinished_caches_go_and_finished_ones_stay(folder) -> None:
    status, out, _ = call("prune", folder, "--unfinished", "--yes")
    assert status == 0
    assert out.startswith("deleted")
    assert not (folder / "k04-0123456789abcdef").exists()
    assert call("verify", finished_in(folder))[0] == 0


@pytest.mark.parametrize(
    ("options", "left"), [(["--split-point", "2"], {4}), (["--split-point", "4"], {2}), (["--all"], set())]
)
def test_all_conditions_must_hold(folder, options, left) -> None:
    assert call("prune", folder, *options, "--unfinished" if left == {2} else "--all", "--yes")[0] == 0
    assert {cache.split_point for cache in caches_of(folder)} == left
    assert (folder / "notes" / "mine.txt").read_text() == "mine"
    assert bool(list(folder.glob(".*.measured.json"))) == (2 in left)


def test_only_what_a_build_writes_is_a_cache(folder) -> None:
    """Not another's ``index.json``, not a folder of the right name, and not a cache with something in it that is the user's."""
    (folder / "website").mkdir()
    (folder / "website" / "index.json").write_text("{}")
    (folder / "k05-0123456789abcdef").mkdir()
    (folder / "k05-0123456789abcdef" / "thesis.txt").write_text("mine")
    renamed = finished_in(folder).rename(folder / "of-the-whole-team")
    (renamed / "view-00" / "mine.txt").write_text("mine")
    before = sorted(folder.rglob("*"))
    assert call("prune", folder, "--all")[1].count("would delete") == 1
    _, out, _ = call("doctor", folder)
    (line,) = [line for line in out.splitlines() if "which prune leaves alone" in line]
    assert "k05-0123456789abcdef, notes, of-the-whole-team, ..." in line
    (renamed / "view-00" / "mine.txt").unlink()
    for scratch in (".build", ".1234.tmp"):  # of a build and of a copy that were killed
        (renamed / scratch).mkdir()
        (renamed / scratch / "view-00.arrow").write_text("")
    (renamed / "view-00" / f"shard-00000.safetensors.{'0' * 12}.tmp").write_text("")
    assert call("prune", folder, "--all", "--yes")[0] == 0
    left = sorted(folder.rglob("*"))
    gone = {path.relative_to(folder).parts[0] for path in before} - {path.relative_to(folder).parts[0] for path in left}
    assert {name for name in gone if not name.startswith(".")} == {"k04-0123456789abcdef", "of-the-whole-team"}


def test_old_caches_go(folder) -> None:
    finished = finished_in(folder)
    long_ago = time.time() - 10 * DAY
    for file in [*finished.rglob("*"), folder / f".{finished.name}.measured.json"]:
        os.utime(file, (long_ago, long_ago))
    status, out, _ = call("prune", folder, "--older-than", "9", "--yes")
    assert status == 0
    assert "10 days old" in out
    assert [cache.split_point for cache in caches_of(folder)] == [4]


@pytest.mark.slow
def test_a_cache_that_is_being_written_is_left_alone(folder) -> None:
    mark = folder / "held"
    child = multiprocessing.get_context("spawn").Process(target=hold_lock.hold, args=(folder, mark, 60))
    child.start()
    try:
        while not mark.exists():
            time.sleep(0.05)
        finished = finished_in(folder)
        (found,) = [cache for cache in caches_of(folder) if cache.path == finished]
        with pytest.raises(CacheLockedError, match="live process"):
            delete(found)
        status, out, err = call("prune", folder, "--all", "--yes")
        assert status == 1
        assert_one_line(err)
        assert out.count("deleted  ") == 1
        assert call("verify", finished)[0] == 0
    finally:
        child.kill()
        child.join()
    assert call("prune", folder, "--all", "--yes")[0] == 0
    assert not finished.exists()


def test_a_deletion_that_is_cut_off_leaves_an_unfinished_cache(folder, monkeypatch) -> None:
    finished = finished_in(folder)

    def cut_off(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hf_freezecache.cli.prune.shutil.rmtree", cut_off)
    status, _, err = call("prune", folder, "--split-point", "2", "--yes")
    assert status == 1
    assert_one_line(err)
    assert finished.is_dir()
    assert not any(cache.finished for cache in caches_of(folder))
