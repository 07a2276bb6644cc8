"""The embedded demo: the whole method on real images in one to two and a half minutes, with no network.

A small ViT is trained from scratch on half of scikit-learn's scans of handwritten digits, and then fine-tuned on the other half
three ways: all of it; all of it for a third of the epochs; and frozen and cached, by ``schedule="auto"``, for the cost of that third.

The task was chosen for what the backbone was trained for: freezing makes sense where features carry over. ``unseen_digits`` is a
harder one: digits that the backbone has never seen. Sizes were chosen by the time they take, the epochs of the backbone by what it
knows: after 6 it tells 66% of the other half, after 12 89%. That, learning rate and initialisation were tried out under seed 100, which
holds out other images than the default seed does.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import platform
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
from .digits import DigitTask, other_scans, unseen_digits

__all__ = ["DemoSettings", "run"]

FULL, SHORT, CACHED = "full fine-tuning", "full, a third of the epochs", "frozen and cached, same cost"


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo.

    Attributes:
        image_size: Side of the square images, pixels; the digits are 8 x 8 and are enlarged.
        patch_size: Side of a patch, pixels.
        hidden_size: Width of the ViT.
        num_blocks: Blocks of the ViT.
        initializer_range: Standard deviation of initial weights; at this width the usual 0.02 hardly learns.
        pretrain_epochs: Epochs on the first images.
        epochs: Epochs of full fine-tuning, divisible by three.
        batch_size: Images per step.
        learning_rate: Peak rate of AdamW, the same in all runs; ``schedule="auto"`` multiplies it.
        max_images: Use only so many images; ``None`` uses all 1,797.
    """

    image_size: int = 32
    patch_size: int = 8
    hidden_size: int = 128
    num_blocks: int = 6
    initializer_range: float = 0.1
    pretrain_epochs: int = 12
    epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 1e-3
    max_images: int | None = None


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
        "chosen": " ".join(record.chosen for record in records),
        "accuracy_after_seconds": [[round(seconds, 3), accuracy] for seconds, accuracy in trainer.curve],
    }


def run(
    output_dir: Path,
    seed: int = 0,
    json_path: Path | None = None,
    settings: DemoSettings | None = None,
    echo: Callable[[str], None] = print,
    unseen: bool = False,
) -> dict[str, Any]:
    """Run the demo.

    Args:
        output_dir: Where ``demo.png``, ``demo.json`` and ``caches/`` go. Caches that lie there from a former demo are
            not used, so that build times are honest; one of the same fingerprint is replaced.
        seed: Of the split into training and held-out images, the weights, the order and the views.
        json_path: Where the figures go instead of ``output_dir / "demo.json"``.
        settings: Sizes; default ``DemoSettings()``.
        echo: Prints a line.
        unseen: Fine-tune on digits that the backbone has never seen.

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
        make_task = unseen_digits if unseen else other_scans
        task = make_task(settings.image_size, seed, settings.max_images)
        figures = _three_runs(task, settings, seed, Path(scratch), echo)
        echo("5/5  picture and figures\n")
        echo(format_runs(figures["runs"]) + "\n")
        draw_runs(figures["runs"], picture, title=f"Fine-tuning a small ViT on {task.words}")
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
    images, (full, short, ours) = figures["test_images"], figures["runs"]
    error = max((run["accuracy"] * (1 - run["accuracy"]) / images) ** 0.5 for run in figures["runs"])
    first, theirs = (_seconds_to(run, ours["accuracy"]) for run in (ours, full))
    in_time = "never reaches that" if theirs is None else f"reaches that after {theirs:.1f} s"
    ahead = 100 * (ours["accuracy"] - short["accuracy"])
    so_far = [accuracy for seconds, accuracy in full["accuracy_after_seconds"] if seconds <= ours["seconds"]]
    best_seconds, best = max(ours["accuracy_after_seconds"], key=lambda point: point[1])
    on_the_way = f" On the way it had {best:.1%}, after {best_seconds:.1f} s." if best > ours["accuracy"] else ""
    return [
        f"At equal cost:     frozen and cached is {abs(ahead):.1f} points {'above' if ahead >= 0 else 'below'} full fine-tuning, "
        f"and takes {ours['seconds']:.1f} s against {short['seconds']:.1f} s.",
        f"At equal time:     after {ours['seconds']:.1f} s it has {ours['accuracy']:.1%}; the long run had "
        f"{f'{so_far[-1]:.1%}' if so_far else 'no epoch done'}.{on_the_way}",
        f"At equal accuracy: it first has {ours['accuracy']:.1%} after {first:.1f} s; full fine-tuning {in_time}.",
        f"At the end:        full fine-tuning has {full['accuracy']:.1%} after {full['seconds']:.1f} s.",
        f"Accuracy on {images} held-out images; one seed, standard error up to {error:.1%}. Seconds are wall-clock of train(), build",
        "included, evaluation left out. Cost counts passes through blocks.",
        "",
        figures["runs"][2]["chosen"],
        "",
        f"picture:  {figures['picture']}\nfigures:  {json_path}",
        *(f"cache:    {path}" for path in figures["caches"]),
        f"The whole demo took {figures['total_seconds']:.0f} s. To look into a cache:\n"
        f"  hf-freezecache inspect {figures['caches'][-1]}",
    ]


def _seconds_to(run: dict[str, Any], accuracy: float) -> float | None:
    """Return when a run first had an accuracy; ``None`` if it never had."""
    return next((seconds for seconds, reached in run["accuracy_after_seconds"] if reached >= accuracy), None)


def _three_runs(
    task: DigitTask, settings: DemoSettings, seed: int, scratch: Path, echo: Callable[[str], None]
) -> dict[str, Any]:
    echo(f"1/5  a ViT of {settings.num_blocks} blocks learns {task.first_words} ({len(task.first)} images)")
    pretrained = _make_model(settings, task.num_first, seed)
    pretraining = _train("1/5", pretrained, task.first, None, settings.pretrain_epochs, settings, seed, scratch)
    echo(f"     {pretraining.seconds:.1f} s. Now, with a new head, {task.words} ({len(task.train)} images)")
    fresh = _make_model(settings, task.num_classes, seed)
    fresh.vit.load_state_dict(pretrained.vit.state_dict())

    automatic = {
        "freeze_config": FreezeConfig(schedule="auto", budget=1 / 3),
        "cache_config": CacheConfig(cache_dir=str(scratch / "caches"), view_seed=seed),
    }
    variants: list[tuple[str, int, dict[str, Any]]] = [
        (FULL, settings.epochs, {}),
        (SHORT, settings.epochs // 3, {}),
        (CACHED, settings.epochs, automatic),
    ]
    runs: list[dict[str, Any]] = []
    for step, (name, epochs, freezing) in enumerate(variants, start=2):
        echo(f"{step}/5  {name}")
        model = copy.deepcopy(fresh)
        trainer = _train(f"{step}/5", model, task.train, task.test, epochs, settings, seed, scratch, **freezing)
        runs.append(_figures(name, trainer))
        echo(f"     {runs[-1]['seconds']:.1f} s, accuracy {runs[-1]['accuracy']:.1%}")
    return {
        "task": task.name,
        "runs": runs,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "pretrain_seconds": round(pretraining.seconds, 3),
        "train_images": len(task.train),
        "test_images": len(task.test),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, datasets, np)},
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }
