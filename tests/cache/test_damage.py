"""Random damage of small caches of every kind: always found, and never in a batch."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmarks"))
from damage import DamageTrials, Trial

FAST = {"flip": 120, "truncate": 60}
FULL = {"flip": 2000, "truncate": 500}


@pytest.fixture(scope="module")
def trials(tmp_path_factory) -> DamageTrials:
    return DamageTrials(tmp_path_factory.mktemp("damage") / "caches")


def run(trials: DamageTrials, kind: str, count: int) -> list[Trial]:
    trial = {"flip": trials.flip_trial, "truncate": trials.truncate_trial}[kind]
    return [trial(seed) for seed in range(count)]


def check(done: list[Trial], trials: DamageTrials) -> None:
    assert {(trial.cache, trial.file) for trial in done} == set(trials.files)
    assert [trial for trial in done if not trial.detected] == []
    assert [trial for trial in done if trial.read == "different"] == []
    counts = Counter(trial.read for trial in done)
    assert counts["refused"] > len(done) / 3
    # What training does not read, and no more, goes by unseen: index tables, and bits that zstd does not use.
    unseen = [trial for trial in done if trial.read == "identical" and not trial.file.startswith("index/")]
    assert len(unseen) < 0.03 * len(done)


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.by_default(1)
def test_damage_is_found_and_reaches_no_batch(trials, kind) -> None:
    check(run(trials, kind, FAST[kind]), trials)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL)
def test_all_of_2000_flips_and_500_truncations_are_found(trials, kind) -> None:
    done = run(trials, kind, FULL[kind])
    check(done, trials)
    print(f"{kind}: {len(done)} trials, {sum(t.detected for t in done)} detected, {Counter(t.read for t in done)}")


@pytest.mark.slow
def test_the_trials_tell_wrong_values(trials, monkeypatch) -> None:
    """A reader that gives other labels is found out; and one that no hash helps still gives none."""
    import hf_freezecache.cache.reader as reader_module
    import hf_freezecache.cache.verify as verify_module

    monkeypatch.setattr(verify_module, "file_sha256", lambda file: "")
    monkeypatch.setattr(verify_module, "_content_problems", lambda reader, damaged: {})
    assert not any(trial.read == "different" for trial in run(trials, "flip", 30))
    genuine = reader_module.read_extra

    def wrong(spec, frame, samples):
        return genuine(spec, frame, samples) + (spec.name == "labels")

    monkeypatch.setattr(reader_module, "read_extra", wrong)
    assert any(trial.read == "different" for trial in run(trials, "flip", 60))
