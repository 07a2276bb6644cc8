"""What no freezing would have cost, what stages cost in passes, and what is logged of both."""

from __future__ import annotations

import time

import pytest
from support.tiny_runs import decision, epochs, live, record

from hf_freezecache.report.cost import Rate, passes_spent, unfrozen_rate, unfrozen_seconds
from hf_freezecache.report.figures import figures_of
from hf_freezecache.report.record import RunRecord
from hf_freezecache.report.run_log import decision_logs, epoch_logs
from hf_freezecache.report.stopwatch import Stopwatch
from hf_freezecache.report.text import time_cost


def test_no_freezing_is_estimated_from_unfrozen_epochs() -> None:
    rate = unfrozen_rate(record())
    assert (rate.images_per_second, rate.basis, rate.measured) == (10.0, "unfrozen epochs", False)
    assert unfrozen_seconds(record(), rate) == [10, 20, 30, 40]


def test_unfrozen_epochs_took_what_they_took() -> None:
    trained = epochs((0, 1, 5.0, 20.0, 0.0), (0, 2, 10.0, 10.0, 0.0), (0, 3, 20.0, 5.0, 0.0))
    known = record(decisions=[decision(0, 0, 0)], epochs=trained)
    assert unfrozen_seconds(known, unfrozen_rate(known)) == [20, 30, 35]
    assert unfrozen_seconds(known, Rate(4.0, "baseline", "")) == [25, 50, 75]


def test_no_freezing_is_that_of_the_epochs_asked_for() -> None:
    """``schedule="auto"`` chose four epochs where two were asked for."""
    known = record(training={"num_train_epochs": 4.0}, asked_epochs=2)
    assert unfrozen_seconds(known, unfrozen_rate(known)) == [5, 10, 15, 20]
    cost = figures_of(known)["cost"]
    assert cost["no_freezing_seconds"] == 20
    assert cost["no_freezing_text"].endswith("unfrozen epochs, for the 2 epochs asked for")


@pytest.mark.parametrize(("cached", "share"), [(True, 27 / 36), (False, 30 / 36)])
@pytest.mark.parametrize("mode", ["always", "auto", "never"])
def test_no_freezing_is_counted_where_no_epoch_was_unfrozen(cached, share, mode) -> None:
    """3 of 12 blocks frozen: 27 of 36 passes from a cache, 30 of 36 with live frozen blocks. The mode says nothing of it."""
    first = decision(0, 0, 3) if cached else live(0, 0, 3, "The disk is full.")
    known = record(unfrozen=False, decisions=[first, decision(1, 2, 6)], cache={"mode": mode})
    rate = unfrozen_rate(known)
    assert rate.images_per_second == pytest.approx(10 * share)
    assert rate.basis == "counted passes"
    assert "no unfrozen epoch was timed" in rate.text


def test_passes_are_counted_by_what_each_stage_did() -> None:
    """Two stages of one split point: the first found a full disk, the second had a cache."""
    trained = epochs((0, 1, 9.0, 10.0, 0.0), (1, 2, 10.0, 10.0, 0.0))
    known = record(decisions=[live(0, 0, 3, "The disk is full."), decision(1, 1, 3)], epochs=trained)
    assert unfrozen_rate(known).images_per_second == pytest.approx((9 * 30 / 36 + 10 * 27 / 36) / 2)


def test_nothing_is_estimated_from_a_head_alone_or_from_nothing() -> None:
    known = record(decisions=[decision(0, 0, 12)], epochs=epochs((0, 1, 50.0, 2.0, 0.0)))
    assert unfrozen_rate(known) is None
    assert unfrozen_rate(record(decisions=[], epochs=[])) is None
    assert unfrozen_rate(RunRecord()) is None
    figures = figures_of(known)
    assert figures["cost"]["no_freezing_seconds"] is None
    assert "nothing to estimate it from" in time_cost(figures)


def test_passes_spent_are_those_of_building_and_training() -> None:
    """Per image: 2 epochs of 3 (12 - 6) passes; 2 views through 6 blocks from the images, through 3 from the cache before."""
    known = record(unfrozen=False)
    first, second = known.decisions
    assert passes_spent(known, first) == 2 * 3 * 9 + 2 * 3
    assert passes_spent(known, second) == 2 * 3 * 6 + 2 * 6
    second.built_from = 3
    assert passes_spent(known, second) == 2 * 3 * 6 + 2 * 3
    second.cache, second.built_from = "found", None
    assert passes_spent(known, second) == 2 * 3 * 6
    known.decisions[1] = live(1, 2, 6, "mode='never'")
    assert passes_spent(known, known.decisions[1]) == 2 * (3 * 6 + 6)
    known.decisions[1].token_keep = 0.5  # frozen blocks see all tokens
    assert passes_spent(known, known.decisions[1]) == 2 * (3 * 6 / 2 + 6)
    known.data = {}
    assert passes_spent(known, first) is None


def test_logs_of_an_epoch_add_up() -> None:
    known = record(decisions=[decision(0, 0, 0)], epochs=[])
    first = epoch_logs(known, {"images": 100, "seconds": 10.0, "entering_seconds": 1.0}, 1.0, known.decisions[-1].stage)
    known.keep_decision(decision(1, 1, 6))
    second = epoch_logs(known, {"images": 100, "seconds": 5.0, "entering_seconds": 0.5}, 2.0, known.decisions[-1].stage)
    assert first["freezecache/cumulative_seconds"] == 11
    assert second == {
        "freezecache/train_images_per_second": 20,
        "freezecache/epoch_seconds": 5,
        "freezecache/cumulative_seconds": 16.5,
        "freezecache/no_freezing_seconds_estimated": 20,
    }
    assert [(epoch.stage, epoch.epoch, epoch.images) for epoch in known.epochs] == [(0, 1.0, 100), (1, 2.0, 100)]


def test_logs_of_a_stage() -> None:
    assert decision_logs(decision(1, 2, 6, released_optimizer_bytes=4)) == {
        "freezecache/stage": 1,
        "freezecache/split_point": 6,
        "freezecache/trainable_parameters": 500,
        "freezecache/released_optimizer_bytes": 4,
        "freezecache/lr_scale": 1.0,
        "freezecache/cache_bytes": 2_000_000,
        "freezecache/cache_bytes_per_image": 20_000,
        "freezecache/bits_per_element": 2.5,
        "freezecache/build_seconds": 3.0,
        "freezecache/built_shards": 2,
        "freezecache/distortion": 0.002,
        "freezecache/agreement": 1.0,
        "freezecache/relative_error": 0.05,
    }
    logs = decision_logs(live(0, 0, 3, "The disk is full.", distortion={"agreement": None}))
    assert set(logs) == {
        f"freezecache/{name}"
        for name in ("stage", "split_point", "trainable_parameters", "released_optimizer_bytes", "lr_scale")
    }


def test_the_stopwatch_leaves_pauses_out(monkeypatch) -> None:
    clock = iter([0.0, 10.0, 13.0, 15.0, 16.0, 20.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(0, 10, 25, 4.0)
    with watch.paused():  # from 10 to 13
        assert watch.take(2) == {"images": 20, "seconds": 10.0, "entering_seconds": 4.0}
        assert watch.take(2) is None
    with watch.paused():  # from 15 to 16
        pass
    # The last batch is not full.
    assert watch.take(3) == {"images": 5, "seconds": 6.0, "entering_seconds": 0.0}
