"""The cost of training, counted in passes through blocks: a forward pass of one block is one, a backward pass is two.

A backward pass computes gradients of inputs and of weights. Embeddings, head, image pipeline, codec and evaluation are left out.
"""

from __future__ import annotations

__all__ = ["STEP_PASSES", "passes_of_step"]

#: A forward and a backward pass of one block.
STEP_PASSES = 3


def passes_of_step(num_blocks: int, split_point: int, token_keep: float = 1.0) -> float:
    """Return the passes per image through the blocks that a training step changes.

    Args:
        num_blocks: Blocks of the model.
        split_point: Number of frozen blocks.
        token_keep: Share of the patch tokens that the other blocks see; with fewer tokens a pass counts less.
    """
    return STEP_PASSES * (num_blocks - split_point) * token_keep
