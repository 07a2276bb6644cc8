"""What a run logs of its stages and epochs, made from its record. Nothing reads it back."""

from __future__ import annotations

from collections.abc import Mapping

from .cost import unfrozen_rate, unfrozen_seconds
from .record import Decision, Epoch, RunRecord

__all__ = ["decision_logs", "epoch_logs"]


def decision_logs(decision: Decision) -> dict[str, float]:
    """Return what to log when a stage begins.

    Args:
        decision: What the stage does.

    Returns:
        Numbers under ``freezecache/<name>``: those of the cache and of its distortion only where there are some.
    """
    logs: dict[str, float] = {
        "stage": decision.stage,
        "split_point": decision.split_point,
        "trainable_parameters": decision.trainable_parameters,
        "released_optimizer_bytes": decision.released_optimizer_bytes,
        "lr_scale": decision.lr_scale,
    }
    if decision.token_keep < 1:
        logs["token_keep"] = decision.token_keep
    if decision.has_cache:
        logs |= {
            "cache_bytes": decision.cache_bytes,
            "cache_bytes_per_image": decision.cache_bytes_per_image,
            "bits_per_element": round(decision.bits_per_element, 4),
            "build_seconds": round(decision.build_seconds, 3),
            "built_shards": decision.built_shards,
        }
        logs |= {name: value for name, value in decision.distortion.items() if value is not None}
    return {f"freezecache/{name}": value for name, value in logs.items()}


def epoch_logs(record: RunRecord, measured: Mapping[str, float], epoch: float, stage: int) -> dict[str, float]:
    """Add an epoch, or a part of one, to a record, and return what to log of it.

    Args:
        record: The run's.
        measured: As ``Stopwatch.take`` returns it.
        epoch: Epochs done now.
        stage: Index of the stage that is being trained.
    """
    images, seconds, entering_seconds = measured["images"], max(measured["seconds"], 1e-9), measured["entering_seconds"]
    before = record.epochs[-1].cumulative_seconds if record.epochs else 0.0
    trained = Epoch(
        stage=stage,
        epoch=epoch,
        images_per_second=round(images / seconds, 3),
        seconds=round(seconds, 6),  # of a short epoch, too, they give the images trained on
        entering_seconds=round(entering_seconds, 4),
        cumulative_seconds=round(before + entering_seconds + seconds, 4),
    )
    record.add_epoch(trained)
    logs = {
        "train_images_per_second": trained.images_per_second,
        "epoch_seconds": trained.seconds,
        "cumulative_seconds": trained.cumulative_seconds,
    }
    rate = unfrozen_rate(record)
    if rate is not None:
        logs["no_freezing_seconds_estimated"] = round(unfrozen_seconds(record, rate)[-1], 4)
    return {f"freezecache/{name}": value for name, value in logs.items()}
