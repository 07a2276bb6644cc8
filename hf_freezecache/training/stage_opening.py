"""Opens the cache of a stage, and says what to do where it cannot be written."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..errors import CacheWriteError
from ..hub.provenance import keep_provenance
from ..model.split import Split
from ..report.record import Decision
from ..schedules import Stage
from .checkpoints import last_complete
from .sharing import provenance_of
from .stage_cache import OpenedCache

__all__ = ["open_cache", "open_for"]

logger = logging.getLogger(__name__)


def open_cache(run: Any, split: Split, ahead: Sequence[Split] = ()) -> OpenedCache:
    """Find or build the cache of a split point, and write down beside it what it was made of. Collective.

    Args:
        run: The ``StageRunner``.
        split: The model, split there.
        ahead: See ``StageCache.open``.

    Raises:
        FreezeCacheError: See ``StageCache.open``.
    """
    opened: OpenedCache = run.cache.open(split, ahead)
    if run.runtime.cache_group.is_main_process:
        keep_provenance(Path(opened.reader.directory), lambda: provenance_of(run, opened.reader))
    return opened


def open_for(run: Any, stage: Stage, decision: Decision) -> OpenedCache | None:
    """Find or build the cache of a stage. Collective.

    Args:
        run: The ``StageRunner``.
        stage: The stage.
        decision: Says why there is no cache, if there is none.

    Returns:
        The cache; ``None`` if it cannot be written and ``mode="auto"`` takes that.

    Raises:
        CacheWriteError: It cannot be written. The message says how to go on.
        FreezeCacheError: See ``StageCache.open``.
    """
    several, started = run.runtime.cache_group.num_groups > 1, time.perf_counter()
    points = run.built_ahead(stage)
    try:
        with run.runtime.everyone.fail_together() if several else nullcontext():
            return open_cache(run, run.splits.at(stage.split_point), [run.splits.at(point) for point in points])
    except CacheWriteError as error:
        if run.config.mode == "auto":
            # The record goes to the Hub: the message with the user's folders is for the log alone.
            cause = error.__cause__
            why = cause.strerror if isinstance(cause, OSError) and cause.strerror else "see the log of the run"
            decision.reason = f"The cache could not be written: {why}."
            decision.build_seconds = round(time.perf_counter() - started, 3)
            logger.warning("mode='auto': training on without a cache. %s", error)
            return None
        last = last_complete(Path(run.runtime.args.output_dir))
        raise CacheWriteError(
            f"{error} "
            + (
                f"To go on from {last.name}, call trainer.train(resume_from_checkpoint=True)."
                if last is not None
                else "No checkpoint was saved yet: trainer.train() begins anew, with the finished shards."
            )
        ) from error
