"""Batches that a thread gathers: the same as without it, pinned and moved as tensors are."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from support import tiny_cache
from support.parity import assert_same, parameters_of
from support.tiny import TinyTransform, make_trainer, tiny_vit
from torch.utils.data import DataLoader

from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.data.collators import collate_cached
from hf_freezecache.data.gathered import GatheredBatch, GathersAhead
from hf_freezecache.dataset import CachedDataset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> CachedDataset:
    plan = tiny_cache.make_plan(num_samples=20, chunk_size=3)
    return CachedDataset(CacheReader(tiny_cache.build(tmp_path_factory.mktemp("cache"), plan).directory), packed=True)


def test_batches_are_those_of_the_plain_collator(dataset) -> None:
    plain, ahead = (list(DataLoader(dataset, 6, collate_fn=each)) for each in (collate_cached, GathersAhead(CPU)))
    assert len(plain) == len(ahead) == 4
    for expected, batch in zip(plain, ahead, strict=True):
        assert_same(batch.to(CPU), expected)
        assert_same(batch.to("cpu", non_blocking=True), expected)  # as often as it is asked for


def test_the_next_batch_is_gathered_in_another_thread(dataset, monkeypatch) -> None:
    threads = []
    samples = dataset.__getitems__([0, 1, 2])
    monkeypatch.setattr(type(samples), "batch", lambda self: threads.append(threading.get_ident()) or {})
    assert GathersAhead(CPU)(samples).to(CPU) == {}
    assert threads
    assert threads[0] != threading.get_ident()


def test_a_loader_pins_in_the_thread(dataset, monkeypatch) -> None:
    pinned = []

    def pin(self: torch.Tensor) -> torch.Tensor:
        pinned.append(threading.get_ident())
        return self.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = GathersAhead(CPU)(dataset.__getitems__([0, 4, 7]))
    moved = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert isinstance(moved, GatheredBatch)
    assert_same(moved.to(CPU), batch.to(CPU))
    assert len(pinned) == len(batch.to(CPU))
    assert threading.get_ident() not in pinned


@pytest.mark.parametrize(("device", "index"), [("cuda", 5), ("cuda:1", 1)])
def test_the_thread_uses_the_gpu_of_its_process(dataset, monkeypatch, device, index) -> None:
    """One GPU alone has no number in accelerate, and CUDA wants one."""
    used = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    assert GathersAhead(torch.device(device))(dataset.__getitems__([0, 1])).to(CPU)
    assert used == [index]


def test_what_goes_wrong_is_raised_where_the_batch_is_asked_for(dataset, monkeypatch) -> None:
    samples = dataset.__getitems__([0, 1, 2])

    def fails(self):
        raise ValueError("different shapes")

    monkeypatch.setattr(type(samples), "batch", fails)
    batch = GathersAhead(CPU)(samples).pin_memory()
    with pytest.raises(ValueError, match="different shapes"):
        batch.to(CPU)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("token_keep", [None, 0.5])
def test_training_and_evaluating_are_the_same_and_no_thread_stays(images, token_keep) -> None:
    def run(workers: int):
        trainer = make_trainer(
            tiny_vit(),
            images.with_transform(TinyTransform(True)),
            images.with_transform(TinyTransform(False)),
            "0:1,1:2",
            {"cache_dir": "caches", "cache_eval": True, "num_views": 2, "build_num_workers": 0},
            freeze={"token_keep": token_keep},
            num_train_epochs=3,
            eval_strategy="epoch",
            dataloader_num_workers=workers,
        )
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        return trainer.losses + losses, parameters_of(trainer.model)

    plain, ahead = run(0), run(1)
    assert ahead[0] == plain[0]
    assert_same(ahead[1], plain[1])
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("freezecache-gather"):
            thread.join(10)
            assert not thread.is_alive()
