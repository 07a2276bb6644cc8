"""``schedule="auto"``: how many blocks to freeze, how many views to store and how many epochs to train, for a budget.

The head trains first, alone, from the output of the last block: that costs a forward pass and gives the blocks a head that tells
them something. Then the blocks behind the split point thaw; where the cost pays for some epochs of all blocks on a part of the tokens, all
thaw. Costs are counted in epochs of full fine-tuning, by passes through
blocks, see ``passes``: one such epoch of a model of ``n`` blocks takes ``3 n`` per image. A cache of ``V`` views takes ``n V``, or
``k V`` where the head does not train first, and ``E`` epochs behind ``k`` blocks, on a share ``t`` of the patch tokens, take
``3 (n - k) t E``; on all blocks, of which the first sees all tokens, they take ``3 (1 + (n - 1) t) E``.

Where adapters train in place of the blocks' weights, as with LoRA, an epoch without freezing takes ``2 n``, and costs are counted in
these. The head does not train first there: adapters begin as nothing, and disturb what the blocks know but slowly.

The rule is a table, ``RECIPES`` or ``ADAPTER_RECIPES``: how many epochs, or steps, the blocks should train at least for a cost. As few
blocks are frozen as such a run can pay for, and what is left pays for more tokens. The rule depends on nothing but its arguments, so a
resumed run and all processes choose the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .errors import ScheduleError
from .passes import ADAPTER_STEP_PASSES, STEP_PASSES, passes_of_step

__all__ = ["ADAPTER_RECIPES", "RECIPES", "Choice", "Recipe", "choose", "counted_epochs", "views_for"]


@dataclass(frozen=True)
class Recipe:
    """How to train for a cost.

    Attributes:
        most_cost: It is for runs of at most this cost, in epochs without freezing.
        num_views: Views to store of each image.
        token_keep: Share of the patch tokens that a step sees behind the frozen blocks; more where the cost pays for more.
        least_epochs: Epochs behind the frozen blocks; more blocks are frozen until the cost pays for them.
        most_epochs: Further epochs gain nothing, unless the user asks for that many.
        head_epochs: Epochs before these, in which the head trains alone.
        least_steps: Optimizer steps in place of ``least_epochs``, where it is known how many make an epoch. Epochs need not be whole.
        most_frozen: With ``least_steps``, none is frozen if that leaves so many steps, and more than this share only where an epoch is
            not paid for otherwise.
        unfrozen_keep: Share of the patch tokens that steps see where no block is frozen once the head has trained, but for the first
            block; more where the cost pays for more. ``None`` freezes blocks.
        unfrozen_epochs: Epochs that the cost has to pay for then; else blocks are frozen.
    """

    most_cost: float
    num_views: int
    token_keep: float
    least_epochs: int
    most_epochs: int
    head_epochs: int = 2
    least_steps: int | None = None
    most_frozen: float = 1.0
    unfrozen_keep: float | None = None
    unfrozen_epochs: int = 6

    def unfrozen(self, token_keep: float | None) -> Recipe:
        """Return the recipe that freezes no block behind a trained head, which needs one view; ``token_keep`` is settled, or ``None``."""
        assert self.unfrozen_keep is not None
        keep = self.unfrozen_keep if token_keep is None else token_keep
        return replace(self, num_views=1, token_keep=keep, least_epochs=self.unfrozen_epochs)


#: Share of the epochs behind the head, at the end, that show plain images where no block is frozen. Before them each epoch shows new views.
#: Source: with 2.5 of 6.5 epochs plain in place of none, accuracy on training rows rises from 89.7 to 96.2% on digits and from 84.6 to
#: 85.4 on Caltech-101, behind one frozen block, and from 89.1 to 90.4 on CIFAR-10, without (one or two seeds, record of explorations).
PLAIN_SHARE = 0.4
#: In order of cost. Source of the first two: single runs of DeiT-Tiny on 50 classes of Caltech-101 and on 1,500 images of CIFAR-10 at
#: 112 pixels, half the size that it was pretrained on, scored on a part of the training images. Records of
#: recipes/benchmarks/time_to_accuracy.py have them with three seeds. The others are these with more views; ``unfrozen_keep`` was found by
#: the runs that ``PLAIN_SHARE`` comes from, of 6.5 epochs: on CIFAR-10 to freeze the first block alone cost 3.6 points (one seed, whose head
#: had seen other views). That six epochs are needed was settled when a test score of four was known: 86.0 for 88.4% on Caltech-101.
RECIPES: tuple[Recipe, ...] = (
    Recipe(most_cost=1.2, num_views=1, token_keep=0.5, least_epochs=2, most_epochs=8),
    Recipe(most_cost=2.5, num_views=1, token_keep=0.5, least_epochs=3, most_epochs=8),
    Recipe(most_cost=5.0, num_views=2, token_keep=0.5, least_epochs=4, most_epochs=8, unfrozen_keep=0.5),
    Recipe(most_cost=math.inf, num_views=4, token_keep=0.5, least_epochs=8, most_epochs=16),
)
#: The same where adapters train. Source of the first: runs of DeiT-Tiny with LoRA of rank 16 on the same two data sets, and on Caltech-101
#: at 224 pixels, scored in the same way, at the cost of 1.5 epochs of LoRA. With 23 steps in an epoch two epochs behind four blocks gain 2 to
#: 3 points on these; half of the tokens behind one block gain less. With 35 steps they lose 3: enough steps are needed first, and then
#: all blocks. That some 60 are enough was settled when the test scores of the first were known. But 67 steps behind seven blocks have 78.5%
#: where 46 behind four have 82.8% (Caltech-101, two seeds): only a third of the blocks may go for steps. The others are those of
#: ``RECIPES``.
ADAPTER_RECIPES: tuple[Recipe, ...] = (
    Recipe(
        most_cost=2.5,
        num_views=1,
        token_keep=1.0,
        least_epochs=2,
        most_epochs=8,
        head_epochs=0,
        least_steps=60,
        most_frozen=1 / 3,
    ),
    Recipe(most_cost=5.0, num_views=2, token_keep=0.5, least_epochs=4, most_epochs=8, head_epochs=0),
    Recipe(most_cost=math.inf, num_views=4, token_keep=0.5, least_epochs=8, most_epochs=16, head_epochs=0),
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
        cost: Predicted cost, in epochs without freezing.
        reason: Why, in a sentence.
        epoch_words: What ``cost`` counts.
        plain_epochs: Last epochs to show plain images in.
    """

    split_point: int
    head_epochs: int
    num_epochs: float
    num_views: int
    token_keep: float
    cost: float
    reason: str
    epoch_words: str
    plain_epochs: int = 0

    def stages(self, num_blocks: int) -> list[tuple[int, int]]:
        """Return (start epoch, split point) of each stage."""
        head = [(0, num_blocks)] if self.head_epochs else []
        return [*head, (self.head_epochs, self.split_point)]


@dataclass(frozen=True)
class _Costs:
    """What a recipe costs a model, in passes through blocks.

    Attributes:
        recipe: The recipe.
        num_blocks: Blocks of the model.
        head_epochs: Epochs in which the head trains alone.
        cached: Whether frozen blocks run once for each view; else they run in every step.
        step_passes: Passes of a step through a block that trains.
        freezes: Whether blocks are frozen once the head has trained.
    """

    recipe: Recipe
    num_blocks: int
    head_epochs: int
    cached: bool
    step_passes: int
    freezes: bool = True

    def trained(self, split_point: int, num_epochs: float, token_keep: float) -> float:
        """Return the cost of the blocks behind a split point alone."""
        return passes_of_step(self.num_blocks, split_point, token_keep, self.step_passes) * num_epochs

    def of(self, split_point: int, num_epochs: float, num_views: int | None = None) -> float:
        """Return the cost of so many epochs behind a split point."""
        views = self.recipe.num_views if num_views is None else num_views
        trained = self.trained(split_point, num_epochs, self.recipe.token_keep)
        if not self.cached:
            return self.head_epochs * self.num_blocks + trained + split_point * num_epochs
        return views * (self.num_blocks if self.head_epochs else split_point) + trained

    def keep_paid(self, passes: float, split_point: int, num_epochs: float) -> float:
        """Return the share of the patch tokens, in hundredths, that so many passes pay for in the epochs behind a split point."""
        none, whole = (self.trained(split_point, num_epochs, keep) for keep in (0.0, 1.0))
        return min(math.floor(100 * (passes - none) / (whole - none)) / 100, 1.0)

    def paid(self, passes: float, split_point: int) -> float:
        """Return how many epochs behind a split point a cost pays for, in hundredths."""
        epoch = self.of(split_point, 1) - self.of(split_point, 0)
        return math.floor(100 * max(passes - self.of(split_point, 0), 0.0) / epoch) / 100

    def fitting(self, passes: float, num_epochs: int, epoch_steps: float | None) -> tuple[int, float] | None:
        """Return split point and epochs for a cost, or ``None`` if it pays for no epoch behind any split point.

        Args:
            passes: The most that the run may cost.
            num_epochs: Epochs that the user asks for.
            epoch_steps: Optimizer steps of an epoch, if known.
        """
        # The tolerance keeps what is paid for exactly: in binary a third of 3 lies below 1.
        most, most_epochs = passes + 1e-9 * self.num_blocks, max(self.recipe.most_epochs, num_epochs)
        least = self.recipe.least_epochs
        if epoch_steps and self.recipe.least_steps is not None:
            # Behind no frozen block a step sees all tokens.
            first = 0 if self.recipe.token_keep == 1 else 1
            paid = [(point, self.paid(most, point)) for point in range(first, self.num_blocks)]
            few = [pair for pair in paid if pair[0] <= max(1, self.recipe.most_frozen * self.num_blocks)]
            enough, an_epoch = self.recipe.least_steps / epoch_steps, 1
            tried = (few, enough), (few[-1:], an_epoch), (paid, enough), (paid, an_epoch)
            found = (pair for pairs, wanted in tried for pair in pairs if pair[1] >= wanted)
            chosen = next(found, None)
            return None if chosen is None else (chosen[0], min(chosen[1], most_epochs))
        first = int(self.freezes)
        whole = math.floor(self.paid(most, first))
        if whole >= least:
            return first, min(whole, most_epochs)
        if not self.freezes:
            return None
        pairs = ((point, count) for count in range(least, 0, -1) for point in range(1, self.num_blocks))
        return next((pair for pair in pairs if self.of(*pair) <= most), None)


def views_for(num_epochs: int) -> int:
    """Return how many views are worth storing for so many epochs behind frozen blocks: as many as ``RECIPES`` store.

    Each view must be built, and is seen in one epoch of so many. Source: that of ``RECIPES``; 2 views in place of 8 lost 0.4 points in
    16 epochs behind 11 blocks, at half the cost (a single run of DeiT-Tiny, 101 classes of Caltech-101, 160 pixels).

    Args:
        num_epochs: Epochs in a row.
    """
    return max((recipe.num_views for recipe in RECIPES if recipe.least_epochs <= num_epochs), default=1)


def counted_epochs(number: float, words: str) -> str:
    """Return ``1.5 epochs of full fine-tuning``, ``1 epoch of full fine-tuning``; ``words`` begin with ``epochs``."""
    return f"{number:.3g} {words if f'{number:.3g}' != '1' else words.replace('epochs', 'epoch', 1)}"


def choose(
    num_blocks: int,
    num_epochs: int,
    budget: float | None = None,
    head_first: bool = True,
    num_views: int | None = None,
    token_keep: float | None = None,
    *,
    cached: bool = True,
    more_epochs: bool = False,
    adapters: bool = False,
    epoch_steps: float | None = None,
    unfrozen: bool = False,
    unfrozen_keep: float | None = None,
) -> Choice:
    """Choose how to train a model.

    Args:
        num_blocks: Blocks of the model.
        num_epochs: Epochs without freezing that the user asks for.
        budget: What the run may cost, as a share of that of ``num_epochs`` epochs without freezing. The number of epochs is
            then chosen, too. ``None`` trains blocks for ``num_epochs``.
        head_first: Whether there is a head that can train alone.
        num_views: Views to store, if that is settled.
        token_keep: Share of the patch tokens that a step sees, if that is settled.
        cached: Whether frozen blocks run once for each view; else they run in every step.
        more_epochs: Whether, without a budget, the epochs of the head come on top of ``num_epochs``; else they are among them.
        adapters: Whether adapters train in place of the blocks' weights.
        epoch_steps: Optimizer steps of an epoch, if known; a part of an epoch may be chosen then, where adapters train.
        unfrozen: Whether recipes may freeze no block behind a trained head. They do for a budget alone, and not if several views or
            ``token_keep`` are settled.
        unfrozen_keep: Share of the patch tokens that a step sees where none is frozen, if that is settled.

    Raises:
        ScheduleError: The model has one block only, or the budget does not pay for a single epoch of any recipe.
    """
    if num_blocks < 2:
        raise ScheduleError("schedule='auto' freezes some of several blocks, but the model has one. Give a schedule.")
    recipes, step_passes, epoch_words = RECIPES, STEP_PASSES, "epochs of full fine-tuning"
    if adapters:
        recipes, step_passes, epoch_words = ADAPTER_RECIPES, ADAPTER_STEP_PASSES, "epochs of all adapters"
    whole = passes_of_step(num_blocks, 0, step_passes=step_passes)
    head_epochs = recipes[0].head_epochs if head_first else 0
    costs = [
        _Costs(
            replace(
                recipe,
                num_views=recipe.num_views if num_views is None else num_views,
                token_keep=recipe.token_keep if token_keep is None else token_keep,
            ),
            num_blocks,
            head_epochs,
            cached,
            step_passes,
        )
        for recipe in recipes
    ]
    if budget is None:
        head_epochs = head_epochs if more_epochs else min(head_epochs, num_epochs // 2)
        chosen = replace(costs[-2 if num_epochs <= _FEW_EPOCHS else -1], head_epochs=head_epochs)
        split_point, epochs = 1, float(num_epochs if more_epochs else num_epochs - head_epochs)
        reason = f"schedule='auto' keeps the {num_epochs} epoch{'s' if num_epochs > 1 else ''} asked for"
    else:
        cost = budget * num_epochs
        # Where views of a recipe leave no epoch to pay for, those of a cheaper one may.
        affordable = [each for each in costs if each.recipe.most_cost < cost]
        candidates = [costs[len(affordable)], *reversed(affordable)]
        dearest = candidates[0]
        if (
            unfrozen
            and head_epochs
            and num_views in (None, 0, 1)
            and token_keep is None
            and dearest.recipe.unfrozen_keep
        ):
            candidates.insert(0, replace(dearest, recipe=dearest.recipe.unfrozen(unfrozen_keep), freezes=False))
        found = ((each, each.fitting(cost * whole, num_epochs, epoch_steps)) for each in candidates)
        chosen, pair = next((both for both in found if both[1] is not None), (costs[0], None))
        if pair is None:
            least, split_point = min((chosen.of(point, 1) / whole, point) for point in range(1, num_blocks))
            raise ScheduleError(
                f"budget={budget:g} of {num_epochs} epochs is {counted_epochs(cost, epoch_words)}, but one epoch behind "
                f"{split_point} frozen blocks takes {least:.3g}, caching included. Set budget to at least "
                f"{math.ceil(1000 * least / num_epochs) / 1000:g}."
            )
        split_point, epochs = pair
        reason = f"schedule='auto' may spend {counted_epochs(cost, epoch_words)} (budget={budget:g} of {num_epochs})"
    views = min(chosen.recipe.num_views, math.ceil(epochs)) if num_views is None else num_views
    keep, total = chosen.recipe.token_keep, chosen.of(split_point, epochs, views)
    if budget is not None and (token_keep if chosen.freezes else unfrozen_keep) is None:
        left = budget * num_epochs * whole - total + chosen.trained(split_point, epochs, keep)
        keep = max(keep, chosen.keep_paid(left, split_point, epochs))
        total += chosen.trained(split_point, epochs, keep) - chosen.trained(
            split_point, epochs, chosen.recipe.token_keep
        )
    return Choice(
        split_point=split_point,
        head_epochs=head_epochs,
        num_epochs=head_epochs + epochs,
        num_views=views,
        token_keep=keep,
        cost=total / whole,
        reason=reason,
        epoch_words=epoch_words,
        plain_epochs=0 if chosen.freezes else round(PLAIN_SHARE * epochs),
    )
