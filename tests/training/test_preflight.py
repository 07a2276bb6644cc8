"""What no cache can hold is refused before one is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import TinyTransform, make_trainer, tiny_vit
from torch import nn

from hf_freezecache.data.views import ViewDataset
from hf_freezecache.errors import UnsupportedModelError
from hf_freezecache.schedules import plan_stages
from hf_freezecache.training.preflight import warn_of_one_view


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


PINNED = "an image looks the same in all of the"


@pytest.mark.parametrize(("cache", "warned"), [({}, True), ({"num_views": 1}, False), ({"num_views": 2}, False)])
def test_one_draw_for_all_epochs_is_told_unless_it_was_asked_for(train_dataset, caplog, cache, warned) -> None:
    make_trainer(tiny_vit(), train_dataset, schedule="0:4", num_train_epochs=2, cache=cache).train()
    assert caplog.text.count(PINNED) == warned


@pytest.mark.parametrize(
    ("schedule", "augment", "epochs"),
    [("0:1,2:3", True, 4), ("0:0,3:2", True, 0), ("0:3", False, 0), ("0:0,2:2", True, 2)],
)
def test_epochs_with_one_draw(images, caplog, schedule, augment, epochs) -> None:
    views = ViewDataset(images.with_transform(TinyTransform(augment=augment)), seed=0)
    warn_of_one_view(views, plan_stages(schedule, 4, 4), 4)
    assert (f"{PINNED} {epochs} epochs" in caplog.text) == (epochs > 0)
    assert (PINNED in caplog.text) == (epochs > 0)
