"""Final accuracy by codec: the same fine-tuning from caches that differ in nothing but the codec.

    python recipes/benchmarks/codec_accuracy.py --model facebook/deit-tiny-patch16-224 \\
        --data flower_photos:224 cifar10:112 --seeds 0,1,2 --json record.json

Every arm of a seed has the same split of the data, views, order of samples, and initial head: its difference from the
lossless arm is paired. Rows of all splits of a data set are pooled and cut anew for each seed into ``--folds`` parts, one
of which is the test set, so that seeds test on different images. The learning rate is the same for all arms.

Arms are ``lossless``, ``auto:FIDELITY``, ``auto:FIDELITY:GRADIENT_WEIGHT``, or any other value of ``--codec``.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from record import save, spread
from transformers import AutoModelForImageClassification, EvalPrediction, TrainingArguments, set_seed

from hf_freezecache import (
    CacheConfig,
    FreezeCacheTrainer,
    FreezeConfig,
)


class Transform:
    """Random resized crop (.35-1) and flip, or the whole image; normalised to the range -1 to 1. PIL only."""

    def __init__(self, size: int, augment: bool) -> None:
        self.size = size
        self.augment = augment

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pixel_values": [self.render(image) for image in rows["image"]], "labels": rows["label"]}

    def render(self, image: Image.Image) -> torch.Tensor:
        image = image.convert("RGB")
        width, height = image.size
        box = (0.0, 0.0, float(width), float(height))
        if self.augment:
            scale = random.uniform(0.35, 1) ** 0.5
            left, top = random.uniform(0, width * (1 - scale)), random.uniform(0, height * (1 - scale))
            box = (left, top, left + width * scale, top + height * scale)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        if self.augment and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)


def load(folder: str, seed: int, folds: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return training and test rows of a seed."""
    files = {"rows": [str(path) for path in sorted(Path(folder).glob("*.parquet"))]}
    rows = datasets.load_dataset("parquet", data_files=files)["rows"]
    order = np.random.default_rng(0).permutation(len(rows))
    edges = np.linspace(0, len(rows), folds + 1).astype(int)
    fold = seed % folds
    test = order[edges[fold] : edges[fold + 1]]
    return rows.select(np.concatenate([order[: edges[fold]], order[edges[fold + 1] :]])), rows.select(test)


def codec_settings(arm: str) -> dict[str, Any]:
    """``auto:0.002:0.5`` -> settings of ``CacheConfig``."""
    codec, *numbers = arm.split(":")
    names = ("distortion", "gradient_weight")
    return {"codec": codec, **{name: float(number) for name, number in zip(names, numbers, strict=False)}}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def training_arguments(folder: str, epochs: int, learning_rate: float, seed: int) -> TrainingArguments:
    """Return what all accuracy benchmarks train with."""
    return TrainingArguments(
        output_dir=str(Path(folder) / "out"),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )


def logged_stages(trainer: FreezeCacheTrainer) -> list[dict[str, Any]]:
    """Return what each stage logged when it began."""
    return [
        {key.removeprefix("freezecache/"): value for key, value in entry.items() if key.startswith("freezecache/")}
        for entry in trainer.state.log_history
        if "freezecache/split_point" in entry
    ]


def run(args: argparse.Namespace, folder: str, size: int, arm: str, seed: int, cache_dir: str) -> dict[str, Any]:
    """Fine-tune once; return accuracy, and what the stages logged."""
    set_seed(seed)
    train, test = load(folder, seed, args.folds)
    labels = train.features["label"].names
    model = resized(args.model, len(labels), size)
    trainer = FreezeCacheTrainer(
        model=model,
        args=training_arguments(cache_dir, args.epochs, args.learning_rate, seed),
        train_dataset=train,
        eval_dataset=test.with_transform(Transform(size, augment=False)),
        compute_metrics=accuracy,
        train_transform=Transform(size, augment=True),
        eval_transform=Transform(size, augment=False),
        freeze_config=FreezeConfig(schedule=args.schedule),
        cache_config=CacheConfig(
            cache_dir=str(Path(cache_dir) / "caches"),
            num_views=args.views,
            copies="full",
            view_seed=seed,
            **codec_settings(arm),
        ),
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    found = trainer.evaluate()
    return {
        "accuracy": 100 * found["eval_accuracy"],
        "eval_loss": found["eval_loss"],
        "seconds": round(seconds, 1),
        "test_images": len(test),
        "train_images": len(train),
        "stages": logged_stages(trainer),
    }


def resized(name: str, num_labels: int, size: int) -> torch.nn.Module:
    """Load a model with a new head, for images of another size its position embeddings interpolated once."""
    model = AutoModelForImageClassification.from_pretrained(name, num_labels=num_labels, ignore_mismatched_sizes=True)
    if size == model.config.image_size:
        return model
    embeddings, patches = model.base_model.embeddings, (size // model.config.patch_size) ** 2
    width = embeddings.position_embeddings.shape[2]
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(torch.zeros(1, patches + 1, width), size, size)
    key = next(name for name, value in model.named_parameters() if value is embeddings.position_embeddings)
    model.config.image_size = size
    smaller = AutoModelForImageClassification.from_config(model.config)
    smaller.load_state_dict({**model.state_dict(), key: positions})
    return smaller


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="DeiT or ViT, a folder or a name on the Hub.")
    parser.add_argument("--data", nargs="+", required=True, help="FOLDER:PIXELS of parquet files with image and label.")
    parser.add_argument("--arms", nargs="+", default=["lossless", "auto"], help="Codecs; 'lossless' is always run.")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--schedule", default="0:6,2:9")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    arms = ["lossless", *[arm for arm in args.arms if arm != "lossless"]]
    results: dict[str, Any] = {}
    for entry in args.data:
        folder, _, size = entry.rpartition(":")
        name = f"{Path(folder).name}-{size}"
        runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
        for seed in map(int, args.seeds.split(",")):
            for arm in arms:
                with tempfile.TemporaryDirectory() as cache_dir:
                    runs[arm].append({"seed": seed, **run(args, folder, int(size), arm, seed, cache_dir)})
                last = runs[arm][-1]
                bits = [round(stage.get("bits_per_element", 0), 2) for stage in last["stages"]]
                print(
                    f"{name} seed {seed} {arm}: accuracy {last['accuracy']:.2f}, loss {last['eval_loss']:.4f}, "
                    f"bits {bits}, {last['seconds']:.0f} s",
                    flush=True,
                )
            results[name] = summary(name, runs)
            config = {key: str(value) for key, value in vars(args).items() if key != "json"}
            config["model"] = Path(args.model).name
            config["data"] = " ".join(Path(item).name for item in args.data)
            save(args.json, "codec_accuracy", config, results)


def summary(name: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print and return accuracy of each arm, and its paired difference from lossless."""
    found: dict[str, Any] = {}
    for arm, entries in runs.items():
        pairs = list(zip(entries, runs["lossless"], strict=True))
        differences = [mine["accuracy"] - exact["accuracy"] for mine, exact in pairs]
        losses = [mine["eval_loss"] - exact["eval_loss"] for mine, exact in pairs]
        found[arm] = {
            "accuracy": spread([entry["accuracy"] for entry in entries]),
            "difference": spread(differences) | {"mean": round(statistics.mean(differences), 4)},
            "loss_difference": spread(losses) | {"mean": round(statistics.mean(losses), 4)},
            "runs": entries,
        }
        print(
            f"{name} {arm}: accuracy {statistics.mean(e['accuracy'] for e in entries):.2f}, against lossless "
            f"{statistics.mean(differences):+.2f} points ({min(differences):+.2f} to {max(differences):+.2f}, "
            f"{len(differences)} seeds), loss {statistics.mean(losses):+.4f}",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()
