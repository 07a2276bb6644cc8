"""What decides which tests run, and the children that tests start."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.children import Child, run_group
from support.slow_budget import SlowBudget, spread


@pytest.mark.parametrize("total", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("kept", [1, 2, 5])
def test_of_a_family_as_many_run_as_are_asked_for(total, kept) -> None:
    numbers = spread(total, kept)
    assert len(numbers) == min(total, kept)
    assert numbers <= set(range(total))
    assert 0 in numbers
    assert kept == 1 or total - 1 in numbers


def test_each_file_gets_its_share_of_the_time_for_slow_tests(monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    budget = SlowBudget(SimpleNamespace(getoption=lambda name: 60.0))
    budget.files = [Path(name) for name in "abc"]
    assert budget.deadline(Path("a")) == 120
    now = 105  # the first took five seconds only
    assert budget.deadline(Path("b")) == pytest.approx(105 + 55 / 2)
    now = 160
    assert budget.deadline(Path("c")) == 160
    assert budget.deadline(Path("a")) == 120


def report(number: int) -> None:
    print(number, os.environ["RANK"], Path.cwd().name, flush=True)
    if os.environ["RANK"] == str(number):
        os._exit(7)


def wait(mark: Path) -> None:
    mark.touch()
    time.sleep(600)


@pytest.mark.slow  # other tests use children, too; these say what is wrong if all of them fail
def test_children_tell_their_output_and_how_they_ended(tmp_path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    assert run_group(report, 5, folders=folders) == ["5 0 a\n", "5 1 b\n"]
    with pytest.raises(RuntimeError, match=r"7.*\n(.*\n)*1 1 b"):
        run_group(report, 1, folders=folders)
    with Child(wait, tmp_path / "mark") as child:
        child.wait_for(tmp_path / "mark")
        assert child.status is None
        child.kill()
        assert child.status == -signal.SIGKILL
    with Child(wait, tmp_path / "again") as child, pytest.raises(TimeoutError, match="ran for more than 0 s"):
        child.wait(0.1)
