"""The contract of a codec."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["DTYPES", "Buffer", "Codec", "dtype_name"]

Buffer = bytes | bytearray | memoryview

#: Names of the dtypes hidden states may have, as safetensors spells them.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a dtype.

    Raises:
        KeyError: Hidden states of this dtype cannot be stored.
    """
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclasses.dataclass(frozen=True)
class Codec(ABC):
    """Turns a chunk of hidden states into frames and back. Abstract; its subclasses are final.

    A frame is an independent zstd frame with content size and checksum, so that a reader can check sizes before it
    takes memory, and damage shows when a frame is decoded.
    """

    name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"name", "configuration"}``, from which ``codec_from_dict`` makes an equal codec."""
        return {"name": self.name, "configuration": dataclasses.asdict(self)}

    @abstractmethod
    def num_frames(self, dtype: torch.dtype) -> int:
        """Return the number of frames per chunk of hidden states of this dtype."""

    @abstractmethod
    def encode(self, hidden_states: Tensor) -> list[bytes]:
        """Encode a chunk.

        Args:
            hidden_states: (samples, tokens, hidden), one of ``DTYPES``, on the CPU.

        Returns:
            ``num_frames(hidden_states.dtype)`` frames.
        """

    @abstractmethod
    def decode(self, frames: Sequence[Buffer], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Decode a chunk.

        Args:
            frames: What ``encode`` returned.
            shape: (samples, tokens, hidden).
            dtype: Dtype of the encoded hidden states.

        Returns:
            Hidden states of this shape and dtype, on the CPU, in memory of their own.

        Raises:
            ValueError: A frame is damaged or of another size than shape and dtype call for.
        """
