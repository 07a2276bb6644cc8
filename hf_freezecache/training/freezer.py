"""Freezes the prefixes of a run, and gives model and optimizer back as they came."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..model.freeze import Frozen, check_checkpointing, freeze, prune_optimizer, restore_groups
from ..model.split import Split

__all__ = ["Freezer"]


@dataclass
class Freezer:
    """What a trainer has frozen, over all its calls of ``train()``.

    Attributes:
        trained_from: The first block that the trainer may have trained; no block before it has changed.
        optimizer_is_ours: Whether ``Trainer`` made the optimizer, which then is made anew for each ``train()``.
    """

    trained_from: float = math.inf
    optimizer_is_ours: bool = False
    _frozen: list[Frozen] = field(default_factory=list)
    _groups: list[list[nn.Parameter]] | None = None

    def begin(self, optimizer: Any, first_split_point: int) -> bool:
        """Prepare for a ``train()`` that starts at the first stage again: all parameters are trainable.

        Args:
            optimizer: The trainer's; ``None`` if there is none yet.
            first_split_point: Frozen blocks of the first stage.

        Returns:
            Whether the optimizer and its scheduler must be made anew. A user's own optimizer gets back what was pruned.
        """
        self.thaw()
        self.trained_from = min(first_split_point, self.trained_from)
        if self.optimizer_is_ours:
            return True
        if optimizer is not None:
            self._groups = restore_groups(optimizer, self._groups)
        return False

    def freeze(self, split: Split, optimizer: Any = None) -> int:
        """Freeze a prefix, and drop its parameters from the optimizer, if there is one.

        Returns:
            Bytes of optimizer state that were released.

        Raises:
            UnsupportedSetupError: The model uses reentrant activation checkpointing.
        """
        check_checkpointing(split.model)
        if split.split_point > 0:
            self._frozen.append(freeze(split))
        return 0 if optimizer is None else prune_optimizer(optimizer)

    def thaw(self) -> None:
        """Let frozen parameters require gradients again, and remove all hooks."""
        while self._frozen:
            self._frozen.pop().thaw()
