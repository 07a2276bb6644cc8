"""Arrays become bytes without a change: one plane per byte of an element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from .base import (
    BYTES,
    FLOATS,
    INTEGERS,
    ArraySpec,
    Buffer,
    BytesStep,
)

__all__ = ["Planes"]


@dataclass(frozen=True)
class Planes(BytesStep):
    """Plane ``p`` holds byte ``p`` (little-endian) of every element.

    Sign and exponent, which repeat, are set apart from the lower bytes of the mantissa, which do not. zstd stores planes of
    noise as they are, at the speed of a copy.
    """

    name: ClassVar[str] = "planes"
    takes: ClassVar[frozenset[str]] = frozenset({FLOATS, INTEGERS})
    gives: ClassVar[str] = BYTES

    @override
    def max_bytes(self, spec: ArraySpec) -> list[int]:
        return [math.prod(spec.shape)] * spec.dtype.itemsize

    @override
    def encode(self, array: Tensor) -> list[bytes]:
        elements = array.contiguous().flatten().view(torch.uint8).numpy()
        return [plane.tobytes() for plane in elements.reshape(-1, array.dtype.itemsize).T]

    @override
    def decode(self, buffers: Sequence[Buffer], spec: ArraySpec) -> Tensor:
        sizes = {len(buffer) for buffer in buffers}
        if len(buffers) != spec.dtype.itemsize or len(sizes) != 1:
            raise ValueError(f"planes of {sorted(sizes)} bytes, expected {spec.dtype.itemsize} equal ones")
        (count,) = sizes
        row = math.prod(spec.shape[1:])
        if spec.ragged:
            if count > math.prod(spec.shape) or count % row:
                raise ValueError(f"planes of {count} bytes, expected a multiple of {row} up to {math.prod(spec.shape)}")
        elif count != math.prod(spec.shape):
            raise ValueError(f"planes of {count} bytes, expected {math.prod(spec.shape)}")
        planes = np.empty((count, spec.dtype.itemsize), dtype=np.uint8)
        for position, buffer in enumerate(buffers):
            planes[:, position] = np.frombuffer(buffer, dtype=np.uint8)
        shape = (count // row, *spec.shape[1:]) if spec.ragged else spec.shape
        return torch.from_numpy(planes.reshape(-1)).view(spec.dtype).reshape(shape)
