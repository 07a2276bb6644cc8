"""``schedule="auto"``: how many blocks to freeze, how many views to store and how many epochs to train, for a budget.

The head trains first, alone, from the output of the last block: that costs a forward pass and gives the blocks a head that tells
them something. Then blocks train: where the cost pays for it, queries, keys and values of all blocks; else all weights of the blocks behind a
split point. Costs are counted in epochs of full fine-tuning, by passes through blocks, see ``passes``: one such epoch of a model of ``n``
blocks takes ``3 n`` per image. A cache of ``V`` views takes ``n V``, or ``k V`` where the head does not train first, and ``E`` epochs behind
``k`` blocks, on a share ``t`` of the patch tokens, take ``3 (n - k) t E``. Where a share ``s`` of the weights trains, 3 gives way to
``2 + s``: queries, keys and values are a quarter.

Where adapters train in place of the blocks' weights, as with LoRA, an epoch without freezing takes ``2 n``, and costs are counted in
these. The head does not train first there: adapters begin as nothing, and disturb what the blocks know but slowly.

The rule is a table, ``RECIPES`` or ``ADAPTER_RECIPES``: how many epochs, or steps, the blocks should train at least for a cost. As few
blocks are frozen as such a run can pay for, and what is left pays for more tokens. The rule depends on nothing but its arguments, so a
resumed run and all processes choose the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .auto_recipes import ADAPTER_RECIPES, RECIPES, Recipe, longer_head, plain_epochs
from .errors import ScheduleError
from .passes import passes_of_step

__all__ = ["Choice", "choose", "counted_epochs"]


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
        qkv_only: Whether queries, keys and values train alone of the blocks.
        few_rows: Whether the head sees ``few_rows`` of the rows.
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
    qkv_only: bool = False
    few_rows: bool = False

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
        trained_share: Share of the weights of a block that a step trains.
        head_rows: Share of the rows that pass through the blocks for the head alone.
        cached_head: Whether they do so once; else in each of its epochs.
        freezes: Whether blocks are frozen once the head has trained.
    """

    recipe: Recipe
    num_blocks: int
    head_epochs: int
    cached: bool
    trained_share: float
    head_rows: float
    cached_head: bool
    freezes: bool = True

    def all_blocks(self, trained_share: float, token_keep: float, head_rows: float) -> _Costs:
        """Return the costs of training such a share of all blocks, once the head has trained, on such a share of the patch tokens."""
        recipe = replace(self.recipe, num_views=1, token_keep=token_keep)
        return replace(self, recipe=recipe, trained_share=trained_share, head_rows=head_rows, freezes=False)

    def trained(self, split_point: int, num_epochs: float, token_keep: float) -> float:
        """Return the cost of the blocks behind a split point alone."""
        return passes_of_step(self.num_blocks, split_point, token_keep, self.trained_share) * num_epochs

    def of(self, split_point: int, num_epochs: float, num_views: int | None = None) -> float:
        """Return the cost of so many epochs behind a split point."""
        views = self.recipe.num_views if num_views is None else num_views
        trained = self.trained(split_point, num_epochs, self.recipe.token_keep)
        if not self.cached:
            return self.head_epochs * self.num_blocks + trained + split_point * num_epochs
        if not (self.head_epochs and self.cached_head):
            return self.head_epochs * self.num_blocks + views * split_point + trained
        return views * (split_point + self.head_rows * (self.num_blocks - split_point)) + trained

    def keep_paid(self, passes: float, split_point: int, num_epochs: float) -> float:
        """Return the share of the patch tokens, in hundredths, that so many passes pay for in the epochs behind a split point."""
        none, whole = (self.trained(split_point, num_epochs, keep) for keep in (0.0, 1.0))
        return min(math.floor(100 * (passes - none) / (whole - none)) / 100, 1.0)

    def paid(self, passes: float, split_point: int, epoch_steps: float | None = None) -> float:
        """Return how many epochs behind a split point a cost pays for: whole ones, and whole steps of the last if those are known."""
        epoch = self.of(split_point, 1) - self.of(split_point, 0)
        return _whole_steps(max(passes - self.of(split_point, 0), 0.0) / epoch, epoch_steps)

    def fitting(self, passes: float, num_epochs: float, epoch_steps: float | None) -> tuple[int, float] | None:
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
            paid = [(point, self.paid(most, point, epoch_steps)) for point in range(first, self.num_blocks)]
            few = [pair for pair in paid if pair[0] <= max(1, self.recipe.most_frozen * self.num_blocks)]
            enough, an_epoch = self.recipe.least_steps / epoch_steps, 1
            tried = (few, enough), (few[-1:], an_epoch), (paid, enough), (paid, an_epoch)
            found = (pair for pairs, wanted in tried for pair in pairs if pair[1] >= wanted - 1e-9)
            chosen = next(found, None)
            return None if chosen is None else (chosen[0], _whole_steps(min(chosen[1], most_epochs), epoch_steps))
        if not self.freezes:
            assert self.recipe.qkv_epochs is not None
            epochs = _whole_steps(min(self.paid(most, 0, epoch_steps), most_epochs), epoch_steps)
            return (0, epochs) if epochs >= self.recipe.qkv_epochs else None
        whole = math.floor(min(self.paid(most, 1), most_epochs))
        if whole >= least:
            return 1, whole
        pairs = ((point, count) for count in range(least, 0, -1) for point in range(1, self.num_blocks))
        return next((pair for pair in pairs if self.of(*pair) <= most), None)


def _whole_steps(epochs: float, epoch_steps: float | None) -> float:
    """Return epochs, as images count, without what makes no whole optimizer step at their end; whole epochs if steps are not known."""
    whole = math.floor(epochs + 1e-9)
    part = max(epochs - whole, 0.0)
    return whole + (math.floor(part * epoch_steps + 1e-9) / epoch_steps if epoch_steps else 0.0)


def _as_trainer_counts(epochs: float, epoch_steps: float | None) -> float:
    """Return epochs, as images count, in the way ``Trainer`` does: as steps, of which the last of an epoch may have fewer images.

    ``Trainer`` rounds steps up: a number a little below them gives them, whatever is exact in binary.
    """
    whole = math.floor(epochs + 1e-9)
    steps = round(max(epochs - whole, 0.0) * epoch_steps) if epoch_steps else 0
    return whole + (round((steps - 0.01) / math.ceil(epoch_steps), 7) if epoch_steps and steps else 0.0)


def counted_epochs(number: float, words: str) -> str:
    """Return ``1.5 epochs of full fine-tuning``, ``1 epoch of full fine-tuning``; ``words`` begin with ``epochs``."""
    return f"{number:.3g} {words if f'{number:.3g}' != '1' else words.replace('epochs', 'epoch', 1)}"


def choose(
    num_blocks: int,
    num_epochs: float,
    budget: float | None = None,
    head_first: bool = True,
    num_views: int | None = None,
    token_keep: float | None = None,
    *,
    cached: bool = True,
    more_epochs: bool = False,
    adapters: bool = False,
    epoch_steps: float | None = None,
    head_steps: float | None = None,
    qkv_share: float | None = None,
    unfrozen_keep: float = 1.0,
    trained_share: float = 1.0,
    cached_head: bool = True,
    head_rows: float | None = None,
    few_rows: float = 1.0,
) -> Choice:
    """Choose how to train a model.

    Args:
        num_blocks: Blocks of the model.
        num_epochs: Epochs without freezing that the user asks for; the last may be a part of one.
        budget: What the run may cost, as a share of that of ``num_epochs`` epochs without freezing. The number of epochs is
            then chosen, too. ``None`` trains blocks for ``num_epochs``.
        head_first: Whether there is a head that can train alone.
        num_views: Views to store, if that is settled.
        token_keep: Share of the patch tokens that a step sees, if that is settled.
        cached: Whether frozen blocks run once for each view; else they run in every step.
        more_epochs: Whether, without a budget, the epochs of the head come on top of ``num_epochs``; else they are among them.
        adapters: Whether adapters train in place of the blocks' weights.
        epoch_steps: Images of an epoch over those of an optimizer step, if known; then the last epoch may be a part, of whole steps, where
            adapters train, or queries, keys and values alone.
        head_steps: Optimizer steps for which the head of a short run should train, if known.
        qkv_share: Share of the blocks' weights that makes queries, keys and values, if these may train alone. They do where the budget
            pays for it, or, without one, where that costs no more than ``num_epochs`` epochs without freezing, and not if several views or
            ``token_keep`` are settled.
        unfrozen_keep: Share of the patch tokens that a step sees then.
        trained_share: Share of their own weights that blocks train where some are frozen.
        cached_head: Whether the head may train from a cache of the last block's output, where there are caches.
        head_rows: Share of the rows that epochs of the head see, if that is settled.
        few_rows: The same where it is not, and queries, keys and values train alone: frozen blocks would see the other rows all the same.

    Raises:
        ScheduleError: The model has one block only, or the budget does not pay for a single epoch of any recipe.
    """
    if num_blocks < 2:
        raise ScheduleError("schedule='auto' freezes some of several blocks, but the model has one. Give a schedule.")
    recipes, epoch_words = RECIPES, "epochs of full fine-tuning"
    if adapters:
        recipes, trained_share, epoch_words = ADAPTER_RECIPES, 0.0, "epochs of all adapters"
    whole = passes_of_step(num_blocks, 0, trained_share=0.0 if adapters else 1.0)
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
            trained_share,
            head_rows or 1.0,
            cached_head,
        )
        for recipe in recipes
    ]

    def of_all_blocks(one: _Costs) -> _Costs | None:
        """Return what it costs to train queries, keys and values of all blocks in place of all weights of some, if that may be."""
        settled = num_views not in (None, 0, 1) or token_keep is not None
        if settled or not one.head_epochs or qkv_share is None or one.recipe.qkv_epochs is None:
            return None
        short = one.recipe.few_rows and cached and cached_head
        costs = one.all_blocks(qkv_share, unfrozen_keep, few_rows if short and head_rows is None else one.head_rows)
        return replace(costs, head_epochs=longer_head(one.head_epochs, head_steps, epoch_steps)) if short else costs

    if budget is None:
        head_epochs = head_epochs if more_epochs else min(head_epochs, int(num_epochs // 2))
        chosen = replace(costs[-2 if num_epochs <= _FEW_EPOCHS else -1], head_epochs=head_epochs)
        split_point, epochs = 1, float(num_epochs if more_epochs else num_epochs - head_epochs)
        all_blocks = of_all_blocks(chosen)
        # No dearer than what was asked for.
        if all_blocks is not None and all_blocks.of(0, epochs) <= num_epochs * whole:
            chosen, split_point = all_blocks, 0
        reason = f"schedule='auto' keeps the {num_epochs:g} epoch{'' if num_epochs == 1 else 's'} asked for"
    else:
        cost = budget * num_epochs
        # Where views of a recipe leave no epoch to pay for, those of a cheaper one may.
        affordable = [each for each in costs if each.recipe.most_cost < cost]
        candidates = [costs[len(affordable)], *reversed(affordable)]
        if (all_blocks := of_all_blocks(candidates[0])) is not None:
            candidates.insert(0, all_blocks)
        found = ((each, each.fitting(cost * whole, num_epochs, epoch_steps)) for each in candidates)
        chosen, pair = next((both for both in found if both[1] is not None), (costs[0], None))
        if pair is None:
            points = range(1, num_blocks)
            runs = [(chosen.of(point, 1) / whole, f"one epoch behind {point} frozen blocks") for point in points]
            if all_blocks is not None and epoch_steps:
                few = math.ceil(candidates[0].recipe.qkv_epochs * epoch_steps) / epoch_steps  # type: ignore[operator]
                runs.append((all_blocks.of(0, few) / whole, f"{few:.2g} epochs of all blocks"))
            least, run = min(runs)
            least_budget = math.ceil(1000 * least / num_epochs) / 1000
            advice = f"budget to at least {least_budget:g}"
            if least_budget > 1:  # even all that was asked for does not pay
                advice = f"num_train_epochs to at least {math.ceil(100 * least / budget) / 100:g}"
            raise ScheduleError(
                f"budget={budget:g} of {num_epochs:g} is {counted_epochs(cost, epoch_words)}, but {run} takes {least:.3g}, caching "
                f"included. Set {advice}."
            )
        split_point, epochs = pair
        reason = f"schedule='auto' may spend {counted_epochs(cost, epoch_words)} (budget={budget:g} of {num_epochs:g})"
    views = min(chosen.recipe.num_views, math.ceil(epochs)) if num_views is None else num_views
    keep, total = chosen.recipe.token_keep, chosen.of(split_point, epochs, views)
    if budget is not None and token_keep is None and chosen.freezes:
        left = budget * num_epochs * whole - total + chosen.trained(split_point, epochs, keep)
        keep = max(keep, chosen.keep_paid(left, split_point, epochs))
        total += chosen.trained(split_point, epochs, keep) - chosen.trained(
            split_point, epochs, chosen.recipe.token_keep
        )
    # Without a budget they are the user's.
    counted = epochs if budget is None else _as_trainer_counts(epochs, epoch_steps)
    return Choice(
        split_point=split_point,
        head_epochs=chosen.head_epochs,
        num_epochs=chosen.head_epochs + counted,
        num_views=views,
        token_keep=keep,
        cost=total / whole,
        reason=reason,
        epoch_words=epoch_words,
        plain_epochs=0 if split_point else plain_epochs(counted),
        qkv_only=not chosen.freezes,
        few_rows=head_rows is None and chosen.head_rows < 1,
    )
