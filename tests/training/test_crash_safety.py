"""What a cut-off run leaves behind, and how the next one goes on."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch
from support import tiny_cache
from support.images import make_images
from support.tiny import TinyTransform, make_trainer, tiny_vit

from hf_freezecache import CacheConfig
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.errors import (
    CacheCorruptError,
    CacheLockedError,
    CacheWriteError,
    UnsupportedSetupError,
)
from hf_freezecache.report.figures import figures_of
from hf_freezecache.report.page import write_report
from hf_freezecache.training.checkpoints import (
    check_complete,
    last_complete,
)

ROOT = Path(__file__).parents[2]
SAVING = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 3, "schedule": "0:1,1:3"}


def trainer_on(rows: int = 50, **settings):
    cache = {"num_views": 2, "transform_id": "tiny", **settings.pop("cache", {})}
    data = make_images(rows).with_transform(TinyTransform(augment=True))
    return make_trainer(tiny_vit(), data, cache=cache, **{"schedule": "0:1,1:3", "num_train_epochs": 2, **settings})


def parameters(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- Checkpoints ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("saved")
    trainer = trainer_on(output_dir=str(folder / "out"), cache={"cache_dir": str(folder / "caches")}, **SAVING)
    trainer.train()
    return folder, parameters(trainer)


FILES = [
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "freezecache_state.json",
]


@pytest.mark.by_default(1)
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_was_cut_off_is_passed_over(saved, tmp_path: Path, name: str, caplog) -> None:
    folder, expected = saved
    out = Path(shutil.copytree(folder / "out", tmp_path / "out"))
    assert last_complete(out) == out / "checkpoint-15"
    victim = out / "checkpoint-15" / name
    victim.write_bytes(victim.read_bytes()[:-9])
    assert last_complete(out) == out / "checkpoint-12"
    assert f"checkpoint-15: {name} is cut off" in caplog.text
    with pytest.raises(UnsupportedSetupError, match=rf"checkpoint-15 cannot be resumed from: {name} is cut off"):
        check_complete(out / "checkpoint-15")
    trainer = trainer_on(output_dir=str(out), cache={"cache_dir": str(folder / "caches")}, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert len(trainer.losses) == 3
    assert_same(parameters(trainer), expected)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("name", ["model.safetensors", "rng_state.pth", "trainer_state.json"])
def test_so_is_one_that_lacks_a_file(saved, tmp_path: Path, name: str) -> None:
    out = Path(shutil.copytree(saved[0] / "out", tmp_path / "out"))
    (out / "checkpoint-15" / name).unlink()
    assert last_complete(out) == out / "checkpoint-12"
    with pytest.raises(UnsupportedSetupError, match="cannot be resumed from"):
        trainer_on(output_dir=str(out), **SAVING).train(str(out / "checkpoint-15"))


def test_without_a_complete_checkpoint_resuming_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ValueError, match="No complete checkpoint"):
        trainer_on(output_dir=str(tmp_path / "out")).train(resume_from_checkpoint=True)


# ---- Locks ----


def test_the_second_of_two_runs_uses_what_the_first_has_built(tmp_path: Path) -> None:
    plan = tiny_cache.make_plan()
    first = tiny_cache.build(tmp_path, plan)
    second = tiny_cache.build(tmp_path, plan)  # as if it had waited
    assert (first.built_shards, second.built_shards, second.kept_shards) == (4, 0, 4)


def test_what_a_killed_build_left_half_written_is_swept_away(tmp_path: Path) -> None:
    plan = tiny_cache.make_plan()
    left = tmp_path / plan.name / "view-00" / "shard-00000.safetensors.0123456789ab.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    directory = tiny_cache.build(tmp_path, plan).directory
    assert not left.exists()
    assert verify_cache(directory) == []


@pytest.mark.slow
def test_trainers_wait_as_they_are_told(images) -> None:
    trainer = trainer_on(cache={"lock_timeout": 0.0})
    trainer.train()
    (first, _) = sorted(Path("caches").glob("k*"))
    shutil.rmtree(first)
    with filelock.FileLock(f"caches/.{first.name}.lock"), pytest.raises(CacheLockedError, match="lock_timeout"):
        trainer_on(cache={"lock_timeout": 0.0}).train()
    with pytest.raises(UnsupportedSetupError, match=r"'lock_timeout': .*of at least 0, got -1"):
        CacheConfig(lock_timeout=-1)


# ---- Disks ----


@pytest.fixture
def small_files():
    """Let no file grow over 4 KiB, as a quota would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_with_what_to_do_and_keeps_what_is_complete(saved, small_files, tmp_path: Path) -> None:
    folder, expected = saved
    out, caches = (
        shutil.copytree(folder / "out", tmp_path / "out"),
        shutil.copytree(folder / "caches", tmp_path / "caches"),
    )
    shutil.rmtree(out / "checkpoint-15")
    shutil.rmtree(out / "checkpoint-12")
    (second,) = caches.glob("k03*")
    (second / "index.json").unlink()
    lost = second / "view-01" / "shard-00001.safetensors"
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in second.rglob("*.safetensors")}
    settings = {**SAVING, "output_dir": str(out), "cache": {"cache_dir": str(caches)}}
    trainer = trainer_on(**settings)
    small_files()
    with pytest.raises(
        CacheWriteError,
        match=r"File too large .* go on from checkpoint-8, call trainer.train\(resume_from_checkpoint=True\)",
    ):
        trainer.train(resume_from_checkpoint=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    again = trainer_on(**settings)
    again.train(resume_from_checkpoint=True)
    assert_same(parameters(again), expected)
    assert lost.is_file()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.slow
@pytest.mark.usefixtures("always_paying")
def test_with_mode_auto_it_trains_on_to_the_same_result(saved, small_files, caplog) -> None:
    trainer = trainer_on(cache={"mode": "auto"}, **{**SAVING, "save_strategy": "no"})
    small_files()
    trainer.train()
    assert "mode='auto': training on without a cache" in caplog.text
    decision = trainer._record.decisions[-1]
    assert (decision.trained_from, decision.cache) == ("images", "none")
    # The reason goes to the card: it says what happened, and names no folder.
    assert decision.reason == "The cache could not be written: File too large."
    assert decision.build_seconds > 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    trainer.create_model_card()
    card = Path("out", "README.md").read_text()
    assert "The cache could not be written: File too large." in card
    assert str(Path("caches").absolute()) not in card
    page = write_report(figures_of(trainer._record), Path("out"))
    assert "The cache could not be written: File too large." in page.read_text()
    assert "File too large" in caplog.text
    assert_same(parameters(trainer), saved[1])


@pytest.mark.slow
@pytest.mark.usefixtures("always_paying")
def test_with_room_mode_auto_caches(saved) -> None:
    trainer = trainer_on(cache={"mode": "auto"}, **{**SAVING, "save_strategy": "no"})
    trainer.train()
    assert len(list(Path("caches").glob("k*/index.json"))) == 2
    assert_same(parameters(trainer), saved[1])


@pytest.mark.by_default(1)
@pytest.mark.usefixtures("always_paying")
@pytest.mark.parametrize("mode", ["always", "auto"])
def test_a_folder_that_cannot_be_made_stops_only_those_who_insist(saved, mode: str, caplog) -> None:
    Path("blocked").write_text("a file")
    trainer = trainer_on(cache={"mode": mode, "cache_dir": "blocked/caches"}, **{**SAVING, "save_strategy": "no"})
    if mode == "always":
        with pytest.raises(CacheWriteError, match="blocked/caches could not be written"):
            trainer.train()
        return
    trainer.train()
    assert_same(parameters(trainer), saved[1])


@pytest.mark.slow
def test_a_folder_that_vanishes_while_training_is_named(images) -> None:
    trainer = trainer_on(cache={"chunk_size": 4, "shuffle_window": 1})
    step, seen = trainer.training_step, []

    def vanishing(*args, **kwargs):
        seen.extend(Path("caches").glob("k*/index.json"))  # the first steps are rehearsed
        if len(seen) == 2:
            shutil.rmtree("caches")
        return step(*args, **kwargs)

    trainer.training_step = vanishing
    with pytest.raises(CacheCorruptError, match=r"shard-\d+.safetensors is missing.*same training again"):
        trainer.train()
    again = trainer_on(cache={"chunk_size": 4, "shuffle_window": 1})
    again.train()
    assert len(list(Path("caches").glob("k*/index.json"))) == 2


# ---- Little room ----


def disk_use(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("consume_previous_cache", [False, True])
def test_peak_disk_at_a_promotion_is_bounded(monkeypatch, consume_previous_cache: bool) -> None:
    import hf_freezecache.cache.writer as writer

    peaks, written = [], writer.ShardWriter.finish

    def finish(self) -> None:
        written(self)
        self.file.flush()
        peaks.append(disk_use(Path("caches")))

    monkeypatch.setattr(writer.ShardWriter, "finish", finish)
    trainer = trainer_on(cache={"consume_previous_cache": consume_previous_cache, "chunk_size": 2})
    trainer.train()
    (new,) = Path("caches").glob("k03*/index.json")
    reader = CacheReader(new.parent)
    one = max(record.bytes for name, record in reader.index.files.items() if name.startswith("view"))
    if consume_previous_cache:
        assert not list(Path("caches").glob("k01*/view*/*.safetensors"))
        assert max(peaks) <= disk_use(new.parent) * 1.05 + 2 * one * reader.index.num_views
    else:
        assert max(peaks) > 1.8 * disk_use(new.parent)


@pytest.mark.usefixtures("always_paying")
@pytest.mark.slow
def test_a_promotion_that_fails_half_way_stops_no_later_stage(monkeypatch, caplog) -> None:
    import hf_freezecache.cache.writer as writer

    settings = {"schedule": "0:1,1:2,2:3", "num_train_epochs": 3}
    plain = trainer_on(cache={"cache_dir": "plain"}, output_dir="plain-out", **settings)
    plain.train()
    finish = writer.ShardWriter.finish

    def full(self) -> None:
        if self.plan.split_point == 2 and self.shard == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        finish(self)

    monkeypatch.setattr(writer.ShardWriter, "finish", full)
    trainer = trainer_on(cache={"mode": "auto", "consume_previous_cache": True}, **settings)
    trainer.train()
    assert "training on without a cache" in caplog.text
    assert list(Path("caches").glob("k03*/index.json"))  # the last stage has a cache again, from the images
    assert_same(parameters(trainer), parameters(plain))


def test_caches_are_written_to_folders_only() -> None:
    with pytest.raises(UnsupportedSetupError, match="freezecache_dir='memory://caches' is an address"):
        CacheConfig(cache_dir="memory://caches")


@pytest.mark.slow
def test_going_back_builds_what_gave_way_anew() -> None:
    plain = trainer_on(cache={"cache_dir": "plain"}, output_dir="plain-out", **SAVING)
    plain.train()
    first = trainer_on(cache={"consume_previous_cache": True}, **SAVING)
    first.train()
    assert_same(parameters(first), parameters(plain))
    back = trainer_on(cache={"consume_previous_cache": True}, **SAVING)
    back.train("out/checkpoint-4")
    assert_same(parameters(back), parameters(plain))


@pytest.mark.slow
def test_an_interrupted_giving_way_goes_on(monkeypatch) -> None:
    import hf_freezecache.training.stage_cache as caching

    plain = trainer_on(cache={"cache_dir": "plain"}, output_dir="plain-out", **SAVING)
    plain.train()
    consumer = caching.consumer

    def breaking(source, process_group):
        consume, seen = consumer(source, process_group), []

        def stop(shard: int) -> None:
            seen.append(shard)
            if len(seen) == 3:
                raise KeyboardInterrupt  # the shard is there twice
            consume(shard)

        return stop

    trainer = trainer_on(cache={"consume_previous_cache": True}, **SAVING)
    with monkeypatch.context() as patched:
        patched.setattr(caching, "consumer", breaking)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    (source,) = Path("caches").glob("k01*")
    assert not (source / "index.json").exists()
    assert len(list(source.glob("view-00/*"))) == 2
    again = trainer_on(cache={"consume_previous_cache": True}, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert_same(parameters(again), parameters(plain))
    assert not list(source.glob("view*/*"))  # what its codec was is kept: going back gives the same states


# ---- Whatever happens ----


def harness(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "benchmarks" / "faults.py"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_killed_runs_end_as_undisturbed_ones(processes: str) -> None:
    out = harness("--seconds", "1", "--kills", "1", "--chain", "1", "--only", "kill", "--processes", processes)
    assert "wrong results: 0" in out


@pytest.mark.slow
def test_all_kinds_of_faults() -> None:
    began = time.monotonic()
    out = harness("--seconds", "200", "--seed", "3")
    assert "wrong results: 0" in out
    assert time.monotonic() - began < 600
