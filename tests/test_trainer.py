"""Checkpoints, resume, the best model, logs and evaluation of ``FreezeCacheTrainer``."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.parity import assert_same, parameters_of
from support.tiny import TinyTransform, make_trainer, tiny_vit
from transformers import (
    AutoModelForImageClassification,
    TrainerCallback,
    TrainingArguments,
    ViTForImageClassification,
)

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.data.image_transform import ImageTransform
from hf_freezecache.errors import UnsupportedSetupError
from hf_freezecache.model.split import find_blocks
from hf_freezecache.training.checkpoints import STATE_NAME

# Suffix dropout makes every step depend on the random state, so a resume that restores it wrongly shows.
DROPOUT = {"hidden_dropout_prob": 0.1}
SCHEDULE = "0:1,1:2,3:4"


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory: pytest.TempPathFactory) -> FreezeCacheTrainer:
    """A run that has saved each epoch. Tests that change its folder change a copy."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = make_trainer(
        tiny_vit(**DROPOUT),
        images.with_transform(TinyTransform(augment=True)),
        schedule=SCHEDULE,
        cache={"num_views": 2, "cache_dir": str(folder / "caches")},
        save_strategy="epoch",
        save_only_model=False,
        output_dir=str(folder / "out"),
    )
    trainer.train()
    return trainer


@pytest.fixture
def out(finished, tmp_path: Path) -> Path:
    """A copy of what the finished run has saved, where a trainer of this test looks for it."""
    return Path(shutil.copytree(finished.args.output_dir, tmp_path / "out"))


def check_resume(train_dataset, settings, steps: list[int] | None = None) -> None:
    """Go on from the checkpoints of these steps, or from all: the result is that of the whole run."""
    make = {"schedule": SCHEDULE, "cache": {"num_views": 2}, **settings}
    whole = make_trainer(tiny_vit(**DROPOUT), train_dataset, **make)
    whole.train()
    expected = parameters_of(whole.model)
    checkpoints = sorted(Path("out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if steps is None:
        assert len(checkpoints) >= 4
        if settings.get("dataloader_num_workers"):  # starting workers is slow: a few suffice
            checkpoints = checkpoints[1:4]
    else:
        checkpoints = [Path("out") / f"checkpoint-{step}" for step in steps]
    for checkpoint in checkpoints:
        torch.manual_seed(99)
        again = make_trainer(tiny_vit(**DROPOUT, initializer_range=0.5), train_dataset, output_dir="again", **make)
        again.train(resume_from_checkpoint=str(checkpoint))
        resumed = getattr(again, "losses", [])
        assert resumed == whole.losses[len(whole.losses) - len(resumed) :], checkpoint
        assert_same(parameters_of(again.model), expected)
        shutil.rmtree("again", ignore_errors=True)


def test_resume_in_the_middle_of_an_epoch_is_bit_identical(train_dataset) -> None:
    check_resume(train_dataset, {"save_strategy": "steps", "save_steps": 7}, [7])  # an epoch has 5 steps


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"save_strategy": "epoch"},
        {"save_strategy": "steps", "save_steps": 2},
        {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2, "bf16": True},
        {"save_strategy": "steps", "save_steps": 3, "dataloader_num_workers": 1},
        {"save_strategy": "epoch", "dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    ],
    ids=["epoch-ends", "mid-epoch", "accumulation-bf16", "workers", "kept-workers"],
)
def test_resume_at_every_checkpoint_is_bit_identical(train_dataset, settings) -> None:
    check_resume(train_dataset, settings)


@pytest.mark.slow
def test_resume_true_takes_the_last_checkpoint(train_dataset, finished, out) -> None:
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    again = make_trainer(
        tiny_vit(**DROPOUT), train_dataset, schedule=SCHEDULE, cache={"num_views": 2}, save_strategy="epoch"
    )
    again.train(resume_from_checkpoint=True)
    assert len(again.losses) == 5
    assert_same(parameters_of(again.model), parameters_of(finished.model))


def test_checkpoint_holds_stage_and_no_cache(out) -> None:
    stages = [json.loads((out / f"checkpoint-{step}" / STATE_NAME).read_text())["stage"] for step in (5, 10, 20)]
    assert [(stage["index"], stage["split_point"]) for stage in stages] == [(0, 1), (1, 2), (2, 4)]
    assert not list(out.rglob("view-00"))


def test_resume_with_a_schedule_that_unfreezes_is_refused(train_dataset, out) -> None:
    again = make_trainer(tiny_vit(), train_dataset, schedule="0:1", cache={"num_views": 2})
    with pytest.raises(ValueError, match=r"saved with 2 frozen blocks.*asks for 1"):
        again.train(resume_from_checkpoint=str(out / "checkpoint-15"))


def test_load_best_model_at_end_ends_on_the_best_checkpoint(train_dataset, eval_dataset) -> None:
    def metrics(prediction):
        metrics.calls += 1
        return {"score": {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.1}[metrics.calls]}

    metrics.calls = 0
    trainer = make_trainer(
        tiny_vit(),
        train_dataset,
        eval_dataset,
        cache={"num_views": 2},
        trainer={"compute_metrics": metrics},
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        learning_rate=0.03,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-10")
    best = ViTForImageClassification.from_pretrained("out/checkpoint-10")
    last = ViTForImageClassification.from_pretrained("out/checkpoint-20")
    assert_same(parameters_of(trainer.model), parameters_of(best))
    assert not torch.equal(trainer.model.classifier.weight, last.classifier.weight)


def test_plain_resume_without_freeze_config_restores_all_weights(train_dataset) -> None:
    """Stock Trainer leaves most ViT weights random here (transformers issue 43701)."""
    plain = train_dataset.with_transform(TinyTransform(augment=False))
    whole = make_trainer(tiny_vit(), plain, schedule=None, save_strategy="epoch")
    whole.train()
    again = make_trainer(tiny_vit(initializer_range=0.5), plain, schedule=None, output_dir="again")
    again.train(resume_from_checkpoint="out/checkpoint-10")
    assert_same(parameters_of(again.model), parameters_of(whole.model))


def test_evaluation_and_prediction_see_the_whole_model_on_images(train_dataset, eval_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, eval_dataset, eval_strategy="epoch")
    trainer.train()
    predicted = trainer.predict(eval_dataset).predictions
    trainer.save_model("saved")
    plain = AutoModelForImageClassification.from_pretrained("saved").eval()
    with torch.no_grad():
        expected = plain(pixel_values=torch.stack([row["pixel_values"] for row in eval_dataset])).logits
    np.testing.assert_allclose(predicted, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 4


@pytest.mark.slow
def test_logs_of_a_stage(train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, cache={"num_views": 2})
    trainer.train()
    stages = [entry for entry in trainer.state.log_history if "freezecache/split_point" in entry]
    assert [entry["freezecache/split_point"] for entry in stages] == [1, 3]
    assert stages[0]["freezecache/trainable_parameters"] > stages[1]["freezecache/trainable_parameters"] > 0
    assert stages[1]["freezecache/released_optimizer_bytes"] > 0
    for entry in stages:
        on_disk = sum(
            p.stat().st_size for p in Path("caches").glob("k*/**/*") if p.is_file() and p.name != "index.json"
        )
        assert 0 < entry["freezecache/cache_bytes"] < on_disk
        assert entry["freezecache/build_seconds"] > 0
    rates = [entry for entry in trainer.state.log_history if "freezecache/train_images_per_second" in entry]
    assert len(rates) == 4
    assert all(entry["freezecache/train_images_per_second"] > 0 for entry in rates)


def test_optimizer_state_of_frozen_blocks_is_released(train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:0,2:3")
    trainer.train()
    frozen = trainer._run.current.split.prefix_parameters()
    trained = {id(p) for name, p in trainer.model.named_parameters() if name not in frozen}
    optimizer = trainer.optimizer.optimizer
    assert {id(p) for p in optimizer.state} == trained
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained


def test_second_run_reuses_the_caches(train_dataset, caplog) -> None:
    first = make_trainer(tiny_vit(), train_dataset, num_train_epochs=3)
    first.train()
    written = {path: path.stat().st_mtime_ns for path in Path("caches").rglob("*") if path.is_file()}
    second = make_trainer(tiny_vit(), train_dataset, num_train_epochs=3)
    second.train()
    assert {path: path.stat().st_mtime_ns for path in Path("caches").rglob("*") if path.is_file()} == written
    assert [e["freezecache/built_shards"] for e in second.state.log_history if "freezecache/built_shards" in e] == [
        0,
        0,
    ]
    assert first.losses == second.losses


@pytest.mark.slow
def test_model_init_and_training_twice(train_dataset) -> None:
    trainer = make_trainer(
        None, train_dataset, trainer={"model_init": functools.partial(tiny_vit, num_hidden_layers=4)}
    )
    trainer.train()
    first, trainer.losses = trainer.losses, []
    trainer.train()
    assert trainer.losses == first


@pytest.mark.slow
def test_a_second_train_starts_at_the_first_stage_again(train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset)
    trainer.train()
    before = parameters_of(trainer.model)
    trainer.train()
    assert not torch.equal(before["vit.layers.1.mlp.fc1.weight"], trainer.model.vit.layers[1].mlp.fc1.weight)
    logged = [
        e["freezecache/trainable_parameters"] for e in trainer.state.log_history if "freezecache/split_point" in e
    ]
    fresh = make_trainer(tiny_vit(), train_dataset)
    fresh.train()
    assert logged == [
        e["freezecache/trainable_parameters"] for e in fresh.state.log_history if "freezecache/split_point" in e
    ]


@pytest.mark.slow
def test_max_steps_stops_in_the_middle_of_a_stage(train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, max_steps=12)
    trainer.train()
    assert trainer.state.global_step == 12
    assert trainer._run.current.split.split_point == 3


@pytest.mark.slow
def test_train_and_eval_transform(images, caplog) -> None:
    trainer = make_trainer(
        tiny_vit(),
        images,
        cache={"num_views": 3},
        trainer={"train_transform": TinyTransform(augment=True), "eval_transform": TinyTransform(augment=False)},
    )
    trainer.train()
    base = TinyTransform(augment=False)(images[:1])["pixel_values"][0]
    assert torch.equal(trainer._run.data.views[0, 0]["pixel_values"], base)
    assert not torch.equal(trainer._run.data.views[0, 1]["pixel_values"], base)


@pytest.mark.slow
def test_users_collator_extras_are_stored_and_reach_the_model(train_dataset) -> None:
    """A column beside labels is stored with its sample, and handed to a user's own loss."""
    seen: list[torch.Tensor] = []

    def collate(examples):
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.tensor([example["labels"] for example in examples]),
            "weights": torch.stack([example["pixel_values"].mean((1, 2)).double() for example in examples]),
        }

    class Weighted(FreezeCacheTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            weights = inputs.pop("weights")
            seen.append(weights)
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * weights.float().mean().exp()

    class Forget(TrainerCallback):
        """Before training, a step is rehearsed."""

        def on_train_begin(self, *args, **kwargs):
            seen.clear()

    def run(mode):
        settings = {"data_collator": collate, "callbacks": [Forget()]}
        trainer = make_trainer(tiny_vit(), train_dataset, cls=Weighted, cache={"mode": mode}, trainer=settings)
        trainer.train()
        return torch.cat(seen), parameters_of(trainer.model)

    live_weights, live = run("never")
    cached_weights, cached = run("always")
    assert cached_weights.dtype == torch.float64
    assert cached_weights.shape == (200, 3)
    assert torch.equal(live_weights, cached_weights)
    assert_same(live, cached)


def test_schedule_without_frozen_blocks_trains_live(train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:0", num_train_epochs=1)
    trainer.train()
    assert not Path("caches").exists()
    assert len(trainer.losses) == 5


@pytest.mark.slow
def test_activation_checkpointing_gives_the_same_training(train_dataset) -> None:
    plain = make_trainer(tiny_vit(), train_dataset)
    plain.train()
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    checkpointed = make_trainer(tiny_vit(), train_dataset, **{name: True})
    checkpointed.train()
    assert checkpointed.losses == plain.losses


def test_a_step_on_the_suffix_leaves_no_patch_behind(train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, num_train_epochs=1)
    trainer.train()
    # accelerate wraps the forward of the whole model only.
    patched = [name for name, module in trainer.model.named_modules() if name and "forward" in vars(module)]
    assert patched == []


def test_building_shows_progress(train_dataset, capsys) -> None:
    make_trainer(tiny_vit(), train_dataset, disable_tqdm=False, num_train_epochs=1).train()
    shown = capsys.readouterr().err
    assert "Caching 1 frozen blocks: 100%" in shown
    assert "50/50" in shown


@pytest.mark.slow
def test_our_own_transform_converts_grayscale_images_in_evaluation_and_prediction(train_dataset, images) -> None:
    rows = [{**row, "image": row["image"].convert("L")} for row in images.select(range(4))]
    gray = datasets.Dataset.from_list(rows, features=images.features).with_transform(ImageTransform(16, train=False))
    trainer = make_trainer(tiny_vit(), train_dataset, num_train_epochs=1)
    trainer.train()
    assert trainer.evaluate(gray)["eval_loss"] > 0
    assert trainer.predict(gray).predictions.shape == (4, 4)


def test_the_model_comes_back_thawed(train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset)
    trainer.train()
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())


@pytest.mark.slow
def test_resume_with_the_users_own_optimizer(train_dataset) -> None:
    def run(**settings):
        model = tiny_vit()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        trainer = make_trainer(
            model, train_dataset, save_strategy="epoch", trainer={"optimizers": (optimizer, None)}, output_dir="mine"
        )
        trainer.train(**settings)
        return parameters_of(trainer.model)

    whole = run()
    for step in (5, 10, 15):
        assert_same(run(resume_from_checkpoint=f"mine/checkpoint-{step}"), whole)


def test_resume_from_an_incomplete_checkpoint_is_refused(train_dataset, out) -> None:
    path = out / "checkpoint-10" / "model.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if ".2." not in name}
    save_file(tensors, path, metadata={"format": "pt"})
    again = make_trainer(tiny_vit(**DROPOUT), train_dataset, schedule=SCHEDULE, cache={"num_views": 2})
    with pytest.raises(UnsupportedSetupError, match=r"does not hold the weights.*\.2\."):
        again.train(resume_from_checkpoint=str(out / "checkpoint-10"))


@pytest.mark.parametrize("name", ["_get_train_sampler", "get_train_dataloader"])
def test_overridden_samplers_and_loaders_are_refused(train_dataset, name) -> None:
    own = type("Own", (FreezeCacheTrainer,), {name: lambda self, *args: None})
    with pytest.raises(ValueError, match=f"Own overrides {name}"):
        make_trainer(tiny_vit(), train_dataset, cls=own)


def test_a_block_with_a_forward_of_its_own_keeps_it(train_dataset) -> None:
    model = tiny_vit()
    block = find_blocks(model)[1][0]
    own = block.forward

    def doubled(*args, **kwargs):
        return own(*args, **kwargs) * 2

    block.forward = doubled
    make_trainer(model, train_dataset, num_train_epochs=1).train()
    assert block.forward is doubled


def test_a_folder_that_a_late_stage_cannot_write_stops_the_run_at_once(train_dataset) -> None:
    Path("a-file").touch()
    trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:0,2:3", cache={"cache_dir": "a-file/caches"})
    with pytest.raises(OSError, match="could not be written"):
        trainer.train()
    assert not hasattr(trainer, "losses")
