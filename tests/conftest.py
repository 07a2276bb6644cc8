"""Seeded, offline, in a temporary folder; tiny models and images that look like something."""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path

# Child processes import ``support``, too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import hypothesis
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support.tiny import IMAGE_SIZE, NUM_CLASSES, TinyTransform, tiny_vit

from hf_freezecache.report.callback import ReportCallback

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("default")


#: Files that take half a minute and more.
LONG = ("test_crash_safety", "test_distributed", "test_lossy_training", "test_readme", "test_trainer", "test_writer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files: the last one keeps one process busy while the others wait."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> None:
    """Let the collections that accelerate asks for pass over what imports made: they would take most of the time."""
    gc.collect()
    gc.freeze()
    torch.set_num_threads(1)  # bits depend on it, those of fixtures that come before the first test as well


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to anything but this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> object:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    transformers.set_seed(0)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that save would draw a report each: a second or two that only tests with the fixture ``drawing`` need."""
    if "drawing" not in request.fixturenames:
        monkeypatch.setattr(ReportCallback, "draw", lambda self, output_dir: None)


@pytest.fixture
def drawing() -> None:
    """Let runs draw their report."""


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    return tiny_vit()


def make_images(rows: int, seed: int = 0) -> datasets.Dataset:
    """Images whose class shows: brighter in one corner of four, noise elsewhere."""
    generator = np.random.default_rng(seed)
    images, labels = [], []
    for row in range(rows):
        label = row % NUM_CLASSES
        pixels = generator.integers(0, 120, (IMAGE_SIZE, IMAGE_SIZE, 3))
        half = IMAGE_SIZE // 2
        top, left = divmod(label, 2)
        pixels[top * half : (top + 1) * half, left * half : (left + 1) * half] += 110
        images.append(Image.fromarray(pixels.astype(np.uint8)))
        labels.append(label)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture(scope="session")
def images() -> datasets.Dataset:
    return make_images(50)


@pytest.fixture
def train_dataset(images: datasets.Dataset) -> datasets.Dataset:
    return images.with_transform(TinyTransform(augment=True))


@pytest.fixture
def eval_dataset(images: datasets.Dataset) -> datasets.Dataset:
    return images.select(range(20)).with_transform(TinyTransform(augment=False))
