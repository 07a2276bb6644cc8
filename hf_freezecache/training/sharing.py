"""What a run's caches were made of, and their way to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..cache.reader import CacheReader
from ..dataset import CachedDataset
from ..errors import UnsupportedSetupError
from ..hub.provenance import Provenance, keep_provenance, provenance_of_dataset, provenance_of_model

__all__ = ["provenance_of", "push_cache"]


def provenance_of(run: Any, reader: CacheReader) -> Provenance:
    """Return what is known of the data set and of the model that a cache of a ``StageRunner`` was made of."""
    known = provenance_of_dataset(run.data.dataset)
    if reader.index.split_point <= run.freezer.trained_from:  # else the model is no longer that of the Hub
        known |= provenance_of_model(run.runtime.model, reader.index)
    return Provenance(**known)


def push_cache(run: Any, repo_id: str, private: bool, settings: dict[str, Any]) -> Any:
    """Push the cache that was opened last to a data set on the Hub. Collective; the main process pushes.

    Args:
        run: The ``StageRunner``; ``None`` before ``train()`` and ``build_cache()``.
        repo_id: ``user/name``.
        private: Whether the repository is to be private.
        settings: As for ``CachedDataset.push_to_hub``.

    Raises:
        UnsupportedSetupError: There is no cache, or each machine has a part of it.
        FreezeCacheError: See ``CachedDataset.push_to_hub``.
    """
    reader = None if run is None else run.cache.current
    if reader is None:
        raise UnsupportedSetupError("There is no cache to push: call train() or build_cache() first.")
    if run.runtime.cache_group.num_groups > 1:
        raise UnsupportedSetupError(
            "With cache_placement='node' each machine has a part of the cache. To push one, build it with 'shared'."
        )

    def push() -> Any:
        kept = keep_provenance(Path(reader.directory), lambda: provenance_of(run, reader))
        # A folder that takes no files keeps nothing: then the card is told here.
        provenance = {} if kept else vars(provenance_of(run, reader).updated(Provenance.from_dict(settings)))
        return CachedDataset(reader).push_to_hub(repo_id, private, **{**settings, **provenance})

    return run.runtime.everyone.on_main_process(push)
