"""``head_rows``: a head that trains alone sees a part of the rows, and only these pass through the blocks for its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.parity import assert_same, parameters_of
from support.tiny import Recorder, make_trainer, tiny_vit

from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.report.figures import figures_of

SCHEDULE = "0:4,2:1,3:0"


class Seeing(Recorder):
    """Keeps which rows each step sees."""

    def get_train_dataloader(self) -> Any:
        raise AssertionError("not used")


def trained(rows: Any, head_rows: float | None = 0.4, resume: Any = None, **settings: Any) -> Any:
    cache = {"chunk_size": 4, "num_views": 2, "shuffle_window": 3, **settings.pop("cache", {})}
    settings = {"schedule": SCHEDULE, "num_train_epochs": 4, "cls": Recorder, **settings}
    trainer = make_trainer(tiny_vit(), rows, cache=cache, freeze={"head_rows": head_rows}, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def readers(folder: str = "caches") -> dict[int, CacheReader]:
    found = [CacheReader(path) for path in Path(folder).iterdir() if path.is_dir()]
    return {reader.index.split_point: reader for reader in found}


def test_the_cache_of_the_head_holds_a_part_and_trains_as_without_a_cache(train_dataset) -> None:
    live, cached = (trained(train_dataset, cache={"mode": mode}) for mode in ("never", "always"))
    assert live.losses == cached.losses
    assert_same(parameters_of(live.model), parameters_of(cached.model))
    whole = trained(train_dataset, head_rows=1.0, cache={"cache_dir": "whole"})
    assert len(whole.losses) == len(cached.losses)
    assert whole.losses != cached.losses
    rows, chunks = len(train_dataset), -(-len(train_dataset) // 4)
    part = 4 * -(-chunks * 4 // 10)
    assert {point: reader.index.num_samples for point, reader in readers().items()} == {4: part, 1: rows}
    stages = figures_of(cached._record)["stages"]
    # By hand: two views of all rows to the first block, then those of a part through the others; two epochs of the head cost nothing.
    spent = [stage["passes_spent"] for stage in stages]
    assert spent[0] == pytest.approx(2 * (1 + 3 * part / rows), abs=0.06)
