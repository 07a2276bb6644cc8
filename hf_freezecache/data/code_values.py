"""The content of values that code holds: arrays, random generators, paths, patterns and what has no content."""

from __future__ import annotations

import io
import os
import random
import re
import types
import uuid
import weakref
from typing import Any

import numpy as np
import torch

from .files import is_data_file, stamp

__all__ = ["content_of", "file_words", "is_drawn"]

_GENERATORS = (
    *(random.Random, np.random.RandomState, np.random.Generator, np.random.BitGenerator, np.random.SeedSequence),
    torch.Generator,
)
_FILES = (io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.FileIO)
_WITHOUT_CONTENT = (types.MemberDescriptorType, types.GetSetDescriptorType, weakref.ReferenceType)
#: Seeds that people choose are smaller than those that a clock or the operating system gives.
_CHOSEN_SEEDS = 2**32
_DRAWN = re.compile(r"[0-9a-f]{8}(-?)[0-9a-f]{4}\1[4][0-9a-f]{3}\1[89ab][0-9a-f]{3}\1[0-9a-f]{12}")


def content_of(value: Any) -> tuple[str | bytes, ...] | None:
    """Return what a value holds, in words that are equal in every process; ``None`` for values of other kinds.

    Raises:
        TypeError: It is an open file without a name.
    """
    if isinstance(value, (np.ndarray, np.generic)):
        return _of_array(value)
    if isinstance(value, torch.Tensor):
        return _of_tensor(value)
    if isinstance(value, _GENERATORS):
        return "generator", type(value).__qualname__, _chosen_seed(value)
    if isinstance(value, re.Pattern):
        return "pattern", repr(value.pattern), str(value.flags)
    if isinstance(value, uuid.UUID):
        # One that was drawn at random, or from a clock, tells objects apart and nothing else.
        return "identifier", "" if value.version in (1, 4) else value.hex
    if isinstance(value, os.PathLike):
        return "path", str(os.fspath(value)), *file_words(str(os.fspath(value)))
    if isinstance(value, _FILES):
        name = getattr(value, "name", None)
        if not isinstance(name, (str, os.PathLike)):
            raise TypeError("an open file without a name cannot be hashed")
        return "file", str(name), stamp(str(name)) or ""
    if isinstance(value, _WITHOUT_CONTENT) or type(value).__module__ in ("_thread", "multiprocessing.synchronize"):
        return "nothing", type(value).__qualname__  # locks, among others
    return None


def file_words(text: str) -> tuple[str, ...]:
    """Return the size and the time of the last change of a file of data, if a text names one."""
    return (stamp(text) or "",) if is_data_file(text) else ()


def is_drawn(value: Any) -> bool:
    """Say whether a value is a text that ``uuid.uuid4`` draws."""
    return type(value) is str and _DRAWN.fullmatch(value) is not None


def _of_array(array: Any) -> tuple[str | bytes, ...] | None:
    if array.dtype.hasobject or not (type(array) is np.ndarray or isinstance(array, np.generic)):
        return None  # taken apart as any other instance
    return "array", f"{array.dtype.descr} {array.shape}", np.ascontiguousarray(array).tobytes()


def _of_tensor(tensor: torch.Tensor) -> tuple[str | bytes, ...] | None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return None
    data = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten().view(torch.uint8)
    return "tensor", f"{tensor.dtype} {tuple(tensor.shape)}", data.numpy().tobytes()


def _chosen_seed(generator: Any) -> str:
    """Return the seed of a random generator if it was chosen, and can be told.

    What a generator has drawn is no input: views that depend on it would not repeat, and are refused.
    """
    source = getattr(generator, "bit_generator", generator)
    source = getattr(source, "seed_seq", source)
    if isinstance(source, torch.Generator):
        seed: Any = source.initial_seed()
    else:
        seed = getattr(source, "entropy", None)
    if not isinstance(seed, int) or seed >= _CHOSEN_SEEDS:
        return ""
    return f"{seed} {getattr(source, 'spawn_key', ())}"
