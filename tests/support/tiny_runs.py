"""Runs for tests of reports and cards: logs as ``Trainer`` writes them, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_freezecache.report.record import Decision, Epoch, RunRecord

#: What a stage with a cache did, as far as it does not matter to a test.
CACHED: dict[str, Any] = {
    "trained_from": "cache",
    "cache": "built",
    "built_from": 0,
    "reason": "mode='always'",
    "num_views": 2,
    "codec": {"name": "pipeline", "configuration": {"steps": []}},
    "calibration": {"budget": 0.002},
    "calibrated": True,
    "cache_bytes": 2_000_000,
    "cache_bytes_per_image": 20_000,
    "bits_per_element": 2.5,
    "build_seconds": 3.0,
    "built_shards": 2,
    "distortion": {"distortion": 0.002, "agreement": 1.0, "relative_error": 0.05},
    "predicted": {"cached_passes": 48, "live_passes": 48},
}
LIVE: dict[str, Any] = {"trained_from": "images", "reason": "No block is frozen."}


def decision(stage: int, start_epoch: int, split_point: int, **settings: Any) -> Decision:
    """What a stage did: with a cache if it froze blocks, unless the settings say otherwise."""
    known = CACHED if split_point else LIVE
    return Decision(stage, start_epoch, split_point, **{**known, "trainable_parameters": 500, **settings})


def live(stage: int, start_epoch: int, split_point: int, reason: str, **settings: Any) -> Decision:
    """A stage whose frozen blocks ran in every step."""
    return Decision(stage, start_epoch, split_point, **{**LIVE, "reason": reason, **settings})


def decisions(unfrozen: bool = True) -> list[Decision]:
    return [decision(0, 0, 0 if unfrozen else 3), decision(1, 2, 6)]


def epochs(*rows: tuple[int, float, float, float, float]) -> list[Epoch]:
    """Epochs by (stage, epochs done, images per second, seconds, seconds of entering before)."""
    made: list[Epoch] = []
    total = 0.0
    for stage, epoch, rate, seconds, entering in rows:
        total += seconds + entering
        made.append(Epoch(stage, epoch, rate, seconds, entering, total))
    return made


#: Four epochs of 100 images: two of them at ``k = 0`` or 3 of 12, two at 6; 10, 10, 5 and 5 s, and 4 s of entering.
EPOCHS = epochs((0, 1, 10.0, 10.0, 0.0), (0, 2, 10.0, 10.0, 0.0), (1, 3, 20.0, 5.0, 4.0), (1, 4, 20.0, 5.0, 0.0))


def eval_log(epoch: float, accuracy: float, loss: float, step: int = 0) -> dict[str, Any]:
    speed = {"eval_runtime": 0.5, "eval_samples_per_second": 400.0}
    return {"epoch": epoch, "step": step, "eval_accuracy": accuracy, "eval_loss": loss, **speed}


def log_history() -> list[dict[str, Any]]:
    """What ``Trainer`` itself logs over four epochs of 10 steps."""
    return [
        {"epoch": 0.5, "step": 5, "loss": 2.0},
        eval_log(1, 0.5, 1.2, 10),
        {"epoch": 1.5, "step": 15, "loss": 1.0},
        eval_log(2, 0.8, 0.9, 20),
        {"epoch": 2.5, "step": 25, "loss": 0.5},
        eval_log(3, 0.7, 0.8, 30),
        eval_log(4, 0.75, 0.7, 40),
        {"epoch": 4, "step": 40, "train_runtime": 40.0, "train_samples_per_second": 10.0},
    ]


def partial_record(epoch: float, unfrozen: bool = True, **settings: Any) -> RunRecord:
    """The same run, interrupted after some epochs."""
    known = record(unfrozen, complete=False, **settings)
    known.log_history = [
        entry for entry in known.log_history if entry["epoch"] <= epoch and "train_runtime" not in entry
    ]
    known.epochs = [trained for trained in known.epochs if trained.epoch <= epoch]
    known.decisions = [made for made in known.decisions if made.start_epoch <= epoch]
    return known


def record(unfrozen: bool = True, **settings: Any) -> RunRecord:
    known = {
        "name": "flowers",
        "complete": True,
        "model": {"class": "ViTForImageClassification", "num_blocks": 12, "parameters": 1000},
        "data": {"train_images": 100, "image_shape": [3, 16, 16]},
        "freezing": {"schedule": "0:0,2:6"},
        "cache": {
            "mode": "always",
            "num_views": 2,
            "codec": "auto",
            "max_distortion": 0.002,
            "feature_augmentation": None,
        },
        "planned_stages": [
            {"index": 0, "start_epoch": 0, "split_point": 0 if unfrozen else 3},
            {"index": 1, "start_epoch": 2, "split_point": 6},
        ],
        "decisions": decisions(unfrozen),
        "epochs": EPOCHS,
        "training": {"num_train_epochs": 4, "per_device_train_batch_size": 10, "precision": "fp32"},
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "preflight_seconds": 1.0,
        "global_step": 40,
        "max_steps": 40,
        "log_history": log_history(),
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
