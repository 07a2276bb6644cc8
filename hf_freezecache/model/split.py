"""Splits a ViT-like model at a block, without re-implementing any part of it.

The suffix is the model's own forward, in which the embeddings and the first ``k`` blocks are bypassed and the given
hidden states appear at block ``k``. Modules are patched on the instance and only while a suffix runs, so names,
attributes and state-dict keys never change and the model stays the ordinary model between steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

__all__ = ["Split", "find_blocks", "first_tensor", "split_model", "token_grid"]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """Return name and container of the encoder blocks.

    They are the shallowest ``ModuleList`` or ``Sequential`` of at least two modules of one class, each of which has
    a submodule whose class name contains "attention".

    Raises:
        UnsupportedModelError: The model has no such container.
    """
    candidates = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and len(module) >= 2
        and len({type(block) for block in module}) == 1
        and all(any("attention" in type(m).__name__.lower() for m in block.modules()) for block in module)
    ]
    if not candidates:
        lists = [name for name, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be split: looked for a ModuleList or Sequential of at least two modules "
            "of one class that contain attention (a submodule whose class name contains 'Attention'), and found "
            f"none among {lists or 'no list of modules at all'}. Use a ViT-like encoder, or plain Trainer."
        )
    _, name, blocks = min(candidates, key=lambda candidate: candidate[0])
    return name, blocks


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of a module's output: itself, or the first in a tuple, list or ``ModelOutput``."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return next(value for value in values if isinstance(value, Tensor))


def _with_first_tensor(template: Any, tensor: Tensor) -> Any:
    """Return ``template`` with its first tensor replaced by ``tensor``."""
    if isinstance(template, Tensor):
        return tensor
    items = list(template)
    position = next(i for i, item in enumerate(items) if isinstance(item, Tensor))
    items[position] = tensor
    return tuple(items) if isinstance(template, tuple) else items


class _PrefixDone(Exception):
    """Carries the hidden states out of the model's forward once the prefix has run."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


@dataclass(frozen=True)
class _Probe:
    """What one traced forward of one image tells about the model.

    Attributes:
        stem: Modules that run before block 0, in order of their first call; the embeddings come first.
        stem_output: Output of the embeddings (a tensor, or a tuple such as Data2Vec's).
        bypassable: Those of the other stem modules that map hidden states to hidden states (CLIP's pre-norm).
        block_outputs: Output of each block.
        parameters: Names of all parameters on which the hidden states at the split depend.
    """

    stem: tuple[nn.Module, ...]
    stem_output: Any
    bypassable: tuple[nn.Module, ...]
    block_outputs: tuple[Any, ...]
    parameters: frozenset[str]


class Split:
    """A model cut before block ``k``: ``suffix(prefix(x))`` is ``model(x)``.

    Attributes:
        model: The whole model, unchanged.
        split_point: ``k``, the number of blocks in the prefix.
        num_blocks: Number of blocks of the model.
        blocks_name: Dotted name of the container of the blocks.
        image_shape: (channels, height, width) of the images; read from the configuration until ``prefix`` sees one.
    """

    def __init__(self, model: nn.Module, split_point: int) -> None:
        """Use ``split_model``, which says what can go wrong."""
        self.model = model
        self.blocks_name, self._blocks = find_blocks(model)
        self.num_blocks = len(self._blocks)
        if not isinstance(split_point, int) or not 0 <= split_point <= self.num_blocks:
            raise UnsupportedModelError(
                f"Split point {split_point!r} is not possible: {type(model).__name__} has {self.num_blocks} blocks at "
                f"'{self.blocks_name}'; give a whole number from 0 to {self.num_blocks}."
            )
        self.split_point = split_point
        self.image_shape = self._configured_image_shape()

    def _configured_image_shape(self) -> tuple[int, int, int]:
        config = getattr(self.model, "config", None)
        config = getattr(config, "vision_config", config)
        size = getattr(config, "image_size", None)
        if size is None:
            return getattr(self, "image_shape", (3, 224, 224))
        height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
        return (getattr(config, "num_channels", 3), height, width)

    @property
    def _reference_parameter(self) -> Tensor:
        return next(p for p in self.model.parameters() if p.is_floating_point())

    def placeholder(self, batch_size: int, image_shape: tuple[int, int, int] | None = None) -> Tensor:
        """Return blank pixel values that take no memory (all strides 0).

        Args:
            batch_size: Images.
            image_shape: (channels, height, width); default ``self.image_shape``, since some models read the size.
        """
        like = self._reference_parameter
        shape = self.image_shape if image_shape is None else image_shape
        return torch.zeros(1, dtype=like.dtype, device=like.device).expand(batch_size, *shape)

    @functools.cached_property
    def _probe(self) -> _Probe:
        """Run one blank image through the model and watch the order in which modules run."""
        ancestors = {""} | {
            ".".join(self.blocks_name.split(".")[:depth]) for depth in range(1, self.blocks_name.count(".") + 2)
        }
        outer = {
            name: module
            for name, module in self.model.named_modules()
            if name not in ancestors and name.rpartition(".")[0] in ancestors and module not in set(self._blocks)
        }
        calls: list[tuple[nn.Module, tuple[Any, ...], Any]] = []
        block_outputs: list[Any] = []
        hidden_at_split: list[Tensor] = []

        def on_outer(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not block_inputs and all(module is not seen for seen, _, _ in calls):
                calls.append((module, args, output))

        block_inputs: list[Tensor] = []

        def on_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            block_inputs.append(args[0] if args else kwargs["hidden_states"])
            if len(block_inputs) == self.split_point + 1:
                hidden_at_split.append(block_inputs[-1])

        def after_block(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            block_outputs.append(output)

        training = {module: module.training for module in self.model.modules()}
        trainable = {p: p.requires_grad for p in self.model.parameters()}
        handles = [module.register_forward_hook(on_outer) for module in outer.values()]
        for block in self._blocks:
            handles.append(block.register_forward_pre_hook(on_block, with_kwargs=True))
            handles.append(block.register_forward_hook(after_block))
        try:
            self.model.eval()
            for parameter in trainable:
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            # The caller may be inside `no_grad`; which parameters matter is read off the graph.
            with torch.enable_grad():
                # The size that every model takes without being asked to interpolate.
                pixel_values = self.placeholder(1, self._configured_image_shape()).contiguous()
                self.model(pixel_values=pixel_values)
                if len(block_outputs) == self.num_blocks and not hidden_at_split:
                    hidden_at_split.append(first_tensor(block_outputs[-1]))
                if hidden_at_split:
                    names, parameters = zip(
                        *((n, p) for n, p in self.model.named_parameters() if p.requires_grad), strict=True
                    )
                    gradients = torch.autograd.grad(hidden_at_split[0].float().sum(), parameters, allow_unused=True)
                    depends = {n for n, g in zip(names, gradients, strict=True) if g is not None}
        except (TypeError, ValueError, RuntimeError, KeyError) as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot be split: tracing it on one blank image of shape "
                f"{self._configured_image_shape()} failed with {type(error).__name__}: {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            for parameter, flag in trainable.items():
                parameter.requires_grad_(flag)
            for module, flag in training.items():
                module.training = flag
        if len(block_outputs) != self.num_blocks or not calls:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot be split: its {self.num_blocks} modules at '{self.blocks_name}' "
                f"ran {len(block_outputs)} times for one image and {len(calls)} modules ran before them; expected "
                "each block once, and embeddings before them."
            )
        first = block_inputs[0]
        bypassable = tuple(
            module
            for module, args, output in calls[1:]
            if isinstance(output, Tensor) and output.shape == first.shape and args and args[0].shape == first.shape
        )

        def shell(output: Any) -> Any:
            # Keep the structure, not the graph.
            return _with_first_tensor(output, torch.empty(0))

        return _Probe(
            stem=tuple(module for module, _, _ in calls),
            stem_output=shell(calls[0][2]),
            bypassable=bypassable,
            block_outputs=tuple(shell(output) for output in block_outputs),
            parameters=frozenset(depends),
        )

    def prefix_modules(self) -> list[nn.Module]:
        """Return the modules that make up the prefix: all that run before block 0, then blocks ``[:k]``."""
        return [*self._probe.stem, *list(self._blocks)[: self.split_point]]

    def prefix_parameters(self) -> dict[str, nn.Parameter]:
        """Return name -> parameter of the prefix, in the model's order.

        Those of ``prefix_modules``, and any other on which the hidden states at the split were seen to depend.
        """
        members = {p for module in self.prefix_modules() for p in module.parameters()}
        return {name: p for name, p in self.model.named_parameters() if p in members or name in self._probe.parameters}

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
        """
        self.image_shape = tuple(pixel_values.shape[1:])  # type: ignore[assignment]
        if self.split_point == 0:

            def before_first(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                raise _PrefixDone(args[0] if args else kwargs["hidden_states"])

            handle = self._blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)
        else:

            def after_last(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                raise _PrefixDone(first_tensor(output))

            handle = self._blocks[self.split_point - 1].register_forward_hook(after_last)
        try:
            self.model(pixel_values=pixel_values, **extra)
        except _PrefixDone as done:
            return done.hidden_states
        finally:
            handle.remove()
        raise AssertionError("the forward ended without reaching the split")

    @contextmanager
    def injecting(self, hidden_states: Tensor) -> Iterator[None]:
        """While active, a forward of the model skips the prefix and finds ``hidden_states`` at block ``k``.

        Give the forward ``placeholder(batch)`` as pixel values. Works through DDP, autocast and activation
        checkpointing wrappers, since it touches submodules only.

        Args:
            hidden_states: (batch, tokens, hidden), on the model's device.
        """
        probe = self._probe
        patched: list[tuple[nn.Module, Any]] = []

        def patch(module: nn.Module, forward: Callable[..., Any]) -> None:
            patched.append((module, module.__dict__.get("forward")))
            module.forward = forward

        def answer(output: Any) -> Callable[..., Any]:
            return lambda *args, **kwargs: output

        def inject(
            block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (hidden_states, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden_states}

        handle = None
        try:
            if self.split_point == 0:
                handle = self._blocks[0].register_forward_pre_hook(inject, with_kwargs=True)
            # Every skipped module answers with the hidden states at the split: the models build masks from their
            # shape, dtype and device only.
            patch(probe.stem[0], answer(_with_first_tensor(probe.stem_output, hidden_states)))
            for module in probe.bypassable:
                patch(module, answer(hidden_states))
            for block, template in zip(
                list(self._blocks)[: self.split_point], probe.block_outputs[: self.split_point], strict=True
            ):
                patch(block, answer(_with_first_tensor(template, hidden_states)))
            yield
        finally:
            for module, own in reversed(patched):
                if own is None:
                    del module.forward
                else:  # the instance had a forward of its own
                    module.forward = own
            if handle is not None:
                handle.remove()

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
            return self.model(pixel_values=self.placeholder(len(hidden_states)), **extra)

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

        _ = self._probe  # runs the model; must not meet the hook
        handle = self._blocks[stop - 1].register_forward_hook(after_last)
        try:
            with self.injecting(hidden_states):
                self.model(pixel_values=self.placeholder(len(hidden_states)), **extra)
        except _PrefixDone as done:
            return done.hidden_states
        finally:
            handle.remove()
        raise AssertionError("the forward ended without reaching the block")

    def logits_and_features(self, hidden_states: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
        """Run the suffix, and also return what its head saw.

        Args:
            hidden_states: (batch, tokens, hidden), as ``prefix`` gave them.
            extra: Further arguments of the model's forward.

        Returns:
            The model's first output, e.g. logits (batch, classes), and the final features (batch, features): the input of
            the last ``nn.Linear`` behind the blocks that gives as many values as the output has. Without one, the output.
        """
        # Also runs the model, which must not meet the hooks.
        before_head = [*self._probe.stem, *self._blocks]
        inside = {module for part in before_head for module in part.modules()}
        seen: list[tuple[int, Tensor]] = []

        def record(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
            seen.append((module.out_features, args[0]))

        handles = [
            module.register_forward_pre_hook(record)
            for module in self.model.modules()
            if isinstance(module, nn.Linear) and module not in inside
        ]
        try:
            output = first_tensor(self.suffix(hidden_states, **extra))
        finally:
            for handle in handles:
                handle.remove()
        features = [tensor for size, tensor in seen if size == output.shape[-1]]
        return output, (features[-1] if features else output).flatten(1)

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
        training = {module: module.training for module in self.model.modules()}
        try:
            self.model.eval()
            with torch.no_grad():
                exact = first_tensor(self.model(**batch)).float()
                split = first_tensor(self.suffix(self.prefix(**batch), **extra)).float()
        finally:
            for module, flag in training.items():
                module.training = flag
        if tolerance is None:
            tolerance = 0.0 if exact.device.type == "cpu" else 1e-3
        difference = float((exact - split).abs().max()) if exact.shape == split.shape else float("inf")
        if not difference <= tolerance * max(float(exact.abs().max()), 1.0):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot be split at block {self.split_point} of {self.num_blocks}: its "
                f"suffix does not reproduce it (largest difference {difference:.3g}, expected at most "
                f"{tolerance:g} relative). Use plain Trainer for this model, and please report it."
            )
        return difference


def token_grid(num_tokens: int, image_shape: tuple[int, int, int], config: Any = None) -> tuple[int, tuple[int, int]]:
    """Find how the tokens of hidden states lie on the image.

    Args:
        num_tokens: Tokens per sample.
        image_shape: (channels, height, width) of the images.
        config: The model's configuration, for its ``patch_size``.

    Returns:
        Number of leading prefix tokens (CLS, distillation, registers), and (height, width) of the grid of patches. Where no
        grid of the image's proportions with at most 16 prefix tokens is found: 0 and (1, num_tokens).
    """
    _, height, width = image_shape
    patch = getattr(getattr(config, "vision_config", config), "patch_size", None)
    if isinstance(patch, int) and patch > 0:
        grid = (height // patch, width // patch)
        if 0 <= num_tokens - grid[0] * grid[1] <= 16 and min(grid) > 0:
            return num_tokens - grid[0] * grid[1], grid
    for prefix_tokens in range(min(17, num_tokens)):
        patches = num_tokens - prefix_tokens
        rows = round((patches * height / width) ** 0.5)
        if rows > 0 and patches % rows == 0 and rows * rows * width == patches * height:
            return prefix_tokens, (rows, patches // rows)
    return 0, (1, num_tokens)


def split_model(model: nn.Module, k: int) -> Split:
    """Cut a ViT-like model before block ``k``.

    The blocks are found by looking at the model, not at its name. Nothing of the model is changed.

    Args:
        model: A model whose forward takes ``pixel_values``.
        k: Number of blocks in the prefix, from 0 to the number of blocks.

    Raises:
        UnsupportedModelError: No blocks were found (the message says what was looked for), or ``k`` is out of range.
    """
    return Split(model, k)
