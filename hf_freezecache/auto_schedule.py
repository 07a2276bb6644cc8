"""``schedule="auto"``: how many blocks to freeze, how many views to store and how many epochs to train, for a budget.

The head trains first, alone, from the output of the last block: that costs a forward pass and gives the blocks a head that tells
them something. Then the blocks behind the split point thaw. Costs are counted in epochs of full fine-tuning, by passes through
blocks, see ``passes``: one such epoch of a model of ``n`` blocks takes ``3 n`` per image. A cache of ``V`` views takes ``n V``, or
``k V`` where the head does not train first, and ``E`` epochs behind ``k`` blocks, on a share ``t`` of the patch tokens, take
``3 (n - k) t E``.

The rule is a table, ``RECIPES``: the more a run may cost, the fewer blocks are frozen. It depends on nothing but its
arguments, so a resumed run and all processes choose the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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
        head_epochs: Epochs before these, in which the head trains alone.
    """

    most_cost: float
    frozen: float
    num_views: int
    token_keep: float
    most_epochs: int
    head_epochs: int = 2

    def split_point(self, num_blocks: int) -> int:
        """Return the number of blocks to freeze; at least one block is trained, and one is frozen if there are two."""
        return min(max(round(self.frozen * num_blocks), 1), num_blocks - 1)


#: In order of cost. Source of the first four: single runs of DeiT-Tiny on 50 classes of Caltech-101 at 112 pixels, half the size that
#: it was pretrained on, scored on a part of the training images. Records of recipes/benchmarks/time_to_accuracy.py have the second
#: and the fourth, with three seeds. The last two are these with more views, and not measured.
RECIPES = (
    Recipe(most_cost=0.7, frozen=0.75, num_views=1, token_keep=0.5, most_epochs=8),
    Recipe(most_cost=1.0, frozen=0.5, num_views=1, token_keep=0.5, most_epochs=4),
    Recipe(most_cost=1.5, frozen=0.25, num_views=1, token_keep=0.5, most_epochs=4),
    Recipe(most_cost=2.5, frozen=1 / 12, num_views=1, token_keep=0.5, most_epochs=4),
    Recipe(most_cost=5.0, frozen=1 / 12, num_views=2, token_keep=0.5, most_epochs=8),
    Recipe(most_cost=math.inf, frozen=1 / 12, num_views=4, token_keep=0.5, most_epochs=16),
)
#: Without a budget, runs of more epochs than these get the views of long runs.
_FEW_EPOCHS = 5


@dataclass(frozen=True)
class Choice:
    """What the rule chose.

    Attributes:
        split_point: Number of blocks to freeze, once the head has trained.
        head_epochs: First epochs, in which the head trains alone.
        num_epochs: Epochs to train, those of the head included.
        num_views: Views to store of each image.
        token_keep: Share of the patch tokens that a step sees.
        cost: Predicted cost, in epochs of full fine-tuning.
        reason: Why, in a sentence.
    """

    split_point: int
    head_epochs: int
    num_epochs: int
    num_views: int
    token_keep: float
    cost: float
    reason: str

    def stages(self, num_blocks: int) -> list[tuple[int, int]]:
        """Return (start epoch, split point) of each stage."""
        head = [(0, num_blocks)] if self.head_epochs else []
        return [*head, (self.head_epochs, self.split_point)]


def _before(recipe: Recipe, num_views: int, num_blocks: int, head_epochs: int, cached: bool) -> int:
    """Return the passes that storing views takes, or the epochs of the head without a cache."""
    if not cached:
        return head_epochs * num_blocks
    return num_views * (num_blocks if head_epochs else recipe.split_point(num_blocks))


def _trained(recipe: Recipe, num_epochs: int, num_blocks: int, cached: bool) -> float:
    """Return the passes that epochs behind the split point take."""
    split_point = recipe.split_point(num_blocks)
    return (passes_of_step(num_blocks, split_point, recipe.token_keep) + (0 if cached else split_point)) * num_epochs


def _epochs_for(recipe: Recipe, cost: float, num_blocks: int, head_first: bool, cached: bool) -> int:
    """Return how many epochs behind the split point a cost pays for, with the views stored first."""
    head_epochs = recipe.head_epochs if head_first else 0
    left = passes_of_step(num_blocks, 0) * cost - _before(recipe, recipe.num_views, num_blocks, head_epochs, cached)
    # The tolerance keeps what is paid for exactly: in binary a third of 3 lies below 1.
    return math.floor(left / _trained(recipe, 1, num_blocks, cached) + 1e-9)


def choose(
    num_blocks: int,
    num_epochs: int,
    budget: float | None = None,
    head_first: bool = True,
    num_views: int | None = None,
    token_keep: float | None = None,
    *,
    cached: bool = True,
) -> Choice:
    """Choose how to train a model.

    Args:
        num_blocks: Blocks of the model.
        num_epochs: Epochs of full fine-tuning that the user asks for.
        budget: What the run may cost, as a share of that of ``num_epochs`` epochs of full fine-tuning. The number of epochs is
            then chosen, too. ``None`` trains for ``num_epochs``.
        head_first: Whether there is a head that can train alone.
        num_views: Views to store, if that is settled.
        token_keep: Share of the patch tokens that a step sees, if that is settled.
        cached: Whether frozen blocks run once for each view; else they run in every step.

    Raises:
        ScheduleError: The model has one block only, or the budget does not pay for a single epoch of any recipe.
    """
    if num_blocks < 2:
        raise ScheduleError("schedule='auto' freezes some of several blocks, but the model has one. Give a schedule.")
    whole = passes_of_step(num_blocks, 0)
    recipes = [
        replace(
            recipe,
            num_views=recipe.num_views if num_views is None else num_views,
            token_keep=recipe.token_keep if token_keep is None else token_keep,
        )
        for recipe in RECIPES
    ]
    if budget is None:
        few = num_epochs <= _FEW_EPOCHS
        recipe = recipes[-2] if few else recipes[-1]
        head_epochs = min(recipe.head_epochs, num_epochs // 2) if head_first else 0
        epochs = num_epochs - head_epochs
        reason = f"schedule='auto' keeps the {num_epochs} epoch{'s' if num_epochs > 1 else ''} asked for"
    else:
        cost = budget * num_epochs
        # Gentler recipes may not pay for an epoch beside their views: a harder one then does.
        fitting = [recipe for recipe in recipes if _epochs_for(recipe, cost, num_blocks, head_first, cached) >= 1]
        if not fitting:
            hardest = recipes[0]
            first = hardest.head_epochs if head_first else 0
            least = _before(hardest, hardest.num_views, num_blocks, first, cached) + _trained(
                hardest, 1, num_blocks, cached
            )
            least /= whole
            raise ScheduleError(
                f"budget={budget:g} of {num_epochs} epochs is {cost:.3g} epochs of full fine-tuning, but one epoch behind "
                f"{hardest.split_point(num_blocks)} frozen blocks takes {least:.3g}, caching included. Set budget to at least "
                f"{math.ceil(1000 * least / num_epochs) / 1000:g}."
            )
        recipe = next((recipe for recipe in fitting if cost <= recipe.most_cost), fitting[-1])
        head_epochs = recipe.head_epochs if head_first else 0
        epochs = min(_epochs_for(recipe, cost, num_blocks, head_first, cached), max(recipe.most_epochs, num_epochs))
        reason = f"schedule='auto' may spend {cost:.3g} epochs of full fine-tuning (budget={budget:g} of {num_epochs})"
    views = min(recipe.num_views, epochs) if num_views is None else num_views
    passes = _before(recipe, views, num_blocks, head_epochs, cached) + _trained(recipe, epochs, num_blocks, cached)
    return Choice(
        split_point=recipe.split_point(num_blocks),
        head_epochs=head_epochs,
        num_epochs=head_epochs + epochs,
        num_views=views,
        token_keep=recipe.token_keep,
        cost=passes / whole,
        reason=reason,
    )
