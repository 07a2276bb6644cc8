"""Policies that decide while training: the rule of each, apart from a run."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_freezecache.adaptive_policies import AdaptivePolicy, AutoFreeze
from hf_freezecache.errors import ScheduleError
from hf_freezecache.schedules import (
    POLICIES,
    Stage,
    adaptive_policy,
    foreseen_stages,
    parse_schedule,
    plan_stages,
)


def test_a_schedule_names_the_policy_and_its_parameters() -> None:
    assert parse_schedule("autofreeze") == AutoFreeze(percentile=50.0, every=1)
    assert adaptive_policy("autofreeze(percentile=75, every=2)") == AutoFreeze(75.0, 2)
    assert not any(adaptive_policy(schedule) for schedule in (None, "0:6,3:9", "linear", "auto"))
    assert isinstance(AutoFreeze(), AdaptivePolicy)
    assert not any(isinstance(POLICIES[name](), AdaptivePolicy) for name in ("auto", "linear"))


@pytest.mark.parametrize(
    "schedule", ["autofreeze(101)", "autofreeze(-1)", "autofreeze(every=0)", "autofreeze(every=1.5)"]
)
def test_parameters_out_of_range_are_refused(schedule) -> None:
    with pytest.raises(
        ScheduleError, match=r"Expected autofreeze\(percentile=50.0, every=1\)|from 0 to 100|at least 1"
    ):
        parse_schedule(schedule)


def test_what_a_run_prepares_for() -> None:
    assert plan_stages("autofreeze(every=3)", 20, 4) == [Stage(0, 0, 0)]
    known = [Stage(0, 0, 0)]
    expected = [*known, Stage(1, 6, 1), Stage(2, 6, 2), Stage(3, 6, 3)]
    assert foreseen_stages("autofreeze(every=3)", known, 4) == expected
    assert foreseen_stages("0:2,3:4", plan_stages("0:2,3:4", 9, 4), 4) == [Stage(0, 0, 2), Stage(1, 3, 4)]
    with pytest.raises(ScheduleError, match="the model has one"):
        plan_stages("autofreeze", 20, 1)


# ---- AutoFreeze ----


def as_published(before: list[float], now: list[float], start_layer: int, percentile: float) -> int:
    """The rule in the words of the authors' code: the first layer to train from now on."""
    ratios = dict.fromkeys(range(len(now)), 0.0)
    for layer, size in enumerate(now):
        if size > 0:
            ratios[layer] = abs(before[layer] - size) / before[layer]
    threshold = np.percentile(list(ratios.values())[start_layer:], percentile)
    return next(layer for layer in range(start_layer, len(now)) if ratios[layer] >= threshold)


sizes = st.floats(0.01, 100)


@given(
    pairs=st.lists(st.tuples(sizes, sizes), min_size=2, max_size=12),
    percentile=st.floats(0, 100),
    data=st.data(),
)
def test_blocks_before_the_first_change_at_the_percentile_are_frozen(pairs, percentile, data) -> None:
    frozen = data.draw(st.integers(0, len(pairs) - 1))
    history = [[0.0] * frozen + [pair[place] for pair in pairs[frozen:]] for place in (0, 1)]
    split_point, reason = AutoFreeze(percentile).decide([[9.9] * len(pairs), *history], frozen)
    assert split_point == as_published(*history, frozen, percentile)
    assert frozen <= split_point < len(pairs)  # front to back, and never all
    assert bool(reason) == (split_point > frozen)


def test_what_is_decided_and_why() -> None:
    history = [[1.0, 1.0, 1.0, 1.0], [1.1, 0.8, 2.0, 1.0]]
    split_point, reason = AutoFreeze().decide(history, 0)
    assert split_point == 1  # changes of .1, .2, 1 and 0; half of them is up to .15
    assert reason == (
        "autofreeze: gradients of block 0 changed by 10.00% at most since the interval before, those of block 1 by 20.00%; "
        "percentile 50 is 15.00%."
    )
    assert AutoFreeze(percentile=100).decide(history, 0)[0] == 2
    assert AutoFreeze(percentile=0).decide(history, 0) == (0, "")
    assert (
        AutoFreeze().decide([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.1, 3.0]], 2)[0] == 3
    )  # those that train alone are compared
    assert AutoFreeze().decide(history[:1], 0) == (0, "")


@pytest.mark.parametrize("odd", [math.nan, math.inf, 0.0])
def test_nothing_is_frozen_where_a_change_is_no_number(odd) -> None:
    assert AutoFreeze().decide([[1.0, odd, 1.0], [1.0, 1.0, 2.0]], 0) == (0, "")


def test_a_block_without_gradients_has_not_changed() -> None:
    """Adapters may be in some blocks only."""
    assert AutoFreeze().decide([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.5, 2.0]], 0)[0] == 2
