"""Finds the linear layers that make queries, keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .probe import call_of_blank_image, evaluating
from .split import Splits

__all__ = ["attention_inputs"]


def attention_inputs(splits: Splits) -> list[nn.Linear]:
    """Return the linear layers that make queries, keys and values in the blocks, one by one or at once, in the order in which they run.

    Names differ from model to model, so one forward tells: in a module whose class name contains "attention", they are the linear layer
    that runs first, and those that are given the same tensor. Together they give more channels than they take: one that gives as many is
    the layer behind the attention of a model whose queries are made without calling a module, or makes queries alone.

    Args:
        splits: The splits of the model.

    Returns:
        The layers; none if they are not found in every block, or the forward fails before the last one.
    """
    model, blocks = splits.model, list(splits.blocks)
    call = call_of_blank_image(model, splits.image_shape) if splits.call is None else splits.call
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
    found = [[layer for layer, given in seen[block] if _same(given, seen[block][0][1])] for block in blocks]
    if any(sum(layer.out_features for layer in layers) <= layers[0].in_features for layers in found):
        return []
    return [layer for layers in found for layer in layers]


def _same(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape and first.stride() == second.stride()
