"""The blocks behind a split as a module of their own, so that a cache can be trained on without images."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import CacheMismatchError
from .freeze import freeze
from .hashing import hash_prefix
from .split import split_model

if TYPE_CHECKING:
    from ..dataset import CachedDataset

__all__ = ["SuffixModel"]


class SuffixModel(nn.Module):
    """The part of a model behind ``split_point``, for ``Trainer`` and a ``CachedDataset``.

    ``for_cache`` makes one that fits a cache. The prefix is frozen. ``model`` stays the whole, ordinary model, whose suffix is trained in place: save it with
    ``suffix.model.save_pretrained(...)``.

    Args:
        model: A model that ``split_model`` can split. Its first ``split_point`` blocks must have the weights that the cache
            was computed with, or what is learned behind them is of no use.
        split_point: Number of blocks that the cached hidden states have passed.
        image_shape: (channels, height, width) of the cached images; default the size that the model is configured for.

    Raises:
        UnsupportedModelError: The model cannot be split there.
    """

    def __init__(self, model: nn.Module, split_point: int, image_shape: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.model = model
        self.split = split_model(model, split_point)
        if image_shape is not None:
            self.split.image_shape = image_shape
        freeze(self.split)
        parameters = inspect.signature(model.forward).parameters.values()
        takes_any = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        #: For ``Trainer``: as of the model itself.
        self.accepts_loss_kwargs = getattr(model, "accepts_loss_kwargs", takes_any)

    @classmethod
    def for_cache(cls, model: nn.Module, cached: CachedDataset) -> SuffixModel:
        """Return the suffix behind the split point of a cache, having checked that the model's prefix is the cached one.

        Args:
            model: The model whose prefix was cached; its head may be another.
            cached: The cache.

        Raises:
            CacheMismatchError: The cache was computed with other prefix weights.
            UnsupportedModelError: The model cannot be split there.
        """
        index = cached.reader.index
        suffix = cls(model, index.split_point, index.image_shape)
        found = hash_prefix(suffix.split)
        expected = index.fingerprint.get("prefix weights")
        if found != expected:
            raise CacheMismatchError(
                f"Cache {cached.reader.directory} was computed with other weights than those of this {type(model).__name__} "
                f"before block {index.split_point} (SHA-256 {found[:16]}, expected {str(expected)[:16]}). Load the model and "
                "revision that it was computed with, in the same dtype."
            )
        return suffix

    @property
    def config(self) -> Any:
        """Configuration of the model."""
        return getattr(self.model, "config", None)

    def forward(self, hidden_states: Tensor, labels: Tensor | None = None, **extra: Any) -> Any:
        """Run blocks ``[split_point:]``, the final norm and the head.

        Args:
            hidden_states: (batch, tokens, hidden), as the cache holds them; they are cast to the model's dtype.
            labels: Passed to the model if given.
            extra: Further arguments of the model's forward.

        Returns:
            The model's own output.
        """
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return self.split.suffix(hidden_states.to(dtype), labels, **extra)
