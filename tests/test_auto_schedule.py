"""The rule of ``schedule="auto"``: within the budget, gentler for more, and told where nothing fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_freezecache.auto_schedule import RECIPES, choose
from hf_freezecache.errors import ScheduleError


@given(
    num_blocks=st.integers(2, 48),
    num_epochs=st.integers(1, 300),
    budget=st.floats(0.01, 1.0),
)
def test_a_choice_fits_its_budget_and_the_model(num_blocks: int, num_epochs: int, budget: float) -> None:
    try:
        choice = choose(num_blocks, num_epochs, budget)
    except ScheduleError:  # the next test reads it
        return
    assert choice.cost <= budget * num_epochs * (1 + 1e-6)
    assert 1 <= choice.split_point < num_blocks
    assert choice.num_epochs >= 1
    assert 1 <= choice.num_views <= choice.num_epochs
    assert 0 < choice.token_keep <= 1
    assert choice == choose(num_blocks, num_epochs, budget)


def test_the_least_budget_that_is_named_is_enough() -> None:
    with pytest.raises(ScheduleError, match=r"Set budget to at least 0\.389") as error:
        choose(12, 1, 0.05)
    assert "0.05 epochs of full fine-tuning" in str(error.value)
    assert choose(12, 1, 0.389).split_point == 11


def test_more_money_freezes_less() -> None:
    points = [choose(12, 8, budget / 100).split_point for budget in range(10, 101)]
    assert points == sorted(points, reverse=True)
    assert (points[0], points[-1]) == (11, 6)


def test_without_a_budget_the_epochs_stay() -> None:
    for epochs in (1, 3, 5, 6, 30):
        choice = choose(12, epochs)
        assert choice.num_epochs == epochs
        assert choice.num_views <= epochs
        assert choice.cost < epochs


def test_the_rule_is_in_order() -> None:
    assert [recipe.most_cost for recipe in RECIPES] == sorted({recipe.most_cost for recipe in RECIPES})
    shares = [recipe.frozen for recipe in RECIPES]
    assert shares == sorted(shares, reverse=True)


def test_a_model_of_one_block_has_nothing_to_freeze() -> None:
    with pytest.raises(ScheduleError, match="the model has one"):
        choose(1, 3)
