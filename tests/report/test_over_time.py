"""Scores over seconds beside those of a baseline: which run was ahead when, by what clock, and what the page says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import call
from support.tiny_runs import decision, epochs, eval_log, log_history, record, write_plain_run

from hf_freezecache.report.cost import run_clock
from hf_freezecache.report.figures import figures_of, read_baseline
from hf_freezecache.report.over_time import over_time
from hf_freezecache.report.page import render_page
from hf_freezecache.report.plots import pictures_of
from hf_freezecache.report.record import write_run
from hf_freezecache.report.text import over_time_words


def points(*pairs: tuple[float | None, float], name: str | None = "accuracy") -> list[dict[str, Any]]:
    scores = [{"metric": name, "value": value if name else None} for _, value in pairs]
    return [{"seconds": when, "loss": 1 - value, **score} for (when, value), score in zip(pairs, scores, strict=True)]


def test_the_clock_counts_checks_building_and_saving_and_no_evaluation() -> None:
    known = record()
    clock = run_clock(known, 39.0)  # 1 s of checks, 34 s of building and training: 4 s more, 1 s in each epoch
    assert [clock(epoch) for epoch in (1, 2, 3, 4)] == [1 + 10 + 1, 1 + 20 + 2, 1 + 29 + 3, 1 + 34 + 4]
    assert clock(2.5) == 1 + 24 + 2.5 + 2.5  # building comes before the first step of the epoch
    assert clock(4.5) is None
    assert run_clock(known, None)(4) == 35  # of a run in pieces the rest is not known
    assert [point["seconds"] for point in figures_of(known)["evaluations"]] == [12, 23, 33, 39]


def test_plain_trainer_has_one_time_for_all(tmp_path) -> None:
    found = read_baseline(write_plain_run(tmp_path / "plain"))
    assert not found["timed_by_epoch"]
    assert [point["seconds"] for point in found["evaluations"]] == [20, 40]
    write_run(tmp_path / "ours", record())
    assert read_baseline(tmp_path / "ours")["timed_by_epoch"]


def test_who_is_ahead_when() -> None:
    found = over_time(points((10, 0.5), (20, 0.8), (30, 0.7)), points((5, 0.6), (15, 0.6), (40, 0.75)))
    assert found["spans"] == [[10, 20, "behind"], [20, 40, "ahead"], [40, None, "behind"]]
    assert (found["target"], found["reached"], found["baseline_reached"]) == (0.75, 20, 40)
    level = over_time(points((10, 0.5)), points((20, 0.5)))
    assert (level["spans"], level["reached"]) == ([[20, None, "level"]], 10)
    never = over_time(points((10, 0.5)), points((20, 0.6), (30, 0.7)))
    assert (never["reached"], never["baseline_reached"]) == (None, 30)


def test_losses_are_compared_where_there_is_no_metric_and_lower_is_better() -> None:
    found = over_time(points((10, 0.5), (20, 0.8), name=None), points((10, 0.6), name=None))
    assert [standing for *_, standing in found["spans"]] == ["behind", "ahead"]
    assert found["reached"] == 20


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (points((1, 0.5)), []),
        (points((None, 0.5)), points((1, 0.5))),
        (points((1, 0.5)), [{"metric": "accuracy", "value": 0.5, "loss": 1.0, "epoch": 1}]),  # of an older record
    ],
)
def test_what_was_not_timed_is_not_compared(mine, theirs) -> None:
    assert over_time(mine, theirs) is None


def test_a_metric_of_unknown_kind_is_drawn_and_not_judged() -> None:
    found = over_time(points((1, 0.5), name="spread"), points((1, 0.6), name="spread"))
    assert (found["spans"], found["target"]) == ([], None)


def test_words(tmp_path) -> None:
    baseline = read_baseline(write_plain_run(tmp_path / "plain", accuracy=0.78))
    assert over_time_words(figures_of(record(), baseline)) == (
        "The first score of this run is there after 12 s, of the baseline after 20 s. This run is behind from 20 s, ahead "
        "from 23 s and behind from 40 s. It had what the baseline ended at, 78.00%, after 23 s, the baseline after 40 s."
    )
    never = over_time_words(figures_of(record(), read_baseline(write_plain_run(tmp_path / "better", accuracy=0.9))))
    assert never.endswith("It never had what the baseline ended at, 90.00%; the baseline had it after 40 s.")
    assert over_time_words(figures_of(record())) is None
    swaying = [eval_log(epoch / 10, 0.5 + 0.2 * (epoch % 2), 1.0) for epoch in range(21, 41)]
    known = record(log_history=[*swaying, log_history()[-1]])
    assert "Since 25.5 s the lead has changed" in over_time_words(figures_of(known, baseline))


def test_the_page_draws_both_runs_and_says_who_was_ahead(tmp_path) -> None:
    page = render_page(figures_of(record(), read_baseline(write_plain_run(tmp_path / "plain"))))
    assert page.index("Accuracy over time, beside the baseline") < page.index("Loss and accuracy by stage")
    assert page.count("This run is behind from 20 s") >= 2
    assert "its points are spread evenly" in page
    assert "over_time" not in [picture.name for picture in pictures_of(figures_of(record()))]


def test_the_page_has_predicted_costs_beside_measured_ones() -> None:
    first = decision(
        0, 0, 3, built_ahead=[6], predicted={"cached_passes": 48, "cached_seconds": 90, "live_seconds": 120}
    )
    known = record(
        decisions=[first, decision(1, 2, 6)], epochs=epochs((0, 1, 10, 10, 4), (0, 2, 10, 10, 0), (1, 4, 20, 5, 3))
    )
    stages = figures_of(known)["stages"]
    assert [stage["seconds_spent"] for stage in stages] == [31, 8]  # that of both whose caches were built; its own
    page = render_page(figures_of(known))
    row = page.partition("Predicted and measured")[2].partition("<tbody>")[2].partition("</tr>")[0]
    for label, value in (
        ("passes, predicted with a cache", "48"),
        ("passes, predicted without", "\N{EN DASH}"),
        ("time, predicted with a cache", "90 s"),
        ("time, predicted without", "120 s"),
        ("time, measured with building", "31 s*"),
    ):
        assert f'<td data-label="{label}">{value}</td>' in row, row


@pytest.mark.slow
def test_the_command_says_it(tmp_path) -> None:
    write_run(Path("ours"), record())
    write_plain_run(Path("plain"))
    _, told, _ = call("report", "ours", "--baseline", "plain")
    assert "over time: The first score" in told
    _, printed, _ = call("report", "ours", "--baseline", "plain", "--json")
    assert json.loads(printed)["comparison"]["over_time"]["spans"]
