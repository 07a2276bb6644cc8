"""``hf-freezecache plan``: what caches would take, from a few images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import assert_one_line, call
from support.tiny import PROCESSOR, tiny_vit

from hf_freezecache.cli import plan as plan_module
from hf_freezecache.training.stage_costs import Rates


@pytest.fixture
def folder(images) -> None:
    tiny_vit().save_pretrained("model")
    Path("model/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    images.select(range(12)).to_parquet("data/train.parquet")


@pytest.mark.usefixtures("folder")
def test_predictions_follow_from_what_was_measured(monkeypatch) -> None:
    def measured(cache, split):
        return Rates(1.0, 2.0, 0.5, 0.25, 0.125 * split.split_point, stored_bytes=2.0**20)

    monkeypatch.setattr(plan_module, "measure_rates", measured)
    status, out, err = call("plan", "model", "data", "--epochs", 10, "--views", 2, "--rows", 4, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert [one["split_point"] for one in found] == [1, 2, 3]
    two = found[1]
    assert two["cache_bytes"] == 4 * 2 * 2**20
    assert two["build_seconds"] == pytest.approx(4 * (2 + 2 * 2 * 0.5 + 2 * 0.25))
    assert two["epoch_seconds"] == pytest.approx(4 * (0.25 + 3 * 2 * 0.5))
    assert two["cached_seconds"] == pytest.approx(two["build_seconds"] + 10 * two["epoch_seconds"])
    assert two["live_seconds"] == pytest.approx(4 * 10 * (1 + 2 * 0.5 + 3 * 2 * 0.5))
    assert two["full_seconds"] == pytest.approx(4 * 10 * (1 + 3 * 4 * 0.5))


@pytest.mark.usefixtures("folder")
def test_a_table_and_wrong_usage() -> None:
    status, out, err = call("plan", "model", "data", "--epochs", 3, "--split-points", "1,3", "--rows", 1000000)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["frozen", "cache", "build", "an", "epoch", "in", "all", "no", "cache", "unfrozen"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "3"]
    assert not any(Path("caches").iterdir())  # what was written to measure is gone
    assert call("plan", "model", "data", "--epochs", 3, "--split-points", "1,x")[0] == 2
    status, _, err = call("plan", "model", "data", "--epochs", 3, "--split-points", "9")
    assert status == 1
    assert_one_line(err)
    assert "9" in err
