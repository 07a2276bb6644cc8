"""The cost of training, counted in passes through blocks: a forward pass of one block is one, a backward pass is two.

A backward pass computes gradients of inputs and of weights. Where adapters train in place of the blocks' own weights, as with LoRA, it
computes gradients of inputs only, and counts as one; the adapters themselves are left out. So are embeddings, head, image pipeline,
codec and evaluation.
"""

from __future__ import annotations

__all__ = ["ADAPTER_STEP_PASSES", "STEP_PASSES", "passes_of_step"]

#: A forward and a backward pass of one block.
STEP_PASSES = 3
#: The same where the block's own weights stay.
ADAPTER_STEP_PASSES = 2


def passes_of_step(num_blocks: int, split_point: int, token_keep: float = 1.0, step_passes: int = STEP_PASSES) -> float:
    """Return the passes per image through the blocks that a training step changes.

    Args:
        num_blocks: Blocks of the model.
        split_point: Number of frozen blocks.
        token_keep: Share of the patch tokens that the other blocks see, but for block 0; with fewer tokens a pass counts less.
        step_passes: Passes of a step through one block.
    """
    whole = int(split_point == 0)  # the block in front of which no token can be dropped, see `Stage.tokens_point`
    return step_passes * (whole + (num_blocks - split_point - whole) * token_keep)
