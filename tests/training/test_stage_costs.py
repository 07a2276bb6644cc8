"""``mode="auto"`` measures a few images, and makes a cache where that pays."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from support import many
from support.children import run_group
from support.parity import assert_same, parameters_of
from support.tiny import Rows, SlowTransform, TinyTransform, make_trainer, tiny_vit

from hf_freezecache.training import stage_costs
from hf_freezecache.training.image_rates import Rates, Rendering
from hf_freezecache.training.stage_costs import build_seconds, stage_seconds


@pytest.fixture
def deciding(monkeypatch) -> None:
    monkeypatch.setattr(stage_costs, "LEAST_SECONDS", 0.1)


def trained(images, resume=None, cache=None, **settings):
    settings = {"schedule": "0:2", "num_train_epochs": 4, **settings}
    rows = images.with_transform(SlowTransform(True))
    trainer = make_trainer(tiny_vit(), rows, cache={"mode": "auto", "num_views": 1, **(cache or {})}, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
def test_a_cache_where_it_pays(images, deciding) -> None:
    decision = trained(images)._record.decisions[0]
    assert (decision.cache, decision.trained_from) == ("built", "cache")
    assert decision.predicted["cached_seconds"] < decision.predicted["live_seconds"]
    assert decision.predicted["live_seconds"] >= 4 * 50 * 0.01


def test_no_cache_where_it_does_not_pay(train_dataset, monkeypatch) -> None:
    rates = Rates(render=1.0, render_all=2.0, block=0.0, encode=1.0, decode=0.5)
    monkeypatch.setattr(stage_costs, "measure_rates", lambda *args: rates)
    for epochs, views, says in (
        (3, 2, "mode='auto' measured a few images: with a cache the stage would take 275 s, without 150 s."),
        (1, 2, "mode='auto': for a cache 2 views of each image would be rendered, and without one 1."),
    ):
        cache = {"mode": "auto", "num_views": views}
        trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:2", cache=cache, num_train_epochs=epochs)
        trainer.train()
        decision = trainer._record.decisions[0]
        assert (decision.cache, decision.trained_from, decision.reason) == ("none", "images", says)


@pytest.mark.parametrize(("render_all", "epochs", "cache"), [(3.0, 3, "none"), (1.2, 3, "built"), (0.5, 1, "none")])
def test_a_row_that_takes_long_to_read_is_read_once_for_all_of_its_views(
    train_dataset, monkeypatch, render_all, epochs, cache
) -> None:
    """So a cache of as many views as epochs can pay: three views of 50 rows take 60 s, and three epochs without one 150 s."""
    rendering = Rendering(render=1.0, render_all=render_all, waiting=0.0, examples=[])
    rates = Rates(render=1.0, render_all=render_all, block=0.0, encode=0.0, decode=0.1)
    measured = []
    monkeypatch.setattr(stage_costs, "measure_rendering", lambda *args: rendering)
    monkeypatch.setattr(stage_costs, "measure_rates", lambda *args: measured.append(args[-1]) or rates)
    settings = {"cache": {"mode": "auto", "num_views": 3}, "num_train_epochs": epochs}
    trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:2", **settings)
    trainer.train()
    assert trainer._record.decisions[0].cache == cache
    assert measured == ([rendering] if cache == "built" else [])  # what was rendered is not rendered again


def decided(dataset, cache: dict[str, Any], **settings: Any):
    trainer = make_trainer(tiny_vit(), dataset, schedule="0:2", cache={"mode": "auto", **cache}, **settings)
    trainer.train()
    return trainer._record.decisions[0]


def test_a_base_view_that_is_soon_rendered_is_no_sign_of_sharing(images, deciding) -> None:
    """Without a cache two epochs show it once, too."""
    pair = {"train_transform": SlowTransform(True), "eval_transform": TinyTransform(False)}
    decision = decided(images, {"num_views": 2}, trainer=pair, num_train_epochs=2)
    assert (decision.cache, decision.predicted["cached_views"], decision.predicted["live_views"]) == ("none", 2, 2)


def test_rows_that_no_two_views_share_are_read_as_often(train_dataset, deciding, monkeypatch) -> None:
    """So nothing is measured: a first reading from a cold disk would be taken for what sharing saves."""
    measured = []
    monkeypatch.setattr(stage_costs, "measure_rendering", lambda *args: measured.append(args))
    names = {"dataset_id": "rows", "transform_id": "1"}
    decision = decided(Rows(train_dataset), {"num_views": 2, **names}, num_train_epochs=2)
    assert (decision.cache, decision.predicted["cached_views"], measured) == ("none", 2, [])


def test_what_is_left_of_an_epoch_counts_as_such(train_dataset, monkeypatch) -> None:
    """50 rows, 5 steps in an epoch, 6 steps: 1.2 epochs."""
    rates = Rates(render=1.0, render_all=1.0, block=0.0, encode=1.0, decode=1.0)
    monkeypatch.setattr(stage_costs, "measure_rates", lambda *args: rates)
    for settings in ({"num_train_epochs": 1.2}, {"num_train_epochs": 1.11}, {"max_steps": 6}):
        decision = decided(train_dataset, {"num_views": 1}, **settings)
        assert decision.predicted["live_seconds"] == pytest.approx(1.2 * 50)
        assert decision.predicted["live_passes"] == pytest.approx(1.2 * (2 + 3 * 2))


@pytest.mark.parametrize(("views", "calibration"), [(1, (1 + 2) + 2 * 2), (2, 2 * (1 + 2) + 6 * 2)])
def test_choosing_a_codec_is_reckoned_with(train_dataset, monkeypatch, views, calibration) -> None:
    """Each image is rendered and run to the split, and then behind it with some settings: more of them where copies are stored."""
    rates = Rates(render=1.0, render_all=float(views), block=1.0, encode=0.0, decode=0.0)
    monkeypatch.setattr(stage_costs, "measure_rates", lambda *args: rates)
    cache = {"mode": "auto", "num_views": views, "codec": "auto", "calibration_samples": 20}
    trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:2", cache=cache, num_train_epochs=3)
    trainer.train()
    predicted = trainer._record.decisions[0].predicted["cached_seconds"]
    assert predicted == pytest.approx(50 * (views * (1 + 2) + 3 * 2 * 3) + 20 * calibration, abs=0.2)


def test_what_is_measured(images, monkeypatch) -> None:
    monkeypatch.setattr(stage_costs, "LEAST_SECONDS", 0.0)
    measured = []
    measure = stage_costs.measure_rates
    monkeypatch.setattr(stage_costs, "measure_rates", lambda *args: measured.append(measure(*args)) or measured[-1])
    trained(images.select(range(10)), num_train_epochs=2)
    (rates,) = measured
    assert rates.render == rates.render_all >= 0.01
    assert min(rates.block, rates.encode, rates.decode) > 0


@pytest.mark.slow
def test_what_acts_on_cached_states_is_not_left_out_to_save_time(images, monkeypatch) -> None:
    rates = Rates(render=1.0, render_all=4.0, block=0.0, encode=9.0, decode=0.5)
    monkeypatch.setattr(stage_costs, "measure_rates", lambda *args: rates)
    for augmentation, cache in ((None, "none"), ("mixup:0.2", "built")):
        settings = {"num_views": 4, "feature_augmentation": augmentation}
        assert trained(images, num_train_epochs=1, cache=settings)._record.decisions[0].cache == cache


@pytest.mark.slow
def test_the_choice_changes_no_number_and_a_resume_keeps_it(images, monkeypatch) -> None:
    rates = Rates(render=1.0, render_all=4.0, block=0.0, encode=9.0, decode=0.5)
    monkeypatch.setattr(stage_costs, "measure_rates", lambda *args: rates)
    settings = {"num_train_epochs": 6, "cache": {"num_views": 4}, "save_strategy": "steps", "save_steps": 3}
    auto = trained(images, **settings)
    assert auto._record.decisions[0].cache == "none"
    always = trained(images, num_train_epochs=6, cache={"mode": "always", "num_views": 4, "cache_dir": "b"})
    assert always.losses == auto.losses
    assert_same(parameters_of(always.model), parameters_of(auto.model))
    resumed = trained(images, resume="out/checkpoint-3", **settings)
    assert resumed._record.decisions[0].reason == auto._record.decisions[0].reason
    assert_same(parameters_of(resumed.model), parameters_of(auto.model))
    # A cache that is there costs nothing.
    found = trained(images, num_train_epochs=6, cache={"num_views": 4, "cache_dir": "b"})
    assert found._record.decisions[0].cache == "found"
    assert "cached_seconds" not in found._record.decisions[0].predicted


def test_a_tie_goes_to_what_needs_no_disk(train_dataset, monkeypatch) -> None:
    # 50 rows: 50 s of rendering and 100 s of decoding with a cache, and 150 s of rendering without.
    for encode, cache in ((0.0, "none"), (-0.1, "built")):
        rates = Rates(render=1.0, render_all=1.0, block=0.0, encode=encode, decode=2 / 3)
        monkeypatch.setattr(stage_costs, "measure_rates", lambda *args, rates=rates: rates)
        settings = {"cache": {"mode": "auto", "num_views": 1}, "num_train_epochs": 3}
        trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:2", **settings)
        trainer.train()
        assert trainer._record.decisions[0].cache == cache


def test_a_short_stage_needs_no_disk(train_dataset, monkeypatch) -> None:
    monkeypatch.setattr(stage_costs, "LEAST_SECONDS", 1e3)
    trainer = make_trainer(tiny_vit(), train_dataset, None, "0:1", {"mode": "auto", "num_views": 2}, num_train_epochs=3)
    trainer.train()
    decision = trainer._record.decisions[0]
    assert (decision.cache, decision.trained_from) == ("none", "images")
    assert decision.predicted["frozen_seconds"] > 0
    assert decision.reason.startswith("mode='auto': images and frozen blocks take about ")


@pytest.mark.parametrize(("epochs", "rendered"), [(2, 1), (40, 8)])
def test_measuring_takes_a_small_share_of_the_stage(images, monkeypatch, epochs, rendered) -> None:
    begun, found = [], []
    measure = stage_costs.measure_rates
    images = images.with_transform(lambda batch: found.append(len(batch["image"])) or TinyTransform(True)(batch))

    def measured(*args):
        begun.append(len(found))
        rates = measure(*args)
        begun.append(len(found))
        raise Measured(rates)

    monkeypatch.setattr(stage_costs, "measure_rates", measured)
    cache = {"mode": "auto", "num_views": 1, "transform_id": "tiny"}
    with pytest.raises(Measured):
        make_trainer(tiny_vit(), images, schedule="0:2", cache=cache, num_train_epochs=epochs).train()
    assert sum(found[slice(*begun)]) == rendered


class Measured(Exception):
    """Ends a run when it has measured."""


@pytest.mark.parametrize(("epochs", "rows"), [(2, 3), (40, 16)])
def test_blocks_are_timed_on_a_batch_of_training_if_that_is_worth_it(train_dataset, monkeypatch, epochs, rows) -> None:
    model, measure, seen = tiny_vit(), stage_costs.measure_rates, []

    def measured(*args):
        model.vit.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        raise Measured(measure(*args))

    monkeypatch.setattr(stage_costs, "measure_rates", measured)
    settings = {"num_train_epochs": epochs, "per_device_train_batch_size": 16}
    with pytest.raises(Measured):
        make_trainer(model, train_dataset, None, "0:2", {"mode": "auto", "num_views": 1}, **settings).train()
    assert max(seen) == rows


def test_what_stands_before_the_blocks_is_no_part_of_a_block(train_dataset, monkeypatch) -> None:
    """With one frozen block it would count for each block behind, too."""
    model, measure = tiny_vit(), stage_costs.measure_rates

    def measured(*args):
        model.vit.embeddings.patch_embeddings.register_forward_hook(
            lambda *args: time.sleep(0.4)
        )  # not behind the split
        raise Measured(measure(*args))

    monkeypatch.setattr(stage_costs, "measure_rates", measured)
    cache = {"mode": "auto", "num_views": 1}
    with pytest.raises(Measured) as raised:
        make_trainer(model, train_dataset, schedule="0:1", cache=cache, num_train_epochs=8).train()
    (rates,) = raised.value.args
    assert rates.embed > 0.5 * 0.4 / 8  # of eight images together
    assert rates.block < 0.5 * rates.embed


def test_waiting_takes_no_core(images, monkeypatch) -> None:
    took = {}
    measure = stage_costs.measure_rates
    monkeypatch.setattr(stage_costs, "measure_rates", lambda *args: took.setdefault("rates", measure(*args)))
    rows = images.with_transform(SlowTransform(True))
    cache = {"mode": "auto", "num_views": 1}
    make_trainer(tiny_vit(), rows, schedule="0:1", cache=cache, num_train_epochs=2).train()
    assert took["rates"].waiting > 0.5


def test_what_is_counted() -> None:
    rates = Rates(render=3.0, render_all=5.0, block=1.0, encode=0.5, decode=0.25)
    # Two views: rendered together, six blocks each, encoded; then four epochs of half the tokens.
    for cores, read in ((2, 0.25), (0, 0.0)):  # a thread reads beside an accelerator in any case
        cached, live = stage_seconds(replace(rates, cores=cores), [(4, 6, 1.0)], 12, 0, 2, 0.5, (0, 0))
        assert cached == pytest.approx(5 + 2 * 6 + 2 * 0.5 + 4 * (read + 9))
    assert live == pytest.approx(4 * (3 + 6 + 9))
    # Two workers render while the model computes.
    cached, live = stage_seconds(rates, [(4, 6, 1.0)], 12, 0, 2, 0.5, (2, 2))
    assert cached == pytest.approx(12 + 1 + 4 * 9)
    assert live == pytest.approx(4 * 15)
    # On two cores that rendering shares with the model, but for what it waits.
    shared = Rates(render=3.0, render_all=5.0, block=1.0, encode=0.5, decode=0.25, cores=2, waiting=0.6)
    assert stage_seconds(shared, [(4, 6, 1.0)], 12, 0, 2, 0.5, (2, 2))[1] == pytest.approx(4 * (15 + 3 * 0.4 / 2))
    assert stage_seconds(shared, [(4, 6, 1.0)], 12, 0, 2, 0.5, (0, 0))[1] == pytest.approx(4 * (3 + 6 + 9))
    # What stands before the blocks runs where images are, and is not trained.
    before = Rates(render=3.0, render_all=5.0, block=1.0, encode=0.5, decode=0.25, embed=0.75, cores=2)
    assert stage_seconds(before, [(4, 6, 1.0)], 12, 0, 2, 0.5, (0, 0)) == (
        pytest.approx(5 + 2 * 6.75 + 2 * 0.5 + 4 * (0.25 + 9)),
        pytest.approx(4 * (3 + 6.75 + 9)),
    )
    # From the cache of block 3; and the head's cache gives that of block 6 as well.
    rates = replace(rates, cores=1)
    assert stage_seconds(rates, [(1, 6, 1.0)], 12, 3, 1, 1.0, (0, 0))[0] == pytest.approx(0.25 + 3 + 0.5 + 0.25 + 18)
    cached, live = stage_seconds(rates, [(2, 12, 1.0), (1, 6, 1.0)], 12, 0, 1, 1.0, (0, 0))
    assert cached == pytest.approx(5 + 12 + 2 * 0.5 + 2 * 0.25 + 0.25 + 18)
    assert live == pytest.approx(2 * (3 + 12) + 3 + 6 + 18)

    # Chunks that stay in memory are decoded, and read, the less.
    held = Rates(render=3.0, render_all=5.0, block=1.0, encode=0.5, decode=0.25, read=0.125, cores=1)
    before, after = (stage_seconds(held, [(4, 6, decoded)], 12, 0, 2, 0.5, (0, 0)) for decoded in (1.0, 0.5))
    assert before[0] - after[0] == pytest.approx(4 * 0.5 * (0.25 + 0.125))
    assert before[1] == after[1]


@pytest.mark.parametrize(
    ("cores", "encoders", "encode", "seconds"),
    [
        (2, 0, 0.5, 5 + 12 + 2 * 2 * 0.5),
        (4, 1, 0.5, 5 + 12 + 2 * 2 * 0.5 / 4),
        (0, 1, 0.5, 5 + 12),
        (0, 1, 20.0, 2 * 20.0),  # each of two caches has a thread
        (0, 2, 20.0, 20.0),
    ],
)
def test_chunks_are_encoded_beside_the_blocks_where_that_is_done(cores, encoders, encode, seconds) -> None:
    rates = Rates(3.0, 5.0, 1.0, encode, 0.25, write=0.125, cores=cores, encoders=encoders)
    assert build_seconds(rates, 6, 0, 2, 2, 0) == pytest.approx(seconds + 2 * 2 * 0.125)


def test_blocks_are_timed_without_collating(train_dataset, monkeypatch) -> None:
    """Beside an accelerator, collating and copying take longer than blocks."""
    measure = stage_costs.measure_rates

    def measured(cache, *args):
        data, collate = cache.chooser.data, cache.chooser.data.collate

        def slow(items):
            time.sleep(0.3)
            return collate(items)

        object.__setattr__(data, "collate", slow)
        try:
            raise Measured(measure(cache, *args))
        finally:
            object.__setattr__(data, "collate", collate)

    monkeypatch.setattr(stage_costs, "measure_rates", measured)
    cache = {"mode": "auto", "num_views": 1}
    with pytest.raises(Measured) as raised:
        make_trainer(tiny_vit(), train_dataset, schedule="0:2", cache=cache, num_train_epochs=8).train()
    (rates,) = raised.value.args
    assert rates.embed > 0.3 / 10
    assert rates.block < 0.1 / 10


@pytest.mark.by_default(2)
@pytest.mark.parametrize(
    ("settings", "evaluations"),
    [
        ({"eval_strategy": "epoch"}, 2),
        ({"eval_strategy": "steps", "eval_steps": 5}, 2),
        ({"eval_strategy": "steps", "eval_steps": 0.1}, 10),
        ({"eval_strategy": "steps", "eval_steps": 11}, 0),
        ({"eval_strategy": "no"}, 0),
    ],
)
@pytest.mark.parametrize("cache_eval", [True, False])
def test_evaluating_from_a_cache_is_reckoned_with(
    images, train_dataset, monkeypatch, cache_eval, settings, evaluations
) -> None:
    """Two views for two epochs save nothing, but 50 rows that are evaluated each time do: each takes 1 + 2 s before the split."""
    rates = Rates(render=1.0, render_all=2.0, block=1.0, encode=0.5, decode=0.25, cores=1)
    monkeypatch.setattr(stage_costs, "measure_rates", lambda *args: rates)
    monkeypatch.setattr(stage_costs, "measure_rendering", lambda *args: Rendering(1.0, 2.0, 0.0, []))
    cache = {"mode": "auto", "num_views": 2, "cache_eval": cache_eval}
    held_out = {
        "a": images.with_transform(TinyTransform(False)).select(range(20)),
        "b": images.with_transform(TinyTransform(False)).select(range(30)),
    }
    trainer = make_trainer(tiny_vit(), train_dataset, held_out, "0:2", cache, num_train_epochs=2, **settings)
    trainer.train()
    decision, counted = trainer._record.decisions[0], evaluations if cache_eval else 0
    if not counted:
        assert (decision.cache, decision.predicted["cached_views"]) == ("none", 2)
        return
    trained = 50 * 2 * (1 + 2 + 3 * 2), 50 * (2 + 2 * 2 + 2 * 0.5 + 2 * (0.25 + 3 * 2))
    assert decision.predicted["live_seconds"] == pytest.approx(trained[0] + counted * 50 * (1 + 2), abs=0.2)
    expected = trained[1] + 50 * (1 + 2 + 0.5) + counted * 50 * 0.25
    assert decision.predicted["cached_seconds"] == pytest.approx(expected, abs=0.2)
    assert decision.cache == ("built" if expected < 0.97 * (trained[0] + counted * 150) else "none")


@pytest.mark.slow
def test_two_processes_decide_alike(tmp_path) -> None:
    run_group(many.main, "deciding", folders=[tmp_path] * 2)
    found = [json.loads((tmp_path / f"found-{rank}-of-2.json").read_text())["deciding"] for rank in range(2)]
    assert found[0] == found[1]
    assert {"none", "built"} == {one["cache"] for one in found[0].values()}
