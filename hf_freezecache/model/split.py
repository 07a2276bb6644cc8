"""Splits a ViT-like model at a block, without re-implementing any part of it.

The suffix is the model's own forward, in which the embeddings and the first ``k`` blocks are bypassed and the given
hidden states appear at block ``k``. Modules are patched on the instance and only while a suffix runs. Names, attributes
and state-dict keys never change, and the model stays the ordinary model between steps.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FreezeCacheError, UnsupportedModelError
from .features import output_and_features
from .injection import injecting
from .probe import (
    Trace,
    call_of_blank_image,
    configured_image_shape,
    evaluating,
    find_blocks,
    first_input,
    first_row,
    trace_model,
)
from .withheld import blank_images, first_tensor, outer_parameters

__all__ = [
    "Split",
    "Splits",
    "find_blocks",
    "first_tensor",
    "split_model",
]

logger = logging.getLogger(__name__)

ImageShape = tuple[int, ...]


class _PrefixDone(Exception):
    """Carries the hidden states out of the model's forward once the prefix has run."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


class Splits:
    """All splits of one model for images of one shape. Each is made once, and all share one trace of the model.

    Args:
        model: The model. Its modules must not be replaced while this object is in use.
        image_shape: (channels, height, width) of the images. Default: the shape that the model is configured for.
        call: Arguments of a forward of a few images, as they are in training. Default: one blank image. What
            is no tensor among them is passed to every forward of the model.
        strict: Whether a model that cannot be traced is refused. If not, its prefix can be frozen all the same.

    Raises:
        UnsupportedModelError: The model has no blocks to split at.
    """

    def __init__(
        self,
        model: nn.Module,
        image_shape: ImageShape | None = None,
        call: Mapping[str, Any] | None = None,
        strict: bool = True,
    ) -> None:
        self.model = model
        self.strict = strict
        self.image_shape = image_shape
        self.call = call
        self.constants = {name: value for name, value in (call or {}).items() if not isinstance(value, Tensor)}
        self.blocks_name, self.blocks = find_blocks(model, call)
        self._splits: dict[int, Split] = {}
        self.outer = outer_parameters(model)

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the model."""
        return len(self.blocks)

    def see(self, call: Mapping[str, Any]) -> None:
        """Take the first row of a forward for tracing, if neither a call nor a trace was there before."""
        if self.call is None and "trace" not in vars(self):
            self.call = first_row(call)

    @functools.cached_property
    def trace(self) -> Trace:
        """What one forward tells about the model; made when it is first needed.

        Raises:
            UnsupportedModelError: See ``trace_model``.
        """
        call = call_of_blank_image(self.model, self.image_shape) if self.call is None else self.call
        return trace_model(self.model, call, (self.blocks_name, self.blocks))

    @functools.cached_property
    def stem(self) -> list[nn.Module]:
        """Modules that run before block 0. Without ``strict``, of a model that cannot be traced: those registered before it.

        Raises:
            UnsupportedModelError: See ``trace_model``.
        """
        try:
            return list(self.trace.stem)
        except UnsupportedModelError as error:
            if self.strict:
                raise
            logger.warning("What stands before its blocks is taken for what runs before them. %s", error)
        before = []
        for depth, module in enumerate(self.ancestors):
            for name, child in module.named_children():
                if name == self.blocks_name.split(".")[depth]:
                    break
                before.append(child)
        return before

    def parameters(self, split_point: int) -> frozenset[str]:
        """Return the names of all parameters on which the hidden states at a split were seen to depend."""
        _ = self.stem  # says so if the model cannot be traced
        return self.trace.parameters[split_point] if "trace" in vars(self) else frozenset()

    @functools.cached_property
    def ancestors(self) -> list[nn.Module]:
        """The model and the modules between it and the blocks, from the outside in."""
        path = self.blocks_name.split(".")[:-1]
        return [self.model.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1)]

    def at(self, split_point: int) -> Split:
        """Return the split before block ``split_point``.

        Raises:
            UnsupportedModelError: The split point is out of range.
        """
        if split_point not in self._splits:
            self._splits[split_point] = Split(self, split_point)
        return self._splits[split_point]


class Split:
    """A model cut before block ``k``: ``suffix(prefix(x))`` is ``model(x)``.

    Args:
        splits: The splits of the model.
        split_point: ``k``, the number of blocks in the prefix.

    Raises:
        UnsupportedModelError: The split point is out of range.
    """

    def __init__(self, splits: Splits, split_point: int) -> None:
        self._splits = splits
        self.model = splits.model
        self.blocks_name = splits.blocks_name
        self.blocks = splits.blocks
        self.num_blocks = splits.num_blocks
        if not isinstance(split_point, int) or not 0 <= split_point <= self.num_blocks:
            raise UnsupportedModelError(
                f"Split point {split_point!r} is not possible: {type(self.model).__name__} has {self.num_blocks} blocks "
                f"at '{self.blocks_name}'; give a whole number from 0 to {self.num_blocks}."
            )
        self.split_point = split_point
        self._seen_shape: ImageShape | None = None

    @property
    def image_shape(self) -> ImageShape:
        """(channels, height, width) of the images.

        It is the shape given to ``Splits``. Without one it is that of the first images that ``prefix`` saw, and before
        those the configured shape.
        """
        return self._splits.image_shape or self._seen_shape or configured_image_shape(self.model) or (3, 224, 224)

    @property
    def stem(self) -> list[nn.Module]:
        """Modules that run before block 0, see ``Splits.stem``."""
        return self._splits.stem

    def placeholder(self, batch_size: int) -> Tensor:
        """Return pixel values (batch_size, *image_shape) of NaN that take no memory: all strides are 0.

        They have the true shape, since some models read the height and the width. No suffix may read more of them.
        """
        return blank_images(self._splits.outer, batch_size, self.image_shape, float("nan"))

    def prefix_modules(self) -> list[nn.Module]:
        """Return the modules that make up the prefix: all that run before block 0, then blocks ``[:k]``."""
        return [*self.stem, *list(self.blocks)[: self.split_point]]

    def prefix_parameters(self) -> dict[str, nn.Parameter]:
        """Return name -> parameter of the prefix, in the model's order.

        Those of ``prefix_modules``, and any other on which the hidden states at the split were seen to depend.
        """
        members = {p for module in self.prefix_modules() for p in module.parameters()}
        return {
            name: p
            for name, p in self.model.named_parameters()
            if p in members or name in self._splits.parameters(self.split_point)
        }

    def prefix_buffers(self) -> dict[str, Tensor]:
        """Return name -> buffer of the prefix modules, in the model's order."""
        members = {id(b) for module in self.prefix_modules() for b in module.buffers()}
        return {name: b for name, b in self.model.named_buffers() if id(b) in members}

    def prefix(self, pixel_values: Tensor, **extra: Any) -> Tensor:
        """Run embeddings and blocks ``[:k]``.

        Args:
            pixel_values: (batch, channels, height, width), in the model's dtype, on its device.
            extra: Further arguments of the model's forward, e.g. ``interpolate_pos_encoding``.

        Returns:
            Hidden states (batch, tokens, hidden) that enter block ``k``, or leave the last block if there is none.
            The dtype is whatever the model computes in: fp32 under bf16 autocast with fp32 weights.

        Raises:
            UnsupportedModelError: The images have another shape than this split was made for.
        """
        self._check_shape(pixel_values)
        self._splits.see({"pixel_values": pixel_values, **extra})
        if self.split_point == 0:

            def before_first(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                raise _PrefixDone(first_input(args, kwargs))

            handle = self.blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)
        else:

            def after_last(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                raise _PrefixDone(first_tensor(output))

            handle = self.blocks[self.split_point - 1].register_forward_hook(after_last)
        try:
            self.model(pixel_values=pixel_values, **{**self._splits.constants, **extra})
        except _PrefixDone as done:
            return done.hidden_states
        finally:
            handle.remove()
        raise self._not_reached(self.split_point)

    def _check_shape(self, pixel_values: Tensor) -> None:
        found: ImageShape = tuple(pixel_values.shape[1:])  # type: ignore[assignment]
        expected = self._splits.image_shape or self._seen_shape
        if expected is not None and found != expected:
            raise UnsupportedModelError(
                f"This split of {type(self.model).__name__} is for images of shape {expected}, found {found}. Make another "
                f"one: split_model(model, {self.split_point}, image_shape={found})."
            )
        self._seen_shape = found

    def injecting(self, hidden_states: Tensor, fill: float = float("nan")) -> AbstractContextManager[None]:
        """While active, a forward of the model skips the prefix and finds ``hidden_states`` at block ``k``.

        See ``injection.injecting``. Give the forward ``placeholder(batch)`` as pixel values, plain or ``Withheld``.

        Args:
            hidden_states: (batch, tokens, hidden), on the model's device.
            fill: What stands for values that do not exist.

        Raises:
            UnsupportedModelError: See ``trace_model``.
        """
        splits = self._splits
        return injecting(splits.ancestors, list(self.blocks), splits.trace, self.split_point, hidden_states, fill)

    def suffix(self, hidden_states: Tensor, labels: Tensor | None = None, **extra: Any) -> Any:
        """Run blocks ``[k:]``, the final norm and the head.

        Args:
            hidden_states: (batch, tokens, hidden), as ``prefix`` gave them.
            labels: Passed to the model if given.
            extra: Further arguments of the model's forward.

        Returns:
            The model's own output.
        """
        if labels is not None:
            extra["labels"] = labels
        with self.injecting(hidden_states):
            return self._run(hidden_states, extra)

    def _run(self, hidden_states: Tensor, extra: dict[str, Any]) -> Any:
        arguments = {**self._splits.constants, **extra}
        return self.model(pixel_values=self.placeholder(len(hidden_states)), **arguments)

    def _not_reached(self, block: int) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self.model).__name__} cannot be split at block {block} of {self.num_blocks}: its forward ended without "
            "getting there."
        )

    def run_blocks(self, hidden_states: Tensor, stop: int, **extra: Any) -> Tensor:
        """Run blocks ``[k:stop]``.

        Args:
            hidden_states: (batch, tokens, hidden), as ``prefix`` gave them.
            stop: Block before which to stop, greater than ``split_point``.
            extra: Further arguments of the model's forward.

        Returns:
            Hidden states (batch, tokens, hidden) that enter block ``stop``.

        Raises:
            UnsupportedModelError: ``stop`` is not behind the split point, or there is no such block.
        """
        if not self.split_point < stop <= self.num_blocks:
            raise UnsupportedModelError(
                f"Cannot go on from block {self.split_point} to {stop}; expected {self.split_point + 1} to {self.num_blocks}."
            )

        def after_last(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            raise _PrefixDone(first_tensor(output))

        _ = self._splits.trace  # runs the model; must not meet the hook
        handle = self.blocks[stop - 1].register_forward_hook(after_last)
        try:
            with self.injecting(hidden_states):
                self._run(hidden_states, extra)
        except _PrefixDone as done:
            return done.hidden_states
        finally:
            handle.remove()
        raise self._not_reached(stop)

    def logits_and_features(self, hidden_states: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
        """Run the suffix, and also return what its head saw, see ``features.output_and_features``.

        Args:
            hidden_states: (batch, tokens, hidden), as ``prefix`` gave them.
            extra: Further arguments of the model's forward.
        """
        # The stem also runs the model, which must not meet the hooks.
        before_head = [*self.stem, *self.blocks]
        return output_and_features(self.model, before_head, lambda: self.suffix(hidden_states, **extra))

    def verify(self, batch: dict[str, Any], tolerance: float | None = None) -> float:
        """Compare the split with the model on one batch, in eval mode.

        Args:
            batch: ``pixel_values`` and what else the forward takes.
            tolerance: Largest accepted absolute difference of the first output (logits, or last hidden states),
                relative to the largest absolute output. Default: 0 on a CPU, where equal shapes give equal bits,
                and 1e-3 elsewhere, where kernels need not be deterministic.

        Returns:
            The largest absolute difference.

        Raises:
            UnsupportedModelError: The difference exceeds the tolerance.
        """
        batch = {name: value for name, value in batch.items() if name != "labels"}
        extra = {name: value for name, value in batch.items() if name != "pixel_values"}
        name = type(self.model).__name__
        try:
            with evaluating(self.model, parameter_gradients=None), torch.no_grad():
                exact = first_tensor(self.model(**batch)).float()
                split = first_tensor(self.suffix(self.prefix(**batch), **extra)).float()
        except FreezeCacheError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{name} cannot be split at block {self.split_point} of {self.num_blocks}: running it fails with "
                f"{type(error).__name__}: {error}"
            ) from error
        if tolerance is None:
            tolerance = 0.0 if exact.device.type == "cpu" else 1e-3
        difference = float((exact - split).abs().max()) if exact.shape == split.shape else float("inf")
        if not difference <= tolerance * float(exact.abs().max()):
            raise UnsupportedModelError(
                f"{name} cannot be split at block {self.split_point} of {self.num_blocks}: its suffix does not reproduce it "
                f"(largest difference {difference:.3g}, expected at most {tolerance:g} relative). Use plain Trainer for this "
                "model, and please report it."
            )
        return difference


def split_model(model: nn.Module, k: int, image_shape: ImageShape | None = None) -> Split:
    """Cut a ViT-like model before block ``k``.

    The blocks are found by looking at the model, not at its name. Nothing of the model is changed.

    Args:
        model: A model whose forward takes ``pixel_values``.
        k: Number of blocks in the prefix, from 0 to the number of blocks.
        image_shape: (channels, height, width) of the images. Default: that of the first images that ``prefix`` sees.

    Raises:
        UnsupportedModelError: No blocks were found (the message says what was looked for), or ``k`` is out of range.
    """
    return Splits(model, image_shape).at(k)
