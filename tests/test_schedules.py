"""Schedules: what may be written, what it means, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_freezecache import FreezeConfig
from hf_freezecache.errors import ScheduleError
from hf_freezecache.schedules import (
    POLICIES,
    Stage,
    plan_stages,
    split_point_at,
)


def pairs(schedule, num_epochs: int = 10, num_blocks: int = 12) -> list[tuple[int, int]]:
    stages = plan_stages(FreezeConfig(schedule=schedule), num_epochs, num_blocks)
    return [(stage.start_epoch, stage.split_point) for stage in stages]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("0:6,3:9,6:11", [(0, 6), (3, 9), (6, 11)]),
        (" 0 : 6 , 3 : 9 ", [(0, 6), (3, 9)]),
        ({0: 6, 3: 9}, [(0, 6), (3, 9)]),
        ({"0": 6, "3": "9"}, [(0, 6), (3, 9)]),
        ({0.0: 6, 0.5: 9}, [(0, 6), (5, 9)]),
        ("0.0:6,0.5:9", [(0, 6), (5, 9)]),
        ("0:6,0.7:9", [(0, 6), (7, 9)]),  # 0.7 * 10 lies just above 7 in binary
        ("0:6,0.71:9", [(0, 6), (8, 9)]),
        ("0.:6,.5:9", [(0, 6), (5, 9)]),
        ("3:9", [(0, 0), (3, 9)]),
        ("0:0", [(0, 0)]),
        ("0:12", [(0, 12)]),
        ("0:6,3:6", [(0, 6), (3, 6)]),
        ("0:06", [(0, 6)]),
    ],
)
def test_explicit_schedules(schedule, expected) -> None:
    assert pairs(schedule) == expected


def test_a_dict_is_stored_as_text_and_survives_a_round_trip() -> None:
    config = FreezeConfig(schedule={0: 6, 0.5: 9})
    assert config.schedule == "0:6,0.5:9"
    assert FreezeConfig(schedule=config.schedule) == config


def test_without_schedule_and_policy_nothing_is_frozen() -> None:
    assert plan_stages(FreezeConfig(), 5, 12) == [Stage(0, 0)]


def test_stages_behind_the_end_are_kept_and_warned_of(caplog) -> None:
    assert pairs("0:6,10:9,12:11") == [(0, 6), (10, 9), (12, 11)]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "10 epochs" in record.message
    assert "10:9, 12:11" in record.message
    caplog.clear()
    assert pairs("0:6,9:9") == [(0, 6), (9, 9)]
    assert not caplog.records


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("0:6,3", "'3' is not a start:split_point pair"),
        ("0:6,", "'' is not a start:split_point pair"),
        ("", "'' is not a start:split_point pair"),
        ({}, "'' is not a start:split_point pair"),
        ("0:six", "'0:six' is not a start:split_point pair"),
        ("0:-1", "'0:-1' is not a start:split_point pair"),
        ("0:6.0", "'0:6.0' is not a start:split_point pair"),
        ("0:6:9", "'0:6:9' is not a start:split_point pair"),
        ("zero:6", "'zero' is not a start"),
        (":6", "'' is not a start"),
        ("-1:6", "epoch -1 is negative"),
        ("1.0:6", "'1.0' is written as a fraction of training, which lies in [0, 1)"),
        ("0:²", "'0:²' is not a start:split_point pair"),
        ("2.5:6", "'2.5' is written as a fraction"),
        ("-0.5:6", "'-0.5' is written as a fraction"),
        ("nan:6", "'nan' is not a start"),
        ("inf:6", "'inf' is not a start"),
        ("1e1:6", "'1e1' is not a start"),
        ("3:6,0:9", "starts must increase, but epoch 3 is followed by epoch 0"),
        ("0:6,0:9", "starts must increase, but epoch 0 is followed by epoch 0"),
        ("0:6,0.5:9,5:10", "epoch 5 is followed by epoch 5 (with 10 epochs in all)"),
        ("0:13", "freezes 13 blocks from epoch 0, but the model has 12: use split points from 0 to 12"),
        ("0:6,3:9,6:8", "unfreezes blocks: 9 are frozen from epoch 3, 8 from epoch 6"),
    ],
)
def test_bad_schedules_are_refused_with_what_was_wrong(schedule, words) -> None:
    with pytest.raises(ScheduleError) as caught:
        pairs(schedule)
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "0:6", "policy": "linear"}, "Both schedule='0:6' and policy='linear'"),
        ({"policy": "linear", "freeze_start": 0.5, "freeze_end": 0.5}, "freeze_start=0.5 and freeze_end=0.5"),
        ({"policy": "linear", "freeze_start": -0.1}, "freeze_start=-0.1"),
        ({"policy": "linear", "freeze_end": 1.1}, "freeze_end=1.1"),
        ({"policy": "linear", "freeze_end": math.nan}, "freeze_end=nan"),
        ({"policy": "linear", "freeze_level": 1.1}, "in [0, 1], got 1.1"),
        ({"policy": "linear", "freeze_level": -0.1}, "in [0, 1], got -0.1"),
        ({"policy": "linear", "freeze_level": math.nan}, "in [0, 1], got nan"),
    ],
)
def test_contradictory_settings_are_refused(settings, words) -> None:
    with pytest.raises(ScheduleError) as caught:
        FreezeConfig(**settings)
    assert words in str(caught.value)


def test_an_unknown_policy_is_refused_and_the_known_ones_named() -> None:
    with pytest.raises(ScheduleError, match=r"Unknown policy 'cubic'; known are \['linear'\]"):
        plan_stages(FreezeConfig(policy="cubic"), 5, 12)


def test_a_policy_of_the_users_own_is_checked_like_a_schedule(monkeypatch) -> None:
    monkeypatch.setitem(POLICIES, "thaw", lambda config, num_epochs, num_blocks: [Stage(0, num_blocks), Stage(1, 0)])
    monkeypatch.setitem(POLICIES, "negative", lambda config, num_epochs, num_blocks: [Stage(0, -1)])
    monkeypatch.setitem(POLICIES, "late", lambda config, num_epochs, num_blocks: [Stage(2, 3)])
    monkeypatch.setitem(POLICIES, "none", lambda config, num_epochs, num_blocks: [])
    with pytest.raises(ScheduleError, match="unfreezes"):
        plan_stages(FreezeConfig(policy="thaw"), 5, 12)
    with pytest.raises(ScheduleError, match="freezes -1 blocks"):
        plan_stages(FreezeConfig(policy="negative"), 5, 12)
    assert plan_stages(FreezeConfig(policy="late"), 5, 12) == [Stage(0, 0), Stage(2, 3)]
    assert plan_stages(FreezeConfig(policy="none"), 5, 12) == [Stage(0, 0)]


def test_linear_by_hand() -> None:
    config = FreezeConfig(policy="linear", freeze_start=0.2, freeze_end=0.6, freeze_level=0.5)
    # 12 blocks, 10 epochs: 0 up to epoch 2, then 1.5 blocks an epoch, 6 from epoch 6 on.
    expected = [Stage(0, 0), Stage(3, 1), Stage(4, 3), Stage(5, 4), Stage(6, 6)]
    assert plan_stages(config, 10, 12) == expected


def test_linear_reaches_its_level_and_no_more() -> None:
    whole = FreezeConfig(policy="linear", freeze_start=0.0, freeze_end=1.0, freeze_level=1.0)
    assert [split_point_at(plan_stages(whole, 12, 12), epoch) for epoch in range(12)] == list(range(12))
    assert plan_stages(FreezeConfig(policy="linear", freeze_level=0.0), 12, 12) == [Stage(0, 0)]
    assert plan_stages(FreezeConfig(policy="linear"), 1, 12) == [Stage(0, 0)]
    assert split_point_at(plan_stages(FreezeConfig(policy="linear"), 100, 12), 99) == 9


FRACTIONS = st.floats(0, 1)


@given(
    bounds=st.tuples(FRACTIONS, FRACTIONS).filter(lambda pair: pair[0] < pair[1]),
    level=FRACTIONS,
    num_epochs=st.integers(1, 60),
    num_blocks=st.integers(2, 48),
)
def test_linear_properties(bounds, level, num_epochs, num_blocks) -> None:
    config = FreezeConfig(policy="linear", freeze_start=bounds[0], freeze_end=bounds[1], freeze_level=level)
    stages = plan_stages(config, num_epochs, num_blocks)
    assert stages[0].start_epoch == 0
    assert all(stage.start_epoch < num_epochs for stage in stages)
    for before, after in itertools.pairwise(stages):
        assert before.start_epoch < after.start_epoch
        assert before.split_point < after.split_point
    top = math.floor(num_blocks * level + 1e-9)
    for epoch in range(num_epochs):
        found, fraction = split_point_at(stages, epoch), epoch / num_epochs
        assert 0 <= found <= top
        if fraction <= bounds[0]:
            assert found == 0
        if fraction >= bounds[1]:
            assert found == top


@given(st.data())
def test_explicit_properties(data) -> None:
    num_epochs, num_blocks = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 48))
    starts = sorted(data.draw(st.sets(st.integers(0, num_epochs - 1), min_size=1, max_size=6)))
    points = sorted(data.draw(st.lists(st.integers(0, num_blocks), min_size=len(starts), max_size=len(starts))))
    schedule = ",".join(f"{start}:{point}" for start, point in zip(starts, points, strict=True))
    stages = plan_stages(FreezeConfig(schedule=schedule), num_epochs, num_blocks)
    assert stages[0].start_epoch == 0
    for before, after in itertools.pairwise(stages):
        assert before.start_epoch < after.start_epoch
        assert before.split_point <= after.split_point
    in_force = 0
    for epoch in range(num_epochs + 3):
        in_force = dict(zip(starts, points, strict=True)).get(epoch, in_force)
        assert split_point_at(stages, epoch) == in_force


@given(num_epochs=st.integers(1, 60), numerator=st.integers(0, 59))
def test_a_fraction_of_training_is_the_first_epoch_at_or_behind_it(num_epochs, numerator) -> None:
    """Epoch e of n starts at fraction e / n; written with 12 digits it must still mean epoch e."""
    epoch = numerator % num_epochs
    schedule = f"{epoch / num_epochs:.12f}:3"
    stages = plan_stages(FreezeConfig(schedule=schedule), num_epochs, 12)
    assert stages[-1] == Stage(epoch, 3)


@given(st.text(alphabet="0123456789.:,- enaif", max_size=12))
def test_any_text_is_read_or_refused(text) -> None:
    try:
        stages = plan_stages(FreezeConfig(schedule=text), 10, 12)
    except ScheduleError:
        return
    assert stages[0].start_epoch == 0
    assert [stage.split_point for stage in stages] == sorted(stage.split_point for stage in stages)
