"""What does a sweep over one cache cost, against as many runs of full fine-tuning and of LoRA?

    python recipes/benchmarks/sweeping.py --model ./deit-tiny --data ./caltech50 --json recipes/benchmarks/results/sweeping.json

Runs ``recipes/sweep.py`` as it is: learning rates times heads, the first run with the build. In between it trains ``--plain_runs``
times by plain ``Trainer``, all of the model and by PEFT's LoRA, for as many epochs, with the same images and batches. All are
evaluated once, at their end; the runs of the sweep from a cache. A plain run takes the same time whatever its rate: so many of them
count as often as the sweep has runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accuracy_runs import with_lora
from record import save, spread
from transformers import AutoImageProcessor, Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))
import sweep

from hf_freezecache.data.image_transform import ImageTransform

ARMS = ("full", "lora")


def plain_run(arm: str, options: argparse.Namespace, train: Any, test: Any, rate: float, seed: int) -> dict[str, float]:
    """Train and evaluate by plain ``Trainer``; return accuracy and seconds."""
    began = time.perf_counter()
    processor = AutoImageProcessor.from_pretrained(options.model)
    model = sweep.new_model(options, train.features["label"].names, seed)
    args = sweep.training_arguments(options, rate, seed)
    args.label_names, args.eval_strategy = ["labels"], "no"  # LoRA's wrapper hides the names
    augmenting = ImageTransform.from_processor(processor, train=True, scale=(0.35, 1.0))
    plain = ImageTransform.from_processor(processor, train=False)
    trainer = Trainer(
        with_lora(model) if arm == "lora" else model,
        args,
        train_dataset=train.with_transform(augmenting),
        eval_dataset=test.with_transform(plain),
        compute_metrics=sweep.accuracy,
    )
    trainer.train()
    return {"accuracy": trainer.evaluate()["eval_accuracy"], "seconds": time.perf_counter() - began}


def main() -> None:
    parser = sweep.parser()
    parser.add_argument("--plain_runs", type=int, default=2, help="runs of full fine-tuning and of LoRA that are timed")
    parser.add_argument("--plain_rates", type=float, nargs=2, default=[2e-4, 4.8e-3], help="of full, and of LoRA")
    parser.add_argument("--json", type=Path, default=None, help="where to write the record")
    parser.set_defaults(seeds=[0, 1, 2, 3])
    options = parser.parse_args()
    if len(options.schedules) > 1:
        parser.error("one schedule, so that all runs share one cache")
    (schedule,) = options.schedules
    train, test = sweep.load(options.data)
    pairs = [(rate, seed) for rate in options.learning_rates for seed in options.seeds]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("cached", *ARMS)}
    every = max(len(pairs) // max(options.plain_runs, 1), 1)
    for number, (rate, seed) in enumerate(pairs):
        reached, seconds, _ = sweep.run(options, train, test, schedule, rate, seed)
        found["cached"].append({"rate": rate, "seed": seed, "accuracy": reached, "seconds": seconds})
        print(f"cached, learning rate {rate:g}, seed {seed}: {reached:.1%}, {seconds:.1f} s", flush=True)
        if number % every == 0 and len(found["full"]) < options.plain_runs:
            for arm, its_rate in zip(ARMS, options.plain_rates, strict=True):
                one = plain_run(arm, options, train, test, its_rate, len(found[arm]))
                found[arm].append({"rate": its_rate, "seed": len(found[arm]), **one})
                print(f"{arm}: {one['accuracy']:.1%}, {one['seconds']:.1f} s", flush=True)
    total = sum(one["seconds"] for one in found["cached"])
    results: dict[str, Any] = {"runs": found, "sweep_seconds": round(total, 1)}
    for arm in ARMS if options.plain_runs else ():
        seconds = [one["seconds"] for one in found[arm]]
        results[arm] = {
            "run_seconds": spread(seconds),
            "sweep_over_as_many_runs": round(total / (len(pairs) * statistics.median(seconds)), 4),
        }
        print(
            f"{len(pairs)} runs over one cache, build included: {total:.0f} s, {results[arm]['sweep_over_as_many_runs']:.3f} of "
            f"{len(pairs)} runs of {arm} ({statistics.median(seconds):.0f} s each, {len(seconds)} timed)"
        )
    best = max(found["cached"], key=lambda one: one["accuracy"])
    print(
        f"best of the sweep: {best['accuracy']:.1%}; single runs: "
        + ", ".join(f"{arm} {statistics.mean(one['accuracy'] for one in found[arm]):.1%}" for arm in ARMS if found[arm])
    )
    if options.json is not None:
        config = {name: value for name, value in vars(options).items() if name not in ("cache_dir", "output_dir")}
        config |= {"model": Path(options.model).name, "data": options.data.name}
        config |= {"split_point": int(schedule.rpartition(":")[2])}
        config |= {
            "json": None,
            "train_images": len(train),
            "test_images": len(test),
            "threads": torch.get_num_threads(),
        }
        save(options.json, "sweeping", config, results)


if __name__ == "__main__":
    main()
