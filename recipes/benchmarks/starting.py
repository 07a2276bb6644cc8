"""What comes before the first step, and before the first evaluation, over a cache that is there: of plain ``Trainer``, and of a sweep.

    python recipes/benchmarks/starting.py --model DIR --data DIR --json FILE

One process trains one trainer after the other, each with a head of its own, as a sweep does. ``start`` is the CPU time from
``train()`` to the first step, the first batch included. ``evaluate`` is the CPU time of the evaluation after the first epoch, which
looks at its cache, less that of a second evaluation. A first trainer of each kind builds the caches, and is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from record import save, spread
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_freezecache import CacheConfig, FreezeCacheTrainer, FreezeConfig
from hf_freezecache.data.image_transform import ImageTransform

ARMS = ("plain", "lossless", "auto")


class Clock(TrainerCallback):
    """Notes the CPU time of the first step."""

    def __init__(self) -> None:
        self.first_step = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.first_step = self.first_step or time.process_time()


def start(options: argparse.Namespace, arm: str, seed: int, folder: Path, rows: tuple[Any, Any]) -> dict[str, float]:
    """Train one epoch; return CPU seconds."""
    train, test = rows
    processor = AutoImageProcessor.from_pretrained(options.model)
    names = train.features["label"].names
    set_seed(seed)
    model = AutoModelForImageClassification.from_pretrained(
        options.model, num_labels=len(names), id2label=dict(enumerate(names)), ignore_mismatched_sizes=True
    )
    args = TrainingArguments(
        str(folder / "out"),
        num_train_epochs=1,
        max_steps=2,
        seed=seed,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        eval_strategy="no" if arm == "plain" else "epoch",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    clock = Clock()
    common = {"model": model, "args": args, "callbacks": [clock]}
    evaluated = test.with_transform(ImageTransform.from_processor(processor, train=False))
    common |= {"train_dataset": train.with_transform(ImageTransform.from_processor(processor, train=True))}
    common |= {"eval_dataset": evaluated}
    if arm == "plain":
        trainer: Any = Trainer(**common)
    else:
        config = CacheConfig(cache_dir=str(folder / "caches"), num_views=options.views, codec=arm, cache_eval=True)
        trainer = FreezeCacheTrainer(
            **common, freeze_config=FreezeConfig(schedule=f"0:{options.split_point}"), cache_config=config
        )
    spent: list[float] = []
    inner = trainer.evaluate

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        try:
            return inner(*args, **kwargs)
        finally:
            spent.append(time.process_time() - began)

    trainer.evaluate = evaluate
    began = time.process_time()
    trainer.train()
    found = {"start": clock.first_step - began}
    if arm != "plain":
        trainer.evaluate()
        found["evaluate"] = spent[0] - spent[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or name of a pretrained ViT with an image processor")
    parser.add_argument("--data", required=True, type=Path, help="folder with {train,test}.parquet of image and label")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--folder", type=Path, default=None, help="where caches stay; default a temporary folder")
    parser.add_argument("--rows", type=int, default=700)
    parser.add_argument("--test_rows", type=int, default=200)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--split_point", type=int, default=9)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    both = []
    for name, count in (("train", options.rows), ("test", options.test_rows)):
        both.append(
            datasets.Dataset.from_parquet(str(options.data / f"{name}.parquet")).shuffle(0).select(range(count))
        )
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in options.arms}
        for seed in range(options.rounds + 1):
            for arm in options.arms:
                found[arm].append(start(options, arm, seed, options.folder or Path(folder), (both[0], both[1])))
                print(arm, seed, {name: round(value, 2) for name, value in found[arm][-1].items()}, flush=True)
    for arm, runs in found.items():
        results[arm] = {name: spread([run[name] for run in runs[1:]]) for name in runs[0]}
    for arm in options.arms:
        print(arm, {name: values["median"] for name, values in results[arm].items()})
    if options.json is not None:
        config = {name: value for name, value in vars(options).items() if name not in ("json", "folder")}
        config |= {"model": Path(options.model).name, "data": options.data.name, "threads": torch.get_num_threads()}
        save(options.json, "starting", config, results)


if __name__ == "__main__":
    main()
