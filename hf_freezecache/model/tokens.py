"""How the tokens of hidden states lie on the image, and how some of them are taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["take_tokens", "token_grid"]


def token_grid(num_tokens: int, image_shape: tuple[int, ...], config: Any = None) -> tuple[int, tuple[int, int]]:
    """Find how the tokens of hidden states lie on the image.

    Args:
        num_tokens: Tokens per sample.
        image_shape: (channels, height, width) of the images. Where they come as patches, nothing tells the grid.
        config: The model's configuration, for its ``patch_size``.

    Returns:
        Number of leading prefix tokens (CLS, distillation, registers), and (height, width) of the grid of patches. Where no
        grid of the image's proportions with at most 16 prefix tokens is found: 0 and (1, num_tokens).
    """
    if len(image_shape) != 3:
        return 0, (1, num_tokens)
    _, height, width = image_shape
    patch = getattr(getattr(config, "vision_config", config), "patch_size", None)
    if isinstance(patch, int) and patch > 0:
        grid = (height // patch, width // patch)
        if 0 <= num_tokens - grid[0] * grid[1] <= 16 and min(grid) > 0:
            return num_tokens - grid[0] * grid[1], grid
    for prefix_tokens in range(min(17, num_tokens)):
        patches = num_tokens - prefix_tokens
        rows = round((patches * height / width) ** 0.5)
        if rows > 0 and patches % rows == 0 and rows * rows * width == patches * height:
            return prefix_tokens, (rows, patches // rows)
    return 0, (1, num_tokens)


def take_tokens(array: Tensor, positions: Tensor, axis: int = 1) -> Tensor:
    """Take some tokens of each sample, others of each.

    Args:
        array: (batch, tokens, ...), or with the tokens along another axis.
        positions: Which tokens, (batch, kept) int64; on any device.
        axis: Axis of the tokens, from 1 on.

    Returns:
        The same array with ``kept`` tokens, contiguous.
    """
    positions = positions.to(array.device)
    if axis == 1:
        batch, tokens = array.shape[:2]
        rows = positions + tokens * torch.arange(batch, device=array.device)[:, None]
        return array.flatten(0, 1).index_select(0, rows.flatten()).reshape(*positions.shape, *array.shape[2:])
    shape = [len(positions), *(1 for _ in array.shape[1:])]
    shape[axis] = positions.shape[1]
    sizes = [*array.shape]
    sizes[axis] = positions.shape[1]
    return array.gather(axis, positions.reshape(shape).expand(sizes))
