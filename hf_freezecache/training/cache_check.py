"""Checks a cache that is there against what its rows, its prefix and this run's suffix give now."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.index import CODEC_NAME, COPIES_NAME, atomic_write
from ..cache.reader import CacheReader
from ..compression.base_view import CodecChooser
from ..compression.remeasure import Looks, Pairs, look, measure, read_pairs
from ..data.collators import collate_cached
from ..data.layout import ChunkLayout
from ..data.seeding import preserved_random_state
from ..data.views import same_examples
from ..dataset import CachedDataset
from ..errors import CacheMismatchError
from ..model.hashing import hash_config, hash_suffix, hash_tensors
from ..model.split import Split
from ..model.threads import one_thread_if_small
from .remembered import Remembered

__all__ = ["content_name", "keep_measured", "measure_distortion", "spot_check"]

logger = logging.getLogger(__name__)

#: A cache calibrated with another suffix may exceed its budget by this factor before a warning.
_BUDGET_MARGIN = 1.5
#: Images of each codec that it is measured on first; all of them only where these would give a warning. Eight are too few: features
#: spread less over them, and all were measured in vain (DeiT-Tiny with a new head, caltech50).
_FEW = 16
#: What a measurement gives.
_FIGURES = ("distortion", "agreement", "relative_error")
#: Suffixes whose measurement is kept beside a cache.
_KEPT = 64
#: Most bytes of states that stay in memory for other suffixes over the same cache.
_PAIRS_BYTES = 2**26

_PAIRS: Remembered[Pairs] = Remembered(2)


def measure_distortion(chooser: CodecChooser, split: Split, reader: CacheReader) -> dict[str, float | None]:
    """Measure a lossy cache with today's suffix, since it may have been calibrated with another head.

    Args:
        chooser: Measures.
        split: The model, split where the cache was made.
        reader: The cache.

    Returns:
        ``distortion``, ``agreement`` and ``relative_error``, and the same of further views under ``copy_...`` if these have
        a codec of their own. Empty for a lossless cache.

    Raises:
        DataError: The model's output is not finite.
    """
    reports = {"": reader.index.calibration, "copy_": reader.index.copies_calibration}
    if not any(reports.values()):
        return {}
    measured = _notes(reader).get(_name_of(split, reader, chooser), {})
    if not all(prefix + figure in measured for prefix, report in reports.items() if report for figure in _FIGURES):
        with preserved_random_state():
            pairs = _pairs(chooser, split, reader)
            measured = measure(pairs, _looks(chooser, split, reader, pairs), chooser.data.has_classes)
            if any(_excess(measured, prefix, report) > _BUDGET_MARGIN for prefix, report in reports.items()):
                pairs = read_pairs(chooser, split, reader)
                measured = measure(pairs, look(chooser, split, pairs), chooser.data.has_classes)
        keep_measured(chooser, split, reader, measured)
    for prefix, report in reports.items():
        if not report:
            continue
        distortion, budget = measured[prefix + "distortion"], report.get("budget")
        subject = "views beyond the first" if prefix else "its states"
        logger.info(
            "With this run's suffix the distortion of %s is %.3g, relative error %.3f.",
            subject,
            distortion,
            measured[prefix + "relative_error"],
        )
        if _excess(measured, prefix, report) > _BUDGET_MARGIN:
            logger.warning(
                "The cache %s was calibrated with another suffix (distortion of %s %.3g): with this one it is %.3g, over the "
                "budget of %g. Delete the folder to build a finer one.",
                reader.directory,
                subject,
                report["distortion"],
                distortion,
                budget,
            )
    return measured


def _pairs(chooser: CodecChooser, split: Split, reader: CacheReader) -> Pairs:
    """Return what the first images are measured by. Trainers of a sweep have heads of their own, but these are the same."""
    name = content_name(reader), chooser.config.calibration_samples, chooser.config.num_views
    pairs = _PAIRS.get(name)
    if pairs is None:
        pairs = read_pairs(chooser, split, reader, _FEW)
        if sum(sample.states.nbytes + stored.nbytes for sample, stored in pairs.values()) <= _PAIRS_BYTES:
            _PAIRS.keep(name, pairs)
    return pairs


@dataclass(frozen=True)
class _Seen:
    """What the blocks behind a split make of the first images.

    Attributes:
        head: Name of the ``nn.Linear`` that makes outputs of features.
        beside: A name of all that the features depend on, see ``_beside``.
        features: Of exact and of stored states, as ``Looks`` names them.
    """

    head: str
    beside: str
    features: dict[str, tuple[Tensor, Tensor]]


_SEEN: Remembered[_Seen] = Remembered(2)


def _looks(chooser: CodecChooser, split: Split, reader: CacheReader, pairs: Pairs) -> Looks:
    """Return what the suffix makes of the first images. Of trainers whose heads alone differ, the blocks run for the first."""
    name = content_name(reader), chooser.config.calibration_samples, chooser.config.num_views
    seen, modules = _SEEN.get(name), dict(split.model.named_modules())
    head = None if seen is None else modules.get(seen.head)
    if seen is not None and isinstance(head, nn.Linear) and seen.beside == _beside(split, seen.head):
        return {
            key: ((_through(chooser, head, exact), exact), (_through(chooser, head, stored), stored))
            for key, (exact, stored) in seen.features.items()
        }
    looks = look(chooser, split, pairs)
    found = _head_of(chooser, split, *next(iter(looks.values()))[0])
    if found is not None:
        features = {key: (exact[1], stored[1]) for key, (exact, stored) in looks.items()}
        _SEEN.keep(name, _Seen(found, _beside(split, found), features))
    return looks


def _head_of(chooser: CodecChooser, split: Split, outputs: Tensor, features: Tensor) -> str | None:
    """Return the name of the ``nn.Linear`` that makes these outputs of these features; ``None`` if no single one does.

    It is found by trying: what else comes behind the features, a scale or a second head say, would show.
    """
    inside = {module for part in (*split.stem, *split.blocks) for module in part.modules()}
    sizes = features.shape[-1], outputs.shape[-1]
    for name, module in split.model.named_modules():
        if (
            isinstance(module, nn.Linear)
            and module not in inside
            and (module.in_features, module.out_features) == sizes
            and torch.allclose(_through(chooser, module, features), outputs, rtol=1e-4, atol=1e-5)
        ):
            return name
    return None


def _through(chooser: CodecChooser, head: nn.Module, features: Tensor) -> Tensor:
    return chooser.run(head, input=features).cpu()  # type: ignore[no-any-return]


def _beside(split: Split, head: str) -> str:
    """Return a name of what the features behind a split depend on, but for the states: all weights there but those of the head.

    The precision of the run is in the fingerprint of the cache.
    """
    model = split.model
    prefix = split.prefix_parameters().keys() | split.prefix_buffers().keys()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    others = {key: value for key, value in named.items() if key not in prefix and not key.startswith(f"{head}.")}
    parts = [type(model), hash_config(getattr(model, "config", None)), hash_tensors(others)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def content_name(reader: CacheReader) -> str:
    """Return a name of a cache's folder, fingerprint and bytes."""
    index = reader.index
    files = sorted((name, record.sha256) for name, record in index.files.items())
    return hashlib.sha256(repr((str(reader.directory), sorted(index.fingerprint.items()), files)).encode()).hexdigest()


def keep_measured(chooser: CodecChooser, split: Split, reader: CacheReader, measured: dict[str, float | None]) -> None:
    """Write down what was measured of a lossy cache, so that a later run with this suffix need not measure it.

    Args:
        chooser: What measured it.
        split: The model, split where the cache was made.
        reader: The cache.
        measured: What ``measure_distortion`` returns.
    """
    if not measured:
        return
    notes = {**_notes(reader), _name_of(split, reader, chooser): measured}
    # A folder that can only be read does not matter.
    with suppress(OSError), atomic_write(_notes_path(reader)) as file:
        file.write(json.dumps(dict(list(notes.items())[-_KEPT:])).encode())


def _excess(measured: dict[str, float | None], prefix: str, report: dict[str, Any] | None) -> float:
    """Return by which factor a distortion exceeds its budget; 0 where there is none."""
    distortion, budget = measured.get(prefix + "distortion"), (report or {}).get("budget")
    return 0.0 if distortion is None or budget is None else distortion / budget


def _name_of(split: Split, reader: CacheReader, chooser: CodecChooser) -> str:
    """Return a name of all that a measurement depends on, beside the cache's fingerprint: the suffix, codecs and images."""
    codecs = [reader.index.files[name].sha256 for name in (CODEC_NAME, COPIES_NAME) if name in reader.index.files]
    parts = [hash_suffix(split), *codecs, chooser.config.calibration_samples, chooser.config.num_views]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _notes_path(reader: CacheReader) -> Path:
    directory = Path(reader.directory)
    return directory.with_name(f".{directory.name}.measured.json")


def _notes(reader: CacheReader) -> dict[str, dict[str, float | None]]:
    """Return what was measured of a cache before, by name; nothing where that cannot be read."""
    try:
        found = json.loads(_notes_path(reader).read_bytes())
        return {
            str(name): {str(key): None if value is None else float(value) for key, value in measured.items()}
            for name, measured in found.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _check_number_of_rows(reader: CacheReader, layout: ChunkLayout) -> None:
    """Refuse a cache of more or fewer rows than the data set has now: it goes by a name of the user's, ``dataset_id``.

    Args:
        reader: The cache.
        layout: Of the run.

    Raises:
        CacheMismatchError: The numbers differ.
    """
    stored, rows = reader.layout.total_samples, layout.total_samples
    if stored != rows:
        raise CacheMismatchError(
            f"The cache {reader.directory} is of {stored} rows, and the data set has {rows} under the same dataset_id. Give it another "
            "dataset_id, or delete the folder to rebuild."
        )


def spot_check(
    chooser: CodecChooser, split: Split, reader: CacheReader, mixed_precision: str, num_samples: int = 4
) -> None:
    """Compute a few samples of a cache again: the fingerprint cannot see all that data pass through.

    The rows are drawn anew each time, so that what one run misses the next may find. The main process calls this.

    Args:
        chooser: Gives the data, and runs the prefix.
        split: The model, split where the cache was made.
        reader: The cache.
        mixed_precision: The run's autocast: ``"no"``, ``"bf16"`` or ``"fp16"``.
        num_samples: Samples to compute, in the views in turn.

    Raises:
        CacheMismatchError: The cache does not hold what its rows give now.
    """
    _check_number_of_rows(reader, chooser.at(split.split_point).data.layout)
    data, available = chooser.data, reader.available_rows()
    if not len(available):
        return
    # Seeded by the operating system: neither the run's seeds nor its random states may decide.
    generator, views = np.random.default_rng(), reader.selection.chosen_views(reader.index)
    rows = generator.choice(available, min(num_samples, len(available)), replace=False).tolist()
    first = int(generator.integers(len(views)))
    keys = [(row, views[(first + position) % len(views)]) for position, row in enumerate(rows)]
    with preserved_random_state(), one_thread_if_small(split.model):
        batch = data.collate([data.views[key] for key in keys])
        inputs = {name: batch[name] for name in batch.keys() & {"pixel_values", *data.prefix_inputs}}
        states = chooser.run(split.prefix, **inputs).to("cpu")
        exact, narrow = states.float(), mixed_precision in ("bf16", "fp16") or states.dtype.itemsize < 4
    stored = collate_cached(CachedDataset(reader).__getitems__(keys))
    difference = exact - stored["hidden_states"].float()
    # bf16 rounds to 8 bits, and other batch shapes and kernels round otherwise.
    tolerance = 0.05 if narrow else 1e-3
    if reader.views.lossless:
        error, limit = float(difference.abs().max()), tolerance * float(exact.abs().max())
    else:
        # Other images may fare somewhat worse than those that calibration measured.
        copies = reader.index.copies_calibration
        reports = [reader.index.calibration if view == 0 or copies is None else copies for _, view in keys]
        limits = torch.tensor([1.5 * float((report or {}).get("worst_error", 0.0)) + tolerance for report in reports])
        errors = (difference.square().mean((1, 2)) / exact.square().mean((1, 2))).sqrt()
        worst = int((errors / limits).argmax())
        error, limit = float(errors[worst]), float(limits[worst])
    extras = [name for name in stored if name != "hidden_states" and not same_examples(stored[name], batch[name])]
    if not error <= limit or extras:
        raise CacheMismatchError(
            f"Cache {reader.directory} has the right fingerprint but not what rows {rows} give now (hidden states "
            f"differ by {error:.3g}, at most {limit:.3g} expected; differing extras: {extras or 'none'}). "
            "Code of the transform, the data set or the model has changed. Use another freezecache_dir, or delete the "
            "folder to rebuild."
        )
