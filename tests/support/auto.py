"""Trainers of ``schedule="auto"``, and a model whose head cannot be cached."""

from __future__ import annotations

from typing import Any

import torch

from hf_freezecache.model.probe import find_blocks
from support.tiny import make_trainer, tiny_vit

__all__ = ["QKV", "SHARE", "SeesEarlierBlocks", "auto_trainer", "scales_of"]

SHARE = 816 / 2224  # of a tiny block's weights
QKV = {"budget": 0.5, "block_weights": "qkv"}


def auto_trainer(rows: Any, model: Any = None, freeze: dict[str, Any] | None = None, **settings: Any) -> Any:
    """Return a trainer of a tiny ViT, or another model, that chooses its schedule."""
    return make_trainer(tiny_vit() if model is None else model, rows, schedule="auto", freeze=freeze, **settings)


def scales_of(trainer: Any) -> list[float]:
    """What the user's rate is multiplied by: in the stage behind a trained head, and while the head trains alone."""
    return [float(pair.partition(":")[2]) for pair in trainer.freeze_config.lr_scale.split(",")]


class SeesEarlierBlocks(type(tiny_vit())):
    """Its head reads what the third block gives, too: from a cache behind the last one it could not be trained."""

    def forward(self, pixel_values, labels=None, **kwargs):
        kept = []
        handle = find_blocks(self)[1][2].register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            logits = super().forward(pixel_values, **kwargs).logits
        finally:
            handle.remove()
        third = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        logits = logits + self.classifier(third[:, 0])
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}
