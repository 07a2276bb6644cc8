"""Where the committed records are, and how a page links to one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ROOT = HERE.parents[1]


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def link(name: str) -> str:
    return f"[record](recipes/benchmarks/results/{name})"


def interval(value: dict[str, Any], form: str = ".2f") -> str:
    """Return median and extremes, as ``record.spread`` has them."""
    return f"{value['median']:{form}} ({value['min']:{form}}-{value['max']:{form}})"
