"""The script that runs Hugging Face's own Trainer tests with both trainers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "hf_trainer_tests.py"
ALIKE = """
import pytest
from transformers import Trainer
from transformers.trainer import Trainer as Same

def test_one_class(): assert Trainer is Same and issubclass(Trainer, Trainer.__mro__[-2])
@pytest.mark.skip
def test_skipped(): ...
def test_fails_with_both(): assert False
"""
DIFFERENT = ALIKE + "def test_name(): assert Trainer.__name__ == 'Trainer'\n"


@pytest.mark.slow
@pytest.mark.parametrize(("source", "status"), [(ALIKE, 0), (DIFFERENT, 1), ("", 2), ("1 / 0", 2)])
def test_tests_that_end_differently_are_found(source, status, tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "trainer"
    folder.mkdir(parents=True)
    (folder / "test_trainer.py").write_text(source)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert ("test_name: passed with Trainer, failed with FreezeCacheTrainer" in done.stdout) == (status == 1)
    if source is DIFFERENT:
        assert "3 tests ended alike, 1 did not" in done.stdout


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "holds no tests/trainer" in done.stderr
