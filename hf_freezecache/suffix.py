"""The blocks behind a split as a module of their own, so that a cache can be trained on without images."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .freezing import freeze
from .splitting import split_model

__all__ = ["SuffixModel"]


class SuffixModel(nn.Module):
    """The part of a model behind ``split_point``, for ``Trainer`` and a ``CachedDataset``.

    The prefix is frozen. ``model`` stays the whole, ordinary model, whose suffix is trained in place: save it with
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
