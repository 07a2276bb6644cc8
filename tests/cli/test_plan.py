"""``hf-freezecache plan``: what caches would take, from a few images and from given rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import concatenate_datasets
from support.auto import auto_trainer
from support.commands import assert_one_line, call
from support.tiny import PAIR, PROCESSOR, tiny_model, tiny_vit

from hf_freezecache import CacheConfig
from hf_freezecache.cli import build as build_module
from hf_freezecache.cli import plan as plan_module
from hf_freezecache.cli.given_rates import GivenRates
from hf_freezecache.cli.plan import predict
from hf_freezecache.cli.planned_runs import PlannedRun, PlanSettings
from hf_freezecache.report.figures import figures_of
from hf_freezecache.schedules import plan_stages
from hf_freezecache.training.image_rates import Rates
from hf_freezecache.training.planner import predict_passes


@pytest.fixture
def folder(images) -> None:
    tiny_vit().save_pretrained("model")
    Path("model/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    images.select(range(12)).to_parquet("data/train.parquet")


def measured(cache, splits, split_point, batch_size):
    return Rates(1.0, 2.0, 0.5, 0.125, 0.125 * split_point, stored_bytes=2.0**20, write=0.125, cores=1)


def stage_by_stage(schedule: str, rates: dict[int, Rates], rows: int = 1, processes=(0, 0), **settings):
    """Predict a run of six epochs and two views; ``run`` has more of what it trains."""
    stages, config = (
        plan_stages(schedule, 6, 12),
        CacheConfig(num_views=2, consume_previous_cache="consume" in settings),
    )
    settings.pop("consume", None)
    run = PlannedRun(stages, 6, 2, **settings.pop("run", {}))
    return predict(schedule, run, rates, 12, rows, config, PlanSettings(6, **settings), processes), stages, config


@pytest.mark.usefixtures("folder")
def test_predictions_follow_from_what_was_measured(monkeypatch) -> None:
    monkeypatch.setattr(plan_module, "measure_rates", measured)
    status, out, err = call("plan", "model", "data", "--epochs", 10, "--views", 2, "--rows", 4, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert [one["schedule"] for one in found["predictions"]] == ["0:1", "0:2", "0:3", "auto"]
    assert {rate["source"] for rate in found["rates"].values()} == {"measured"}
    assert found["rates"]["block_passes_per_second"]["value"] == 2
    two = found["predictions"][1]
    assert two["cache_bytes"] == two["peak_bytes"] == 4 * 2 * 2**20
    assert two["build_seconds"] == pytest.approx(4 * (2 + 2 * 2 * 0.5 + 2 * 0.25))
    assert two["epoch_seconds"] == pytest.approx(4 * (0.25 + 3 * 2 * 0.5))
    assert two["cached_seconds"] == pytest.approx(two["build_seconds"] + 10 * two["epoch_seconds"])
    assert two["live_seconds"] == pytest.approx(4 * 10 * (1 + 2 * 0.5 + 3 * 2 * 0.5))
    assert two["full_seconds"] == pytest.approx(4 * 10 * (1 + 3 * 4 * 0.5))


@pytest.mark.usefixtures("folder")
def test_views_can_be_chosen_for_each_schedule(monkeypatch) -> None:
    measured_with = []

    def measure(cache, *args):
        measured_with.append(cache.config.num_views)
        return measured(cache, *args)

    monkeypatch.setattr(plan_module, "measure_rates", measure)
    command = ("plan", "model", "data", "--epochs", 10, "--views", "auto", "--rows", 4)
    schedules = ("--schedule", "0:2", "--schedule", "0:2,6:0", "--schedule", "0:2,2:0")
    found = json.loads(call(*command, *schedules, "--json")[1])
    assert measured_with == [4]
    assert [one["num_views"] for one in found["predictions"]] == [4, 2, 1]
    for one, views in zip(found["predictions"], (4, 2, 1), strict=True):
        assert one["cache_bytes"] == 4 * views * 2**20
        render = 1 + (2 - 1) * (views - 1) / 3  # what the views of a row share is paid for once
        assert one["build_seconds"] == pytest.approx(4 * (render + views * 2 * 0.5 + views * 0.25))
    lines = call(*command, *schedules)[1].splitlines()
    assert lines[2] == "4 images, views as num_views='auto' chooses, 10 epochs:"
    assert [line.partition("view")[0].strip() for line in lines[4:]] == ["2, 4", "0:2,6:0, 2", "0:2,2:0, 1"]
    for wrong in ("0", "-1", "some", "1.5"):
        assert call("plan", "model", "data", "--epochs", 10, "--views", wrong)[0] == 2


@pytest.mark.usefixtures("folder")
def test_given_rates_take_the_place_of_measured_ones(monkeypatch) -> None:
    monkeypatch.setattr(plan_module, "measure_rates", measured)
    rates = {
        "name": "a machine",
        "rendered_images_per_second": 10,
        "full_training_images_per_second": 5,
        "decode_mb_per_second": 8,
        "read_mb_per_second": 16.0,
        "devices": 2,
        "processes": 4,
    }
    Path("rates.json").write_text(json.dumps(rates))
    command = ("plan", "model", "data", "--epochs", 10, "--views", 2, "--rows", 1281167, "--rates", "rates.json")
    status, out, err = call(*command, "--schedule", "0:1,4:3", "--json")
    assert status == 0, err
    found = json.loads(out)
    sources = {name: rate["source"] for name, rate in found["rates"].items()}
    given = ("rendered_images_per_second", "block_passes_per_second", "decode_mb_per_second", "read_mb_per_second")
    assert sources == dict.fromkeys(given, "given") | dict.fromkeys(
        ("encode_mb_per_second", "write_mb_per_second"), "measured"
    )
    (one,), share, mb = found["predictions"], 1281167 / 2, 2**20 / 1e6
    block = 1 / 5 / (3 * 4)
    assert one["split_points"] == [1, 3]
    # One device in two renders with four processes, and gets half of the disk. Deeper states come from the cache before.
    # Chunks are encoded meanwhile, and written.
    first = max(2 / 10 / 4, 2 * block, 2 * 0.125) + 2 * 0.125
    second = max(2 * (mb / 8 + 2 * mb / 16) / 4, 2 * 2 * block, 2 * 0.125) + 2 * 0.125
    assert one["build_seconds"] == pytest.approx(share * (first + second))
    epochs = 4 * max(mb / 8 / 4, 9 * block, 2 * mb / 16) + 6 * max(mb / 8 / 4, 3 * block, 2 * mb / 16)
    assert one["cached_seconds"] == pytest.approx(share * (first + second + epochs))
    lines = call(*command, "--schedule", "0:1,4:3", "--split-points", "2")[1].splitlines()
    assert lines[0] == "a machine: 2 devices with 4 data processes each."
    assert lines[1] == "Given: rendering 10 images/s, blocks 60 passes/s, decoding 8 MB/s, reading 16 MB/s."
    assert lines[2].startswith("Measured here: encoding ")
    assert lines[3] == "1,281,167 images, 2 views, 10 epochs:"
    assert [line.split()[0] for line in lines[4:]] == ["frozen", "2", "0:1,4:3"]


@pytest.mark.parametrize("schedule", ["0:6", "0:6,2:9", "0:12,2:6", "0:6,2:0,4:9", "0:12,2:9,3:6,4:8", "0:6,2:9,4:6"])
@pytest.mark.parametrize("consume", [False, True])
def test_stages_cost_what_the_planner_says(schedule, consume) -> None:
    rates = {point: Rates(0.0, 0.0, 1.0, 0.0, 0.0, stored_bytes=1.0) for point in range(1, 13)}
    found, stages, config = stage_by_stage(schedule, rates, **({"consume": True} if consume else {}))
    passes = [predict_passes(stage, stages, 6, 12, config) for stage in stages]
    assert found.cached_seconds == pytest.approx(sum(each["cached_passes"] for each in passes))
    assert found.live_seconds == pytest.approx(sum(each["live_passes"] for each in passes))


@pytest.mark.parametrize("schedule", ["0:12,2:0", "0:12,2:6", "0:6,2:12", "0:12,2:6,4:12"])
def test_a_part_of_the_rows_and_of_the_weights_costs_what_the_planner_says(schedule) -> None:
    rates = {point: Rates(0.0, 0.0, 1.0, 0.0, 0.0, stored_bytes=1.0) for point in range(1, 13)}
    shares = {"trained_share": 0.25, "head_rows": 0.375}
    found, stages, config = stage_by_stage(schedule, rates, rows=8, run={**shares, "token_keep": 0.5})
    passes = [
        predict_passes(
            stage,
            stages,
            6,
            12,
            config,
            token_keep=0.5 if stage.split_point else 1.0,
            trained_share=0.25,
            rows_share=0.375 if stage.split_point == 12 else 1.0,
        )
        for stage in stages
    ]
    assert found.cached_seconds == pytest.approx(8 * sum(each["cached_passes"] for each in passes))
    assert found.live_seconds == pytest.approx(8 * sum(each["live_passes"] for each in passes))
    points = [stage.split_point for stage in stages if stage.split_point]
    assert found.cache_bytes == sum(2 * (3 if point == 12 else 8) for point in points)


@pytest.mark.by_default(2)
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ((), {}),
        (("--budget", 0.5), {"budget": 0.5}),
        (("--budget", 0.5, "--block-weights", "qkv"), {"budget": 0.5, "block_weights": "qkv"}),
        (("--budget", 0.15, "--block-weights", "qkv"), {"budget": 0.15, "block_weights": "qkv"}),
        (("--budget", 0.5, "--block-weights", "qkv", "--views", 1), {"budget": 0.5, "block_weights": "qkv"}),
        (
            ("--budget", 0.5, "--token-keep", 0.75, "--head-rows", 0.5, "--views", 1),
            {"budget": 0.5, "token_keep": 0.75, "head_rows": 0.5},
        ),
    ],
)
def test_a_schedule_that_is_chosen_is_planned_as_a_run_chooses_it(
    options, settings, images, monkeypatch, caplog
) -> None:
    """So many images as are asked for, in steps of all devices."""
    monkeypatch.setattr(plan_module, "measure_rates", lambda *_: Rates(0.0, 0.0, 1.0, 0.0, 0.0, stored_bytes=1.0))
    Path("rates.json").write_text(json.dumps({"devices": 2}))
    command = ("plan", "model", "data", "--epochs", 6, "--rows", 100, "--batch-size", 5, "--learning-rate", 1e-3)
    status, out, err = call(*command, "--rates", "rates.json", "--schedule", "auto", *options, "--json")
    assert status == 0, err
    assert not caplog.records  # it is said once, below the table
    (found,) = json.loads(out)["predictions"]
    rows = concatenate_datasets([images, images])
    fixed = {"num_views": 1} if "--views" in options else {}
    caching = {**fixed, "chunk_size": CacheConfig().chunk_size}
    trainer = auto_trainer(rows, freeze=settings, num_train_epochs=6, learning_rate=1e-3, trainer=PAIR, cache=caching)
    assert (len(rows), trainer.args.train_batch_size) == (100, 10)
    assert (found["chosen"], found["epochs"]) == (trainer._record.chosen, trainer.args.num_train_epochs)
    trainer.train()
    figures = figures_of(trainer._record)
    # Of two devices, each runs half of the rows.
    assert found["cached_seconds"] == pytest.approx(
        50 * sum(one["passes_spent"] for one in figures["stages"]), rel=0.01
    )
    trained = found["cached_seconds"] - found["build_seconds"]
    assert found["epoch_seconds"] == pytest.approx(trained / trainer.args.num_train_epochs)
    assert found["num_views"] == (None if fixed else trainer.cache_config.num_views)
    lines = call(*command, "--rates", "rates.json", "--schedule", "auto", *options)[1].splitlines()
    assert lines[-1] == trainer._record.chosen
    assert lines[-2].split()[0].strip(",") == "auto"


@pytest.mark.usefixtures("folder")
def test_a_model_that_needs_all_patches_is_planned_on_all(monkeypatch, caplog) -> None:
    tiny_model("beit", use_relative_position_bias=True).save_pretrained("model")
    monkeypatch.setattr(plan_module, "measure_rates", lambda *_: Rates(0.0, 0.0, 1.0, 0.0, 0.0, stored_bytes=1.0))
    status, _, err = call("plan", "model", "data", "--epochs", 6, "--schedule", "0:2", "--token-keep", 0.5)
    assert status == 1
    assert_one_line(err)
    assert "cannot be trained with token_keep=0.5" in err
    command = ("plan", "model", "data", "--epochs", 6, "--schedule", "auto", "--block-weights", "all", "--budget", 0.5)
    (found,) = json.loads(call(*command, "--json")[1])["predictions"]
    point, epochs = found["split_points"][1], found["epochs"] - 2
    assert "token_keep=0.5" in found["chosen"]
    assert "trains on all tokens, which takes more than it says" in caplog.text
    # By hand: once through all blocks, and all tokens behind the split.
    assert found["cached_seconds"] == pytest.approx(12 * (4 * found["num_views"] + 3 * (4 - point) * epochs))


def test_a_head_that_trains_from_images_gives_no_cache() -> None:
    rates = {point: Rates(0.0, 0.0, 1.0, 0.0, 0.0, stored_bytes=1.0) for point in (6, 12)}
    found, *_ = stage_by_stage("0:12,2:6", rates, run={"uncached": frozenset([12])})
    assert (found.cache_bytes, found.build_seconds) == (2, 2 * 6)
    assert found.cached_seconds == 2 * 12 + 2 * 6 + 4 * 3 * 6


@pytest.mark.parametrize(
    ("schedule", "held", "devices", "decoded"),
    [
        ("0:6", 0.0, 1, 6),
        ("0:6", 1.0, 1, 2),
        ("0:6", 0.5, 1, 2 + 4 / 2),
        ("0:6", 1.0, 2, (2 + 2 / 2 + 2 / 4) / 2),
        ("0:12", 1.0, 1, 2 / 2),  # of half of the rows, which an epoch shows twice
    ],
)
def test_what_memory_holds_is_decoded_once(schedule, held, devices, decoded) -> None:
    size = 1e9 * CacheConfig().memory_gb / (2 * 10) / held if held else 0.0
    rates = {
        6: Rates(0.0, 0.0, 0.0, 0.0, 1.0, decoded_bytes=size, cores=1),
        12: Rates(0.0, 0.0, 0.0, 0.0, 1.0, decoded_bytes=size, cores=1),
    }
    given = GivenRates(devices=devices)
    found, *_ = stage_by_stage(schedule, rates, rows=10, run={"head_rows": 0.5}, given=given)
    assert found.cached_seconds == pytest.approx(10 * decoded)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("options", "views"), [((), 2), (("--views", "auto"), 2), (("--views", 3), 3)])
def test_rendering_is_measured_of_several_views_where_several_may_be_chosen(monkeypatch, options, views) -> None:
    measured_with = set()

    def measure(cache, *args):
        measured_with.add(cache.config.num_views)
        return measured(cache, *args)

    monkeypatch.setattr(plan_module, "measure_rates", measure)
    assert call("plan", "model", "data", "--epochs", 3, "--schedule", "auto", *options)[0] == 0
    assert measured_with == {views}


@pytest.mark.parametrize(
    ("schedule", "consume", "written", "peak"),
    [
        ("0:6,2:9", {}, 15, 15),
        ("0:6,2:9", {"consume": True}, 15, 9 + 9 * 1024 / 4096),
        ("0:12,2:6", {}, 18, 18),  # both in one pass
        ("0:6,2:9,4:6", {}, 15, 15),  # the first is still there
        ("0:6,2:9,4:6", {"consume": True}, 15, 15),  # and is not consumed where it is needed again
        ("0:6,2:12", {"consume": True, "run": {"head_rows": 0.5}}, 12, 12),  # nor where it holds other rows
    ],
)
def test_bytes_of_a_schedule(schedule, consume, written, peak) -> None:
    rates = {point: Rates(0.0, 0.0, 1.0, 0.0, 0.0, stored_bytes=point / 2 / 4096) for point in range(1, 13)}
    found, *_ = stage_by_stage(schedule, rates, rows=4096, **consume)
    assert (found.cache_bytes, found.peak_bytes) == (pytest.approx(written), pytest.approx(peak))


@pytest.mark.usefixtures("folder")
def test_a_table_and_wrong_usage(monkeypatch) -> None:
    status, out, err = call("plan", "model", "data", "--epochs", 3, "--split-points", "1,3", "--rows", 1000000)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == "This machine: 1 device with 0 data processes each."
    assert lines[3].split() == [
        "frozen",
        "cache",
        "peak",
        "disk",
        "build",
        "an",
        "epoch",
        "in",
        "all",
        "no",
        "cache",
        "unfrozen",
    ]
    assert [line.split()[0] for line in lines[4:]] == ["1", "3"]
    assert not any(Path("caches").iterdir())  # what was written to measure is gone
    status, _, err = call("plan", "model", "data", "--epochs", 3, "--split-points", "9")
    assert status == 1
    assert_one_line(err)
    assert "9" in err

    def load(*args):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(build_module, "load_images", load)
    assert call("plan", "model", "data", "--epochs", 3, "--split-points", "1,x")[0] == 2
    for schedule, words in (
        ("0:6,x", "'x'"),
        ("3", "'3'"),
        ("0:-1", "-1"),
        ("autofreeze(75)", "'autofreeze(75)' decides"),
    ):
        status, _, err = call("plan", "model", "data", "--epochs", 3, "--schedule", schedule)
        assert (status, words in err) == (1, True)
        assert_one_line(err)
    for options, words in (
        (("--schedule", "0:2", "--budget", 0.5), "Plan that schedule as well, or remove the budget."),
        (("--head-rows", 0), "'head_rows'"),
        (("--budget", 0), "'budget'"),
    ):
        status, _, err = call("plan", "model", "data", "--epochs", 3, *options)
        assert (status, words in err) == (1, True)
        assert_one_line(err)
    assert call("plan", "model", "data", "--epochs", 3, "--block-weights", "keys")[0] == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ("[]", "holds list"),
        ('{"images": 3}', "'images'"),
        ('{"read_mb_per_second": 0}', "read_mb_per_second is 0; expected a number above 0"),
        ('{"read_mb_per_second": NaN}', "read_mb_per_second is nan"),
        ('{"read_mb_per_second": true}', "read_mb_per_second is True"),
        ('{"devices": 0}', "devices is 0; expected a whole number of at least 1"),
        ('{"devices": null}', "devices is None"),
        ('{"processes": 1.5}', "processes is 1.5"),
        ('{"name": 3}', "name is 3; expected text"),
        ('{"block_passes_per_second": 3, "full_training_images_per_second": 1}', "say the same"),
        (None, "rates.json"),
    ],
)
def test_bad_rates_are_refused_before_anything_is_loaded(text, words) -> None:
    if text is not None:
        Path("rates.json").write_text(text)
    status, _, err = call("plan", "nowhere", "nothing", "--epochs", 3, "--rates", "rates.json")
    assert status == 1
    assert_one_line(err)
    assert words in err
    assert "rates.json" in err


def test_several_views_share_the_reading_of_a_row() -> None:
    rates = GivenRates(rendered_images_per_second=4).applied(Rates(1.0, 1.5, 0.5, 0.0, 0.0), 4)
    assert (rates.render, rates.render_all, rates.block) == (0.25, 0.375, 0.5)
