"""Bad input: one clear error each, before work is lost."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from support.tiny import TinyTransform, make_trainer, tiny_vit
from torch import nn
from transformers import Trainer

from hf_freezecache import (
    CacheConfig,
    FreezeCacheTrainer,
    FreezeConfig,
)
from hf_freezecache.data.image_transform import ImageTransform
from hf_freezecache.data.layout import ChunkLayout
from hf_freezecache.errors import (
    DataError,
    ScheduleError,
    UnrepeatableTransformError,
    UnsupportedModelError,
    UnsupportedSetupError,
)


def no_work_was_done() -> bool:
    return not Path("caches").exists()


def train(dataset, model=None, **settings):
    trainer = make_trainer(model or tiny_vit(), dataset, **{"num_train_epochs": 1, **settings})
    trainer.train()
    return trainer


def test_missing_image_column(images) -> None:
    with pytest.raises(DataError, match=r"Row 0 .*could not be rendered.*KeyError: 'image'"):
        train(images.rename_column("image", "picture").with_transform(TinyTransform(True)))
    assert no_work_was_done()


def test_missing_label_column(images) -> None:
    with pytest.raises(DataError, match="KeyError: 'label'"):
        train(images.remove_columns("label").with_transform(TinyTransform(True)))
    assert no_work_was_done()


def test_transform_without_labels(images) -> None:
    def transform(batch):
        return {"pixel_values": TinyTransform(True)(batch)["pixel_values"]}

    with pytest.raises(DataError, match=r"must hold labels; found \['pixel_values'\]"):
        train(images.with_transform(transform))
    assert no_work_was_done()


def test_no_transform_at_all(images) -> None:
    with pytest.raises(DataError, match=r"returned \['image', 'label'\].*remove_unused_columns=False"):
        train(images)
    assert no_work_was_done()


def test_corrupt_image_names_its_row_and_keeps_finished_shards(images, tmp_path) -> None:
    buffers = []
    for row in images:
        buffer = io.BytesIO()
        row["image"].save(buffer, "PNG")
        buffers.append({"bytes": buffer.getvalue(), "path": None})

    def dataset(rows):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        return datasets.Dataset.from_dict({"image": rows, "label": images["label"]}, features=features)

    bad = int(ChunkLayout(50, 8, 0).order[40])  # in the third of four shards
    good = buffers[bad]
    buffers[bad] = {"bytes": good["bytes"][:60], "path": None}
    with pytest.raises(DataError, match=f"Row {bad} of the training data set could not be rendered"):
        train(dataset(buffers).with_transform(TinyTransform(True)), cache={"dataset_id": "mended"})
    buffers[bad] = good
    trainer = train(dataset(buffers).with_transform(TinyTransform(True)), cache={"dataset_id": "mended"})
    (entry,) = [e for e in trainer.state.log_history if "freezecache/built_shards" in e]
    assert entry["freezecache/built_shards"] == 2


def images_of_other_modes(images):
    rows = [dict(row) for row in images]
    for row, mode in ((3, "L"), (8, "RGBA"), (9, "P"), (12, "CMYK")):
        rows[row]["image"] = rows[row]["image"].convert(mode)
    return datasets.Dataset.from_list(rows, features=images.features)


def test_our_own_transform_converts_images_of_any_mode(images) -> None:
    mixed = images_of_other_modes(images).with_transform(ImageTransform(16, train=True))
    trainer = train(mixed, eval_dataset=mixed)
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(mixed).predictions.shape == (50, 4)


@pytest.mark.slow
def test_the_users_transform_gets_images_of_any_mode_as_they_are(images) -> None:
    """In training, evaluation and prediction alike; a transform that takes RGB only is told which row is not."""
    mixed = images_of_other_modes(images)
    seen: dict[str, set[str]] = {}

    def transform(batch):
        seen.setdefault(part, set()).update(image.mode for image in batch["image"])
        return TinyTransform(True)({**batch, "image": [image.convert("RGB") for image in batch["image"]]})

    part = "train"
    trainer = train(mixed.with_transform(transform), eval_dataset=mixed.with_transform(transform))
    part = "evaluate"
    trainer.evaluate()
    part = "evaluate other"
    trainer.evaluate(mixed.with_transform(transform))
    part = "predict"
    trainer.predict(mixed.with_transform(transform))
    modes = {image["image"].mode for image in mixed}
    assert len(modes) > 3
    assert seen == dict.fromkeys(("train", "evaluate", "evaluate other", "predict"), modes)
    with pytest.raises(DataError, match=r"Row 3 .*mode 'L'"):
        train(mixed.with_transform(TinyTransform(True)), cache={"cache_dir": "other"})


def mixup_in_the_transform(batch):
    batch = TinyTransform(True)(batch)
    pixels = torch.stack(batch["pixel_values"])
    return {**batch, "pixel_values": list(0.6 * pixels + 0.4 * pixels.flip(0))}


def test_transform_that_mixes_rows(images) -> None:
    with pytest.raises(DataError, match=r"mixes the rows of its batch.*feature_augmentation"):
        train(images.with_transform(mixup_in_the_transform))
    assert no_work_was_done()


@pytest.mark.slow
def test_transform_that_mixes_rows_gets_whole_batches_where_nothing_is_cached(images) -> None:
    sizes = []

    def transform(batch):
        sizes.append(len(batch["image"]))
        return mixup_in_the_transform(batch)

    train(images.with_transform(transform), cache={"mode": "never"})
    assert sizes[-5:] == [10] * 5
    sizes.clear()
    pair = {"train_transform": transform, "eval_transform": TinyTransform(False)}
    train(images, schedule="0:0", cache={"mode": "never", "num_views": 1}, trainer=pair)
    assert sizes[-5:] == [10] * 5


@pytest.mark.parametrize("schedule", ["0:0,1:2", "0:2,1:0", "0:2"])
def test_one_view_that_is_stored_does_not_hide_a_transform_that_other_stages_show(images, schedule) -> None:
    generator, plain = np.random.default_rng(0), TinyTransform(False)

    def drawing(batch):
        batch = plain(batch)
        return {**batch, "pixel_values": [pixels * generator.random() for pixels in batch["pixel_values"]]}

    for transform, error in ((mixup_in_the_transform, DataError), (drawing, UnrepeatableTransformError)):
        pair = {"train_transform": transform, "eval_transform": plain}
        settings = {"schedule": schedule, "cache": {"num_views": 1}, "trainer": pair, "num_train_epochs": 2}
        if "0:0" in schedule or "1:0" in schedule:
            with pytest.raises(error):
                train(images, **settings)
            assert no_work_was_done()
        else:  # nothing shows it
            train(images, **settings)


@pytest.mark.parametrize("label", [4, -1, 1000])
def test_labels_out_of_range(images, label) -> None:
    labels = list(images["label"])
    labels[41] = label
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    wrong = datasets.Dataset.from_dict({"image": images["image"], "label": labels}, features=features)
    with pytest.raises(DataError, match=rf"row 41 has label={label}, but the model has 4 classes"):
        train(wrong.with_transform(TinyTransform(True)))
    assert no_work_was_done()


def test_labels_out_of_range_made_by_the_transform(images) -> None:
    def transform(batch):
        return {**TinyTransform(True)(batch), "labels": [9 for _ in batch["label"]]}

    with pytest.raises(DataError, match="found labels=9, but the model has 4 classes"):
        train(images.with_transform(transform))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("0:5", "freezes 5 blocks from epoch 0, but the model has 4"),
        ("0:x", "not a start:split_point pair"),
        ("0", "not a start:split_point pair"),
        ("a:2", "not a start"),
        ("2:1,1:2", "starts must increase"),
        ("1.5:2", "fraction of training"),
        ("-1:2", "negative"),
    ],
)
def test_schedules(train_dataset, schedule, message) -> None:
    with pytest.raises(ScheduleError, match=message):
        make_trainer(tiny_vit(), train_dataset, schedule=schedule)


def test_unsupported_model(train_dataset) -> None:
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))

        def forward(self, pixel_values, labels=None):
            return {"loss": self.layers(pixel_values).mean()}

    with pytest.raises(UnsupportedModelError, match=r"looked for a ModuleList or Sequential.*attention"):
        make_trainer(Convolutions(), train_dataset)


def test_model_whose_suffix_is_not_the_model(train_dataset) -> None:
    model = tiny_vit()
    plain = model.forward

    def forward(pixel_values=None, **kwargs):
        output = plain(pixel_values=pixel_values, **kwargs)
        output.loss = output.loss + pixel_values.mean()
        return output

    model.forward = forward
    with pytest.raises(UnsupportedModelError, match=r"the loss is nan from the cache and 1\.\d+ on images"):
        train(train_dataset, model)
    assert no_work_was_done()


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_iterable_dataset(images, kind) -> None:
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    rows = images.to_iterable_dataset() if kind == "datasets" else Rows()
    with pytest.raises(UnsupportedSetupError, match="IterableDataset"):
        make_trainer(tiny_vit(), rows, max_steps=3)


@pytest.mark.parametrize("cache_dir", ["out", "out/caches", "./out/../out/deep/caches"])
def test_cache_inside_output_dir(train_dataset, cache_dir) -> None:
    with pytest.raises(UnsupportedSetupError, match=r"lies inside output_dir.*push_to_hub"):
        make_trainer(tiny_vit(), train_dataset, cache={"cache_dir": cache_dir})


def test_reentrant_checkpointing_in_arguments(train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, schedule=None)
    trainer.args.gradient_checkpointing_kwargs = {"use_reentrant": True}
    with pytest.raises(UnsupportedSetupError, match="use_reentrant"):
        FreezeCacheTrainer(
            model=tiny_vit(), args=trainer.args, train_dataset=train_dataset, freeze_config=FreezeConfig("0:1")
        )


def test_reentrant_checkpointing_of_the_model(train_dataset) -> None:
    model = tiny_vit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the name is deprecated from some version on
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UnsupportedSetupError, match="use_reentrant"):
        train(train_dataset, model)
    assert no_work_was_done()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"train_sampling_strategy": "sequential"}, "shuffles by chunks"),
    ],
)
def test_arguments_that_cannot_be_kept(train_dataset, settings, message) -> None:
    with pytest.raises(UnsupportedSetupError, match=message):
        make_trainer(tiny_vit(), train_dataset, **settings)


def test_transformers_without_run_epoch(train_dataset, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(Trainer, "_run_epoch")
        with pytest.raises(UnsupportedSetupError, match=r"lacks.*_run_epoch.*transformers>=5.4"):
            make_trainer(tiny_vit(), train_dataset)
        make_trainer(tiny_vit(), train_dataset, schedule=None)


def test_transform_with_a_generator_of_its_own(images) -> None:
    generator = np.random.default_rng(0)

    def transform(batch):
        batch = TinyTransform(False)(batch)
        return {**batch, "pixel_values": [pixels * generator.random() for pixels in batch["pixel_values"]]}

    with pytest.raises(UnrepeatableTransformError, match="generator of its own"):
        train(images.with_transform(transform))
    assert no_work_was_done()


def test_collator_that_mixes_samples(train_dataset) -> None:
    def mixup(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {
            "pixel_values": 0.7 * pixel_values + 0.3 * pixel_values.flip(0),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }

    with pytest.raises(DataError, match="Mixup"):
        train(train_dataset, trainer={"data_collator": mixup})
    assert no_work_was_done()


def test_collator_that_yields_something_else_than_tensors(train_dataset) -> None:
    def collate(examples):
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.tensor([example["labels"] for example in examples]),
            "names": ["x" for _ in examples],
        }

    with pytest.raises(DataError, match="'names' as list"):
        train(train_dataset, trainer={"data_collator": collate})


def test_nan_hidden_states_name_their_rows(images) -> None:
    class Broken(TinyTransform):
        def __call__(self, batch):
            dark = [
                label == 3 and np.array(image).mean() < 88
                for image, label in zip(batch["image"], batch["label"], strict=True)
            ]
            batch = super().__call__(batch)
            batch["pixel_values"] = [
                p * float("nan") if bad else p for p, bad in zip(batch["pixel_values"], dark, strict=True)
            ]
            return batch

    bad = [row for row in range(50) if images[row]["label"] == 3 and np.array(images[row]["image"]).mean() < 88]
    assert bad
    with pytest.raises(DataError, match=r"NaN or infinite hidden states for rows \[(\d+)"):
        train(images.with_transform(Broken(False)))


def test_images_of_different_sizes(images) -> None:
    def transform(batch):
        batch = TinyTransform(False)(batch)
        sizes = [8 if label == 3 else 16 for label in batch["labels"]]
        return {**batch, "pixel_values": [p[:, :s, :s] for p, s in zip(batch["pixel_values"], sizes, strict=True)]}

    with pytest.raises(DataError, match=r"data_collator failed on rows \[.*one size"):
        train(images.with_transform(transform))


def test_labels_out_of_range_that_only_some_rows_have(images) -> None:
    """The first rows are fine; the transform spoils a later one by its pixels, which no look at a column can find."""
    spoilt = images[29]["image"].tobytes()

    def transform(batch):
        labels = TinyTransform(False)(batch)["labels"]
        bad = [image.tobytes() == spoilt for image in batch["image"]]
        return {
            **TinyTransform(False)(batch),
            "labels": [7 if b else label for b, label in zip(bad, labels, strict=True)],
        }

    with pytest.raises(DataError, match=r"on rows \[.*found labels=7, but the model has 4 classes"):
        train(images.with_transform(transform))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "sometimes"}, "'mode': .*got sometimes"),
        ({"num_views": -1}, "num_views"),
        ({"num_views": 0}, "num_views=0"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"build_batch_size": 0}, "build_batch_size"),
    ],
)
def test_cache_config(settings, message) -> None:
    with pytest.raises(UnsupportedSetupError, match=message):
        CacheConfig(**settings)


def test_unknown_codec(train_dataset) -> None:
    with pytest.raises(UnsupportedSetupError, match=r"Unknown codec 'gzip'; known are \['bf16', .*'lossless'"):
        make_trainer(tiny_vit(), train_dataset, cache={"codec": "gzip"})


def test_transforms_without_freezing(images) -> None:
    with pytest.raises(UnsupportedSetupError, match="with freeze_config only"):
        make_trainer(tiny_vit(), images, schedule=None, trainer={"train_transform": TinyTransform(True)})


def test_one_transform_of_two(images) -> None:
    with pytest.raises(UnsupportedSetupError, match="go together"):
        train(images, trainer={"train_transform": TinyTransform(True)})


def test_empty_dataset(images) -> None:
    with pytest.raises(DataError, match="no rows"):
        train(images.select([]).with_transform(TinyTransform(True)))
