"""Puts what ``schedule="auto"`` chooses in the place of what the user left open."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

from ..auto_schedule import Choice, choose
from ..errors import UnsupportedSetupError
from ..model.probe import find_blocks

__all__ = ["LAYER_DECAY", "settle_auto"]

logger = logging.getLogger(__name__)

#: ``layer_decay`` under ``schedule="auto"``. Source: as ``auto_schedule.RECIPES``.
LAYER_DECAY = 0.75


def settle_auto(trainer: Any, num_epochs: int) -> None:
    """Settle the configurations of a trainer whose schedule is ``"auto"``, and the number of epochs if there is a budget.

    What the user set stays: ``num_views``, ``token_keep``, ``layer_decay``, ``lr_scale``. The choice depends on the number of blocks,
    the epochs and the budget alone.

    Args:
        trainer: The user's trainer. Its ``freeze_config`` and ``cache_config`` are replaced, and with a budget
            its ``args`` give way to a copy with another number of epochs. Its record says what was chosen.
        num_epochs: Epochs that the user asks for.

    Raises:
        ScheduleError: See ``choose``.
        UnsupportedSetupError: There is a budget, but ``max_steps`` says how long to train.
    """
    freezing, caching, args = trainer.freeze_config, trainer.cache_config, trainer.args
    if freezing.budget is not None and args.max_steps > 0:
        raise UnsupportedSetupError(
            f"budget={freezing.budget:g} chooses the number of epochs, but max_steps={args.max_steps} fixes how long to train. Set "
            "num_train_epochs in place of max_steps, or remove the budget."
        )
    choice = choose(len(find_blocks(trainer.model)[1]), num_epochs, freezing.budget)
    trainer.freeze_config = replace(
        freezing,
        schedule=f"0:{choice.split_point}",
        budget=None,
        token_keep=choice.token_keep if freezing.token_keep is None else freezing.token_keep,
        layer_decay=LAYER_DECAY if freezing.layer_decay is None else freezing.layer_decay,
        lr_scale="auto" if freezing.lr_scale is None else freezing.lr_scale,
    )
    if caching.chooses_views and caching.mode != "never":
        trainer.cache_config = replace(caching, num_views=choice.num_views)
    if freezing.budget is not None:
        # The user's own stay as they are: another trainer may get them, and choose from the epochs in them.
        trainer.args = copy.copy(args)
        trainer.args.num_train_epochs = float(choice.num_epochs)
    trainer._record.chosen = _described(choice, trainer)
    for line in trainer._record.chosen.split(": ", 1):
        logger.info("%s", line)


def _described(choice: Choice, trainer: Any) -> str:
    """Return in a sentence why, and behind a colon what was chosen."""
    freezing = trainer.freeze_config
    return (
        f"{choice.reason}: {choice.num_epochs} epochs behind {choice.split_point} frozen blocks, num_views="
        f"{int(trainer.cache_config.num_views)}, token_keep={freezing.token_keep:g}, layer_decay={freezing.layer_decay:g}, "
        f"lr_scale={freezing.lr_scale}; that is {choice.cost:.3g} epochs of full fine-tuning, counted in passes through blocks."
    )
