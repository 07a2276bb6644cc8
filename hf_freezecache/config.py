"""What a user sets: two flat dataclasses that ``HfArgumentParser`` can parse beside ``TrainingArguments``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Optional, Union

from .errors import ScheduleError, UnsupportedSetupError

__all__ = ["CacheConfig", "FreezeConfig"]

# `HfArgumentParser` reads annotations at run time and takes `Optional[X]`, not `X | None`, on Python 3.10.
# ruff: noqa: UP007, UP045


@dataclass
class FreezeConfig:
    """When to freeze how many blocks.

    Either an explicit ``schedule`` or a ``policy``; with neither, nothing is frozen and training is plain.
    """

    # `dict` first: `HfArgumentParser` parses with the second of three types.
    schedule: Union[dict, str, None] = field(  # type: ignore[type-arg]
        default=None,
        metadata={
            "aliases": ["--freeze_schedule"],
            "help": "Start:split_point pairs, e.g. '0:6,3:9,6:11'. A start is an epoch (a whole number) or, "
            "written with a decimal point and below 1, a fraction of training ('0.5:9'). A dict works too.",
        },
    )
    policy: Optional[str] = field(
        default=None,
        metadata={
            "aliases": ["--freeze_policy"],
            "help": "Name of a policy in hf_freezecache.policies.POLICIES, e.g. 'linear'. Excludes --schedule.",
        },
    )
    freeze_start: float = field(
        default=0.0, metadata={"help": "linear: fraction of training at which freezing starts, in [0, 1)."}
    )
    freeze_end: float = field(
        default=0.5,
        metadata={"help": "linear: fraction of training at which freeze_level is reached, in (0, 1]."},
    )
    freeze_level: float = field(
        default=0.75, metadata={"help": "linear: fraction of the blocks that end up frozen, in [0, 1]."}
    )

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            ScheduleError: Both or contradictory settings were given, or a fraction is out of range.
        """
        if isinstance(self.schedule, Mapping):
            self.schedule = ",".join(f"{start}:{split_point}" for start, split_point in self.schedule.items())
        if self.schedule is not None and self.policy is not None:
            raise ScheduleError(
                f"Both schedule={self.schedule!r} and policy={self.policy!r} were given; give one of them."
            )
        if not 0 <= self.freeze_start < self.freeze_end <= 1:
            raise ScheduleError(
                "freeze_start and freeze_end are fractions of training with 0 <= freeze_start < freeze_end <= 1, "
                f"got freeze_start={self.freeze_start} and freeze_end={self.freeze_end}."
            )
        if not 0 <= self.freeze_level <= 1:
            raise ScheduleError(f"freeze_level is a fraction of the blocks in [0, 1], got {self.freeze_level}.")


@dataclass
class CacheConfig:
    """Where hidden states are cached, and what is stored of each sample."""

    cache_dir: str = field(
        default="caches",
        metadata={"help": "Folder that holds the caches of hidden states. Must lie outside --output_dir."},
    )
    mode: str = field(
        default="always",
        metadata={
            "help": "'always': train frozen stages from a cache. 'never': run the frozen prefix live in every step.",
            "choices": ["always", "never"],
        },
    )
    num_views: int = field(
        default=1,
        metadata={
            "help": "Stored augmented renderings of each image, the base view included. 0, only with "
            "mode='never', draws a new view in every epoch."
        },
    )
    codec: str = field(default="lossless", metadata={"help": "How hidden states are stored. 'lossless' so far."})
    chunk_size: int = field(
        default=32, metadata={"help": "Samples encoded together: the unit of reading and of shuffling."}
    )
    shard_chunks: int = field(
        default=32,
        metadata={"help": "Chunks in one shard file: the unit of writing and of resuming a build."},
    )
    shuffle_window: int = field(
        default=8, metadata={"help": "Chunks whose samples are mixed while training; all are held in memory."}
    )
    build_batch_size: Optional[int] = field(
        default=None,
        metadata={
            "help": "Images per prefix forward while building; default: per_device_train_batch_size, which makes "
            "cached and uncached training agree to the bit on a CPU."
        },
    )
    build_num_workers: Optional[int] = field(
        default=None,
        metadata={"help": "Processes that render images while building; default: dataloader_num_workers."},
    )
    view_seed: Optional[int] = field(
        default=None,
        metadata={"help": "Seed of the views and of the chunk layout; default: data_seed, then seed."},
    )
    transform_id: Optional[str] = field(
        default=None,
        metadata={
            "help": "A name that stands for the training transform and the data collator in the fingerprint; needed "
            "only where they cannot be hashed. Change it whenever you change them."
        },
    )

    dataset_id: Optional[str] = field(
        default=None,
        metadata={
            "help": "A name that stands for the training data in the fingerprint; needed only for data sets that are no "
            "datasets.Dataset. Change it whenever the data change."
        },
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UnsupportedSetupError: A value is out of its range.
        """
        if self.mode not in ("always", "never"):
            raise UnsupportedSetupError(f"mode must be 'always' or 'never', got {self.mode!r}.")
        for name, least in (("chunk_size", 1), ("shard_chunks", 1), ("shuffle_window", 1), ("num_views", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UnsupportedSetupError(f"{name} must be a whole number >= {least}, got {value!r}.")
        if self.num_views == 0 and self.mode != "never":
            raise UnsupportedSetupError(
                "num_views=0 draws a new view in every epoch, which no cache can hold: set mode='never', or give "
                "the number of views to store (num_views=1 or more)."
            )
        for name in ("build_batch_size", "build_num_workers"):
            value = getattr(self, name)
            if value is not None and value < (1 if name == "build_batch_size" else 0):
                raise UnsupportedSetupError(f"{name} is out of range: {value!r}.")
