"""The contracts of codecs: of a whole codec for chunks, and of the steps a pipeline is made of."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["DTYPES", "ArraySpec", "Buffer", "Codec", "Step", "dtype_name", "largest_value"]

Buffer = bytes | bytearray | memoryview

#: Names of the dtypes hidden states may have, as safetensors spells them.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

#: What flows between the steps of a pipeline.
FLOATS, INTEGERS, BYTES = "float array", "integer array", "bytes"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a dtype.

    Raises:
        KeyError: Hidden states of this dtype cannot be stored.
    """
    return next(name for name, known in DTYPES.items() if known == dtype)


def largest_value(array: Tensor) -> float:
    """Return the largest absolute value; NaN if there is one, 0 of nothing."""
    if array.numel() == 0:
        return 0.0
    low, high = (abs(float(value)) for value in torch.aminmax(array))
    return math.nan if math.isnan(low) or math.isnan(high) else max(low, high)


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of an array, known before it is.

    Attributes:
        shape: Shape; the first axis counts samples.
        dtype: Torch dtype.
        ragged: The first axis counts something else, and is at most as long as the shape says.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    ragged: bool = False

    @property
    def num_bytes(self) -> int:
        """Size in bytes; of a ragged array the largest."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Step(ABC):
    """One step of a pipeline. Abstract, as are its kinds; the classes at the ends are final.

    Attributes:
        name: How it is stored and asked for.
        takes: What it can be given: one or both kinds of arrays, or bytes.
        gives: What it makes of that.
    """

    name: ClassVar[str]
    takes: ClassVar[frozenset[str]]
    gives: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"name", "configuration"}``, from which ``codec_from_dict`` makes an equal step."""
        return {"name": self.name, "configuration": self.configuration()}

    def configuration(self) -> dict[str, Any]:
        """Return what JSON can hold of the step; tensors are left to ``Codec.tensors``."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata.get("stored", True)
        }


class ArrayStep(Step):
    """Array to array(s): the main one, ``"values"``, and arrays beside it under names of their own."""

    lossless: ClassVar[bool] = False

    @abstractmethod
    def encoded_specs(self, spec: ArraySpec) -> dict[str, ArraySpec]:
        """Return the specs of what ``encode`` gives for an array of this spec.

        Raises:
            ValueError: It cannot encode such an array.
        """

    @abstractmethod
    def encode(self, array: Tensor) -> dict[str, Tensor]:
        """Encode (samples, ...).

        Raises:
            ValueError: The values cannot be kept within the stated bound.
        """

    def collatable(self, arrays: dict[str, Tensor], spec: ArraySpec) -> dict[str, Tensor]:
        """Return arrays whose first axes all count samples, so that samples of several chunks make one batch.

        Raises:
            ValueError: The arrays contradict each other.
        """
        return arrays

    @abstractmethod
    def decode(self, arrays: Mapping[str, Tensor], dtype: torch.dtype, compute_dtype: torch.dtype | None) -> Tensor:
        """Decode what ``collatable`` gave, on the device where it lies.

        Args:
            arrays: By name; all first axes count samples.
            dtype: Of the result.
            compute_dtype: Of the arithmetic; ``None`` for that in which the bound holds.
        """

    @abstractmethod
    def error_bound(self, array: Tensor) -> Tensor:
        """Return the largest root-mean-square error of each sample, (samples,), float64."""

    def check(self, tokens: int, hidden: int) -> None:
        """Check what was fitted against hidden states of (tokens, hidden); what a file holds may be anything.

        Raises:
            ValueError: It does not fit, or is not finite.
        """
        return

    def abs_bound(self, arrays: Mapping[str, Tensor], largest: float) -> float:
        """Return a bound of the absolute values that ``decode`` gives, cheaper than to decode; inf or NaN if it knows none.

        Args:
            arrays: What ``collatable`` gave, without ``"values"`` where another step decodes those.
            largest: Largest absolute value of ``"values"``.
        """
        return math.inf


class BytesStep(Step):
    """Array to bytes: one or several buffers."""

    @abstractmethod
    def max_bytes(self, spec: ArraySpec) -> list[int]:
        """Return the largest size of each buffer.

        Raises:
            ValueError: It cannot serialize such an array.
        """

    @abstractmethod
    def encode(self, array: Tensor) -> list[bytes]:
        """Serialize an array on the CPU into as many buffers as ``max_bytes`` has."""

    @abstractmethod
    def decode(self, buffers: Sequence[Buffer], spec: ArraySpec) -> Tensor:
        """Return the array, on the CPU, in memory of its own.

        Raises:
            ValueError: The buffers do not hold such an array.
        """


class CompressStep(Step):
    """Bytes to bytes."""

    @abstractmethod
    def max_bytes(self, size: int) -> int:
        """Return the largest compressed size of ``size`` bytes."""

    @abstractmethod
    def encode(self, data: Buffer) -> bytes:
        """Compress."""

    @abstractmethod
    def decode(self, data: Buffer, max_bytes: int) -> bytes:
        """Decompress to at most ``max_bytes``; no more memory than this is taken.

        Raises:
            ValueError: Damaged, or larger.
        """


@dataclasses.dataclass(frozen=True)
class Codec(ABC):
    """Turns a chunk of hidden states into frames and back. Abstract; its subclasses are final.

    A frame is an independent zstd frame with content size and checksum, so that a reader can check sizes before it
    takes memory, and damage shows when a frame is decoded.

    Decoding has two halves: ``entropy_decode``, which workers run, gives arrays of integers whose first axis counts samples;
    ``dequantize`` turns a batch of them into hidden states on whatever device it lies.
    """

    name: ClassVar[str]

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return ``{"name", "configuration"}``, from which ``codec_from_dict`` makes an equal codec."""

    @property
    @abstractmethod
    def lossless(self) -> bool:
        """Whether every bit comes back."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the fitted tensors, which JSON does not hold; a cache stores them once."""
        return {}

    @abstractmethod
    def max_frame_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> list[int]:
        """Return the largest size of each frame of a chunk, known before it is encoded.

        Raises:
            ValueError: Such a chunk cannot be encoded.
        """

    @abstractmethod
    def encode(self, hidden_states: Tensor) -> list[bytes]:
        """Encode a chunk.

        Args:
            hidden_states: (samples, tokens, hidden), one of ``DTYPES``, on the CPU.

        Returns:
            As many frames as ``max_frame_bytes`` has sizes.

        Raises:
            ValueError: A lossy codec was given NaN or infinite values, or values out of its range.
        """

    @abstractmethod
    def entropy_decode(self, frames: Sequence[Buffer], shape: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        """Undo entropy coding and packing.

        Args:
            frames: What ``encode`` returned.
            shape: (samples, tokens, hidden).
            dtype: Dtype of the encoded hidden states.

        Returns:
            Name -> (samples, ...), on the CPU, in memory of their own.

        Raises:
            ValueError: A frame is damaged or of another size than shape and dtype allow.
        """

    @abstractmethod
    def dequantize(
        self, arrays: Mapping[str, Tensor], dtype: torch.dtype, compute_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Turn a batch of what ``entropy_decode`` gave into hidden states, on the device where it lies.

        Args:
            arrays: Name -> (batch, ...).
            dtype: Dtype of the hidden states.
            compute_dtype: Dtype of the arithmetic, e.g. that of the run's autocast. ``None``: fp32, or fp64 for fp64
                hidden states; ``error_bound`` holds for this one only.

        Returns:
            (batch, tokens, hidden).
        """

    @abstractmethod
    def error_bound(self, hidden_states: Tensor) -> Tensor:
        """Return the largest root-mean-square error of each sample, (samples,), float64. Zeros if lossless."""

    def check(self, tokens: int, hidden: int) -> None:
        """Check what was fitted against hidden states of (tokens, hidden); what a file holds may be anything.

        Raises:
            ValueError: It does not fit, or is not finite.
        """
        return

    def abs_bound(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> float:
        """Return a bound of the absolute values that ``dequantize`` gives, cheaper than to restore; inf or NaN if it knows none."""
        return math.inf

    def decode(self, frames: Sequence[Buffer], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Decode a chunk: ``entropy_decode``, then ``dequantize`` on the CPU.

        Returns:
            Hidden states of this shape and dtype, on the CPU, in memory of their own.

        Raises:
            ValueError: A frame is damaged or of another size than shape and dtype call for.
        """
        return self.dequantize(self.entropy_decode(frames, shape, dtype), dtype)
