"""``schedule="auto"``: how many blocks to freeze, how many views to store and how many epochs to train, for a budget.

Costs are counted in epochs of full fine-tuning, by passes through blocks, see ``passes``: one such epoch of a model of ``n``
blocks takes ``3 n`` per image. Freezing ``k`` blocks and training ``E`` epochs from a cache of ``V`` views, on a share ``t`` of
the patch tokens, takes ``k V + 3 (n - k) t E``.

The rule is a table, ``RECIPES``: the more a run may cost, the fewer blocks are frozen. It depends on nothing but its
arguments, so a resumed run and all processes choose the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ScheduleError
from .passes import passes_of_step

__all__ = ["RECIPES", "Choice", "Recipe", "choose"]


@dataclass(frozen=True)
class Recipe:
    """How to train for a cost.

    Attributes:
        most_cost: It is for runs of at most this cost, in epochs of full fine-tuning.
        frozen: Share of the blocks to freeze, in (0, 1).
        num_views: Views to store of each image.
        token_keep: Share of the patch tokens that a step sees behind the frozen blocks.
        most_epochs: Further epochs gain nothing, unless the user asks for that many of full fine-tuning.
    """

    most_cost: float
    frozen: float
    num_views: int
    token_keep: float
    most_epochs: int

    def split_point(self, num_blocks: int) -> int:
        """Return the number of blocks to freeze; at least one block is trained, and one is frozen if there are two."""
        return min(max(round(self.frozen * num_blocks), 1), num_blocks - 1)


#: In order of cost. Source: some thirty runs of DeiT-Tiny at 160 pixels on 101 classes with 12 images each, one seed; no record of
#: recipes/benchmarks/time_to_accuracy.py confirms them yet.
RECIPES = (
    Recipe(most_cost=1.0, frozen=11 / 12, num_views=1, token_keep=1.0, most_epochs=8),
    Recipe(most_cost=1.4, frozen=0.75, num_views=1, token_keep=0.5, most_epochs=12),
    Recipe(most_cost=2.0, frozen=0.75, num_views=2, token_keep=0.5, most_epochs=12),
    Recipe(most_cost=3.0, frozen=0.5, num_views=2, token_keep=1.0, most_epochs=6),
    Recipe(most_cost=math.inf, frozen=0.5, num_views=4, token_keep=0.5, most_epochs=16),
)
#: Without a budget, runs of more epochs than these see a part of the tokens.
_FEW_EPOCHS = 5


@dataclass(frozen=True)
class Choice:
    """What the rule chose.

    Attributes:
        split_point: Number of blocks to freeze from the first epoch on.
        num_epochs: Epochs to train.
        num_views: Views to store of each image.
        token_keep: Share of the patch tokens that a step sees.
        cost: Predicted cost, in epochs of full fine-tuning.
        reason: Why, in a sentence.
    """

    split_point: int
    num_epochs: int
    num_views: int
    token_keep: float
    cost: float
    reason: str


def _cost(split_point: int, num_epochs: float, num_views: int, token_keep: float, num_blocks: int) -> float:
    trained = passes_of_step(num_blocks, split_point, token_keep) * num_epochs
    return (num_views * split_point + trained) / passes_of_step(num_blocks, 0)


def _epochs_for(recipe: Recipe, cost: float, num_blocks: int) -> int:
    """Return how many epochs of a recipe a cost pays for, with the views stored first."""
    split_point = recipe.split_point(num_blocks)
    left = passes_of_step(num_blocks, 0) * cost - recipe.num_views * split_point
    # The tolerance keeps what is paid for exactly: in binary a third of 3 lies below 1.
    return math.floor(left / passes_of_step(num_blocks, split_point, recipe.token_keep) + 1e-9)


def choose(num_blocks: int, num_epochs: int, budget: float | None = None) -> Choice:
    """Choose how to train a model.

    Args:
        num_blocks: Blocks of the model.
        num_epochs: Epochs of full fine-tuning that the user asks for.
        budget: What the run may cost, as a share of that of ``num_epochs`` epochs of full fine-tuning. The number of epochs is
            then chosen, too. ``None`` trains for ``num_epochs``.

    Raises:
        ScheduleError: The model has one block only, or the budget does not pay for a single epoch of any recipe.
    """
    if num_blocks < 2:
        raise ScheduleError("schedule='auto' freezes some of several blocks, but the model has one. Give a schedule.")
    if budget is None:
        few = num_epochs <= _FEW_EPOCHS
        recipe = RECIPES[-2] if few else RECIPES[-1]
        epochs, views = num_epochs, min(recipe.num_views, num_epochs)
        reason = f"schedule='auto' keeps the {num_epochs} epoch{'s' if num_epochs > 1 else ''} asked for"
    else:
        cost = budget * num_epochs
        # Gentler recipes may not pay for an epoch beside their views: a harder one then does.
        fitting = [recipe for recipe in RECIPES if _epochs_for(recipe, cost, num_blocks) >= 1]
        if not fitting:
            split_point = RECIPES[0].split_point(num_blocks)
            least = _cost(split_point, 1, RECIPES[0].num_views, RECIPES[0].token_keep, num_blocks)
            raise ScheduleError(
                f"budget={budget:g} of {num_epochs} epochs is {cost:.3g} epochs of full fine-tuning, but one epoch behind "
                f"{split_point} frozen blocks takes {least:.3g}, caching included. Set budget to at least "
                f"{math.ceil(1000 * least / num_epochs) / 1000:g}."
            )
        recipe = next((recipe for recipe in fitting if cost <= recipe.most_cost), fitting[-1])
        epochs = min(_epochs_for(recipe, cost, num_blocks), max(recipe.most_epochs, num_epochs))
        views = min(recipe.num_views, epochs)
        reason = f"schedule='auto' may spend {cost:.3g} epochs of full fine-tuning (budget={budget:g} of {num_epochs})"
    split_point = recipe.split_point(num_blocks)
    return Choice(
        split_point,
        epochs,
        views,
        recipe.token_keep,
        _cost(split_point, epochs, views, recipe.token_keep, num_blocks),
        reason,
    )
