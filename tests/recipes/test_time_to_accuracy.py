"""``recipes/benchmarks/time_to_accuracy.py``: how it counts, tunes and compares, and the whole of it on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import math
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
SCRIPT = BENCHMARKS / "time_to_accuracy.py"


@pytest.fixture(autouse=True)
def _recipes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("text", "cost"),
    [
        ("full/epochs=4/decay=0.75", 4.0),
        ("lora/epochs=3", 2.0),
        ("live/k=all/epochs=3", 1.0),
        ("live/k=6/epochs=4", (6 + 18) * 4 / 36),
        ("naive/k=9/epochs=8", (9 + 9 * 8) / 36),
        ("ours/k=11/epochs=6/views=1", (11 + 3 * 6) / 36),
        ("ours/k=9/epochs=8/views=2/keep=0.5", (2 * 9 + 9 * 8 * 99 / 197) / 36),
        # The second cache is computed from the first.
        ("ours/schedule=0:6,4:9/epochs=10/views=2", (2 * 6 + 18 * 4 + 2 * 3 + 9 * 6) / 36),
        # Epochs before the first stage are full ones.
        ("ours/schedule=2:6/epochs=6/views=2", (36 * 2 + 2 * 6 + 18 * 4) / 36),
        ("ours/schedule=0:all,2:4/epochs=6/keep=0.5/rank=16", 12 / 36 + 4 * 2 * 8 * 99 / 197 / 36),
        # Without frozen blocks the first sees all tokens.
        ("ours/schedule=0:all,2:0/epochs=6/plain=2/unfrozen=0.5", (12 + 4 * 3 * (1 + 11 * 99 / 197)) / 36),
        # Queries, keys and values are a quarter of a block.
        ("ours/schedule=0:all,2:0/epochs=6/weights=qkv", (12 + 4 * 2.25 * 12) / 36),
        ("ours/schedule=0:all,2:0/epochs=3/weights=qkv/rows=0.2", (12 / 5 + 2.25 * 12) / 36),
        ("ours/schedule=0:all,2:6/epochs=3/rows=0.2", (6 + 6 / 5 + 3 * 6) / 36),
    ],
)
def test_the_cost_counts_passes_of_builds_and_steps(text: str, cost: float) -> None:
    from accuracy_arms import Arm, count_passes

    # 196 patches: of 197 tokens a half keeps 1 + 98.
    assert count_passes(Arm.parse(text), 12, 196).epochs(12)["cost"] == pytest.approx(cost, abs=1e-4)


def test_a_policy_that_decides_while_training_is_an_arm() -> None:
    from accuracy_arms import Arm, count_passes

    for kind in ("ours", "live"):
        text = f"{kind}/schedule=autofreeze(percentile=75,every=2)/epochs=8/decay=0.75"
        arm = Arm.parse(text)
        assert (arm.name, arm.schedule) == (text, "autofreeze(percentile=75,every=2)")
        assert count_passes(arm, 12, 196).epochs(12)["cost"] == 8  # as far as it is known before
        assert arm.several_caches == (kind == "ours")  # behind trained blocks
    done = [{"epochs": 4, "split_point": 0, "cached": False, "views": 0, "keep": 1.0}]
    done += [{"epochs": 2, "split_point": point, "cached": True, "views": 2, "keep": 1.0} for point in (3, 7)]
    cost = 4 + (2 * 3 + 27 * 2 + 2 * 4 + 15 * 2) / 36
    assert count_passes(Arm.parse(text), 12, 196, done).epochs(12)["cost"] == pytest.approx(cost, abs=1e-4)
    with pytest.raises(SystemExit, match="decides while training"):
        Arm.parse("naive/schedule=autofreeze/epochs=3")


def test_an_arm_has_one_name_and_bad_ones_are_refused() -> None:
    from accuracy_arms import GROUPS, Arm, chosen_arms

    from hf_freezecache.by_split_point import parse_lr_scale

    for text in GROUPS["all"]:
        assert Arm.parse(Arm.parse(text).name) == Arm.parse(text)
        parse_lr_scale(Arm.parse(text).scale or "auto")
    assert Arm.parse("ours/decay=0.750/epochs=8/schedule=0:9").name == "ours/k=9/epochs=8/decay=0.75"
    assert [arm.name for arm in chosen_arms(["full/epochs=2", "naive", "full/epochs=2"])][:2] == [
        "full/epochs=2",
        "naive/k=11/epochs=6/decay=0.75",
    ]
    caches = {"schedule=0:all,2:6": False, "schedule=0:6,1:all": True, "schedule=autofreeze()": True}
    assert {text: Arm.parse(f"ours/{text}/epochs=3").several_caches for text in caches} == caches
    assert Arm.parse("naive/k=all").name == "naive/k=all/epochs=1"
    for text in ("none/epochs=1", "full/epoch=1", "full/epochs", "ours/epochs=3"):
        with pytest.raises(SystemExit, match=text):
            Arm.parse(text)


def test_a_line_for_defaults_has_no_arm_with_a_setting_given() -> None:
    """README says that ``auto`` has all its defaults."""
    from accuracy_arms import Arm
    from accuracy_front import LINES, line_of

    base = "auto/epochs=1/budget=1"
    assert line_of(Arm.parse(base)) == "schedule='auto'"
    assert line_of(Arm.parse(f"{base}/decay=0.75")) == "schedule='auto', layer-wise decay"
    for setting in ("keep=0.25", "views=2", "scale=1", "keep=0.5/decay=0.75"):
        assert line_of(Arm.parse(f"{base}/{setting}")) == "schedule='auto', a setting given"
        assert line_of(Arm.parse(f"{base}/{setting}")) in LINES


def test_auto_takes_the_rate_of_what_trains_the_same_weights_without_freezing() -> None:
    from accuracy_arms import Arm, rate_source
    from accuracy_front import line_of

    known = [Arm.parse(text) for text in ("full/epochs=2/decay=0.75", "lora/epochs=1", "lora/epochs=4")]
    auto, adapters = Arm.parse("auto/epochs=3/budget=0.5/decay=0.75"), Arm.parse("auto/epochs=3/budget=0.5/rank=16")
    assert rate_source(auto, known) == known[0]
    assert rate_source(adapters, known) == known[2]  # of the nearest number of epochs
    assert rate_source(known[1], known) is None
    plain = Arm.parse("auto/epochs=3/budget=0.5")
    lines = ["schedule='auto'", "schedule='auto', layer-wise decay", "schedule='auto', LoRA"]
    assert [line_of(arm) for arm in (plain, auto, adapters)] == lines


def test_the_grid_grows_where_the_best_rate_lies_on_its_edge() -> None:
    from accuracy_arms import Arm, rates_to_try

    arm = Arm.parse("full/epochs=4/decay=0.75")
    assert rates_to_try(arm, {}) == [3e-4, 6e-4, 1.2e-3, 2.4e-3]
    scores = {3e-4: (70.0, -1.0), 6e-4: (71.0, -1.0), 1.2e-3: (72.0, -1.0)}
    assert rates_to_try(arm, scores) == [2.4e-3]
    assert rates_to_try(arm, {**scores, 2.4e-3: (60.0, -1.0)}) == []
    # Of equal accuracies the lower loss is better: here on the edge.
    assert rates_to_try(arm, {**scores, 2.4e-3: (72.0, -0.9)}) == [4.8e-3]
    assert rates_to_try(arm, {**scores, 2.4e-3: (72.0, -0.9), 4.8e-3: (50.0, -2.0)}) == []
    assert rates_to_try(arm, {**scores, 2.4e-3: (72.0, -0.9)}, (4, 4)) == []
    assert rates_to_try(arm, {**scores, 3e-4: (80.0, -1.0), 2.4e-3: (60.0, -1.0)}) == [1.5e-4]


def test_rows_are_divided_evenly_by_class() -> None:
    from accuracy_runs import strata

    labels = list(np.random.default_rng(0).permutation([0] * 40 + [1] * 13 + [2] * 8))
    part = strata(labels, 4)
    assert max(Counter(part).values()) - min(Counter(part).values()) <= 1
    for label in range(3):
        sizes = Counter(part[np.asarray(labels) == label]).values()
        assert max(sizes) - min(sizes) <= 1


def test_fronts_are_compared_in_favour_of_the_baseline() -> None:
    from accuracy_arms import Arm
    from accuracy_front import Point, accuracy_at, best_within, cost_to_reach, front

    def point(cost: float, accuracy: float) -> Point:
        return Point(Arm.parse(f"full/epochs={cost}"), 1e-3, (accuracy,), math.nan, cost, cost)

    full = [point(1, 70.0), point(2, 80.0), point(3, 79.0), point(4, 84.0)]
    assert [one.cost for one in front(full)] == [1, 2, 4]
    assert accuracy_at(full, 0.5) is None
    assert accuracy_at(full, math.sqrt(2)) == pytest.approx(75.0)
    assert accuracy_at(full, 9) == 84.0
    assert cost_to_reach(full, 82.0, joined=True) == pytest.approx(2 * math.sqrt(2))
    assert cost_to_reach(full, 82.0, joined=False) == 4
    assert cost_to_reach(full, 85.0, joined=True) is None
    found = best_within(full, 3.5)
    assert found is not None
    assert found.cost == 2


@pytest.mark.slow
def test_it_runs_from_tuning_to_the_picture_and_repeats_nothing(tmp_path, monkeypatch, capsys) -> None:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--smoke", "--json", str(tmp_path / "a.json"), *arguments])
        capsys.readouterr()
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    told = run("--phase", "tune", "test")
    assert "FAILED" not in told
    record = json.loads((tmp_path / "a.json").read_text())
    runs = record["results"]["runs"]
    phases = Counter((run["phase"], run["arm"]) for run in runs)
    assert phases["test", "full/epochs=1/decay=0.75"] == phases["test", "ours/k=2/epochs=1"] == 1
    assert phases["tune", "full/epochs=1/decay=0.75"] == phases["tune", "ours/k=2/epochs=1"] == 2
    ours = next(run for run in runs if run["phase"] == "test" and run["arm"].startswith("ours"))
    assert (ours["cost_build"], ours["cost_train"]) == (round(2 / 12, 4), 0.5)
    assert ours["cache_bytes"] > 0
    assert (ours["train_images"], ours["test_images"]) == (32, 32)
    assert {run["train_images"] for run in runs if run["phase"] == "tune"} == {24}

    # A run that was lost is the only one repeated, and gives the same again.
    lost = runs.pop(3)
    (tmp_path / "a.json").write_text(json.dumps(record))
    told = run("--phase", "tune", "test", "table", "plot")
    assert told.count(": accuracy") == 1
    again = json.loads((tmp_path / "a.json").read_text())["results"]["runs"][-1]
    assert {name: again[name] for name in ("phase", "arm", "lr", "seed", "accuracy", "loss", "cost")} == {
        name: lost[name] for name in ("phase", "arm", "lr", "seed", "accuracy", "loss", "cost")
    }
    assert "| ours/k=2/epochs=1 |" in told
    picture = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert "cached (ours)" in "".join(picture.itertext())

    record["config"]["image_size"] = 32
    (tmp_path / "a.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="holds runs with image_size=32, not 16"):
        run("--phase", "tune")


@pytest.mark.slow
def test_every_kind_of_arm_runs_and_ours_is_timed_twice(tmp_path) -> None:
    ours = "ours/schedule=0:1,1:all/epochs=2/decay=0.5"
    arms = ["live/k=2/epochs=1", "naive/k=2/epochs=1/decay=0.75", ours]
    if importlib.util.find_spec("peft"):
        arms.append("lora/epochs=1")
    command = [sys.executable, str(SCRIPT), "--smoke", "--json", str(tmp_path / "a.json")]

    def run(*arguments: str) -> list[dict[str, Any]]:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True, timeout=250)
        assert "FAILED" not in done.stdout, done.stdout
        return json.loads((tmp_path / "a.json").read_text())["results"]["runs"]

    tested = [found for found in run("--phase", "tune", "test", "--smoke-arms", *arms) if found["phase"] == "test"]
    assert [found["arm"] for found in tested] == arms
    assert all(found["cache_bytes"] > 0 for found in tested[1:3])
    # Each in a process of its own, as wall-clock is measured.
    first, second = run("--phase", "clock", "--again", "--smoke-arms", ours)[-2:]
    assert (first["phase"], second["phase"]) == ("clock", "again")
    assert [stage["cache"] for stage in first["stages"]] == ["built", "built"]
    assert second["stages"][0]["cache"] == "found"
    assert first["cost"] == second["cost"]
    assert min(first["peak_memory_bytes"], first["images_per_second"]) > 0


def test_readmes_picture_shows_each_way_at_its_best_and_auto_at_its_defaults(tmp_path: Path) -> None:
    """From the committed records: a panel for each data set, and those by the clock where more than one arm was timed."""
    import accuracy_picture
    from accuracy_arms import Arm
    from matplotlib.figure import Figure
    from records import RESULTS, load

    records = [load(path.name) for path in sorted(RESULTS.glob("time_to_accuracy--*.json"))]
    drawn: list[Figure] = []
    subplots = Figure.subplots

    def kept(self, *args, **kwargs):
        drawn.append(self)
        return subplots(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "subplots", kept)
        accuracy_picture.draw_summary(records, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    shown = [axes for axes in drawn[0].axes if axes.axison]
    titles = [accuracy_picture.title_of(record) for record in records]
    timed = {
        title: [run for run in record["results"]["runs"] if run["phase"] == "clock"]
        for title, record in zip(titles, records, strict=True)
    }
    by_clock = [title for title, runs in timed.items() if len({run["arm"] for run in runs}) > 1]
    assert [axes.get_title(loc="left") for axes in shown] == [*by_clock, *titles]
    assert shown[0].get_xlabel() == accuracy_picture.SECONDS
    for axes in shown:
        assert {"full fine-tuning", "schedule='auto'"} <= set(axes.get_legend_handles_labels()[1])
    few = accuracy_picture.few_lines
    assert few(Arm.parse("full/epochs=1")) == few(Arm.parse("full/epochs=1/decay=0.75")) == "full fine-tuning"
    assert few(Arm.parse("auto/epochs=1/decay=0.75/budget=1")) not in accuracy_picture.FEW_LOOKS
