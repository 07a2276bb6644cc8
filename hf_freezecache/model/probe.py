"""Finds the blocks of a ViT-like model, and traces one forward to see what runs before them and what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import UnsupportedModelError
from .withheld import blank_images, first_tensor, outer_parameters, shapes_of

__all__ = [
    "Blocks",
    "Trace",
    "call_of_blank_image",
    "find_blocks",
    "first_input",
    "first_row",
    "other_images",
    "trace_model",
]

Blocks = tuple[str, nn.ModuleList | nn.Sequential]


def configured_image_shape(model: nn.Module) -> tuple[int, ...] | None:
    """Return the shape that the model's configuration, or the model itself, names; ``None`` if neither does."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if size is None:
        return getattr(model, "image_shape", None)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    return (getattr(config, "num_channels", 3), height, width)


def call_of_blank_image(model: nn.Module, image_shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Return arguments of a forward of one blank image.

    Args:
        model: The model.
        image_shape: (channels, height, width), for models that are not configured for a size. The configured size is the
            one that every model takes without being asked to interpolate.
    """
    shape = configured_image_shape(model) or image_shape or (3, 224, 224)
    return {"pixel_values": blank_images(outer_parameters(model), 1, shape).contiguous()}


def first_row(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward of the first of several samples: tensors (samples, ...) are cut."""
    rows = len(call["pixel_values"])
    return {
        name: value[:1] if isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows else value
        for name, value in call.items()
    }


def other_images(images: Tensor) -> Tensor:
    """Return images of the same shape and dtype that show something else."""
    return 0.37 - images.flip(-1) if images.is_floating_point() else images.flip(-1)


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states among the arguments of a block: the first argument, or the first tensor that is named.

    Raises:
        UnsupportedModelError: There is no tensor.
    """
    return first_tensor(args[0] if args else kwargs.get("hidden_states", list(kwargs.values())))


# ---- Finding the blocks ----


def _candidates(model: nn.Module) -> list[Blocks]:
    """Return all lists of at least two modules of one class that contain attention, the shallowest first."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and len(module) >= 2
        and len({type(block) for block in module}) == 1
        and all(any("attention" in type(m).__name__.lower() for m in block.modules()) for block in module)
    ]
    return sorted(found, key=lambda candidate: candidate[0].count("."))


def find_blocks(model: nn.Module, call: Mapping[str, Any] | None = None) -> Blocks:
    """Return the name and the container of the encoder blocks.

    They are the shallowest ``ModuleList`` or ``Sequential`` of at least two modules of one class, each of which has
    a submodule whose class name contains "attention". Where a model has several, one forward tells which of them sees the
    image: an encoder may be unused, or stand beside one of text.

    Args:
        model: The model.
        call: Arguments of a forward. Default: one blank image.

    Raises:
        UnsupportedModelError: The model has no such container.
    """
    candidates = _candidates(model)
    if not candidates:
        lists = [name for name, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be split: looked for a ModuleList or Sequential of at least two modules "
            "of one class that contain attention (a submodule whose class name contains 'Attention'), and found "
            f"none among {lists or 'no list of modules at all'}. Use a ViT-like encoder, or plain Trainer."
        )
    if len(candidates) > 1:
        running = _that_see_the_image(model, candidates, call_of_blank_image(model) if call is None else call)
        candidates = running or candidates
    return candidates[0]


def _that_see_the_image(model: nn.Module, candidates: list[Blocks], call: Mapping[str, Any]) -> list[Blocks]:
    """Return the candidates whose blocks run once each on something that depends on the image, in the order given.

    The forward may fail for want of other inputs: what ran before counts.
    """
    runs: dict[nn.Module, int] = {}

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        runs[block] = runs.get(block, 0) + (1 if any(tensor.requires_grad for tensor in inputs) else 2)

    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True)
        for block in {block: None for _, blocks in candidates for block in blocks}
    ]
    call = {**call, "pixel_values": call["pixel_values"].detach().clone().requires_grad_(True)}
    try:
        with evaluating(model, parameter_gradients=False):
            model(**call)
    except Exception:  # tracing tells what is wrong
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [(name, blocks) for name, blocks in candidates if all(runs.get(block) == 1 for block in blocks)]


# ---- Tracing ----


@dataclass(frozen=True)
class Trace:
    """What one forward tells about a model, for every split point.

    Attributes:
        stem: Modules that run before block 0, in the order of their first call.
        entrance: The first of them on whose output the hidden states depend: the embeddings, as a rule.
        entrance_output: Output of the entrance, a tensor or a tuple such as Data2Vec's, as ``withheld.shapes_of`` gives it.
        bypassable: The modules behind it that map hidden states to hidden states (CLIP's norm, say).
        block_outputs: Output of each block, as ``withheld.shapes_of`` gives it.
        hidden_shapes: For each split point from 0 to the number of blocks, the shape of the hidden states there.
        layouts: For each split point, their dimensions by descending stride. Kernels may round otherwise in another layout.
        parameters: For each split point, the names of all parameters on which the hidden states there depend.
    """

    stem: tuple[nn.Module, ...]
    entrance: nn.Module
    entrance_output: Any
    bypassable: tuple[nn.Module, ...]
    block_outputs: tuple[Any, ...]
    hidden_shapes: tuple[torch.Size, ...]
    layouts: tuple[tuple[int, ...], ...]
    parameters: tuple[frozenset[str], ...]


class _Recorder:
    """Forward hooks that note in which order modules run, and what goes in and out of them."""

    def __init__(self, model: nn.Module, blocks_name: str, blocks: nn.Module) -> None:
        self.model = model
        self.stem_calls: list[tuple[nn.Module, tuple[Any, ...], Any]] = []
        self.block_inputs: list[Tensor] = []
        self.block_outputs: list[Any] = []
        self.order: list[nn.Module] = []
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
            self.order.append(block)
            self.block_inputs.append(first_input(args, kwargs))

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
def evaluating(model: nn.Module, *, parameter_gradients: bool | None) -> Iterator[None]:
    """Put a model into eval mode with gradients enabled; put all back afterwards, random states too.

    Args:
        model: The model.
        parameter_gradients: Whether every float parameter requires gradients meanwhile, or none; ``None`` changes nothing.
    """
    training = {module: module.training for module in model.modules()}
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    devices = {parameter.device for parameter in requires_grad if parameter.device.type == "cuda"}
    try:
        model.eval()
        if parameter_gradients is not None:
            for parameter in requires_grad:
                parameter.requires_grad_(parameter_gradients and parameter.is_floating_point())
        # The caller may be inside `no_grad`; which parameters matter is read off the graph.
        with torch.enable_grad(), torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
        # Some modules keep what they computed in eval mode, with its graph, until they train again (LeViT).
        model.train()
        for module, flag in training.items():
            module.training = flag


def _dependencies(hidden_states: list[Tensor], names: dict[int, str]) -> tuple[list[frozenset[str]], set[Any]]:
    """Return, for each of several hidden states, the names of the parameters it or an earlier one depends on.

    Walks the graph of autograd, each node once; ``names`` maps the ``id`` of a parameter to its name. The second result is
    the nodes behind the first hidden states.
    """
    visited: set[Any] = set()
    reached: set[str] = set()
    dependencies: list[frozenset[str]] = []
    behind_first: set[Any] = set()
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
        if not dependencies:
            behind_first = set(visited)
        dependencies.append(frozenset(reached))
    return dependencies, behind_first


@contextmanager
def _until(done: Callable[[], bool]) -> Iterator[None]:
    """Pass over an error that comes when all that is needed is done: the loss may need what the call lacks."""
    try:
        yield
    except Exception:
        if not done():
            raise


def _leads_to(output: Any, nodes: set[Any]) -> bool:
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return any(tensor.grad_fn in nodes for tensor in tensors if tensor.grad_fn is not None)


def trace_model(model: nn.Module, call: Mapping[str, Any], found: Blocks | None = None) -> Trace:
    """Run a model once and watch the order in which its modules run. Nothing of the model is changed.

    Args:
        model: A model whose forward takes ``pixel_values``.
        call: Arguments of the forward, without labels.
        found: What ``find_blocks`` gave.

    Raises:
        UnsupportedModelError: The model cannot be run, or its blocks do not run once each.
    """
    blocks_name, blocks = found or find_blocks(model, call)
    recorder = _Recorder(model, blocks_name, blocks)
    name = type(model).__name__
    images = call["pixel_values"]
    try:
        with recorder.hooks(), evaluating(model, parameter_gradients=True):
            if images.is_floating_point():
                # So that what is made of the image is seen also where no parameter has a part in it.
                images = images.detach().clone().requires_grad_(True)
            with _until(lambda: len(recorder.block_outputs) == len(blocks)):
                model(**{**call, "pixel_values": images})
            hidden_states = list(recorder.block_inputs)
            if recorder.order == list(blocks):
                hidden_states.append(first_tensor(recorder.block_outputs[-1]))
            names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
            parameters, behind_first = _dependencies(hidden_states, names)
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} cannot be split: tracing it on images of shape {tuple(images.shape)} failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    upstream = [place for place, (_, _, output) in enumerate(recorder.stem_calls) if _leads_to(output, behind_first)]
    if recorder.order != list(blocks) or len(recorder.block_outputs) != len(blocks) or not upstream:
        raise UnsupportedModelError(
            f"{name} cannot be split: its {len(blocks)} modules at '{blocks_name}' ran {len(recorder.block_outputs)} "
            f"times for one image and {len(recorder.stem_calls)} modules ran before them; expected each block once, one "
            "after the other, and embeddings before them."
        )
    given = [recorder.block_inputs[0], *map(first_tensor, recorder.block_outputs)]
    hidden_shape, rows = recorder.block_inputs[0].shape, len(images)
    entrance, _, entrance_output = recorder.stem_calls[upstream[0]]

    def is_hidden(value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape == hidden_shape

    return Trace(
        stem=tuple(module for module, _, _ in recorder.stem_calls),
        entrance=entrance,
        entrance_output=shapes_of(entrance_output, rows, hidden_shape),
        bypassable=tuple(
            module
            for module, args, output in (recorder.stem_calls[place] for place in upstream[1:])
            if is_hidden(output) and args and is_hidden(args[0])
        ),
        block_outputs=tuple(shapes_of(output, rows, hidden_shape) for output in recorder.block_outputs),
        hidden_shapes=tuple(states.shape for states in given),
        layouts=tuple(
            tuple(sorted(range(states.dim()), key=lambda place, states=states: -states.stride(place)))  # type: ignore[misc]
            for states in given
        ),
        parameters=tuple(parameters),
    )
