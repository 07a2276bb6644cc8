"""Deletes a cache shard by shard, while a later one is computed from it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ..distributed.process_group import ProcessGroup
from .index import CONSUMED_NAME, INDEX_NAME, shard_name, table_name
from .lock import os_errors_as_cache_errors
from .reader import CacheReader

__all__ = ["consumer"]

logger = logging.getLogger(__name__)


def consumer(source: CacheReader, process_group: ProcessGroup) -> Callable[[int], None]:
    """Return what removes a shard of an earlier cache, in all views, once the later cache has it. Collective.

    The earlier cache is unfinished from here on: what needs it again builds its missing shards anew.

    Args:
        source: The earlier cache.
        process_group: Processes that share the folder of caches.

    Raises:
        CacheWriteError: The index of the cache cannot be renamed.
    """
    directory = Path(source.directory)

    def retire() -> None:
        with os_errors_as_cache_errors(directory):
            if (directory / INDEX_NAME).is_file():
                logger.warning(
                    "consume_previous_cache=True: the cache %s gives way to the one that is computed from it.",
                    directory,
                )
                (directory / INDEX_NAME).replace(directory / CONSUMED_NAME)

    process_group.on_main_process(retire)

    def consume(shard: int) -> None:
        for view in range(source.index.num_views):
            for name in (table_name(view, shard), shard_name(view, shard)):
                (directory / name).unlink(missing_ok=True)

    return consume
