"""``recipes/benchmarks/gpu.sh``: a dry run of every step, on whatever there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from support.documents import ROOT
from support.tiny import PROCESSOR, tiny_vit

SCRIPT = ROOT / "recipes" / "benchmarks" / "gpu.sh"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "SPLIT_POINT": "3", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.slow
def test_every_step_runs_dry(images) -> None:
    tiny_vit(image_size=224, patch_size=56).save_pretrained("model")
    sizes = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    Path("model/preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **sizes}))
    for name in ("train", "test"):
        images.to_parquet(f"data/{name}.parquet")
    done = run("30", "model", "data", "out", "--dry")
    assert done.stdout.splitlines()[-1] == "records in out; 0 of 6 steps failed", done.stdout
    (found,) = json.loads(Path("out/device.json").read_text())["results"].values()
    assert {"full_in_memory", "frozen", "cached", "limit"} <= set(found["images_per_second"])
    assert list(found["trainer"]) == ["full", "frozen", "cached"]
    assert found["trainer_cached/limit"] > 0
    with tarfile.open("out/records.tar.gz") as packed:
        names = {Path(name).name for name in packed.getnames()}
    assert {"device.json", "reading.json", "evaluating.json", "time_to_accuracy.json", "tests.log"} <= names
    for one in found["trainer"].values():
        assert one["synchronizations"] is None or one["synchronizations"] >= 0
        assert 0 < sum(one["operations"].values()) <= 1.01
    assert json.loads(Path("out/reading.json").read_text())["results"]
    assert json.loads(Path("out/evaluating.json").read_text())["results"]
    phases = {run["phase"] for run in json.loads(Path("out/time_to_accuracy.json").read_text())["results"]["runs"]}
    assert phases == {"tune", "test", "clock"}


def test_without_time_nothing_begins() -> None:
    done = run("0", "model", "data", "out", PYTHON="no-such-program")
    assert done.returncode == 1
    assert done.stdout.count("no time is left") == 6
    assert done.stdout.splitlines()[-1] == "records in out; 6 of 6 steps failed"


@pytest.mark.slow
def test_it_ends_in_time_whatever_a_step_does() -> None:
    stubborn = Path("stubborn")
    stubborn.write_text("#!/bin/bash\ntrap '' TERM\necho begun\nwhile true; do sleep 1; done\n")
    stubborn.chmod(0o755)
    began = time.monotonic()
    done = run("0.15", "model", "data", "out", PYTHON=str(stubborn.absolute()))
    assert time.monotonic() - began < 0.15 * 60 + 2
    assert "begun" in done.stdout
    assert done.stdout.splitlines()[-1] == "records in out; 6 of 6 steps failed"


def test_wrong_usage_is_told() -> None:
    done = subprocess.run([str(SCRIPT), "8"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage:" in done.stderr
