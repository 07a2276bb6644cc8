"""Fine-tune an image classifier within a budget. This is a script for ``Trainer`` but for the last two arguments of the trainer.

    python recipes/finetune.py facebook/deit-tiny-patch16-224 ./flower_photos

The first argument is a model on the Hub, or its folder. The second is what ``datasets.load_dataset`` takes; it has the splits
``train`` and ``test``, with columns ``image`` and ``label`` (a ``ClassLabel``). ``outputs/finetune`` then holds an ordinary model, and
``freezecache_report/report.html`` beside it says what each stage did, and why.
"""

import sys

from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainingArguments

from hf_freezecache import CacheConfig, FreezeCacheTrainer, FreezeConfig
from hf_freezecache.data.image_transform import ImageTransform

base, data = sys.argv[1], load_dataset(sys.argv[2])
classes = data["train"].features["label"].names
processor = AutoImageProcessor.from_pretrained(base)
augmented, plain = (ImageTransform.from_processor(processor, train=train) for train in (True, False))

trainer = FreezeCacheTrainer(
    model=AutoModelForImageClassification.from_pretrained(
        base, num_labels=len(classes), id2label=dict(enumerate(classes)), ignore_mismatched_sizes=True
    ),
    args=TrainingArguments(
        "outputs/finetune",
        num_train_epochs=6,
        per_device_train_batch_size=32,
        learning_rate=2e-4,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        remove_unused_columns=False,  # the transform needs the images
        report_to="none",
    ),
    train_dataset=data["train"].with_transform(augmented),
    eval_dataset=data["test"].with_transform(plain),
    processing_class=processor,
    compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean().item()},
    freeze_config=FreezeConfig(schedule="auto", budget=0.33),  # a third of the cost of six epochs of plain Trainer
    cache_config=CacheConfig(cache_dir="caches"),
)
trainer.train()
trainer.save_model()
print(f"accuracy {trainer.evaluate()['eval_accuracy']:.1%}")
