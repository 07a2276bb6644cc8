"""Whether ``mode="auto"`` takes no longer than the better of ``always`` and ``never``, and what it predicted.

    python recipes/benchmarks/deciding.py --model DIR --data DIR --json FILE

Each case is trained in each mode in each round, in turn, with a folder of caches of its own, but for ``there``, whose cache is built
before. Nothing is remembered from one run to the next: all check data and code. Seconds are those of ``train()``. ``predicted`` is what
the decision holds, over what the same way of training took, without what comes before the first stage. The record is written after
each case. Cases take some 2 to 30 seconds: what measuring takes should be a small part of them, as in runs that are worth a decision.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accuracy_runs import collate
from codec_accuracy import resized
from record import save, spread
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, TrainingArguments

from hf_freezecache import CacheConfig, FreezeCacheTrainer, FreezeConfig
from hf_freezecache.data.image_transform import ImageTransform
from hf_freezecache.training.remembered import forget_all

MODES = ("always", "never", "auto")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        split_point: Frozen blocks.
        epochs: Epochs.
        views: Stored views.
        rows: Training images.
        sleep: Seconds that the transform waits for each image, as one that fetches it would.
        codec: How states are stored.
        blocks: Blocks of a small model with random weights, in place of the pretrained one.
        evaluate: Whether each epoch is evaluated.
        there: Whether the cache is there.
        side: Pixels of a side that images are enlarged to, as photographs are; 0 leaves them as they are.
    """

    split_point: int = 9
    epochs: int = 6
    views: int = 1
    rows: int = 384
    sleep: float = 0.0
    codec: str = "lossless"
    blocks: int = 0
    evaluate: bool = False
    there: bool = False
    side: int = 0


CASES = {
    "many epochs": Case(epochs=8, views=2),
    "one epoch": Case(epochs=1),
    "one epoch, four views": Case(epochs=1, views=4),
    "as many views as epochs": Case(epochs=3, views=3),
    "as many views as epochs, large images": Case(epochs=3, views=3, rows=192, side=1024),
    "k=1": Case(split_point=1, epochs=3, views=2),
    "slow images, few epochs": Case(split_point=1, epochs=3, rows=96, sleep=0.05),
    "slow images, many views": Case(epochs=2, views=4, rows=96, sleep=0.05),
    "tiny encoder": Case(split_point=2, epochs=4, views=4, rows=2048, blocks=4),
    "few rows": Case(epochs=48, rows=32),
    "calibration": Case(epochs=2, codec="auto"),
    "frequent evaluation": Case(epochs=4, evaluate=True),
    "the cache is there": Case(epochs=1, views=2, there=True),
}


class Waiting:
    """A transform that waits for each image first."""

    def __init__(self, transform: Any, seconds: float) -> None:
        self.transform, self.seconds = transform, seconds

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self.seconds * len(batch["image"]))
        return self.transform(batch)  # type: ignore[no-any-return]


def enlarged(rows: datasets.Dataset, side: int) -> datasets.Dataset:
    """Return rows whose images are JPEG files of ``side * side`` pixels."""

    def encoded(image: Any) -> dict[str, Any]:
        file = io.BytesIO()
        image.convert("RGB").resize((side, side)).save(file, "JPEG", quality=90)
        return {"bytes": file.getvalue(), "path": None}

    columns = {"image": [encoded(image) for image in rows["image"]], "label": list(rows["label"])}
    return datasets.Dataset.from_dict(columns, features=rows.features)


def make_model(args: argparse.Namespace, case: Case, num_labels: int) -> Any:
    """Return the pretrained model with a new head, or a small one with random weights."""
    torch.manual_seed(0)
    if not case.blocks:
        return resized(args.model, num_labels, args.size)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": case.blocks}
    config = AutoConfig.for_model("vit", image_size=args.size, patch_size=16, num_labels=num_labels, **sizes)
    return AutoModelForImageClassification.from_config(config)


def train(args: argparse.Namespace, case: Case, mode: str, rows: datasets.Dataset, folder: Path) -> dict[str, Any]:
    """Train a case in a mode; return its seconds, and what its decision says."""
    processor = AutoImageProcessor.from_pretrained(args.model)
    looks = {"size": args.size, "mean": processor.image_mean, "std": processor.image_std}
    transform = Waiting(ImageTransform(train=True, scale=(0.35, 1.0), **looks), case.sleep)
    trainer = FreezeCacheTrainer(
        model=make_model(args, case, len(rows.features["label"].names)),
        args=TrainingArguments(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=32,
            num_train_epochs=case.epochs,
            eval_strategy="epoch" if case.evaluate else "no",
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        train_dataset=rows.select(np.arange(case.rows) % len(rows)).with_transform(transform),
        eval_dataset=rows.select(range(64)).with_transform(ImageTransform(train=False, **looks)),
        data_collator=collate,
        freeze_config=FreezeConfig(schedule=f"0:{case.split_point}"),
        cache_config=CacheConfig(cache_dir=str(folder / "caches"), mode=mode, num_views=case.views, codec=case.codec),
    )
    forget_all()
    started = time.perf_counter()
    trainer.train()
    seconds, decision = time.perf_counter() - started, trainer._record.decisions[0]
    outcome = decision.build_seconds + sum(epoch.seconds for epoch in trainer._record.epochs)
    return {"seconds": seconds, "cache": decision.cache, "predicted": decision.predicted, "outcome": outcome}


def compare(args: argparse.Namespace, case: Case, rows: datasets.Dataset) -> dict[str, Any]:
    """Train a case in all modes; return seconds, what was decided, and predictions over outcomes."""
    if case.side:
        rows = enlarged(rows.select(range(case.rows)), case.side)
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    ready = Path(tempfile.mkdtemp())
    try:
        if case.there:
            train(args, case, "always", rows, ready)
        for turn in range(args.rounds):
            for mode in MODES[turn % 3 :] + MODES[: turn % 3]:
                folder = Path(tempfile.mkdtemp())
                if case.there:
                    shutil.copytree(ready / "caches", folder / "caches")
                runs[mode].append(train(args, case, mode, rows, folder))
                shutil.rmtree(folder)
    finally:
        shutil.rmtree(ready)
    result: dict[str, Any] = {f"{mode}_seconds": spread([run["seconds"] for run in runs[mode]]) for mode in MODES}
    # Of medians: the better of two runs of each round would be better than either way of training.
    always, never, auto = (result[f"{mode}_seconds"]["median"] for mode in MODES)
    result["auto_over_better"] = round(auto / min(always, never), 4)
    result["decided"] = [run["cache"] for run in runs["auto"]]
    for name, mode in (("cached", "always"), ("live", "never")):
        over = [
            a["predicted"][f"{name}_seconds"] / b["outcome"]
            for a, b in zip(runs["auto"], runs[mode], strict=True)
            if f"{name}_seconds" in a["predicted"]
        ]
        result[f"{name}_predicted_over_outcome"] = spread(over) if over else None
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a pretrained ViT with an image processor")
    parser.add_argument("--data", required=True, help="folder with train.parquet of columns image and label")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_parquet(str(Path(args.data) / "train.parquet"))
    config = {name: str(value) for name, value in vars(args).items() if name not in ("json", "cases")}
    config |= {"model": Path(args.model).name, "data": Path(args.data).name, "threads": str(torch.get_num_threads())}
    results: dict[str, dict[str, Any]] = {}
    for name in args.cases:
        result = results[name] = compare(args, CASES[name], rows)
        seconds = ", ".join(f"{mode} {result[f'{mode}_seconds']['median']:.1f} s" for mode in MODES)
        print(
            f"{name}: {seconds}; auto takes {result['auto_over_better']:.3f} of the better, decided {result['decided']}, "
            f"predicted over outcome {[result[key] and result[key]['median'] for key in result if key.endswith('outcome')]}",
            flush=True,
        )
        done = {"cases": {name: dataclasses.asdict(CASES[name]) for name in results}}
        save(args.json, "deciding", config | done, results)


if __name__ == "__main__":
    main()
