"""The embedded demo: the whole method on real images in one to two and a half minutes, with no network.

A small ViT is trained from scratch on some of scikit-learn's handwritten digits, and then fine-tuned on the other
digits three ways: all of it; with a frozen prefix that runs live in every step; with the same prefix cached.

Sizes were chosen by the time they take, schedule and epochs for two and a half minutes on a slow machine. Learning rate,
initialisation, schedule and the division of the digits were tried out under seed 100, which holds out other images than
the default seed does.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import platform
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..config import CacheConfig, FreezeConfig
from ..errors import UnsupportedSetupError
from ..hub.client import quiet_libraries
from ..report.callback import ReportCallback
from ..report.plots import draw_runs
from ..report.text import format_runs
from ..trainer import FreezeCacheTrainer

__all__ = ["DemoSettings", "DigitTransform", "load_digit_images", "run"]

NUM_CLASSES, TEST_FRACTION = 10, 0.3
FULL, LIVE, CACHED = "full fine-tuning", "prefix frozen, no cache", "cached, progressive"


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo.

    Attributes:
        image_size: Side of the square images, pixels; the digits are 8 x 8 and are enlarged.
        patch_size: Side of a patch, pixels.
        hidden_size: Width of the ViT.
        num_blocks: Blocks of the ViT.
        initializer_range: Standard deviation of initial weights; at this width the usual 0.02 hardly learns.
        num_pretrain_classes: The digits below this number are learned first, the others in the three runs.
        pretrain_epochs: Epochs on the first digits.
        epochs: Epochs of each of the three runs.
        batch_size: Images per step.
        learning_rate: Peak rate of AdamW, the same in all runs.
        schedule: Epoch:split point pairs of the two frozen runs.
        num_views: Stored views of each image in the cached run.
        max_images: Use only so many images; ``None`` uses all 1,797.
    """

    image_size: int = 32
    patch_size: int = 8
    hidden_size: int = 128
    num_blocks: int = 8
    initializer_range: float = 0.1
    num_pretrain_classes: int = 6
    pretrain_epochs: int = 6
    epochs: int = 12
    batch_size: int = 32
    learning_rate: float = 1e-3
    schedule: str = "0:3,3:6"
    num_views: int = 4
    max_images: int | None = None


@dataclass(frozen=True)
class DigitTransform:
    """Transform for ``Dataset.set_transform``: images to ``pixel_values`` in [-1, 1].

    Attributes:
        augment: Rotate by up to 15 degrees and shift by up to 2 pixels, drawn by Python's ``random``.
    """

    augment: bool

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return ``pixel_values``, tensors (3, height, width), and ``labels`` of a batch of rows."""
        pixel_values = []
        for image in batch["image"]:
            if self.augment:
                shift = (random.randint(-2, 2), random.randint(-2, 2))
                image = image.rotate(random.uniform(-15, 15), Image.Resampling.BILINEAR, translate=shift)
            pixels = np.array(image, dtype=np.float32) / 127.5 - 1
            pixel_values.append(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
        return {"pixel_values": pixel_values, "labels": list(batch["label"])}


class _Bar(TrainerCallback):  # type: ignore[misc]
    """A progress bar over training steps, and nothing else: ``Trainer``'s own prints every log."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.label, unit="step", leave=False, disable=args.disable_tqdm)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


class _TimedTrainer(FreezeCacheTrainer):
    """Keeps time: seconds of ``train()`` without those of ``evaluate()``, and accuracy against them."""

    started = evaluation_seconds = 0.0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.curve: list[list[float]] = []
        self.evaluation_seconds, self.started = 0.0, time.perf_counter()
        result = super().train(*args, **kwargs)
        self.seconds = time.perf_counter() - self.started - self.evaluation_seconds
        return result

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        started = time.perf_counter()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self.curve.append([started - self.started - self.evaluation_seconds, metrics["eval_accuracy"]])
        self.evaluation_seconds += time.perf_counter() - started
        return metrics


def _require_extras() -> None:
    for module, package in (("sklearn.datasets", "scikit-learn"), ("matplotlib.figure", "matplotlib")):
        try:
            __import__(module)
        except ImportError as error:
            raise UnsupportedSetupError(
                f"The demo needs {package}, which cannot be imported ({error}). Install it with "
                "pip install 'hf-freezecache[demo]'."
            ) from error


@contextmanager
def _calm() -> Iterator[None]:
    """Silence logs, warnings and bars of the libraries, and compute on one thread.

    The demo's steps are small: on a busy machine several threads mostly wait for each other.
    """
    logger, threads = logging.getLogger("hf_freezecache"), torch.get_num_threads()
    level = logger.level
    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
    try:
        with quiet_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        logger.setLevel(level)


def load_digit_images(image_size: int, max_images: int | None = None) -> datasets.Dataset:
    """Return scikit-learn's digits, real scans of handwriting, as ``image`` (RGB, PNG) and ``label`` (0-9).

    Args:
        image_size: Side to which the 8 x 8 scans are enlarged, pixels.
        max_images: Keep only the first of the 1,797.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.clip(digits.images * (255 / 16), 0, 255).astype(np.uint8)[:max_images]
    images = [
        Image.fromarray(scan).resize((image_size, image_size), Image.Resampling.BICUBIC).convert("RGB")
        for scan in pixels
    ]
    columns = {"image": images, "label": digits.target[:max_images].tolist()}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(columns, features=features)


def _split_digits(settings: DemoSettings, seed: int) -> tuple[datasets.Dataset, datasets.Dataset, datasets.Dataset]:
    """Return the first digits, and training and held-out images of the others, all labelled from 0."""
    digits = load_digit_images(settings.image_size, settings.max_images)
    labels, images = np.array(digits["label"]), digits.select_columns(["image"])
    order = np.random.default_rng(seed).permutation(len(digits))
    known = labels[order] < settings.num_pretrain_classes
    first, others = order[known], order[~known]
    held_out = round(len(others) * TEST_FRACTION)
    parts = []
    for rows, augment in ((first, True), (others[held_out:], True), (others[:held_out], False)):
        part = images.select(rows).flatten_indices(keep_in_memory=True)
        part = part.add_column("label", (labels[rows] - labels[rows].min()).tolist())
        parts.append(part.with_transform(DigitTransform(augment)))
    return parts[0], parts[1], parts[2]


def _make_model(settings: DemoSettings, num_labels: int, seed: int) -> ViTForImageClassification:
    set_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            image_size=settings.image_size,
            patch_size=settings.patch_size,
            hidden_size=settings.hidden_size,
            intermediate_size=4 * settings.hidden_size,
            num_hidden_layers=settings.num_blocks,
            num_attention_heads=4,
            num_labels=num_labels,
            initializer_range=settings.initializer_range,
        )
    )


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _train(
    label: str,
    model: ViTForImageClassification,
    train: datasets.Dataset,
    test: datasets.Dataset | None,
    epochs: int,
    settings: DemoSettings,
    seed: int,
    scratch: Path,
    **freezing: Any,
) -> _TimedTrainer:
    """Train a model in place; with ``test``, evaluate after each epoch. ``freezing`` goes to the trainer."""
    args = TrainingArguments(
        output_dir=str(scratch / "run"),
        use_cpu=True,
        num_train_epochs=epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=4 * settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        seed=seed,
        eval_strategy="no" if test is None else "epoch",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=not sys.stderr.isatty(),
    )
    trainer = _TimedTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=_accuracy,
        callbacks=[_Bar(label)],
        **freezing,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()
    return trainer


def _figures(name: str, trainer: _TimedTrainer) -> dict[str, Any]:
    records = [c.record for c in trainer.callback_handler.callbacks if isinstance(c, ReportCallback)]
    caches = [decision for record in records for decision in record.decisions if decision.has_cache]
    return {
        "run": name,
        "accuracy": trainer.curve[-1][1],
        "seconds": round(trainer.seconds, 3),
        "build_seconds": round(sum(decision.build_seconds for decision in caches), 3),
        "cache_bytes": sum(decision.cache_bytes for decision in caches),
        "cache_bytes_per_image": sum(decision.cache_bytes_per_image for decision in caches),
        "accuracy_after_seconds": [[round(seconds, 3), accuracy] for seconds, accuracy in trainer.curve],
    }


def run(
    output_dir: Path,
    seed: int = 0,
    json_path: Path | None = None,
    settings: DemoSettings | None = None,
    echo: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the demo.

    Args:
        output_dir: Where ``demo.png``, ``demo.json`` and ``caches/`` go. Caches that lie there from a former demo are
            not used, so that build times are honest; one of the same fingerprint is replaced.
        seed: Of the split into training and held-out images, the weights, the order and the views.
        json_path: Where the figures go instead of ``output_dir / "demo.json"``.
        settings: Sizes; default ``DemoSettings()``.
        echo: Prints a line.

    Returns:
        The figures, as written to the JSON file. Seconds are wall-clock.

    Raises:
        UnsupportedSetupError: scikit-learn or matplotlib is missing.
        OSError: The output cannot be written.
    """
    started, settings = time.perf_counter(), settings or DemoSettings()
    _require_extras()
    picture, json_path = output_dir / "demo.png", json_path or output_dir / "demo.json"
    for folder in (output_dir, json_path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if json_path.is_dir():
        raise IsADirectoryError(f"{json_path} is a folder; give the name of a file for the figures.")
    # A fresh folder: a cache of a former demo would be found and reused, and nothing would be built.
    with _calm(), tempfile.TemporaryDirectory(prefix=".demo-", dir=output_dir) as scratch:
        figures = _three_runs(settings, seed, Path(scratch), echo)
        echo("5/5  picture and figures\n")
        echo(format_runs(figures["runs"]) + "\n")
        draw_runs(figures["runs"], picture, title="Fine-tuning a small ViT on handwritten digits")
        figures["picture"] = str(picture)
        figures["caches"] = [str(path) for path in _keep_caches(Path(scratch) / "caches", output_dir / "caches")]
        figures["total_seconds"] = round(time.perf_counter() - started, 3)
        json_path.write_text(json.dumps(figures, indent=1) + "\n")
    for line in _summary(figures, json_path):
        echo(line)
    return figures


def _keep_caches(built: Path, kept: Path) -> list[Path]:
    """Move the caches just built to where they stay; one of the same fingerprint, from a former demo, makes room."""
    kept.mkdir(exist_ok=True)
    caches = []
    for cache in sorted(path for path in built.iterdir() if path.is_dir()):
        shutil.rmtree(kept / cache.name, ignore_errors=True)
        caches.append(cache.rename(kept / cache.name))
    return caches


def _summary(figures: dict[str, Any], json_path: Path) -> list[str]:
    images, views = figures["test_images"], figures["settings"]["num_views"]
    error = max((run["accuracy"] * (1 - run["accuracy"]) / images) ** 0.5 for run in figures["runs"])
    return [
        f"Accuracy: on {images} held-out images after the last epoch; one seed, standard error up to {error:.1%}.",
        "          Run 2 draws a new view of each image in every epoch, run 3 has the stored ones.",
        "Seconds:  wall-clock of train(), cache build included, evaluation left out in all three.",
        f"Bytes:    of {len(figures['caches'])} caches together, {views} stored views per image in each, lossless.",
        "",
        f"picture:  {figures['picture']}\nfigures:  {json_path}",
        *(f"cache:    {path}" for path in figures["caches"]),
        f"The whole demo took {figures['total_seconds']:.0f} s. To look into a cache:\n"
        f"  hf-freezecache inspect {figures['caches'][-1]}",
    ]


def _three_runs(settings: DemoSettings, seed: int, scratch: Path, echo: Callable[[str], None]) -> dict[str, Any]:
    (first, train, test), known = _split_digits(settings, seed), settings.num_pretrain_classes
    echo(f"1/5  a ViT of {settings.num_blocks} blocks learns the digits 0-{known - 1} ({len(first)} images)")
    pretrained = _make_model(settings, known, seed)
    pretraining = _train("1/5", pretrained, first, None, settings.pretrain_epochs, settings, seed, scratch)
    echo(f"     {pretraining.seconds:.1f} s. Now it learns the digits {known}-9 ({len(train)} images)")
    fresh = _make_model(settings, NUM_CLASSES - known, seed)
    fresh.vit.load_state_dict(pretrained.vit.state_dict())

    frozen, cache_dir = FreezeConfig(schedule=settings.schedule), str(scratch / "caches")
    # The live run draws a new view in every epoch, as a user without a cache would.
    live = CacheConfig(cache_dir=cache_dir, mode="never", num_views=0, view_seed=seed)
    cached = CacheConfig(cache_dir=cache_dir, num_views=settings.num_views, view_seed=seed)
    variants: list[tuple[str, dict[str, Any]]] = [
        (FULL, {}),
        (LIVE, {"freeze_config": frozen, "cache_config": live}),
        (CACHED, {"freeze_config": frozen, "cache_config": cached}),
    ]
    runs = []
    for step, (name, freezing) in enumerate(variants, start=2):
        echo(f"{step}/5  {name}")
        trainer = _train(
            f"{step}/5", copy.deepcopy(fresh), train, test, settings.epochs, settings, seed, scratch, **freezing
        )
        runs.append(_figures(name, trainer))
        echo(f"     {runs[-1]['seconds']:.1f} s, accuracy {runs[-1]['accuracy']:.1%}")
    return {
        "runs": runs,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "pretrain_seconds": round(pretraining.seconds, 3),
        "train_images": len(train),
        "test_images": len(test),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, datasets, np)},
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }
