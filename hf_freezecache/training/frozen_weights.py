"""Notices that frozen blocks change while a stage trains from a cache of what they gave."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnsupportedSetupError
from ..model.split import Split

__all__ = ["FrozenWeights"]


class FrozenWeights:
    """Compares sums of the prefix's parameters and buffers with what they were when the stage began.

    Args:
        split: The model, split where the cache was made; ``None`` looks at nothing.
    """

    def __init__(self, split: Split | None = None) -> None:
        self._split = split
        self._looked_at: int | None = None
        self._before = self._sums()

    def _sums(self) -> Tensor:
        if self._split is None:
            return torch.zeros(0)
        tensors = [*self._split.prefix_parameters().values(), *self._split.prefix_buffers().values()]
        with torch.no_grad():
            sums = [torch.stack([t.double().sum(), t.double().abs().sum()]) for t in tensors]
        return torch.stack(sums) if sums else torch.zeros(0)

    def look(self, epoch: int) -> None:
        """Look once in an epoch.

        Args:
            epoch: The epoch that is being trained.

        Raises:
            UnsupportedSetupError: The weights have changed.
        """
        if self._split is None or epoch == self._looked_at:
            return
        self._looked_at = epoch
        if not torch.equal(self._sums(), self._before):
            raise UnsupportedSetupError(
                f"The weights of the first {self._split.split_point} blocks have changed since the cache of this stage was "
                f"opened, before epoch {epoch}: a callback has written to them, perhaps (averaged weights, say). The cache holds "
                "what the blocks gave before. Let the callback leave frozen blocks alone, or train such stages on images with "
                "CacheConfig(mode='never')."
            )
