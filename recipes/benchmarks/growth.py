"""Does the cost grow as it should: with rows, views, size of the images, and width of the model?

    python recipes/benchmarks/growth.py --json recipes/benchmarks/results/growth.json

From a small base, one of these is multiplied at a time: rows by 2, 4 and 8, views by 2, 4 and 8, the pixels of an image by 2 and 4, the
width by 2 and 4. Each case runs in a process of its own, in turns, ``--rounds`` times: it builds the cache of a ViT with random
weights, and trains two epochs from it. Nothing is kept in memory (``memory_gb=0``): up to that bound it grows with the rows. CPU
seconds of building and of an epoch (other work on the machine disturbs them little), bytes, and memory added to that of the base. Prints the exponent of each, the slope in logarithms from the base to the largest: 1 is
linear, and with the width matrices grow by its square.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accuracy_runs import collate, peak_memory
from PIL import Image
from record import save, spread
from transformers import TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_freezecache import CacheConfig, FreezeCacheTrainer, FreezeConfig
from hf_freezecache.data.image_transform import ImageTransform

PATCH, BLOCKS, SPLIT_POINT, CLASSES = 16, 4, 3, 10


@dataclass(frozen=True)
class Case:
    """What is built and trained."""

    rows: int = 512
    views: int = 1
    pixels: int = 112 * 112
    width: int = 192

    @property
    def side(self) -> int:
        return round(math.sqrt(self.pixels) / PATCH) * PATCH


#: Field -> factors of it.
GROWS = {"rows": (2, 4, 8), "views": (2, 4, 8), "pixels": (2, 4), "width": (2, 4)}
FIGURES = ("build_cpu_seconds", "epoch_cpu_seconds", "cache_bytes", "build_memory_bytes", "peak_memory_bytes")


def cases() -> dict[str, Case]:
    base = Case()
    grown = {
        f"{name} x{factor}": dataclasses.replace(base, **{name: factor * getattr(base, name)})
        for name, factors in GROWS.items()
        for factor in factors
    }
    return {"base": base, **grown}


def photos(case: Case) -> datasets.Dataset:
    """Return smooth noise in JPEG files, a quarter larger than the model's images."""
    generator, side = np.random.default_rng(0), case.side * 5 // 4
    images = [
        Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        for _ in range(64)
    ]
    encoded = datasets.Dataset.from_dict(
        {"image": images, "label": [row % CLASSES for row in range(64)]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(CLASSES)}),
    )
    return encoded.select([row % 64 for row in range(case.rows)]).flatten_indices()


class EpochTimes(TrainerCallback):  # type: ignore[misc]
    """Keeps the CPU seconds of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self.began)


def measure(case: Case) -> dict[str, float]:
    """Build and train in this process."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    set_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=case.width,
            intermediate_size=4 * case.width,
            num_attention_heads=case.width // 64,
            num_hidden_layers=BLOCKS,
            image_size=case.side,
            patch_size=PATCH,
            num_labels=CLASSES,
        )
    )
    looks: dict[str, Any] = {"size": case.side, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    times = EpochTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = FreezeCacheTrainer(
            model,
            TrainingArguments(
                f"{folder}/out",
                num_train_epochs=2,
                per_device_train_batch_size=32,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                disable_tqdm=True,
            ),
            data_collator=collate,
            train_dataset=photos(case),
            train_transform=ImageTransform(train=True, **looks),
            eval_transform=ImageTransform(train=False, **looks),
            freeze_config=FreezeConfig(schedule=f"0:{SPLIT_POINT}"),
            cache_config=CacheConfig(cache_dir=f"{folder}/caches", num_views=case.views, memory_gb=0),
            callbacks=[times],
        )
        began = time.process_time()
        cached = trainer.build_cache()
        built = time.process_time() - began
        build_memory = peak_memory()
        trainer.train()
        return {
            "build_cpu_seconds": built,
            "epoch_cpu_seconds": min(times.seconds),
            "cache_bytes": cached.reader.index.total_bytes,
            "build_memory_bytes": build_memory,
            "peak_memory_bytes": peak_memory(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=Case.rows, help="of the base")
    parser.add_argument("--json", type=Path, default=None, help="where to write the record")
    parser.add_argument("--measure", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(Case(**json.loads(arguments.measure)))))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases()}
    for _ in range(arguments.rounds):
        for name, case in cases().items():
            case = dataclasses.replace(case, rows=case.rows * arguments.rows // Case.rows)
            command = [sys.executable, __file__, "--measure", json.dumps(dataclasses.asdict(case))]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    results: dict[str, Any] = {
        name: {figure: spread([one[figure] for one in runs]) for figure in FIGURES} for name, runs in found.items()
    }
    base = {figure: results["base"][figure]["median"] for figure in FIGURES}
    exponents: dict[str, dict[str, float]] = {}
    for name, factors in GROWS.items():
        largest = results[f"{name} x{factors[-1]}"]
        exponents[name] = {
            figure: round(math.log(largest[figure]["median"] / base[figure], factors[-1]), 3) for figure in FIGURES
        }
        added = (largest["peak_memory_bytes"]["median"] - base["peak_memory_bytes"]) / 2**20
        print(
            f"{name} x{factors[-1]}: exponents of building {exponents[name]['build_cpu_seconds']:.2f}, an epoch "
            f"{exponents[name]['epoch_cpu_seconds']:.2f}, bytes {exponents[name]['cache_bytes']:.2f}; {added:+.0f} MiB of memory"
        )
    if arguments.json is not None:
        config = {"rounds": arguments.rounds, "base": dataclasses.asdict(Case(rows=arguments.rows)), "grows": GROWS}
        config |= {"blocks": BLOCKS, "split_point": SPLIT_POINT, "patch": PATCH}
        save(arguments.json, "growth", config, {"cases": results, "exponents": exponents})


if __name__ == "__main__":
    main()
