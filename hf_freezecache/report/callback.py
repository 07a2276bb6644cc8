"""Writes the record of a run, and its report, while ``FreezeCacheTrainer`` trains."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import logging
import platform
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ..config import (
    CacheConfig,
    FreezeConfig,
)
from ..data.task import task_of
from .drawing import save_png
from .figures import figures_of
from .model_card import (
    card_arguments,
    render_card,
)
from .page import (
    PLOT_NAME,
    REPORT_FOLDER,
    write_report,
)
from .plots import pictures_of
from .record import RunRecord, write_run
from .seeds import Folders, read_baselines, read_seeds

__all__ = ["ReportCallback", "describe_run", "write_card"]

logger = logging.getLogger(__name__)

_PACKAGES = ("hf-freezecache", "torch", "transformers", "accelerate", "datasets")
_TRAINING = (
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size", "seed"),
)
#: Where a cache lies and what a user calls data and code are nobody else's business.
_PRIVATE = ("freezecache_dir", "transform_id", "dataset_id")


@functools.cache  # looking for them takes a while
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            continue
    return versions


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Turn enums and objects into what JSON can hold."""
    values = {name: getattr(value, "value", value) for name, value in settings.items()}
    return {
        name: value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in values.items()
    }


def describe_run(
    record: RunRecord, args: Any, model: Any, num_blocks: int, freeze_config: FreezeConfig, cache_config: CacheConfig
) -> None:
    """Write into a record what is known before the first step."""
    record.name = Path(args.output_dir).resolve().name
    record.model = {
        "class": type(model).__name__,
        "num_blocks": num_blocks,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    record.freezing = _plain(vars(freeze_config))
    record.cache = _plain({name: value for name, value in vars(cache_config).items() if name not in _PRIVATE})
    precision = next((name for name in ("bf16", "fp16") if getattr(args, name)), "fp32")
    record.training = _plain({name: getattr(args, name) for name in _TRAINING}) | {
        "precision": precision,
        "world_size": args.world_size,
        "load_best_model_at_end": args.load_best_model_at_end,
        "metric_for_best_model": args.metric_for_best_model,
    }
    record.versions = dict(_versions())
    on_gpu = args.device.type == "cuda"
    record.device = torch.cuda.get_device_name(args.device) if on_gpu else f"{args.device.type} {platform.machine()}"
    threads = torch.get_num_threads()
    record.device += "" if on_gpu else f", {threads} thread{'s' if threads > 1 else ''}"


def write_card(
    output_dir: Path,
    record: RunRecord,
    model: Any,
    settings: dict[str, Any],
    baseline: Folders | None = None,
    seeds: Folders = (),
) -> None:
    """Write README.md and what it is made from: the record, and the picture if matplotlib is there.

    Args:
        output_dir: The run's folder.
        record: The run's.
        model: The model, for what the settings leave open: the model it was made from, and its task.
        settings: Arguments of ``Trainer.create_model_card``, and ``model_id``.
        baseline: ``output_dir`` of a run without freezing, or of several.
        seeds: ``output_dir`` of runs that differ in the seed only.

    Raises:
        RunError: ``baseline`` or ``seeds`` hold no run, or runs that are no runs of one setting.
        OSError: A file cannot be written.
    """
    if baseline is not None:
        record.baseline = read_baselines(baseline)
    settings = {**settings, "model_name": settings["model_name"] or record.name}
    source = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if settings["finetuned_from"] is None and not Path(source).exists():
        settings["finetuned_from"] = source
    task = task_of(model)
    if settings["tasks"] is None and task is not None:
        settings["tasks"] = task.tag
    path = output_dir / "README.md"
    if path.is_file():  # as Trainer does
        tags = ModelCard.load(path, ignore_metadata_errors=True).data.get("tags")
        settings["tags"] = [
            *([settings["tags"]] if isinstance(settings["tags"], str) else settings["tags"] or []),
            *(tags or []),
        ]
    known = inspect.signature(
        card_arguments
    ).parameters  # a newer Trainer may have arguments that no card of ours shows
    record.card = card_arguments(**{name: value for name, value in settings.items() if name in known})
    if seeds:
        record.seeds = read_seeds(record, seeds)
    write_run(output_dir, record)
    figures = figures_of(record)
    try:
        picture = next((picture for picture in pictures_of(figures) if picture.name == "timeline"), None)
        if picture is not None:
            (output_dir / REPORT_FOLDER).mkdir(exist_ok=True)
            save_png(picture, output_dir / PLOT_NAME)
    except ImportError as error:
        picture = None
        logger.warning("The model card shows no plot (%s): pip install 'hf-freezecache[report]'.", error)
    path.write_text(render_card(figures, record.card, PLOT_NAME if picture is not None else None), encoding="utf-8")


class ReportCallback(TrainerCallback):  # type: ignore[misc]
    """Writes ``freezecache_run.json`` into ``output_dir`` at each stage and checkpoint, and a report when training ends.

    ``FreezeCacheTrainer`` adds one by itself. It writes where the run saves: not under ``save_strategy="no"``, unless
    ``always``; and on the process of rank 0 alone. The report, ``freezecache_report/report.html`` and its pictures, needs
    matplotlib; without it a line is logged. ``trainer.remove_callback(ReportCallback)`` turns all of it off.

    Args:
        record: The run's.
        always: Write also where the run saves nothing.
    """

    def __init__(self, record: RunRecord | None = None, always: bool = False) -> None:
        self.record = record or RunRecord()
        self.always = always
        self._trained = False

    def _writes(self, args: Any, state: Any) -> bool:
        return state.is_world_process_zero and (self.always or args.save_strategy != SaveStrategy.NO)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the run as unfinished."""
        self._trained, self.record.complete = False, False
        self.record.max_steps = state.max_steps

    def stage_began(self, args: Any, state: Any) -> None:
        """Write the record, which holds the decision of the stage. The trainer calls this; ``Trainer`` has no such event."""
        if self._writes(args, state):
            self.write(Path(args.output_dir), state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the record as far as the checkpoint: a run that is killed later has its epochs."""
        if self._writes(args, state):
            self.write(Path(args.output_dir), state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write record and report."""
        self._trained, self.record.complete = True, state.global_step >= state.max_steps or control.should_training_stop
        if args.load_best_model_at_end:
            self.record.best_step = getattr(state, "best_global_step", None)
        if self._writes(args, state):
            self.write(Path(args.output_dir), state)
            self.draw(Path(args.output_dir))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write both again with what was measured once training had ended."""
        if self._trained and self._writes(args, state):
            self.write(Path(args.output_dir), state)
            self.draw(Path(args.output_dir))

    def write(self, output_dir: Path, state: Any) -> None:
        """Write the record of a run as far as it came; failing to is no reason to stop training."""
        self.record.log_history, self.record.global_step = list(state.log_history), state.global_step
        try:
            write_run(output_dir, self.record)
        except OSError as error:
            logger.warning("The record of this run could not be written: %s", error)

    def draw(self, output_dir: Path) -> None:
        """Draw the report, or say why not."""
        try:
            page = write_report(figures_of(self.record), output_dir)
        except ImportError as error:
            logger.warning(
                "No report was drawn (%s). After pip install 'hf-freezecache[report]': hf-freezecache report %s",
                error,
                output_dir,
            )
        except OSError as error:
            logger.warning("The report of this run could not be written: %s", error)
        else:
            logger.info("Report of the run: %s", page)
