"""Which patch tokens a training step sees behind the split: a random part of each sample's, another in each epoch.

Keys of samples, ``(sample index, view)``, get the epoch beside them. Whoever makes a batch of them draws the same tokens,
in whatever process.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .collators import Collator
from .sampler import ChunkSampler
from .views import ViewDataset

__all__ = ["KEPT_TOKENS", "EpochKey", "EpochKeys", "KeptTokensCollator", "KeptTokensViews", "TokenSubset"]

#: Name in a batch of images of the positions of kept tokens, (batch, kept) int64. No model and no loss sees it.
KEPT_TOKENS = "freezecache.kept_tokens"

#: (sample index, view, epoch).
EpochKey = tuple[int, int, int]


@dataclass(frozen=True)
class TokenSubset:
    """Draws the kept tokens of a sample: all prefix tokens, and equally many of the patch tokens of each sample.

    Attributes:
        seed: Seed of the draws.
        prefix_tokens: Number of leading tokens that are no patches.
        num_patches: Number of patch tokens.
        token_keep: Share of the patch tokens that is kept, in (0, 1].
    """

    seed: int
    prefix_tokens: int
    num_patches: int
    token_keep: float

    @property
    def num_tokens(self) -> int:
        """Number of all tokens of a sample."""
        return self.prefix_tokens + self.num_patches

    @property
    def num_kept(self) -> int:
        """Number of kept tokens, prefix tokens included: at least one of them is a patch."""
        return self.prefix_tokens + max(1, round(self.token_keep * self.num_patches))

    def positions(self, sample_index: int, view: int, epoch: int) -> Tensor:
        """Return the positions of the kept tokens in rising order, (num_kept,) int64.

        They depend on nothing but the seed and these three numbers.
        """
        generator = self._generator_at(sample_index, view, epoch)
        patches = generator.permutation(self.num_patches)[: self.num_kept - self.prefix_tokens]
        patches.sort()
        return torch.from_numpy(np.concatenate([np.arange(self.prefix_tokens), patches + self.prefix_tokens]))

    def _generator_at(self, sample_index: int, view: int, epoch: int) -> np.random.Generator:
        """Return a generator whose numbers depend on the seed and these three alone.

        Philox draws from a key and a counter: setting them takes a tenth of the time of a generator of its own for each sample.
        """
        generator = self._generator
        state: dict[str, Any] = generator.bit_generator.state  # type: ignore[assignment]
        # The lowest word of the counter counts what is drawn from here on.
        state["state"]["counter"][:] = (0, sample_index, view, epoch)
        state |= {"buffer_pos": len(state["buffer"]), "has_uint32": 0, "uinteger": 0}
        generator.bit_generator.state = state
        return generator

    @functools.cached_property
    def _generator(self) -> np.random.Generator:
        # 0x70 keeps these draws apart from those that other modules make with the same seed.
        return np.random.Generator(np.random.Philox(key=np.array([self.seed & (2**64 - 1), 0x70], np.uint64)))


class EpochKeys(Sampler[EpochKey]):
    """Yields the keys of another sampler, in its order, with its epoch beside them.

    Args:
        sampler: The other sampler.
    """

    def __init__(self, sampler: ChunkSampler) -> None:
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order ``iter`` yields."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of samples of all processes."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[EpochKey]:
        """Yield the keys of one epoch."""
        epoch = self.sampler.epoch
        for sample_index, view in self.sampler:
            yield sample_index, view, epoch


class KeptTokensViews(Dataset):  # type: ignore[type-arg]
    """Renders views live, with the positions of their kept tokens: item ``(i, v, e)`` is ``(positions, example)``.

    Args:
        views: Renders the views.
        tokens: Draws the tokens.
    """

    def __init__(self, views: ViewDataset, tokens: TokenSubset) -> None:
        self.views = views
        self.tokens = tokens

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.views)

    def __getitem__(self, key: EpochKey) -> tuple[Tensor, Any]:
        """Render one view.

        Raises:
            DataError: The row could not be read or transformed; the message names the row.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[EpochKey]) -> list[tuple[Tensor, Any]]:
        """Render several views, in order.

        Raises:
            DataError: A row could not be read or transformed; the message names the row.
        """
        examples = self.views.__getitems__([(sample_index, view) for sample_index, view, _ in keys])
        return [(self.tokens.positions(*key), example) for key, example in zip(keys, examples, strict=True)]


@dataclass(frozen=True)
class KeptTokensCollator:
    """Collates items of ``KeptTokensViews``; the user's collator gets the examples alone.

    Attributes:
        collate: The user's collator, checked.
    """

    collate: Collator

    def __call__(self, items: list[tuple[Tensor, Any]]) -> dict[str, Any]:
        """Return the batch, with the positions as ``KEPT_TOKENS`` beside it."""
        batch = self.collate([example for _, example in items])
        return {**batch, KEPT_TOKENS: torch.stack([positions for positions, _ in items])}
