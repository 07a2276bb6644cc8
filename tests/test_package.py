"""What the package says of itself, in the places that must agree."""

from __future__ import annotations

import re
from pathlib import Path

import hf_freezecache

ROOT = Path(__file__).parents[1]


def test_one_version() -> None:
    version = hf_freezecache.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()  # hatch reads it out of the package
