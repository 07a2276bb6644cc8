"""Hashes of a prefix: its weights and its configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["hash_prefix", "hash_tensors"]

#: Configuration entries that say nothing about the prefix: the head, names, versions.
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
    """SHA-256 over names, dtypes, shapes and bytes, in the given order."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_prefix(split: Any) -> str:
    """SHA-256 over the weights of the prefix of a ``Split``: what its hidden states depend on beside configuration and dtype."""
    return hash_tensors({**split.prefix_parameters(), **split.prefix_buffers()})


def hash_config(config: Any) -> str:
    """SHA-256 over a model configuration without what concerns only head, names and versions."""
    if config is None:
        return "none"
    entries = {name: value for name, value in config.to_dict().items() if name not in _UNRELATED_CONFIG}
    entries["attn_implementation"] = getattr(config, "_attn_implementation", None)
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()
