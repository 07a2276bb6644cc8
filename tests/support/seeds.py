"""Seeds of tests."""

from __future__ import annotations

import random

import numpy as np
import torch
import transformers


def seed_all(seed: int = 0) -> None:
    """Seed all global generators, as ``transformers.set_seed`` does.

    Where there is no CUDA, it would note the call, with the stack, for devices that are not there. That takes milliseconds,
    thousands of times.
    """
    if torch.cuda.is_available():
        transformers.set_seed(seed)
        return
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
