"""Runs the tests of Hugging Face's own Trainer twice, and says where ``FreezeCacheTrainer`` differs from ``Trainer``.

Without ``freeze_config`` one is the other, so each test has to end alike. It takes a checkout of transformers, best of the version
that is installed, and of it uses the tests only: what they test is the installed package.

    git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers
    python .ci/hf_trainer_tests.py transformers                                # all of tests/trainer
    python .ci/hf_trainer_tests.py transformers -- -k checkpoint -n 4          # what follows -- goes to pytest

Exit status: 0 if all tests ended alike, 1 if any did not, 2 if none passed.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

#: Environment of a test run: the class that stands for ``Trainer``, where outcomes go, and seconds for each test.
CLASS, REPORT, LIMIT = (f"HF_TRAINER_TESTS_{name}" for name in ("CLASS", "REPORT", "LIMIT"))
TRAINERS = ("Trainer", "FreezeCacheTrainer")
#: The worst of setup, call and teardown counts.
ORDER = ("passed", "skipped", "failed", "error")


# ---- In pytest, as a plugin ----


def pytest_configure(config: pytest.Config) -> None:
    """Put the class in ``Trainer``'s place before any test module is imported."""
    if os.environ.get(CLASS) == TRAINERS[1]:
        import transformers
        import transformers.trainer

        from hf_freezecache import FreezeCacheTrainer

        transformers.Trainer = transformers.trainer.Trainer = FreezeCacheTrainer


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Let no test take longer than the limit."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"stopped after {os.environ[LIMIT]} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(int(os.environ.get(LIMIT, "0")))
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note what cannot be collected."""
    if report.failed:
        _note(report.nodeid, "error", str(report.longrepr))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note how a part of a test ended."""
    outcome = "error" if report.failed and report.when != "call" else report.outcome
    _note(report.nodeid, outcome, str(report.longrepr) if report.failed else "")


def _note(test: str, outcome: str, text: str) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ and REPORT in os.environ:  # workers tell the process that started them
        with Path(os.environ[REPORT]).open("a") as file:
            file.write(json.dumps([test, outcome, text]) + "\n")


# ---- By itself ----


def run(checkout: Path, trainer: str, limit: int, arguments: list[str]) -> dict[str, tuple[str, str]]:
    """Run the tests with a class in ``Trainer``'s place; return test -> how it ended, and the report of a failure."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        report.touch()
        here = Path(__file__).resolve().parent
        environment = {
            # Not those of a run of pytest that this one is part of.
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]),
            CLASS: trainer,
            REPORT: str(report),
            LIMIT: str(limit),
        }
        options = ["-p", Path(__file__).stem, "-p", "no:cacheprovider", "-q", "--tb=short", "--no-header", "-rN"]
        where = arguments if any(not word.startswith("-") and word.endswith(".py") for word in arguments) else None
        command = [sys.executable, "-m", "pytest", *options, *(where or ["tests/trainer", *arguments])]
        ended = subprocess.run(command, check=False, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True)
        print(ended.stdout.strip().rpartition("\n")[2])
        outcomes: dict[str, tuple[str, str]] = {}
        for line in report.read_text().splitlines():
            test, outcome, text = json.loads(line)
            known = outcomes.get(test, ("passed", ""))
            outcomes[test] = max(known, (outcome, text), key=lambda ended: ORDER.index(ended[0]))
    return outcomes


def version_of(checkout: Path) -> str:
    """Return the version of a checkout, or ``unknown``."""
    path = checkout / "src" / "transformers" / "__init__.py"
    found = re.search(r'^__version__ = "(.+)"', path.read_text(), re.M) if path.is_file() else None
    return found.group(1) if found else "unknown"


def main() -> int:
    """Run both, compare, and return the exit status."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of a checkout of transformers")
    parser.add_argument("--limit", type=int, default=120, metavar="SECONDS", help="for each test; default 120")
    settings = parser.parse_args(words[:cut])
    if not (settings.checkout / "tests" / "trainer").is_dir():
        parser.error(f"{settings.checkout} holds no tests/trainer: give the folder of a checkout of transformers")
    import transformers

    print(f"tests of transformers {version_of(settings.checkout)}, run on {transformers.__version__}")
    ended = {}
    for trainer in TRAINERS:
        print(f"{trainer}: ", end="", flush=True)
        ended[trainer] = run(settings.checkout, trainer, settings.limit, words[cut + 1 :])
        print(f"  {dict(sorted(collections.Counter(outcome for outcome, _ in ended[trainer].values()).items()))}")
    plain, own = ended.values()
    absent = ("not run", "")
    different = [test for test in sorted(plain | own) if plain.get(test, absent)[0] != own.get(test, absent)[0]]
    for test in different:
        (before, first), (after, second) = plain.get(test, absent), own.get(test, absent)
        print(f"\n{test}: {before} with {TRAINERS[0]}, {after} with {TRAINERS[1]}\n{second or first}")
    print(f"{len(plain | own) - len(different)} tests ended alike, {len(different)} did not")
    if different:
        return 1
    return 0 if any(outcome == "passed" for outcome, _ in plain.values()) else 2


if __name__ == "__main__":
    sys.exit(main())
