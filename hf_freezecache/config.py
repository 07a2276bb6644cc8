"""What a user sets: two flat dataclasses that ``HfArgumentParser`` can parse beside ``TrainingArguments``."""

# No `from __future__ import annotations`: the checks need the types themselves.
# `HfArgumentParser` takes `Optional[X]`, not `X | None`, on Python 3.10; of three types it parses with the second.
# ruff: noqa: UP007, UP045

import os
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union

from .by_split_point import parse_lr_scale
from .errors import UnsupportedSetupError
from .field_checks import above, at_least, between, check_values, documented, schema_of
from .schedules import parse_schedule

__all__ = ["ADVANCED", "DEFAULT_MAX_DISTORTION", "CacheConfig", "FreezeConfig"]

#: Distortion budget of ``codec="auto"``. Source: recipes/benchmarks/codec_accuracy.py.
DEFAULT_MAX_DISTORTION = 0.002
#: The help of a field that few users need begins with this. `HfArgumentParser` takes no other mark.
ADVANCED = "Advanced: "


class _Views(int):
    """A number of views that no caller has typed: ``schedule="auto"`` may choose another. ``replace`` passes it on."""


def _check_views(value: Any) -> None:
    """Check a number of views, or ``"auto"``."""
    if value != "auto":
        at_least(0)(value)


if TYPE_CHECKING:
    _NumberOrAuto = Any
else:

    class _NumberOrAuto:
        """What ``HfArgumentParser`` parses ``--num_views`` with: a union would be parsed as one of its types."""

        #: What a value is checked by.
        hint = Annotated[Union[int, Literal["auto"]], _check_views]

        def __new__(cls, text: str) -> Union[int, str]:
            return text if text == "auto" else int(text)


_ONE_VIEW = _Views(1)


class _Folder(str):
    """A folder that a config has settled on. ``dataclasses.replace`` passes it on; no caller has typed it."""


_DEFAULT_FOLDER = _Folder("caches")


@documented
@dataclass
class FreezeConfig:
    """When to freeze how many blocks. Without a schedule nothing is frozen, and training is plain.

    Raises:
        ScheduleError: The schedule cannot be read.
        UnsupportedSetupError: A value is out of its range, or cannot be read.
    """

    schedule: Optional[str] = field(
        default=None,
        metadata={
            "aliases": ["--freeze_schedule"],
            "help": "Start:split_point pairs, e.g. '0:6,3:9,6:11'. A start is an epoch (a whole number) or, written with a "
            "decimal point and below 1, a fraction of training ('0.5:9'). Split points may fall: '0:12,2:6' trains the head of a "
            "model of 12 blocks alone for two epochs, then thaws the last six blocks. Or a policy: 'linear(0.0,0.5,0.75)' freezes at a "
            "constant pace from the first to the second fraction of training, up to the third fraction of the blocks; "
            "'linear' alone takes these numbers. 'autofreeze(50)' freezes blocks whose gradients have settled, as training goes on. 'auto' trains the head first, unless adapters train, for epochs on top of yours; it chooses split point, "
            "views, tokens, which weights of the blocks train, and learning rates; with --budget the epochs as well. In Python a dict works too.",
        },
    )
    budget: Annotated[Optional[float], between(0, 1, above=True)] = field(
        default=None,
        metadata={
            "help": "For schedule='auto', which then chooses the number of epochs, too: what the run may cost, in passes through "
            "blocks, as a share of training without freezing for --num_train_epochs, above 0 and at most 1."
        },
    )
    block_weights: Optional[Literal["all", "qkv"]] = field(
        default=None,
        metadata={
            "help": "Which weights of the blocks train where they are not frozen: 'all', or 'qkv', the layers that make queries, keys and "
            "values alone. Then the rest of the blocks stays as it is, and so do the embeddings; norm and head behind the blocks "
            "train. A step takes three quarters of the passes through blocks, and short runs gain. Default: all, or what schedule='auto' chooses."
        },
    )
    layer_decay: Annotated[Optional[float], between(0, 1, above=True)] = field(
        default=None,
        metadata={
            "help": "Learning rate of a layer as a share of that of the next, above 0 and at most 1: with 0.75 and n blocks, what "
            "follows the blocks trains with the full learning rate, block i (from 0) with 0.75^(n - i) of it, and the embeddings "
            "with 0.75^(n + 1), as in the fine-tuning recipes of BEiT and MAE. Groups of any optimizer are divided. It needs "
            "no schedule."
        },
    )
    lr_scale: Union[float, str, None] = field(
        default=None,
        metadata={
            "help": "What the learning rates of a stage are multiplied by: '2.5' where blocks are frozen, or by split point, e.g. "
            "'6:1.5,9:2.5' (1.5 from split point 6 on, 2.5 from 9 on, 1 before), or 'auto', a rule: the fewer blocks train, "
            "the higher the rates."
        },
    )
    token_keep: Annotated[Optional[float], between(0, 1, above=True)] = field(
        default=None,
        metadata={
            "help": "Share of the patch tokens that a training step sees behind frozen blocks: the step trains on CLS, "
            "registers and a random part of each image's patches, another in each epoch. 0.5 halves the work of the blocks that "
            "train. Caches hold all tokens, and evaluation sees all. For models whose blocks ignore the order of patches. "
            "Default: 1, all of them, or what schedule='auto' chooses."
        },
    )
    unfrozen_token_keep: Annotated[Optional[float], between(0, 1, above=True)] = field(
        default=None,
        metadata={
            "help": "The same in stages without frozen blocks, where the first block sees all tokens, and the others this share of "
            "the patches. Default: 1, or what schedule='auto' chooses."
        },
    )
    plain_epochs: Annotated[Optional[int], at_least(0)] = field(
        default=None,
        metadata={
            "help": "Last epochs of a run, in which each image is shown as eval_transform renders it, without augmentation; the epochs "
            "before show augmented views alone, where any are stored. What a model is asked in the end are such images. "
            "Default: none, or what schedule='auto' chooses."
        },
    )
    head_rows: Annotated[Optional[float], between(0, 1, above=True)] = field(
        default=None,
        metadata={
            "help": "Share of the rows that stages see in which all blocks are frozen, so that the head trains alone: a random part, of which an "
            "epoch shows each row so many times more often. Only these pass through the blocks for its cache. Default: 1, or what schedule='auto' chooses."
        },
    )

    def __post_init__(self) -> None:
        """Turn dicts and numbers into text, and check what can be checked without a model."""
        if isinstance(self.schedule, Mapping):
            self.schedule = ",".join(f"{start}:{split_point}" for start, split_point in self.schedule.items())
        if self.schedule is not None:
            parse_schedule(self.schedule)
        if type(self.lr_scale) in (int, float):
            self.lr_scale = str(self.lr_scale)
        check_values(self, _SCHEMAS)
        if isinstance(self.lr_scale, str):
            parse_lr_scale(self.lr_scale)
        for name, idle in (("unfrozen_token_keep", 1), ("plain_epochs", 0), ("head_rows", 1)):
            if self.schedule is None and (value := getattr(self, name)) not in (None, idle):
                raise UnsupportedSetupError(
                    f"{name}={value:g} needs a schedule: without one, training is plain Trainer's. Give a schedule; '0:0' freezes nothing."
                )
        if self.budget is not None and not self.is_auto:
            raise UnsupportedSetupError(
                f"budget={self.budget:g} is for schedule='auto', which chooses what fits it, but the schedule is "
                f"{self.schedule!r}. Remove one of them."
            )

    @property
    def is_auto(self) -> bool:
        """Whether the schedule is ``"auto"``."""
        return self.schedule is not None and self.schedule.strip().removesuffix("()") == "auto"


@documented
@dataclass
class CacheConfig:
    """Where hidden states are cached, and what is stored of each sample.

    In Python ``cache_dir`` may be written for ``freezecache_dir``. On a command line it cannot: example scripts of Hugging Face
    have a flag of that name.

    Raises:
        UnsupportedSetupError: A value is out of its range, or two settings contradict each other.
    """

    freezecache_dir: str = field(
        default=_DEFAULT_FOLDER,
        metadata={"help": "Folder that holds the caches of hidden states. It must lie outside --output_dir."},
    )
    mode: Literal["always", "auto", "never"] = field(
        default="always",
        metadata={
            "help": "'always': frozen stages train from a cache, or the run stops. 'auto': they do where that takes less time, as a few "
            "images tell, and where the cache can be written. 'never': the frozen prefix runs in every step."
        },
    )
    num_views: _NumberOrAuto = field(
        default=_ONE_VIEW,
        metadata={
            "help": "Stored augmented renderings of each image, the base view included. 'auto': 1 where blocks are frozen for up "
            "to 3 epochs in a row, 2 for up to 7, else 4; and 1 where views do not differ. Default: 1, or what schedule='auto' "
            "chooses. 0 draws a new view in every epoch, with mode='never' only."
        },
    )
    codec: Union[Any, str, None] = field(
        default="lossless",
        metadata={
            "help": "How hidden states are stored. 'lossless'; 'auto', the cheapest setting within --max_distortion; 'transform', "
            "'int8', 'int4', 'bf16' or 'fp16'; or a pipeline as a JSON list of steps. All but 'lossless' are lossy."
        },
    )
    max_distortion: Annotated[float, above(0)] = field(
        default=DEFAULT_MAX_DISTORTION,
        metadata={
            "help": "Distortion budget of codec='auto': how far decoded states may lead the suffix astray on held-out images. The "
            "larger of two numbers counts: KL to the exact logits in nats per image, and mean squared error of the "
            "standardised features before the head; of a random head, the second alone."
        },
    )
    bits_per_element: Union[float, str, None] = field(
        default=None,
        metadata={
            "help": "Rate of codec='auto' or 'transform', in place of --max_distortion: '2.5', or by split point, e.g. "
            "'0:4.0,6:2.5,9:1.5' (4 bits per element from split point 0 on, 2.5 from 6 on)."
        },
    )
    copies: Literal["auto", "full", "residual", "sensitive"] = field(
        default="auto",
        metadata={
            "help": "How views beyond the first are stored. 'full': as the first. 'residual': what the base view does not "
            "predict of them. 'sensitive': the same, of the least similar channels and tokens only. 'auto': with codec='auto' "
            "the best of these, else 'full'. Unless 'full', they together take about the bytes of a lossy first view, or fewer "
            "where --max_distortion needs no more; beside a lossless first view they have --max_distortion."
        },
    )
    build_from: Literal["auto", "images", "previous_cache"] = field(
        default="auto",
        metadata={
            "help": "Where the states of a later stage come from. 'auto': from the cache of the previous stage, through the blocks "
            "between, if that stays within --max_distortion (a lossless one always does). 'images': from the images. "
            "'previous_cache': from that cache whenever there is one."
        },
    )
    feature_augmentation: Optional[str] = field(
        default=None,
        metadata={
            "help": "Augments hidden states while training from a cache: name:number pairs, e.g. 'brightness:0.1,mixup:0.2'. "
            "token_flip, token_dropout: probability. brightness: largest offset as a share of a channel's range. mixup, cutmix: "
            "alpha of the Beta distribution; one of the two. It changes no cache."
        },
    )
    cache_eval: bool = field(
        default=False,
        metadata={
            "help": "While a stage trains from a cache, evaluate from caches, too: each evaluation set then runs through the frozen "
            "blocks once. Metrics stay the same. What draws at random, or looks at the images, is evaluated from images."
        },
    )
    cache_placement: Literal["shared", "node"] = field(
        default="shared",
        metadata={
            "help": f"{ADVANCED}'shared': all processes build and read one folder, which all machines see. 'node': each machine has "
            "its own folder at this path, with the rows that its processes train on. These rows do not change from epoch to "
            "epoch, so samples are shuffled within a machine only, and a run on another number of machines builds anew."
        },
    )
    consume_previous_cache: bool = field(
        default=False,
        metadata={
            "help": f"{ADVANCED}delete the cache of a stage, shard by shard, while the next one is computed from it. Peak disk is "
            "then the larger of the two and one shard (in all views) for each process, in place of both. Going back to an "
            "earlier stage builds its cache anew. Another run that reads the same caches would stop."
        },
    )
    offload_prefix: bool = field(
        default=False,
        metadata={
            "help": f"{ADVANCED}while a stage trains from a cache, keep weights of its frozen blocks in host memory, where the device has "
            "memory of its own. They come back for what runs on images, and when the stage ends. Not with torch_compile."
        },
    )
    gradient_weight: Annotated[float, between(0, 1)] = field(
        default=0.0,
        metadata={
            "help": f"{ADVANCED}for codec='auto' and 'transform': how much a direction counts by its effect, from 0 to 1."
        },
    )
    calibration_samples: Annotated[int, at_least(4)] = field(
        default=256,
        metadata={"help": f"{ADVANCED}images on which a lossy codec is calibrated: half to fit it, half to measure."},
    )
    chunk_size: Annotated[int, at_least(1)] = field(
        default=32,
        metadata={"help": f"{ADVANCED}samples encoded together: the unit of reading and of shuffling."},
    )
    shard_chunks: Annotated[int, at_least(1)] = field(
        default=32,
        metadata={"help": f"{ADVANCED}chunks in one shard file: the unit of writing and of resuming a build."},
    )
    shuffle_window: Annotated[int, at_least(1)] = field(
        default=8,
        metadata={"help": f"{ADVANCED}chunks whose samples are mixed while training; all are held in memory."},
    )
    memory_gb: Annotated[float, at_least(0)] = field(
        default=0.25,
        metadata={"help": f"{ADVANCED}GB (1e9 bytes) of chunks that a process keeps decoded, beyond the window."},
    )
    build_batch_size: Annotated[Optional[int], at_least(1)] = field(
        default=None,
        metadata={
            "help": f"{ADVANCED}images per forward of the prefix while building. Default: per_device_train_batch_size, which makes "
            "cached and uncached training agree to the bit on a CPU."
        },
    )
    build_num_workers: Annotated[Optional[int], at_least(0)] = field(
        default=None,
        metadata={"help": f"{ADVANCED}processes that render images while building. Default: dataloader_num_workers."},
    )
    view_seed: int = field(
        default=0,
        metadata={
            "help": f"{ADVANCED}seed of the views and of the chunk layout. Runs with another --seed draw the same views in another "
            "order, so they share a cache."
        },
    )
    transform_id: Optional[str] = field(
        default=None,
        metadata={
            "help": f"{ADVANCED}a name that stands for the training transform and the data collator in the fingerprint. It is needed "
            "only where they cannot be hashed. Change it whenever you change them."
        },
    )
    dataset_id: Optional[str] = field(
        default=None,
        metadata={
            "help": f"{ADVANCED}names training data that are no datasets.Dataset, in the fingerprint. Change it whenever the data change."
        },
    )
    lock_timeout: Annotated[float, at_least(0)] = field(
        default=30.0,
        metadata={"help": f"{ADVANCED}seconds to wait for another run that writes the same cache, before giving up."},
    )
    cache_dir: InitVar[Optional[str]] = None

    def __post_init__(self, cache_dir: Optional[str]) -> None:
        """Settle the folder, and check the values."""
        self.freezecache_dir = _settle_folder(cache_dir, self.freezecache_dir)
        if isinstance(self.bits_per_element, (int, float)):
            self.bits_per_element = str(self.bits_per_element)
        check_values(self, _SCHEMAS)
        for name in ("feature_augmentation", "offload_prefix"):
            if (value := getattr(self, name)) not in (None, False) and self.mode == "never":
                raise UnsupportedSetupError(
                    f"{name}={value!r} acts in cached stages, but mode='never' makes none: remove one."
                )
        if self.num_views == 0 and self.mode != "never":
            raise UnsupportedSetupError(
                "num_views=0 draws a new view in every epoch, which no cache can hold: set mode='never', or num_views of 1 or more."
            )

    @property
    def chooses_views(self) -> bool:
        """Whether the number of views is left to ``schedule="auto"``."""
        return self.num_views == "auto" or type(self.num_views) is _Views

    @property
    def copies_apart(self) -> bool:
        """Whether views beyond the first have a codec of their own."""
        apart = self.copies in ("residual", "sensitive") or (self.copies == "auto" and self.codec == "auto")
        return apart and bool(self.num_views == "auto" or self.num_views > 1)


# Only now: in the class body it would be the default of the argument.
CacheConfig.cache_dir = property(lambda self: self.freezecache_dir, doc="The same as ``freezecache_dir``.")  # type: ignore


def _settle_folder(cache_dir: Any, freezecache_dir: Any) -> _Folder:
    """Return the folder that a caller gives under either name, or the default."""
    given = [folder for folder in (cache_dir, freezecache_dir) if folder is not None and folder is not _DEFAULT_FOLDER]
    # In dataclasses.replace a new folder takes the place of the one that was settled on.
    given = [folder for folder in given if not isinstance(folder, _Folder)] or given or [_DEFAULT_FOLDER]
    for folder in given:
        if not isinstance(folder, (str, os.PathLike)) or not str(folder):
            raise UnsupportedSetupError(f"freezecache_dir={folder!r}: expected the path of a folder.")
        if "://" in str(folder):
            raise UnsupportedSetupError(
                f"freezecache_dir={str(folder)!r} is an address; caches are written to local folders only. Give a folder; push a "
                "finished cache with hf-freezecache push, and read it from anywhere with CachedDataset.from_pretrained."
            )
    # What was settled on is expanded already; the user of a name after ~ may be unknown, and is then part of the name.
    folders = {folder if isinstance(folder, _Folder) else str(Path(os.path.expanduser(folder))) for folder in given}  # noqa: PTH111
    if len(folders) > 1:
        raise UnsupportedSetupError(
            f"cache_dir={str(cache_dir)!r} and freezecache_dir={str(freezecache_dir)!r} name the same setting; give one of them."
        )
    return _Folder(folders.pop())


# Taken here once: `HfArgumentParser` rewrites the types that it finds in a dataclass.
_SCHEMAS = {kind: schema_of(kind) for kind in (FreezeConfig, CacheConfig)}
