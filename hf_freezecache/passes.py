"""The cost of training, counted in passes through blocks: a forward pass of one block is one, a backward pass is two.

A backward pass computes gradients of inputs and of weights, which count as one each. Where a part of a block's weights trains, those of
weights count as that part. Where adapters train in their place, as with LoRA, there are none; the adapters themselves are left out. So are
embeddings, head, image pipeline, codec and evaluation.
"""

from __future__ import annotations

__all__ = ["passes_of_step"]


def passes_of_step(num_blocks: int, split_point: int, token_keep: float = 1.0, trained_share: float = 1.0) -> float:
    """Return the passes per image through the blocks that a training step changes.

    Args:
        num_blocks: Blocks of the model.
        split_point: Number of frozen blocks.
        token_keep: Share of the patch tokens that the other blocks see, but for block 0; with fewer tokens a pass counts less.
        trained_share: Share of these blocks' own weights that trains; 0 where adapters train in their place.
    """
    whole = int(split_point == 0)  # the block in front of which no token can be dropped, see `Stage.tokens_point`
    return (2 + trained_share) * (whole + (num_blocks - split_point - whole) * token_keep)
