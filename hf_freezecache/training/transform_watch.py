"""Notices that the training transform changes while a stage trains from a cache of what it rendered before."""

from __future__ import annotations

import logging
from typing import Any

from ..config import CacheConfig
from ..data.training_data import TrainingData
from ..data.views import same_examples
from ..errors import FreezeCacheError

__all__ = ["TransformWatch"]

logger = logging.getLogger(__name__)


class TransformWatch:
    """Compares the transform with what it was when the cache of a stage was opened: its state, and what it renders.

    Args:
        data: The training data.
        config: The user's settings of caches.
    """

    def __init__(self, data: TrainingData, config: CacheConfig) -> None:
        self._data, self._config = data, config
        self._looked_at: int | None = None
        self._changed = False
        self._keys = [(row, view) for row in range(min(2, len(data.views))) for view in range(min(config.num_views, 2))]
        self._before = self._state()

    def _state(self) -> tuple[Any, list[Any]]:
        try:
            hashes = self._data.code.hashes(self._config)
            return hashes, [self._data.views[key] for key in self._keys]
        except FreezeCacheError as error:
            return str(error), []

    def look(self, epoch: int) -> None:
        """Warn if the transform has changed; only the first call in an epoch looks.

        Args:
            epoch: The epoch that is being trained.
        """
        if self._changed or epoch == self._looked_at:
            return
        self._looked_at = epoch
        now = self._state()
        self._changed = now[0] != self._before[0] or not same_examples(now[1], self._before[1])
        if not self._changed:
            return
        logger.warning(
            "The training transform is no longer what it was when the cache of this stage was opened: a callback has changed "
            "it, perhaps. From epoch %d on this stage goes on showing the views as they were then. If the change is to "
            "be seen, train these epochs without a cache: CacheConfig(mode='never'), or a schedule that begins a stage there.",
            epoch,
        )
