"""Other runs of one setting, read from their folders: those of other seeds, and the runs of a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RunError
from .figures import figures_of, read_baseline
from .record import RunRecord, read_run
from .spread import run_of

__all__ = ["Folders", "read_baselines", "read_seeds"]

#: One folder or several.
Folders = str | Path | Sequence[str | Path]

#: Fields of a record that runs of one setting have in common.
_SAME = ("model", "data", "freezing", "cache", "training", "planned_stages", "max_steps")
#: What a card names of data and model.
_SAME_ON_CARDS = ("finetuned_from", "dataset_tags", "dataset", "dataset_args")
_OWN = {"seed"}


def _listed(folders: Folders) -> list[Path]:
    return [Path(folder) for folder in ([folders] if isinstance(folders, (str, Path)) else folders)]


def _differences(mine: Any, theirs: Any, name: str) -> list[str]:
    """Name each setting in which two records differ, with both values."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        found = []
        for key in [*mine, *(key for key in theirs if key not in mine)]:
            if key not in _OWN:
                found += _differences(mine.get(key), theirs.get(key), f"{name}.{key}")
        return found
    return [] if mine == theirs else [f"{name} ({theirs!r} there, {mine!r} here)"]


def _check_same_setting(record: RunRecord, other: RunRecord, folder: Path) -> None:
    found = [words for name in _SAME for words in _differences(getattr(record, name), getattr(other, name), name)]
    if record.card and other.card:
        mine, theirs = ({name: record_.card.get(name) for name in _SAME_ON_CARDS} for record_ in (record, other))  # type: ignore[union-attr]
        found += _differences(mine, theirs, "card")
    if found:
        raise RunError(
            f"{folder} differs from this run in more than the seed: {'; '.join(found)}. Give runs of the same settings, "
            "model and data."
        )


def _as_run(record: RunRecord, folder: Path) -> dict[str, Any]:
    figures = figures_of(record)
    if figures["result"] is None:
        raise RunError(
            f"{folder} was not evaluated, so it has no score to take the mean of. Evaluate it, or leave it out."
        )
    return run_of(record.name, record.training.get("seed"), figures["result"], figures["cost"]["whole_seconds"])


def read_seeds(record: RunRecord, folders: Folders) -> list[dict[str, Any]]:
    """Return what is kept of other runs of a run's setting, for ``RunRecord.seeds``.

    Args:
        record: The run's.
        folders: ``output_dir`` of each of the others. Their records and this one's may differ in the seed only.

    Raises:
        RunError: A folder holds no run, or one that did not end, was not evaluated, was evaluated on another number of
            images, has a seed that was there before, or differs in model, data or settings; the message names what differs.
    """
    runs, places = [], {record.training.get("seed"): "this run"}
    own = figures_of(record)["result"]
    for folder in _listed(folders):
        other = read_run(folder)
        if other.is_plain:
            raise RunError(
                f"{folder} is a run without a record: its seed and settings are not known. Train it by this trainer."
            )
        if not other.complete:
            raise RunError(
                f"Training did not end in {folder}, so it is no run of the same length. Resume it, or leave it out."
            )
        _check_same_setting(record, other, folder)
        seed = other.training.get("seed")
        if seed in places:
            raise RunError(f"{folder} has the seed {seed}, as {places[seed]} has. Give runs of other seeds, each once.")
        places[seed] = str(folder)
        run = _as_run(other, folder)
        if own and own["images"] and run["images"] and own["images"] != run["images"]:
            raise RunError(
                f"{folder} was evaluated on {run['images']:,} images, this run on {own['images']:,}. Evaluate both on the same."
            )
        runs.append(run)
    return runs


def read_baselines(folders: Folders) -> dict[str, Any]:
    """Return the figures of a baseline, as ``read_baseline`` does; of several runs, those of the first and ``runs``.

    Args:
        folders: ``output_dir`` of one run, or of several of the same setting. Plain ``Trainer`` records no seed, so seeds are
            not compared.

    Raises:
        RunError: No folder is given; one holds no run; or the runs differ in epochs, number of images or batch size.
    """
    places = _listed(folders)
    if not places:
        raise RunError("No folder of a baseline is given. Give the output_dir of a run without freezing.")
    if len({place.resolve() for place in places}) < len(places):
        raise RunError(f"A run of the baseline is given twice: {', '.join(map(str, places))}. Give each once.")
    baselines = [read_baseline(place) for place in places]
    first = baselines[0]
    for place, other in zip(places, baselines, strict=True):
        found = []
        for name in ("epochs", "frozen_blocks", "train_images", "batch_size"):
            found += _differences(first[name], other[name], name)
        if found:
            raise RunError(
                f"{place} is no run of the setting of {places[0]}: {'; '.join(found)}. Give runs of one setting."
            )
        if len(places) > 1 and other["result"] is None:
            raise RunError(f"{place} was not evaluated, so it has no score to take the mean of. Leave it out.")
    if len(places) > 1:
        first["runs"] = [run_of(other["run"], None, other["result"], other["seconds"]) for other in baselines]
    return first
