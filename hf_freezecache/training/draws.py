"""Random numbers that a step draws: seeds them, and notes whether there are any."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..data.seeding import preserved_random_state
from ..model.split import Split

__all__ = ["drawing", "watching_draws"]


def _random_states() -> tuple[Any, ...]:
    cuda = [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tobytes(), numpy_state[2], torch.get_rng_state().numpy().tobytes(), cuda  # type: ignore[union-attr,index]


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Seed all generators, and put them back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with preserved_random_state(), torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed)
        _seed_torch(seed)
        yield


def _seed_torch(seed: int) -> None:
    """Seed torch's generators of all devices. Without an accelerator that is one, and takes microseconds.

    ``torch.manual_seed`` would note the call, with the stack, for each kind of device that is not there: milliseconds.
    """
    accelerator = getattr(torch, "accelerator", None)  # torch 2.6 or later
    if accelerator is None or accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def watching_draws(split: Split) -> Iterator[list[bool]]:
    """Note whether random numbers were drawn: each time that the hidden states at a split are there, and at the end."""
    before = _random_states()
    drawn: list[bool] = []

    def look(*_: Any) -> None:
        drawn.append(_random_states() != before)

    blocks = list(split.blocks)
    if split.split_point < len(blocks):
        handle = blocks[split.split_point].register_forward_pre_hook(look)
    else:
        handle = blocks[-1].register_forward_hook(look)
    try:
        yield drawn
        drawn.append(_random_states() != before)
    finally:
        handle.remove()
