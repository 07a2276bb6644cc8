"""Finds the blocks of a ViT-like model, and traces one forward to see what runs before them and what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

__all__ = ["Trace", "find_blocks", "first_tensor", "placeholder", "trace_model", "with_first_tensor"]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """Return the name and the container of the encoder blocks.

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


def with_first_tensor(template: Any, tensor: Tensor) -> Any:
    """Return ``template`` with its first tensor replaced by ``tensor``."""
    if isinstance(template, Tensor):
        return tensor
    items = list(template)
    position = next(i for i, item in enumerate(items) if isinstance(item, Tensor))
    items[position] = tensor
    return tuple(items) if isinstance(template, tuple) else items


def placeholder(model: nn.Module, batch_size: int, image_shape: tuple[int, int, int]) -> Tensor:
    """Return blank pixel values (batch_size, *image_shape) that take no memory: all strides are 0.

    The dtype and the device are those of the model's first float parameter.
    """
    like = next(p for p in model.parameters() if p.is_floating_point())
    return torch.zeros(1, dtype=like.dtype, device=like.device).expand(batch_size, *image_shape)


@dataclass(frozen=True)
class Trace:
    """What one forward of one blank image tells about a model, for every split point.

    Attributes:
        stem: Modules that run before block 0, in the order of their first call. The embeddings come first.
        stem_output: Output of the embeddings: a tensor, or a tuple such as Data2Vec's.
        bypassable: Those of the other stem modules that map hidden states to hidden states (CLIP's norm, say).
        block_outputs: Output of each block.
        parameters: For each split point from 0 to the number of blocks, the names of all parameters on which the
            hidden states there depend.
    """

    stem: tuple[nn.Module, ...]
    stem_output: Any
    bypassable: tuple[nn.Module, ...]
    block_outputs: tuple[Any, ...]
    parameters: tuple[frozenset[str], ...]


class _Recorder:
    """Forward hooks that note in which order modules run, and what goes in and out of them."""

    def __init__(self, model: nn.Module, blocks_name: str, blocks: nn.Module) -> None:
        self.model = model
        self.stem_calls: list[tuple[nn.Module, tuple[Any, ...], Any]] = []
        self.block_inputs: list[Tensor] = []
        self.block_outputs: list[Any] = []
        self._blocks = list(blocks.children())
        path = blocks_name.split(".")
        self._ancestors = {".".join(path[:depth]) for depth in range(len(path) + 1)}

    def _outer_modules(self) -> Iterator[nn.Module]:
        """Yield the modules beside the blocks and beside what contains them."""
        for name, module in self.model.named_modules():
            parent = name.rpartition(".")[0]
            if name not in self._ancestors and parent in self._ancestors and module not in self._blocks:
                yield module

    @contextmanager
    def hooks(self) -> Iterator[None]:
        def after_outer(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self.block_inputs and all(module is not seen for seen, _, _ in self.stem_calls):
                self.stem_calls.append((module, args, output))

        def before_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.block_inputs.append(args[0] if args else kwargs["hidden_states"])

        def after_block(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.block_outputs.append(output)

        handles = [module.register_forward_hook(after_outer) for module in self._outer_modules()]
        for block in self._blocks:
            handles.append(block.register_forward_pre_hook(before_block, with_kwargs=True))
            handles.append(block.register_forward_hook(after_block))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _all_gradients_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Let every float parameter require gradients, in eval mode; put all back afterwards."""
    training = {module: module.training for module in model.modules()}
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        for parameter in requires_grad:
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        # The caller may be inside `no_grad`; which parameters matter is read off the graph.
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
        for module, flag in training.items():
            module.training = flag


def _dependencies(hidden_states: list[Tensor], names: dict[int, str]) -> tuple[frozenset[str], ...]:
    """Return, for each of several hidden states, the names of the parameters it or an earlier one depends on.

    Walks the graph of autograd, each node once; ``names`` maps the ``id`` of a parameter to its name.
    """
    visited: set[Any] = set()
    reached: set[str] = set()
    dependencies = []
    for hidden in hidden_states:
        pending = [hidden.grad_fn]
        if hidden.grad_fn is None and id(hidden) in names:
            reached.add(names[id(hidden)])
        while pending:
            node = pending.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in names:
                reached.add(names[id(variable)])
            pending.extend(following for following, _ in node.next_functions)
        dependencies.append(frozenset(reached))
    return tuple(dependencies)


def _without_values(output: Any) -> Any:
    """Return an output whose first tensor is empty: its structure is needed, its graph would hold memory."""
    return with_first_tensor(output, torch.empty(0))


def trace_model(model: nn.Module, image_shape: tuple[int, int, int]) -> Trace:
    """Run one blank image through a model and watch the order in which its modules run.

    Args:
        model: A model whose forward takes ``pixel_values``. Nothing of it is changed.
        image_shape: (channels, height, width) of the blank image.

    Raises:
        UnsupportedModelError: The model cannot be run on such an image, or its blocks do not run once each.
    """
    blocks_name, blocks = find_blocks(model)
    recorder = _Recorder(model, blocks_name, blocks)
    name = type(model).__name__
    try:
        with recorder.hooks(), _all_gradients_in_eval_mode(model):
            model(pixel_values=placeholder(model, 1, image_shape).contiguous())
            hidden_states = list(recorder.block_inputs)
            if len(recorder.block_outputs) == len(blocks):
                hidden_states.append(first_tensor(recorder.block_outputs[-1]))
            names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
            parameters = _dependencies(hidden_states, names)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise UnsupportedModelError(
            f"{name} cannot be split: tracing it on one blank image of shape {image_shape} failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    if len(recorder.block_outputs) != len(blocks) or not recorder.stem_calls:
        raise UnsupportedModelError(
            f"{name} cannot be split: its {len(blocks)} modules at '{blocks_name}' ran {len(recorder.block_outputs)} "
            f"times for one image and {len(recorder.stem_calls)} modules ran before them; expected each block once, "
            "and embeddings before them."
        )
    shape = recorder.block_inputs[0].shape
    is_hidden: Callable[[Any], bool] = lambda value: isinstance(value, Tensor) and value.shape == shape  # noqa: E731
    return Trace(
        stem=tuple(module for module, _, _ in recorder.stem_calls),
        stem_output=_without_values(recorder.stem_calls[0][2]),
        bypassable=tuple(
            module
            for module, args, output in recorder.stem_calls[1:]
            if is_hidden(output) and args and is_hidden(args[0])
        ),
        block_outputs=tuple(_without_values(output) for output in recorder.block_outputs),
        parameters=parameters,
    )
