"""The record of a run: a small JSON file beside the model, from which its report and its model card are made."""

# Annotations stay objects here, not text: `strict` checks values against them.

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import StrictDataclassFieldValidationError, strict  # type: ignore[attr-defined]

from ..errors import RunError

__all__ = [
    "RUN_NAME",
    "Decision",
    "Epoch",
    "RunRecord",
    "progress_to_dict",
    "read_run",
    "restore_progress",
    "write_run",
]

#: Name of the file. ``trainer_state.json`` takes no foreign keys.
RUN_NAME = "freezecache_run.json"
_FORMAT_VERSION = 2
_STATE_NAME = "trainer_state.json"

Number = int | float


@strict
@dataclass
class Decision:
    """What one stage did, and why. It is made once, when the stage begins; log, record, card, report and cost read it.

    Attributes:
        stage: Index of the stage in the schedule, from 0.
        start_epoch: First epoch of the stage, from 0.
        split_point: Number of frozen blocks.
        trained_from: ``"cache"``, or ``"images"`` if the frozen blocks run in every step.
        reason: Why, in one sentence.
        cache: ``"built"`` by this run, ``"found"``, or ``"none"``.
        built_from: Split point of the cache that this run's was computed from; 0 for the images; ``None`` if it built none.
        built_ahead: Split points of the caches of later stages that were built on the way.
        built_blocks: Blocks that views have passed through for all that was built, per image and view; 0 in older records.
        calibrated: Whether this run chose the codec by measurement.
        num_views: Stored views per image; 0 without a cache.
        codec: The base view's codec, as ``Codec.to_dict`` gives it.
        dtype: Dtype of the hidden states.
        calibration: How the codec of the base view was chosen, or ``None``.
        copies_calibration: The same of further views, if they have a codec of their own.
        cache_bytes: Bytes of all files of the cache.
        cache_bytes_per_image: The same per image.
        bits_per_element: All files counted.
        built_shards: Shards that this run wrote.
        distortion: What the stored states cost with this run's suffix: ``distortion``, ``agreement``, ``relative_error``,
            and the same of further views under ``copy_...``; empty if lossless.
        trainable_parameters: Number of parameters that the stage trains.
        released_optimizer_bytes: Bytes of optimizer state that freezing released.
        lr_scale: What learning rates were multiplied by, beside ``layer_decay``.
        predicted: Predicted cost over all epochs of the stage: ``cached_passes``, building included, and ``live_passes`` in block
            passes per image, a backward counting two; where ``mode="auto"`` decides, what ``stage_costs.predict_costs`` gives, too.
        build_seconds: Seconds that finding, calibrating and building took.
        token_keep: Share of the patch tokens that each step saw behind the frozen blocks, or behind the first block.
        trained_share: Share of their own weights that the other blocks trained, see ``block_weights``.
        rows_share: Share of the rows that the stage saw, see ``head_rows``.
    """

    stage: int
    start_epoch: int
    split_point: int
    trained_from: str = "images"
    reason: str = ""
    cache: str = "none"
    built_from: int | None = None
    built_ahead: list[int] = field(default_factory=list)
    built_blocks: Number = 0
    calibrated: bool = False
    num_views: int = 0
    codec: dict[str, Any] = field(default_factory=dict)
    dtype: str = ""
    calibration: dict[str, Any] | None = None
    copies_calibration: dict[str, Any] | None = None
    cache_bytes: int = 0
    cache_bytes_per_image: Number = 0.0
    bits_per_element: Number = 0.0
    built_shards: int = 0
    distortion: dict[str, int | float | None] = field(default_factory=dict)
    trainable_parameters: int = 0
    released_optimizer_bytes: int = 0
    lr_scale: Number = 1.0
    predicted: dict[str, Number] = field(default_factory=dict)
    build_seconds: Number = 0.0
    token_keep: Number = 1.0
    trained_share: Number = 1.0
    rows_share: Number = 1.0

    @property
    def has_cache(self) -> bool:
        """Whether there is a cache of this stage."""
        return self.cache != "none"

    @property
    def runs_frozen_blocks(self) -> bool:
        """Whether every training step runs the frozen blocks, since the stage trains on images."""
        return self.split_point > 0 and self.trained_from == "images"

    def add_earlier(self, earlier: "Decision") -> None:
        """Add what this run did for the stage before it was resumed; a cache that it built then, and finds now, counts as built."""
        self.build_seconds += earlier.build_seconds
        self.built_shards += earlier.built_shards
        # A resumed run makes its optimizer for what trains alone: it has nothing to release.
        self.released_optimizer_bytes = max(self.released_optimizer_bytes, earlier.released_optimizer_bytes)
        if self.cache == "found" and earlier.cache == "built":
            self.cache, self.built_from, self.calibrated = "built", earlier.built_from, earlier.calibrated
            self.built_ahead, self.built_blocks = earlier.built_ahead, earlier.built_blocks


@strict
@dataclass(frozen=True)
class Epoch:
    """One epoch, or the part of one up to a checkpoint or from there on.

    Attributes:
        stage: Index of its stage in the schedule, from 0.
        epoch: Epochs done at its end.
        images_per_second: Images trained on, by the seconds that training took.
        seconds: Training alone: no building, evaluating or saving.
        entering_seconds: Spent before it on entering a stage, which includes building its cache.
        cumulative_seconds: Training and entering of stages, from the start of the run.
    """

    stage: int
    epoch: Number
    images_per_second: Number
    seconds: Number
    entering_seconds: Number
    cumulative_seconds: Number

    @property
    def images(self) -> float:
        """Images trained on."""
        return self.images_per_second * self.seconds


@strict
@dataclass
class RunRecord:
    """A run as far as it came. Holds no paths and no images.

    Attributes:
        name: Name of the run's folder.
        complete: Whether training ended.
        model: ``class``, ``num_blocks``, ``parameters``.
        data: ``train_images``, ``image_shape``.
        freezing: ``FreezeConfig``.
        chosen: What ``schedule="auto"`` chose, and why; empty if the schedule was written out.
        asked_epochs: Epochs that the user asked for, where ``schedule="auto"`` chose another number.
        cache: ``CacheConfig`` without its folder and names.
        planned_stages: ``index``, ``start_epoch`` and ``split_point`` of each.
        decisions: What each stage did that was entered, in order.
        epochs: Each epoch that was trained, in order.
        training: Hyperparameters, as ``TrainingArguments`` names them.
        versions: Of libraries.
        device: What was trained on.
        preflight_seconds: Checks before training.
        best_step: Step of the checkpoint that was loaded at the end, if one was.
        global_step: Steps done.
        max_steps: Steps planned.
        log_history: ``Trainer``'s.
        metrics: Metrics from ``all_results.json``, for runs that have no record of their own.
        baseline: Figures of a run without freezing, if one was given; see ``report.read_baseline``.
        seeds: Other runs of the same setting, of other seeds, if any were given; see ``report.read_seeds``.
        card: Arguments of the model card, if one was made.
    """

    name: str = ""
    complete: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    freezing: dict[str, Any] = field(default_factory=dict)
    chosen: str = ""
    asked_epochs: Number | None = None
    cache: dict[str, Any] = field(default_factory=dict)
    planned_stages: list[dict[str, int]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    preflight_seconds: Number = 0.0
    best_step: int | None = None
    global_step: int = 0
    max_steps: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] | None = None
    seeds: list[dict[str, Any]] = field(default_factory=list)
    card: dict[str, Any] | None = None

    def keep_decision(self, decision: Decision) -> None:
        """Keep what a stage did, in place of what was kept of the same stage.

        If the run was resumed within the stage, the seconds and shards of earlier building are added to the decision.
        """
        others = [known for known in self.decisions if known.stage != decision.stage]
        for known in self.decisions:
            if known.stage == decision.stage and known is not decision:
                decision.add_earlier(known)
        self.decisions = sorted([*others, decision], key=lambda known: known.stage)

    def add_epoch(self, epoch: Epoch) -> None:
        """Add an epoch, or a part of one, that was just trained."""
        self.epochs = [*self.epochs, epoch]

    def decision_of(self, epoch: Epoch) -> Decision:
        """Return what the stage of an epoch did."""
        return next(decision for decision in self.decisions if decision.stage == epoch.stage)

    @property
    def is_plain(self) -> bool:
        """Whether this is a run of plain ``Trainer``, of which only its state is known."""
        return not self.model


def _finite(value: Any) -> Any:
    """Return plain JSON, with null for what JSON has no word for: a loss may be NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _finite(vars(value))
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def write_run(folder: Path, record: RunRecord) -> Path:
    """Write a record, atomically.

    Raises:
        OSError: It cannot be written.
    """
    path = folder / RUN_NAME
    document = {"format_version": _FORMAT_VERSION, **_finite(record)}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}. Restore it, or delete it to go by the checkpoints.") from error
    if not isinstance(document, dict):
        raise RunError(f"{path} holds {type(document).__name__}, not a JSON object: it is no file of a training run.")
    return document


def _progress_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decisions and epochs of a JSON object.

    Raises:
        TypeError: One of them has other fields.
        StrictDataclassFieldValidationError: A field holds a value of another type.
        ValueError: An epoch is of a stage without a decision.
    """
    decisions = [Decision(**decision) for decision in document.get("decisions", [])]
    epochs = [Epoch(**epoch) for epoch in document.get("epochs", [])]
    orphans = {epoch.stage for epoch in epochs} - {decision.stage for decision in decisions}
    if orphans:
        raise ValueError(f"it has epochs of stage {min(orphans)}, but no decision of that stage")
    return {"decisions": decisions, "epochs": epochs}


_DAMAGE = (TypeError, ValueError, AttributeError, StrictDataclassFieldValidationError)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def progress_to_dict(record: RunRecord) -> dict[str, Any]:
    """Return the decisions and epochs of a run as plain JSON, for a checkpoint to hold."""
    document: dict[str, Any] = _finite({name: getattr(record, name) for name in ("decisions", "epochs")})
    return document


def restore_progress(record: RunRecord, document: Mapping[str, Any]) -> None:
    """Put the decisions and epochs of a checkpoint into a record, in place of those it has.

    Args:
        record: The record of the run that is resumed.
        document: As ``progress_to_dict`` returned it when the checkpoint was saved.

    Raises:
        RunError: The document is damaged.
    """
    try:
        progress = _progress_of(document)
    except _DAMAGE as error:
        raise RunError(
            f"The checkpoint's account of its stages cannot be read: {_one_line(error)}. Resume from another checkpoint, or "
            "start anew."
        ) from error
    record.decisions, record.epochs = progress["decisions"], progress["epochs"]


def _record_of(path: Path) -> RunRecord:
    document = _read_json(path)
    version = document.pop("format_version", None)
    if version != _FORMAT_VERSION:
        raise RunError(
            f"{path} has format version {version!r}, this library reads {_FORMAT_VERSION}. Read it with the version of "
            "hf-freezecache that wrote it, or train again."
        )
    try:
        return RunRecord(**{**document, **_progress_of(document)})
    except _DAMAGE as error:
        raise RunError(
            f"{path} is damaged: {_one_line(error)}. Restore it, or delete it to go by the checkpoints."
        ) from error


def _last_state(folder: Path) -> Path | None:
    """Return the ``trainer_state.json`` of most steps: the folder's own, or that of a checkpoint."""
    checkpoints = [
        (int(path.name.rpartition("-")[2]), path / _STATE_NAME)
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit()
    ]
    own = folder / _STATE_NAME
    states = [own, *(path for _, path in sorted(checkpoints, reverse=True))]
    return next((path for path in states if path.is_file()), None)


def _cut(record: RunRecord, epoch: float) -> None:
    """Forget what a run did after a checkpoint that was saved at an epoch."""
    record.epochs = [known for known in record.epochs if known.epoch <= epoch + 1e-6]
    entered = {known.stage for known in record.epochs}
    record.decisions = [known for known in record.decisions if known.stage in entered]


def read_run(folder: Path) -> RunRecord:
    """Read a run: its record, and whatever its ``trainer_state.json`` or last checkpoint know beyond that.

    Runs of plain ``Trainer`` have no record, only states. A checkpoint is a run as far as it came, by its run's record.

    Raises:
        RunError: There is no such folder, or it holds no run, or one that cannot be read.
    """
    if not folder.is_dir():
        what = "is a file; give the folder of the run (output_dir)" if folder.exists() else "does not exist"
        raise RunError(f"{folder} {what}.")
    path, state_path = folder / RUN_NAME, _last_state(folder)
    if not path.is_file() and state_path is None:
        raise RunError(
            f"{folder} holds no training run: it has neither {RUN_NAME} nor {_STATE_NAME}, nor a checkpoint with one. Give "
            "the output_dir of a run that saved."
        )
    record = _record_of(path) if path.is_file() else RunRecord()
    above = folder.resolve().parent / RUN_NAME
    is_checkpoint = not path.is_file() and folder.resolve().name.startswith("checkpoint-") and above.is_file()
    if is_checkpoint:
        record = dataclasses.replace(_record_of(above), complete=False, log_history=[], global_step=0, best_step=None)
    record.name = record.name or folder.resolve().name
    state = _read_json(state_path) if state_path is not None else {}
    log_history, steps = state.get("log_history"), state.get("global_step")
    if state and not (isinstance(log_history, list) and isinstance(steps, int)):
        raise RunError(f"{state_path} has no log_history or no global_step: it is no file of Trainer.")
    if is_checkpoint:
        _cut(record, state.get("epoch") or 0.0)
    log_history, known = _finite(log_history or []), record.log_history
    # States of other runs into the same folder do not go on where this one was when it was written.
    goes_on = not record.complete and len(log_history) > len(known) and log_history[: len(known)] == _finite(known)
    if state and (record.is_plain or goes_on):
        record.log_history, record.global_step = log_history, steps or 0
        record.max_steps = int(state.get("max_steps") or 0)
        record.training.setdefault("num_train_epochs", state.get("num_train_epochs"))
        record.training.setdefault("per_device_train_batch_size", state.get("train_batch_size"))
        record.complete = any("train_runtime" in entry for entry in record.log_history)
    if record.is_plain:
        # What was evaluated after `save_state()` is in these files only.
        for name in ("eval_results.json", "all_results.json"):
            if (folder / name).is_file():
                record.metrics |= {key: v for key, v in _read_json(folder / name).items() if key.startswith("eval_")}
    return record
