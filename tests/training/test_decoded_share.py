"""How often chunks are decoded, since memory holds some: as is reckoned with, and as it is."""

from __future__ import annotations

import pytest
from support import tiny_cache
from support.tiny import make_trainer, tiny_vit
from torch.utils.data import BatchSampler

from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.config import CacheConfig
from hf_freezecache.data.sampler import ChunkSampler
from hf_freezecache.dataset import CachedDataset
from hf_freezecache.training import planner, stage_costs
from hf_freezecache.training.image_rates import Rates
from hf_freezecache.training.stage_costs import decoded_share

ROWS = 600


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> CacheReader:
    plan = tiny_cache.make_plan(num_samples=ROWS, chunk_size=3)
    return CacheReader(tiny_cache.build(tmp_path_factory.mktemp("cache"), plan).directory)


@pytest.mark.parametrize(
    ("held", "readers", "epochs", "part"),
    [
        *((held, 1, epochs, 1.0) for held in (0.0, 0.3, 1.0) for epochs in (1, 2, 5)),
        *((held, 3, 6, 1.0) for held in (0.0, 0.3, 1.0)),
        *((held, readers, 3, 0.25) for held in (0.0, 0.5, 1.0) for readers in (1, 2)),
    ],
)
def test_chunks_are_decoded_as_often_as_is_reckoned_with(reader, held, readers, epochs, part) -> None:
    layout, num_views = reader.layout, reader.index.num_views
    size = sum(array.nbytes for array in CachedDataset(reader, packed=True)._read((0, 0)).values())
    memory = int(held * part * size * layout.num_chunks * num_views)
    sampler = ChunkSampler([layout], 5, 6, num_views, 4, (0,) * readers, 4)
    sampler.share = part
    dataset = CachedDataset(reader, 8, packed=True, held_bytes=memory)
    read = 0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        # Process 0 reads the first batch of each round.
        for batch in list(BatchSampler(sampler, 4, False))[::readers]:
            dataset.__getitems__(batch)
        read += sum(map(len, sampler.windows()))
    rates = Rates(0, 0, 0, 0, 0, decoded_bytes=size / 3)
    share = decoded_share(rates, CacheConfig(memory_gb=memory / 1e9), epochs, num_views, ROWS, readers, part)
    assert dataset.decoded_chunks / read == pytest.approx(share, abs=0.05)


@pytest.mark.by_default(2)
@pytest.mark.parametrize(("codec", "views"), [("lossless", 1), ("lossless", 2), ("auto", 1), ("auto", 3)])
def test_memory_holds_about_as_much_as_is_reckoned_with(train_dataset, monkeypatch, codec, views) -> None:
    rates, held = [], {}
    measure = stage_costs.measure_rates
    monkeypatch.setattr(stage_costs, "measure_rates", lambda *args: rates.append(measure(*args)) or rates[-1])
    monkeypatch.setattr(stage_costs, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(planner, "_TIE", 1e9)
    forget = CachedDataset.forget_chunks

    def look(self) -> None:
        held["bytes"] = sum(part.nbytes for parts in self._held.values() for part in parts.values())
        forget(self)

    monkeypatch.setattr(CachedDataset, "forget_chunks", look)
    cache = {"mode": "auto", "num_views": views, "codec": codec, "chunk_size": 10, "calibration_samples": 20}
    model = tiny_vit(hidden_size=64, num_attention_heads=4)
    make_trainer(model, train_dataset, schedule="0:2", cache=cache, num_train_epochs=views + 1).train()
    assert held["bytes"] / (50 * views) == pytest.approx(rates[0].decoded_bytes, rel=0.25)


def test_nothing_is_held_of_what_is_not_known() -> None:
    assert decoded_share(Rates(0, 0, 0, 0, 0), CacheConfig(), 3, 1, 100) == 1
    assert decoded_share(Rates(0, 0, 0, 0, 0, decoded_bytes=1), CacheConfig(), 2.5, 1, 100) == pytest.approx(1 / 2.5)


@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_memory_decides_where_decoding_costs(train_dataset, monkeypatch, memory) -> None:
    rates = Rates(render=1.0, render_all=1.0, block=0.0, encode=0.0, decode=1.0, decoded_bytes=1e6)
    monkeypatch.setattr(stage_costs, "measure_rates", lambda *args: rates)
    cache = {"mode": "auto", "num_views": 1, "memory_gb": memory}
    trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:2", cache=cache, num_train_epochs=4)
    trainer.train()
    decision = trainer._record.decisions[0]
    assert decision.predicted["cached_seconds"] == pytest.approx(50 * (1 + (1 if memory else 4)), abs=0.2)
    assert decision.cache == ("built" if memory else "none")
