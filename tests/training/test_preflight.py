"""What no cache can hold is refused before one is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import make_trainer
from torch import nn

from hf_freezecache.errors import UnsupportedModelError


class GridBlock(nn.Module):
    """Attention within rows of a grid: (batch, height, width, hidden) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        rows = grid.flatten(0, 1)
        return grid + self.attention(rows, rows, rows)[0].view(grid.shape)


class GridModel(nn.Module):
    """Keeps its patches in a grid, as ViTDet, SAM and timm's Swin do."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Conv2d(3, 8, 4, 4)
        self.layers = nn.ModuleList(GridBlock() for _ in range(4))
        self.classifier = nn.Linear(8, 4)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None):
        grid = self.embeddings(pixel_values).permute(0, 2, 3, 1)
        for layer in self.layers:
            grid = layer(grid)
        logits = self.classifier(grid.mean((1, 2)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def test_hidden_states_in_a_grid(train_dataset) -> None:
    trainer = make_trainer(GridModel(), train_dataset, schedule="0:0,1:2", num_train_epochs=2)
    with pytest.raises(UnsupportedModelError, match=r"GridModel .*hidden states there are \(2, 4, 4, 8\) for 2 images"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not Path("caches").exists()
    live = make_trainer(GridModel(), train_dataset, schedule="0:2", num_train_epochs=1, cache={"mode": "never"})
    live.train()
    assert live.state.global_step == 5
