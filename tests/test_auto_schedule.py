"""The rule of ``schedule="auto"``: within the budget, gentler for more, and told where nothing fits."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_freezecache.auto_recipes import RECIPES, views_for
from hf_freezecache.auto_schedule import choose
from hf_freezecache.errors import ScheduleError


@given(
    num_blocks=st.integers(2, 48),
    num_epochs=st.integers(1, 300),
    budget=st.floats(0.01, 1.0),
    head_first=st.booleans(),
    num_views=st.none() | st.integers(1, 8),
    token_keep=st.none() | st.floats(0.1, 1.0),
    cached=st.booleans(),
    adapters=st.booleans(),
    epoch_steps=st.none() | st.just(0.0) | st.floats(0.5, 10_000),
    head_steps=st.none() | st.floats(0.1, 10_000),
    qkv_share=st.none() | st.floats(0.05, 0.5),
    unfrozen_keep=st.just(1.0) | st.floats(0.1, 1.0),
    trained_share=st.just(1.0) | st.floats(0.05, 1.0),
    cached_head=st.booleans(),
    head_rows=st.none() | st.floats(0.05, 1.0),
    few_rows=st.floats(0.05, 1.0),
)
def test_a_choice_fits_its_budget_and_the_model(
    num_blocks,
    num_epochs,
    budget,
    head_first,
    num_views,
    token_keep,
    cached,
    adapters,
    epoch_steps,
    head_steps,
    qkv_share,
    unfrozen_keep,
    trained_share,
    cached_head,
    head_rows,
    few_rows,
) -> None:
    arguments = (num_blocks, num_epochs, budget, head_first, num_views, token_keep)
    settings = {"cached": cached, "adapters": adapters, "epoch_steps": epoch_steps}
    settings |= {"unfrozen_keep": unfrozen_keep, "trained_share": trained_share, "cached_head": cached_head}
    settings |= {"head_rows": head_rows, "few_rows": few_rows, "head_steps": head_steps}
    settings["qkv_share"] = qkv_share = None if adapters else qkv_share
    try:
        choice = choose(*arguments, **settings)
    except ScheduleError:  # the next test reads it
        return
    assert choice.cost <= budget * num_epochs * (1 + 1e-6)
    # Adapters may train in all blocks, if that leaves steps enough.
    may_be_none = adapters and epoch_steps and choice.token_keep == 1
    if choice.qkv_only:
        assert qkv_share is not None
        assert (choice.split_point, choice.num_views, choice.token_keep) == (0, 1, unfrozen_keep)
        assert 0 < choice.plain_epochs <= math.ceil(choice.num_epochs - choice.head_epochs)
    assert (0 if may_be_none or choice.qkv_only else 1) <= choice.split_point < num_blocks
    assert choice.num_epochs > choice.head_epochs >= 0
    assert bool(choice.head_epochs) == (head_first and not adapters)
    assert choice.num_views == num_views or (
        num_views is None and 1 <= choice.num_views <= math.ceil(choice.num_epochs)
    )
    assert choice.token_keep == token_keep or (token_keep is None and 0 < choice.token_keep <= 1)
    assert not (choice.qkv_only and token_keep)
    assert choice == choose(*arguments, **settings)
    # By hand: views of the rows that a head sees through all blocks, of all rows to the split point, then steps on a part of the tokens.
    part = choice.head_epochs and (few_rows if choice.few_rows else head_rows or 1)
    short = budget * num_epochs <= RECIPES[0].most_cost
    assert not choice.few_rows or (choice.qkv_only and cached and cached_head and head_rows is None and short)
    deepest = part * num_blocks + (1 - part) * choice.split_point
    # Adapters need no gradients of the blocks' weights.
    step = 2 + (0 if adapters else qkv_share if choice.qkv_only else trained_share)
    whole = int(choice.split_point == 0)  # the first block sees all tokens
    seen = whole + (num_blocks - choice.split_point - whole) * choice.token_keep
    epochs = choice.num_epochs - choice.head_epochs
    if epoch_steps:  # the last may be a part of one, of whole steps
        last = math.ceil(epochs % 1 * math.ceil(epoch_steps)) / epoch_steps
        epochs = math.floor(epochs) + last
    steps = step * seen * epochs
    frozen = choice.num_views * deepest
    if choice.head_epochs and not cached_head:
        frozen = choice.head_epochs * num_blocks + choice.num_views * choice.split_point
    if not cached:  # in every step
        frozen = choice.head_epochs * num_blocks + epochs * choice.split_point
    assert choice.cost == pytest.approx((frozen + steps) / ((2 if adapters else 3) * num_blocks))
    assert [point for _, point in choice.stages(num_blocks)][-1] == choice.split_point


def test_adapters_get_enough_steps_first_and_then_as_many_blocks_as_are_paid_for() -> None:
    def chosen(epoch_steps: float, budget: float = 0.5) -> tuple[int, float]:
        choice = choose(12, 3, budget, adapters=True, epoch_steps=epoch_steps)
        assert choice.head_epochs == 0
        assert choice.token_keep == 1
        return choice.split_point, choice.num_epochs

    for epoch_steps in (5, 20, 30, 50, 1000):
        split_point, epochs = chosen(epoch_steps)
        assert epochs * epoch_steps >= 60 or split_point == 4  # no more than a third of the blocks is frozen for that
        # One block less would give too few steps: by hand, 2 passes a step and one to build.
        assert split_point == 0 or (36 - (split_point - 1)) / (2 * (12 - (split_point - 1))) * epoch_steps < 60
    assert chosen(1000) == (0, pytest.approx(1.5, abs=1e-4))
    assert chosen(1000, 0.1)[1] < 1  # a part of an epoch has steps enough
    # Unless an epoch is not paid for otherwise.
    assert chosen(20, 0.2)[0] == 10
    assert chosen(20, 0.2)[1] >= 1


@pytest.mark.parametrize("head_first", [True, False])
def test_the_least_budget_that_is_named_is_enough(head_first) -> None:
    with pytest.raises(ScheduleError, match=r"0\.05 epochs of full fine-tuning.*Set budget to at least") as error:
        choose(12, 1, 0.05, head_first)
    least = float(re.search(r"at least ([0-9.]+)\.", str(error.value))[1])
    assert choose(12, 1, least, head_first).num_epochs >= 1
    with pytest.raises(ScheduleError):
        choose(12, 1, least - 0.002, head_first)
    # A budget is 1 at most: then more epochs are to be asked for.
    with pytest.raises(ScheduleError, match=r"Set num_train_epochs to at least") as error:
        choose(12, 0.1, 0.8, head_first)
    epochs = float(re.search(r"at least ([0-9.]+)\.", str(error.value))[1])
    assert choose(12, epochs, 0.8, head_first).num_epochs >= 1
    with pytest.raises(ScheduleError):
        choose(12, epochs - 0.02, 0.8, head_first)


def test_a_head_of_a_short_run_trains_for_enough_steps() -> None:
    """They pass through no block, if the head has a cache."""

    def head_epochs(cost: float, epoch_steps: float | None, **settings) -> int:
        settings = {"few_rows": 0.15, "head_steps": 100, **settings}
        return choose(12, cost, 1.0, qkv_share=0.25, epoch_steps=epoch_steps, **settings).head_epochs

    assert [head_epochs(0.8, steps) for steps in (1, 23, 28, 39, 47, 500, None)] == [4, 4, 4, 3, 2, 2, 2]
    assert [head_epochs(0.8, 23, head_steps=steps) for steps in (40, 60, 1e9, None)] == [2, 3, 4, 2]
    assert head_epochs(2, 23) == head_epochs(1, 23, cached=False) == head_epochs(1, 23, cached_head=False) == 2
    assert head_epochs(0.8, 28, head_rows=0.5) == 4
    assert head_epochs(0.8, 28, token_keep=0.5) == 2
    assert choose(12, 0.8, 1.0, head_first=False, qkv_share=0.25, epoch_steps=28).head_epochs == 0
    paid = {
        choose(12, 0.8, 1.0, qkv_share=0.25, few_rows=0.15, epoch_steps=25, head_steps=steps).cost
        for steps in (25, 100)
    }
    assert len(paid) == 1


def test_a_part_of_an_epoch_may_be_the_least_that_is_paid_for() -> None:
    settings = {"qkv_share": 0.25, "few_rows": 0.15, "epoch_steps": 35}
    words = r"but 0\.11 epochs of all blocks takes 0\.136, caching included\. Set budget to at least"
    with pytest.raises(ScheduleError, match=words) as error:
        choose(12, 1, 0.05, **settings)
    least = float(re.search(r"at least ([0-9.]+)\.", str(error.value))[1])
    choice = choose(12, 1, least, **settings)
    # By hand: four of 35 steps, and 0.15 of the rows once through all blocks.
    assert (choice.qkv_only, choice.cost) == (True, pytest.approx(0.15 / 3 + 4 / 35 * 2.25 / 3))
    with pytest.raises(ScheduleError):
        choose(12, 1, least - 0.002, **settings)


def test_more_money_trains_more() -> None:
    choices = [choose(12, 8, budget / 100, num_views=1) for budget in range(10, 101)]
    trained = [(12 - choice.split_point) * (choice.num_epochs - choice.head_epochs) for choice in choices]
    assert trained == sorted(trained)
    assert choices[0].split_point > choices[-1].split_point == 1
    # A budget is used up as far as whole blocks and epochs go, and then tokens.
    assert all(choice.cost > 0.98 * 8 * budget / 100 for budget, choice in zip(range(10, 101), choices, strict=True))


def test_queries_keys_and_values_of_all_blocks_train_where_that_is_paid_for() -> None:
    for cost, steps, plain in ((1, 30.0, 1), (2, 30.0, 3), (4, 30.0, 2), (5, None, 2), (8, 30.0, 5)):
        choice = choose(12, cost, 1.0, qkv_share=0.25, epoch_steps=steps)
        assert choice.stages(12) == [(0, 12), (2, 0)]
        assert choice.qkv_only
        assert (choice.num_views, choice.token_keep) == (1, 1)
        # By hand: a third of an epoch for the head, then 2.25 passes for 3.
        paid = (cost - 1 / 3) / 0.75
        assert choice.num_epochs - 2 == pytest.approx(int(paid * steps) / steps if steps else int(paid), abs=1e-3)
        assert choice.plain_epochs == plain
        # What the user has settled speaks against it.
        for settings in ({"num_views": 2}, {"token_keep": 0.5}, {"head_first": False}):
            assert choose(12, cost, 1.0, qkv_share=0.25, **settings) == choose(12, cost, 1.0, **settings)
    for cost in (0.6, 0.9):  # too little for that
        assert choose(12, 10, cost / 10, qkv_share=0.25) == choose(12, 10, cost / 10)
    assert choose(12, 16, 1.0, qkv_share=0.25).num_epochs == 18  # further ones gain nothing


def test_and_without_a_budget_where_the_epochs_asked_for_cost_no_more_than_those_of_full_fine_tuning() -> None:
    for epochs in (2, 4, 8, 30):
        choice = choose(12, epochs, qkv_share=0.25, more_epochs=True)
        assert choice.qkv_only
        assert choice.num_epochs == 2 + epochs
        assert choice.cost == pytest.approx(1 / 3 + 0.75 * epochs)
    # Where no cache is read, the head's epochs take a forward pass each.
    for epochs, cached in ((1, True), (2, False)):
        settings = {"cached": cached, "more_epochs": True}
        assert choose(12, epochs, qkv_share=0.25, **settings) == choose(12, epochs, **settings)
        assert choose(12, epochs + 1, qkv_share=0.25, **settings).qkv_only


def test_a_part_of_an_epoch_is_so_many_steps_as_trainer_counts_them() -> None:
    """``Trainer`` rounds up what epochs make of the steps of one: no step may come of what is not exact in binary."""
    for per_epoch in (2, 3, 7, 25, 31, 50, 125, 1000, 12345):
        for cost in (1.7, 2.3, 3.1, 5.3, 6.1):
            epochs = choose(12, cost, 1.0, qkv_share=0.25, epoch_steps=per_epoch).num_epochs
            # By hand: a third of an epoch for the head, then 2.25 passes for 3.
            paid = 2 * per_epoch + math.floor((cost - 1 / 3) / 0.75 * per_epoch + 1e-6)
            assert math.ceil(epochs * per_epoch) == paid, (per_epoch, cost)


def test_without_a_budget_the_epochs_stay() -> None:
    for epochs in (1, 2, 3, 5, 6, 30):
        choice = choose(12, epochs)
        assert choice.num_epochs == epochs
        assert choice.num_views <= epochs
        assert choice.cost < epochs
        assert len(choice.stages(12)) == (1 if epochs == 1 else 2)


def test_epochs_of_the_head_come_on_top_where_they_may() -> None:
    for epochs in (1, 2, 6, 30):
        choice = choose(12, epochs, more_epochs=True)
        assert choice.num_epochs == epochs + choice.head_epochs
        assert choice.head_epochs == 2
        assert choice.stages(12) == [(0, 12), (2, 1)]
        assert choose(12, epochs, head_first=False, more_epochs=True).num_epochs == epochs


def test_the_rule_is_in_order() -> None:
    assert [recipe.most_cost for recipe in RECIPES] == sorted({recipe.most_cost for recipe in RECIPES})
    assert RECIPES[-1].most_cost == float("inf")
    for name in ("least_epochs", "num_views"):
        numbers = [getattr(recipe, name) for recipe in RECIPES]
        assert numbers == sorted(numbers)
    assert len({recipe.head_epochs for recipe in RECIPES}) == 1


def test_few_views_for_few_epochs() -> None:
    """One rule: the epochs and views are those of the recipes."""
    assert [views_for(epochs) for epochs in (0, 1, 3, 4, 7, 8, 16, 100)] == [1, 1, 1, 2, 2, 4, 4, 4]
    assert all(views_for(recipe.least_epochs) == recipe.num_views for recipe in RECIPES)


def test_a_model_of_one_block_has_nothing_to_freeze() -> None:
    with pytest.raises(ScheduleError, match="the model has one"):
        choose(1, 3)


def test_one_epoch_is_one_epoch() -> None:
    assert choose(4, 2, 0.5).reason.startswith("schedule='auto' may spend 1 epoch of full fine-tuning (")
    assert choose(4, 3, 0.5).reason.startswith("schedule='auto' may spend 1.5 epochs of full fine-tuning (")


def test_what_is_seen_of_plain_images_hardly_jumps() -> None:
    """The last epoch may be a part of one: plain is what is seen, not what begins."""
    for budget in range(20, 100):
        choice = choose(12, 5, budget / 100, qkv_share=0.25, epoch_steps=40)
        if not choice.qkv_only:
            continue
        trained = choice.num_epochs - choice.head_epochs
        seen = choice.plain_epochs - (math.ceil(trained) - trained)
        assert seen == pytest.approx(trained if trained < 3 else 0.4 * trained, abs=0.51)
