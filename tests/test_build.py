"""``hf-freezecache build``: images of every kind on disk become a cache, which the trainer then finds and reuses."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from test_cli import assert_one_line, call
from tiny import PROCESSOR, TinyTransform, make_trainer, tiny_vit

from hf_freezecache import CachedDataset, SuffixModel, split_model
from hf_freezecache.cache.reader import verify_cache
from hf_freezecache.dataset import collate_cached
from hf_freezecache.errors import CacheMismatchError, UnsupportedSetupError
from hf_freezecache.transforms import ImageTransform


@pytest.fixture
def folder(images: datasets.Dataset) -> Path:
    tiny_vit().save_pretrained("model")
    Path("model/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    rows = images.select(range(12))
    rows.to_parquet("data/train.parquet")
    rows.save_to_disk("disk")
    datasets.DatasetDict({"train": rows, "other": rows.select(range(3))}).save_to_disk("splits")
    for number, row in enumerate(rows):
        place = Path("pictures") / "abcd"[row["label"]]
        place.mkdir(parents=True, exist_ok=True)
        row["image"].save(place / f"{number:02d}.png")
    return Path.cwd()


def build(*arguments: object) -> dict:
    status, out, err = call("build", "model", *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


@pytest.mark.usefixtures("folder")
def test_a_cache_holds_what_the_model_makes_of_the_images(images) -> None:
    built = build("data", "--split-point", "2")
    assert built["num_samples"] == 12
    assert Path(built["path"]).parent == Path("caches")
    assert verify_cache(Path(built["path"])) == []
    from transformers import AutoImageProcessor

    transform = ImageTransform.from_processor(AutoImageProcessor.from_pretrained("model"), train=False)
    pixels = torch.stack(transform(images[:12])["pixel_values"])
    exact = split_model(tiny_vit().eval(), 2).prefix(pixels)
    stored = collate_cached(CachedDataset.from_pretrained(Path(built["path"])).__getitems__(list(range(12))))
    torch.testing.assert_close(stored["hidden_states"], exact, atol=1e-5, rtol=0)
    assert stored["labels"].tolist() == images[:12]["label"]
    # Again: found, not built.
    shard = Path(built["path"]) / "view-00/shard-00000.safetensors"
    written = shard.stat().st_mtime_ns
    assert build("data", "--split-point", "2")["path"] == built["path"]
    assert shard.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("place", "rows"),
    [("data", 12), ("data/train.parquet", 12), ("disk", 12), ("splits", 3), ("pictures", 12)],
)
def test_kinds_of_data(folder, place, rows) -> None:
    split = ["--split", "other"] if place == "splits" else []
    built = build(place, "--split-point", 1, "--views", 2, "--cache-dir", "elsewhere", *split)
    assert (built["num_samples"], built["num_views"], built["split_point"]) == (rows, 2, 1)
    assert "view_geometry" not in [extra["name"] for extra in built["extras"]]


@pytest.mark.usefixtures("folder")
def test_wrong_data_are_one_line(tmp_path) -> None:
    for words, arguments in {
        "has no split 'test'": ("data", "--split", "test"),
        "no column 'picture'": ("data", "--image-column", "picture"),
        "not a ClassLabel": ("data", "--label-column", "image"),
        "nowhere": ("nowhere",),
    }.items():
        status, out, err = call("build", "model", *arguments, "--split-point", 2)
        assert (status, out) == (1, ""), words
        assert_one_line(err)
        assert words in err
    status, _, err = call("build", "model", "data", "--split-point", 9)
    assert status == 1
    assert_one_line(err)
    assert "freezes 9 blocks" in err
    assert call("build", "model", "data")[0] == 2


def test_what_build_cache_makes_train_reuses(train_dataset, caplog) -> None:
    cached = make_trainer(tiny_vit(), train_dataset, schedule="0:1,2:3").build_cache()
    assert cached.reader.index.split_point == 1
    trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:1,2:3")
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "freezecache/built_shards" in entry]
    assert [entry["freezecache/built_shards"] > 0 for entry in logs] == [False, True]
    assert len(trainer.build_cache(3)) == len(train_dataset)


def test_build_cache_needs_something_to_build(train_dataset) -> None:
    with pytest.raises(UnsupportedSetupError, match="freeze_config"):
        make_trainer(tiny_vit(), train_dataset, schedule=None).build_cache()
    with pytest.raises(UnsupportedSetupError, match="split_point"):
        make_trainer(tiny_vit(), train_dataset, schedule="0:0").build_cache()
    with pytest.raises(UnsupportedSetupError, match="no cache to push"):
        make_trainer(tiny_vit(), train_dataset).push_cache_to_hub("user/cache")


@pytest.mark.parametrize("split_point", [0, 2, 4])
def test_a_suffix_computes_what_the_model_computes(images, split_point) -> None:
    model = tiny_vit().eval()
    batch = TinyTransform(augment=False)(images[:6])
    pixels, labels = torch.stack(batch["pixel_values"]), torch.tensor(batch["labels"])
    exact = model(pixel_values=pixels, labels=labels)
    suffix = SuffixModel(model, split_point)
    found = suffix(suffix.split.prefix(pixels).double(), labels=labels)
    assert torch.equal(found.logits, exact.logits)
    assert torch.equal(found.loss, exact.loss)
    found.loss.backward()
    frozen = set(suffix.split.prefix_parameters())
    assert {name for name, p in model.named_parameters() if p.grad is None} == frozen
    assert (len(frozen) > 0) == (split_point >= 0)


def test_a_suffix_for_a_cache_needs_the_weights_of_the_cache(train_dataset) -> None:
    cached = make_trainer(tiny_vit(), train_dataset, schedule="0:2").build_cache()
    another_head, other_blocks = tiny_vit(num_labels=7), tiny_vit()
    SuffixModel.for_cache(another_head, cached)
    with torch.no_grad():
        list(split_model(other_blocks, 2).prefix_parameters().values())[-1][0] += 1e-3
    with pytest.raises(CacheMismatchError, match=r"other weights than those of this ViT.* before block 2"):
        SuffixModel.for_cache(other_blocks, cached)
    with torch.no_grad():  # behind the split they may be others
        for name, parameter in another_head.named_parameters():
            if name not in split_model(another_head, 2).prefix_parameters():
                parameter.zero_()
    assert SuffixModel.for_cache(another_head, cached).split.split_point == 2
