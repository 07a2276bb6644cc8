"""Schedules: what may be written, what it means, and what is refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_freezecache import FreezeConfig
from hf_freezecache.errors import ScheduleError
from hf_freezecache.schedules import (
    POLICIES,
    Linear,
    Stage,
    number_stages,
    parse_schedule,
    plan_stages,
    stage_at,
    thawed_to,
)


def pairs(schedule, num_epochs: int = 10, num_blocks: int = 12) -> list[tuple[int, int]]:
    stages = plan_stages(FreezeConfig(schedule=schedule).schedule, num_epochs, num_blocks)
    assert [stage.index for stage in stages] == list(range(len(stages)))
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


def test_without_a_schedule_nothing_is_frozen() -> None:
    assert plan_stages(FreezeConfig().schedule, 5, 12) == [Stage(0, 0, 0)]


def test_stages_with_one_split_point_are_told_apart() -> None:
    stages = plan_stages("1:6,3:6", 10, 12)
    assert stages == [Stage(0, 0, 0), Stage(1, 1, 6), Stage(2, 3, 6)]
    assert stages[1] != stages[2]
    assert [stage_at(stages, epoch).index for epoch in range(5)] == [0, 1, 1, 2, 2]
    assert stage_at(stages, 99) is stages[2]


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
        ("0:13", "freezes 13 blocks from epoch 0, but the model has 12: use whole split points from 0 to 12"),
    ],
)
def test_bad_schedules_are_refused_with_what_was_wrong(schedule, words) -> None:
    with pytest.raises(ScheduleError) as caught:
        pairs(schedule)
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "schedule", ["0:6,3", "zero:6", "-1:6", "2.5:6", "linear(0.5)", "cubic", "linear(", 6, ["0:6"]]
)
def test_what_needs_no_model_is_checked_at_construction(schedule) -> None:
    with pytest.raises(ScheduleError):
        FreezeConfig(schedule=schedule)


# ---- Policies ----


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", Linear()),
        (" linear ( ) ", Linear()),
        ("linear(0.1,0.6,0.5)", Linear(0.1, 0.6, 0.5)),
        ("linear(0, 1, 1)", Linear(0.0, 1.0, 1.0)),
        ("linear(level=.5)", Linear(level=0.5)),
        ("linear(0.1, level=0.5, end=0.7)", Linear(0.1, 0.7, 0.5)),
    ],
)
def test_a_policy_is_read_with_its_arguments(schedule, expected) -> None:
    assert parse_schedule(schedule) == expected
    assert FreezeConfig(schedule=schedule).schedule == schedule


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("cubic", f"unknown policy 'cubic'; known are {sorted(POLICIES)}"),
        ("Linear(0.0)", f"unknown policy 'Linear'; known are {sorted(POLICIES)}"),
        ("linear(0,1,1,1)", "too many positional arguments. Expected linear(start=0.0, end=0.5, level=0.75)"),
        ("linear(stop=1)", "unexpected keyword argument 'stop'. Expected linear(start=0.0, end=0.5, level=0.75)"),
        ("linear(0.1, start=0.2)", "multiple values for argument 'start'"),
        ("linear(end=1, end=1)", "an argument is given twice"),
        ("linear('a')", "start must be of type float, got 'a'"),
        ("linear(True)", "start must be of type float, got True"),
        ("linear(None)", "start must be of type float, got None"),
        ("linear([0.0])", "start must be of type float, got [0.0]"),
        ("linear(x)", "x is not a number or a text"),
        ("linear(exit())", "exit() is not a number or a text"),
        ("linear(*[0.1])", "*[0.1] is not a number or a text"),
        ("linear(**{'end': 1})", "unexpected keyword argument"),
        ("linear(0.1", "cannot be read"),
        ("linear(0.1)(0.2)", "cannot be read"),
        ("linear(0.1) + 1", "cannot be read"),
        ("linear(\0)", "cannot be read"),
        ("linear(start=0.5)", "start=0.5 and end=0.5"),
        ("linear(-0.1)", "start=-0.1"),
        ("linear(end=1.1)", "end=1.1"),
        ("linear(end=1e999)", "end=inf"),
        ("linear(level=1.1)", "in [0, 1], got 1.1"),
        ("linear(level=-0.1)", "in [0, 1], got -0.1"),
        ("linear(level=1e999)", "in [0, 1], got inf"),
    ],
)
def test_policies_that_cannot_be_read_are_refused_with_what_was_wrong(schedule, words) -> None:
    with pytest.raises(ScheduleError) as caught:
        FreezeConfig(schedule=schedule)
    assert words in str(caught.value)
    assert "Expected" in str(caught.value) or "known are" in str(caught.value)


@pytest.mark.parametrize("settings", [{"end": math.nan}, {"start": math.nan}, {"level": math.nan}])
def test_a_parameter_that_is_no_number_is_refused(settings) -> None:
    with pytest.raises(ScheduleError, match="nan"):
        Linear(**settings)


def test_arguments_are_never_run(monkeypatch) -> None:
    ran = []
    monkeypatch.setattr("builtins.print", lambda *args: ran.append(args))
    for schedule in ("linear(print(1))", "print(1)", "linear((lambda: print(1))())", "linear(f'{print(1)}')"):
        with pytest.raises(ScheduleError):
            parse_schedule(schedule)
    assert not ran


@dataclass(frozen=True)
class Steps:
    """A user's own policy, with parameters of every kind that is checked."""

    every: int
    by: int = 2
    name: str = "steps"
    late: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")

    def stages(self, num_epochs: int, num_blocks: int) -> list[Stage]:
        starts = range(self.every if self.late else 0, num_epochs, self.every)
        return number_stages((epoch, min(self.by * (index + 1), num_blocks)) for index, epoch in enumerate(starts))


def test_a_policy_of_the_users_own_takes_parameters(monkeypatch) -> None:
    monkeypatch.setitem(POLICIES, "steps", Steps)
    assert plan_stages("steps(4)", 10, 5) == [Stage(0, 0, 2), Stage(1, 4, 4), Stage(2, 8, 5)]
    assert plan_stages("steps(every=5, late=True, name='a:b, c')", 10, 12) == [Stage(0, 0, 0), Stage(1, 5, 2)]
    for schedule, words in {
        "steps": r"missing a required argument: 'every'. Expected steps\(every, by=2, name='steps', late=False\)",
        "steps(0)": "every must be at least 1, got 0",
        "steps(4.0)": "every must be of type int, got 4.0",
        "steps(4, name=5)": "name must be of type str, got 5",
        "steps(4, late=1)": "late must be of type bool, got 1",
        "cubic": r"known are \['auto', 'autofreeze', 'linear', 'steps'\]",
    }.items():
        with pytest.raises(ScheduleError, match=words):
            plan_stages(schedule, 10, 12)


def test_a_policy_of_the_users_own_is_checked_like_a_schedule(monkeypatch) -> None:
    def register(name: str, *pairs: tuple[int, int]) -> None:
        policy = dataclass(frozen=True)(type(name, (), {"stages": lambda self, epochs, blocks: number_stages(pairs)}))
        monkeypatch.setitem(POLICIES, name, policy)

    register("negative", (0, -1))
    register("back", (0, 1), (3, 2), (2, 3))
    register("late", (2, 3))
    register("none")
    for name, words in {"negative": "freezes -1 blocks", "back": "starts must increase"}.items():
        with pytest.raises(ScheduleError, match=words):
            plan_stages(name, 5, 12)
    assert plan_stages("late", 5, 12) == [Stage(0, 0, 0), Stage(1, 2, 3)]
    assert plan_stages("none()", 5, 12) == [Stage(0, 0, 0)]


def test_blocks_may_thaw() -> None:
    stages = plan_stages("0:12,2:9,4:6,5:8,6:0,7:3", 10, 12)
    assert [stage.split_point for stage in stages] == [12, 9, 6, 8, 0, 3]
    # Behind which later stages find everything as it is when a stage begins.
    assert [thawed_to(stage, stages) for stage in stages] == [[6, 9], [6], [], [], [], []]


def test_linear_by_hand() -> None:
    # 12 blocks, 10 epochs: 0 up to epoch 2, then 1.5 blocks an epoch, 6 from epoch 6 on.
    expected = [Stage(0, 0, 0), Stage(1, 3, 1), Stage(2, 4, 3), Stage(3, 5, 4), Stage(4, 6, 6)]
    assert plan_stages("linear(0.2, 0.6, 0.5)", 10, 12) == expected


def test_linear_reaches_its_level_and_no_more() -> None:
    whole = plan_stages("linear(0, 1, 1)", 12, 12)
    assert [stage_at(whole, epoch).split_point for epoch in range(12)] == list(range(12))
    assert plan_stages("linear(level=0)", 12, 12) == [Stage(0, 0, 0)]
    assert plan_stages("linear", 1, 12) == [Stage(0, 0, 0)]
    assert stage_at(plan_stages("linear", 100, 12), 99).split_point == 9


FRACTIONS = st.floats(0, 1)


@given(
    bounds=st.tuples(FRACTIONS, FRACTIONS).filter(lambda pair: pair[0] < pair[1]),
    level=FRACTIONS,
    num_epochs=st.integers(1, 60),
    num_blocks=st.integers(2, 48),
)
def test_linear_properties(bounds, level, num_epochs, num_blocks) -> None:
    stages = plan_stages(f"linear({bounds[0]!r}, {bounds[1]!r}, level={level!r})", num_epochs, num_blocks)
    assert stages[0].start_epoch == 0
    assert all(stage.start_epoch < num_epochs for stage in stages)
    for before, after in itertools.pairwise(stages):
        assert before.start_epoch < after.start_epoch
        assert before.split_point < after.split_point
    top = math.floor(num_blocks * level + 1e-9)
    for epoch in range(num_epochs):
        found, fraction = stage_at(stages, epoch).split_point, epoch / num_epochs
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
    stages = plan_stages(schedule, num_epochs, num_blocks)
    assert stages[0].start_epoch == 0
    for before, after in itertools.pairwise(stages):
        assert before.start_epoch < after.start_epoch
        assert before.split_point <= after.split_point
    in_force = 0
    for epoch in range(num_epochs + 3):
        in_force = dict(zip(starts, points, strict=True)).get(epoch, in_force)
        assert stage_at(stages, epoch).split_point == in_force


@given(num_epochs=st.integers(1, 60), numerator=st.integers(0, 59))
def test_a_fraction_of_training_is_the_first_epoch_at_or_behind_it(num_epochs, numerator) -> None:
    """Epoch e of n starts at fraction e / n; written with 12 digits it must still mean epoch e."""
    epoch = numerator % num_epochs
    schedule = f"{epoch / num_epochs:.12f}:3"
    stages = plan_stages(schedule, num_epochs, 12)
    assert (stages[-1].start_epoch, stages[-1].split_point) == (epoch, 3)


@given(
    st.one_of(
        st.text(alphabet="0123456789.:,- enaif", max_size=12),
        st.text(max_size=12),
        st.text(alphabet="0123456789.,=-*{}[]()'e \nend", max_size=12).map(lambda text: f"linear({text})"),
    )
)
def test_any_text_is_read_or_refused(text) -> None:
    try:
        stages = plan_stages(text, 10, 12)
    except ScheduleError:
        return
    assert stages[0].start_epoch == 0
    assert [stage.split_point for stage in stages] == sorted(stage.split_point for stage in stages)
