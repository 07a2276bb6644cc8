"""The folder of caches: its file system, its permissions, its name."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import filelock
import pytest
from support.tiny import make_trainer, tiny_vit

from hf_freezecache import CachedDataset
from hf_freezecache.cache import lock as lock_module
from hf_freezecache.errors import CacheWriteError


def built_shards(trainer) -> list[int]:
    entries = [entry for entry in trainer.state.log_history if "freezecache/built_shards" in entry]
    return [entry["freezecache/built_shards"] for entry in entries]


def trained(dataset, schedule: str = "0:2", **settings):
    trainer = make_trainer(tiny_vit(), dataset, schedule=schedule, **{"num_train_epochs": 1, **settings})
    trainer.train()
    return trainer


@pytest.fixture
def only_reading(monkeypatch):
    """Let nothing be written under ``caches``, also for root."""
    folder = Path("caches").absolute()

    def refuse(path) -> None:
        if folder in [Path(path).absolute(), *Path(path).absolute().parents]:
            raise OSError(errno.EROFS, "Read-only file system", str(path))

    def start() -> None:
        temporary, opened = tempfile.TemporaryFile, os.open

        def open_file(path, flags, *args, **kwargs):
            if flags & (os.O_WRONLY | os.O_RDWR):
                refuse(path)
            return opened(path, flags, *args, **kwargs)

        def open_temporary(*args, **kwargs):
            refuse(kwargs["dir"])
            return temporary(*args, **kwargs)

        monkeypatch.setattr(os, "open", open_file)
        monkeypatch.setattr(tempfile, "TemporaryFile", open_temporary)
        monkeypatch.setattr(filelock.FileLock, "acquire", lambda self, *args, **kwargs: refuse(self.lock_file))

    return start


@pytest.mark.by_default(1)
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES])
def test_a_file_system_without_locks(train_dataset, monkeypatch, number) -> None:
    def flock(file, operation) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock_module.fcntl, "flock", flock)
    trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:0,1:2", num_train_epochs=2)
    with pytest.raises(CacheWriteError, match=r"no file locks: .*freezecache_dir on a local disk"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not list(Path("caches").iterdir())
    trainer = trained(train_dataset, cache={"mode": "auto"})
    assert trainer.state.global_step == 5
    assert not list(Path("caches").glob("k*/view*/*"))


def test_a_finished_cache_may_be_only_read(train_dataset, only_reading, caplog) -> None:
    built = trained(train_dataset, "0:2,1:3", num_train_epochs=2)
    before = sorted((path, path.stat().st_mtime_ns) for path in Path("caches").rglob("*"))
    only_reading()
    again = trained(train_dataset, "0:2,1:3", num_train_epochs=2)
    assert (built_shards(built), built_shards(again)) == ([4, 4], [0, 0])
    assert again.losses == built.losses
    assert sorted((path, path.stat().st_mtime_ns) for path in Path("caches").rglob("*")) == before
    assert "This run writes nothing there as long as it finds its caches finished" in caplog.text
    assert "Whether the caches of 3 frozen blocks" in caplog.text


@pytest.mark.by_default(1)
@pytest.mark.parametrize("schedule", ["0:1", "0:2,1:3", "0:0,1:1"])
@pytest.mark.slow
def test_a_cache_that_is_missing_from_a_folder_that_is_only_read(train_dataset, only_reading, schedule) -> None:
    trained(train_dataset)
    only_reading()
    trainer = make_trainer(tiny_vit(), train_dataset, schedule=schedule, num_train_epochs=2)
    missing = schedule[-1]
    with pytest.raises(CacheWriteError, match=f"Read-only file system.* needs one of {missing} frozen blocks"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "name",
    ["data [v2]/caches", "my caches", "caches/", "Käse-缓存", "a*b?", "~nobody-here", "c:d", "%20#x", "'q\"", "{a,b}"],
)
@pytest.mark.by_default(1)
@pytest.mark.slow
def test_folders_of_any_name(train_dataset, name) -> None:
    assert built_shards(trained(train_dataset, cache={"cache_dir": name})) == [4]
    again = trained(train_dataset, cache={"cache_dir": str(Path(name).absolute())})
    assert built_shards(again) == [0]
    (directory,) = Path(name).glob("k*")
    assert len(CachedDataset.from_pretrained(str(directory))) == 50


@pytest.mark.slow
def test_a_folder_behind_a_link(train_dataset) -> None:
    Path("disk").mkdir()
    Path("link").symlink_to("disk")
    trained(train_dataset, cache={"cache_dir": "link"})
    assert built_shards(trained(train_dataset, cache={"cache_dir": "disk"})) == [0]


@pytest.mark.by_default(1)
@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_a_name_that_is_taken(train_dataset, kind) -> None:
    if kind == "file":
        Path("taken").write_text("a file")
    else:
        Path("taken").symlink_to("nowhere")
    trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:2", cache={"cache_dir": "taken"})
    with pytest.raises(CacheWriteError, match="taken could not be written"):
        trainer.train()


@pytest.mark.slow
def test_a_relative_folder_stays_where_it_was_when_the_run_began(train_dataset, tmp_path) -> None:
    """Callbacks may change the working folder between two stages."""
    from transformers import TrainerCallback

    class Moving(TrainerCallback):
        def on_epoch_end(self, *args, **kwargs) -> None:
            Path("elsewhere").mkdir(exist_ok=True)
            os.chdir("elsewhere")

    trained(
        train_dataset,
        "0:1,1:3",
        num_train_epochs=3,
        cache={"cache_dir": "caches", "shuffle_window": 1},
        trainer={"callbacks": [Moving()]},
    )
    assert len(list((tmp_path / "caches").glob("k*/index.json"))) == 2
    assert not list((tmp_path / "elsewhere").rglob("index.json"))


def test_no_folder_at_all() -> None:
    from hf_freezecache import CacheConfig
    from hf_freezecache.errors import UnsupportedSetupError

    with pytest.raises(UnsupportedSetupError, match="expected the path of a folder"):
        CacheConfig(cache_dir="")
