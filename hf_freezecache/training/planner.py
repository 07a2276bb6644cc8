"""What a run will do, before it does it: its order of samples, its stages, what they cost, and whether they are cached.

A planner rule says why a stage is trained without a cache, or ``None``. To add one, write a function of an ``Outlook`` and name
it in ``PLANNER_RULES``; the first rule that gives a reason decides:

    def too_short(outlook: Outlook) -> str | None:
        short = outlook.config.mode == "auto" and outlook.passes["cached_passes"] > outlook.passes["live_passes"]
        return "Building a cache takes more block passes than it saves." if short else None
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..auto_recipes import views_for
from ..config import CacheConfig, FreezeConfig
from ..data.layout import ChunkLayout
from ..data.sampler import ChunkSampler
from ..distributed.process_group import ProcessGroup
from ..passes import passes_of_step
from ..schedules import Stage, plan_stages, thawed_to

__all__ = [
    "PLANNER_RULES",
    "Outlook",
    "epochs_of",
    "make_sampler",
    "most_views",
    "plan_run",
    "predict_passes",
    "shuffle_seed",
    "states_at",
    "steps_of_head",
    "steps_per_epoch",
    "why_live",
]

_Number = TypeVar("_Number", int, float)

#: A cache that takes more than this share of what training without one does is not made: a tie goes to what needs no disk.
_TIE = 0.97


def shuffle_seed(args: Any) -> int:
    """Return the seed of the order of samples, as ``Trainer`` chooses it."""
    return int(args.seed if args.data_seed is None else args.data_seed)


def make_sampler(
    num_samples: int, config: CacheConfig, args: Any, process_group: ProcessGroup, batch_size: int
) -> ChunkSampler:
    """Return the sampler of a run, for cached and live stages alike.

    Args:
        num_samples: Rows of the training data set.
        config: The user's settings of caches.
        args: ``TrainingArguments``.
        process_group: Processes that share a folder of caches.
        batch_size: Samples per batch of one process.

    Raises:
        UnsupportedSetupError: There are too few chunks for so many processes.
    """
    return ChunkSampler(
        [
            ChunkLayout.of_rows(num_samples, config.chunk_size, config.view_seed, *rows)
            for rows in process_group.rows_of_groups(num_samples)
        ],
        shuffle_seed(args),
        config.view_seed,
        config.num_views,
        config.shuffle_window,
        process_group.group_of_rank,
        batch_size,
        args.dataloader_drop_last,
    )


def _num_epochs(args: Any, sampler: ChunkSampler | None) -> int:
    """Return the number of epochs of a run, rounded up; ``max_steps`` rules if it is set."""
    if args.max_steps <= 0 or sampler is None:
        return max(math.ceil(args.num_train_epochs), 1)
    return max(math.ceil(args.max_steps / steps_per_epoch(args, sampler)), 1)


def exact_epochs(args: Any, sampler: ChunkSampler, num_epochs: int) -> float:
    """Return the epochs of a run, of which the last counts as far as it goes.

    Args:
        args: ``TrainingArguments``.
        sampler: Order of the training data.
        num_epochs: The same, rounded up.
    """
    steps = steps_per_epoch(args, sampler)
    # As ``Trainer`` rounds them.
    exact = (args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)) / steps
    return min(exact, num_epochs) if exact > 0 else num_epochs


def steps_per_epoch(args: Any, sampler: ChunkSampler) -> int:
    """Return the optimizer steps of an epoch, as ``Trainer`` counts them.

    Args:
        args: ``TrainingArguments``.
        sampler: Order of the training data.
    """
    batches = len(sampler) / args.train_batch_size / args.world_size
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1)


def steps_of_head(stages: Sequence[Stage], num_blocks: int, args: Any, sampler: ChunkSampler) -> int:
    """Return how many steps a run begins with in which the head trains alone; 0 if no block thaws then.

    Args:
        stages: All stages of the run, in order.
        num_blocks: Blocks of the model.
        args: ``TrainingArguments``.
        sampler: Order of the training data.
    """
    thawing = next((stage for stage in stages if stage.split_point != num_blocks), None)
    return 0 if thawing is None else thawing.start_epoch * steps_per_epoch(args, sampler)


def plan_run(
    freeze_config: FreezeConfig, args: Any, num_blocks: int, sampler: ChunkSampler | None
) -> tuple[list[Stage], int]:
    """Return the stages of a run, and its number of epochs.

    Args:
        freeze_config: The user's schedule.
        args: ``TrainingArguments``.
        num_blocks: Blocks of the model.
        sampler: Order of the training data; ``None`` without any.

    Raises:
        ScheduleError: The schedule cannot be read, or asks for more blocks than there are.
    """
    num_epochs = _num_epochs(args, sampler)
    return plan_stages(freeze_config.schedule, num_epochs, num_blocks), num_epochs


def predict_passes(
    stage: Stage,
    stages: Sequence[Stage],
    num_epochs: float,
    num_blocks: int,
    config: CacheConfig,
    token_keep: float = 1.0,
    trained_share: float = 1.0,
    rows_share: float = 1.0,
) -> dict[str, float]:
    """Count the passes through blocks that a stage takes per image, with and without a cache.

    What counts is said in ``passes``. Without a cache, each epoch runs the frozen blocks forward and the others forward and
    backward. With one, the frozen blocks run once for each stored view, from the cache of an earlier stage on if there is one.

    Args:
        stage: The stage.
        stages: All stages of the run, in order.
        num_epochs: Epochs of the run; the last may be a part of one.
        num_blocks: Blocks of the model.
        config: The user's settings of caches.
        token_keep: Share of the patch tokens that trained blocks see.
        trained_share: Share of their own weights that they train.
        rows_share: Share of the rows that epochs of the stage show, and its cache holds.

    Returns:
        ``cached_passes`` and ``live_passes`` per image, over all epochs of the stage.
    """
    epochs = epochs_of(stage, stages, num_epochs)
    trained = passes_of_step(num_blocks, stage.split_point, token_keep, trained_share) * epochs
    source = states_at(stage, stages, config)
    # Caches of later stages that are built on the way are of all rows.
    ahead = [] if config.build_from == "images" or config.consume_previous_cache else thawed_to(stage, stages)
    whole = max([source, *ahead])
    return {
        "cached_passes": float(
            trained + config.num_views * (whole - source + rows_share * (stage.split_point - whole))
        ),
        "live_passes": float(trained + epochs * stage.split_point),
    }


def epochs_of(stage: Stage, stages: Sequence[Stage], num_epochs: _Number) -> _Number:
    """Return the epochs of a stage.

    Args:
        stage: The stage.
        stages: All stages of the run, in order.
        num_epochs: Epochs of the run; the last may be a part of one.
    """
    end = num_epochs
    for later in stages:
        if later.index > stage.index:
            end = min(end, later.start_epoch)
    return max(end - stage.start_epoch, 0)


def most_views(stages: Sequence[Stage], num_epochs: int) -> tuple[int, int]:
    """Return how many views a run should store, and for how many epochs in a row blocks are frozen, at most; 1 and 0 without any.

    Stages in a row share their views: the cache of one is computed from that of the one before, or on the way to it.

    Args:
        stages: All stages of the run, in order.
        num_epochs: Epochs of the run.
    """
    longest = epochs = 0
    for stage in stages:
        epochs = epochs + epochs_of(stage, stages, num_epochs) if stage.split_point > 0 else 0
        longest = max(longest, epochs)
    return views_for(longest), longest


def states_at(stage: Stage, stages: Sequence[Stage], config: CacheConfig) -> int:
    """Return the split point from which the states of a stage are computed: its own if an earlier stage builds its cache.

    Args:
        stage: The stage.
        stages: All stages of the run, in order.
        config: The user's settings of caches.
    """
    before = stages[: stage.index]
    if config.build_from == "images":
        return 0
    if not config.consume_previous_cache and any(stage.split_point in thawed_to(one, stages) for one in before):
        return stage.split_point
    # Stages behind whose blocks nothing has trained since.
    lowest = [min(one.split_point for one in before[number:]) for number in range(len(before))]
    usable = [one.split_point for one, least in zip(before, lowest, strict=True) if one.split_point == least]
    # What a later stage needs is not consumed: a cache that is there is not built again.
    return max((point for point in usable if point <= stage.split_point), default=0)


@dataclass(frozen=True)
class Outlook:
    """What is known of a stage before it begins.

    Attributes:
        stage: The stage.
        config: The user's settings of caches.
        passes: What ``predict_passes`` gives for the stage.
        refusal: Why the stage cannot be trained from a cache, if it cannot.
        costs: What ``stage_costs.predict_costs`` gives for the stage; empty where nothing is known.
    """

    stage: Stage
    config: CacheConfig
    passes: dict[str, float]
    refusal: str | None = None
    costs: Mapping[str, float] = field(default_factory=dict)


def _nothing_frozen(outlook: Outlook) -> str | None:
    return "No block is frozen." if outlook.stage.split_point == 0 else None


def _never(outlook: Outlook) -> str | None:
    return "mode='never' runs the frozen blocks in every step." if outlook.config.mode == "never" else None


def _refused(outlook: Outlook) -> str | None:
    return None if outlook.refusal is None else f"Training from a cache would not be the same: {outlook.refusal}."


def _too_many_views(outlook: Outlook) -> str | None:
    costs = outlook.costs
    if "cached_views" not in costs:
        return None
    return (
        f"mode='auto': for a cache {costs['cached_views']:g} views of each image would be rendered, and without one "
        f"{costs['live_views']:g}."
    )


def _little_to_save(outlook: Outlook) -> str | None:
    seconds = outlook.costs.get("frozen_seconds")
    if seconds is None:
        return None
    return f"mode='auto': images and frozen blocks take about {seconds:,.2g} s in the whole stage, and a cache would save less."


def _does_not_pay(outlook: Outlook) -> str | None:
    costs = outlook.costs
    if "cached_seconds" not in costs or costs["cached_seconds"] < _TIE * costs["live_seconds"]:
        return None
    return (
        f"mode='auto' measured a few images: with a cache the stage would take {costs['cached_seconds']:,.3g} s, without "
        f"{costs['live_seconds']:,.3g} s."
    )


#: Extension point: rules in the order in which they are asked.
PLANNER_RULES: list[Callable[[Outlook], str | None]] = [
    _nothing_frozen,
    _never,
    _refused,
    _too_many_views,
    _little_to_save,
    _does_not_pay,
]


def why_live(outlook: Outlook) -> str | None:
    """Return why a stage is trained without a cache, or ``None`` if it is to have one."""
    return next((reason for rule in PLANNER_RULES if (reason := rule(outlook)) is not None), None)
