"""Pipelines of steps: array to array, once array to bytes, bytes to bytes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import (
    BYTES,
    FLOATS,
    ArraySpec,
    ArrayStep,
    Buffer,
    BytesStep,
    Codec,
    CompressStep,
    Step,
    largest_value,
)
from .entropy import Zstd
from .planes import Planes

__all__ = ["LosslessCodec", "Pipeline"]

_SIDE_BYTES = Planes()


def _words(kinds: frozenset[str]) -> str:
    return " or ".join(sorted(kinds))


def _own(arrays: Mapping[str, Tensor], position: int) -> dict[str, Tensor]:
    """Return what a step put beside the main array."""
    mark = f"{position}."
    return {name.removeprefix(mark): value for name, value in arrays.items() if name.startswith(mark)}


@dataclass(frozen=True)
class Pipeline(Codec):
    """Array steps, then one step to bytes, then compression ending with ``zstd``, which gives frames.

    Arrays that an array step puts beside the main one (scales, prefix tokens) go to bytes by ``planes`` and through the
    same compression. Frames of the main array come first, then those of the other arrays, step by step.

    Attributes:
        steps: In the order of encoding.
    """

    name: ClassVar[str] = "pipeline"
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        """Check the order.

        Raises:
            ValueError: A step cannot take what the one before gives; the message names both.
        """
        object.__setattr__(self, "steps", tuple(self.steps))
        if not self.steps or not all(isinstance(step, Step) for step in self.steps):
            raise ValueError(f"a pipeline needs steps, got {list(self.steps)!r}")
        first, last = self.steps[0], self.steps[-1]
        if FLOATS not in first.takes:
            raise ValueError(
                f"{first.name!r} cannot be first: it takes {_words(first.takes)}, hidden states are {FLOATS}s"
            )
        for before, after in itertools.pairwise(self.steps):
            if before.gives not in after.takes:
                raise ValueError(
                    f"{after.name!r} cannot follow {before.name!r}: {after.name!r} takes {_words(after.takes)}, "
                    f"{before.name!r} gives {before.gives}"
                )
        if last.gives != BYTES:
            raise ValueError(
                f"{last.name!r} cannot be last: it gives {last.gives}. End with 'planes' or 'pack', and 'zstd'"
            )
        if not isinstance(last, Zstd):
            raise ValueError(f"{last.name!r} cannot be last: frames need the checksum of 'zstd'")

    @property
    def _arrays(self) -> list[ArrayStep]:
        return [step for step in self.steps if isinstance(step, ArrayStep)]

    @property
    def _bytes(self) -> BytesStep:
        return next(step for step in self.steps if isinstance(step, BytesStep))

    @property
    def _compression(self) -> list[CompressStep]:
        return [step for step in self.steps if isinstance(step, CompressStep)]

    def to_dict(self) -> dict[str, Any]:
        """See base class."""
        return {"name": self.name, "configuration": {"steps": [step.to_dict() for step in self.steps]}}

    @property
    def lossless(self) -> bool:
        """See base class."""
        return all(step.lossless for step in self._arrays)

    def tensors(self) -> dict[str, Tensor]:
        """See base class."""
        return {
            f"{position}.{name}": tensor
            for position, step in enumerate(self.steps)
            for name, tensor in getattr(step, "tensors", dict)().items()
        }

    def _specs(self, spec: ArraySpec) -> tuple[list[ArraySpec], list[dict[str, ArraySpec]]]:
        """Return the spec that each array step takes and, last, that of the main array; and what each gives."""
        inputs, outputs = [spec], []
        for step in self._arrays:
            outputs.append(step.encoded_specs(inputs[-1]))
            inputs.append(outputs[-1]["values"])
        return inputs, outputs

    def _buffers(self, spec: ArraySpec) -> list[tuple[BytesStep, ArraySpec, list[int]]]:
        """Return step, array and largest buffer sizes of the main array and of all others."""
        inputs, outputs = self._specs(spec)
        found: list[tuple[BytesStep, ArraySpec, list[int]]] = [
            (self._bytes, inputs[-1], self._bytes.max_bytes(inputs[-1]))
        ]
        for arrays in outputs:
            for name, side in arrays.items():
                if name != "values":
                    found.append((_SIDE_BYTES, side, _SIDE_BYTES.max_bytes(side)))
        return found

    def max_frame_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> list[int]:
        """See base class."""
        sizes = [size for _, _, sizes in self._buffers(ArraySpec(tuple(shape), dtype)) for size in sizes]
        for step in self._compression:
            sizes = [step.max_bytes(size) for size in sizes]
        return sizes

    def encode(self, hidden_states: Tensor) -> list[bytes]:
        """See base class."""
        array, sides = hidden_states, []
        for step in self._arrays:
            encoded = step.encode(array)
            array = encoded.pop("values")
            sides += list(encoded.values())
        buffers = self._bytes.encode(array)
        for side in sides:
            buffers += _SIDE_BYTES.encode(side)
        for compression in self._compression:
            buffers = [compression.encode(buffer) for buffer in buffers]
        return buffers

    def entropy_decode(self, frames: Sequence[Buffer], shape: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        """See base class. Names are ``"values"``, and ``"<step>.<name>"`` for other arrays."""
        spec = ArraySpec(tuple(shape), dtype)
        expected = self._buffers(spec)
        count = sum(len(sizes) for _, _, sizes in expected)
        if len(frames) != count:
            raise ValueError(f"{len(frames)} frames, expected {count}")
        left = list(frames)
        decoded = []
        for step, array, sizes in expected:
            buffers = [self._decompress(left.pop(0), size) for size in sizes]
            decoded.append(step.decode(buffers, array))
        inputs, outputs = self._specs(spec)
        arrays = {"values": decoded.pop(0)}
        for position, (given, specs) in enumerate(zip(inputs, outputs, strict=False)):
            names = [name for name in specs if name != "values"]
            own = {name: decoded.pop(0) for name in names}
            main = arrays["values"]
            collated = self._arrays[position].collatable({"values": main, **own}, given)
            arrays |= {f"{position}.{name}": value for name, value in collated.items() if name != "values"}
        return arrays

    def _decompress(self, frame: Buffer, size: int) -> Buffer:
        sizes = [size]
        for step in self._compression[:-1]:
            sizes.append(step.max_bytes(sizes[-1]))
        data = frame
        for step, most in zip(reversed(self._compression), reversed(sizes), strict=True):
            data = step.decode(data, most)
        return data

    def _inputs(self, dtype: torch.dtype) -> list[torch.dtype]:
        """Return the dtype that each array step takes."""
        inputs = [dtype]
        for step in self._arrays[:-1]:
            inputs.append(step.encoded_specs(ArraySpec((1, 1, 1), inputs[-1]))["values"].dtype)
        return inputs

    def dequantize(
        self, arrays: Mapping[str, Tensor], dtype: torch.dtype, compute_dtype: torch.dtype | None = None
    ) -> Tensor:
        """See base class."""
        array, inputs = arrays["values"], self._inputs(dtype)
        for position in reversed(range(len(self._arrays))):
            array = self._arrays[position].decode(
                {"values": array, **_own(arrays, position)}, inputs[position], compute_dtype
            )
        return array

    def check(self, tokens: int, hidden: int) -> None:
        """See base class."""
        for step in self._arrays:
            step.check(tokens, hidden)

    def abs_bound(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> float:
        """See base class."""
        largest, inputs = largest_value(arrays["values"]), self._inputs(dtype)
        for position in reversed(range(len(self._arrays))):
            largest = self._arrays[position].abs_bound(_own(arrays, position), largest)
            if not largest < torch.finfo(inputs[position]).max:
                return math.inf
        return largest

    def error_bound(self, hidden_states: Tensor) -> Tensor:
        """See base class. Bounds of several array steps add up, and what each gives back is rounded to what it took."""
        inputs = [hidden_states]
        for step in self._arrays[:-1]:
            inputs.append(step.encode(inputs[-1])["values"])
        total = torch.zeros(len(hidden_states), dtype=torch.float64)
        for step, array in zip(reversed(self._arrays), reversed(inputs), strict=False):
            if array is not inputs[-1]:
                info = torch.finfo(array.dtype)
                largest = array.flatten(1).abs().amax(1).double() if array.numel() else total
                total = total + (largest + total) * info.eps / 2 + info.smallest_normal * info.eps / 2
            total = total + step.error_bound(array)
        return total


@dataclass(frozen=True)
class LosslessCodec(Codec):
    """Stores every bit: ``planes`` and ``zstd``.

    Attributes:
        level: zstd level, see ``Zstd``.
    """

    name: ClassVar[str] = "lossless"
    level: int = 1

    def __post_init__(self) -> None:
        """Check the level.

        Raises:
            ValueError: The level is not a whole number from 1 to 22.
        """
        self._pipeline  # noqa: B018

    @property
    def _pipeline(self) -> Pipeline:
        return Pipeline((Planes(), Zstd(self.level)))

    @property
    def lossless(self) -> bool:
        """See base class."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """See base class."""
        return {"name": self.name, "configuration": dataclasses.asdict(self)}

    def max_frame_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> list[int]:
        """See base class."""
        return self._pipeline.max_frame_bytes(shape, dtype)

    def encode(self, hidden_states: Tensor) -> list[bytes]:
        """See base class."""
        return self._pipeline.encode(hidden_states)

    def entropy_decode(self, frames: Sequence[Buffer], shape: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        """See base class."""
        return self._pipeline.entropy_decode(frames, shape, dtype)

    def dequantize(
        self, arrays: Mapping[str, Tensor], dtype: torch.dtype, compute_dtype: torch.dtype | None = None
    ) -> Tensor:
        """See base class."""
        return self._pipeline.dequantize(arrays, dtype, compute_dtype)

    def error_bound(self, hidden_states: Tensor) -> Tensor:
        """See base class."""
        return self._pipeline.error_bound(hidden_states)

    def abs_bound(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> float:
        """See base class."""
        return self._pipeline.abs_bound(arrays, dtype)
