"""One run of one arm of ``time_to_accuracy.py``: its rows, its model, its training, and what is measured."""

from __future__ import annotations

import gc
import math
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accuracy_arms import Arm, count_passes
from codec_accuracy import accuracy, resized
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_freezecache import CacheConfig, FreezeCacheTrainer, FreezeConfig, split_model
from hf_freezecache.data.image_transform import ImageTransform
from hf_freezecache.model.freeze import freeze

#: In place of a folder: scikit-learn's handwritten digits, far from what models are pretrained on; three folds.
DIGITS = "digits"
MIN_CROP, WEIGHT_DECAY, WARMUP = 0.35, 0.05, 0.05
RECIPE = f"AdamW, weight decay {WEIGHT_DECAY}, cosine, warm-up {WARMUP}, random resized crop from {MIN_CROP}, flip"


@dataclass(frozen=True)
class Task:
    """Model, data and recipe that all arms share."""

    model: str
    data: str
    size: int
    folds: int = 0
    train: int = 0
    scratch: bool = False
    batch_size: int = 32
    bf16: bool = False
    workers: int = 0
    threads: int = 1
    caches: str = "caches"


# ---- Data ----


def by_class(labels: Sequence[int], seed: int) -> np.ndarray:
    """Return row numbers class by class, within a class in an order drawn by the seed."""
    order = np.random.default_rng(seed).permutation(len(labels))
    return order[np.argsort(np.asarray(labels)[order], kind="stable")]


def strata(labels: Sequence[int], parts: int, seed: int = 0) -> np.ndarray:
    """Divide rows into so many parts, each class evenly; return the part of each row."""
    part = np.empty(len(labels), int)
    part[by_class(labels, seed)] = np.arange(len(labels)) % parts
    return part


def load_rows(task: Task, seed: int, tuning: bool) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return the rows to train on and the rows to measure on.

    With folds, rows of all splits are pooled, and fold ``seed % folds`` is the test part. For tuning, the training rows
    are divided once more: a quarter, each class evenly, takes the place of the test part, which is not looked at.
    """
    folder = Path(task.data)
    if task.folds or task.data == DIGITS:
        if task.data == DIGITS:
            from hf_freezecache.cli.digits import load_digit_images

            rows = load_digit_images(task.size)
            rows = rows.cast_column("label", datasets.ClassLabel(names=[str(digit) for digit in range(10)]))
        else:
            files = sorted(folder.glob("*.parquet"))
            rows = datasets.concatenate_datasets([datasets.Dataset.from_parquet(str(file)) for file in files])
        folds = task.folds or 3
        fold = strata(rows["label"], folds)
        train = rows.select(np.flatnonzero(fold != seed % folds))
        test = rows.select(np.flatnonzero(fold == seed % folds))
    else:
        train, test = (datasets.Dataset.from_parquet(str(folder / f"{name}.parquet")) for name in ("train", "test"))
    if task.train and task.train < len(train):
        evenly = np.linspace(0, len(train) - 1, task.train).astype(int)
        train = train.select(np.sort(by_class(train["label"], 2)[evenly]))
    if tuning:
        quarter = strata(train["label"], 4, seed=1)
        train, test = (
            train.select(np.flatnonzero(quarter != seed % 4)),
            train.select(np.flatnonzero(quarter == seed % 4)),
        )
    return train, test


# ---- Models and optimizers ----


def make_model(task: Task, num_labels: int) -> nn.Module:
    """Return the model with a new head, an ordinary one at the task's size; with ``scratch``, with random weights."""
    if not task.scratch:
        return resized(task.model, num_labels, task.size)
    config = AutoConfig.from_pretrained(task.model)
    config.image_size, config.num_labels = task.size, num_labels
    return AutoModelForImageClassification.from_config(config)


def distance_to_head(name: str, num_blocks: int) -> int:
    """Return how many factors of layer-wise decay a parameter gets: 0 for norm and head."""
    if match := re.search(r"\.(?:layers?|blocks?|h)\.(\d+)\.", name):
        return num_blocks - int(match[1])
    return num_blocks + 1 if "embedding" in name else 0


def decayed_optimizer(model: nn.Module, lr: float, decay: float, num_blocks: int) -> torch.optim.Optimizer:
    """Return AdamW with a learning rate for each block; vectors (biases, norms) get no weight decay."""
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((distance_to_head(name, num_blocks), parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr * decay**distance, "weight_decay": WEIGHT_DECAY if matrix else 0.0}
            for (distance, matrix), parameters in sorted(groups.items(), key=lambda item: item[0])
        ],
        lr=lr,
    )


#: Of LoRA, where an arm does not say.
RANK = 16


def with_lora(model: nn.Module, rank: int = RANK) -> nn.Module:
    """Wrap the model as PEFT's recipe for image classification does."""
    from peft import LoraConfig, get_peft_model

    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = next(pair for pair in (("q_proj", "v_proj"), ("query", "value")) if set(pair) <= names)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.1,
        bias="none",
        target_modules=list(targets),
        modules_to_save=["classifier"],
    )
    return get_peft_model(model, config)


class Suffix(nn.Module):
    """The part of a model behind the split, for a ``Trainer`` that is fed with hidden states."""

    def __init__(self, model: nn.Module, split: Any) -> None:
        super().__init__()
        self.model = model
        self.split = split

    def forward(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.split.suffix(hidden_states, labels)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


# ---- Runs ----


@dataclass
class Found:
    """What a run gives before it is evaluated; seconds are wall-clock."""

    model: nn.Module
    build_seconds: float = 0.0
    train_seconds: float = 0.0
    cache_bytes: int = 0
    stages: list[dict[str, Any]] | None = None
    epochs: float | None = None


class Runner:
    """One run of one arm."""

    def __init__(self, task: Task, arm: Arm, lr: float, seed: int, tuning: bool) -> None:
        self.task, self.arm, self.lr, self.seed = task, arm, lr, seed
        self.train_rows, self.test_rows = load_rows(task, seed, tuning)
        looks: dict[str, Any] = {"size": task.size}
        if (Path(task.model) / "preprocessor_config.json").exists() or not Path(task.model).exists():
            processor = AutoImageProcessor.from_pretrained(task.model)
            looks |= {"mean": processor.image_mean, "std": processor.image_std, "resample": int(processor.resample)}
        self.augment = ImageTransform(train=True, scale=(MIN_CROP, 1.0), **looks)
        self.plain = ImageTransform(train=False, **looks)
        set_seed(seed)  # of the new head
        self.model = make_model(task, len(self.train_rows.features["label"].names))
        self.num_blocks = int(self.model.config.num_hidden_layers)
        self.patches = (task.size // self.model.config.patch_size) ** 2

    def arguments(self, folder: str) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(Path(folder) / "out"),
            num_train_epochs=self.arm.epochs,
            per_device_train_batch_size=self.task.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=self.lr,
            weight_decay=WEIGHT_DECAY,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP,
            bf16=self.task.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=self.seed,
            dataloader_num_workers=self.task.workers,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            label_names=["labels"],
            disable_tqdm=True,
        )

    def optimizers(self, model: nn.Module, args: TrainingArguments) -> tuple[Any, None]:
        if self.arm.decay == 1:
            return None, None
        return decayed_optimizer(model.to(args.device), self.lr, self.arm.decay, self.num_blocks), None

    def run(self, folder: str, caches: str) -> dict[str, Any]:
        """Train, then evaluate; ``folder`` is for what is thrown away, ``caches`` for caches."""
        args = self.arguments(folder)
        if torch.cuda.is_available():  # earlier runs of this process are no part of the peak
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began, cpu = time.perf_counter(), time.process_time()
        kind = self.arm.kind
        if kind in ("full", "lora"):
            found = self.train_plain(args)
        elif kind == "naive":
            found = self.train_naive(args, folder)
        else:
            found = self.train_ours(args, caches)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        peak = peak_memory()
        passes = count_passes(self.arm, self.num_blocks, self.patches, found.stages)
        images = (found.epochs or self.arm.epochs) * len(self.train_rows)
        # Evaluation is apart from all figures above.
        judge = Trainer(
            found.model,
            args,
            data_collator=collate,
            eval_dataset=self.test_rows.with_transform(self.plain),
            compute_metrics=accuracy,
        )
        scores = judge.evaluate()
        return {
            "accuracy": round(100 * scores["eval_accuracy"], 4),
            "loss": round(scores["eval_loss"], 5),
            **passes.epochs(self.num_blocks),
            "seconds": round(seconds, 2),
            "start_seconds": round(seconds - found.build_seconds - found.train_seconds, 2),
            "build_seconds": round(found.build_seconds, 2),
            "train_seconds": round(found.train_seconds, 2),
            "cpu_seconds": round(cpu, 2),
            "images_per_second": round(images / found.train_seconds, 2),
            "peak_memory_bytes": peak,
            "cache_bytes": found.cache_bytes,
            "train_images": len(self.train_rows),
            "test_images": len(self.test_rows),
            "stages": found.stages,
        }

    def train_plain(self, args: TrainingArguments) -> Found:
        model = with_lora(self.model) if self.arm.kind == "lora" else self.model
        trainer = Trainer(
            model,
            args,
            data_collator=collate,
            train_dataset=self.train_rows.with_transform(self.augment),
            optimizers=self.optimizers(model, args),
        )
        began = time.perf_counter()
        trainer.train()
        return Found(model, train_seconds=time.perf_counter() - began)

    def train_naive(self, args: TrainingArguments, folder: str) -> Found:
        """Write the hidden states of one view as lists of floats, then train the rest of the model on them."""
        began = time.perf_counter()
        point = self.arm.stages(self.num_blocks)[0][2]
        model = self.model.to(args.device).eval()
        split = split_model(model, point)
        freeze(split)

        def states(rows: dict[str, list[Any]]) -> dict[str, Any]:
            rendered = self.plain(rows)
            with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                found = split.prefix(torch.stack(rendered["pixel_values"]).to(args.device))
            return {"hidden_states": found.float().cpu().numpy(), "labels": rendered["labels"]}

        shape = states(self.train_rows[:1])["hidden_states"].shape[1:]
        features = datasets.Features(
            {"hidden_states": datasets.Array2D(shape, "float32"), "labels": datasets.Value("int64")}
        )
        file = Path(folder) / "states.arrow"
        cached = self.train_rows.map(
            states,
            batched=True,
            batch_size=args.per_device_train_batch_size,
            remove_columns=self.train_rows.column_names,
            features=features,
            cache_file_name=str(file),
        ).with_format("torch")
        suffix = Suffix(model, split)
        trainer = Trainer(suffix, args, train_dataset=cached, optimizers=self.optimizers(suffix, args))
        built = time.perf_counter()
        trainer.train()
        return Found(model, built - began, time.perf_counter() - built, cache_bytes=file.stat().st_size)

    def train_ours(self, args: TrainingArguments, caches: str) -> Found:
        arm = self.arm
        live = arm.kind == "live"
        automatic = arm.kind == "auto"
        # One view is what ``auto`` is free to replace.
        settings: dict[str, Any] = {"num_views": 0 if live else arm.views}
        if automatic and arm.views == 1:
            del settings["num_views"]
        model = with_lora(self.model, arm.rank) if arm.rank else self.model
        trainer = FreezeCacheTrainer(
            model,
            args,
            data_collator=collate,
            train_dataset=self.train_rows,
            train_transform=self.augment,
            eval_transform=self.plain,
            freeze_config=FreezeConfig(
                schedule="auto" if automatic else arm.schedule.replace("all", str(self.num_blocks)),
                budget=arm.budget or None,
                layer_decay=None if arm.decay == 1 else arm.decay,
                lr_scale=arm.scale or (None if arm.head == 1 else f"{self.num_blocks}:{arm.head:g}"),
                token_keep=None if arm.keep == 1 else arm.keep,
                unfrozen_token_keep=None if arm.unfrozen == 1 else arm.unfrozen,
                plain_epochs=arm.plain or None,
                block_weights=arm.weights or None,
                head_rows=None if arm.rows == 1 else arm.rows,
            ),
            cache_config=CacheConfig(
                cache_dir=caches,
                mode="never" if live else "always",
                codec=arm.codec,
                lock_timeout=3600.0,  # another run may be building the same cache
                **settings,
            ),
        )
        trainer.train()
        record = trainer._record
        stages, decisions = [], sorted(record.decisions, key=lambda one: one.stage)
        # `auto` may have chosen the epochs. The last may be a part of one, of whole steps, all but the last of as many images.
        rows, batch_size = len(self.train_rows), self.task.batch_size
        whole, steps = divmod(trainer.state.global_step, math.ceil(rows / batch_size))
        seen = whole + steps * batch_size / rows
        ends = [*(one.start_epoch for one in decisions[1:]), seen]
        if decisions and decisions[0].start_epoch > 0:
            stages.append(
                {"epochs": decisions[0].start_epoch, "split_point": 0, "cached": False, "views": 0, "keep": 1.0}
            )
        for one, end in zip(decisions, ends, strict=True):
            stages.append(
                {
                    "epochs": end - one.start_epoch,
                    "split_point": one.split_point,
                    "cached": one.trained_from == "cache",
                    "views": one.num_views,
                    "keep": one.token_keep,
                    "trained": one.trained_share,
                    "rows": round(one.cache_bytes / one.cache_bytes_per_image / rows, 4) if one.cache_bytes else 1.0,
                    "cache": one.cache,
                    "built_from": one.built_from,
                    "bits": one.bits_per_element,
                }
            )
        return Found(
            model,
            build_seconds=sum(one.build_seconds for one in decisions),
            train_seconds=sum(epoch.seconds for epoch in record.epochs),
            cache_bytes=sum(one.cache_bytes for one in decisions),
            stages=stages,
            epochs=seen,
        )


def peak_memory() -> int:
    """Return the peak memory of the accelerator, or of this process."""
    from epoch_cost import peak_resident_bytes

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_bytes()


def run_arm(task: Task, arm: Arm, lr: float, seed: int, tuning: bool, caches: str | None = None) -> dict[str, Any]:
    """Run an arm in this process.

    Args:
        task: Model, data and recipe.
        arm: The arm.
        lr: Learning rate.
        seed: Seed of the head, of the order and of the division of the rows.
        tuning: Whether to measure on a part of the training rows.
        caches: Folder of caches in place of the task's, which all runs share.
    """
    datasets.disable_progress_bars()
    torch.set_num_threads(task.threads)
    with tempfile.TemporaryDirectory() as folder:
        # Caches behind trained blocks are of no use to another run.
        own = str(Path(folder) / "caches") if arm.several_caches else task.caches
        return Runner(task, arm, lr, seed, tuning).run(folder, caches or own)
