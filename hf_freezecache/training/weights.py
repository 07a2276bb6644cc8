"""Restores the weights of a checkpoint into the live model, whatever names they were saved under.

``save_pretrained`` writes many models under other names than those of their ``state_dict``: it reverts the renaming that
``from_pretrained`` does. ``Trainer`` reads such a file back with ``load_state_dict(strict=False)``, which restores almost
nothing (transformers issue 43701). Making a second model with ``from_pretrained`` would restore unmodified models only. So
the renaming of saving is run for the live model, and inverted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import load_state_dict, remove_tied_weights_from_state_dict

from ..errors import UnsupportedSetupError

__all__ = ["check_saving", "restore_weights"]

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]
#: Live key -> tensor of the file, and the names in the file that were used.
Found = tuple[dict[str, Tensor], set[str]]
#: Weights of a whole model, in the order in which ``from_pretrained`` looks for them.
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
#: What ``save_pretrained`` puts before the names of adapters.
_ADAPTER_PREFIX = "base_model.model."


# ---- Files ----


def _weight_files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the files of the first of these names that is in a folder; for an index, those it lists."""
    for name in names:
        path = folder / name
        if path.is_file():
            if not name.endswith(".index.json"):
                return [path]
            return [folder / shard for shard in sorted(set(json.loads(path.read_bytes())["weight_map"].values()))]
    return []


def _read(files: list[Path]) -> dict[str, Tensor]:
    """Return name -> tensor of all files, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        tensors |= load_state_dict(str(path))  # nothing but tensors, of .bin files too
    return tensors


# ---- Names ----


def _live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of ``state_dict``: parameters and persistent buffers, under the model's own keys."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _revert(model: nn.Module, tensors: Tensors) -> dict[str, Tensor]:
    """Rename and convert tensors as ``save_pretrained`` does."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return reverted


def _saved_names(model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return how ``save_pretrained`` names the live weights; their values are not read.

    Returns:
        Name in the file -> live key, for weights that are renamed at most; and name -> tensor without values, for those
        that are converted, such as a fused projection.
    """
    blank = {name: torch.empty_like(value, device="meta") for name, value in _live_tensors(model).items()}
    keys = {id(value): name for name, value in blank.items()}
    saved = _revert(model, blank)
    renamed = {name: keys[id(value)] for name, value in saved.items() if id(value) in keys}
    return renamed, {name: value for name, value in saved.items() if name not in renamed}


def _by_live_names(model: nn.Module, tensors: Tensors) -> Found:
    """Take the names in the file for the model's own keys."""
    return _renamed({name: name for name in _live_tensors(model)}, tensors)


def _renamed(names: Mapping[str, str], tensors: Tensors) -> Found:
    """Rename by name in the file -> live key."""
    used = names.keys() & tensors.keys()
    return {names[name]: tensors[name] for name in used}, used


def _by_saving(model: nn.Module, tensors: Tensors) -> Found:
    """Invert what ``save_pretrained`` does for the live model."""
    renamed, converted = _saved_names(model)
    found, used = _renamed(renamed, tensors)
    fused = {name: tensors[name] for name in converted.keys() & tensors.keys()}
    if not fused:
        return found, used
    live = _live_tensors(model)
    rest = {name: live[name] for name in live.keys() - set(renamed.values())}
    apart = _unconverted(model, rest, fused)
    return found | apart, used | (fused.keys() if apart else set())


def _unconverted(model: nn.Module, live: Tensors, tensors: Tensors) -> dict[str, Tensor]:
    """Invert conversions that move elements, such as splitting, fusing and transposing.

    The number of each element is sent through the conversion in its place, which tells where it goes.

    Args:
        model: The model.
        live: Live weights that are converted.
        tensors: What the file holds of them.
    """
    starts, total = {}, 0
    for name, value in live.items():
        starts[name], total = total, total + value.numel()
    numbers = {
        name: torch.arange(start, start + live[name].numel()).view(live[name].shape) for name, start in starts.items()
    }
    places = _revert(model, numbers)
    dtype = torch.bool
    for value in tensors.values():
        dtype = torch.promote_types(dtype, value.dtype)
    values, seen = torch.zeros(total, dtype=dtype), torch.zeros(total, dtype=torch.bool)
    for name, value in tensors.items():
        place = places.get(name)
        if place is not None and place.dtype == torch.int64 and place.shape == value.shape:
            values[place.flatten()] = value.flatten().to(dtype)
            seen[place.flatten()] = True
    found = {}
    for name, start in starts.items():
        span = slice(start, start + live[name].numel())
        if seen[span].all():
            found[name] = values[span].view(live[name].shape)
    again = _revert(model, found)  # a conversion that also computes is not inverted by moving elements back
    if all(name in again and torch.equal(again[name], value.to(dtype)) for name, value in tensors.items()):
        return found
    return {}


def _by_saving_anew(model: nn.Module, tensors: Tensors) -> Found:
    """As ``_by_saving``, for a model that was not loaded: the file may be that of one made from its configuration."""
    with _without(model, "_weight_conversions"):
        return _by_saving(model, tensors)


@contextmanager
def _without(owner: Any, name: str) -> Iterator[None]:
    """Take an attribute of an object away for a while, if it has it."""
    absent = object()
    value = vars(owner).pop(name, absent)
    try:
        yield
    finally:
        if value is not absent:
            vars(owner)[name] = value


def _by_loading(model: nn.Module, tensors: Tensors) -> Found:
    """Rename as ``from_pretrained`` does: also names of older checkpoints, and with or without the base model's prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    live = _live_tensors(model)
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    names = {}
    for name in sorted(tensors):
        renamed, _ = rename_source_key(name, renamings, [], model.base_model_prefix, live)
        names[name] = renamed if renamed in live else name
    return _renamed({name: key for name, key in names.items() if key in live}, tensors)


def _by_adapter(model: nn.Module, tensors: Tensors) -> dict[str, Tensor]:
    """Invert how ``save_pretrained`` names the weights of an adapter that was added to the model."""
    keys = {_place(value): name for name, value in _live_tensors(model).items()}
    saved = model.get_adapter_state_dict()  # type: ignore[operator]
    names = {f"{_ADAPTER_PREFIX}{name}": keys.get(_place(value)) for name, value in saved.items()}
    return {key: value for name, value in tensors.items() if (key := names.get(name)) is not None}


#: In the order in which they are tried. The first is that of ``Trainer``.
_WAYS: tuple[Callable[[nn.Module, Tensors], Found], ...] = (
    _by_live_names,
    _by_saving,
    _by_saving_anew,
    _by_loading,
)


# ---- Restoring ----


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a tensor lies; tied weights lie in one place."""
    return tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


@dataclass(frozen=True)
class _Match:
    """Weights of a file and the live keys that they belong to.

    Attributes:
        found: Live key -> tensor of the file.
        missing: Live keys that get nothing, or a tensor of another shape.
        unused: Number of tensors of the file that belong to no live key.
    """

    found: dict[str, Tensor]
    missing: tuple[str, ...]
    unused: int

    @property
    def flaws(self) -> tuple[int, int]:
        """What is wrong with it; smaller is better."""
        return len(self.missing), self.unused


def _unrestored(live: Tensors, model: nn.Module, restored: Iterable[str]) -> tuple[str, ...]:
    """Return the live keys of weights that lie in no place of these keys, and that ``save_pretrained`` would save."""
    places = {_place(live[name]) for name in restored}
    not_saved = _not_saved(model)
    return tuple(name for name, value in live.items() if _place(value) not in places and name not in not_saved)


def _not_saved(model: nn.Module) -> set[str]:
    """Return the live keys that ``save_pretrained`` leaves out."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def _best_match(model: nn.Module, tensors: Tensors) -> tuple[_Match, bool]:
    """Return the way of naming that restores most, and whether it is that of ``Trainer``."""
    live, matches = _live_tensors(model), []
    for way in _WAYS:
        try:
            found, used = way(model, tensors)
        except Exception as error:  # whatever a version's conversions raise; another way may do
            logger.debug("%s cannot name the weights: %r", way.__name__, error)
            continue
        fitting = (name for name, value in found.items() if value.shape == live[name].shape)
        matches.append(_Match(found, _unrestored(live, model, fitting), len(tensors) - len(used)))
        if matches[-1].flaws == (0, 0):
            break
    best = min(matches, key=lambda match: match.flaws)
    return best, best is matches[0]


def restore_weights(checkpoint: Path, model: nn.Module, *, strict: bool = False) -> bool:
    """Load a checkpoint's weights into the live model, under its own keys.

    Heads that were replaced, blocks that were removed, parameters that were added and layers that were injected are restored
    like all others, if they were there when the checkpoint was saved. Tied weights are restored through one of their names.

    Args:
        checkpoint: Its folder.
        model: The model, not wrapped.
        strict: Refuse a checkpoint that lacks weights of the model. Else a warning names them, as ``Trainer``'s does.

    Returns:
        Whether it was done. Models that are no ``PreTrainedModel``, folders without weights of the whole model (adapters
        of a ``PeftModel``, say), and what ``Trainer``'s way restores as well, are left to ``Trainer``.

    Raises:
        UnsupportedSetupError: The checkpoint lacks weights of this model, under ``strict``.
        RuntimeError: A tensor has another shape than its weight, as ``load_state_dict`` says.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    if getattr(model, "_hf_peft_config_loaded", False):
        files = _weight_files(checkpoint, _ADAPTER_FILES)
        if files:
            model.load_state_dict(_by_adapter(model, _read(files)), strict=False)
        return bool(files)
    files = _weight_files(checkpoint, _FILES)
    if not files:
        return False
    tensors = _read(files)
    match, plain = _best_match(model, tensors)
    if strict and match.missing:
        raise UnsupportedSetupError(
            f"Checkpoint {checkpoint} does not hold the weights of this {type(model).__name__}: {len(match.missing)} of them "
            f"are missing, or have another shape: {_some(match.missing)}. Resume with the model that was trained, changed in "
            "the same way, or from another checkpoint."
        )
    if plain and match.flaws != (0, 0):
        return False  # Trainer does the same, and names what is missing
    model.load_state_dict(match.found, strict=False)
    if match.missing:
        logger.warning(
            "Checkpoint %s lacks %d weights of this %s, which keep their values: %s.",
            checkpoint,
            len(match.missing),
            type(model).__name__,
            _some(match.missing),
        )
    if match.unused:
        logger.warning(
            "%d tensors of checkpoint %s belong to no weight of this %s.",
            match.unused,
            checkpoint,
            type(model).__name__,
        )
    if _not_saved(model):
        model.tie_weights()
    return True


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def check_saving(model: nn.Module) -> None:
    """Name the weights of a model as a checkpoint will, and see whether they could be restored. No weight is read.

    A warning names weights that a checkpoint will lack: two of them are saved under one name.

    Raises:
        UnsupportedSetupError: ``save_pretrained`` would fail.
    """
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        return
    if type(model).save_pretrained is not PreTrainedModel.save_pretrained:
        return  # it names them in a way of its own
    live = _live_tensors(model)
    try:
        remove_tied_weights_from_state_dict(dict(live), model)
        renamed, converted = _saved_names(model)
    except Exception as error:
        raise UnsupportedSetupError(
            f"The weights of this {type(model).__name__} cannot be named as in a checkpoint: {type(error).__name__}: {error}. "
            "So no checkpoint could be saved. Undo the change of the model that this names, or set save_strategy='no'."
        ) from error
    missing = _unrestored(live, model, renamed.values())
    if converted and sum(live[name].numel() for name in missing) == sum(value.numel() for value in converted.values()):
        return
    if missing:
        logger.warning(
            "Checkpoints of this %s will lack %d of its weights, which save_pretrained saves under names of others: %s. Give "
            "these modules other names, or load_best_model_at_end and a resume leave them as they are.",
            type(model).__name__,
            len(missing),
            _some(missing),
        )
