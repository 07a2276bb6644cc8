"""How long an evaluation takes from images and from a cache (``cache_eval``), in one run that evaluates after each epoch.

    python recipes/benchmarks/evaluating.py --model DIR --data DIR --split-points 6,9,11 --json FILE

The evaluations of one run take turns, after one of each that warms up: the first from the cache builds it. Metrics of both must be
the same to the bit on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accuracy_runs import collate
from record import save, spread
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback, TrainingArguments

from hf_freezecache import CacheConfig, FreezeCacheTrainer, FreezeConfig
from hf_freezecache.data.image_transform import ImageTransform

ARMS = ("images", "cache")


class TakingTurns(TrainerCallback):
    """Lets evaluations take turns."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        evaluation = self.trainer._run.evaluation
        from_cache = round(state.epoch) % 2 == 0
        evaluation.config = dataclasses.replace(evaluation.config, cache_eval=from_cache)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def measure(args: argparse.Namespace, rows: datasets.Dataset, processor: Any, split_point: int) -> dict[str, Any]:
    """Return the seconds of evaluations from images and from the cache, and of the one that builds it."""
    model = AutoModelForImageClassification.from_pretrained(args.model)
    turns = TakingTurns()
    with tempfile.TemporaryDirectory() as folder:
        trainer = FreezeCacheTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=f"{folder}/out",
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=args.batch_size,
                # Weights stand still: all evaluations have the same result.
                learning_rate=0.0,
                num_train_epochs=2 * (args.rounds + 1),
                eval_strategy="epoch",
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                disable_tqdm=True,
                bf16=args.bf16,
            ),
            train_dataset=rows.select(range(2 * args.batch_size)).with_transform(
                ImageTransform.from_processor(processor, train=True)
            ),
            eval_dataset=rows.with_transform(ImageTransform.from_processor(processor, train=False)),
            data_collator=collate,
            compute_metrics=accuracy,
            callbacks=[turns],
            freeze_config=FreezeConfig(schedule=f"0:{split_point}"),
            cache_config=CacheConfig(cache_dir=f"{folder}/caches"),
        )
        turns.trainer = trainer
        trainer.train()
    found = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    metrics = {(entry["eval_loss"], entry["eval_accuracy"]) for entry in found}
    if len(metrics) != 1 and not torch.cuda.is_available():
        raise AssertionError(f"evaluations differ: {metrics}")
    seconds = {arm: [entry["eval_runtime"] for entry in found[place::2]] for place, arm in enumerate(ARMS)}
    return {
        "images_seconds": spread(seconds["images"][1:]),
        "cache_seconds": spread(seconds["cache"][1:]),
        "building_seconds": seconds["cache"][0],
        "factor": spread([a / b for a, b in zip(seconds["images"][1:], seconds["cache"][1:], strict=True)]),
        "metrics": sorted(metrics),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a pretrained ViT with an image processor")
    parser.add_argument("--data", required=True, help="folder with test.parquet of columns image and label")
    parser.add_argument("--split-points", default="6,9,11")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_parquet(str(Path(args.data) / "test.parquet"))
    rows = rows.select(np.linspace(0, len(rows) - 1, min(args.images, len(rows))).astype(int))
    processor = AutoImageProcessor.from_pretrained(args.model)
    results = {}
    for split_point in map(int, args.split_points.split(",")):
        result = results[f"k={split_point}"] = measure(args, rows, processor, split_point)
        print(
            f"k={split_point}: from images {result['images_seconds']['median']:.2f} s, from the cache "
            f"{result['cache_seconds']['median']:.2f} s, {result['factor']['median']:.1f} times faster; the first, which builds it, "
            f"{result['building_seconds']:.2f} s",
            flush=True,
        )
    config = {name: str(value) for name, value in vars(args).items() if name != "json"}
    config |= {"model": Path(args.model).name, "data": Path(args.data).name, "threads": str(torch.get_num_threads())}
    save(args.json, "evaluating", config, results)


if __name__ == "__main__":
    main()
