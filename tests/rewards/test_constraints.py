"""Budgets and their multipliers, by hand."""

import numpy as np
import pytest

from orchestra_jax.rewards.constraints import (
    MULTIPLIER_LIMIT,
    Budget,
    excess,
    initial_multipliers,
    updated_multipliers,
)
from orchestra_jax.rewards.objectives import Objective
from orchestra_jax.rewards.preference import reward_components

OBJECTIVES = (Objective("outcome", "maximize", 0.0, 1.0), Objective("cost_usd", "minimize", 0.0, 0.2))
BUDGETS = (Budget("cost_usd", 0.05),)
VECTORS_GM = np.array([[1.0, 0.07], [0.0, 0.11], [1.0, 99.0]])
VALID_G = np.array([True, True, False])


def test_the_multiplier_rises_with_the_mean_excess_and_stays_in_its_range():
    assert initial_multipliers(BUDGETS) == {"cost_usd": 0.0}
    np.testing.assert_allclose(excess(VECTORS_GM, OBJECTIVES, BUDGETS[0])[:2], [0.1, 0.3])

    def updated(start, rate, valid_G=VALID_G):
        return updated_multipliers({"cost_usd": start}, VECTORS_GM, valid_G, OBJECTIVES, BUDGETS, rate)["cost_usd"]

    assert updated(1.0, 0.5) == pytest.approx(1.1)
    assert updated(0.1, -5.0) == 0.0 and updated(1.0, 1e9) == MULTIPLIER_LIMIT
    assert updated(0.3, 0.5, valid_G=np.zeros(3, bool)) == 0.3


def test_the_reward_is_the_outcome_at_a_price_that_wrong_answers_pay_too():
    found = reward_components(
        VECTORS_GM, np.array([0.5, 0.5]), OBJECTIVES, VALID_G, "reference", "constrained", BUDGETS, {"cost_usd": 0.6}
    )
    np.testing.assert_allclose(found.rewards_G, [(1 - 0.06) / 1.6, -0.18 / 1.6, 0.0])


@pytest.mark.parametrize("name", ["outcome", "tokens"])
def test_a_budget_bounds_an_objective_to_minimize(name):
    with pytest.raises(ValueError, match=f"a budget on '{name}'"):
        excess(VECTORS_GM, OBJECTIVES, Budget(name, 0.5))
