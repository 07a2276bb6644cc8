"""The rule of ``lr_scale="auto"``: how many times the user's learning rate a stage trains with."""

from __future__ import annotations

import itertools

__all__ = ["RULE", "budget_scale", "lr_scale"]

#: (Share of the blocks that are frozen, scale): straight lines between them. All blocks are frozen where the head trains alone.
#: Source: the best rates among a few that were tried for each schedule and for full fine-tuning with ``layer_decay=0.75`` (DeiT-Tiny
#: at 160 pixels, 101 classes with 12 images each, one seed). The last, for a head alone: of 2 to 16 times the rate of the blocks that
#: thaw then, 4 gave the best runs on cifar10 and Caltech-101 at 112 pixels; a head that has learned its rows by heart is a worse start.
RULE = ((0.0, 1.0), (0.5, 1.5), (0.75, 2.0), (11 / 12, 3.0), (1.0, 4.0))
#: The best rate of full fine-tuning falls with this power of the epochs: 1.5e-3, 1.2e-3, 1e-3, 8e-4 and 6e-4 for 1, 2, 3, 4 and
#: 8 of them (DeiT-Tiny at 160 pixels, 101 classes with 12 images each, one seed).
_POWER = 0.4


def lr_scale(split_point: int, num_blocks: int) -> float:
    """Return what the learning rates of a stage are multiplied by. The fewer blocks train, the higher the rates may be.

    Args:
        split_point: Number of frozen blocks.
        num_blocks: Blocks of the model, at least 1.
    """
    share = split_point / num_blocks
    for (start, low), (end, high) in itertools.pairwise(RULE):
        if share <= end:
            return low + (high - low) * (share - start) / (end - start)
    return RULE[-1][1]


def budget_scale(budget: float | None) -> float:
    """Return what a learning rate is multiplied by that was found for longer runs: short ones need higher rates.

    Args:
        budget: Cost of the run as a share of that for which the rate was found, above 0; ``None`` for the same.
    """
    return 1.0 if budget is None else budget**-_POWER
