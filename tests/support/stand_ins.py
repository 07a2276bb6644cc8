"""What README and ``--help`` download: tiny weights and images under the names that they use there."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np

from support.hub_server import HubServer
from support.images import make_images
from support.tiny import PROCESSOR, tiny_vit

MODEL = "facebook/deit-tiny-patch16-224"
BEANS = "AI-Lab-Makerere/beans"
BEAN_CLASSES = ["angular_leaf_spot", "bean_rust", "healthy"]
FLOWER_CLASSES = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]


def publish(server: HubServer, scratch: Path) -> None:
    """Publish the model, which has 12 blocks, and the data set."""
    tiny_vit(num_hidden_layers=12).save_pretrained(scratch / "model")
    (scratch / "model" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    server.publish(MODEL, scratch / "model")
    images = [row["image"] for row in make_images(54) if row["label"] < 3]  # classes 0, 1, 2 in turn
    features = datasets.Features(
        {
            "image_file_path": datasets.Value("string"),
            "image": datasets.Image(),
            "labels": datasets.ClassLabel(names=BEAN_CLASSES),
        }
    )
    for split, rows in (("train", range(24)), ("validation", range(24, 32)), ("test", range(32, 40))):
        columns = {
            "image_file_path": [f"{row}.jpg" for row in rows],
            "image": [images[row] for row in rows],
            "labels": [row % 3 for row in rows],
        }
        part = datasets.Dataset.from_dict(columns, features=features)
        part.to_parquet(scratch / "beans" / "data" / f"{split}-00000-of-00001.parquet")
    server.publish(BEANS, scratch / "beans", "dataset")


def make_flowers(folder: Path) -> None:
    """Write a folder of images, one folder per class, as ``./flower_photos`` is."""
    for number, name in enumerate(FLOWER_CLASSES):
        (folder / name).mkdir(parents=True)
        for row, image in enumerate(make_images(4, seed=number)["image"]):
            image.resize((20 + row, 18)).save(folder / name / f"{row}.jpg")
    assert len(np.unique([path.stat().st_size for path in folder.rglob("*.jpg")])) > 5
