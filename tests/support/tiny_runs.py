"""Runs for tests of reports and cards: logs as ``Trainer`` writes them, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_freezecache.report.record import RunRecord


def stage_log(epoch: float, split_point: int, **cache: Any) -> dict[str, Any]:
    return {"epoch": epoch, **{f"freezecache/{name}": v for name, v in {"split_point": split_point, **cache}.items()}}


def epoch_log(epoch: float, rate: float, seconds: float, until: float) -> dict[str, Any]:
    figures = {"train_images_per_second": rate, "epoch_seconds": seconds, "cumulative_seconds": until}
    return {"epoch": epoch, **{f"freezecache/{name}": value for name, value in figures.items()}}


def eval_log(epoch: float, accuracy: float, loss: float, step: int = 0) -> dict[str, Any]:
    speed = {"eval_runtime": 0.5, "eval_samples_per_second": 400.0}
    return {"epoch": epoch, "step": step, "eval_accuracy": accuracy, "eval_loss": loss, **speed}


CACHE = {"cache_bytes": 2_000_000, "cache_bytes_per_image": 20_000, "bits_per_element": 2.5, "build_seconds": 3.0}


def log_history(unfrozen: bool = True) -> list[dict[str, Any]]:
    """Four epochs of 100 images: two of them at ``k = 0`` or 3 of 12, two at 6; 10, 10, 5 and 5 s, and 4 s of entering."""
    first = stage_log(0, 0) if unfrozen else stage_log(0, 3, **CACHE)
    return [
        {**first, "step": 0},
        {"epoch": 0.5, "step": 5, "loss": 2.0},
        eval_log(1, 0.5, 1.2, 10),
        epoch_log(1, 10.0, 10.0, 10.0),
        {"epoch": 1.5, "step": 15, "loss": 1.0},
        eval_log(2, 0.8, 0.9, 20),
        epoch_log(2, 10.0, 10.0, 20.0),
        stage_log(2, 6, **CACHE, distortion=0.002),
        {"epoch": 2.5, "step": 25, "loss": 0.5},
        eval_log(3, 0.7, 0.8, 30),
        epoch_log(3, 20.0, 5.0, 29.0),
        eval_log(4, 0.75, 0.7, 40),
        epoch_log(4, 20.0, 5.0, 34.0),
        {"epoch": 4, "step": 40, "train_runtime": 40.0, "train_samples_per_second": 10.0},
    ]


def record(unfrozen: bool = True, **settings: Any) -> RunRecord:
    known = {
        "name": "flowers",
        "complete": True,
        "model": {"class": "ViTForImageClassification", "num_blocks": 12, "parameters": 1000},
        "data": {"train_images": 100, "image_shape": [3, 16, 16]},
        "freezing": {"schedule": "0:0,2:6", "policy": None},
        "cache": {
            "mode": "always",
            "num_views": 2,
            "codec": "auto",
            "max_distortion": 0.002,
            "feature_augmentation": None,
        },
        "planned_stages": [
            {"start_epoch": 0, "split_point": 0 if unfrozen else 3},
            {"start_epoch": 2, "split_point": 6},
        ],
        "stages": [{"split_point": 6, "num_views": 2, "codec": "transform", "copies_calibration": {}}],
        "training": {"num_train_epochs": 4, "per_device_train_batch_size": 10, "precision": "fp32"},
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "preflight_seconds": 1.0,
        "global_step": 40,
        "max_steps": 40,
        "log_history": log_history(unfrozen),
    }
    return RunRecord(**{**known, **settings})


def write_plain_run(folder: Path, accuracy: float = 0.8) -> Path:
    """A folder as plain ``Trainer`` leaves it: 4 epochs of 100 images in 41 s, 1 s of them evaluation."""
    folder.mkdir(parents=True)
    state = {
        "global_step": 40,
        "max_steps": 40,
        "num_train_epochs": 4,
        "train_batch_size": 10,
        "log_history": [
            {"epoch": 2, "step": 20, "loss": 1.0},
            eval_log(2, 0.6, 1.0, 20),
            eval_log(4, accuracy, 0.6, 40),
            {"epoch": 4, "step": 40, "train_runtime": 41.0, "train_samples_per_second": 400 / 41},
        ],
    }
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder
