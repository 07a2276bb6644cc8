"""How the tokens of hidden states lie on the image."""

from __future__ import annotations

from typing import Any

__all__ = ["token_grid"]


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
