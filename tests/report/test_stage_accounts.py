"""Card and page say what each stage did: in every mode, and where a stage did other than the mode asked for."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_trainer, tiny_vit
from support.tiny_runs import decision, epochs, live, log_history, partial_record, record

from hf_freezecache.report.figures import figures_of
from hf_freezecache.report.model_card import card_arguments, render_card
from hf_freezecache.report.page import render_page
from hf_freezecache.report.record import RunRecord, read_run

FULL_DISK = "The disk of the caches has 1.0 MiB left and the cache needs 2.0 MiB, so mode='auto' trains on images."
TWO_VIEWS = "It trained from a cache of 2 views of each image"
ALL_CACHED = (
    "Where blocks were frozen, they ran once per stored view, and the rest was trained from a cache of their output."
)
NOTHING = "nothing was cached"


def documents(known: RunRecord) -> tuple[str, str]:
    """Card and page, both as plain text."""
    figures = figures_of(known)
    page = html.unescape(re.sub(r"<[^>]+>", " ", render_page(figures).partition("<main>")[2]))
    return render_card(figures, card_arguments(model_name="flowers")), " ".join(page.split())


def check(known: RunRecord, *sentences: str) -> tuple[str, str]:
    texts = documents(known)
    for text in texts:
        for sentence in sentences:
            assert sentence in text, sentence
        assert (NOTHING in text) == (not any(made.has_cache for made in known.decisions))
    return texts


def one_stage(**settings: Any) -> RunRecord:
    """Four epochs of 100 images at 6 of 12 blocks."""
    made = settings.pop("made", None) or decision(0, 0, 6)
    trained = epochs(*((0, epoch, 20.0, 5.0, 4.0 * (epoch == 1)) for epoch in (1, 2, 3, 4)))
    plan = [{"index": 0, "start_epoch": 0, "split_point": 6}]
    return record(decisions=[made], epochs=trained, planned_stages=plan, **settings)


def test_mode_always() -> None:
    check(
        record(cache={"mode": "always"}),
        ALL_CACHED,
        "It trained on images, and no block was frozen. Reason: No block is frozen. Training took 20 s.",
        f"{TWO_VIEWS}, which this run built from the images, with a codec chosen by measurement. Reason: mode='always'. "
        "Predicted passes through blocks per image: 48 with a cache, 48 without one; it took 48. Building the cache took "
        "3.00 s, training 10 s.",
    )


def test_mode_auto_with_a_cache_that_pays() -> None:
    made = decision(0, 0, 6, reason="Caching takes 84 passes per image, training on images 96.")
    made.predicted = {"cached_passes": 84, "live_passes": 96}
    check(
        one_stage(made=made, cache={"mode": "auto"}),
        ALL_CACHED,
        "Reason: Caching takes 84 passes per image, training on images 96. Predicted passes through blocks per image: 84 "
        "with a cache, 96 without one; it took 84.",
    )


@pytest.mark.parametrize(("mode", "reason"), [("never", "mode='never'."), ("auto", "Caching would not pay.")])
@pytest.mark.slow
def test_frozen_blocks_that_ran_in_every_step(mode, reason) -> None:
    made = live(0, 0, 6, reason, predicted={"live_passes": 96})
    check(
        one_stage(made=made, cache={"mode": mode}),
        f"The frozen blocks ran in every step; {NOTHING}.",
        f"It trained on images, and 6 frozen blocks ran in every step. Reason: {reason} Predicted passes through blocks per "
        "image: 96 without one; it took 96. Training took 20 s.",
    )


def test_a_stage_that_fell_back_beside_one_with_a_cache() -> None:
    """mode='auto': the second stage found a full disk."""
    fell_back = live(1, 2, 6, FULL_DISK, build_seconds=1.0)
    card, page = check(
        record(unfrozen=False, decisions=[decision(0, 0, 3), fell_back], cache={"mode": "auto"}),
        "Of 2 stages with frozen blocks, 1 trained from a cache of their output; in the other the frozen blocks ran in "
        "every step.",
        f"{TWO_VIEWS}, which this run built from the images",
        f"It trained on images, and 6 frozen blocks ran in every step. Reason: {FULL_DISK} Trying to build a cache took "
        "1.00 s, training 10 s.",
    )
    assert "| 0 | 3 of 12 | 0 | built cache |" in card
    assert "| 1 | 6 of 12 | 2 | images | 20.0 | 10 s | 4.00 s | none |" in card
    assert "in 1 cache " in page


def test_a_run_that_fell_back_in_its_only_stage() -> None:
    check(one_stage(made=live(0, 0, 6, FULL_DISK), cache={"mode": "auto"}), NOTHING, f"Reason: {FULL_DISK}")


@pytest.mark.slow
def test_a_cache_that_was_found() -> None:
    found = decision(0, 0, 6, cache="found", built_from=None, built_shards=0, build_seconds=0.25, calibrated=False)
    card, _ = check(
        one_stage(made=found),
        ALL_CACHED,
        f"{TWO_VIEWS}, which was found. Reason: mode='always'.",
        "it took 72. Finding the cache took 0.25 s, training 20 s.",
    )
    assert "| found cache |" in card


@pytest.mark.slow
def test_a_cache_that_was_built_from_the_one_before() -> None:
    promoted = decision(1, 2, 6, built_from=3, calibrated=False)
    check(
        record(unfrozen=False, decisions=[decision(0, 0, 3), promoted]),
        f"{TWO_VIEWS}, which this run built from the cache of split point 3. Reason",
        "it took 42.",
    )


@pytest.mark.slow
def test_two_stages_of_one_split_point_are_two_rows() -> None:
    second = decision(1, 2, 6, cache="found", built_from=None, reason="The cache of stage 0 serves this one too.")
    card, page = check(
        record(decisions=[decision(0, 0, 6), second]),
        "Reason: The cache of stage 0 serves this one too.",
        f"{TWO_VIEWS}, which was found.",
        f"{TWO_VIEWS}, which this run built from the images",
    )
    rows = [line for line in card.splitlines() if "| 6 of 12 |" in line]
    assert [row.split("|")[1:5] for row in rows] == [
        [" 0 ", " 6 of 12 ", " 0 ", " built cache "],
        [" 1 ", " 6 of 12 ", " 2 ", " found cache "],
    ]
    assert "in 1 cache " in page  # one folder serves both
    assert "6 from epoch 2" in page


@pytest.mark.slow
def test_a_resumed_run() -> None:
    known = one_stage()
    known.keep_decision(decision(0, 0, 6, cache="found", built_from=None, calibrated=False, build_seconds=0.5))
    check(
        known,
        f"{TWO_VIEWS}, which this run built from the images, with a codec chosen by measurement.",
        "Building the cache took 3.50 s, training 20 s.",
    )


@pytest.mark.slow
def test_a_run_that_was_stopped_early() -> None:
    stopped = record(global_step=15, log_history=[entry for entry in log_history() if entry["epoch"] <= 1.5])
    stopped.decisions, stopped.epochs = stopped.decisions[:1], stopped.epochs[:1]
    check(
        stopped,
        "Training was stopped early, after 1.5 epochs, step 15 of 40.",
        "0 of 12 blocks frozen from epoch 0, 6 from epoch 2 (not reached)",
        "No block was frozen, and nothing was cached.",
    )


@pytest.mark.slow
def test_a_run_that_was_interrupted_within_a_stage() -> None:
    check(
        partial_record(3, global_step=30),
        "Training did not finish: the figures are those of step 30 of 40.",
        "it took 30. Building the cache took 3.00 s, training 5.00 s.",
    )


@pytest.mark.slow
def test_an_exact_cache_is_called_exact_and_an_unmeasured_one_is_not() -> None:
    exact = decision(0, 0, 6, codec={"name": "lossless", "configuration": {}}, calibration=None, distortion={})
    assert "| 2.50 | exact |" in documents(one_stage(made=exact))[0]
    assert "| 2.50 | not measured |" in documents(one_stage(made=decision(0, 0, 6, distortion={})))[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["always", "auto", "never"])
def test_a_run_that_trained_says_what_it_did(train_dataset, mode) -> None:
    run = make_trainer(tiny_vit(), train_dataset, num_train_epochs=3, save_strategy="epoch", cache={"mode": mode})
    run.train()
    run.create_model_card()
    known = read_run(Path("out"))
    assert [(made.stage, made.split_point) for made in known.decisions] == [(0, 1), (1, 3)]
    assert all(made.reason for made in known.decisions)
    card, _ = check(known)
    assert len(re.findall("(?m)^- Stage ", card)) == 2
    cached = [made.trained_from == "cache" for made in known.decisions]
    assert cached == [made.has_cache for made in known.decisions]
    if mode != "auto":  # which decides for itself
        assert cached == [mode == "always"] * 2
    assert (NOTHING in Path("out/README.md").read_text()) == (not any(cached))
