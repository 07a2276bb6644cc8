"""The contracts of the steps that a codec is made of.

A codec is a chain: array steps, then one step that turns an array into bytes, then ``zstd``. To add a step:

1. Write one file in this folder with one frozen dataclass, a subclass of ``ArrayStep`` or ``BytesStep``. Its fields are its
   configuration, which must survive JSON and have defaults. It checks them in ``__post_init__`` with ``ValueError``.
2. Add the class to ``STEPS`` in ``registry.py``. This is one line.

From then on users can ask for the step by its name, and caches can be read that name it. A step that is *fitted* to a sample of
hidden states overrides ``needs_fit``, ``fit`` and ``tensors``; the tensors come back as keyword arguments of the class, beside
its configuration. A step whose quantization step size can be chosen to meet a rate or a distortion sets ``has_step_size`` and
overrides ``step_size`` and ``with_step_size``. One that decodes each token by itself says in ``token_axes`` where its arrays
have their tokens: then a training step that sees some tokens decodes only these. Nothing outside the step's own file needs to
know its class.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ..model.tokens import take_tokens

__all__ = [
    "BYTES",
    "DTYPES",
    "FLOATS",
    "FRAMES",
    "INTEGERS",
    "ArraySpec",
    "ArrayStep",
    "Buffer",
    "BytesStep",
    "Step",
    "all_finite",
    "check_tensors",
    "digest",
    "dtype_name",
    "join_bytes",
    "largest_of_samples",
    "largest_value",
]

Buffer = bytes | bytearray | memoryview

#: Names of the dtypes hidden states may have, as safetensors spells them.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

#: What flows between the steps of a codec.
FLOATS, INTEGERS, BYTES, FRAMES = "float array", "integer array", "bytes", "frames"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a dtype.

    Raises:
        KeyError: Hidden states of this dtype cannot be stored.
    """
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise KeyError(f"hidden states of {dtype} cannot be stored; expected one of {list(DTYPES.values())}")


def largest_value(array: Tensor) -> float:
    """Return the largest absolute value; NaN if there is one, 0 of an empty array."""
    if array.numel() == 0:
        return 0.0
    low, high = (abs(float(value)) for value in torch.aminmax(array))
    return math.nan if math.isnan(low) or math.isnan(high) else max(low, high)


def all_finite(array: Tensor) -> bool:
    """Say whether no value is NaN or infinite. Looking at the extremes takes a tenth of the time of looking at each value."""
    return math.isfinite(largest_value(array))


def largest_of_samples(array: Tensor) -> Tensor:
    """Return the largest absolute value of each sample, (samples,) float64; 0 of an empty sample."""
    if array.numel() == 0:
        return torch.zeros(len(array), dtype=torch.float64)
    flat = array.flatten(1)
    return torch.maximum(flat.amax(1), -flat.amin(1)).double()  # without a copy of absolute values


def join_bytes(low: Tensor, high: Tensor) -> Tensor:
    """Return integers from their bytes: ``low + 256 * high``, on the device where they lie.

    Args:
        low: Low bytes, (samples, ..., positions) int8, signed; also int16, where some were never taken apart.
        high: High bytes of the first positions, (samples, ..., first positions) int8; those of further positions are 0.

    Returns:
        (samples, ..., positions) int16.
    """
    whole = low.to(torch.int16, copy=True)
    whole[..., : high.shape[-1]] += high.to(torch.int16) * 256
    return whole


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of an array that does not exist yet.

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
        """Size in bytes; the largest possible size of a ragged array."""
        return math.prod(self.shape) * self.dtype.itemsize


def check_tensors(owner: str, tensors: Mapping[str, Tensor], expected: Mapping[str, ArraySpec]) -> None:
    """Check fitted tensors against their specs; a file may hold anything.

    Raises:
        ValueError: A tensor is missing, has another shape or dtype, or is not finite.
    """
    for name, spec in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ValueError(f"{owner} has no tensor {name!r}")
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(
                f"{name!r} of {owner} is {tuple(tensor.shape)} {tensor.dtype}, expected {spec.shape} {spec.dtype}"
            )
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(f"{name!r} of {owner} is not finite")


@dataclasses.dataclass(frozen=True)
class Step(ABC):
    """One step of a codec. Its two kinds are abstract too; all other subclasses are final.

    Attributes:
        name: Name under which the step is stored and asked for.
        takes: Kinds of input: ``FLOATS``, ``INTEGERS`` or both, or ``BYTES``.
        gives: Kind of output.
    """

    name: ClassVar[str]
    takes: ClassVar[frozenset[str]]
    gives: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"name", "configuration"}``, from which ``codec_from_dict`` makes an equal step."""
        return {"name": self.name, "configuration": self.configuration()}

    def configuration(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them, without those whose metadata say ``{"stored": False}``."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata.get("stored", True)
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the fitted tensors by the names of their fields; a step that is not fitted has none."""
        return {}


class ArrayStep(Step):
    """Turns an array into one main array, called ``"values"``, and further arrays under names of their own."""

    lossless: ClassVar[bool] = False
    #: Whether the step has a quantization step size that a search may choose. At most one step of a codec has.
    has_step_size: ClassVar[bool] = False
    #: Axis of the tokens in the arrays that ``collatable`` gives, by name, ``"values"`` included; others have no tokens. With
    #: fewer tokens in all of them, ``decode`` gives these tokens as it gives them among all. ``None``: it needs all tokens.
    token_axes: ClassVar[Mapping[str, int] | None] = None

    # ---- Fitting. A step without anything to fit leaves these as they are. ----

    @property
    def needs_fit(self) -> bool:
        """Whether the step cannot encode before ``fit``."""
        return False

    @property
    def needs_gradients(self) -> bool:
        """Whether ``fit`` needs the gradients."""
        return False

    def fit(self, sample: Tensor, prefix_tokens: int, grid: tuple[int, int], gradients: Tensor | None) -> Self:
        """Return the step, fitted.

        Args:
            sample: (samples, tokens, hidden), what the step would be given to encode, on the CPU.
            prefix_tokens: Number of leading tokens that are no patches.
            grid: (height, width) of the patches; (1, patches) if they form no known grid.
            gradients: Gradients of the loss with regard to ``sample``, of the same shape; needed if ``needs_gradients``.

        Raises:
            ValueError: The step cannot be fitted on this sample.
        """
        return self

    @property
    def step_size(self) -> float | None:
        """Quantization step size; ``None`` before ``fit``, and of a step without any."""
        return None

    def with_step_size(self, step_size: float) -> Self:
        """Return the same fit with another step size.

        Raises:
            ValueError: The step has no step size, is not fitted, or cannot have this one.
        """
        raise ValueError(f"{self.name!r} has no step size")

    # ---- Encoding and decoding ----

    @abstractmethod
    def encoded_specs(self, spec: ArraySpec) -> dict[str, ArraySpec]:
        """Return the specs of what ``encode`` gives for an array of this spec.

        Raises:
            ValueError: The step cannot encode such an array.
        """

    @abstractmethod
    def encode(self, array: Tensor) -> dict[str, Tensor]:
        """Encode (samples, ...).

        Raises:
            ValueError: The values cannot be kept within the stated bound.
        """

    def collatable(self, arrays: dict[str, Tensor], spec: ArraySpec) -> dict[str, Tensor]:
        """Return arrays whose first axes all count samples, so that samples of several chunks make one batch.

        Args:
            arrays: What ``encode`` gave.
            spec: Spec of the array that was encoded.

        Raises:
            ValueError: The arrays contradict each other.
        """
        return arrays

    @abstractmethod
    def decode(self, arrays: Mapping[str, Tensor], dtype: torch.dtype, compute_dtype: torch.dtype | None) -> Tensor:
        """Decode what ``collatable`` gave, on the device where it lies.

        Args:
            arrays: Arrays by name; all first axes count samples.
            dtype: Dtype of the result.
            compute_dtype: Dtype of the arithmetic; ``None`` for the one in which the error bound holds.
        """

    def decode_kept(
        self, arrays: Mapping[str, Tensor], positions: Tensor, dtype: torch.dtype, compute_dtype: torch.dtype | None
    ) -> Tensor:
        """Decode hidden states (batch, tokens, hidden) at some tokens. Override it where that takes less than ``decode``.

        It is called where ``token_axes`` is ``None``.

        Args:
            arrays: Arrays by name, of all tokens.
            positions: Which tokens of each sample, (batch, kept) int64, in rising order, with all prefix tokens.
            dtype: As for ``decode``.
            compute_dtype: As for ``decode``.

        Returns:
            (batch, kept, hidden).
        """
        return take_tokens(self.decode(arrays, dtype, compute_dtype), positions)

    @abstractmethod
    def error_bound(self, array: Tensor) -> Tensor:
        """Return the largest root-mean-square error of each sample, (samples,), float64."""

    def check(self, tokens: int, hidden: int) -> None:
        """Check what was fitted against hidden states of (tokens, hidden); a file may hold anything.

        Raises:
            ValueError: It does not fit, or is not finite.
        """
        return

    def abs_bound(self, arrays: Mapping[str, Tensor], largest: float) -> float:
        """Return a bound of the absolute values that ``decode`` gives, at less cost than decoding.

        Args:
            arrays: What ``collatable`` gave, without ``"values"`` where another step decodes those.
            largest: Largest absolute value of ``"values"``.

        Returns:
            The bound; infinity or NaN if the step knows none.
        """
        return math.inf


class BytesStep(Step):
    """Turns an array into one or several buffers of bytes."""

    @abstractmethod
    def max_bytes(self, spec: ArraySpec) -> list[int]:
        """Return the largest size of each buffer.

        Raises:
            ValueError: The step cannot serialize such an array.
        """

    @abstractmethod
    def encode(self, array: Tensor) -> list[bytes]:
        """Serialize an array on the CPU into as many buffers as ``max_bytes`` has."""

    @abstractmethod
    def decode(self, buffers: Sequence[Buffer], spec: ArraySpec) -> Tensor:
        """Return the array, on the CPU, in memory that it shares with nothing.

        Raises:
            ValueError: The buffers do not hold such an array.
        """

    def decode_bytes(self, buffers: Sequence[Buffer], spec: ArraySpec) -> tuple[Tensor, Tensor | None]:
        """Return the array as low bytes and, where there are any, high bytes; see ``join_bytes``. Override it where that takes less.

        Raises:
            ValueError: As ``decode``.
        """
        return self.decode(buffers, spec), None
