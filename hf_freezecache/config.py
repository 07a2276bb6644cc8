"""What a user sets: two flat dataclasses that ``HfArgumentParser`` can parse beside ``TrainingArguments``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Optional, TypeVar, Union

from .errors import (
    ScheduleError,
    UnsupportedSetupError,
)

__all__ = ["DEFAULT_MAX_DISTORTION", "CacheConfig", "FreezeConfig"]

#: Distortion budget of ``codec="auto"``. Source: recipes/benchmarks/codec_accuracy.py.
DEFAULT_MAX_DISTORTION = 0.002

# `HfArgumentParser` reads annotations at run time and takes `Optional[X]`, not `X | None`, on Python 3.10.
# ruff: noqa: UP007, UP045

_Config = TypeVar("_Config", bound=type)


def _documented(config: _Config) -> _Config:
    """Append the help of each field to the docstring, so that ``help()`` and the command line say the same."""
    lines = [f"    {setting.name}: {setting.metadata['help']}" for setting in fields(config)]
    config.__doc__ = "\n".join([inspect.cleandoc(config.__doc__ or ""), "", "Attributes:", *lines])
    return config


@_documented
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
            "help": "Name of a policy in hf_freezecache.schedules.POLICIES, e.g. 'linear'. Excludes --schedule.",
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


@_documented
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
            "help": "'always': train frozen stages from a cache, or stop. 'auto': from a cache, and without one, saying so, "
            "where it cannot be written (the disk is full, say). 'never': run the frozen prefix live in every step.",
            "choices": ["always", "auto", "never"],
        },
    )
    cache_placement: str = field(
        default="shared",
        metadata={
            "help": "'shared': all processes build and read one folder, which all machines see. 'node': each machine has its own "
            "folder at this path, builds and reads only the rows that its processes train on, as many as its share of the processes; these rows do not change from "
            "epoch to epoch, so samples are shuffled within a machine only, and a run on another number of machines builds "
            "anew. Costs each machine its share of the bytes, and nothing goes over the network.",
            "choices": ["shared", "node"],
        },
    )
    lock_timeout: float = field(
        default=30.0,
        metadata={
            "help": "Seconds to wait for another run that writes the same cache, before giving up. Work of a run that was "
            "killed ends by itself within seconds."
        },
    )
    consume_previous_cache: bool = field(
        default=False,
        metadata={
            "help": "Let the cache of a stage give way to the next one, shard by shard, where that is computed from it. Peak disk "
            "is then the larger of the two and one shard (in all views) for each process, in place of both. Going back to an "
            "earlier stage (an earlier checkpoint) builds its cache anew. Not where another run may be reading the same caches: "
            "it would stop."
        },
    )
    num_views: int = field(
        default=1,
        metadata={
            "help": "Stored augmented renderings of each image, the base view included. 0, only with "
            "mode='never', draws a new view in every epoch."
        },
    )
    # Steps, as `codecs.make_codec` takes them, or a string; a `codecs.Codec` works too.
    codec: Union[list, str, None] = field(  # type: ignore[type-arg]
        default="lossless",
        metadata={
            "help": "How hidden states are stored: 'lossless'; 'auto', the cheapest within --max_distortion; 'transform', 'int8', "
            "'int4', 'bf16' or 'fp16'; or a pipeline as a JSON list of steps. All but 'lossless' are lossy."
        },
    )
    max_distortion: float = field(
        default=DEFAULT_MAX_DISTORTION,
        metadata={
            "help": "codec='auto': how far decoded states may lead the suffix astray on held-out images: KL to the exact "
            "logits in nats per image, and mean squared error of the standardised input of the head; of the latter alone "
            "while the head is random."
        },
    )
    compression: Optional[str] = field(
        default=None,
        metadata={
            "help": "codec='transform': split_point:bits pairs, e.g. '0:4.0,6:2.5,9:1.5': bits per element from which split "
            "point on; or the name of a curve, 'linear' or 'geometric'."
        },
    )
    gradient_weight: float = field(
        default=0.0,
        metadata={
            "help": "'auto' and 'transform': how much a direction counts by its effect on the output, from 0 to 1."
        },
    )
    calibration_samples: int = field(
        default=256,
        metadata={"help": "Images for fitting (the first half) and measuring (the other half) a lossy codec."},
    )
    build_from: str = field(
        default="auto",
        metadata={
            "help": "Where a later stage's states come from. 'auto': from the previous stage's cache through the blocks "
            "between, where that stays within --max_distortion (always for a lossless one); 'images': from the images; "
            "'previous_cache': from the cache whenever there is one.",
            "choices": ["auto", "images", "previous_cache"],
        },
    )
    copies: str = field(
        default="auto",
        metadata={
            "help": "How views beyond the first are stored. 'full': as the first; or whole within --copy_distortion or --copy_budget, "
            "if given. 'residual': what the base view does not predict of them. 'sensitive': the same of the least similar "
            "channels and tokens only. 'auto': with codec='auto' the best of these, else 'full'.",
            "choices": ["auto", "full", "residual", "sensitive"],
        },
    )
    copy_distortion: Optional[float] = field(
        default=None, metadata={"help": "Distortion budget of views beyond the first; excludes --copy_budget."}
    )
    copy_budget: Optional[float] = field(
        default=None,
        metadata={
            "help": "Bits per element that each view beyond the first may take. Default, without --copy_distortion: such that all "
            "of them together take about the bytes of the first, or fewer where --max_distortion needs no more."
        },
    )
    feature_augmentation: Optional[str] = field(
        default=None,
        metadata={
            "help": "Augments hidden states while training from a cache: name:number pairs, e.g. 'brightness:0.1,mixup:0.2'. "
            "token_flip, token_dropout: probability; brightness: largest offset as a share of a channel's range; mixup, cutmix: "
            "alpha of the Beta distribution, one of the two. Changes no cache."
        },
    )
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
        metadata={"help": "ProcessGroup that render images while building; default: dataloader_num_workers."},
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
        if self.mode not in ("always", "auto", "never"):
            raise UnsupportedSetupError(f"mode must be 'always', 'auto' or 'never', got {self.mode!r}.")
        if "://" in str(self.cache_dir):
            raise UnsupportedSetupError(
                f"cache_dir={self.cache_dir!r} is an address; caches are written to local folders only. Give a folder; push a "
                "finished cache with hf-freezecache push, and read it from anywhere with CachedDataset.from_pretrained."
            )
        if self.cache_placement not in ("shared", "node"):
            raise UnsupportedSetupError(f"cache_placement must be 'shared' or 'node', got {self.cache_placement!r}.")
        if not (isinstance(self.lock_timeout, (int, float)) and 0 <= self.lock_timeout < float("inf")):
            raise UnsupportedSetupError(f"lock_timeout must be a number of seconds >= 0, got {self.lock_timeout!r}.")
        if self.build_from not in ("auto", "images", "previous_cache"):
            raise UnsupportedSetupError(
                f"build_from must be 'auto', 'images' or 'previous_cache', got {self.build_from!r}."
            )
        if not (isinstance(self.max_distortion, (int, float)) and 0 < self.max_distortion < float("inf")):
            raise UnsupportedSetupError(f"max_distortion must be a positive number, got {self.max_distortion!r}.")
        if not (isinstance(self.gradient_weight, (int, float)) and 0 <= self.gradient_weight <= 1):
            raise UnsupportedSetupError(f"gradient_weight must be a number from 0 to 1, got {self.gradient_weight!r}.")
        if self.compression is not None and self.codec in ("auto", "lossless"):
            raise UnsupportedSetupError(
                f"compression={self.compression!r} sets the rate of a 'transform', but codec={self.codec!r}. Set "
                "codec='transform', or remove compression; codec='auto' takes its rate from distortion."
            )
        if self.feature_augmentation is not None and self.mode == "never":
            raise UnsupportedSetupError(
                f"feature_augmentation={self.feature_augmentation!r} acts on cached hidden states, but mode='never' caches "
                "none. Remove one of them; without a cache, augment the images."
            )
        if self.copies not in ("auto", "full", "residual", "sensitive"):
            raise UnsupportedSetupError(
                f"copies must be 'auto', 'full', 'residual' or 'sensitive', got {self.copies!r}."
            )
        if self.copy_distortion is not None and self.copy_budget is not None:
            raise UnsupportedSetupError(
                f"Both copy_distortion={self.copy_distortion!r} and copy_budget={self.copy_budget!r} were given; give one of them."
            )
        for name in ("copy_distortion", "copy_budget"):
            value = getattr(self, name)
            if value is None:
                continue
            if not (isinstance(value, (int, float)) and 0 < value < float("inf")):
                raise UnsupportedSetupError(f"{name} must be a positive number, got {value!r}.")
            if not self.copies_apart:
                raise UnsupportedSetupError(
                    f"{name}={value!r} is for views that are stored apart from the first, but copies={self.copies!r} with "
                    f"codec={self.codec!r} and num_views={self.num_views} stores all alike. Set copies='residual' and at "
                    "least two views, or remove it."
                )
        for name, least in (
            ("chunk_size", 1),
            ("shard_chunks", 1),
            ("shuffle_window", 1),
            ("num_views", 0),
            ("calibration_samples", 4),
        ):
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

    @property
    def copies_apart(self) -> bool:
        """Whether views beyond the first have a codec of their own."""
        asked = self.copies != "auto" and (self.copies != "full" or self.copy_distortion or self.copy_budget)
        return self.num_views > 1 and bool(asked or (self.copies == "auto" and self.codec == "auto"))
