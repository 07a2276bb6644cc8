"""Caches of several views of a few images, built by one process or, with ``main``, by one of several."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
from PIL import ImageDraw
from torch.utils.data import default_collate

from hf_freezecache.cache.fingerprint import Fingerprint
from hf_freezecache.cache.shard_writer import CachePlan
from hf_freezecache.cache.writer import BuildReport, build_caches
from hf_freezecache.codecs import make_codec
from hf_freezecache.data.collators import CheckedCollator
from hf_freezecache.data.image_transform import ImageTransform
from hf_freezecache.data.layout import ChunkLayout
from hf_freezecache.data.views import ViewDataset
from hf_freezecache.distributed.process_group import find_process_group
from support import tiny_copies
from support.images import make_images
from support.tiny import IMAGE_SIZE, TinyTransform

#: Shards of eight rows and of three.
ROWS, VIEWS = 11, 3


class Painting(TinyTransform):
    def __call__(self, batch):
        for image in batch["image"]:
            ImageDraw.Draw(image).point((random.randrange(IMAGE_SIZE), 0), fill="red")
        return super().__call__(batch)


def make_plan(copies: bool = False, split_point: int = 2) -> CachePlan:
    return CachePlan(
        fingerprint=Fingerprint({"data": "rows", "split point": str(split_point), "copies": str(copies)}),
        split_point=split_point,
        image_shape=(3, IMAGE_SIZE, IMAGE_SIZE),
        num_views=VIEWS,
        layout=ChunkLayout(ROWS, 4, seed=3),
        shard_chunks=2,
        codec=make_codec("lossless"),
        copies=tiny_copies.make_copies() if copies else None,
        copies_calibration={"storage": "residual"} if copies else None,
    )


class StoppedError(Exception):
    """What a build fails with."""


class Prefixes:
    """(batch, 5, 3) by split point; what a row gives depends on the others of its batch. Fails at a call."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, pixel_values: torch.Tensor) -> dict[int, torch.Tensor]:
        self.calls += 1
        if self.calls == self.fail_at:
            raise StoppedError
        states = pixel_values.flatten(1)[:, 100:115].reshape(-1, 5, 3) + pixel_values.mean()
        return {2: states, 5: 3 * states}


def build(folder: Path, plans: list[CachePlan], prefixes: Prefixes | None = None, **settings: Any) -> list[BuildReport]:
    rows = make_images(ROWS)
    evaluation, training = ImageTransform(IMAGE_SIZE, train=False), ImageTransform(IMAGE_SIZE, train=True)
    collate = CheckedCollator(default_collate)
    if any(plan.copies for plan in plans):
        views, collate = ViewDataset(rows, 1, training, evaluation).with_geometry(), collate.with_geometry()
    else:
        views = ViewDataset(rows.with_transform(Painting(True)), 1)
    return build_caches(folder, plans, views, collate, prefixes or Prefixes(), **{"batch_size": 3, **settings})


PLANS = {
    "one": lambda: [make_plan()],
    "predicted": lambda: [make_plan(copies=True)],
    "two, one predicted": lambda: [make_plan(copies=True), make_plan(split_point=5)],
}


def counting(log: Path) -> Callable[..., Any]:
    """Return what decodes images as ``datasets.Image`` does, and adds a byte to a file for each."""
    log.touch()
    genuine = datasets.Image.decode_example

    def decode(self, value, *args, **kwargs):
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, b"+")
        os.close(descriptor)
        return genuine(self, value, *args, **kwargs)

    return decode


def main(name: str) -> None:
    """Build in one process of several."""
    torch.set_num_threads(1)
    datasets.Image.decode_example = counting(Path("decodes"))
    dist.init_process_group("gloo")
    group = find_process_group(dist.get_world_size(), int(os.environ["LOCAL_RANK"]), per_node=False)
    build(Path("caches"), PLANS[name](), process_group=group)
    dist.destroy_process_group()
