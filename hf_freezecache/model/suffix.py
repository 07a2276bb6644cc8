"""The suffix of a model as a module of its own, which trains from a cache without images."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..errors import CacheMismatchError, DataError
from .freeze import freeze
from .hashing import hash_prefix
from .split import split_model

__all__ = ["SuffixModel"]


class SuffixModel(nn.Module):
    """The suffix of a model behind ``split_point``, for ``Trainer`` and a ``CachedDataset``.

    ``for_cache`` makes one that fits a cache. The prefix is frozen. ``model`` stays the whole, ordinary model, whose suffix is
    trained in place: save it with ``suffix.model.save_pretrained(...)``.

    Args:
        model: A model that ``split_model`` can split. Its first ``split_point`` blocks must have the weights with which the
            cache was computed, or the trained suffix does not fit them.
        split_point: Number of blocks that the cached hidden states have passed.
        image_shape: (channels, height, width) of the cached images. Default: the size in the model's configuration.

    Raises:
        UnsupportedModelError: The model cannot be split at this point.
    """

    def __init__(self, model: nn.Module, split_point: int, image_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.model = model
        self.split = split_model(model, split_point, image_shape)
        freeze(self.split)
        parameters = inspect.signature(model.forward).parameters.values()
        takes_any = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        #: ``Trainer`` reads it: whether the model's loss takes ``num_items_in_batch``.
        self.accepts_loss_kwargs = getattr(model, "accepts_loss_kwargs", takes_any)

    @classmethod
    def for_cache(cls, model: nn.Module, cached: Any, relabelled: bool = False) -> SuffixModel:
        """Return the suffix behind the split point of a cache, after checking that the model has the cached prefix.

        Args:
            model: The model whose prefix was cached. Its head may differ.
            cached: A ``CachedDataset``, whose ``reader`` has the ``index`` and the ``directory`` of the cache.
            relabelled: Whether the labels of the cache will be mapped to others, by a collator say; they are not checked then.

        Raises:
            CacheMismatchError: The cache was computed with other prefix weights.
            UnsupportedModelError: The model cannot be split at the split point of the cache.
            DataError: The model has fewer classes than the labels of the cache; see ``CachedDataset.check_labels``.
        """
        reader, index = cached.reader, cached.reader.index
        suffix = cls(model, index.split_point, index.image_shape)
        weights_hash = hash_prefix(suffix.split)
        expected_hash = index.fingerprint.get("prefix weights")
        if weights_hash != expected_hash:
            raise CacheMismatchError(
                f"Cache {reader.directory} was computed with other weights than those of this {type(model).__name__} "
                f"before block {index.split_point} (SHA-256 {weights_hash[:16]}, expected {str(expected_hash)[:16]}). Load the "
                "model and revision that it was computed with, in the same dtype."
            )
        if not relabelled:
            cached.check_labels(model)
        return suffix

    @property
    def config(self) -> Any:
        """Configuration of the model, or ``None``."""
        return getattr(self.model, "config", None)

    def forward(self, hidden_states: Tensor, labels: Tensor | None = None, **extra: Any) -> Any:
        """Run blocks ``[split_point:]``, the final norm and the head.

        Args:
            hidden_states: (batch, tokens, hidden) in the dtype of the cache. They are cast to the dtype of the model.
            labels: Labels (batch, ...), with which the model computes its loss.
            extra: Further arguments of the model's forward.

        Returns:
            The model's output.

        Raises:
            DataError: A label is no class of the model. On GPUs, torch stops the process instead; ``for_cache`` looks before.
        """
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        try:
            return self.split.suffix(hidden_states.to(dtype), labels, **extra)
        except IndexError as error:
            num_labels = getattr(self.config, "num_labels", None)
            if labels is None or num_labels is None or bool((labels < num_labels).all()):
                raise
            raise DataError(
                f"Labels out of range: found {int(labels.max())}, but the model has {num_labels} classes, so labels must lie in "
                f"[0, {num_labels}). Give the model num_labels=..."
            ) from error
