"""The suffix of a model on a cache, in trainers that know nothing of freezing."""

from __future__ import annotations

import pytest
import torch
from support.tiny import make_trainer, tiny_vit, training_arguments, with_head
from torch.utils.data import Subset
from transformers import Trainer

from hf_freezecache import CachedDataset, FreezeCacheTrainer, SuffixModel
from hf_freezecache.errors import DataError

TRAINERS = [Trainer, FreezeCacheTrainer]


@pytest.fixture
def cached(train_dataset) -> CachedDataset:
    built = make_trainer(tiny_vit(), train_dataset, schedule="0:2", cache={"num_views": 2}).build_cache()
    return CachedDataset.from_pretrained(built.reader.directory)


def test_too_few_classes_for_the_labels_of_the_cache(cached) -> None:
    with pytest.raises(DataError, match=r"has label 3, but this ViT\w+ has 3 classes.*num_labels"):
        SuffixModel.for_cache(with_head(3), cached)
    SuffixModel.for_cache(with_head(9), cached)
    several = with_head(3)
    several.config.problem_type = "multi_label_classification"
    SuffixModel.for_cache(several, cached)
    direct = SuffixModel(with_head(3), 2, cached.reader.index.image_shape)
    trainer = Trainer(model=direct, args=training_arguments(num_train_epochs=1), train_dataset=cached)
    with pytest.raises(DataError, match="found 3, but the model has 3 classes"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.by_default(1)
@pytest.mark.parametrize("cls", TRAINERS)
@pytest.mark.slow
def test_training_and_evaluation_on_parts_of_a_cache(cached, cls) -> None:
    trainer = cls(
        model=SuffixModel.for_cache(tiny_vit(), cached),
        args=training_arguments(num_train_epochs=1, eval_strategy="epoch"),
        train_dataset=Subset(cached, range(30)),
        eval_dataset=Subset(cached, range(30, 50)),
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.global_step == 3
    assert torch.isfinite(torch.tensor(losses)).all()
    assert len(losses) == 1


@pytest.mark.slow
@pytest.mark.parametrize("cls", TRAINERS)
def test_a_cache_that_was_opened_in_part(cached, cls) -> None:
    part = CachedDataset.from_pretrained(cached.reader.directory, shards=[0, 1])
    suffix = SuffixModel.for_cache(tiny_vit(), part)
    settings = {"model": suffix, "args": training_arguments(num_train_epochs=1)}
    with pytest.raises(IndexError, match=r"was left out .*Subset\(cached, cached.sample_indices"):
        part.__getitems__(list(range(50)))
    rows = Subset(part, part.sample_indices.tolist())
    trainer = cls(train_dataset=rows, eval_dataset=rows, **settings)
    trainer.train()
    assert trainer.state.global_step == 4  # 32 rows in batches of 10
    assert trainer.evaluate()["eval_loss"] > 0
