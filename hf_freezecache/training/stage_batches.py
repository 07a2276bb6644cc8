"""The batches of a stage, from its cache or of images, and what trains on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..cache.reader import CacheReader
from ..config import CacheConfig
from ..data.collators import collate_cached
from ..data.feature_augmenter import FeatureAugmenter
from ..data.gathered import GathersAhead
from ..data.kept_tokens import EpochKeys, KeptTokensCollator, KeptTokensViews, TokenSubset
from ..data.sampler import ChunkSampler
from ..data.training_data import TrainingData
from ..dataset import CachedDataset
from ..model.split import Split
from .cached_step import CachedStep
from .fewer_tokens import LiveStep
from .runtime import Runtime

__all__ = ["cached_batches", "collator_of_cached", "live_batches", "reading_threads"]


def live_batches(
    runtime: Runtime,
    data: TrainingData,
    sampler: ChunkSampler,
    split: Split | None = None,
    tokens: TokenSubset | None = None,
) -> tuple[Any, LiveStep | None]:
    """Return a loader that renders views as they are needed, and what trains on its batches.

    Args:
        runtime: The trainer.
        data: The training data.
        sampler: Order of the samples.
        split: The model, split behind the blocks that see all tokens; needed with ``tokens``.
        tokens: Draws the tokens that steps see behind the split; ``None`` for all.

    Returns:
        The loader, and the step; ``None`` if ``Trainer`` takes batches as they are.
    """
    if tokens is None:
        return runtime.make_loader(data.views, sampler, data.collate), None
    assert split is not None
    views, collate = KeptTokensViews(data.views, tokens), KeptTokensCollator(data.collate)
    return runtime.make_loader(views, EpochKeys(sampler), collate), LiveStep(split, tokens)


def cached_batches(
    runtime: Runtime,
    config: CacheConfig,
    sampler: ChunkSampler,
    split: Split,
    reader: CacheReader,
    augmenter: FeatureAugmenter | None,
    tokens: TokenSubset | None = None,
) -> tuple[Any, CachedStep]:
    """Return a loader of the samples of a cache, and what trains on its batches.

    Args:
        runtime: The trainer.
        config: The user's settings of caches.
        sampler: Order of the samples.
        split: The model, split behind the frozen blocks.
        reader: The opened cache.
        augmenter: Augments hidden states, if the user asks for it.
        tokens: Draws the tokens that steps see; ``None`` for all.
    """
    window = config.shuffle_window
    dataset = CachedDataset(
        reader,
        max_chunks=window + min(runtime.batch_size, window),
        packed=True,
        keep_read=runtime.args.world_size > 1,
        tokens=tokens,
        whole=augmenter is not None,
        held_bytes=int(config.memory_gb * 1e9),
    )
    bf16 = runtime.accelerator.mixed_precision == "bf16"
    step = CachedStep(
        split,
        reader.views,
        reader.dtype,
        # What bf16 rounds off the states is far below what the codec did.
        torch.bfloat16 if bf16 else None,
        augmenter,
        runtime.to_device,
        reader.index.hidden_shape[0] if tokens is None else tokens.num_kept,
        # Trainer looks at each loss by default, or at none; the first steps were rehearsed.
        runtime.args.logging_nan_inf_filter or runtime.accelerator.device.type == "cpu",
        runtime.prepare_inputs,
    )
    threads, at_once = reading_threads(runtime), min(torch.get_num_threads(), window)
    # Otherwise the cores of the steps have nothing to do while a window is read.
    dataset.read_ahead(sampler, runtime.everyone.rank, threads or at_once * (at_once > 1), within_window=not threads)
    order: Any = sampler if tokens is None else EpochKeys(sampler)
    return runtime.without_workers().make_loader(dataset, order, collator_of_cached(runtime)), step


def collator_of_cached(runtime: Runtime) -> Callable[[Any], Any]:
    """Return what makes batches of a cache: where threads read ahead, another gathers ahead."""
    return GathersAhead(runtime.args.device) if reading_threads(runtime) else collate_cached


def reading_threads(runtime: Runtime) -> int:
    """Return the number of threads that read a cache ahead of the steps: as many as the user asks for workers.

    Workers would each decode nearly every chunk, since a batch mixes samples of several; threads decode each once. Where the user
    asks for none, one thread reads beside an accelerator; on a CPU it would only take the steps' own cores while they compute.
    """
    workers: int = runtime.args.dataloader_num_workers
    return workers or int(runtime.accelerator.device.type != "cpu")
