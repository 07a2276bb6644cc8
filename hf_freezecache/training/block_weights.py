"""Which weights of the blocks train: all, or those that make queries, keys and values alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import UnsupportedModelError, UnsupportedSetupError
from ..model.attention_inputs import attention_inputs
from ..model.split import Splits
from .freezer import Freezer

__all__ = [
    "MOST_ADAPTERS",
    "only_adapters_train",
    "qkv_share",
    "qkv_weights",
    "share_of",
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
    """Return what trains of the layers that make queries, keys and values.

    Raises:
        UnsupportedSetupError: The layers are not found, do not train, or adapters train in place of the blocks' own weights.
    """
    found = {parameter for layer in attention_inputs(splits) for parameter in layer.parameters()}
    training = {parameter for parameter in found if parameter.requires_grad}
    of_blocks = [found & set(block.parameters()) for block in splits.blocks]
    # Adapters are layers beside those that they adapt, and are given the same tensor.
    parts = any(0 < len(training & of_block) < len(of_block) for of_block in of_blocks)
    if parts or (len(training) < len(found) and only_adapters_train(splits.blocks)):
        raise UnsupportedSetupError(
            "block_weights='qkv' trains all weights that make queries, keys and values of a block, but some of these do not require "
            "gradients, as where adapters train in their place. Remove block_weights, or choose the layers that get adapters (of PEFT: "
            "target_modules)."
        )
    if not training:
        words = "none requires a gradient" if found else "none was found"
        raise UnsupportedSetupError(
            f"block_weights='qkv' trains the layers that make queries, keys and values, but in the blocks of {type(splits.model).__name__} "
            f"{words}. Looked for torch.nn.Linear, in every block, inside a module whose class name contains 'Attention': the first that "
            "runs, and those that are given the same tensor. Remove block_weights."
        )
    return training


def qkv_share(splits: Splits) -> float:
    """Return which share of the blocks' weights makes queries, keys and values, and trains.

    Raises:
        UnsupportedSetupError: See ``qkv_weights``.
    """
    return _share(splits, qkv_weights(splits))


def withhold_weights(splits: Splits, freezer: Freezer) -> None:
    """Let the layers that make queries, keys and values train alone of all that runs before the last block has ended.

    Args:
        splits: The splits of the model.
        freezer: Withholds the others until the run ends, and keeps the share of the blocks' weights that trains.

    Raises:
        UnsupportedSetupError: See ``qkv_weights``.
    """
    training = qkv_weights(splits)
    freezer.block_weights, freezer.trained_share = "qkv", _share(splits, training)
    before_head = splits.at(splits.num_blocks).prefix_parameters().values()
    freezer.withhold(parameter for parameter in before_head if parameter not in training)


def share_of(splits: Splits, layers: Iterable[nn.Module]) -> float | None:
    """Return which share of the blocks' weights trains and is of some layers; ``None`` if nothing of them does."""
    training = {parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad}
    return _share(splits, training) if training else None


def tokens_and_channels(splits: Splits) -> tuple[int, int]:
    """Return how many tokens of an image the first block sees, and of how many channels each is; zeros where that cannot be seen."""
    try:
        shape = splits.trace.hidden_shapes[0]
    except UnsupportedModelError:
        return 0, 0
    return (shape[1], shape[2]) if len(shape) == 3 and shape[0] == 1 else (0, 0)


def _share(splits: Splits, chosen: set[nn.Parameter]) -> float:
    in_blocks = [parameter for block in splits.blocks for parameter in block.parameters()]
    return sum(p.numel() for p in in_blocks if p in chosen) / sum(p.numel() for p in in_blocks)
