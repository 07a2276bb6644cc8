"""Puts what ``schedule="auto"`` and ``num_views="auto"`` choose in the place of what the user left open."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..auto_schedule import Choice, choose, counted_epochs
from ..data.layout import ChunkLayout
from ..data.views import ViewDataset, views_differ
from ..errors import UnsupportedSetupError
from ..model.attention_inputs import attention_inputs
from ..model.probe import find_blocks
from ..model.split import Splits
from ..model.withheld import blank_images, outer_parameters
from ..report.text import counted
from ..schedules import Stage
from .auto_rates import DECAY_SCALE, QKV_SCALE, chosen_rates, head_steps
from .block_weights import only_adapters_train, share_of, tokens_and_channels
from .checkpoints import Chosen, load_stage
from .data_checks import num_classes
from .planner import most_views

__all__ = ["LAYER_DECAY", "resume_choice", "settle_auto", "settle_views"]

logger = logging.getLogger(__name__)

#: What may be chosen beside the schedule.
_CHOSEN = (
    "token_keep",
    "unfrozen_token_keep",
    "block_weights",
    "plain_epochs",
    "head_rows",
    "layer_decay",
    "lr_scale",
)
#: ``layer_decay`` where no head trains first: blocks must not follow a new head. Behind a trained one a rate for all blocks is as good or
#: better: at a cost of one epoch 85.2 and 79.3% without decay, 83.4 and 78.7% with it (means of two seeds, Caltech-101 and CIFAR-10 at
#: 112 pixels, in the record of explorations). Source of the number: as ``lr_rule.RULE``; BEiT and MAE fine-tune with 0.65 to 0.85.
LAYER_DECAY = 0.75
#: Queries, keys and values train alone for up to so many tokens of an image, and from so many channels on, unless the user asks for it. Source: at a cost of one epoch, with 50 tokens (112 pixels) or 17 they
#: gain, see ``auto_recipes.RECIPES``; with 197 (224 pixels) they have 93.7% where the last eight blocks have 94.5 on Caltech-101, and 92.0
#: for 95.0 on flowers; at a cost of four, 93.1 where all but one have 95.5 on Caltech-101 (one or two seeds, record of explorations). Nothing
#: between was tried. The demo's model of 128 channels, with 17 tokens and little pretraining, has 91.1 and 92.5% with them, and 93.0 and 95.3
#: behind a frozen block.
FEW_TOKENS, MANY_CHANNELS = 100, 192
#: A head that trains before queries, keys and values do needs so many rows of each class, and this share of all: what the other rows
#: would take trains blocks. Source: at a cost of one epoch, on digits 89.0% with all rows, 93.2 with a fifth and 94.3 with a tenth, which is 9
#: of each class; on CIFAR-10 84.6, 86.0 and 85.3; on Caltech-101 81.1 with all 15 of a class, 81.5 with 10 and 80.1 with 5 (two or three
#: seeds, record of explorations, where the head trains apart).
ROWS_PER_CLASS, LEAST_ROWS = 10, 0.15


def settle_auto(trainer: Any, num_epochs: int) -> None:
    """Settle the configurations of a trainer whose schedule is ``"auto"``, and its number of epochs.

    Without a budget the head trains first, for epochs on top of the user's, unless ``max_steps`` says how long to train.

    What the user set stays: ``num_views``, ``token_keep``, ``unfrozen_token_keep``, ``block_weights``, ``plain_epochs``, ``head_rows``,
    ``layer_decay``, ``lr_scale``. The choice depends on these, the blocks and what makes their queries, keys and values, the tokens of an image, whether a head trains, whether only
    adapters do, whether views differ, the epochs, the optimizer steps in one, the rows and classes, the budget, and, for the head of a
    short run, its rate; rates also on the user's learning rate, the kind of optimizer and the width of the blocks. A resumed run keeps those of
    its checkpoint.

    Args:
        trainer: The user's trainer. Its ``freeze_config`` and ``cache_config`` are replaced, and its ``args`` give way to a
            copy with another number of epochs. Its record says what was chosen.
        num_epochs: Epochs of the run as the user asks for it; what ``max_steps`` makes of them rules.

    Raises:
        ScheduleError: See ``choose``.
        UnsupportedSetupError: There is a budget, but ``max_steps`` says how long to train, or a scheduler of the user's own does.
    """
    freezing, caching, args = trainer.freeze_config, trainer.cache_config, trainer.args
    if freezing.budget is not None and args.max_steps > 0:
        raise UnsupportedSetupError(
            f"budget={freezing.budget:g} chooses the number of epochs, but max_steps={args.max_steps} fixes how long to train. Set "
            "num_train_epochs in place of max_steps, or remove the budget."
        )
    blocks = list(find_blocks(trainer.model)[1])
    adapters, weights = only_adapters_train(blocks), freezing.block_weights
    share, qkv_gains, cached_head = None, weights == "qkv", True
    if not adapters and (qkv_gains or weights is None):
        splits = Splits(trainer.model, call=_first_call(trainer))
        layers = attention_inputs(splits)
        share, cached_head = share_of(splits, layers), _head_splits(splits)
        # Features are augmented where blocks train from a cache.
        if caching.feature_augmentation is None:
            qkv_gains = qkv_gains or (_few_tokens(splits) and _all_train(layers))
    # Without caches a number of views costs nothing to leave as it is, unless the user asks for the rule.
    free = caching.chooses_views and (caching.mode != "never" or caching.num_views == "auto")
    few_rows = _few_rows(trainer)
    settled = {
        "head_first": _head_trains(trainer.model, blocks),
        "token_keep": freezing.token_keep,
        "cached": caching.mode != "never",
        # A scheduler of the user's own knows how many steps there are to be.
        "more_epochs": args.max_steps <= 0 and trainer.lr_scheduler is None,
        "adapters": adapters,
        "epoch_steps": _epoch_steps(trainer),
        "head_steps": head_steps(trainer, blocks),
        "qkv_share": share if qkv_gains else None,
        "unfrozen_keep": freezing.unfrozen_token_keep or 1.0,
        "trained_share": share if share and weights == "qkv" else 1.0,
        "cached_head": cached_head,
        "head_rows": None if freezing.head_rows is None else _part_of_rows(trainer, freezing.head_rows),
        "few_rows": 1.0 if few_rows is None else _part_of_rows(trainer, few_rows),
    }
    # Perhaps a part of an epoch.
    asked = num_epochs if args.max_steps > 0 or args.num_train_epochs <= 0 else args.num_train_epochs
    choice = choose(len(blocks), asked, freezing.budget, num_views=None if free else caching.num_views, **settled)
    if free and choice.num_views > 1 and not _views_differ(trainer):
        choice = choose(len(blocks), asked, freezing.budget, num_views=1, **settled)
    if trainer.lr_scheduler is not None and args.max_steps <= 0 and not math.isclose(choice.num_epochs, asked):
        raise UnsupportedSetupError(
            f"schedule='auto' would train for {choice.num_epochs:g} epochs in place of {asked:g}, but the learning-rate scheduler that was "
            "passed in `optimizers` is made for these. Pass optimizers=(optimizer, None) with lr_scheduler_type, remove the budget, or write "
            "the schedule out."
        )
    stages = choice.stages(len(blocks))
    known = {name: getattr(freezing, name) for name in _CHOSEN}
    settings: dict[str, Any] = {name: None for name, value in known.items() if value is None}
    settings["schedule"] = ",".join(f"{epoch}:{split_point}" for epoch, split_point in stages)
    if choice.qkv_only:
        settings["block_weights"] = "qkv"
    elif freezing.token_keep is None:
        settings["token_keep"] = choice.token_keep
    if freezing.plain_epochs is None and choice.plain_epochs and trainer._transforms[1] is not None:
        settings["plain_epochs"] = choice.plain_epochs
    if choice.few_rows:
        settings["head_rows"] = few_rows
    # Rates of adapters are the user's: the best ones of frozen and unfrozen runs lie close together.
    higher = 1.0
    if choice.qkv_only or weights == "qkv":
        # A user's rate that was found with a decay is higher already.
        higher = QKV_SCALE if freezing.layer_decay in (None, 1) else QKV_SCALE / DECAY_SCALE
    elif freezing.layer_decay is None and not adapters and len(stages) == 1:
        settings["layer_decay"], higher = LAYER_DECAY, DECAY_SCALE
    if freezing.lr_scale is None and not adapters:
        settings["lr_scale"] = chosen_rates(trainer, blocks, choice, higher)
    views = choice.num_views if free else int(caching.num_views)
    chosen = Chosen(
        asked={
            **known,
            "epochs": None if args.max_steps > 0 else asked,
            "max_steps": args.max_steps,
            "budget": freezing.budget,
            "num_views": None if free else views,
            "eval_transform": trainer._transforms[1] is not None,
            "feature_augmentation": caching.feature_augmentation is not None,
            "scheduler": True if trainer.lr_scheduler is not None else None,
        },
        settings=settings,
        num_views=views if free else None,
        num_train_epochs=None if args.max_steps > 0 else float(choice.num_epochs),
        words=_described(choice, {**known, **settings}, views),
    )
    _put_in_place(trainer, chosen)
    # Seen without setting up logging: epochs and rates are no longer those that the user's script says.
    level = logging.WARNING if trainer.is_world_process_zero() else logging.DEBUG
    for line in chosen.words.split(": ", 1):
        logger.log(level, "%s", line)


def resume_choice(trainer: Any, checkpoint: Path) -> None:
    """Let a run that goes on do what the interrupted one chose, if the user asks for the same.

    Another choice may follow now, where steps have more images on more processes, where images have changed, or from a later rule.

    Args:
        trainer: The user's trainer, whose own choice is in place.
        checkpoint: What it goes on from.

    Raises:
        UnsupportedSetupError: What the checkpoint says of its run cannot be read.
    """
    own, saved = trainer._chosen, load_stage(checkpoint).chosen
    if saved is None or saved == own:
        return
    if {**dict.fromkeys(own.asked), **saved.asked} == own.asked:  # an older checkpoint knows fewer settings
        logger.warning("Going on with what the interrupted run chose. %s", saved.words)
        _put_in_place(trainer, saved)
        return
    # Of another schedule, or an older checkpoint, the rates alone: optimizer and scheduler of the checkpoint bear the learning rate of old.
    rates = saved.settings.get("lr_scale")
    if own.settings.get("lr_scale") not in (None, rates) and rates is not None:
        words = own.words.replace(f"lr_scale={own.settings['lr_scale']}", f"lr_scale={rates}")
        _put_in_place(trainer, replace(own, settings={**own.settings, "lr_scale": rates}, words=words))


def _put_in_place(trainer: Any, chosen: Chosen) -> None:
    """Put what was chosen in the place of what the user left open."""
    trainer._chosen, trainer._record.chosen = chosen, chosen.words
    free = dict.fromkeys(name for name in _CHOSEN if chosen.asked.get(name) is None)
    trainer.freeze_config = replace(trainer.freeze_config, budget=None, **free | chosen.settings)
    if chosen.num_views is not None:
        trainer.cache_config = replace(trainer.cache_config, num_views=chosen.num_views)
    if chosen.num_train_epochs is not None:
        # The user's own stay as they are: another trainer may get them, and choose from the epochs in them.
        asked, trainer.args = chosen.asked["epochs"], copy.copy(trainer.args)
        trainer.args.num_train_epochs = chosen.num_train_epochs
        same = asked == chosen.num_train_epochs
        trainer._record.asked_epochs = None if same else int(asked) if asked == int(asked) else asked


def settle_views(trainer: Any, stages: Sequence[Stage], num_epochs: int) -> None:
    """Settle ``num_views="auto"`` of a trainer whose schedule is written out. Another number of views stays.

    The number depends on the stages, the epochs, and whether views differ, alone.

    Args:
        trainer: The user's trainer. Its ``cache_config`` is replaced.
        stages: The stages, in order.
        num_epochs: Epochs of the run.
    """
    if trainer.cache_config.num_views != "auto":
        return
    num_views, epochs = most_views(stages, num_epochs)
    reason = f"blocks are frozen for {counted(epochs, 'epoch')} in a row" if epochs else "no block is frozen"
    if num_views > 1 and not _views_differ(trainer):
        num_views, reason = 1, "the transform gives the same image in every view"
    trainer.cache_config = replace(trainer.cache_config, num_views=num_views)
    logger.info("num_views='auto': %s of each image, since %s.", counted(num_views, "view"), reason)


def _all_train(layers: Iterable[nn.Module]) -> bool:
    return all(parameter.requires_grad for layer in layers for parameter in layer.parameters())


def _few_tokens(splits: Splits) -> bool:
    tokens, channels = tokens_and_channels(splits)
    return tokens <= FEW_TOKENS and channels >= MANY_CHANNELS


def _head_splits(splits: Splits) -> bool:
    """Whether the head needs the output of the last block alone, so that it may train from a cache."""
    try:
        splits.at(splits.num_blocks).verify(dict(splits.call or {}), tolerance=1e-3)
    except Exception:  # why not is told when the stage is tried on the data
        return False
    return True


def _head_trains(model: nn.Module, blocks: Iterable[nn.Module]) -> bool:
    """Whether something behind the blocks trains; LoRA without ``modules_to_save``, for one, leaves a head as it is."""
    inside = {parameter for block in blocks for parameter in block.parameters()}
    parameters = list(model.parameters())
    last = max(place for place, parameter in enumerate(parameters) if parameter in inside)
    return any(parameter.requires_grad for parameter in parameters[last + 1 :])


def _epoch_steps(trainer: Any) -> float | None:
    """Return the images of an epoch over those of an optimizer step; ``None`` if the number of rows is not known."""
    if not (rows := _num_rows(trainer)):
        return None
    args = trainer.args
    batches = rows / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else batches
    return float(batches / args.gradient_accumulation_steps) or None


def _few_rows(trainer: Any) -> float | None:
    """Return which share of the rows is enough for a head that trains first; ``None`` if all are needed, or nothing is known of them."""
    classes, rows = num_classes(trainer.model), _num_rows(trainer)
    share = math.ceil(100 * ROWS_PER_CLASS * classes / rows) / 100 if classes is not None and rows else 1.0
    return max(share, LEAST_ROWS) if share < 1 else None


def _part_of_rows(trainer: Any, share: float) -> float:
    """Return the share of the rows that whole chunks make of a share, in each of the folders of caches."""
    rows, size = _num_rows(trainer), trainer.cache_config.chunk_size
    if not rows:
        return share
    groups = trainer._process_groups[1].rows_of_groups(rows)
    return sum(ChunkLayout.of_rows(rows, size, 0, *run).part(share).num_samples for run in groups) / rows


def _num_rows(trainer: Any) -> int:
    try:
        return len(trainer.train_dataset)
    except TypeError:
        return 0


def _first_call(trainer: Any) -> dict[str, Any] | None:
    """Return arguments of a forward of a blank image as large as the first training image; ``None`` if that cannot be had."""
    try:
        views = ViewDataset(trainer.train_dataset, trainer.cache_config.view_seed, *trainer._transforms)
        shape = tuple(views[0, 0]["pixel_values"].shape)
        return {"pixel_values": blank_images(outer_parameters(trainer.model), 1, shape).contiguous()}
    except Exception:  # it is told once the data are checked
        return None


def _views_differ(trainer: Any) -> bool:
    """Whether two views of a row may differ: a transform that draws nothing gives one image over and over."""
    try:
        return views_differ(ViewDataset(trainer.train_dataset, trainer.cache_config.view_seed, *trainer._transforms))
    except Exception:  # it is told once the data are checked
        return True


def _epochs(choice: Choice) -> str:
    head, rest = choice.head_epochs, choice.num_epochs - choice.head_epochs
    if head:
        return f"{counted(head, 'epoch')} of the head alone, then {rest:.4g}"
    return "one epoch" if rest == 1 else f"{rest:.4g} epochs"


def _described(choice: Choice, settings: Mapping[str, Any], num_views: int) -> str:
    """Return in a sentence why, and behind a colon what was chosen."""
    values = ((name, settings[name]) for name in _CHOSEN)
    chosen = [
        f"{name}={value if isinstance(value, str) else f'{value:g}'}" for name, value in values if value is not None
    ]
    frozen = f"behind {counted(choice.split_point, 'frozen block')}" if choice.split_point else "without frozen blocks"
    return (
        f"{choice.reason}: {_epochs(choice)} {frozen}, num_views={num_views}, {', '.join(chosen)}; that is "
        f"{counted_epochs(choice.cost, choice.epoch_words)}, counted in passes through blocks."
    )
