"""``recipes/benchmarks/gpu.sh``: a dry run of every step, on whatever there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.documents import ROOT
from support.tiny import PROCESSOR, tiny_vit

SCRIPT = ROOT / "recipes" / "benchmarks" / "gpu.sh"


@pytest.mark.slow
@pytest.mark.long
def test_every_step_runs_dry(images) -> None:
    tiny_vit(image_size=224, patch_size=56).save_pretrained("model")
    sizes = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    Path("model/preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **sizes}))
    for name in ("train", "test"):
        images.to_parquet(f"data/{name}.parquet")
    done = subprocess.run(
        [str(SCRIPT), "30", "model", "data", "out", "--dry"],
        env={**os.environ, "PYTHON": sys.executable, "SPLIT_POINTS": "2,3", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    # Without a GPU pytest has no test to run, and says so.
    failed = [line for line in done.stdout.splitlines() if ": status " in line and ": status 0" not in line]
    assert [line.split(":")[0] for line in failed] in ([], ["== tests"]), done.stdout
    assert {"epoch_cost--tiny.json", "epoch_cost--base.json", "evaluating.json"} <= {
        p.name for p in Path("out").iterdir()
    }


def test_wrong_usage_is_told() -> None:
    done = subprocess.run([str(SCRIPT), "8"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage:" in done.stderr
