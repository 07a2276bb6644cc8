"""What augmentation survives the cache: final accuracy against bytes, for several ways of storing views.

    python recipes/benchmarks/augmentation.py --model facebook/deit-tiny-patch16-224 --data flower_photos:112:150 \\
        --seeds 0,1,2 --json record.json

For each seed the rows of all splits of a data set are cut anew: so many to train on, up to ``--test`` others to test on. All
arms of a seed share rows, initial head and order; differences are paired. One schedule, one learning rate for all.

Arms: ``live`` frozen without a cache, every epoch a new view (the ceiling); ``one`` view, the evaluation's rendering;
``K:STORAGE[:distortion=F|bits=SHARE]`` K views with ``copies=STORAGE``, each at the distortion of the first, at another, or with
all but the first together in ``SHARE`` times the bytes of the one-view cache; ``default[-K]``: K views, copies as they are by
default; any with ``:features=NAME:NUMBER``. ``K:full`` takes no budget. ``finetune``: nothing frozen, the epochs of the others. An arm ending in ``+`` is
trained for as many epochs as fit, with its build, in the wall-clock of ``finetune`` of the same seed; run those alone on the
machine.

The gap is accuracy of ``live`` minus that of ``one``; an arm *recovers* the share of it by which it is above ``one``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
from codec_accuracy import accuracy, logged_stages, resized, training_arguments
from record import save, spread
from transformers import set_seed

from hf_freezecache import (
    CacheConfig,
    FreezeCacheTrainer,
    FreezeConfig,
)
from hf_freezecache.compression import extra_views
from hf_freezecache.data.image_transform import ImageTransform

ARMS = [
    "live",
    "one",
    "2:full",
    "4:full",
    "8:full",
    "4:residual",
    "4:sensitive",
    "4:sensitive:bits=1",
    "default-2",
    "default",
    "default-8",
    "one:features=brightness:0.1",
    "one:features=mixup:0.2",
    "one:features=cutmix:1",
    "default:features=mixup:0.2",
    "finetune",
    "one+",
    "default+",
]


def load(folder: str, seed: int, train: int, test: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return training and test rows of a seed."""
    files = {"rows": [str(path) for path in sorted(Path(folder).glob("*.parquet"))]}
    rows = datasets.load_dataset("parquet", data_files=files)["rows"]
    order = np.random.default_rng([seed, 7]).permutation(len(rows))
    return rows.select(order[:train]), rows.select(order[train : train + test])


#: Views of the arm ``default``; all other settings are at their defaults.
DEFAULT_VIEWS = 4


def settings(arm: str) -> dict[str, Any]:
    """Return the settings of ``CacheConfig`` of an arm."""
    name, _, option = arm.rstrip("+").partition(":features=")
    found: dict[str, Any] = {"feature_augmentation": option or None, "codec": "auto"}
    if name in ("live", "finetune"):
        return {"num_views": 0, "mode": "never"}
    if name.startswith("default"):
        return found | {"num_views": int(name[8:] or DEFAULT_VIEWS)}
    if name == "one":
        return found | {"num_views": 1}
    count, storage, *_ = name.split(":")
    return found | {"num_views": int(count), "copies": storage}


def budgets(arm: str, one_view_bits: list[float]) -> tuple[float | None, float | None] | None:
    """Return the distortion and the bits per element of copies, or ``None`` where the library's rule is to hold.

    Args:
        arm: See module.
        one_view_bits: Bits per element of the one-view cache in each stage; the least is what ``bits=`` shares out.
    """
    count, storage, budget = [*arm.rstrip("+").partition(":features=")[0].split(":"), "", ""][:3]
    if storage not in ("residual", "sensitive"):
        if budget:
            raise SystemExit(f"{arm}: views stored as the first one, copies={storage!r}, have no budget of their own.")
        return None
    key, _, value = budget.partition("=")
    if key == "bits":
        return None, float(value) * min(one_view_bits) / (int(count) - 1)
    return float(value or CacheConfig.max_distortion), None


def train_once(
    args: argparse.Namespace, task: dict[str, Any], arm: str, epochs: int, seen: dict[str, Any]
) -> dict[str, Any]:
    """Fine-tune once; return accuracy, bytes, seconds, and what the stages logged."""
    set_seed(task["seed"])
    train, test = load(task["folder"], task["seed"], task["train"], args.test)
    model = resized(args.model, len(train.features["label"].names), task["size"])
    looks = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    evaluation = ImageTransform(task["size"], train=False, **looks)
    training = ImageTransform(task["size"], train=True, scale=(args.min_crop, 1.0), **looks)
    cache, copies = settings(arm), budgets(arm, seen.get("one_view_bits", []))
    schedule = "0:0" if arm.startswith("finetune") else args.schedule
    with tempfile.TemporaryDirectory() as folder:
        trainer = FreezeCacheTrainer(
            model=model,
            args=training_arguments(folder, epochs, args.learning_rate, task["seed"]),
            train_dataset=train,
            eval_dataset=test.with_transform(evaluation),
            compute_metrics=accuracy,
            train_transform=training,
            eval_transform=evaluation,
            freeze_config=FreezeConfig(schedule=schedule),
            cache_config=CacheConfig(cache_dir=f"{folder}/caches", view_seed=task["seed"], **cache),
        )
        # What the rule for copies gives, this benchmark sweeps; no setting does.
        rule = mock.patch.object(extra_views, "_budgets", return_value=copies) if copies else nullcontext()
        started = time.perf_counter()
        with rule:
            trainer.train()
        seconds = time.perf_counter() - started
        found = trainer.evaluate()
    stages = logged_stages(trainer)
    return {
        "seed": task["seed"],
        "accuracy": 100 * found["eval_accuracy"],
        "eval_loss": found["eval_loss"],
        "epochs": epochs,
        "seconds": round(seconds, 1),
        "build_seconds": round(sum(stage.get("build_seconds", 0.0) for stage in stages), 1),
        "bytes_per_image": [round(stage.get("cache_bytes_per_image", 0.0)) for stage in stages],
        "bits": [stage.get("bits_per_element", 0.0) for stage in stages],
        "copy_distortion": [stage.get("copy_distortion") for stage in stages],
    }


def fitting_epochs(seen: dict[str, Any], arm: str, epochs: int) -> int:
    """Return how many epochs of an arm fit in the wall-clock of full fine-tuning: its build once, then epochs."""
    own, full = seen["runs"][arm.rstrip("+")], seen["runs"]["finetune"]
    per_epoch = (own["seconds"] - own["build_seconds"]) / epochs
    return max(1, int((full["seconds"] - own["build_seconds"]) / per_epoch))


def run_task(args: argparse.Namespace, name: str, task: dict[str, Any], arms: list[str], report: Any) -> None:
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in map(int, args.seeds.split(",")):
        seen: dict[str, Any] = {"runs": {}}
        for arm in arms:
            epochs = fitting_epochs(seen, arm, args.epochs) if arm.endswith("+") else args.epochs
            found = train_once(args, {**task, "seed": seed}, arm, epochs, seen)
            seen["runs"][arm] = found
            if arm == "one":
                seen["one_view_bits"] = found["bits"]
            runs[arm].append(found)
            print(
                f"{name} seed {seed} {arm}: accuracy {found['accuracy']:.2f}, bits {found['bits']}, "
                f"{found['bytes_per_image']} bytes per image, {epochs} epochs in {found['seconds']} s "
                f"({found['build_seconds']} s of building)",
                flush=True,
            )
        report(summary(runs))


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return each arm's accuracy, the share of the gap that it recovers, bytes over those of one view, and seconds."""
    found: dict[str, Any] = {}
    live, one = ([run["accuracy"] for run in runs[name]] for name in ("live", "one"))
    gaps = [a - b for a, b in zip(live, one, strict=True)]
    gap = statistics.mean(gaps)
    found["gap"] = {**spread(gaps), "mean": round(gap, 3), "seeds": len(gaps)}
    for arm, entries in runs.items():
        over = [run["accuracy"] - b for run, b in zip(entries, one, strict=False)]
        stored = [sum(run["bytes_per_image"]) for run in entries]
        base = [sum(run["bytes_per_image"]) for run in runs["one"]]
        found[arm] = {
            "accuracy": {
                **spread([run["accuracy"] for run in entries]),
                "mean": round(statistics.mean(r["accuracy"] for r in entries), 3),
            },
            "over_one_view": {**spread(over), "mean": round(statistics.mean(over), 3)},
            "recovered": round(statistics.mean(over) / gap, 3) if gap > 0 else None,
            "bytes_over_one_view": round(statistics.mean(s / b for s, b in zip(stored, base, strict=False)), 3),
            "seconds": spread([run["seconds"] for run in entries]),
            "runs": entries,
        }
    return found


def print_summary(name: str, found: dict[str, Any]) -> None:
    """Print one line per figure."""
    gap = found["gap"]
    print(
        f"{name} gap, live over one view: {gap['mean']:+.2f} points ({gap['min']:+.2f} to {gap['max']:+.2f}, {gap['seeds']} seeds)"
    )
    for arm, entry in found.items():
        if arm == "gap":
            continue
        recovered = "" if entry["recovered"] is None else f", {entry['recovered']:.0%} of the gap"
        print(
            f"{name} {arm}: accuracy {entry['accuracy']['mean']:.2f} ({entry['over_one_view']['mean']:+.2f} over one view{recovered}), "
            f"{entry['bytes_over_one_view']:.2f}x the bytes of one view, {entry['seconds']['median']:.0f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="DeiT or ViT, a folder or a name on the Hub.")
    parser.add_argument(
        "--data", nargs="+", required=True, help="FOLDER:PIXELS:ROWS, parquet files with image and label."
    )
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--test", type=int, default=1000, help="Rows to test on.")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--schedule", default="0:6")
    parser.add_argument("--min_crop", type=float, default=0.35)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    arms = ["live", "one", *[arm for arm in args.arms if arm not in ("live", "one")]]
    results: dict[str, Any] = {}
    config = {key: str(value) for key, value in vars(args).items() if key != "json"}
    config |= {"model": Path(args.model).name, "data": " ".join(Path(item).name for item in args.data)}
    for entry in args.data:
        folder, size, rows = entry.rsplit(":", 2)
        name = f"{Path(folder).name}-{size}-{rows}"

        def report(found: dict[str, Any], name: str = name) -> None:
            results[name] = found
            save(args.json, "augmentation", config, results)

        run_task(args, name, {"folder": folder, "size": int(size), "train": int(rows)}, arms, report)
        print_summary(name, results[name])


if __name__ == "__main__":
    main()
