"""Builds the cache of one split point outside of training: what ``hf-freezecache build`` does."""

from __future__ import annotations

import glob
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import transformers
from transformers import AutoConfig, TrainingArguments, set_seed

# Not from the top: before 5.19 that one asks for torchvision, which processors that use Pillow do without.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..config import (
    CacheConfig,
    FreezeConfig,
)
from ..data.image_transform import ImageTransform
from ..data.task import IMAGE_CLASSIFICATION
from ..dataset import CachedDataset
from ..errors import UnsupportedSetupError
from ..hub.client import quiet_libraries
from ..model.probe import find_blocks
from ..trainer import FreezeCacheTrainer

__all__ = ["BuildSettings", "build", "load_images", "make_trainer"]


@dataclass(frozen=True)
class BuildSettings:
    """What to build.

    Attributes:
        model: Model on the Hub, or its folder, with an image processor.
        dataset: Data set on the Hub, a folder of parquet files or of images, one parquet file, or what ``save_to_disk`` wrote.
        split_point: Number of blocks to run.
        split: Split of the data set.
        num_views: Renderings of each image. View 0 is what evaluation sees; others are cropped and flipped at random.
            ``"auto"``: as ``CacheConfig`` chooses for the schedule.
        codec: As in ``CacheConfig``.
        cache_dir: Folder of caches.
        image_column: Column of the images.
        label_column: Column of the classes.
        min_crop_scale: Least fraction of the area in a random crop.
        batch_size: Images per prefix call.
        seed: Of views, chunk layout, and the head where the model has none for these classes.
        bf16: Run the prefix under bf16 autocast.
        revision: Branch, tag or commit of the model.
        head_rows: As in ``FreezeConfig``: share of the rows that a cache behind all blocks holds; ``None`` for all.
        show_progress: Show a progress bar.
    """

    model: str
    dataset: str
    split_point: int
    split: str = "train"
    num_views: int | Literal["auto"] = 1
    codec: str = "lossless"
    cache_dir: str = "caches"
    image_column: str = "image"
    label_column: str = "label"
    min_crop_scale: float = 0.35
    batch_size: int = 32
    seed: int = 0
    bf16: bool = False
    revision: str | None = None
    head_rows: float | None = None
    show_progress: bool = True


def load_images(path: str, split: str, image_column: str, label_column: str) -> datasets.Dataset:
    """Load one split of a data set, from the Hub or this machine.

    Raises:
        UnsupportedSetupError: There is no such split or column, or the labels are no classes.
    """
    place = Path(path)
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        found = datasets.load_from_disk(path)
    elif place.is_file():
        found = datasets.load_dataset("parquet", data_files={split: glob.escape(path)})
    elif place.is_dir() and glob.has_magic(path):
        # `load_dataset` would take brackets in the name of a folder for a pattern.
        kind = "parquet" if any(place.rglob("*.parquet")) else "imagefolder"
        found = datasets.load_dataset(kind, data_dir=glob.escape(str(place.absolute())))
    else:
        found = datasets.load_dataset(path)
    if isinstance(found, dict):
        if split not in found:
            raise UnsupportedSetupError(f"{path} has no split {split!r}; choose one of: {', '.join(found)}.")
        found = found[split]
    for column in (image_column, label_column):
        if column not in found.features:
            raise UnsupportedSetupError(f"{path} has no column {column!r}; choose one of: {', '.join(found.features)}.")
    if not isinstance(found.features[label_column], datasets.ClassLabel):
        raise UnsupportedSetupError(
            f"Column {label_column!r} of {path} holds {found.features[label_column]}, not a ClassLabel. Store the data set "
            f"again after dataset.class_encode_column({label_column!r})."
        )
    return found


def build(settings: BuildSettings) -> tuple[CachedDataset, FreezeCacheTrainer]:
    """Build a cache, or find it; return it, and the trainer, which can push it.

    Raises:
        FreezeCacheError: Data, model or disk are not as they must be; the message says why.
        OSError: Model or data set cannot be loaded.
    """
    with quiet_libraries(settings.show_progress), tempfile.TemporaryDirectory(prefix="hf-freezecache-") as scratch:
        trainer = make_trainer(settings, scratch)
        num_blocks = len(find_blocks(trainer.model)[1])
        if settings.head_rows not in (None, 1) and settings.split_point != num_blocks:
            raise UnsupportedSetupError(
                f"head_rows={settings.head_rows:g} is for the cache that a head trains on alone, behind all {num_blocks} blocks, but "
                f"split_point is {settings.split_point}. Set split_point={num_blocks}, or leave head_rows out."
            )
        return trainer.build_cache(settings.split_point), trainer


def make_trainer(
    settings: BuildSettings,
    scratch: str,
    freezing: FreezeConfig | None = None,
    rows: int | None = None,
    **arguments: Any,
) -> FreezeCacheTrainer:
    """Return a trainer that can build what the settings say.

    Args:
        settings: What to build.
        scratch: Its ``output_dir``, to which nothing is written.
        freezing: When to freeze, for a run with transforms for training and evaluation; default what builds the cache of ``split_point``.
        rows: Images, in place of those that there are: the first ones, or all of them over and over.
        **arguments: Of ``TrainingArguments``, in place of defaults.

    Raises:
        FreezeCacheError: Data or model are not as they must be; the message says why.
        OSError: Model or data set cannot be loaded.
    """
    images = load_images(settings.dataset, settings.split, settings.image_column, settings.label_column)
    classes = images.features[settings.label_column].names
    set_seed(settings.seed)
    config = AutoConfig.from_pretrained(settings.model, revision=settings.revision or "main")
    head: dict[str, Any] = {}
    if config.num_labels != len(classes):
        names = dict(enumerate(classes))
        head = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        head["ignore_mismatched_sizes"] = True
    revision = settings.revision or "main"
    auto_class = getattr(transformers, IMAGE_CLASSIFICATION.auto_class)
    model = auto_class.from_pretrained(settings.model, revision=revision, **head)
    processor = AutoImageProcessor.from_pretrained(settings.model, revision=revision)
    if rows is not None:
        images = images.select(np.arange(rows) % len(images))
    columns = {"image_column": settings.image_column, "label_column": settings.label_column}
    plain = ImageTransform.from_processor(processor, train=False, **columns)
    transforms: dict[str, Any] = {}
    if settings.num_views != 1 or freezing is not None:
        augmented = ImageTransform.from_processor(
            processor, train=True, scale=(settings.min_crop_scale, 1.0), **columns
        )
        transforms = {"train_transform": augmented, "eval_transform": plain}
    else:
        images = images.with_transform(plain)
    return FreezeCacheTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=settings.batch_size,
            seed=settings.seed,
            bf16=settings.bf16,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=not settings.show_progress,
            **arguments,
        ),
        train_dataset=images,
        freeze_config=freezing or FreezeConfig(f"0:{settings.split_point}", head_rows=settings.head_rows),
        cache_config=CacheConfig(
            cache_dir=settings.cache_dir,
            codec=settings.codec,
            num_views=settings.num_views,
            view_seed=settings.seed,
        ),
        **transforms,
    )
