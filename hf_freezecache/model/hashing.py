"""Hashes of a prefix: of its weights, and of the configuration of its model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .split import Split

__all__ = ["hash_config", "hash_prefix", "hash_tensors"]

#: Configuration entries on which the prefix does not depend: those of the head, names and versions.
_UNRELATED_CONFIG = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "classifier_dropout",
        "dtype",
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of tensors, in the order of the mapping."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_prefix(split: Split) -> str:
    """Return the SHA-256 of the parameters and buffers of a prefix."""
    return hash_tensors({**split.prefix_parameters(), **split.prefix_buffers()})


def hash_config(config: Any) -> str:
    """Return the SHA-256 of a model configuration, without entries of the head, names and versions.

    Args:
        config: A ``PretrainedConfig``, or ``None`` for a model without one, whose hash is ``"none"``.
    """
    if config is None:
        return "none"
    entries = {name: value for name, value in config.to_dict().items() if name not in _UNRELATED_CONFIG}
    entries["attn_implementation"] = getattr(config, "_attn_implementation", None)
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()
