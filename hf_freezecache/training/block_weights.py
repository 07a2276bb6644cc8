"""Which weights of the blocks train: all, or those that make queries, keys and values alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import UnsupportedModelError, UnsupportedSetupError
from ..model.split import Splits
from .freezer import Freezer

__all__ = [
    "MOST_ADAPTERS",
    "only_adapters_train",
    "qkv_weights",
    "share_of_qkv",
    "tokens_and_channels",
    "withhold_weights",
]

#: Blocks of which at most this share trains have adapters. LoRA of rank 16 on queries and values is 3% of DeiT-Tiny's blocks.
MOST_ADAPTERS = 0.25


def only_adapters_train(blocks: Iterable[nn.Module]) -> bool:
    """Whether what trains of the blocks is small beside what does not, as with LoRA: their own weights need no gradients."""
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    training = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return 0 < training <= MOST_ADAPTERS * sum(parameter.numel() for parameter in parameters)


def qkv_weights(splits: Splits) -> set[nn.Parameter]:
    """Return weights and biases of the layers that make queries, keys and values.

    Raises:
        UnsupportedSetupError: The layers are not found, do not train, or adapters train in place of the blocks' own weights.
    """
    name = type(splits.model).__name__
    if only_adapters_train(splits.blocks):
        raise UnsupportedSetupError(
            "block_weights='qkv' chooses among the blocks' own weights, but these do not train: adapters do in their place. Remove "
            "block_weights, or choose the layers that get adapters (of PEFT: target_modules)."
        )
    chosen = {parameter for layer in splits.qkv for parameter in layer.parameters()}
    if not any(parameter.requires_grad for parameter in chosen):
        found = "none requires a gradient" if chosen else "none was found"
        raise UnsupportedSetupError(
            f"block_weights='qkv' trains the layers that make queries, keys and values, but in the blocks of {name} {found}. Looked "
            "for torch.nn.Linear, in every block, inside a module whose class name contains 'Attention'. Remove block_weights."
        )
    return chosen


def withhold_weights(splits: Splits, freezer: Freezer) -> None:
    """Let the layers that make queries, keys and values train alone of all that runs before the last block has ended.

    Args:
        splits: The splits of the model.
        freezer: Withholds the others until the run ends, and keeps the share of the blocks' weights that trains.

    Raises:
        UnsupportedSetupError: See ``qkv_weights``.
    """
    chosen = qkv_weights(splits)
    freezer.trained_share = _share(splits, chosen)
    before_head = splits.at(splits.num_blocks).prefix_parameters().values()
    freezer.withhold(parameter for parameter in before_head if parameter not in chosen)


def share_of_qkv(splits: Splits) -> float | None:
    """Return which share of the blocks' weights makes queries, keys and values; ``None`` if these are not found, or some do not train."""
    chosen = {parameter for layer in splits.qkv for parameter in layer.parameters()}
    return _share(splits, chosen) if chosen and all(parameter.requires_grad for parameter in chosen) else None


def tokens_and_channels(splits: Splits) -> tuple[int, int]:
    """Return how many tokens of an image the first block sees, and of how many channels each is; zeros where that cannot be seen."""
    try:
        shape = splits.trace.hidden_shapes[0]
    except UnsupportedModelError:
        return 0, 0
    return (shape[1], shape[2]) if len(shape) == 3 else (0, 0)


def _share(splits: Splits, chosen: set[nn.Parameter]) -> float:
    in_blocks = [parameter for block in splits.blocks for parameter in block.parameters()]
    return sum(p.numel() for p in in_blocks if p in chosen) / sum(p.numel() for p in in_blocks)
