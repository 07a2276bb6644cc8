"""Lets a model's own forward begin at its split: the modules of the prefix are bypassed, and hidden states appear there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .probe import Trace
from .withheld import TensorShape, Withheld, with_first_tensor

__all__ = ["injecting"]


def _name_of_first_tensor(named: Mapping[str, Any]) -> str:
    return next(name for name, value in named.items() if isinstance(value, Tensor))


def _with_plain_tensors(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a module of the model NaN for what is withheld: it may compute with what it will not use."""
    return pytree.tree_map_only(Withheld, Withheld.plain, (args, kwargs))  # type: ignore[no-any-return]


@contextmanager
def injecting(
    ancestors: Sequence[nn.Module],
    blocks: Sequence[nn.Module],
    trace: Trace,
    split_point: int,
    hidden_states: Tensor,
    fill: float,
) -> Iterator[None]:
    """While active, a forward of the model skips the prefix and finds ``hidden_states`` at block ``k``.

    Modules are patched on the instance. It works through DDP, autocast and
    activation checkpointing wrappers, since it touches submodules only. Whatever the prefix would have computed before
    the split is ``fill`` inside the model. Among the model's outputs it is ``Withheld``.

    Args:
        ancestors: The model and the modules between it and the blocks, from the outside in.
        blocks: All blocks.
        trace: What a forward told about the model.
        split_point: ``k``, the number of blocks that are bypassed.
        hidden_states: (batch, tokens, hidden), on the model's device.
        fill: What stands for values that do not exist.
    """
    same_shape = trace.hidden_shapes[split_point] == trace.hidden_shapes[0]
    layout = trace.layouts[split_point]
    if layout != tuple(sorted(layout)) and len(layout) == hidden_states.dim():
        inverse = [layout.index(place) for place in range(len(layout))]
        hidden_states = hidden_states.permute(layout).contiguous().permute(inverse)
    stand_ins: list[Tensor] = []
    patched: list[tuple[nn.Module, Any]] = []

    def patch(module: nn.Module, forward: Callable[..., Any]) -> None:
        patched.append((module, module.__dict__.get("forward")))
        module.forward = forward

    def stand_in(shape: TensorShape) -> Tensor:
        stand_ins.append(shape.filled(hidden_states, same_shape, fill))
        return stand_ins[-1]

    def answer(shapes: Any, first: Tensor | None = None) -> Callable[..., Any]:
        if first is not None:
            shapes = with_first_tensor(shapes, first)
        return lambda *args, **kwargs: pytree.tree_map_only(TensorShape, stand_in, shapes)

    def inject(
        block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (with_first_tensor(args[0], hidden_states), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else _name_of_first_tensor(kwargs)
        return args, {**kwargs, name: hidden_states}

    handles = [module.register_forward_pre_hook(_with_plain_tensors, with_kwargs=True) for module in ancestors]
    handles.append(
        ancestors[0].register_forward_hook(
            lambda module, args, output: _guard(output, stand_ins, split_point, len(blocks))
        )
    )
    try:
        if split_point == 0:
            handles.append(blocks[0].register_forward_pre_hook(inject, with_kwargs=True))
        patch(trace.entrance, answer(trace.entrance_output))
        for module in trace.bypassable:
            patch(module, answer(TensorShape.of_hidden(trace.hidden_shapes[0], hidden_states.dtype)))
        for place, block in enumerate(blocks[:split_point]):
            last = place == split_point - 1
            patch(block, answer(trace.block_outputs[place], hidden_states if last else None))
        yield
    finally:
        for module, own in reversed(patched):
            if own is None:
                del module.forward
            else:  # the instance had a forward of its own
                module.forward = own
        for handle in handles:
            handle.remove()


def _guard(output: Any, stand_ins: list[Tensor], split_point: int, num_blocks: int) -> Any:
    """Return a model's output with what was not computed as ``Withheld``; ``None`` if there is nothing of it."""
    if split_point == 0 or isinstance(output, Tensor):
        return None
    reason = (
        f"the first {split_point} blocks do not run. Leave it out of the loss, or train such stages with "
        "CacheConfig(mode='never')."
    )
    ids = {id(tensor) for tensor in stand_ins}

    def withhold(tensor: Tensor) -> Tensor:
        return Withheld.of(tensor, "A hidden state of a frozen block", reason) if id(tensor) in ids else tensor

    guarded = pytree.tree_map_only(Tensor, withhold, output)
    if isinstance(guarded, dict):
        for name, values in guarded.items():
            # Where they are collected by hooks inside the blocks, those of blocks that did not run are missing.
            if "attentions" in name and isinstance(values, tuple) and len(values) == num_blocks - split_point:
                like = values[0] if values else stand_ins[0]
                missing = Withheld.of(like, "An attention map of a frozen block", reason)
                guarded[name] = (missing,) * split_point + values
    return guarded
