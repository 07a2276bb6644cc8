"""``head_rows``: a head that trains alone sees a part of the rows, and only these pass through the blocks for its cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.parity import assert_resumes_everywhere, assert_same, parameters_of
from support.tiny import Recorder, make_trainer, tiny_vit

from hf_freezecache import FreezeConfig
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.errors import UnsupportedSetupError
from hf_freezecache.report.figures import figures_of
from hf_freezecache.report.text import describe_schedule, stage_account
from hf_freezecache.training import stage_costs
from hf_freezecache.training.remembered import forget_all

SCHEDULE = "0:4,2:1,3:0"


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
    assert stages[0]["predicted"]["cached_passes"] == pytest.approx(2 * (1 + 3 * part / rows))
    assert f"2 views of {part / rows:.3g} of the images, which" in stage_account(stages[0])
    assert "of each image" in stage_account(stages[1])
    assert "; 0.4 of the rows while the head trains alone" in describe_schedule(figures_of(cached._record))


def test_resumed_at_every_checkpoint_it_is_the_same_to_the_bit(train_dataset) -> None:
    assert_resumes_everywhere(lambda resume, **settings: trained(train_dataset, resume=resume, **settings))


def test_threads_that_read_ahead_change_nothing(train_dataset) -> None:
    """Chunks of the part come several times in an epoch."""
    plain = trained(train_dataset)
    assert trained(train_dataset, dataloader_num_workers=2).losses == plain.losses


def test_another_share_is_another_cache_and_the_same_is_found(train_dataset) -> None:
    for share, caches in ((0.4, 1), (0.4, 1), (0.7, 2), (1.0, 3)):
        trained(train_dataset, share, schedule="0:4", num_train_epochs=1)
        assert len([path for path in Path("caches").iterdir() if path.is_dir()]) == caches


@pytest.mark.slow
def test_a_lossy_codec_is_chosen_and_checked_on_the_rows_that_are_there(train_dataset) -> None:
    def run() -> Any:
        return trained(
            train_dataset, cache={"codec": "auto", "max_distortion": 0.5}, schedule="0:4", num_train_epochs=2
        )

    built = run()
    forget_all()
    for notes in Path("caches").glob(".*.measured.json"):  # then it is measured anew
        notes.unlink()
    found = run()
    assert built.losses == found.losses
    assert [one.cache for one in (built._record.decisions + found._record.decisions)] == ["built", "found"]


def test_a_share_is_refused_out_of_its_range_and_without_a_schedule() -> None:
    for share in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(UnsupportedSetupError, match="head_rows"):
            FreezeConfig(schedule="0:4", head_rows=share)
    with pytest.raises(UnsupportedSetupError, match=r"head_rows=0\.5 needs a schedule"):
        FreezeConfig(head_rows=0.5)


def test_chunks_stay_whole_and_are_what_is_counted_and_told(train_dataset) -> None:
    trainer = trained(train_dataset, 0.1, schedule="0:4", num_train_epochs=1, cache={"chunk_size": 30, "num_views": 1})
    stage = figures_of(trainer._record)["stages"][0]
    share = 30 / len(train_dataset)
    assert (stage["rows_share"], stage["predicted"]["cached_passes"]) == pytest.approx((share, 4 * share))
    assert f"of {share:.3g} of the images" in stage_account(stage)


def test_too_few_rows_for_a_lossy_codec_are_refused_before_anything_is_built(train_dataset) -> None:
    settings = {"cache": {"codec": "auto", "chunk_size": 2}, "schedule": "0:2,1:4", "num_train_epochs": 2}
    with pytest.raises(UnsupportedSetupError, match=r"head_rows=0\.02 leaves 2\. Raise it, or use codec='lossless'"):
        trained(train_dataset, 0.02, **settings)
    assert not Path("caches").exists()


def test_of_an_earlier_cache_nothing_is_consumed_that_is_not_replaced(train_dataset) -> None:
    settings = {"schedule": "0:2,1:4", "num_train_epochs": 2}
    trained(train_dataset, cache={"consume_previous_cache": True}, **settings)
    assert {point: reader.index.num_samples < len(train_dataset) for point, reader in readers().items()} == {
        2: False,
        4: True,
    }


def test_where_it_is_decided_by_measurement_only_the_part_is_reckoned_with(train_dataset, monkeypatch) -> None:
    """Three views of all rows would be as many renderings as three epochs take."""
    monkeypatch.setattr(stage_costs, "LEAST_SECONDS", 0.0)
    measure = stage_costs.measure_rendering
    monkeypatch.setattr(
        stage_costs, "measure_rendering", lambda *args: dataclasses.replace(measure(*args), render=1.0, render_all=3.0)
    )
    settings = {"schedule": "0:4", "num_train_epochs": 3, "cache": {"mode": "auto", "num_views": 3}}
    part, whole = (trained(train_dataset, share, **settings)._record.decisions[0].predicted for share in (0.4, 1.0))
    assert (whole["cached_views"], whole["live_views"]) == (3, 3)
    assert "cached_views" not in part
    assert part["cached_seconds"] > 0
