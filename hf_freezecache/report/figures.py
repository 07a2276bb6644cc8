"""Figures of a run: what its page, its pictures, its model card and ``hf-freezecache report --json`` all show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .cost import (
    Rate,
    passes_spent,
    run_clock,
    unfrozen_rate,
    unfrozen_seconds,
)
from .over_time import over_time
from .record import (
    RunRecord,
    read_run,
)
from .spread import run_of, spread_of
from .text import counted, is_share

__all__ = ["comparison", "figures_of", "read_baseline", "standard_error"]

Figures = dict[str, Any]

#: Evaluation figures that are no metric of the model.
_NO_METRICS = (
    "loss",
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "model_preparation_time",
    "jit_compilation_time",
)


# ---- Evaluation ----


def _metric_names(entry: Mapping[str, Any]) -> list[str]:
    """Return the metrics in a log entry, e.g. ``eval_accuracy``, best known first."""
    names = [name for name in entry if name.startswith("eval_") and not name.endswith(_NO_METRICS)]
    names = [name for name in names if isinstance(entry[name], (int, float))]
    return sorted(names, key=lambda name: ("accuracy" not in name, not is_share(name), names.index(name)))


def _evaluations(log_history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [entry for entry in log_history if "eval_loss" in entry or _metric_names(entry)]


def _final_evaluation(record: RunRecord) -> Mapping[str, Any]:
    """Return the evaluation of the model that came out; empty if there was none."""
    entries = record.log_history
    ended = max((number for number, entry in enumerate(entries) if "train_runtime" in entry), default=len(entries))
    after, during = _evaluations(entries[ended:]), _evaluations(entries[:ended])
    if record.metrics:
        return record.metrics
    if after:
        return after[-1]
    if record.best_step is not None:  # the best checkpoint was loaded at the end
        during = [entry for entry in during if entry.get("step") == record.best_step]
    return during[-1] if during else {}


def _num_evaluated(entry: Mapping[str, Any]) -> int | None:
    seconds, rate = entry.get("eval_runtime"), entry.get("eval_samples_per_second")
    return round(seconds * rate) if seconds and rate else None


def _result(record: RunRecord) -> Figures | None:
    entry = _final_evaluation(record)
    names = _metric_names(entry)
    if not names and entry.get("eval_loss") is None:
        return None
    wanted = str(record.training.get("metric_for_best_model") or "")
    wanted = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    name = names[0] if names else None
    if wanted in names and (name is None or "accuracy" not in name):
        name = wanted
    return {
        "metric": name.removeprefix("eval_") if name else None,
        "value": entry[name] if name else None,
        "loss": entry.get("eval_loss"),
        "metrics": {metric.removeprefix("eval_"): entry[metric] for metric in names},
        "epoch": entry.get("epoch"),
        "images": _num_evaluated(entry),
    }


def standard_error(result: Mapping[str, Any] | None) -> float | None:
    """Return the standard error of an accuracy by the number of images it was measured on, if that is known."""
    if not result or not result["images"] or not result["metric"] or "accuracy" not in result["metric"]:
        return None
    return float(math.sqrt(max(result["value"] * (1 - result["value"]), 0.0) / result["images"]))


# ---- Baseline ----


@dataclass(frozen=True)
class _Training:
    """The one ``train()`` that ended, as far as it was timed.

    Attributes:
        seconds: Without evaluations.
        images: Images trained on in that time.
        share: Of the run's steps that were done in that time; 1 unless it went on from a checkpoint.
    """

    seconds: float
    images: float
    share: float


def _training(record: RunRecord) -> _Training | None:
    """Return what was timed; ``None`` if ``train()`` did not end, or ended more than once."""
    ended = [number for number, entry in enumerate(record.log_history) if "train_runtime" in entry]
    if len(ended) != 1:
        return None
    entry, before = record.log_history[ended[0]], record.log_history[: ended[0]]
    runtime, last = float(entry["train_runtime"]), int(entry.get("step") or 0)
    # Steps of this call, which after a resume are not all; the rate is rounded to three digits behind the point.
    steps, error = entry.get("train_steps_per_second", math.inf) * runtime, 0.5 + 0.0005 * runtime
    first = last - steps if steps + error < last else 0.0
    images = entry.get("train_samples_per_second", 0.0) * runtime
    # Before transformers 5.19 images and steps are those of the whole schedule, even if it was cut short or resumed.
    if math.inf > steps - error > last:
        images *= last / steps
    if not first and _misses_losses(entry, before, last):
        return None
    if not first and record.epochs and record.epochs[-1].cumulative_seconds > runtime + 1:
        return None
    evaluations = [log for log in _evaluations(before) if not first or log.get("step", 0) > first + error]
    seconds = runtime - sum(log.get("eval_runtime", 0.0) for log in evaluations)
    return None if seconds <= 0 else _Training(seconds, images, (last - first) / last if last else 1.0)


def _misses_losses(entry: Mapping[str, Any], before: Sequence[Mapping[str, Any]], last: int) -> bool:
    """Say whether losses were logged that the call that ended did not see: those of steps before it resumed.

    Before transformers 5.19 nothing else tells: ``train_loss`` is the sum of that call's losses over all steps, and what is
    logged is the mean since the step that was logged before. Both are rounded to four digits behind the point, or are not.
    """
    logged, step = 0.0, 0
    for log in before:
        if isinstance(log.get("loss"), (int, float)) and log.get("step", 0) > step:
            logged, step = logged + log["loss"] * (log["step"] - step), log["step"]
    own = entry.get("train_loss")
    return isinstance(own, (int, float)) and own * last < logged - 0.01 * abs(logged) - 0.0001 * last


def _whole_seconds(record: RunRecord) -> float | None:
    """Return seconds of ``train()`` without evaluations, or ``None`` if it did not run in one piece to its end."""
    timed = _training(record)
    return None if timed is None or timed.share < 1 else timed.seconds + record.preflight_seconds


def read_baseline(folder: Path) -> Figures:
    """Return the figures of a run without freezing, by plain ``Trainer`` or by ours.

    Args:
        folder: Its ``output_dir``. ``trainer_state.json`` there is enough: ``trainer.save_state()`` writes it, after ``train()``. That of
            its last checkpoint has scores, but no time.

    Raises:
        RunError: The folder holds no run, or one that cannot be read.
    """
    return _baseline_of(read_run(folder))


def _baseline_of(record: RunRecord) -> Figures:
    seconds, timed = _whole_seconds(record), _training(record)
    end: Mapping[str, Any] = next((entry for entry in record.log_history if "train_runtime" in entry), {})
    epochs = end.get("epoch") or (record.log_history[-1].get("epoch") if record.log_history else None)
    frozen = max((decision.split_point for decision in record.decisions), default=0)
    return {
        "run": record.name,
        "result": _result(record),
        "epochs": epochs,
        "frozen_blocks": frozen,
        "seconds": None if seconds is None else round(seconds, 3),
        "images_per_second": round(timed.images / timed.seconds, 3) if timed and timed.images else None,
        "train_images": round(timed.images / timed.share / epochs) if timed and timed.images and epochs else None,
        "batch_size": record.training.get("per_device_train_batch_size"),
        "evaluations": _curve(record),
        "timed_by_epoch": bool(record.epochs),
        "device": record.device or None,
    }


def comparison(figures: Mapping[str, Any]) -> Figures | None:
    """Compare a run with its baseline: differences in the metric, and times over; and what makes them unequal."""
    baseline = figures["baseline"]
    if baseline is None:
        return None
    mine, theirs = figures["result"], baseline["result"]
    same = bool(mine and theirs and mine["metric"] and mine["metric"] == theirs["metric"])
    seconds = figures["cost"]["whole_seconds"]
    caveats = []
    if baseline["frozen_blocks"]:
        caveats.append(f"the baseline froze up to {baseline['frozen_blocks']} blocks itself")
    if figures["epochs_done"] and baseline["epochs"] and abs(figures["epochs_done"] - baseline["epochs"]) > 0.01:
        caveats.append(f"the baseline trained {baseline['epochs']:g} epochs, this run {figures['epochs_done']:g}")
    if baseline["seconds"] is None:
        caveats.append("the baseline's record has no time (trainer.save_state() after train() keeps it)")
    images = figures["data"].get("train_images")
    if images and baseline["train_images"] and abs(images - baseline["train_images"]) > 0.01 * images:
        caveats.append(f"the baseline trained on {baseline['train_images']:,} images, this run on {images:,}")
    if same and mine["images"] and theirs["images"] and mine["images"] != theirs["images"]:
        caveats.append("the two were evaluated on different numbers of images")
    batch = figures["training"].get("per_device_train_batch_size")
    if batch and baseline["batch_size"] and batch != baseline["batch_size"]:
        caveats.append(f"the baseline had a batch size of {baseline['batch_size']}, this run {batch}")
    errors = [standard_error(mine), standard_error(theirs)] if same else [None]
    return {
        "metric": mine["metric"] if same else None,
        "difference": mine["value"] - theirs["value"] if same else None,
        "standard_error": math.hypot(*errors) if all(error is not None for error in errors) else None,
        "loss_difference": mine["loss"] - theirs["loss"]
        if same and None not in (mine["loss"], theirs["loss"])
        else None,
        "speedup": round(baseline["seconds"] / seconds, 4) if seconds and baseline["seconds"] else None,
        "means": _means(figures),
        "caveats": caveats,
        "over_time": over_time(figures["evaluations"], baseline["evaluations"]),
    }


def _means(figures: Mapping[str, Any]) -> Figures | None:
    """Compare means over seeds: the difference, and its standard error by both spreads; ``None`` without several of each."""
    mine, theirs = figures["seeds"], figures["baseline"]["spread"]
    if not mine or not theirs or not mine["metric"] or mine["metric"] != theirs["metric"]:
        return None
    name = mine["metric"]
    errors = [of["metrics"][name]["standard_deviation"] / math.sqrt(len(of["runs"])) for of in (mine, theirs)]
    difference = mine["metrics"][name]["mean"] - theirs["metrics"][name]["mean"]
    return {"metric": name, "difference": difference, "standard_error": math.hypot(*errors)}


# ---- The run ----


def _curve(record: RunRecord) -> list[Figures]:
    points, clock = [], run_clock(record, _whole_seconds(record))
    for entry in _evaluations(record.log_history):
        names, seconds = _metric_names(entry), clock(entry.get("epoch", 0.0))
        points.append(
            {
                "epoch": entry.get("epoch", 0.0),
                "seconds": None if seconds is None else round(seconds, 3),
                "loss": entry.get("eval_loss"),
                "metric": names[0].removeprefix("eval_") if names else None,
                "value": entry[names[0]] if names else None,
            }
        )
    return points


def _stages(record: RunRecord) -> list[Figures]:
    """Return what each stage did, by its decision, and what it took, by its epochs."""
    stages: list[Figures] = []
    for decision in record.decisions:
        epochs = [epoch for epoch in record.epochs if epoch.stage == decision.stage]
        end = max((epoch.epoch for epoch in epochs), default=decision.start_epoch)
        if decision is record.decisions[-1]:  # as far as it came
            end = max(end, *(entry.get("epoch", 0.0) for entry in record.log_history), 0.0)
        rates = [epoch.images_per_second for epoch in epochs]
        spent = passes_spent(record, decision)
        stages.append(
            {
                **asdict(decision),
                "has_cache": decision.has_cache,
                "runs_frozen_blocks": decision.runs_frozen_blocks,
                "end_epoch": end,
                "train_seconds": round(sum(epoch.seconds for epoch in epochs), 3),
                "entering_seconds": round(sum(epoch.entering_seconds for epoch in epochs), 3),
                "images_per_second": round(statistics.median(rates), 3) if rates else None,
                "passes_spent": None if spent is None else round(spent, 1),
            }
        )
    for stage in stages:
        # Predicted seconds are of all stages whose caches this one's build gives as well.
        served = [one for one in stages if one is stage or one["split_point"] in stage["built_ahead"]]
        taken = sum(one["train_seconds"] + one["build_seconds"] for one in served)
        stage["seconds_spent"] = round(taken, 3) if any(one["train_seconds"] for one in served) else None
    return stages


def _seeds(record: RunRecord, others: Sequence[Mapping[str, Any]], seconds: float | None) -> Figures | None:
    """Return mean and spread over a run and others of its setting, by their seeds."""
    if not others:
        return None
    own = run_of(record.name, record.training.get("seed"), _result(record), seconds)
    runs = sorted([own, *others], key=lambda run: (run["seed"] is None, run["seed"]))
    return spread_of(runs)


def figures_of(
    record: RunRecord,
    baseline: Mapping[str, Any] | None = None,
    seeds: Sequence[Mapping[str, Any]] | None = None,
) -> Figures:
    """Return the figures of a run, all of them what JSON can hold.

    Args:
        record: The run, as ``read_run`` returns it.
        baseline: A run without freezing, as ``read_baseline`` returns it; default: the one in the record, if any.
        seeds: Runs of other seeds, as ``read_seeds`` returns them; default: those in the record.
    """
    epochs = record.epochs
    compared_to = baseline if baseline is not None else record.baseline
    if compared_to is not None:
        compared_to = {**compared_to, "spread": spread_of(compared_to.get("runs", []))}
    rate: Rate | None = None
    if compared_to is not None and compared_to["images_per_second"] and not compared_to["frozen_blocks"]:
        text = f"measured in the baseline run '{compared_to['run']}', evaluation left out"
        rate = Rate(compared_to["images_per_second"], "baseline", text)
    else:
        rate = unfrozen_rate(record)
    unfrozen = unfrozen_seconds(record, rate) if rate else [None] * len(epochs)
    asked = f", for the {counted(record.asked_epochs, 'epoch')} asked for" if record.asked_epochs else ""
    whole = _whole_seconds(record)
    last = next((entry["epoch"] for entry in reversed(record.log_history) if "epoch" in entry), None)
    figures: Figures = {
        "run": record.name,
        "complete": record.complete,
        "steps": record.global_step,
        "max_steps": record.max_steps,
        "epochs_done": last,
        "model": record.model,
        "data": record.data,
        "freezing": {**record.freezing, **({"chosen": record.chosen} if record.chosen else {})},
        "cache": record.cache,
        "planned_stages": record.planned_stages,
        "stopped_early": record.complete and record.global_step < record.max_steps,
        "stages": _stages(record),
        "epochs": [
            {
                "epoch": epoch.epoch,
                "stage": epoch.stage,
                "split_point": record.decision_of(epoch).split_point,
                "images_per_second": epoch.images_per_second,
                "seconds": epoch.seconds,
                "entering_seconds": round(epoch.entering_seconds, 4),
                "cumulative_seconds": epoch.cumulative_seconds,
                "no_freezing_seconds": None if seconds is None else round(seconds, 4),
            }
            for epoch, seconds in zip(epochs, unfrozen, strict=True)
        ],
        "loss": [
            [entry["epoch"], entry["loss"]] for entry in record.log_history if "loss" in entry and "epoch" in entry
        ],
        "evaluations": _curve(record),
        "result": _result(record),
        "seeds": _seeds(record, record.seeds if seeds is None else seeds, whole),
        "cost": {
            "seconds": epochs[-1].cumulative_seconds if epochs else None,
            "train_seconds": round(sum(epoch.seconds for epoch in epochs), 3),
            "entering_seconds": round(sum(epoch.entering_seconds for epoch in epochs), 3),
            "preflight_seconds": record.preflight_seconds,
            "whole_seconds": None if whole is None else round(whole, 3),
            "no_freezing_seconds": unfrozen[-1] if epochs and unfrozen[-1] is not None else None,
            "no_freezing_images_per_second": round(rate.images_per_second, 3) if rate else None,
            "no_freezing_basis": rate.basis if rate else None,
            "no_freezing_text": rate.text + asked if rate else None,
            "no_freezing_epochs": record.asked_epochs,
            "no_freezing_measured": bool(rate and rate.measured),
        },
        "training": record.training,
        "versions": record.versions,
        "device": record.device,
        "baseline": compared_to,
    }
    figures["comparison"] = comparison(figures)
    return figures
