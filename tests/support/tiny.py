"""Tiny models, a tiny transform and a trainer on them, for all tests."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, TrainingArguments

from hf_freezecache import (
    CacheConfig,
    FreezeCacheTrainer,
    FreezeConfig,
)
from support.seeds import seed_all

IMAGE_SIZE = 16
NUM_CLASSES = 4
#: Settings of an image processor that resizes, then crops.
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 18},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}
FAMILIES = [
    "vit",
    "deit",
    "vit_msn",
    "ijepa",
    "dinov2",
    "dinov2_with_registers",
    "siglip",
    "clip",
    "beit",
    "data2vec-vision",
]


def tiny_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A model of a family with 4 blocks of width 16, whose weights are not symmetric around zero."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        **overrides,
    }
    if family in ("siglip", "clip"):
        config = AutoConfig.for_model(
            family, vision_config=sizes, text_config={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        )
    else:
        config = AutoConfig.for_model(family, **sizes)
    if family == "deit":
        config.pooler_output_size = 16
        config.architectures = ["DeiTForImageClassification"]
    config.num_labels = NUM_CLASSES
    seed_all()
    model = AutoModelForImageClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tiny_vit(**overrides: Any) -> PreTrainedModel:
    return tiny_model("vit", **overrides)


def with_head(num_labels: int) -> PreTrainedModel:
    """The model of ``tiny_vit`` with another head, for so many classes."""
    model = tiny_vit()
    model.config.num_labels = num_labels
    model.num_labels = num_labels
    model.classifier = torch.nn.Linear(16, num_labels)
    return model


class TinyTransform:
    """Normalises; with ``augment`` flips by Python's generator and adds noise by NumPy's and torch's."""

    def __init__(self, augment: bool, strength: float = 0.1) -> None:
        self.augment = augment
        self.strength = strength

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        pixel_values = []
        for image in batch["image"]:
            pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
            if self.augment:
                if random.random() < 0.5:
                    pixels = pixels.flip(2)
                pixels = pixels * np.random.uniform(1 - self.strength, 1 + self.strength)
                pixels = (pixels + self.strength * torch.randn_like(pixels)).float()
            pixel_values.append(pixels)
        return {"pixel_values": pixel_values, "labels": list(batch["label"])}


#: What trains, and what evaluation sees.
PAIR = {"train_transform": TinyTransform(augment=True), "eval_transform": TinyTransform(augment=False)}


class Rows(torch.utils.data.Dataset):
    """A map-style data set that is no datasets.Dataset."""

    def __init__(self, rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int):
        return self.rows[row]


class SlowTransform(TinyTransform):
    """Takes ten milliseconds for each image."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.01 * len(batch["image"]))
        return super().__call__(batch)


class Recorder(FreezeCacheTrainer):
    """Keeps the loss of every step."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def training_arguments(**overrides: Any) -> TrainingArguments:
    settings = {
        "output_dir": "out",
        "use_cpu": True,
        "num_train_epochs": 4,
        "per_device_train_batch_size": 10,
        "learning_rate": 3e-3,
        "report_to": "none",
        "remove_unused_columns": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 1,
        **overrides,
    }
    return TrainingArguments(**settings)


def make_trainer(
    model: PreTrainedModel | None,
    train_dataset: Any,
    eval_dataset: Any = None,
    schedule: str | None = "0:1,2:3",
    cache: dict[str, Any] | None = None,
    cls: type[FreezeCacheTrainer] = Recorder,
    trainer: dict[str, Any] | None = None,
    freeze: dict[str, Any] | None = None,
    **args: Any,
) -> FreezeCacheTrainer:
    cache_settings = {"cache_dir": str(Path("caches").absolute()), "chunk_size": 8, "shard_chunks": 2}
    cache_settings |= {"lock_timeout": 0.0, **(cache or {})}
    return cls(
        model=model,
        args=training_arguments(**args),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        freeze_config=None if schedule is None else FreezeConfig(schedule=schedule, **(freeze or {})),
        cache_config=CacheConfig(**cache_settings),
        **(trainer or {}),
    )
