"""The rule of ``lr_scale="auto"``: how many times the user's learning rate a stage trains with."""

from __future__ import annotations

import itertools

__all__ = ["RULE", "lr_scale"]

#: (Share of the blocks that are frozen, scale): straight lines between them, and the last scale behind.
#: Source: as ``auto_schedule.RECIPES``: the best rates among a few that were tried, one seed.
RULE = ((0.0, 1.0), (0.5, 1.5), (0.75, 2.0), (11 / 12, 3.0))


def lr_scale(split_point: int, num_blocks: int) -> float:
    """Return what the learning rates of a stage are multiplied by. The fewer blocks train, the higher the rates may be.

    The numbers of ``RULE`` are from single runs, in which full fine-tuning had ``layer_decay=0.75``, too.

    Args:
        split_point: Number of frozen blocks.
        num_blocks: Blocks of the model, at least 1.
    """
    share = split_point / num_blocks
    for (start, low), (end, high) in itertools.pairwise(RULE):
        if share <= end:
            return low + (high - low) * (share - start) / (end - start)
    return RULE[-1][1]
