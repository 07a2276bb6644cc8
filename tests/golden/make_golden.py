"""Writes ``tests/golden/v1``. Run it by hand, once per format version; no test ever does.

    python tests/golden/make_golden.py

A change of what it writes is a change of the format: raise ``FORMAT_VERSION`` and write into a new folder beside this one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent / "v1"
sys.path.insert(0, str(GOLDEN.parents[1]))

import datasets  # noqa: E402
import pyarrow as pa  # noqa: E402
import zstandard  # noqa: E402
from tiny_cache import build, make_plan  # noqa: E402


def environment() -> dict[str, str]:
    """Versions on which bytes may depend that the format does not fix."""
    return {
        "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
        "pyarrow": pa.__version__,
        "datasets": datasets.__version__,
    }


if __name__ == "__main__":
    if GOLDEN.exists():
        sys.exit(f"{GOLDEN} exists. Golden files are never replaced; for a new format make a new folder.")
    with tempfile.TemporaryDirectory() as folder:
        directory = build(Path(folder), make_plan()).directory
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            target = GOLDEN / directory.name / path.relative_to(directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (GOLDEN / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
