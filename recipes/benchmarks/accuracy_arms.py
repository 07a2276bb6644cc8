"""The arms of ``time_to_accuracy.py``: what one is called, what it costs, and how it is trained.

An arm is written as text without blanks, ``KIND/NAME=VALUE/...``, e.g. ``full/epochs=4/decay=0.75`` or
``ours/k=9/epochs=8/views=2/keep=0.5/decay=0.75``. Kinds:

* ``full``: plain ``Trainer``, all parameters.
* ``lora``: plain ``Trainer``, PEFT's LoRA of rank 16 on queries and values, and the classifier.
* ``live``: the frozen blocks run in every step; every epoch draws new views. With ``k=all`` it is a linear probe.
* ``naive``: what a user would write: hidden states of one view by ``datasets.map`` as Arrow floats, the rest under ``Trainer``.
* ``ours``: from a cache. With ``k=all`` it is a cached linear probe.
* ``auto``: ``FreezeConfig(schedule="auto")``.

``k=9`` is short for ``schedule=0:9``. ``decay`` is layer-wise: the head has a factor of 1, block ``i`` of ``N`` has
``decay ** (N - i)``, the embeddings have ``decay ** (N + 1)``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
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
from hf_freezecache.schedules import plan_stages

KINDS = ("full", "lora", "live", "naive", "ours", "auto")
#: A backward pass through a block counts as two forward passes: one for gradients of inputs, one for those of weights.
BACKWARD = 2
#: In place of a folder: scikit-learn's handwritten digits, far from what models are pretrained on; three folds.
DIGITS = "digits"
MIN_CROP, WEIGHT_DECAY, WARMUP = 0.35, 0.05, 0.05
RECIPE = f"AdamW, weight decay {WEIGHT_DECAY}, cosine, warm-up {WARMUP}, random resized crop from {MIN_CROP}, flip"


@dataclass(frozen=True)
class Arm:
    """What is compared. The fields are the names of its text."""

    kind: str
    schedule: str = "0:0"
    epochs: float = 1.0
    views: int = 1
    keep: float = 1.0
    decay: float = 1.0
    scale: str = ""
    budget: float = 0.0
    codec: str = "lossless"

    @classmethod
    def parse(cls, text: str) -> Arm:
        kind, *settings = text.split("/")
        if kind not in KINDS:
            raise SystemExit(f"{text}: {kind!r} is no kind of arm. Choose one of: {', '.join(KINDS)}.")
        defaults = {one.name: one.default for one in dataclasses.fields(cls)}
        found: dict[str, Any] = {}
        for setting in settings:
            name, equals, value = setting.partition("=")
            if name == "k":
                name, value = "schedule", f"0:{value}"
            if not equals or name not in defaults or name == "kind":
                raise SystemExit(f"{text}: {setting!r} is no NAME=VALUE with k or one of {', '.join(defaults)}.")
            found[name] = type(defaults[name])(value)
        if kind in ("naive", "live", "ours") and "schedule" not in found:
            raise SystemExit(f"{text}: say how many blocks are frozen, k=9 or schedule=0:6,4:9.")
        return cls(kind, **found)

    @property
    def name(self) -> str:
        """The text that gives this arm, in one form only."""
        parts = [self.kind]
        for one in dataclasses.fields(self)[1:]:
            value = getattr(self, one.name)
            if one.name == "epochs" or value != one.default:
                single = one.name == "schedule" and re.fullmatch(r"0:(\w+)", value)
                text = f"{value:g}" if isinstance(value, float) else value
                parts.append(f"k={single[1]}" if single else f"{one.name}={text}")
        return "/".join(parts)

    def stages(self, num_blocks: int) -> list[tuple[int, float, int]]:
        """Return (start epoch, epochs, split point) of each stage, epochs before the first one included."""
        if self.kind in ("full", "lora", "auto"):
            return [(0, self.epochs, 0)]
        pairs = plan_stages(self.schedule.replace("all", str(num_blocks)), math.ceil(self.epochs), num_blocks)
        points = [(stage.start_epoch, stage.split_point) for stage in pairs if stage.start_epoch < self.epochs]
        points = [(0, 0), *points] if not points or points[0][0] > 0 else points
        ends = [*(start for start, _ in points[1:]), self.epochs]
        return [(start, end - start, point) for (start, point), end in zip(points, ends, strict=True)]

    @property
    def tuned(self) -> bool:
        """Whether its learning rate is chosen by a grid of its own; else it is that of full fine-tuning."""
        return self.kind != "auto" and not self.scale

    @property
    def several_caches(self) -> bool:
        return self.kind == "auto" or (self.kind == "ours" and "," in self.schedule)

    def lacks(self) -> str | None:
        """Return the setting of ``FreezeConfig`` that the arm needs and the installed package does not have."""
        known = {one.name for one in dataclasses.fields(FreezeConfig)}
        wanted = [("token_keep", self.keep != 1), ("lr_scale", bool(self.scale)), ("budget", bool(self.budget))]
        for name, needed in wanted:
            if needed and name not in known:
                return name
        if self.kind == "auto":
            try:
                FreezeConfig(schedule="auto")
            except ValueError:
                return "schedule='auto'"
        return None


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


# ---- Costs ----


def kept_share(keep: float, patches: int, prefix_tokens: int = 1) -> float:
    """Return the share of all tokens that a training step sees behind the split."""
    return (prefix_tokens + round(keep * patches)) / (prefix_tokens + patches)


@dataclass
class Passes:
    """Passes through blocks, per image."""

    built: float = 0.0
    trained: float = 0.0

    def epochs(self, num_blocks: int) -> dict[str, float]:
        """Return the cost in epochs of full fine-tuning."""
        unit = (1 + BACKWARD) * num_blocks
        build, train = self.built / unit, self.trained / unit
        return {"cost": round(build + train, 4), "cost_build": round(build, 4), "cost_train": round(train, 4)}


def count_passes(arm: Arm, num_blocks: int, patches: int, stages: Sequence[Mapping[str, Any]] | None = None) -> Passes:
    """Count the passes through blocks of a whole run, its builds in full, as if there had been no cache before.

    Args:
        arm: The arm.
        num_blocks: Blocks of the model.
        patches: Patch tokens of an image.
        stages: What stages did, of ``ours`` and ``auto``: ``epochs``, ``split_point``, ``cached``, ``views``, ``keep``;
            default: what is planned.
    """
    if arm.kind == "lora":
        # No gradients of the blocks' own weights; the small matrices beside them are left out, in favour of the arm.
        return Passes(trained=2 * num_blocks * arm.epochs)
    if stages is None:
        cached = arm.kind in ("ours", "naive")
        views = 1 if arm.kind == "naive" else arm.views
        stages = [
            {"epochs": epochs, "split_point": point, "cached": cached and point > 0, "views": views, "keep": arm.keep}
            for _, epochs, point in arm.stages(num_blocks)
        ]
    passes, states_at = Passes(), 0
    for stage in stages:
        point = stage["split_point"]
        share = kept_share(stage["keep"], patches) if point else 1.0
        passes.trained += (1 + BACKWARD) * (num_blocks - point) * stage["epochs"] * share
        if stage["cached"]:
            passes.built += stage["views"] * (point - states_at)
            states_at = point  # the next cache is computed from this one
        else:
            passes.trained += point * stage["epochs"]
            states_at = 0
    return passes


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
            from hf_freezecache.cli.demo import load_digit_images

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


def with_lora(model: nn.Module) -> nn.Module:
    """Wrap the model as PEFT's recipe for image classification does."""
    from peft import LoraConfig, get_peft_model

    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = next(pair for pair in (("q_proj", "v_proj"), ("query", "value")) if set(pair) <= names)
    config = LoraConfig(
        r=16, lora_alpha=16, lora_dropout=0.1, bias="none", target_modules=list(targets), modules_to_save=["classifier"]
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
    details: dict[str, Any] = field(default_factory=dict)


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
        images = self.arm.epochs * len(self.train_rows)
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
            **found.details,
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
        options, by_package = freeze_options(arm, self.num_blocks)
        trainer = FreezeCacheTrainer(
            self.model,
            args,
            data_collator=collate,
            train_dataset=self.train_rows,
            train_transform=self.augment,
            eval_transform=self.plain,
            optimizers=(None, None) if by_package else self.optimizers(self.model, args),
            freeze_config=FreezeConfig(**options),
            cache_config=CacheConfig(
                cache_dir=caches,
                mode="never" if live else "always",
                num_views=0 if live else arm.views,
                codec=arm.codec,
                lock_timeout=3600.0,  # another run may be building the same cache
            ),
        )
        trainer.train()
        record = trainer._record
        stages, decisions = [], sorted(record.decisions, key=lambda one: one.stage)
        ends = [*(one.start_epoch for one in decisions[1:]), arm.epochs]
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
                    "keep": getattr(one, "token_keep", None) or arm.keep,
                    "cache": one.cache,
                    "built_from": one.built_from,
                    "bits": one.bits_per_element,
                }
            )
        return Found(
            self.model,
            build_seconds=sum(one.build_seconds for one in decisions),
            train_seconds=sum(epoch.seconds for epoch in record.epochs),
            cache_bytes=sum(one.cache_bytes for one in decisions),
            stages=stages,
            details={"decay_by": "FreezeConfig" if by_package else "optimizer"},
        )


def freeze_options(arm: Arm, num_blocks: int) -> tuple[dict[str, Any], bool]:
    """Return the settings of ``FreezeConfig``, and whether these give the layer-wise decay.

    The decay is an optimizer's of our own where the installed package has no such setting.
    """
    known = {one.name for one in dataclasses.fields(FreezeConfig)}
    schedule = "auto" if arm.kind == "auto" else arm.schedule.replace("all", str(num_blocks))
    options: dict[str, Any] = {"schedule": schedule}
    if arm.keep != 1:
        options["token_keep"] = arm.keep
    if arm.scale:
        options["lr_scale"] = arm.scale
    if arm.budget:
        options["budget"] = arm.budget
    by_package = arm.decay != 1 and "layer_decay" in known
    if by_package:
        options["layer_decay"] = arm.decay
    return options, by_package


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


# ---- Which arms ----


def _arms(pattern: str, **values: Sequence[Any]) -> list[str]:
    """``_arms("full/epochs={e}", e=(1, 2))`` -> one text for each combination."""
    return [pattern.format(**dict(zip(values, row, strict=True))) for row in itertools.product(*values.values())]


DECAY = "decay=0.75"
#: Names for several arms; in each the cheap ones come first.
GROUPS: dict[str, list[str]] = {
    "start": [
        f"ours/k=11/epochs=6/views=1/{DECAY}",
        f"full/epochs=1/{DECAY}",
        f"full/epochs=2/{DECAY}",
        f"ours/k=6/epochs=4/views=2/{DECAY}",
        f"ours/k=9/epochs=8/views=2/{DECAY}",
        f"full/epochs=4/{DECAY}",
        f"full/epochs=8/{DECAY}",
    ],
    "coarse": [
        f"ours/k=11/epochs=6/views=1/{DECAY}",
        f"full/epochs=1/{DECAY}",
        f"ours/k=9/epochs=8/views=2/keep=0.5/{DECAY}",
        f"full/epochs=2/{DECAY}",
        f"ours/k=6/epochs=4/views=2/{DECAY}",
        f"full/epochs=4/{DECAY}",
        f"full/epochs=8/{DECAY}",
    ],
    "full": _arms("full/epochs={e}/" + DECAY, e=(0.5, 1, 2, 3, 4, 8, 16, 30)),
    "plain": _arms("full/epochs={e}", e=(1, 2, 3, 4, 8, 16, 30)),
    "lora": _arms("lora/epochs={e}", e=(1, 2, 4, 8, 16)),
    "live": _arms("live/k={k}/epochs={e}/" + DECAY, k=(11, 9, 6), e=(2, 4, 8)),
    "probe": [
        *_arms("ours/k=all/epochs={e}/views={v}", e=(8, 30), v=(1, 2)),
        *_arms("live/k=all/epochs={e}", e=(2, 4, 8, 16)),
    ],
    "naive": [f"naive/k=11/epochs=6/{DECAY}", f"naive/k=9/epochs=8/{DECAY}", f"naive/k=6/epochs=4/{DECAY}"],
    "ours": [
        f"ours/k=11/epochs=3/views=1/{DECAY}",
        f"ours/k=11/epochs=6/views=1/{DECAY}",
        f"ours/k=11/epochs=8/views=2/{DECAY}",
        f"ours/k=9/epochs=4/views=1/keep=0.5/{DECAY}",
        f"ours/k=9/epochs=8/views=1/keep=0.5/{DECAY}",
        f"ours/k=9/epochs=8/views=2/keep=0.5/{DECAY}",
        f"ours/k=6/epochs=6/views=2/keep=0.5/{DECAY}",
        f"ours/k=6/epochs=4/views=2/{DECAY}",
        f"ours/k=6/epochs=8/views=2/keep=0.5/{DECAY}",
        f"ours/schedule=0:6,4:9/epochs=10/views=2/keep=0.5/{DECAY}",
        f"ours/schedule=0:6,6:9/epochs=16/views=4/keep=0.5/{DECAY}",
        f"ours/k=6/epochs=16/views=4/keep=0.5/{DECAY}",
        f"ours/k=3/epochs=8/views=4/keep=0.5/{DECAY}",
        f"ours/k=6/epochs=16/views=8/{DECAY}",
    ],
    "auto": [*_arms("auto/epochs=8/budget={b}", b=(0.1, 0.2, 0.33, 0.5)), *_arms("auto/epochs={e}", e=(4, 8, 16))],
    # ---- One lever at a time ----
    "keep": [
        *_arms("ours/k=9/epochs=8/views=2/keep={s}/" + DECAY, s=(0.25, 0.5, 0.75, 1)),
        *_arms("ours/k=6/epochs=8/views=2/keep={s}/" + DECAY, s=(0.25, 0.5, 0.75, 1)),
    ],
    "decay": [
        *_arms("ours/k=9/epochs=8/views=2/keep=0.5/decay={d}", d=(0.75, 0.9, 1)),
        *_arms("ours/k=6/epochs=4/views=2/decay={d}", d=(0.75, 0.9, 1)),
    ],
    "scale": [
        *_arms("ours/k={k}/epochs={e}/views=2/keep=0.5/decay=0.75/scale=auto", k=(9, 6), e=(4, 8)),
        *_arms("ours/k={k}/epochs={e}/views=2/keep=0.5/decay=0.75/scale=1", k=(9, 6), e=(4, 8)),
    ],
    "views": [
        *_arms("ours/k=11/epochs=6/views={v}/" + DECAY, v=(1, 2, 4)),
        *_arms("ours/k=9/epochs=8/views={v}/keep=0.5/" + DECAY, v=(1, 2, 4, 8)),
        *_arms("ours/k=6/epochs=8/views={v}/keep=0.5/" + DECAY, v=(1, 2, 4, 8)),
    ],
    "lossy": _arms("ours/k=9/epochs=8/views=2/keep=0.5/decay=0.75/codec={c}", c=("lossless", "auto")),
    "long": [
        f"ours/k=6/epochs=30/views=4/keep=0.5/{DECAY}",
        f"ours/schedule=0:6,10:9/epochs=30/views=4/keep=0.5/{DECAY}",
        f"ours/k=3/epochs=16/views=4/keep=0.5/{DECAY}",
        f"full/epochs=16/{DECAY}",
        f"full/epochs=30/{DECAY}",
    ],
}
GROUPS["all"] = list(dict.fromkeys(arm for group in list(GROUPS.values())[1:] for arm in group))


def chosen_arms(names: Sequence[str]) -> list[Arm]:
    """Return the arms of groups and of texts, in order, each once."""
    texts = [text for name in names for text in GROUPS.get(name, [name])]
    return list(dict.fromkeys(Arm.parse(text) for text in texts))


# ---- Learning rates ----

#: Of all arms: this times powers of two.
BASE_RATE = 3e-4
#: Values in the grid at first, and at most.
GRID = (4, 8)


def rate(power: int) -> float:
    return float(f"{BASE_RATE * 2.0**power:.4g}")


def first_power(arm: Arm) -> int:
    """Return where the grid of an arm begins; it grows where the best rate lies on its edge."""
    if arm.kind == "full":
        return -2 if arm.decay == 1 else 0
    if arm.kind == "lora":
        return 1
    if arm.schedule.endswith(":all"):
        return 3
    return 1 if arm.decay != 1 else 0


def rates_to_try(arm: Arm, scores: Mapping[float, tuple[float, float]], grid: tuple[int, int] = GRID) -> list[float]:
    """Return the learning rates that are still to be tried: those of the grid, then beyond the edge, while the best lies there.

    Args:
        arm: The arm.
        scores: Of each rate that was tried: accuracy, and the negative loss, which decides between equals.
        grid: Values at first, and at most.
    """
    first = first_power(arm)
    powers = list(range(first, first + grid[0]))
    if missing := [rate(power) for power in powers if rate(power) not in scores]:
        return missing
    while rate(powers[0] - 1) in scores:
        powers.insert(0, powers[0] - 1)
    while rate(powers[-1] + 1) in scores:
        powers.append(powers[-1] + 1)
    best = max(scores, key=lambda one: scores[one])
    if len(powers) >= grid[1]:
        return []
    edges = {rate(powers[0]): rate(powers[0] - 1), rate(powers[-1]): rate(powers[-1] + 1)}
    return [edges[best]] if best in edges else []


def rate_source(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """Return the full fine-tuning whose learning rate an arm takes over, or ``None`` if the arm is tuned itself."""
    if arm.tuned:
        return None
    full = [
        one
        for one in arms
        if one.kind == "full" and one.decay == (1 if arm.decay == 1 and arm.kind != "auto" else 0.75)
    ]
    return min(full, key=lambda one: abs(math.log(one.epochs / arm.epochs)), default=None)
