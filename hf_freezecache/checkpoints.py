"""What a checkpoint holds beside ``Trainer``'s own files, and restoring its weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from .errors import UnsupportedSetupError

__all__ = ["STATE_NAME", "load_stage", "restore_weights", "save_stage"]

logger = logging.getLogger(__name__)

#: Written into every checkpoint; ``trainer_state.json`` takes no foreign keys.
STATE_NAME = "freezecache_state.json"


def save_stage(checkpoint: Path, split_point: int) -> None:
    """Write the number of frozen blocks into a checkpoint folder, which is made if need be."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / STATE_NAME).write_text(json.dumps({"format_version": 1, "split_point": split_point}) + "\n")


def load_stage(checkpoint: Path) -> int:
    """Return the number of blocks that were frozen when a checkpoint was saved; 0 for one of plain ``Trainer``.

    Raises:
        UnsupportedSetupError: The file is there and cannot be read.
    """
    path = checkpoint / STATE_NAME
    if not path.is_file():
        logger.warning("%s has no %s: taking it for a checkpoint of plain training.", checkpoint, STATE_NAME)
        return 0
    try:
        return int(json.loads(path.read_text())["split_point"])
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedSetupError(
            f"{path} cannot be read ({error!r}). Resume from another checkpoint, or start anew."
        ) from error


def restore_weights(checkpoint: Path, model: nn.Module) -> bool:
    """Load a checkpoint's weights strictly, by the names ``from_pretrained`` understands.

    ``save_pretrained`` writes ViT-like models under legacy names. ``Trainer`` reads them back with
    ``load_state_dict(strict=False)``, which restores almost nothing (transformers issue 43701).

    Returns:
        Whether it was done. Models that are no ``PreTrainedModel``, and folders without a whole model (adapters, say),
        are left to ``Trainer``.

    Raises:
        RuntimeError: The checkpoint is that of another model.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    if not any(any(checkpoint.glob(pattern)) for pattern in ("model*.safetensors", "pytorch_model*.bin")):
        return False
    path = checkpoint / "model.safetensors"
    if path.is_file():
        tensors = load_file(path)
        if tensors.keys() == model.state_dict().keys():  # saved under today's names
            model.load_state_dict(tensors, strict=True)
            return True
    with torch.random.fork_rng(devices=[]):
        # fp32 holds what any 16-bit file holds; each parameter is cast to its own dtype on copying.
        restored, info = type(model).from_pretrained(
            checkpoint, config=model.config, dtype=torch.float32, output_loading_info=True
        )
    wrong = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise RuntimeError(
            f"Checkpoint {checkpoint} does not hold the weights of this {type(model).__name__}: "
            + ", ".join(f"{name.replace('_', ' ')} {keys[:5]}" for name, keys in wrong.items() if keys)
        )
    model.load_state_dict(restored.state_dict(), strict=True)
    return True
