"""Random states that depend on nothing but a seed, a sample and a view."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["preserved_random_state", "random_states", "seeded"]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the global CPU generators of Python, NumPy and torch when the context ends."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def random_states() -> tuple[Any, ...]:
    """Return the states of the global CPU generators of Python, NumPy and torch, to be compared."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, np.asarray(keys).tobytes(), tuple(rest), torch.get_rng_state().numpy().tobytes()


@contextmanager
def seeded(seed: int, sample_index: int, view: int) -> Iterator[None]:
    """Seed the global CPU generators of Python, NumPy and torch for one view, and restore them afterwards.

    ``numpy.random.SeedSequence`` mixes the three numbers, so the draws of neighbouring samples and views are unrelated.
    """
    words = np.random.SeedSequence([seed & (2**64 - 1), sample_index, view]).generate_state(4, dtype=np.uint64)
    with preserved_random_state():
        random.seed(int(words[0]))
        np.random.seed(words[1:3].view(np.uint32))
        torch.default_generator.manual_seed(int(words[3]))
        yield
