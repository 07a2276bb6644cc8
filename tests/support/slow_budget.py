"""Which slow tests run: some of a family by default, and as many as a given time allows."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest

#: Reason of what ``--slow-budget`` skips.
OUT_OF_BUDGET = "the time of --slow-budget is used up"


def spread(total: int, kept: int) -> set[int]:
    """Return ``kept`` of the numbers below ``total``, the first and the last among them, evenly spread."""
    if kept >= total:
        return set(range(total))
    return {round(number * (total - 1) / max(1, kept - 1)) for number in range(kept)}


class SlowBudget:
    """Skips slow tests once the time is used up. Every file gets its share of what the files before have left."""

    def __init__(self, config: pytest.Config) -> None:
        self.budget = config.getoption("--slow-budget")
        self.processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        self.began = time.monotonic()
        self.files: list[Path] = []
        self.deadlines: dict[Path, float] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.files = list(dict.fromkeys(item.path for item in items if item.get_closest_marker("slow")))
        self.began = time.monotonic()

    def deadline(self, path: Path) -> float:
        """Return when the last slow test of a file may start. Files are handed out in order, whole, to all processes."""
        if path not in self.deadlines:
            now = time.monotonic()
            left = max(0.0, self.began + self.budget - now)
            later = len(self.files) - 1 - self.files.index(path)
            self.deadlines[path] = now + left / math.ceil(1 + later / self.processes)
        return self.deadlines[path]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.get_closest_marker("slow") and time.monotonic() > self.deadline(item.path):
            pytest.skip(OUT_OF_BUDGET)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        reports = terminalreporter.stats.get("skipped", [])
        names = [report.nodeid for report in reports if OUT_OF_BUDGET in str(report.longrepr)]
        terminalreporter.write_line(f"--slow-budget {self.budget:.0f}: {len(names)} slow tests were not run")
        for name in names:
            terminalreporter.write_line(f"  {name}")
