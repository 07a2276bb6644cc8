"""Compare freezing schedules that share one folder of caches.

    python recipes/schedule_sweep.py --model facebook/deit-tiny-patch16-224 --data ./flower_photos \\
        --schedules 0:6 0:6,3:9 0:9 --epochs 6 --train-samples 300 --cache-dir caches --output-dir outputs/sweep

All schedules start from the same weights, so stages that begin at epoch 0 with the same split point share one cache: the
second schedule above opens what the first has built. Prints a table and writes ``sweep.json``, and a report of each run.

Measured with this command and ``--bf16 --use-cpu --train-samples 200``, DeiT-Tiny (LayerNorm rounded to 8 bits) on TensorFlow's
flower_photos (200 test images), seed 0, one thread of two cores shared with other work: 11 minutes, 4.1 of CPU time.
Accuracy and seconds of training with building: ``0:6`` 86.0%, 137 (22 building); ``0:6,3:9`` 85.0%, 111 (6 building, as
its first stage was there); ``0:9`` 82.5%, 80 (25 building). One seed and 200 images: differences below 5 points say little.

- ``--data`` is a folder of ``train.parquet`` and ``test.parquet`` with columns ``image`` and ``label`` (a ``ClassLabel``).
- Repeat it and nothing is built. Stages behind others (``3:9``) start from weights that were trained in between, so only the same
  schedule finds their caches again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainingArguments, set_seed

from hf_freezecache import (
    CacheConfig,
    FreezeCacheTrainer,
    FreezeConfig,
)
from hf_freezecache.data.image_transform import ImageTransform


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare freezing schedules that share one folder of caches.")
    parser.add_argument("--model", required=True, help="A model on the Hub, or its folder.")
    parser.add_argument("--data", required=True, type=Path, help="Folder of train.parquet and test.parquet.")
    parser.add_argument(
        "--schedules",
        required=True,
        nargs="+",
        help="Start:split_point pairs, e.g. 0:6,3:9, or policies, e.g. 'linear(0,0.5,0.75)'.",
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--num-views", type=int, default=2)
    parser.add_argument("--codec", default="lossless")
    parser.add_argument("--train-samples", type=int, help="Train on so many images, drawn by --seed.")
    parser.add_argument("--test-samples", type=int, help="Evaluate on so many images, drawn by --seed.")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--cache-dir", default="caches", help="Shared by all schedules.")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/sweep"))
    return parser.parse_args()


def load_rows(path: Path, samples: int | None, seed: int) -> datasets.Dataset:
    rows = datasets.Dataset.from_parquet(str(path))
    return rows if samples is None else rows.shuffle(seed=seed).select(range(min(samples, len(rows))))


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(schedule: str, args: argparse.Namespace, train: datasets.Dataset, test: datasets.Dataset) -> dict[str, Any]:
    names = train.features["label"].names
    set_seed(args.seed)  # the same new head for all
    model = AutoModelForImageClassification.from_pretrained(
        args.model,
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
        ignore_mismatched_sizes=True,
    )
    processor = AutoImageProcessor.from_pretrained(args.model)
    plain = ImageTransform.from_processor(processor, train=False)
    folder = args.output_dir / schedule.replace(":", "k").replace(",", "-")
    trainer = FreezeCacheTrainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            seed=args.seed,
            bf16=args.bf16,
            use_cpu=args.use_cpu,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            save_only_model=True,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            logging_steps=5,
        ),
        train_dataset=train,
        eval_dataset=test.with_transform(plain),
        processing_class=processor,
        compute_metrics=accuracy,
        train_transform=ImageTransform.from_processor(processor, train=True, scale=(0.35, 1.0)),
        eval_transform=plain,
        freeze_config=FreezeConfig(schedule=schedule),
        cache_config=CacheConfig(
            cache_dir=args.cache_dir, num_views=args.num_views, codec=args.codec, view_seed=args.seed
        ),
    )
    trainer.train()
    history = trainer.state.log_history
    stages = [entry for entry in history if "freezecache/cache_bytes" in entry]
    return {
        "schedule": schedule,
        "accuracy": [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry][-1],
        "seconds": [e for e in history if "freezecache/cumulative_seconds" in e][-1]["freezecache/cumulative_seconds"],
        "build_seconds": sum(entry["freezecache/build_seconds"] for entry in stages),
        "built_shards": sum(entry["freezecache/built_shards"] for entry in stages),
        "cache_bytes": sum(entry["freezecache/cache_bytes"] for entry in stages),
        "run": str(folder),
    }


def main() -> None:
    args = parse_arguments()
    train = load_rows(args.data / "train.parquet", args.train_samples, args.seed)
    test = load_rows(args.data / "test.parquet", args.test_samples, args.seed)
    runs = [run(schedule, args, train, test) for schedule in args.schedules]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    versions = {module.__name__: module.__version__ for module in (torch, datasets)}
    document = {"runs": runs, "train_images": len(train), "test_images": len(test), "versions": versions}
    (args.output_dir / "sweep.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"{'schedule':<16}{'accuracy':>10}{'seconds':>10}{'building':>10}{'built shards':>14}{'MiB':>8}")
    for found in sorted(runs, key=lambda found: -found["accuracy"]):
        print(
            f"{found['schedule']:<16}{found['accuracy']:>10.1%}{found['seconds']:>10.1f}{found['build_seconds']:>10.1f}"
            f"{found['built_shards']:>14}{found['cache_bytes'] / 2**20:>8.1f}"
        )


if __name__ == "__main__":
    main()
