"""Hashes of prefix and suffix: of their weights, and of the configuration of the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .split import Split

__all__ = ["hash_config", "hash_prefix", "hash_suffix", "hash_tensors"]

#: Configuration entries on which a prefix in eval mode does not depend: those of the head and of outputs, names and versions.
_UNRELATED_CONFIG = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "classifier_dropout",
        "dtype",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "label2id",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_return_dict",
    }
)
#: Parts of names of entries that act in train mode only: ``attention_probs_dropout_prob``, ``drop_path_rate``.
_TRAINING_ONLY = (
    "dropout",
    "drop_path",
    "drop_prob",
    "drop_rate",
    "droppath",
    "layerdrop",
    "layer_drop",
    "stochastic_depth",
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


def hash_suffix(split: Split) -> str:
    """Return the SHA-256 of the parameters and buffers that are not those of the prefix."""
    prefix = split.prefix_parameters().keys() | split.prefix_buffers().keys()
    named = {**dict(split.model.named_parameters()), **dict(split.model.named_buffers())}
    return hash_tensors({name: tensor for name, tensor in named.items() if name not in prefix})


def _related(entries: Any) -> Any:
    """Return the entries of a configuration, and of those inside it, that the prefix depends on."""
    if not isinstance(entries, dict):
        return entries
    return {
        name: _related(value)
        for name, value in entries.items()
        if name not in _UNRELATED_CONFIG and not any(part in str(name).lower() for part in _TRAINING_ONLY)
    }


def hash_config(config: Any) -> str:
    """Return the SHA-256 of a model configuration, without entries that a prefix in eval mode does not depend on.

    Args:
        config: A ``PretrainedConfig``, or ``None`` for a model without one, whose hash is ``"none"``.
    """
    if config is None:
        return "none"
    entries = _related(config.to_dict())
    entries["attn_implementation"] = getattr(config, "_attn_implementation", None)
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()
