"""What makes a cache another cache, and what does not; and what a user is told."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from pathlib import Path

import datasets
import pytest
import torch
from support.images import make_images
from support.tiny import TinyTransform, make_trainer, tiny_vit
from transformers import ViTForImageClassification

from hf_freezecache import CachedDataset, FreezeCacheTrainer
from hf_freezecache.cache.fingerprint import Fingerprint
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.codecs import (
    PRESETS,
    Codec,
    Planes,
    Zstd,
)
from hf_freezecache.config import CacheConfig
from hf_freezecache.data.hashing import hash_dataset, hash_object
from hf_freezecache.data.seeding import random_states
from hf_freezecache.data.training_data import UserCode
from hf_freezecache.data.views import ViewDataset
from hf_freezecache.errors import (
    CacheMismatchError,
    UnsupportedSetupError,
)
from hf_freezecache.model.hashing import hash_tensors
from hf_freezecache.model.split import find_blocks
from hf_freezecache.training import stage_cache as caching
from hf_freezecache.training.cache_check import spot_check


class HalfSize(TinyTransform):
    def __call__(self, batch):
        batch = super().__call__(batch)
        return {**batch, "pixel_values": [pixels[:, ::2, ::2] for pixels in batch["pixel_values"]]}


def _first_matrix(model, block: int):
    return next(p for p in find_blocks(model)[1][block].parameters() if p.dim() == 2)


def other_weight(model):
    with torch.no_grad():
        _first_matrix(model, 1)[3, 5] += 1e-3
    return model


def other_head(model):
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
        _first_matrix(model, 2).add_(0.1)
        model.vit.layernorm.bias.add_(0.5)
    return model


def edited(images):
    rows = [dict(row) for row in images]
    rows[7]["image"] = rows[8]["image"]
    return datasets.Dataset.from_list(rows, features=images.features)


def cached_run(dataset, model=None, transform=None, schedule="0:2", cache=None, **settings):
    trainer = make_trainer(
        model or tiny_vit(),
        dataset.with_transform(transform or TinyTransform(augment=True)),
        schedule=schedule,
        cache={"num_views": 2, **(cache or {})},
        num_train_epochs=1,
        **settings,
    )
    trainer.train()
    return next(e["freezecache/built_shards"] for e in trainer.state.log_history if "freezecache/built_shards" in e)


CHANGES = {
    "prefix weights": lambda images: {"model": other_weight(tiny_vit())},
    "dataset": lambda images: {"dataset": edited(images)},
    "transform": lambda images: {"transform": TinyTransform(augment=True, strength=0.2)},
    "image size": lambda images: {"transform": HalfSize(augment=True), "model": tiny_vit(image_size=8)},
    "split point": lambda images: {"schedule": "0:3"},
    "number of views": lambda images: {"cache": {"num_views": 3}},
    "view seed": lambda images: {"cache": {"view_seed": 2}},
    "dtype": lambda images: {"bf16": True},
    "chunk layout": lambda images: {"cache": {"chunk_size": 9}},
}


@pytest.mark.by_default(2)
@pytest.mark.parametrize("component", CHANGES)
def test_a_change_is_noticed_and_named(images, component, caplog) -> None:
    built = cached_run(images)
    assert built == 8
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        rebuilt = cached_run(**{"dataset": images, **CHANGES[component](images)})
    assert rebuilt > 0
    (message,) = [m for m in caplog.messages if "No cache fits" in m]
    assert component in message.split("differs in: ")[1]


@pytest.mark.slow
def test_a_change_of_codec_is_noticed_and_named(images, monkeypatch, caplog) -> None:
    cached_run(images)
    monkeypatch.setitem(PRESETS, "lossless", Codec((Planes(), Zstd(3))))
    assert cached_run(images) == 8
    assert "codec" in caplog.text.split("differs in: ")[1]


@pytest.mark.slow
def test_a_change_of_format_version_is_noticed_and_named(images, monkeypatch, caplog) -> None:
    cached_run(images)
    monkeypatch.setattr(caching, "FORMAT_VERSION", 3)
    assert cached_run(images) == 8
    assert "format version" in caplog.text.split("differs in: ")[1]


@pytest.mark.slow
def test_a_change_of_collator_is_noticed_and_named(images, caplog) -> None:
    cached_run(images)

    def collate(examples):
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }

    assert cached_run(images, trainer={"data_collator": collate}) == 8
    assert "data collator" in caplog.text.split("differs in: ")[1]


@pytest.mark.slow
def test_a_change_of_head_or_suffix_is_no_change(images) -> None:
    assert cached_run(images) == 8
    assert cached_run(images, other_head(tiny_vit())) == 0


@pytest.mark.slow
def test_a_change_of_training_hyperparameters_is_no_change(images) -> None:
    assert cached_run(images) == 8
    assert cached_run(images, learning_rate=0.1, weight_decay=0.5, dataloader_num_workers=1) == 0


class RenamedViT(ViTForImageClassification):
    pass


def renamed(model):
    model.__class__ = RenamedViT
    return model


def configured(**settings):
    model = tiny_vit()
    for name, value in settings.items():
        setattr(model.config, name, value)
    return {"model": model}


NO_CHANGES = {
    "another seed": lambda: {"seed": 5},
    "another data seed": lambda: {"data_seed": 5},
    "dropout": lambda: {"model": tiny_vit(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1)},
    "outputs": lambda: configured(output_hidden_states=True),
    "a renamed class": lambda: {"model": renamed(tiny_vit())},
    "fewer views": lambda: {"cache": {"num_views": 1}},
}


@pytest.mark.by_default(2)
@pytest.mark.parametrize("change", NO_CHANGES)
def test_what_does_not_matter_is_no_change(images, change) -> None:
    assert cached_run(images) == 8
    assert cached_run(images, **NO_CHANGES[change]()) == 0


@pytest.mark.slow
def test_a_run_of_fewer_views_trains_as_with_a_cache_of_its_own(images) -> None:
    def losses(folder, num_views):
        trainer = make_trainer(
            tiny_vit(),
            images.with_transform(TinyTransform(augment=True)),
            schedule="0:2",
            cache={"num_views": num_views, "cache_dir": folder},
            num_train_epochs=2,
        )
        trainer.train()
        return trainer

    losses("many", 4)
    found, own = losses("many", 2), losses("own", 2)
    assert len(list(Path("many").glob("k*"))) == 1
    assert found.losses == own.losses
    assert found._record.decisions[0].num_views == 2
    assert {view for _, view in CachedDataset(found._run.cache.current).sampler(0)} <= {0, 1}
    with pytest.raises(IndexError, match="view"):
        CachedDataset(found._run.cache.current)[0, 2]


@pytest.mark.slow
def test_a_lossy_cache_of_more_views_is_another_cache(images) -> None:
    assert cached_run(images, cache={"codec": "int8", "num_views": 3}) > 0
    assert cached_run(images, cache={"codec": "int8", "num_views": 2}) > 0


def transforms(strength: float = 0.1, base: float = 0.1) -> dict[str, TinyTransform]:
    train, evaluation = TinyTransform(True, strength), TinyTransform(False, base)
    return {"train_transform": train, "eval_transform": evaluation}


class Unhashable(TinyTransform):
    """Augments, and holds what has no content."""

    def __init__(self, augment: bool) -> None:
        super().__init__(augment)
        self.rows = (row for row in range(3))


def test_one_view_is_named_by_what_renders_it(images) -> None:
    """That is ``eval_transform``, the data set's own or the trainer's."""
    one, plain = {"num_views": 1}, TinyTransform(augment=False)
    assert cached_run(images, cache=one, trainer=transforms()) == 4
    assert cached_run(images, cache=one, trainer=transforms(strength=0.3)) == 0
    assert cached_run(images, cache=one, transform=plain) == 0
    unhashable = {"train_transform": Unhashable(True), "eval_transform": plain}
    assert cached_run(images, cache=one, trainer=unhashable) == 0
    with pytest.raises(UnsupportedSetupError, match="transform_id"):
        cached_run(images, cache={"num_views": 2}, trainer=unhashable)
    assert cached_run(images, cache=one, trainer=transforms(base=0.2)) == 4
    assert cached_run(images, cache={"num_views": 2}, trainer=transforms()) == 8


def test_one_view_is_among_several_of_the_same_transforms(images) -> None:
    assert cached_run(images, cache={"num_views": 2}, trainer=transforms()) == 8
    assert cached_run(images, cache={"num_views": 1}, trainer=transforms()) == 0
    assert cached_run(images, cache={"num_views": 1}, trainer=transforms(strength=0.3)) == 4


@pytest.mark.parametrize("build_from", ["auto", "previous_cache"])
def test_a_later_stage_is_built_from_one_view_of_several(images, build_from) -> None:
    for num_views, schedule in ((2, "0:2"), (1, "0:2,1:3")):
        cache = {"num_views": num_views, "build_from": build_from}
        trainer = make_trainer(
            tiny_vit(), images, schedule=schedule, cache=cache, trainer=transforms(), num_train_epochs=2
        )
        trainer.train()
    assert [(each.cache, each.built_from) for each in trainer._record.decisions] == [("found", None), ("built", 2)]


@pytest.mark.slow
def test_a_transform_that_misses_twice_in_a_row_gets_a_hint(images, caplog) -> None:
    for number in range(3):
        caplog.clear()
        cached_run(images, transform=TinyTransform(augment=True, strength=0.1 + number))
        assert ("transform_id" in caplog.text) == (number == 2)
    caplog.clear()
    cached_run(images, transform=TinyTransform(augment=True, strength=9), cache={"chunk_size": 9})
    assert "chunk layout" in caplog.text


class Counts(TinyTransform):
    calls = 0

    def __call__(self, batch):
        self.calls += 1
        return super().__call__(batch)


@pytest.mark.slow
def test_a_transform_that_counts_its_calls_is_found_again(images, caplog) -> None:
    transform = Counts(augment=True)
    assert cached_run(images, transform=transform) == 8
    assert cached_run(images, transform=transform) == 0
    assert cached_run(images, transform=Counts(augment=True)) == 0
    assert "no longer what it was" not in caplog.text
    assert "The training transform changes by itself as it renders" in caplog.text


def test_opening_a_cache_of_other_inputs_names_the_components(images) -> None:
    cached_run(images)
    (directory,) = Path("caches").glob("k02-*")
    components = CacheReader(directory).index.fingerprint
    with pytest.raises(CacheMismatchError, match="these differ: prefix weights, view seed"):
        CacheReader(directory, Fingerprint({**components, "prefix weights": "x", "view seed": "9"}))


def test_dataset_hash_is_of_content(images, tmp_path) -> None:
    reference = hash_dataset(images)
    images.to_parquet(tmp_path / "images.parquet")
    reloaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "images.parquet"), cache_dir=str(tmp_path))
    assert hash_dataset(reloaded["train"]) == reference
    assert hash_dataset(images.with_transform(TinyTransform(True))) == reference
    assert hash_dataset(images.select(range(49, -1, -1))) != reference
    assert hash_dataset(images.select(range(49, -1, -1)).select(range(49, -1, -1))) == reference
    assert hash_dataset(edited(images)) != reference
    assert hash_dataset(make_images(50, seed=1)) != reference


def test_dataset_hash_sees_an_edited_image_file(images, tmp_path) -> None:
    for row in range(4):
        images[row]["image"].save(tmp_path / f"{row}.png")
    paths = [str(tmp_path / f"{row}.png") for row in range(4)]
    dataset = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    before = hash_dataset(dataset)
    assert hash_dataset(dataset) == before
    images[9]["image"].rotate(90).save(paths[2])
    assert hash_dataset(dataset) != before


def test_data_sets_that_cannot_be_hashed_need_a_name(images) -> None:
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, row):
            return {name: value[0] for name, value in TinyTransform(True)(images[row : row + 1]).items()}

    with pytest.raises(UnsupportedSetupError, match="dataset_id"):
        make_trainer(tiny_vit(), Rows(), num_train_epochs=1).train()
    trainer = make_trainer(tiny_vit(), Rows(), cache={"dataset_id": "rows-1"}, num_train_epochs=1)
    trainer.train()
    assert trainer._run.step is not None


@pytest.mark.slow
def test_transforms_that_cannot_be_hashed_need_a_name(images) -> None:
    cannot_be_pickled = (row for row in range(3))
    with pytest.raises(UnsupportedSetupError, match="transform_id"):
        hash_object(cannot_be_pickled, "training transform")
    assert cached_run(images, transform=TinyTransform(True), cache={"transform_id": "v1"}) == 8

    class SameImages(TinyTransform):
        pass

    assert cached_run(images, transform=SameImages(True), cache={"transform_id": "v1"}) == 0
    with pytest.raises(CacheMismatchError, match=r"right fingerprint but not what rows .* give now"):
        cached_run(images, transform=TinyTransform(True, 0.3), cache={"transform_id": "v1"})


@pytest.mark.slow
def test_edited_code_of_an_imported_transform_is_noticed(images, tmp_path, monkeypatch, caplog) -> None:
    """What can be imported is pickled by its name: only its source shows the edit."""
    source = (
        "from support.tiny import TinyTransform\n\n\nclass Scaled(TinyTransform):\n    def __call__(self, batch):\n"
        "        batch = super().__call__(batch)\n"
        "        return {**batch, 'pixel_values': [p * FACTOR for p in batch['pixel_values']]}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    built = []
    for factor in (1.0, -3.0):
        (tmp_path / "scaled.py").write_text(source.replace("FACTOR", str(factor)))
        sys.modules.pop("scaled", None)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        built.append(cached_run(images, transform=importlib.import_module("scaled").Scaled(True)))
    assert built == [8, 8]
    assert "transform" in caplog.text.split("differs in: ")[1]


@pytest.mark.slow
def test_rows_are_checked_by_drawing_anew(images, monkeypatch) -> None:
    """Each run computes other rows again. Neither its seeds nor its random states decide which, nor do they change."""
    checked = []
    rendered = ViewDataset.render

    def recording(views, key):
        checked.append(key)
        return rendered(views, key)

    cached_run(images)
    trainer = make_trainer(
        tiny_vit(),
        images.with_transform(TinyTransform(True)),
        schedule="0:2",
        cache={"num_views": 2},
        num_train_epochs=1,
    )
    trainer.train()
    cache, split = trainer._run.cache, trainer._run.current.split
    monkeypatch.setattr(ViewDataset, "render", recording)
    drawn = []
    before = random_states()
    for _ in range(8):
        checked.clear()
        spot_check(cache.chooser, split, cache.current, "no")
        drawn.append(tuple(checked))
    assert random_states() == before
    assert all(len(set(keys)) == 4 for keys in drawn)
    assert len({row for keys in drawn for row, _ in keys}) > 10
    assert {view for keys in drawn for _, view in keys} == {0, 1}


@pytest.mark.slow
def test_edited_code_of_the_model_is_caught(images) -> None:
    """No hash sees a forward that was replaced; a few samples computed again do."""
    cached_run(images)
    model = tiny_vit()
    first = find_blocks(model)[1][0]
    own = first.forward
    first.forward = lambda *args, **kwargs: own(*args, **kwargs) * 1.5
    with pytest.raises(CacheMismatchError, match="Code of the transform, the data set or the model"):
        cached_run(images, model)


@pytest.mark.slow
def test_a_change_of_what_the_collator_yields_is_noticed(images, caplog) -> None:
    class Weighted(TinyTransform):
        def __call__(self, batch):
            return {**super().__call__(batch), "weights": [torch.ones(2) for _ in batch["label"]]}

    settings = {"trainer": {"train_transform": Weighted(True), "eval_transform": Weighted(True)}}
    assert cached_run(images, remove_unused_columns=True, **settings) == 8

    class Ignoring(FreezeCacheTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            assert inputs.pop("weights").shape[1:] == (2,)
            return super().compute_loss(model, inputs, *args, **kwargs)

    assert cached_run(images, cls=Ignoring, **settings) == 8
    assert "batch" in caplog.text.split("differs in: ")[1]


def test_tensor_hash_sees_names_dtypes_shapes_and_bits() -> None:
    tensors = {"a": torch.zeros(4, 2), "b": torch.ones(3)}
    reference = hash_tensors(tensors)
    assert hash_tensors({"a": torch.zeros(4, 2), "b": torch.ones(3)}) == reference
    for other in (
        {"a": torch.zeros(2, 4), "b": torch.ones(3)},
        {"a": torch.zeros(4, 2), "c": torch.ones(3)},
        {"a": torch.zeros(4, 2), "b": torch.ones(3, dtype=torch.int32)},
        {"a": torch.zeros(4, 2), "b": torch.tensor([1, 1, 1 + 2**-23])},
        {"a": -torch.zeros(4, 2), "b": torch.ones(3)},
    ):
        assert hash_tensors(other) != reference


def test_names_of_classes_are_no_content(images) -> None:
    named = images.cast_column("label", datasets.ClassLabel(names=["a", "b", "c", "d"]))
    renamed = images.cast_column("label", datasets.ClassLabel(names=["w", "x", "y", "z"]))
    assert hash_dataset(named) == hash_dataset(renamed)


class Rows(torch.utils.data.Dataset):
    def __init__(self, transform) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row):
        return self.transform(row)


def test_the_transform_of_a_data_set_of_the_users_own_is_hashed() -> None:
    def hashed(transform):
        rows = torch.utils.data.Subset(Rows(transform), [0, 1])
        return UserCode(rows, (None, None), None).hashes(CacheConfig(dataset_id="rows"))["transform"]

    assert hashed(functools.partial(pow, exp=2)) == hashed(functools.partial(pow, exp=2))
    assert hashed(functools.partial(pow, exp=2)) != hashed(functools.partial(pow, exp=3))


class Around(torch.utils.data.Dataset):
    """Rows of a data set that renders them."""

    def __init__(self, dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row):
        return self.dataset[row]


def test_the_transform_of_a_data_set_inside_another_is_hashed(images) -> None:
    def hashed(strength):
        rows = Around(images.with_transform(TinyTransform(True, strength)))
        return UserCode(rows, (None, None), None).hashes(CacheConfig(dataset_id="rows"))["transform"]

    assert hashed(0.1) == hashed(0.1)
    assert hashed(0.1) != hashed(0.2)
