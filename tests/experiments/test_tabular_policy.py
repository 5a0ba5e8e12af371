"""Rewards, filters and advantages teach a table; and the trainer of tables does what it says.

Legend: see experiments/tabular_policy.py.
"""

import numpy as np
import pytest

from configs import quickstart
from experiments import tabular_cross
from experiments.tabular_policy import (
    MAX_CALLS,
    NUM_ACTIONS,
    NUM_NODES,
    Play,
    ascend,
    make_world,
    play,
    table_policy,
    token_weights,
    train,
)
from orchestra_jax.evaluation.oracle import STATISTICS, evaluate
from orchestra_jax.evaluation.significance import permutation_p_value
from orchestra_jax.grpo.advantages import ADVANTAGES
from orchestra_jax.grpo.loss import AGGREGATIONS
from orchestra_jax.grpo.scoring import ScoringSettings
from orchestra_jax.settings import scoring_settings

COST_USD = STATISTICS.index("cost_usd")


def test_what_is_played_is_what_the_recursion_takes_the_table_to_be():
    """Means over sampled episodes against exact values, for a table of random numbers."""
    world = make_world(num_per_preference=4)
    charges = world.charges
    logits_INA = np.random.default_rng(1).normal(size=(len(world.instances), NUM_NODES, NUM_ACTIONS))
    exact_IS = evaluate(charges, table_policy(charges, logits_INA))[0]
    played = play(charges, logits_INA, 4000, np.random.default_rng(0))
    outcome_IG, answered_IG = played.values_IGM[..., 0], played.is_answered_IG
    # The recursion counts nothing for an episode that ends without an answer.
    means = {
        "accuracy": outcome_IG,
        "cost_usd": played.values_IGM[..., 1] * answered_IG,
        "latency_s": played.values_IGM[..., 2] * answered_IG,
        "calls/answer": answered_IG,
    }
    for name, values_IG in means.items():
        error_I = values_IG.std(axis=1) / np.sqrt(values_IG.shape[1])
        difference_I = np.abs(values_IG.mean(axis=1) - exact_IS[:, STATISTICS.index(name)])
        assert (difference_I < 4.5 * error_I + 1e-12).all(), name


def test_one_step_raises_what_had_a_good_advantage():
    logits_INA = np.zeros((2, NUM_NODES, NUM_ACTIONS))
    nodes_IGT = np.array([[[0, 5, -1], [0, -1, -1]]] * 2)
    actions_IGT = np.array([[[1, 7, -1], [8, -1, -1]]] * 2)
    played = Play(nodes_IGT, actions_IGT, np.zeros((2, 2, 4)), np.ones((2, 2), bool))
    ascend(logits_INA, played, (1,), np.array([[1.0, -1.0]]), rate=2.0, kl_coefficient=1.0)
    expected_NA = np.zeros((NUM_NODES, NUM_ACTIONS))
    expected_NA[0, 1], expected_NA[0, 8] = 1.0, -1.0  # the uniform parts of both rollouts cancel
    expected_NA[5] = -1 / NUM_ACTIONS
    expected_NA[5, 7] += 1.0
    np.testing.assert_allclose(logits_INA, [np.zeros_like(expected_NA), expected_NA], atol=1e-12)


def test_actions_weigh_what_the_loss_lets_them_weigh():
    """A group with a rollout of one action and one of two, and a group that is not kept."""
    nodes_IGT = np.array([[[0, -1], [0, 3]], [[0, 5], [0, 3]]])
    played = Play(nodes_IGT, nodes_IGT, np.zeros((2, 2, 4)), np.ones((2, 2), bool))
    expected = {
        "token_mean": [[1 / 3, 0], [1 / 3, 1 / 3]],
        "sequence_mean": [[1 / 2, 0], [1 / 2, 1 / 2]],
        "rollout_mean": [[1 / 2, 0], [1 / 4, 1 / 4]],
        "constant": [[1 / 4, 0], [1 / 4, 1 / 4]],
    }
    assert MAX_CALLS == 2 and expected.keys() == AGGREGATIONS.keys()
    for aggregation, weights_GT in expected.items():
        found_IGT = token_weights(played, (0,), aggregation)
        np.testing.assert_allclose(found_IGT, [weights_GT, np.zeros((2, 2))], rtol=1e-6)


@pytest.mark.parametrize(
    ("choice", "same_up_to_size"),
    [(("grpo", "constant"), ("grpo", "sequence_mean")), (("rloo", "token_mean"), ("dr_grpo", "sequence_mean"))],
)
def test_the_first_step_has_one_size_whatever_the_choice(choice, same_up_to_size):
    """A constant denominator is a rate, and so is n / (n - 1): neither is to look like a better method."""
    found, expected = (
        train(ScoringSettings(advantage=advantage), aggregation, num_steps=1, world=make_world(4)).statistics_IS
        for advantage, aggregation in (choice, same_up_to_size)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_policy_trained_under_cheap_costs_less_than_one_under_outcome_first():
    """The same draws under both preferences; a paired permutation test at significance 0.01."""
    trained = train(ScoringSettings(), num_steps=40, world=make_world(16))
    by_name = {name: np.array(trained.preferences) == name for name in ("outcome", "cheap")}
    outcome_N, cheap_N = (trained.statistics_IS[by_name[name], COST_USD] for name in ("outcome", "cheap"))
    assert len(cheap_N) == 16 and permutation_p_value(outcome_N, cheap_N, seed=0) < 0.01


def test_within_its_floor_the_papers_form_goes_where_the_anchored_one_goes():
    """A world whose references no episode reaches: a floor there leaves the group nothing to say about the range."""
    world, floors = make_world(4, 0.1, 500.0), {"cost_usd": 0.1, "latency_s": 500.0}
    anchored, paper, floored = (
        train(tabular_cross.scoring(form, "grpo"), floors=floors if has_floor else {}, num_steps=20, world=world)
        for form, has_floor in (("anchored", False), ("paper", False), ("paper", True))
    )
    np.testing.assert_allclose(floored.statistics_IS, anchored.statistics_IS, rtol=1e-6)
    assert paper.score < anchored.score - 0.1


def test_the_cross_is_full_and_the_table_names_every_choice():
    assert len(tabular_cross.CROSS_FORMS) * len(ADVANTAGES) * len(AGGREGATIONS) == len(tabular_cross.cross())
    found = {cell: 0.5 for cell in tabular_cross.cross()}
    table = tabular_cross.format_cross(found)
    assert all(name in table for name in (*tabular_cross.CROSS_FORMS, *ADVANTAGES, *AGGREGATIONS))


@pytest.mark.slow
def test_the_quickstarts_own_rewards_and_advantages_teach_a_table_the_optimum():
    """What the language model misses of it is then not the reward's doing."""
    scoring = scoring_settings(quickstart.get_config())
    assert train(scoring, num_steps=400, world=make_world(num_per_preference=20)).score >= 0.95


@pytest.mark.slow
def test_a_table_learns_the_optimum_and_the_range_of_the_group_sells_accuracy_for_pennies():
    """The paper's own form, with all else equal; a floor at the reference range mends most of it."""
    anchored, plain, floored = (
        tabular_cross.train_cell((form, "grpo", "sequence_mean"), num_steps=400, num_per_preference=20)
        for form in ("anchored", "paper", "paper_with_floor")
    )
    accuracy = STATISTICS.index("accuracy")
    assert anchored.score >= 0.95
    assert plain.score + 0.15 < floored.score < anchored.score - 0.01  # of groups with costs beyond the floor
    assert plain.statistics_IS[:, accuracy].mean() < anchored.statistics_IS[:, accuracy].mean() - 0.03


@pytest.mark.slow
def test_the_constrained_form_holds_its_budget():
    budget = tabular_cross.BUDGETS[0]
    trained = train(tabular_cross.scoring("constrained", "grpo"), num_steps=200)
    assert trained.statistics_IS[:, COST_USD].mean() < 1.15 * budget.limit
    assert max(trained.multipliers.values()) > 0


@pytest.mark.slow
def test_every_cell_of_the_cross_trains():
    """A few steps each: every choice runs, and what maximises the utility's own parts beats the random policy."""
    found = tabular_cross.train_cross(num_steps=15, num_per_preference=4)
    assert all(np.isfinite(score) for score in found.values())
    for (form, advantage, aggregation), score in found.items():
        if form == "anchored" and advantage in ("grpo", "batch"):
            assert score > 0.1, (form, advantage, aggregation)
