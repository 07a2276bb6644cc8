"""Building: what is stored, resuming after SIGKILL, locks, and disks that cannot be written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import torch
from support import build_and_wait
from support.children import Child
from support.tiny import make_trainer, tiny_vit

from hf_freezecache.cache import shard_writer as shard_module
from hf_freezecache.cache.fingerprint import Fingerprint
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.cache.shard_writer import CachePlan
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.cache.writer import build_cache
from hf_freezecache.codecs import make_codec
from hf_freezecache.data.collators import CheckedCollator
from hf_freezecache.data.layout import ChunkLayout
from hf_freezecache.data.seeding import seeded
from hf_freezecache.data.views import ViewDataset
from hf_freezecache.dataset import CachedDataset
from hf_freezecache.errors import (
    CacheLockedError,
    CacheWriteError,
)
from hf_freezecache.model.split import split_model


def only_cache() -> Path:
    (directory,) = Path("caches").glob("k*")
    return directory


def build(train_dataset, **settings):
    settings = {"schedule": "0:2", "num_train_epochs": 1, **settings}
    cache = {"num_views": 2, "transform_id": "tiny", **settings.pop("cache", {})}
    trainer = make_trainer(tiny_vit(), train_dataset, cache=cache, **settings)
    trainer.train()
    return trainer


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def assert_holds_the_views(directory: Path, dataset, seed: int = 0) -> None:
    """Every sample and view against the prefix applied to that very view, in batches of one."""
    cached = CachedDataset.from_pretrained(directory)
    split = split_model(tiny_vit().eval(), 2)
    for sample_index in np.random.default_rng(0).permutation(len(cached)).tolist():
        for view in range(2):
            with seeded(seed, sample_index, view):
                row = dataset[sample_index]
            with torch.no_grad():
                expected = split.prefix(row["pixel_values"][None])[0]
            stored = cached[sample_index, view]
            assert torch.allclose(stored["hidden_states"], expected, rtol=1e-5, atol=1e-6), (sample_index, view)
            assert stored["labels"] == row["labels"]


@pytest.mark.by_default(1)
@pytest.mark.parametrize("workers", [0, 2])
def test_stored_states_are_those_of_that_view_of_that_sample(train_dataset, workers) -> None:
    build(train_dataset, cache={"build_num_workers": workers})
    assert_holds_the_views(only_cache(), train_dataset)
    cached = CachedDataset.from_pretrained(only_cache())
    assert not torch.equal(cached[3, 0]["hidden_states"], cached[3, 1]["hidden_states"])


@pytest.mark.slow
def test_cache_does_not_depend_on_workers(train_dataset) -> None:
    build(train_dataset)
    first = files_of(only_cache())
    build(train_dataset, cache={"cache_dir": "others", "build_num_workers": 2})
    (other,) = Path("others").glob("k*")
    assert files_of(other) == first


@pytest.mark.slow
def test_building_leaves_random_states_alone(train_dataset) -> None:
    torch.manual_seed(5)
    build(train_dataset)
    built = torch.rand(3)
    build(train_dataset)
    assert torch.equal(built, torch.rand(3))


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [34, 60, 99])
def test_killed_build_resumes_at_the_next_shard(train_dataset, tmp_path, stop_at) -> None:
    """Kill -9 in the middle of a shard; finished shards stay as they are, and the cache ends the same."""
    mark = tmp_path / "stopped"
    with Child(build_and_wait.main, stop_at, str(mark)) as child:
        child.wait_for(mark)
        child.kill()
        assert child.status == -signal.SIGKILL
    directory = only_cache()
    assert not (directory / "index.json").exists()
    assert "no finished cache" in verify_cache(directory)[0]
    finished = {path: path.stat().st_mtime_ns for path in directory.glob("view-*/*.safetensors")}
    tables = list(directory.glob("index/*/*.parquet"))
    assert len(finished) == len(tables) > 0

    trainer = build(train_dataset)
    (entry,) = [e for e in trainer.state.log_history if "freezecache/built_shards" in e]
    assert entry["freezecache/built_shards"] == 8 - len(finished)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert verify_cache(directory) == []
    assert_holds_the_views(directory, train_dataset)
    resumed = files_of(directory)
    build(train_dataset, cache={"cache_dir": "undisturbed"})
    (undisturbed,) = Path("undisturbed").glob("k*")
    assert files_of(undisturbed) == resumed


def test_interrupted_build_rebuilds_a_truncated_shard(train_dataset, caplog) -> None:
    build(train_dataset)
    directory = only_cache()
    whole = files_of(directory)
    (directory / "index.json").unlink()
    shard = directory / "view-01" / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    (directory / "index" / "view-00" / "part-00001.parquet").unlink()
    trainer = build(train_dataset)
    (entry,) = [e for e in trainer.state.log_history if "freezecache/built_shards" in e]
    assert entry["freezecache/built_shards"] == 2
    assert files_of(directory) == whole


@pytest.mark.slow
def test_a_cache_that_another_live_process_writes_is_left_alone(train_dataset, tmp_path) -> None:
    mark = tmp_path / "stopped"
    with Child(build_and_wait.main, 80, str(mark)) as child:
        child.wait_for(mark)
        before = files_of(only_cache())
        with pytest.raises(CacheLockedError, match="another live process"):
            build(train_dataset)
        assert files_of(only_cache()) == before
    build(train_dataset)  # the lock of a dead process binds nobody
    assert verify_cache(only_cache()) == []


def test_full_disk_keeps_finished_shards(train_dataset, monkeypatch) -> None:
    written = []
    genuine = shard_module.write_shard_header

    def failing(file, *args):
        written.append(file.name)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return genuine(file, *args)

    with monkeypatch.context() as patch:
        patch.setattr(shard_module, "write_shard_header", failing)
        with pytest.raises(CacheWriteError, match=r"No space left on device.*MiB are free.*finished shards are kept"):
            build(train_dataset)
    assert not list(only_cache().rglob("*.tmp"))
    trainer = build(train_dataset)
    (entry,) = [e for e in trainer.state.log_history if "freezecache/built_shards" in e]
    assert entry["freezecache/built_shards"] == 5


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to mount a small tmpfs")
@pytest.mark.slow
def test_really_full_disk(train_dataset, tmp_path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(CacheWriteError, match="No space left on device"):
            build(train_dataset, cache={"cache_dir": str(small)})
        kept = len(list(small.glob("k*/view-*/*.safetensors")))
        assert kept > 0
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        trainer = build(train_dataset, cache={"cache_dir": str(small)})
        (entry,) = [e for e in trainer.state.log_history if "freezecache/built_shards" in e]
        assert entry["freezecache/built_shards"] == 8 - kept
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("where", ["/proc/caches", "a-file/caches"])
def test_folder_that_cannot_be_written(train_dataset, where) -> None:
    Path("a-file").touch()
    with pytest.raises(CacheWriteError, match="could not be written"):
        build(train_dataset, cache={"cache_dir": where})


def test_index_tables_name_every_row(train_dataset) -> None:
    """``load_dataset`` on the index shows rows and labels, and they point at the right place."""
    build(train_dataset)
    directory = only_cache()
    rows = datasets.load_dataset(
        "parquet", data_files=str(directory / "index" / "view-00" / "*.parquet"), cache_dir="hf", split="train"
    )
    layout = CacheReader(directory).layout
    assert sorted(rows["sample_index"]) == list(range(50))
    for row in rows:
        assert row["labels"] == row["sample_index"] % 4
        assert layout.members(row["chunk"])[row["row"]] == row["sample_index"]
        assert row["shard"] == row["chunk"] // 2


def test_chunks_are_no_runs_of_one_class() -> None:
    """A data set sorted by class must not give chunks of one class."""
    layout = ChunkLayout(4000, 32, 0)
    labels = np.repeat(np.arange(4), 1000)
    counts = np.array([np.bincount(labels[layout.members(chunk)], minlength=4) for chunk in range(layout.num_chunks)])
    assert counts.max() < 24
    assert (counts > 0).all()


class Wide(torch.utils.data.Dataset):
    """Rows that cost nothing to render."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.full((1, 1, 1), float(row)), "labels": torch.tensor(row % 3)}


@pytest.mark.slow
def test_memory_does_not_grow_with_rows(tmp_path) -> None:
    """1,000 and 4,000 rows of 150 KB: 150 MB and 600 MB of hidden states."""
    noise = torch.randn(64, 197, 192)

    def prefix(pixel_values: torch.Tensor) -> torch.Tensor:
        return noise[: len(pixel_values)] + pixel_values[:, :, :, 0]

    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    peaks = []
    for rows in (1000, 4000):
        plan = CachePlan(
            Fingerprint({"rows": str(rows)}), 1, (1, 1, 1), 1, ChunkLayout(rows, 32, 0), 8, make_codec("lossless")
        )
        peak = 0

        def watched(pixel_values: torch.Tensor) -> torch.Tensor:
            nonlocal peak
            peak = max(peak, psutil.Process().memory_info().rss)
            return prefix(pixel_values)

        build_cache(tmp_path, plan, ViewDataset(Wide(rows), 0), CheckedCollator(collate), watched, batch_size=64)
        peaks.append(peak)
        for path in (tmp_path / plan.name).rglob("*.safetensors"):
            path.unlink()
    assert abs(peaks[1] - peaks[0]) < 100e6, peaks


@pytest.mark.slow
@pytest.mark.parametrize("what", ["frame", "table"])
def test_a_resumed_build_does_not_bless_damage(train_dataset, what) -> None:
    """Hashes of kept shards are taken when the build ends: a flipped bit must be found before."""
    build(train_dataset)
    directory = only_cache()
    whole = files_of(directory)
    (directory / "index.json").unlink()
    name = "view-01/shard-00001.safetensors" if what == "frame" else "index/view-01/part-00001.parquet"
    data = bytearray(whole[name])
    data[len(data) // 2] ^= 4
    (directory / name).write_bytes(data if what == "frame" else data[:40])
    trainer = build(train_dataset)
    (entry,) = [e for e in trainer.state.log_history if "freezecache/built_shards" in e]
    assert entry["freezecache/built_shards"] == 1
    assert files_of(directory) == whole
