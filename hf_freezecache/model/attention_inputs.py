"""Finds the linear layers that make queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .probe import evaluating

__all__ = ["attention_inputs"]


def attention_inputs(model: nn.Module, blocks: Sequence[nn.Module], call: Mapping[str, Any]) -> list[nn.Linear]:
    """Return the linear layers that make queries, keys and values in the blocks, one by one or at once, in the order in which they run.

    Names differ from model to model, so one forward tells: in a module whose class name contains "attention", they are the linear layer
    that runs first, and those that are given the same tensor.

    Args:
        model: The model.
        blocks: Its blocks.
        call: Arguments of a forward.

    Returns:
        The layers; none if a block has none, or the forward fails before the last block.
    """
    # Inputs are kept: the memory of one that is freed may be that of the next.
    seen: dict[nn.Module, list[tuple[nn.Linear, Tensor]]] = {}
    handles = []
    for block in blocks:
        attention = [module for module in block.modules() if "attention" in type(module).__name__.lower()]
        linear = {each: None for module in attention for each in module.modules() if isinstance(each, nn.Linear)}
        for layer in linear:

            def before(layer: nn.Module, args: tuple[Any, ...], block: nn.Module = block) -> None:
                assert isinstance(layer, nn.Linear)
                seen.setdefault(block, []).append((layer, args[0]))

            handles.append(layer.register_forward_pre_hook(before))
    try:
        with evaluating(model, parameter_gradients=False):
            model(**call)
    except Exception:  # the loss may need what the call lacks
        pass
    finally:
        for handle in handles:
            handle.remove()
    if any(block not in seen for block in blocks):
        return []
    return [layer for block in blocks for layer, given in seen[block] if _same(given, seen[block][0][1])]


def _same(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape and first.stride() == second.stride()
