"""Training from what was pulled, and what its card knows of the model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import DatasetCard
from safetensors.torch import load, save
from support.hub_client import environment, needs_validation
from support.hub_repository import REPO
from support.stand_ins import MODEL, publish
from support.tiny import TinyTransform, make_trainer, tiny_vit, training_arguments
from transformers import AutoModelForImageClassification, Trainer

from hf_freezecache import CachedDataset, FreezeCacheTrainer, SuffixModel
from hf_freezecache.errors import (
    UnsupportedSetupError,
)

#: Of the HTTP client, about how huggingface_hub uploads large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.mark.slow
def test_a_suffix_trained_from_a_pulled_cache_is_the_one_trained_beside_it(server, images, tmp_path) -> None:
    rows = images.select(range(40))
    trainer = make_trainer(
        tiny_vit(), rows.with_transform(TinyTransform(augment=True)), schedule="0:2", cache={"num_views": 2}
    )
    local = trainer.build_cache()
    report = trainer.push_cache_to_hub(REPO, dataset_name="user/pictures", license="cc-by-4.0")
    assert report.private
    card = server.read(REPO, "README.md").decode()
    assert "license: cc-by-4.0" in card
    assert "- user/pictures" in card
    again = make_trainer(
        tiny_vit(), rows.with_transform(TinyTransform(augment=True)), schedule="0:2", cache={"num_views": 2}
    )
    assert again.build_cache().reader.directory == local.reader.directory
    weights = []
    for cached in (local, CachedDataset.from_pretrained(REPO)):
        model = tiny_vit()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        suffix = SuffixModel.for_cache(model, cached)
        run = FreezeCacheTrainer(model=suffix, args=training_arguments(num_train_epochs=3), train_dataset=cached)
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert sum(losses[-4:]) < sum(losses[:4])
        after = model.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved
        assert not any(name in moved for name in suffix.split.prefix_parameters())
        model.save_pretrained("saved")
        assert torch.equal(
            type(model).from_pretrained("saved").state_dict()["classifier.weight"], after["classifier.weight"]
        )
        weights.append(after)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


PLAIN = """
import sys
import datasets, transformers
assert "hf_freezecache" not in sys.modules
rows = datasets.load_dataset("user/cache", split="train")
assert len(rows) == 20 and rows.features["labels"].names == ["a", "b", "c", "d"], rows
assert {"sample_index", "view", "shard", "chunk", "row", "labels"} == set(rows.column_names)
assert sorted(rows["sample_index"]) == list(range(20))
assert all(row["labels"] == row["sample_index"] % 4 and row["view"] == 0 for row in rows)
assert set(datasets.load_dataset("user/cache", "view-01", split="train")["view"]) == {1}
model = transformers.AutoModelForImageClassification.from_pretrained("user/model")
assert "hf_freezecache" not in sys.modules
"""

TRAIN = """
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments
from hf_freezecache import CachedDataset, SuffixModel

cached = CachedDataset.from_pretrained("user/cache")
model = AutoModelForImageClassification.from_pretrained("user/model")
args = TrainingArguments("out", use_cpu=True, num_train_epochs=1, report_to="none", disable_tqdm=True)
Trainer(model=SuffixModel.for_cache(model, cached), args=args, train_dataset=cached).train()
model.save_pretrained("trained")
AutoModelForImageClassification.from_pretrained("trained")
"""


@pytest.mark.slow
def test_the_card_names_the_model_of_the_hub_until_its_frozen_blocks_are_trained(
    server, images, tmp_path, monkeypatch
) -> None:
    publish(server, tmp_path / "published")

    def pushed(schedule: str, repo_id: str) -> str:
        model = AutoModelForImageClassification.from_pretrained(MODEL, num_labels=4, ignore_mismatched_sizes=True)
        rows = images.select(range(20)).with_transform(TinyTransform(augment=True))
        trainer = make_trainer(
            model, rows, schedule=schedule, num_train_epochs=2, cache={"cache_dir": repo_id.partition("/")[2]}
        )
        trainer.train()
        trainer.push_cache_to_hub(repo_id)
        return server.read(repo_id, "README.md").decode()

    card = pushed("0:2", "user/first")
    found = re.search(rf'from_pretrained\("{MODEL}", revision="([0-9a-f]{{40}})"\)', card)
    assert found, card
    base = AutoModelForImageClassification.from_pretrained(
        MODEL, revision=found[1], num_labels=4, ignore_mismatched_sizes=True
    )
    SuffixModel.for_cache(base, CachedDataset.from_pretrained("user/first"))
    assert MODEL not in pushed("0:0,1:2", "user/unfrozen")
    assert MODEL not in pushed("0:1,1:2", "user/deeper")


@pytest.mark.slow
def test_a_model_that_was_trained_before_is_not_taken_for_that_of_the_hub(server, images, tmp_path) -> None:
    """It keeps its name. So what was fetched is compared: of whichever commit that was, and drawing no random number."""
    publish(server, tmp_path / "published")
    weights = load(server.read(MODEL, "model.safetensors", "model"))
    headless = save({name: weight for name, weight in weights.items() if "classifier" not in name}, {"format": "pt"})
    server.replace(MODEL, "model.safetensors", headless, "model")  # its head is drawn on loading
    old = server.repo(MODEL, "model").refs["main"]
    server.replace(MODEL, "config.json", server.read(MODEL, "config.json", "model") + b"\n", "model")
    model = AutoModelForImageClassification.from_pretrained(
        MODEL, revision=old, num_labels=4, ignore_mismatched_sizes=True
    )
    rows = images.select(range(20)).with_transform(TinyTransform(augment=True))

    def card() -> str:
        trainer = make_trainer(model, rows, schedule="0:2", cache={"cache_dir": str(tmp_path / "caches")})
        (Path(trainer.build_cache().reader.directory) / "provenance.json").unlink()
        before = torch.get_rng_state()
        trainer.push_cache_to_hub(REPO, overwrite=True)  # looks again
        assert torch.equal(torch.get_rng_state(), before)
        return server.read(REPO, "README.md").decode()

    assert f'from_pretrained("{MODEL}", revision="{old}")' in card()
    Trainer(model=model, args=training_arguments(max_steps=1), train_dataset=rows).train()
    assert MODEL not in card()


@pytest.mark.slow
@pytest.mark.parametrize("writable", [True, False])
def test_the_trainer_tells_the_card_what_it_knows(server, images, writable) -> None:
    """Also where nothing can be written beside the cache; and what is given stands in its place."""
    rows = images.select(range(20)).with_transform(TinyTransform(augment=True))
    trainer = make_trainer(tiny_vit(), rows, schedule="0:2")
    cache = Path(trainer.build_cache().reader.directory)
    if not writable:
        (cache / "provenance.json").unlink()
        (cache / "provenance.json").mkdir()  # root may write into any folder
    trainer.push_cache_to_hub(REPO)
    names = {"0": "a", "1": "b", "2": "c", "3": "d"}
    for given in (names, {name: name.upper() for name in names}):
        if given is not names:
            trainer.push_cache_to_hub(REPO, label_names=list(given.values()), token=server.token)
        features = DatasetCard(server.read(REPO, "README.md").decode()).data.dataset_info["features"]
        labels = next(feature for feature in features if feature["name"] == "labels")
        assert labels["dtype"]["class_label"]["names"] == given


def test_no_cache_is_pushed_with_a_model_wherever_it_came_from(server, images, cache, tmp_path, caplog) -> None:
    rows = images.select(range(20)).with_transform(TinyTransform(augment=True))
    trainer = make_trainer(tiny_vit(), rows, schedule="0:2", num_train_epochs=1, hub_model_id="user/model")
    trainer.train()
    CachedDataset.from_pretrained(cache).save_pretrained("out/copy")
    with pytest.raises(UnsupportedSetupError, match=r"A cache lies in out/copy.*move it elsewhere"):
        trainer.push_to_hub()
    trainer._push_from_checkpoint("out/checkpoint-2")
    assert "Checkpoint not pushed. A cache lies in out/copy" in caplog.text
    assert server.uploads == {}


def test_a_suffix_is_not_pushed_as_if_it_were_a_model(server, cache) -> None:
    cached = CachedDataset.from_pretrained(cache)
    suffix = SuffixModel(tiny_vit(), 2)
    trainer = FreezeCacheTrainer(model=suffix, args=training_arguments(), train_dataset=cached)
    with pytest.raises(UnsupportedSetupError, match=r"suffix\.model\.push_to_hub"):
        trainer.push_to_hub()


@pytest.mark.slow
@needs_validation
def test_another_process_loads_index_and_model_without_us_and_trains_with_us(server, images, tmp_path) -> None:
    rows = images.select(range(20)).with_transform(TinyTransform(augment=True))
    trainer = make_trainer(tiny_vit(), rows, schedule="0:2", cache={"num_views": 2}, num_train_epochs=1)
    trainer.train()
    trainer.push_cache_to_hub(REPO)
    trainer.model.push_to_hub("user/model")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN + TRAIN],
        env=environment(server, tmp_path / "elsewhere"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
