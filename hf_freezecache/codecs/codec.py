"""Codecs: how the hidden states of a chunk become frames, and back."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model.tokens import take_tokens
from .array_names import BASE, high_bytes, join_groups, main_array, side_array, side_arrays
from .base import (
    FLOATS,
    FRAMES,
    ArraySpec,
    ArrayStep,
    Buffer,
    BytesStep,
    Step,
    join_bytes,
    largest_of_samples,
    largest_value,
)
from .entropy import Zstd
from .planes import Planes

__all__ = ["Codec", "floats_of", "integers_of"]

_SIDE_BYTES = Planes()


def _words(kinds: frozenset[str]) -> str:
    return " or ".join(sorted(kinds))


def integers_of(arrays: Mapping[str, Tensor], view: str) -> Tensor:
    """Return what the last array step gave of a view, with the high bytes that lie apart."""
    values, high = arrays[main_array(view)], arrays.get(high_bytes(view))
    return values if high is None else join_bytes(values, high)


def floats_of(arrays: Mapping[str, Tensor], view: str, dtype: torch.dtype) -> Tensor:
    """Return ``integers_of`` in a floating dtype, rounded once, as a new tensor."""
    values, high = arrays[main_array(view)].to(dtype), arrays.get(high_bytes(view))
    if high is not None:  # either part is exact in bf16, too
        values[..., : high.shape[-1]].add_(high, alpha=256)
    return values


@dataclass(frozen=True)
class Codec:
    """Turns a chunk of hidden states into frames and back: array steps, one step to bytes, and ``zstd``.

    Arrays that an array step puts beside the main one (scales, prefix tokens) go to bytes by ``planes`` and through the
    same ``zstd``. Frames of the main array come first, then those of the other arrays, step by step. A frame is an independent
    zstd frame with content size and checksum: a reader can check sizes before it takes memory, and damage shows when a frame
    is decoded.

    Decoding has two halves. Workers run ``entropy_decode``, which gives arrays of integers whose first axis counts samples.
    ``dequantize`` turns a batch of them into hidden states on whatever device they lie.

    Attributes:
        steps: Steps in the order of encoding.
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
        if last.gives != FRAMES:
            raise ValueError(
                f"{last.name!r} cannot be last: it gives {last.gives}. End with 'planes' or 'pack', and then 'zstd', whose "
                "frames have a checksum"
            )

    @property
    def array_steps(self) -> list[ArrayStep]:
        """The steps from arrays to arrays, in the order of encoding."""
        return [step for step in self.steps if isinstance(step, ArrayStep)]

    @property
    def _bytes_step(self) -> BytesStep:
        return next(step for step in self.steps if isinstance(step, BytesStep))

    @property
    def _zstd(self) -> Zstd:
        return next(step for step in self.steps if isinstance(step, Zstd))

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"name", "configuration"}``, from which ``codec_from_dict`` makes an equal codec."""
        return {"name": self.name, "configuration": {"steps": [step.to_dict() for step in self.steps]}}

    @property
    def lossless(self) -> bool:
        """Whether every bit comes back."""
        return all(step.lossless for step in self.array_steps)

    # ---- Fitting ----

    def tensors(self) -> dict[str, Tensor]:
        """Return the fitted tensors, which JSON does not hold, as ``<position of the step>.<name>``."""
        return join_groups({str(position): step.tensors() for position, step in enumerate(self.steps)})

    @property
    def needs_fit(self) -> bool:
        """Whether any step has yet to be fitted."""
        return any(step.needs_fit for step in self.array_steps)

    @property
    def needs_gradients(self) -> bool:
        """Whether ``fit`` needs gradients."""
        return any(step.needs_fit and step.needs_gradients for step in self.array_steps)

    def with_gradient_weight(self, weight: float) -> Codec:
        """Return the codec whose steps that are not fitted yet weigh directions by gradients, where they can."""
        weighed = {
            position: dataclasses.replace(step, gradient_weight=weight)  # type: ignore[call-arg]
            for position, step in enumerate(self.steps)
            if "gradient_weight" in step.configuration() and getattr(step, "needs_fit", False)
        }
        return Codec(tuple(weighed.get(position, step) for position, step in enumerate(self.steps)))

    def fit(self, sample: Tensor, prefix_tokens: int, grid: tuple[int, int], gradients: Tensor | None = None) -> Codec:
        """Fit the steps that need it, each to what the step before makes of the sample; see ``ArrayStep.fit``.

        Returns:
            The fitted codec; the codec itself if nothing needs to be fitted.

        Raises:
            ValueError: A step cannot be fitted on this sample.
        """
        codec, array = self, sample
        for position, step in enumerate(self.array_steps):
            if not codec.needs_fit:
                break
            if step.needs_fit:
                step = step.fit(array, prefix_tokens, grid, gradients)
                codec = Codec((*codec.steps[:position], step, *codec.steps[position + 1 :]))
            if codec.needs_fit:
                array = step.encode(array)["values"]
        return codec

    @property
    def has_step_size(self) -> bool:
        """Whether a step has a quantization step size that can be chosen."""
        return any(step.has_step_size for step in self.array_steps)

    @property
    def step_size(self) -> float | None:
        """Quantization step size; ``None`` before ``fit``, and of a codec without any."""
        return next((step.step_size for step in self.array_steps if step.has_step_size), None)

    def with_step_size(self, step_size: float) -> Codec:
        """Return the same fit with another quantization step size.

        Raises:
            ValueError: No step has one, it is not fitted, or it cannot have this one.
        """
        if not self.has_step_size:
            raise ValueError("no step of the codec has a step size")
        return Codec(
            tuple(
                step.with_step_size(step_size) if isinstance(step, ArrayStep) and step.has_step_size else step
                for step in self.steps
            )
        )

    def check(self, tokens: int, hidden: int) -> None:
        """Check what was fitted against hidden states of (tokens, hidden); a file may hold anything.

        Raises:
            ValueError: It does not fit, or is not finite.
        """
        for step in self.array_steps:
            step.check(tokens, hidden)

    # ---- Encoding and decoding ----

    def _specs(self, spec: ArraySpec) -> tuple[list[ArraySpec], list[dict[str, ArraySpec]]]:
        """Return the spec that each array step takes and, last, that of the main array; and what each step gives."""
        inputs, outputs = [spec], []
        for step in self.array_steps:
            outputs.append(step.encoded_specs(inputs[-1]))
            inputs.append(outputs[-1]["values"])
        return inputs, outputs

    def _buffers(self, spec: ArraySpec) -> list[tuple[BytesStep, ArraySpec, list[int]]]:
        """Return the serializing step, spec and largest buffer sizes of the main array and of all others."""
        inputs, outputs = self._specs(spec)
        sides = [side for specs in outputs for name, side in specs.items() if name != "values"]
        serialized = [(self._bytes_step, inputs[-1]), *((_SIDE_BYTES, side) for side in sides)]
        return [(step, array, step.max_bytes(array)) for step, array in serialized]

    def max_frame_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> list[int]:
        """Return the largest size of each frame of a chunk, known before it is encoded.

        Raises:
            ValueError: Such a chunk cannot be encoded.
        """
        buffers = self._buffers(ArraySpec(tuple(shape), dtype))
        return [self._zstd.max_bytes(size) for _, _, sizes in buffers for size in sizes]

    def encode(self, hidden_states: Tensor) -> list[bytes]:
        """Encode a chunk.

        Args:
            hidden_states: (samples, tokens, hidden), one of ``DTYPES``, on the CPU.

        Returns:
            As many frames as ``max_frame_bytes`` has sizes.

        Raises:
            ValueError: A lossy codec was given NaN or infinite values, or values out of its range.
        """
        array, sides = hidden_states, []
        for step in self.array_steps:
            encoded = step.encode(array)
            array = encoded.pop("values")
            sides += list(encoded.values())
        buffers = self._bytes_step.encode(array)
        for side in sides:
            buffers += _SIDE_BYTES.encode(side)
        return [self._zstd.encode(buffer) for buffer in buffers]

    def entropy_decode(
        self, frames: Sequence[Buffer], shape: Sequence[int], dtype: torch.dtype, view: str = BASE
    ) -> dict[str, Tensor]:
        """Undo entropy coding and packing.

        Args:
            frames: What ``encode`` returned.
            shape: (samples, tokens, hidden).
            dtype: Dtype of the encoded hidden states.
            view: ``BASE`` or ``COPY``; it becomes part of the names, see ``array_names``.

        Returns:
            Arrays of (samples, ...) by name, on the CPU, in memory that they share with nothing.

        Raises:
            ValueError: A frame is damaged or of another size than shape and dtype allow.
        """
        spec = ArraySpec(tuple(shape), dtype)
        expected = self._buffers(spec)
        count = sum(len(sizes) for _, _, sizes in expected)
        if len(frames) != count:
            raise ValueError(f"{len(frames)} frames, expected {count}")
        remaining = iter(frames)

        def buffers(sizes: Sequence[int]) -> list[Buffer]:
            return [self._zstd.decode(next(remaining), size) for size in sizes]

        (serializer, spec_of_main, sizes_of_main), *others = expected
        main_buffers, high = buffers(sizes_of_main), None
        if self.token_axes(view):  # samples may lose positions, of which the high bytes know nothing
            main = serializer.decode(main_buffers, spec_of_main)
        else:
            main, high = serializer.decode_bytes(main_buffers, spec_of_main)
        decoded = iter([step.decode(buffers(sizes), array) for step, array, sizes in others])
        inputs, outputs = self._specs(spec)
        arrays: dict[str, Tensor] = {} if high is None else {high_bytes(view): high}
        for position, (step, taken, specs) in enumerate(zip(self.array_steps, inputs, outputs, strict=False)):
            sides = {name: next(decoded) for name in specs if name != "values"}
            collated = step.collatable({"values": main, **sides}, taken)
            arrays |= {side_array(view, position, name): side for name, side in collated.items() if name != "values"}
        return {main_array(view): main, **arrays}

    def _input_dtypes(self, dtype: torch.dtype) -> list[torch.dtype]:
        """Return the dtype that each array step takes."""
        dtypes = [dtype]
        for step in self.array_steps[:-1]:
            dtypes.append(step.encoded_specs(ArraySpec((1, 1, 1), dtypes[-1]))["values"].dtype)
        return dtypes

    def token_axes(self, view: str = BASE) -> dict[str, int]:
        """Return the axis of the tokens in the arrays of ``entropy_decode``, by name, where tokens are decoded one by one.

        Returns:
            Empty if a step needs all tokens: then ``dequantize`` takes all, whichever it is to give.
        """
        axes, steps = {main_array(view): 1}, self.array_steps
        for position, step in enumerate(steps):
            if step.token_axes is None:
                return {}
            axes[main_array(view)] = step.token_axes["values"]
            axes |= {side_array(view, position, name): a for name, a in step.token_axes.items() if name != "values"}
        return axes

    def dequantize(
        self,
        arrays: Mapping[str, Tensor],
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None = None,
        view: str = BASE,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Turn a batch of what ``entropy_decode`` gave into hidden states, on the device where it lies.

        Args:
            arrays: Arrays of (batch, ...) by name; those of another view are passed over. With ``positions``, those that
                ``token_axes`` names hold only these tokens.
            dtype: Dtype of the hidden states.
            compute_dtype: Dtype of the arithmetic, e.g. that of the run's autocast. ``None``: fp32, or fp64 for fp64
                hidden states; ``error_bound`` holds for this one only.
            view: As for ``entropy_decode``.
            positions: Which tokens of each sample to give, (batch, kept) int64, in rising order; ``None`` for all.

        Returns:
            (batch, tokens, hidden), or (batch, kept, hidden).
        """
        array, dtypes = integers_of(arrays, view), self._input_dtypes(dtype)
        taken = positions is None or bool(self.token_axes(view))
        for position, step in reversed(list(enumerate(self.array_steps))):
            named = {"values": array, **side_arrays(arrays, view, position)}
            if not taken and positions is not None and self._gives_states(position):
                array, taken = step.decode_kept(named, positions, dtypes[position], compute_dtype), True
            else:
                array = step.decode(named, dtypes[position], compute_dtype)
        return array if taken or positions is None else take_tokens(array, positions)

    def _gives_states(self, position: int) -> bool:
        """Say whether a step decodes to (batch, tokens, hidden), of which the steps before it take each token by itself."""
        return all(step.token_axes == {"values": 1} for step in self.array_steps[:position])

    def decode(self, frames: Sequence[Buffer], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Decode a chunk: ``entropy_decode``, then ``dequantize`` on the CPU.

        Returns:
            Hidden states of this shape and dtype, on the CPU, in memory that they share with nothing.

        Raises:
            ValueError: A frame is damaged or of another size than shape and dtype call for.
        """
        return self.dequantize(self.entropy_decode(frames, shape, dtype), dtype)

    # ---- Bounds ----

    def abs_bound(self, arrays: Mapping[str, Tensor], dtype: torch.dtype, view: str = BASE) -> float:
        """Return a bound of the absolute values that ``dequantize`` gives, at less cost than dequantizing.

        Returns:
            The bound; infinity or NaN if the codec knows none.
        """
        array, high = arrays[main_array(view)], arrays.get(high_bytes(view))
        largest, dtypes = largest_value(array), self._input_dtypes(dtype)
        if high is not None:
            largest = max(largest, largest_value(join_bytes(array[..., : high.shape[-1]], high)))
        for position, step in reversed(list(enumerate(self.array_steps))):
            largest = step.abs_bound(side_arrays(arrays, view, position), largest)
            if not largest < torch.finfo(dtypes[position]).max:
                return math.inf
        return largest

    def error_bound(self, hidden_states: Tensor) -> Tensor:
        """Return the largest root-mean-square error of each sample, (samples,), float64; zeros if lossless.

        The bounds of several array steps add up, and each step's result is rounded to the dtype that it took.
        """
        inputs = [hidden_states]
        for step in self.array_steps[:-1]:
            inputs.append(step.encode(inputs[-1])["values"])
        total = torch.zeros(len(hidden_states), dtype=torch.float64)
        for step, array in zip(reversed(self.array_steps), reversed(inputs), strict=False):
            if array is not inputs[-1]:
                info = torch.finfo(array.dtype)
                rounding = (largest_of_samples(array) + total) * info.eps / 2 + info.smallest_normal * info.eps / 2
                total = total + rounding
            total = total + step.error_bound(array)
        return total
