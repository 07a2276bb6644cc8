"""``hf-freezecache build``: images of every kind on disk become a cache, which the trainer then finds and reuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import DatasetCard
from support.commands import assert_one_line, call
from support.hub_client import connect
from support.hub_server import HubServer
from support.stand_ins import FLOWER_CLASSES, MODEL, make_flowers, publish
from support.tiny import PROCESSOR, TinyTransform, make_trainer, tiny_vit

from hf_freezecache import (
    CacheConfig,
    CachedDataset,
    SuffixModel,
    split_model,
)
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.cli.build import load_images
from hf_freezecache.data.collators import collate_cached
from hf_freezecache.data.image_transform import ImageTransform
from hf_freezecache.errors import (
    CacheMismatchError,
    UnsupportedSetupError,
)
from hf_freezecache.hub.provenance import (
    Provenance,
    keep_provenance,
    provenance_json,
    read_provenance,
)


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
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

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


@pytest.mark.usefixtures("folder")
def test_a_head_may_train_on_a_cache_of_some_rows(images) -> None:
    """Whole chunks of the permuted rows, as a run with the same setting wants them."""
    rows = images.select([place % len(images) for place in range(4 * CacheConfig().chunk_size)])
    rows.to_parquet("many/train.parquet")
    built = build("many", "--split-point", 4, "--head-rows", 0.3)
    assert built["num_samples"] == 2 * CacheConfig().chunk_size
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    model = type(tiny_vit()).from_pretrained("model")
    plain = ImageTransform.from_processor(AutoImageProcessor.from_pretrained("model"), train=False)
    rows = load_images("many", "train", "image", "label")
    defaults = {name: getattr(CacheConfig(), name) for name in ("chunk_size", "shard_chunks")}
    pair = {"train_transform": TinyTransform(augment=True), "eval_transform": plain}
    for dataset, transforms in ((rows.with_transform(plain), {}), (rows, pair)):
        trainer = make_trainer(
            model,
            dataset,
            schedule="0:4",
            freeze={"head_rows": 0.3},
            num_train_epochs=1,
            cache={"cache_dir": "caches", **defaults},
            trainer=transforms,
        )
        assert trainer.build_cache().reader.directory.name == Path(built["path"]).name
    status, _, err = call("build", "model", "many", "--split-point", 2, "--head-rows", 0.3)
    assert status == 1
    assert_one_line(err)
    assert "Set split_point=4" in err


@pytest.mark.by_default(5)
@pytest.mark.parametrize(
    ("place", "rows"),
    [
        *[("data", 12), ("data/train.parquet", 12), ("disk", 12), ("splits", 3), ("pictures", 12)],
        *[("data [v2]", 12), ("data [v2]/train.parquet", 12), ("pictures [v2]", 12)],
    ],
)
def test_kinds_of_data(folder, place, rows) -> None:
    if "[" in place:
        (folder / place.partition(" ")[0]).rename(folder / place.partition("/")[0])
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


@pytest.mark.slow
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


@pytest.fixture
def server(tmp_path, monkeypatch):
    with HubServer(tmp_path / "server") as server:
        connect(server, tmp_path / "home", monkeypatch)
        yield server


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
def test_the_card_of_a_cache_that_was_built_here_says_of_what(server, tmp_path) -> None:
    """Building, looking and pushing are commands of their own; what the first knew is written on the card of the last."""
    (tmp_path / "stand-ins").mkdir()
    publish(server, tmp_path / "stand-ins")
    make_flowers(Path("flower_photos"))
    status, out, err = call("build", MODEL, "flower_photos", "--split-point", 2, "--json")
    assert status == 0, err
    cache = Path(json.loads(out)["path"])
    assert verify_cache(cache) == []
    commit = server.repo(MODEL, "model").refs["main"]
    assert read_provenance(cache) == Provenance(
        model_id=MODEL, model_revision=commit, label_names=tuple(FLOWER_CLASSES)
    )
    status, _, err = call("push", cache, "user/flowers", "--license", "cc-by-2.0", "--dataset", "flower photos")
    assert status == 0, err
    card = server.read("user/flowers", "README.md").decode()
    for words in (f'from_pretrained("{MODEL}", revision="{commit}")', "license: cc-by-2.0", "flower photos"):
        assert words in card
    columns = DatasetCard(card).data.dataset_info["features"]
    labels = next(column for column in columns if column["name"] == "labels")
    assert list(labels["dtype"]["class_label"]["names"].values()) == FLOWER_CLASSES
    # It goes with the cache, also where it is copied or pushed on from.
    assert call("pull", "user/flowers", "pulled")[0] == 0
    CachedDataset.from_pretrained("pulled").save_pretrained("copied")
    assert verify_cache(Path("copied")) == []
    assert call("push", "copied", "user/again")[0] == 0
    assert server.read("user/again", "README.md").decode() == card.replace("user/flowers", "user/again")


def test_a_provenance_that_cannot_be_understood_is_passed_over(caplog) -> None:
    Path("provenance.json").write_text(json.dumps({"license": "mit"}))
    Path("provenance.json").write_text(json.dumps({"license": "mit", "of a later version": 1}))
    assert read_provenance(Path()) == Provenance(license="mit")
    for text in (
        "",
        "[]",
        "{",
        '{"license": 3}',
        '{"license": ["a"]}',
        '{"label_names": "ab"}',
        '{"label_names": [1]}',
        "[" * 9999,
    ):
        Path("provenance.json").write_text(text)
        caplog.clear()
        assert read_provenance(Path()) == Provenance()
        assert "provenance.json is passed over" in caplog.text


def test_words_are_one_clean_line_whatever_they_hold() -> None:
    Path("provenance.json").write_text(
        json.dumps({"license": " a\n\x1b[31mb\ud800 ", "model_id": " ", "label_names": ["\x07"]})
    )
    found = read_provenance(Path())
    assert found == Provenance(license="a [31mb\N{REPLACEMENT CHARACTER}", label_names=("",))
    assert found.words() == "images (a [31mb\N{REPLACEMENT CHARACTER})"
    assert json.loads(provenance_json(found)) == {"license": found.license, "label_names": [""]}


def test_what_is_given_stands_in_place_of_what_was_known() -> None:
    known = Provenance("somebody/pictures", "1" * 40, "mit", "somebody/vit", "2" * 40, ("a", "b"))
    assert known.updated(Provenance()) == known
    assert known.updated(Provenance(license="cc-by-4.0")) == replace(known, license="cc-by-4.0")
    other = known.updated(Provenance(dataset_name="others", model_id="somebody/vit"))
    assert other == Provenance("others", None, None, "somebody/vit", "2" * 40, ("a", "b"))
    assert known.updated(Provenance(model_id="others/vit")) == replace(
        known, model_id="others/vit", model_revision=None
    )


def test_what_built_a_cache_is_not_written_over(images) -> None:
    """Nor is it an error that it cannot be written: it is a matter of words."""
    cached = make_trainer(tiny_vit(), images.with_transform(TinyTransform(augment=False)), schedule="0:1").build_cache()
    folder = Path(cached.reader.directory)
    assert read_provenance(folder) == Provenance(label_names=("a", "b", "c", "d"))
    (folder / "provenance.json").write_text('{"license": "mit"}')
    make_trainer(tiny_vit(), images.with_transform(TinyTransform(augment=False)), schedule="0:1").build_cache()
    assert read_provenance(folder) == Provenance(license="mit")
    Path("file").write_text("")
    assert not keep_provenance(Path("file/below"), Provenance)
