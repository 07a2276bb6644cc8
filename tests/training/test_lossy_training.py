"""Training from lossy caches: calibration at each stage, reuse, interruption, promotion."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from support.images import make_images
from support.tiny import TinyTransform, make_trainer, tiny_vit
from transformers import HfArgumentParser

from hf_freezecache import CacheConfig
from hf_freezecache.cache.index import load_index
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.codecs import make_codec
from hf_freezecache.codecs.array_names import BASE, main_array
from hf_freezecache.compression.base_view import CodecChooser
from hf_freezecache.errors import (
    CacheLockedError,
    CacheMismatchError,
    DataError,
    UnsupportedSetupError,
)
from hf_freezecache.training import cache_check
from hf_freezecache.training.remembered import forget_all

PIPELINE = json.dumps(
    [
        {"name": "cast", "configuration": {"dtype": "BF16"}},
        {"name": "transform", "configuration": {"step": 0.1}},
        "pack",
        {"name": "zstd", "configuration": {"level": 3}},
    ]
)


def lossy_run(images, schedule: str = "0:1,1:2", transform=None, cache=None, **settings):
    trainer = make_trainer(
        tiny_vit(),
        images.with_transform(transform or TinyTransform(augment=True)),
        schedule=schedule,
        cache={"codec": "auto", "num_views": 2, "transform_id": "tiny", **(cache or {})},
        **{"num_train_epochs": 2, **settings},
    )
    trainer.train()
    return trainer


def stages(trainer) -> list[dict[str, float]]:
    return [
        {name.removeprefix("freezecache/"): value for name, value in entry.items()}
        for entry in trainer.state.log_history
        if "freezecache/split_point" in entry
    ]


def cache_of(split_point: int, folder: str = "caches") -> Path:
    (directory,) = Path(folder).glob(f"k{split_point:02d}-*")
    return directory


class Counting(TinyTransform):
    """Counts the images that it renders."""

    seen = 0

    def __call__(self, batch):
        type(self).seen += len(batch["image"])
        return super().__call__(batch)


@pytest.mark.slow
def test_auto_meets_the_budget_at_each_stage_and_reports(images, caplog) -> None:
    caplog.set_level(logging.INFO, logger="hf_freezecache")
    trainer = lossy_run(images, cache={"max_distortion": 0.01, "build_from": "images"})
    exact = lossy_run(images, cache={"codec": "lossless", "cache_dir": "exact"})
    for stage, reference in zip(stages(trainer), stages(exact), strict=True):
        assert 0 < stage["distortion"] <= 0.01
        assert 0 <= stage["agreement"] <= 1
        assert 0 < stage["relative_error"] < 1
        # A basis for 50 images of 17 tokens is dear; the states themselves are not.
        assert stage["bits_per_element"] < 0.8 * reference["bits_per_element"]
        assert "distortion" not in reference
        index = load_index(cache_of(int(stage["split_point"])))
        assert index.bits_per_element == pytest.approx(stage["bits_per_element"], abs=1e-4)
        assert index.calibration is not None
        assert index.calibration["distortion"] == stage["distortion"]
        assert index.calibration["budget"] == 0.01
        assert index.calibration["num_fit"] == index.calibration["num_test"] == 25
        assert index.calibration["bits_per_element"] < stage["bits_per_element"]
        assert verify_cache(cache_of(int(stage["split_point"]))) == []
    assert caplog.text.count("Calibrated in") == 2
    assert "features, budget 0.01" in caplog.text
    assert load_index(cache_of(1, "exact")).calibration is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "codec",
    ["int8", "int4", "bf16", "fp16", "transform", PIPELINE, json.loads(PIPELINE), make_codec(PIPELINE)],
    ids=["int8", "int4", "bf16", "fp16", "transform", "json", "steps", "object"],
)
def test_every_codec_trains(images, codec) -> None:
    trainer = lossy_run(images, cache={"codec": codec, "build_from": "images"})
    exact = lossy_run(images, cache={"codec": "lossless", "cache_dir": "exact", "build_from": "images"})
    assert trainer.losses != exact.losses
    tolerance = 0.02 if codec in ("int8", "bf16", "fp16") else 0.1
    torch.testing.assert_close(torch.tensor(trainer.losses), torch.tensor(exact.losses), rtol=tolerance, atol=tolerance)
    assert all("relative_error" in stage for stage in stages(trainer))
    reader = CacheReader(cache_of(2))
    assert reader.index.calibration["chosen_by"] == "user"
    assert not reader.codec.lossless


@pytest.mark.slow
def test_bf16_training_from_a_lossy_cache(images) -> None:
    trainer = lossy_run(images, bf16=True)
    exact = lossy_run(images, bf16=True, cache={"codec": "lossless", "cache_dir": "exact"})
    torch.testing.assert_close(torch.tensor(trainer.losses), torch.tensor(exact.losses), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_a_second_run_uses_the_caches_and_another_budget_does_not(images, caplog) -> None:
    first = lossy_run(images)
    second = lossy_run(images)
    assert [stage["built_shards"] for stage in stages(second)] == [0, 0]
    assert second.losses == first.losses
    assert [s["bits_per_element"] for s in stages(second)] == [s["bits_per_element"] for s in stages(first)]
    other = lossy_run(images, cache={"max_distortion": 0.1})
    assert [stage["built_shards"] for stage in stages(other)] == [8, 8]
    assert "codec" in caplog.text.split("differs in: ")[1]
    assert stages(other)[0]["bits_per_element"] < stages(first)[0]["bits_per_element"]


@pytest.mark.slow
def test_a_budget_that_nothing_lossy_meets_gives_a_sound_lossless_cache(images, caplog) -> None:
    trainer = lossy_run(
        images, cache={"max_distortion": 1e-15, "build_from": "images"}, schedule="0:1", num_train_epochs=1
    )
    assert "the cache is lossless" in caplog.text
    assert verify_cache(cache_of(1)) == []
    assert CacheReader(cache_of(1)).codec.lossless
    assert stages(trainer)[0]["distortion"] == 0.0
    assert load_index(cache_of(1)).calibration["budget"] == 1e-15


@pytest.mark.slow
def test_a_cache_is_measured_again_with_the_suffix_of_the_run_that_reuses_it(images, caplog) -> None:
    def run(scale: float):
        model = tiny_vit()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".2." in name or ".3." in name:  # blocks 2 and 3, in old and new names
                    parameter *= scale
        trainer = make_trainer(
            model,
            images.with_transform(TinyTransform(augment=True)),
            schedule="0:2",
            cache={"codec": "auto", "num_views": 2, "transform_id": "tiny", "max_distortion": 0.05},
            num_train_epochs=1,
        )
        trainer.train()
        return stages(trainer)[0]

    first, again, other = run(1.0), run(1.0), run(4.0)
    assert again["built_shards"] == other["built_shards"] == 0
    assert again["distortion"] == pytest.approx(first["distortion"], rel=1e-3)
    assert other["distortion"] > 2 * first["distortion"]
    assert "calibrated with another suffix" in caplog.text


@pytest.mark.slow
def test_a_cache_is_measured_once_with_each_head(images, monkeypatch) -> None:
    measured = []
    measure = cache_check.measure

    def counted(pairs, looks, classes):
        (_, stored) = pairs[""]
        measured.append(len(stored))
        return measure(pairs, looks, classes)

    monkeypatch.setattr(cache_check, "measure", counted)
    settings = {"schedule": "0:2", "num_train_epochs": 1, "cache": {"max_distortion": 0.5}}
    first, again = (stages(lossy_run(images, **settings))[0] for _ in range(2))
    assert measured == []  # calibration has measured it
    assert again["distortion"] == first["distortion"]

    (notes,) = Path("caches").glob(".k02-*.measured.json")
    for content in ("", "[]", '{"a": 1}', json.dumps({name: {} for name in json.loads(notes.read_text())})):
        notes.write_text(content)
        assert 0 < stages(lossy_run(images, **settings))[0]["distortion"] <= 0.75
    assert measured == [16] * 4  # few images do, within the budget


def test_blocks_are_measured_once_for_all_heads_behind_them(images, monkeypatch) -> None:
    """As in a sweep. What is measured is what the suffix gives, and other blocks behind the split are measured anew."""
    outputs, measure, looked, seen = CodecChooser.outputs, cache_check.measure, [], []

    def counted(self, split, states, extras):
        looked.append(len(states))
        return outputs(self, split, states, extras)

    def kept(pairs, looks, classes):
        seen.append([tensor for both in looks.values() for look in both for tensor in look])
        return measure(pairs, looks, classes)

    def run(head: float, blocks: float = 1.0) -> list[int]:
        """Return how often the suffix ran on states."""
        model = tiny_vit()
        with torch.no_grad():
            model.classifier.weight *= head
            for name, parameter in model.named_parameters():
                if ".3." in name:  # block 3, in old and new names
                    parameter *= blocks
        cache = {"codec": "auto", "num_views": 2, "transform_id": "tiny", "max_distortion": 10.0}
        dataset = images.with_transform(TinyTransform(augment=True))
        looked.clear()
        make_trainer(model, dataset, schedule="0:2", cache=cache, num_train_epochs=1).train()
        return list(looked)

    monkeypatch.setattr(CodecChooser, "outputs", counted)
    monkeypatch.setattr(cache_check, "measure", kept)
    run(1.0)
    assert run(2.0) == [16] * 4  # exact and stored states, of the base view and of the other
    assert run(40.0) == []
    forget_all()
    for notes in Path("caches").glob(".k02-*.measured.json"):
        notes.unlink()
    assert run(40.0) == [16] * 4
    for remembered, anew in zip(*seen[-2:], strict=True):
        torch.testing.assert_close(remembered, anew)
    assert run(40.0, blocks=1.5) == [16] * 4


@pytest.mark.slow
def test_calibration_holds_the_lock_of_the_cache(images, monkeypatch) -> None:
    choose = CodecChooser.choose

    def competing(self, split, source):
        with pytest.raises(CacheLockedError, match="another live process"):
            lossy_run(images, schedule="0:1", num_train_epochs=1)
        return choose(self, split, source)

    monkeypatch.setattr(CodecChooser, "choose", competing)
    lossy_run(images, schedule="0:1", num_train_epochs=1)


@pytest.mark.slow
def test_a_changed_data_set_under_the_same_name_is_noticed(images) -> None:
    lossy_run(images, cache={"dataset_id": "pictures"})
    with pytest.raises(CacheMismatchError, match="not what rows"):
        lossy_run(make_images(50, seed=5), cache={"dataset_id": "pictures"})


@pytest.mark.slow
def test_an_interrupted_build_goes_on_with_the_codec_it_began_with(images, monkeypatch) -> None:
    class Failing(TinyTransform):
        def __call__(self, batch):
            if len(list(Path("caches").glob("k*/view-00/*.safetensors"))) == 2:
                raise OSError("gone")
            return super().__call__(batch)

    with pytest.raises(DataError, match="gone"):
        lossy_run(images, transform=Failing(augment=True))
    state = cache_of(1) / "codec.safetensors"
    before = (state.stat().st_mtime_ns, state.read_bytes())
    finished = list(cache_of(1).glob("view-*/*.safetensors"))
    assert finished
    assert not (cache_of(1) / "index.json").exists()
    chosen = []
    choose = CodecChooser.choose
    monkeypatch.setattr(
        CodecChooser, "choose", lambda self, split, source: chosen.append(split) or choose(self, split, source)
    )
    trainer = lossy_run(images)
    assert (state.stat().st_mtime_ns, state.read_bytes()) == before
    assert stages(trainer)[0]["built_shards"] == 8 - len(finished)
    assert [split.split_point for split in chosen] == [2]
    undisturbed = lossy_run(images, cache={"cache_dir": "other"})
    assert trainer.losses == undisturbed.losses


@pytest.mark.slow
def test_resume_from_a_checkpoint_in_a_lossy_stage_is_bit_identical(images) -> None:
    whole = lossy_run(images, save_strategy="epoch", save_only_model=False, schedule="0:1,2:2", num_train_epochs=3)
    again = make_trainer(
        tiny_vit(),
        images.with_transform(TinyTransform(augment=True)),
        schedule="0:1,2:2",
        cache={"codec": "auto", "num_views": 2, "transform_id": "tiny"},
        num_train_epochs=3,
        save_strategy="epoch",
    )
    again.train(resume_from_checkpoint="out/checkpoint-5")
    assert again.losses == whole.losses[5:]


# ---- Promotion ----


@pytest.mark.slow
def test_a_lossless_cache_is_promoted_without_rendering_and_gives_the_same_bits(images) -> None:
    """50 rows in batches of 10, but 16 rows a shard: both builds cut their batches alike."""
    Counting.seen = 0
    lossy_run(images, transform=Counting(True), cache={"codec": "lossless"}, schedule="0:1")
    one_stage = Counting.seen
    Counting.seen = 0
    lossy_run(images, transform=Counting(True), cache={"codec": "lossless", "cache_dir": "promoted"})
    # A build of 50 rows in two views would render 100; some are looked at to see whether the transform changes.
    assert Counting.seen < one_stage + 50
    lossy_run(images, cache={"codec": "lossless", "cache_dir": "images", "build_from": "images"})
    promoted, rendered = cache_of(2, "promoted"), cache_of(2, "images")
    assert promoted.name == rendered.name
    for path in sorted(promoted.rglob("*.safetensors")):
        assert path.read_bytes() == (rendered / path.relative_to(promoted)).read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build_from", "distortion", "source"),
    [
        ("previous_cache", 0.05, "cache of split point 1"),
        ("images", 0.05, "images"),
        # What the first cache lost alone exceeds what is left of the budget for another rounding.
        ("auto", 1e-7, "images"),
    ],
)
def test_promotion_from_a_lossy_cache(images, caplog, build_from, distortion, source) -> None:
    caplog.set_level(logging.INFO, logger="hf_freezecache")
    cache = {
        "build_from": build_from,
        "max_distortion": distortion,
        "codec": "transform" if distortion < 1e-3 else "auto",
    }
    lossy_run(images, cache=cache)
    calibration = load_index(cache_of(2)).calibration
    assert calibration["source"] == source
    if build_from == "images":
        assert calibration["sources"] == {}
    else:
        assert calibration["sources"].keys() == {"images", "cache of split point 1"}
        assert all({"distortion", "relative_error"} == errors.keys() for errors in calibration["sources"].values())
        assert caplog.text.count("States from the") == 2
    assert verify_cache(cache_of(2)) == []
    # The second run finds it, and its spot check accepts it.
    assert stages(lossy_run(images, cache=cache))[1]["built_shards"] == 0


@pytest.mark.slow
def test_auto_promotes_from_a_lossy_cache_that_is_fine_enough(images) -> None:
    """int8 loses far less than the budget allows."""
    lossy_run(images, cache={"codec": "int8", "max_distortion": 0.2})
    calibration = load_index(cache_of(2)).calibration
    assert calibration["source"] == "cache of split point 1"
    errors = calibration["sources"]["cache of split point 1"]
    assert calibration["sources"]["images"]["distortion"] < errors["distortion"] <= 0.2


@pytest.mark.slow
def test_promotion_always_never_ends_in_a_lossless_cache_of_lossy_states(images, caplog) -> None:
    """The budget is spent by the first cache; the second gets as much again, and says so."""
    cache = {"build_from": "previous_cache", "max_distortion": 0.002}
    trainer = lossy_run(images, cache=cache, schedule="0:1,1:2,2:3", num_train_epochs=3)
    for split_point in (2, 3):
        reader = CacheReader(cache_of(split_point))
        assert not reader.codec.lossless
        assert reader.index.calibration["budget"] == 0.002
        if reader.index.calibration["distortion"] > 0.002:
            assert "over the budget of 0.002" in caplog.text
    assert [
        stage["built_shards"]
        for stage in stages(lossy_run(images, cache=cache, schedule="0:1,1:2,2:3", num_train_epochs=3))
    ] == [0, 0, 0]
    assert len(stages(trainer)) == 3


@pytest.mark.slow
def test_rates_of_earlier_stages_are_part_of_a_promoted_cache(images) -> None:
    cache = {"codec": "transform", "build_from": "previous_cache"}
    lossy_run(images, cache={**cache, "bits_per_element": "0:3.0,2:6.0"})
    finer = lossy_run(images, cache={**cache, "bits_per_element": "0:8.0,2:6.0"})
    assert [stage["built_shards"] for stage in stages(finer)] == [8, 8]


@pytest.mark.slow
def test_resume_at_the_change_of_stage_promotes_again(images) -> None:
    """The resumed run has not opened the first stage's cache; it must find it, or its states would differ."""
    settings = {"cache": {"build_from": "previous_cache"}, "num_train_epochs": 2}
    whole = lossy_run(images, save_strategy="epoch", save_only_model=False, **settings)
    for path in sorted(cache_of(2).glob("*"), reverse=True):
        if path.name != "codec.safetensors":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = make_trainer(
        tiny_vit(),
        images.with_transform(TinyTransform(augment=True)),
        schedule="0:1,1:2",
        cache={"codec": "auto", "num_views": 2, "transform_id": "tiny", "build_from": "previous_cache"},
        num_train_epochs=2,
    )
    again.train(resume_from_checkpoint="out/checkpoint-5")
    assert again.losses == whole.losses[5:]
    assert load_index(cache_of(2)).calibration["source"] == "cache of split point 1"


# ---- Rates ----


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["auto", "transform"])
def test_an_explicit_schedule_of_rates(images, codec) -> None:
    rates = {1: 6.0, 2: 3.0}
    cache = {"codec": codec, "copies": "full", "build_from": "images", "chunk_size": 25}
    lossy_run(images, cache={**cache, "bits_per_element": "0:6.0,2:3.0"})
    for split_point, rate in rates.items():
        calibration = load_index(cache_of(split_point)).calibration
        assert calibration["chosen_by"] == "rate"
        assert calibration["target_bits"] == rate
        assert 0.85 * rate < calibration["bits_per_element"] <= rate


def test_settings_parse_from_a_command_line() -> None:
    (config,) = HfArgumentParser(CacheConfig).parse_args_into_dataclasses(
        [
            "--codec",
            "transform",
            "--bits_per_element",
            "0:4.0,6:2.5",
            "--gradient_weight",
            "0.5",
            "--build_from",
            "images",
        ]
    )
    assert (config.codec, config.bits_per_element, config.gradient_weight, config.build_from) == (
        "transform",
        "0:4.0,6:2.5",
        0.5,
        "images",
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codec": "lossless", "bits_per_element": "0:4.0"}, "needs a codec with 'transform'"),
        ({"codec": "transform", "bits_per_element": "6:4.0"}, "says nothing about split point 1"),
        ({"codec": "auto", "bits_per_element": "steep"}, "split_point:bits pairs"),
        ({"codec": "auto", "max_distortion": 0.0}, "'max_distortion': .*expected a number above 0, got 0.0"),
        ({"codec": "auto", "gradient_weight": 2.0}, "'gradient_weight': .*at most 1, got 2.0"),
        ({"codec": "auto", "calibration_samples": 3}, "'calibration_samples': .*at least 4, got 3"),
        ({"build_from": "sometimes"}, "'build_from': .*got sometimes"),
        ({"codec": '["zstd", "pack"]'}, "'zstd' cannot be first"),
        ({"codec": "[1"}, "not valid JSON"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_construction(train_dataset, settings, words) -> None:
    with pytest.raises(UnsupportedSetupError, match=words):
        make_trainer(tiny_vit(), train_dataset, cache=settings)


@pytest.mark.slow
def test_a_rate_needs_a_step_to_choose(images) -> None:
    with pytest.raises(UnsupportedSetupError, match="needs a codec with 'transform'"):
        make_trainer(tiny_vit(), images, cache={"codec": "int8", "bits_per_element": "3.25"})
    lossy_run(
        images, schedule="0:1", cache={"codec": json.loads(PIPELINE), "bits_per_element": 3.25}, num_train_epochs=1
    )
    assert load_index(cache_of(1)).calibration["target_bits"] == 3.25


def test_too_few_rows_to_calibrate_on(images) -> None:
    with pytest.raises(UnsupportedSetupError, match=r"at least 4 rows, the data set has 3\. Use codec='lossless'"):
        lossy_run(images.select(range(3)), schedule="0:0,1:1")
    assert not Path("caches").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "cache",
    [
        {"gradient_weight": 0.5},
        {"codec": [{"name": "transform", "configuration": {"gradient_weight": 0.5}}, "pack", "zstd"]},
    ],
    ids=["setting", "pipeline"],
)
def test_weighing_directions_by_gradients(images, cache) -> None:
    lossy_run(images, schedule="0:2", cache=cache, num_train_epochs=1)
    (step, *_) = CacheReader(cache_of(2)).index.codec["configuration"]["steps"]
    assert step["configuration"]["gradient_weight"] == 0.5


# ---- Decoding where training happens ----


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["lossless", "int8", "auto"])
def test_restoring_can_be_compiled_in_one_graph(images, codec) -> None:
    lossy_run(images, schedule="0:2", cache={"codec": codec}, num_train_epochs=1)
    reader = CacheReader(cache_of(2))
    arrays = reader.entropy_decode_chunk(0, 0).arrays
    compiled = torch.compile(reader.codec.dequantize, backend="eager", fullgraph=True)
    exact = reader.codec.dequantize(arrays, reader.dtype)
    assert torch.equal(compiled(arrays, reader.dtype), exact)
    assert torch.equal(exact, reader.read_chunk(0, 0).hidden_states)


@pytest.mark.slow
def test_integers_travel_to_the_training_device(images) -> None:
    trainer = lossy_run(images, schedule="0:2", num_train_epochs=1)
    batch = next(iter(trainer._run.current.loader))
    assert batch[main_array(BASE)].dtype in (torch.int8, torch.int16)  # whichever holds the values
    assert "hidden_states" not in batch
