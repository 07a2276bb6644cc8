"""Chunks are encoded beside the blocks, or between them: what is stored is the same."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest
import torch
from support.tiny import TinyTransform, make_trainer, tiny_vit

from hf_freezecache.cache import encoder as encoder_module
from hf_freezecache.cache.encoder import Encoder
from hf_freezecache.cache.shard_writer import ShardWriter
from hf_freezecache.codecs import ViewCodec
from hf_freezecache.errors import DataError


@pytest.mark.parametrize(
    ("device", "cores", "threads", "beside"),
    [
        ("cpu", 1, 1, False),
        ("cpu", 2, 2, False),
        ("cpu", 1, 2, False),
        ("cpu", 2, 1, True),
        ("cpu", 3, 3, True),
        ("meta", 1, 1, True),
    ],
)
def test_a_thread_only_where_blocks_leave_cores(monkeypatch, device, cores, threads, beside) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(encoder_module, "available_cores", lambda: cores)
    with closing(Encoder()) as encoder:
        encoder.follow(torch.device(device))
        ran_in = encoder.submit(threading.get_ident).result(timeout=5)
    assert (ran_in != threading.get_ident()) == beside


def encoding_between(monkeypatch, between: bool) -> None:
    monkeypatch.setattr(encoder_module, "available_cores", lambda: 1)
    monkeypatch.setattr(encoder_module, "_FEW_CORES", 1024 if between else 0)


@pytest.mark.parametrize("between", [False, True])
def test_a_job_that_fails_says_so_when_it_is_asked(monkeypatch, between) -> None:
    encoding_between(monkeypatch, between)
    with closing(Encoder()) as encoder:
        encoder.follow(torch.device("cpu"))
        failed, fine = encoder.submit(lambda: 1 // 0), encoder.submit(lambda: 3)
        assert fine.result() == 3
        with pytest.raises(ZeroDivisionError):
            failed.result()


@pytest.mark.parametrize("codec", ["lossless", "transform"])
def test_both_ways_store_the_same_bytes(train_dataset, monkeypatch, tmp_path, codec) -> None:
    stored = []
    for between in (False, True):
        encoding_between(monkeypatch, between)
        cache = {
            "num_views": 2,
            "chunk_size": 8,
            "codec": codec,
            "transform_id": "tiny",
            "cache_dir": f"caches-{between}",
        }
        directory = make_trainer(tiny_vit(), train_dataset, schedule="0:2", cache=cache).build_cache().reader.directory
        stored.append({path.name: path.read_bytes() for path in sorted(directory.rglob("*.safetensors"))})
    assert stored[0] == stored[1]
    assert len(stored[0]) >= 2


def beside_an_accelerator(monkeypatch) -> list[int]:
    """Let builds go as if the blocks computed elsewhere, on a machine of five cores; return the threads that encode."""
    threads: list[int] = []
    follow, encode = Encoder.follow, ShardWriter._encode
    monkeypatch.setattr(encoder_module, "available_cores", lambda: 5)
    monkeypatch.setattr(Encoder, "follow", lambda self, device: follow(self, torch.device("meta")))

    def noting(self, *args):
        threads.append(threading.get_ident())
        time.sleep(0.02)
        return encode(self, *args)

    monkeypatch.setattr(ShardWriter, "_encode", noting)
    return threads


@pytest.mark.by_default(1)
@pytest.mark.parametrize(("codec", "views"), [("lossless", 1), ("transform", 1), ("auto", 3)])
def test_several_threads_store_the_same_bytes(images, monkeypatch, codec, views) -> None:
    """Views beyond the first wait for the first, as it is decoded."""
    stored = []
    for several in (False, True):
        threads = beside_an_accelerator(monkeypatch) if several else []
        cache = {
            "num_views": views,
            "chunk_size": 3,
            "shard_chunks": 5,
            "codec": codec,
            "copies": "residual" if views > 1 else "auto",
            "calibration_samples": 20,
            "transform_id": "tiny",
            "cache_dir": f"caches-{several}",
        }
        rows = images.with_transform(TinyTransform(True))
        directory = make_trainer(tiny_vit(), rows, schedule="0:2", cache=cache).build_cache().reader.directory
        stored.append({path.name: path.read_bytes() for path in sorted(directory.rglob("*.safetensors"))})
    assert stored[0] == stored[1]
    assert 1 < len(set(threads)) <= 4


def test_a_base_view_that_cannot_be_encoded_leaves_nobody_waiting(images, monkeypatch) -> None:
    beside_an_accelerator(monkeypatch)
    encode = ViewCodec.encode

    def fails(self, view, *args):
        if view == 0:
            raise ValueError("too large")
        return encode(self, view, *args)

    monkeypatch.setattr(ViewCodec, "encode", fails)
    cache = {"num_views": 3, "chunk_size": 3, "codec": "auto", "copies": "residual", "calibration_samples": 20}
    rows = images.with_transform(TinyTransform(True))
    with pytest.raises(DataError, match="could not be encoded: too large"):
        make_trainer(tiny_vit(), rows, schedule="0:2", cache=cache).build_cache()
