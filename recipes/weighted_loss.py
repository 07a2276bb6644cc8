"""Train from a cache with a loss of your own: rare classes weigh as much as common ones.

    python recipes/weighted_loss.py --model facebook/deit-tiny-patch16-224 --data ./flower_photos --schedule 0:6 --epochs 6

The loss goes where ``Trainer`` takes it, in ``compute_loss_func``. Before the cache is built, one step is taken on images and as from
the cache. A loss that needs more than logits and labels, the images of a teacher say, is refused there. The cache holds no loss: a run
with other weights finds it. Accuracy is printed as the mean over classes, which is what the weights are for.

``--data`` is what ``datasets.load_dataset`` takes; it has the splits ``train`` and ``test``, with columns ``image`` and ``label`` (a
``ClassLabel``).
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainingArguments, set_seed

from hf_freezecache import CacheConfig, FreezeCacheTrainer, FreezeConfig
from hf_freezecache.data.image_transform import ImageTransform


class WeightedLoss:
    """Cross entropy in which each class counts by the inverse of its number of training images."""

    def __init__(self, train: Dataset, num_classes: int) -> None:
        counts = np.bincount(train["label"], minlength=num_classes)
        self.weight = torch.tensor(counts.sum() / (num_classes * np.maximum(counts, 1)), dtype=torch.float32)

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        losses = nn.functional.cross_entropy(
            outputs.logits, labels, self.weight.to(outputs.logits.device), reduction="none"
        )
        # With gradient_accumulation_steps Trainer gives the images of all batches of the step.
        return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


def accuracy_by_class(prediction: Any) -> dict[str, float]:
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    classes = np.unique(prediction.label_ids)
    return {"mean_class_accuracy": float(np.mean([right[prediction.label_ids == label].mean() for label in classes]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A model on the Hub, or its folder.")
    parser.add_argument("--data", required=True, help="A data set on the Hub, or its folder.")
    parser.add_argument("--schedule", default="0:6", help="Start:split_point pairs, or auto.")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--cache_dir", default="caches")
    parser.add_argument("--output_dir", default="outputs/weighted_loss")
    options = parser.parse_args()

    data = load_dataset(options.data)
    classes = data["train"].features["label"].names
    processor = AutoImageProcessor.from_pretrained(options.model)
    augmented, plain = (ImageTransform.from_processor(processor, train=train) for train in (True, False))
    set_seed(0)  # of the head
    trainer = FreezeCacheTrainer(
        model=AutoModelForImageClassification.from_pretrained(
            options.model, num_labels=len(classes), id2label=dict(enumerate(classes)), ignore_mismatched_sizes=True
        ),
        args=TrainingArguments(
            options.output_dir,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            learning_rate=options.learning_rate,
            eval_strategy="epoch",
            save_strategy="no",
            remove_unused_columns=False,
            report_to="none",
        ),
        train_dataset=data["train"].with_transform(augmented),
        eval_dataset=data["test"].with_transform(plain),
        processing_class=processor,
        compute_metrics=accuracy_by_class,
        compute_loss_func=WeightedLoss(data["train"], len(classes)),
        freeze_config=FreezeConfig(schedule=options.schedule),
        cache_config=CacheConfig(cache_dir=options.cache_dir),
    )
    trainer.train()
    trainer.save_model()
    print(f"mean accuracy over classes {trainer.evaluate()['eval_mean_class_accuracy']:.1%}")


if __name__ == "__main__":
    main()
