"""Looks at the folder of caches before a run that will need it hours later."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..cache.fingerprint import Fingerprint
from ..cache.index import INDEX_NAME, load_index
from ..cache.lock import check_lockable
from ..errors import CacheWriteError, FreezeCacheError
from ..model.split import Splits
from .stage_cache import StageCache

__all__ = ["check_folder", "check_writable"]

logger = logging.getLogger(__name__)

#: What earlier stages of a run change of a later stage's fingerprint.
_TRAINED = "prefix weights"


def check_writable(cache_dir: Path) -> None:
    """Make the folder of caches, write to it once, and lock a file in it.

    Raises:
        CacheWriteError: It cannot be made or written, or its file system has no locks.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir) as file:
            file.write(b"0")
        check_lockable(cache_dir)
    except CacheWriteError:
        raise
    except OSError as error:
        raise CacheWriteError(
            f"The folder of caches {cache_dir} could not be written: {error}. Permit writing, or choose another freezecache_dir."
        ) from error


def check_folder(cache: StageCache, splits: Splits, split_points: Sequence[int]) -> None:
    """Try to write to the folder of caches. Collective.

    A run that finds all its caches finished writes nothing: it may go on in a folder that can only be read. So may a run
    under ``mode="auto"``, which trains without a cache where it has to.

    Args:
        cache: Finds the caches of the run.
        splits: The splits of the model.
        split_points: Those of the run's stages, in order.

    Raises:
        CacheWriteError: The folder cannot be written, and a cache that the run needs is not there.
    """
    config, main = cache.config, cache.process_group
    cache_dir = Path(config.freezecache_dir)
    try:
        main.on_main_process(lambda: check_writable(cache_dir))
        return
    except CacheWriteError as error:
        if config.mode == "auto":
            logger.warning("mode='auto': %s", error)
            return
        missing, unsure = main.on_main_process(lambda: _missing(cache, splits, split_points, cache_dir))
        if missing:
            raise CacheWriteError(
                f"{error} (A finished cache may be read from a folder that cannot be written. This run needs one of {missing[0]} "
                "frozen blocks, and there is none that fits.)"
            ) from error
        logger.warning("%s This run writes nothing there as long as it finds its caches finished.", error)
        if unsure:
            logger.warning(
                "Whether the caches of %s frozen blocks in %s fit is known only once the blocks before are trained. If one "
                "does not, the run stops there.",
                " and ".join(map(str, unsure)),
                cache_dir,
            )


def _missing(
    cache: StageCache, splits: Splits, split_points: Sequence[int], cache_dir: Path
) -> tuple[list[int], list[int]]:
    """Return the split points whose caches are surely not there, and those whose caches may turn out to be others.

    Weights that earlier stages will train are unknown. A cache that fits but for those may be the one that is needed.
    """
    finished = []
    for path in sorted(cache_dir.glob(f"k*/{INDEX_NAME}")):
        try:
            finished.append(Fingerprint(load_index(path.parent).fingerprint))
        except (FreezeCacheError, OSError) as error:
            logger.warning("Passing over a cache that cannot be read: %s", error)
    missing, unsure = [], []
    for split_point in sorted({*split_points} - {0}):
        fingerprint = cache.identify(splits.at(split_point))
        trained = {_TRAINED} if split_point > split_points[0] else set()
        if not any(trained.issuperset(fingerprint.difference(other)) for other in finished):
            missing.append(split_point)
        elif trained:
            unsure.append(split_point)
    return missing, unsure
