"""Train LoRA adapters behind frozen blocks, from a cache of what the frozen blocks give. It needs PEFT: ``pip install peft``.

    python recipes/lora.py --model facebook/deit-tiny-patch16-224 --data ./flower_photos --schedule 0:4 --epochs 6

The adapters of frozen blocks stay as they begin, which is nothing; those behind them train, and so does the head. The next run, with
another rank or learning rate, finds the cache. ``--schedule auto`` chooses how many blocks to freeze. ``outputs/lora/merged`` then
holds an ordinary model with the adapters merged into it.

``--data`` is what ``datasets.load_dataset`` takes; it has the splits ``train`` and ``test``, with columns ``image`` and ``label`` (a
``ClassLabel``).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainingArguments, set_seed

from hf_freezecache import CacheConfig, FreezeCacheTrainer, FreezeConfig
from hf_freezecache.data.image_transform import ImageTransform


def with_adapters(model: Any, rank: int) -> Any:
    """Return the model with adapters on queries and values of all blocks, and a head that trains whole."""
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.1,
        target_modules=r".*\.(query|value|q_proj|v_proj)",
        modules_to_save=["classifier"],
    )
    return get_peft_model(model, config)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A model on the Hub, or its folder.")
    parser.add_argument("--data", required=True, help="A data set on the Hub, or its folder.")
    parser.add_argument("--schedule", default="0:4", help="Start:split_point pairs, or auto.")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning_rate", type=float, default=4.8e-3)
    parser.add_argument("--cache_dir", default="caches")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/lora"))
    options = parser.parse_args()

    data = load_dataset(options.data)
    classes = data["train"].features["label"].names
    processor = AutoImageProcessor.from_pretrained(options.model)
    augmented, plain = (ImageTransform.from_processor(processor, train=train) for train in (True, False))
    set_seed(0)  # of head and adapters
    model = AutoModelForImageClassification.from_pretrained(
        options.model, num_labels=len(classes), id2label=dict(enumerate(classes)), ignore_mismatched_sizes=True
    )
    trainer = FreezeCacheTrainer(
        model=with_adapters(model, options.rank),
        args=TrainingArguments(
            str(options.output_dir),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            label_names=["labels"],  # PEFT's wrapper hides them from Trainer
            eval_strategy="epoch",
            save_strategy="no",
            remove_unused_columns=False,
            report_to="none",
        ),
        train_dataset=data["train"].with_transform(augmented),
        eval_dataset=data["test"].with_transform(plain),
        compute_metrics=accuracy,
        freeze_config=FreezeConfig(schedule=options.schedule),
        cache_config=CacheConfig(cache_dir=options.cache_dir),
    )
    trainer.train()
    merged = options.output_dir / "merged"
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.1%}; the merged model is in {merged}")
    trainer.model.merge_and_unload().save_pretrained(merged)
    processor.save_pretrained(merged)


if __name__ == "__main__":
    main()
