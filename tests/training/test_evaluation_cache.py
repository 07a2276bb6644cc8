"""Evaluating from caches gives the same as evaluating from images, or is left alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from support import many
from support.children import run_group
from support.tiny import Recorder, Rows, TinyTransform, make_trainer, tiny_vit
from transformers import TrainerCallback, ViTForImageClassification

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.errors import CacheWriteError

EACH_EPOCH = {
    "eval_strategy": "epoch",
    "num_train_epochs": 4,
    "per_device_eval_batch_size": 8,
    "save_strategy": "epoch",
}


#: Images that ``Counting`` has rendered, in all copies.
RENDERED: list[int] = []


class Counting(TinyTransform):
    def __call__(self, batch):
        count(len(batch["image"]))
        return super().__call__(batch)


def count(images: int, rendered: list[int] = RENDERED) -> None:
    rendered.append(images)


def stored(rows) -> datasets.Dataset:
    """Return rows as tensors, with a column that no model takes."""
    rendered = [{**rows[row], "note": row} for row in range(len(rows))]
    columns = {name: np.stack([np.asarray(row[name]) for row in rendered]) for name in rendered[0]}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def accuracy(prediction) -> dict[str, float]:
    """A metric that depends on the order of the rows."""
    right = (prediction.predictions.argmax(-1) == prediction.label_ids).astype(float)
    return {"accuracy": float(right.mean()), "weighted": float((right * np.arange(len(right))).sum())}


def trained(rows: Any, eval_rows: Any, cache_eval: bool = True, resume: str | None = None, **settings: Any) -> Any:
    settings = {**EACH_EPOCH, "schedule": "0:1,1:2,2:4", **settings}
    settings["cache"] = {"cache_eval": cache_eval, "cache_dir": f"caches-{cache_eval}", **settings.get("cache", {})}
    settings["trainer"] = {"compute_metrics": accuracy, **settings.get("trainer", {})}
    # Dropout shows whether an evaluation has moved the random states of training.
    model = tiny_vit(hidden_dropout_prob=0.2)
    trainer = make_trainer(model, rows, eval_rows, output_dir=f"out-{cache_eval}", **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def evaluations(trainer: FreezeCacheTrainer) -> list[dict[str, float]]:
    """Return the metrics of all evaluations, without times."""
    return [
        {
            name: value
            for name, value in logged.items()
            if name.startswith("eval_") and "second" not in name and "time" not in name
        }
        for logged in trainer.state.log_history
        if any(name.startswith("eval_") for name in logged)
    ]


def test_metrics_are_the_same_and_images_are_rendered_once(train_dataset, images) -> None:
    eval_rows = images.select(range(21)).with_transform(Counting(False))
    settings = {"num_train_epochs": 2, "schedule": "0:2", "save_strategy": "no"}
    from_images = trained(train_dataset, eval_rows, cache_eval=False, **settings)
    cached = trained(train_dataset, eval_rows, **settings)
    assert evaluations(cached) == evaluations(from_images)
    assert cached.losses == from_images.losses
    assert len(evaluations(cached)) == 2
    RENDERED.clear()
    assert cached.evaluate()["eval_weighted"] == evaluations(from_images)[-1]["eval_weighted"]
    assert sum(RENDERED) < 21  # a spot check


@pytest.mark.slow
def test_three_stages_a_resume_and_another_run(train_dataset, eval_dataset) -> None:
    from_images = trained(train_dataset, eval_dataset, cache_eval=False)
    cached = trained(train_dataset, eval_dataset)
    assert evaluations(cached) == evaluations(from_images)
    assert len(evaluations(cached)) == 4
    caches = sorted(Path("caches-True").glob("k*"))
    assert len(caches) == 6
    modified = [path.stat().st_mtime_ns for path in caches]
    again = trained(train_dataset, eval_dataset)
    assert evaluations(again) == evaluations(from_images)
    for step in (5, 10, 15, 20):
        resumed = trained(train_dataset, eval_dataset, resume=f"out-True/checkpoint-{step}")
        assert evaluations(resumed) == evaluations(from_images)
    assert sorted(Path("caches-True").glob("k*")) == caches
    assert [path.stat().st_mtime_ns for path in caches] == modified


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["dict", "rows", "workers", "removed columns", "live", "falling", "label smoothing", "bf16"]
)
def test_ways_to_evaluate(train_dataset, eval_dataset, kind) -> None:
    ready = Rows([{**eval_dataset[row]} for row in range(20)])
    rows = {"dict": {"a": eval_dataset, "b": eval_dataset.select(range(7))}, "rows": ready}
    settings: dict[str, Any] = {
        "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        "removed columns": {"remove_unused_columns": True, "label_names": ["labels"]},
        "live": {"cache": {"mode": "never"}},
        "falling": {"schedule": "0:4,1:1,2:0,3:2"},
        "label smoothing": {"label_smoothing_factor": 0.1},
        "bf16": {"bf16": True},
    }.get(kind, {})
    train_rows = train_dataset
    if kind == "removed columns":
        train_rows, rows[kind] = (stored(each) for each in (train_dataset, eval_dataset))
    runs = [trained(train_rows, rows.get(kind, eval_dataset), each, **settings) for each in (False, True)]
    assert evaluations(runs[0]) == evaluations(runs[1])
    assert runs[0].losses == runs[1].losses
    assert (runs[1]._run.evaluation.step is None) == (kind in ("live", "rows"))


class Looking(Recorder):
    def prediction_step(self, model, inputs, *args, **kwargs):
        assert inputs["pixel_values"].isfinite().all()
        return super().prediction_step(model, inputs, *args, **kwargs)


class Sampling(Recorder):
    def _get_eval_sampler(self, dataset):
        return torch.utils.data.SubsetRandomSampler(range(3, 12), torch.Generator().manual_seed(0))


class LosingImages(Recorder):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("random", "draws at random"),
        pytest.param("prediction_step", "overrides prediction_step", marks=pytest.mark.slow),
        pytest.param("sampler", "order of its own (SubsetRandomSampler)", marks=pytest.mark.slow),
        pytest.param("draws", "to no effect", marks=pytest.mark.slow),
        pytest.param("compute_loss", "overrides compute_loss", marks=pytest.mark.slow),
        pytest.param("inputs", "include_for_metrics", marks=pytest.mark.slow),
        pytest.param("states", "gives another result", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_evaluated_from_a_cache(train_dataset, eval_dataset, images, caplog, kind, says) -> None:
    settings: dict[str, Any] = {"num_train_epochs": 2}
    rows = eval_dataset
    if kind == "random":
        rows = images.select(range(20)).with_transform(TinyTransform(True))
    if kind == "draws":
        rows = images.select(range(20)).with_transform(Drawing(False))
    classes = {"prediction_step": Looking, "compute_loss": LosingImages, "sampler": Sampling}
    settings["cls"] = classes.get(kind, Recorder)
    if kind == "inputs":
        settings |= {"include_for_metrics": ["inputs"]}
    metrics = []
    for cache_eval in (False, True):
        caplog.clear()
        model = tiny_vit()
        if kind == "states":
            model.config.output_hidden_states = True
        with caplog.at_level(logging.WARNING):
            trainer = make_trainer(
                model,
                train_dataset,
                rows,
                cache={"cache_eval": cache_eval, "cache_dir": f"caches-{cache_eval}"},
                **{**EACH_EPOCH, **settings},
            )
            trainer.train()
        metrics.append([*evaluations(trainer), trainer.losses])
    if kind != "random":
        assert metrics[0] == metrics[1]
    told = [record.getMessage() for record in caplog.records if "cache_eval" in record.getMessage()]
    assert len(told) == 1
    assert says in told[0]


class Drawing(TinyTransform):
    """Draws a number that decides nothing."""

    def __call__(self, batch):
        torch.rand(1)
        return super().__call__(batch)


class Pictures(TrainerCallback):
    """Keeps what callbacks see of an evaluation."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        self.seen.append(tuple(sorted(next(iter(eval_dataloader)))))

    on_evaluate = on_prediction_step


@pytest.mark.slow
def test_callbacks_see_images(train_dataset, eval_dataset) -> None:
    callback = Pictures()
    run = trained(train_dataset, eval_dataset, schedule="0:2", num_train_epochs=1, trainer={"callbacks": [callback]})
    assert run._run.evaluation.step is not None
    assert callback.seen == [("labels", "pixel_values")] * 4


@pytest.mark.slow
def test_the_rows_of_an_evaluation_may_be_trained_on(images) -> None:
    """In a cache to train on they lie in another order."""
    folds = [images.select(rows).with_transform(TinyTransform(False)) for rows in (range(30), range(30, 50))]
    for train_rows, eval_rows in (folds, reversed(folds)):
        settings = {"schedule": "0:2", "num_train_epochs": 1, "cache": {"num_views": 1}}
        runs = [trained(train_rows, eval_rows, each, **settings) for each in (False, True)]
        assert evaluations(runs[0]) == evaluations(runs[1])
        assert runs[1]._run.evaluation.step is not None


@pytest.mark.slow
def test_frozen_blocks_get_the_batches_of_an_evaluation(train_dataset, eval_dataset, monkeypatch) -> None:
    sizes: list[int] = []
    settings = {"schedule": "0:2", "num_train_epochs": 1, "per_device_eval_batch_size": 3}
    run = trained(train_dataset, eval_dataset, cache={"chunk_size": 4, "shard_chunks": 1}, **settings)
    split = type(run._run.current.split)
    prefix = split.prefix
    monkeypatch.setattr(
        split,
        "prefix",
        lambda self, pixel_values, **extra: sizes.append(len(pixel_values)) or prefix(self, pixel_values, **extra),
    )
    monkeypatch.setattr("hf_freezecache.training.stage_cache.spot_check", lambda *args: None)
    settings["cache"] = {"chunk_size": 4, "shard_chunks": 1, "cache_dir": "other"}
    monkeypatch.setattr("hf_freezecache.training.preflight.rehearse", lambda *args: sizes.clear())
    trained(train_dataset.select(range(10)), eval_dataset, **settings)
    assert sizes[-7:] == [3] * 6 + [2]


class Changing(TrainerCallback):
    """Replaces the transform of the evaluation set in the midst of the run."""

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        if state.epoch == 3:
            self.rows.set_transform(Darker(False))


class Darker(TinyTransform):
    def __call__(self, batch):
        batch = super().__call__(batch)
        return {**batch, "pixel_values": [pixels / 2 for pixels in batch["pixel_values"]]}


@pytest.mark.slow
def test_a_transform_that_is_replaced_is_seen(train_dataset, images) -> None:
    runs = []
    for cache_eval in (False, True):
        callback = Changing()
        callback.rows = images.select(range(20)).with_transform(TinyTransform(False))
        runs.append(trained(train_dataset, callback.rows, cache_eval, trainer={"callbacks": [callback]}))
    assert evaluations(runs[0]) == evaluations(runs[1])


@pytest.mark.slow
def test_where_it_cannot_be_written_images_are_evaluated(train_dataset, eval_dataset, caplog, monkeypatch) -> None:
    from hf_freezecache.training import stage_cache

    build, tried = stage_cache.build_cache, []

    def full(cache_dir, plan, *args, **kwargs):
        if plan.layout.num_samples == 20:
            tried.append(plan.split_point)
            raise CacheWriteError(f"no space left: {100 - len(tried)} bytes")
        return build(cache_dir, plan, *args, **kwargs)

    from_images = trained(train_dataset, eval_dataset, cache_eval=False)
    monkeypatch.setattr(stage_cache, "build_cache", full)
    cached = trained(train_dataset, eval_dataset)
    assert evaluations(cached) == evaluations(from_images)
    assert caplog.text.count("cache_eval: evaluating from images. no space left") == 1
    assert tried == [1, 2, 4]  # once in each stage, the last of which has two epochs


@pytest.mark.slow
def test_two_processes(tmp_path) -> None:
    run_group(many.main, "evaluating", folders=[tmp_path] * 2)
    for rank in range(2):
        found = json.loads((tmp_path / f"found-{rank}-of-2.json").read_text())["evaluating"]
        assert found["cached"]["evaluations"] == found["images"]["evaluations"]
        assert len(found["cached"]["evaluations"]) == 4
        assert found["cached"]["losses"] == found["images"]["losses"]
        assert found["cached"]["from_cache"]


@pytest.mark.slow
def test_a_machine_without_room_keeps_the_others_from_its_caches(tmp_path) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    run_group(many.main, "one_node_is_full", folders=folders, nodes=2, timeout=120)
    for rank, folder in enumerate(folders):
        found = json.loads((folder / f"found-{rank}-of-2.json").read_text())["one_node_is_full"]
        assert found["cached"]["evaluations"] == found["images"]["evaluations"]
        assert not found["cached"]["from_cache"]


@pytest.mark.slow
def test_workers_that_stay(train_dataset, eval_dataset) -> None:
    """Trainer keeps their loader from one ``train()`` to the next, and stages without a cache use it, too."""
    settings = {"schedule": "0:2,1:0", "num_train_epochs": 2, "dataloader_num_workers": 1}
    runs = []
    for cache_eval in (False, True):
        run = trained(train_dataset, eval_dataset, cache_eval, dataloader_persistent_workers=True, **settings)
        run.train()
        assert (run._run.evaluation.step is not None) == cache_eval
        runs.append([run.losses, *evaluations(run)])
    assert runs[0] == runs[1]


class PeekingForImageClassification(ViTForImageClassification):
    """Adds to its logits what the images say, where it is told to, and not in training."""

    peeks = False

    def forward(self, pixel_values, **kwargs):
        output = super().forward(pixel_values, **kwargs)
        if self.peeks and not self.training:
            output.logits = output.logits + pixel_values.float().mean((1, 2, 3))[:, None]
        return output


def peeking(head: int, peeks: bool = False) -> PeekingForImageClassification:
    """Return models of one class, with the same blocks and heads of their own."""
    model = tiny_vit()
    other = PeekingForImageClassification(model.config)
    other.load_state_dict(model.state_dict())
    torch.nn.init.normal_(other.classifier.weight, generator=torch.Generator().manual_seed(head))
    other.peeks = peeks
    return other


def test_later_trainers_over_a_cache_try_two_rows_of_their_own_model(train_dataset, eval_dataset, caplog) -> None:
    settings = {"schedule": "0:2", "eval_strategy": "epoch", "num_train_epochs": 1, "per_device_eval_batch_size": 8}
    seen: list[int] = []

    def evaluated(model, cache_eval: bool = True):
        # What the blocks behind the split see in eval mode, gradients off: evaluations, and what is tried before.
        model.vit.layers[3].register_forward_hook(
            lambda block, args, output: None if model.training else seen.append(len(args[0]))
        )
        cache = {"cache_eval": cache_eval, "num_views": 1}
        trainer = make_trainer(model, train_dataset, eval_dataset, cache=cache, **settings)
        seen.clear()
        trainer.train()
        return evaluations(trainer)

    assert evaluated(peeking(1)) == evaluated(peeking(1), False)
    evaluated(peeking(1))
    # Twice the first two rows before training; then twice two rows, and 8, 8 and 4 from the cache.
    assert seen[-5:] == [2, 2, 8, 8, 4]
    assert evaluated(peeking(2)) == evaluated(peeking(2), False)
    assert "cache_eval" not in caplog.text
    assert evaluated(peeking(2, peeks=True)) == evaluated(peeking(2, peeks=True), False)
    assert "PeekingForImageClassification gives another result when it is evaluated without images" in caplog.text
