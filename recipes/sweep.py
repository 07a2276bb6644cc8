"""Try schedules, learning rates and heads over one folder of caches: what is cached for one run is there for the others.

    python recipes/sweep.py --model facebook/deit-tiny-patch16-224 --data ./flower_photos \\
        --schedules 0:11 0:6 0:6,3:9 --learning_rates 3e-4 6e-4 1.2e-3 2.4e-3 --seeds 0 1 --epochs 6

Stages from epoch 0 with the same split point share a cache. One behind another (``3:9``) starts from weights that were trained in between:
only the same run finds its cache again. ``--data`` is a folder of ``train.parquet`` and ``test.parquet`` with columns ``image`` and
``label`` (a ``ClassLabel``). The best model is kept.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainingArguments, set_seed

from hf_freezecache import CacheConfig, FreezeCacheTrainer, FreezeConfig
from hf_freezecache.data.image_transform import ImageTransform


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", required=True, help="A model on the Hub, or its folder.")
    options.add_argument("--data", required=True, type=Path, help="Folder of train.parquet and test.parquet.")
    options.add_argument("--schedules", nargs="+", default=["0:11"], help="Start:split_point pairs, or policies.")
    options.add_argument("--learning_rates", type=float, nargs="+", default=[3e-4, 6e-4, 1.2e-3, 2.4e-3])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options.add_argument("--epochs", type=int, default=6)
    options.add_argument("--token_keep", type=float, default=0.5, help="Share of the patches that a step sees.")
    options.add_argument("--bf16", action="store_true")
    options.add_argument("--cache_dir", default="caches", help="Where caches lie; another sweep finds them there.")
    options.add_argument("--output_dir", type=Path, default=Path("outputs/sweep"))
    return options


def load(folder: Path) -> tuple[datasets.Dataset, datasets.Dataset]:
    return tuple(datasets.Dataset.from_parquet(str(folder / f"{name}.parquet")) for name in ("train", "test"))


def new_model(options: argparse.Namespace, names: list[str], seed: int) -> Any:
    set_seed(seed)  # of the head
    return AutoModelForImageClassification.from_pretrained(
        options.model, num_labels=len(names), id2label=dict(enumerate(names)), ignore_mismatched_sizes=True
    )


def training_arguments(options: argparse.Namespace, rate: float, seed: int) -> TrainingArguments:
    run = {"num_train_epochs": options.epochs, "learning_rate": rate, "seed": seed, "bf16": options.bf16}
    run |= {"lr_scheduler_type": "cosine", "weight_decay": 0.05, "save_strategy": "no"}
    run |= {"eval_strategy": "epoch", "eval_delay": options.epochs}  # at the end, from a cache
    run |= {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 64, "remove_unused_columns": False}
    return TrainingArguments(str(options.output_dir / "runs"), report_to="none", disable_tqdm=True, **run)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(options: Any, train: Any, test: Any, schedule: str, rate: float, seed: int) -> tuple[float, float, Any]:
    """Return accuracy, seconds, with one evaluation at the end, and the trainer."""
    began, processor = time.perf_counter(), AutoImageProcessor.from_pretrained(options.model)
    plain = ImageTransform.from_processor(processor, train=False)
    trainer = FreezeCacheTrainer(
        new_model(options, train.features["label"].names, seed),
        training_arguments(options, rate, seed),
        train_dataset=train,
        eval_dataset=test.with_transform(plain),
        processing_class=processor,
        compute_metrics=accuracy,
        train_transform=ImageTransform.from_processor(processor, train=True, scale=(0.35, 1.0)),
        eval_transform=plain,
        freeze_config=FreezeConfig(schedule=schedule, token_keep=options.token_keep),
        cache_config=CacheConfig(cache_dir=options.cache_dir, num_views=1, cache_eval=True),
    )
    trainer.train()
    (found,) = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    return found, time.perf_counter() - began, trainer


def main() -> None:
    options, best = parser().parse_args(), -1.0
    train, test = load(options.data)
    for schedule, rate, seed in product(options.schedules, options.learning_rates, options.seeds):
        found, seconds, trainer = run(options, train, test, schedule, rate, seed)
        built = sum(entry.get("freezecache/built_shards", 0) for entry in trainer.state.log_history)
        line = f"schedule {schedule}, learning rate {rate:g}, seed {seed}: accuracy {found:.1%}"
        print(f"{line}, {seconds:.1f} s, {built} shards built", flush=True)
        if found > best:
            best, best_line = found, line
            trainer.save_model(str(options.output_dir / "best"))
    print(f"best: {best_line}, in {options.output_dir / 'best'}")


if __name__ == "__main__":
    main()
