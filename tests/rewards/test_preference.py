"""The preference reward: hand numbers, its promises, and the cases in which the reference release is known to fail."""

import dataclasses

import numpy as np
import pytest

from orchestra_jax.rewards.normalization import normalize
from orchestra_jax.rewards.objectives import Objective, objective_vector
from orchestra_jax.rewards.preference import preference_reward, utility

OUTCOME = Objective("outcome", "maximize", 0.0, 1.0)
COST = Objective("cost_usd", "minimize", 0.0, 0.2)
LATENCY = Objective("latency_s", "minimize", 0.0, 100.0)
DISALLOWED = Objective("disallowed_calls", "minimize", 0.0, 1.0, is_gated=False)
OUTCOME_COST = (OUTCOME, COST)
ALL = (OUTCOME, COST, LATENCY, DISALLOWED)
RULES = ("group", "reference")


def rewards(vectors, weights, objectives, rule, valid=None):
    valid = np.ones(len(vectors), bool) if valid is None else np.array(valid)
    return preference_reward(np.array(vectors, float), np.array(weights, float), objectives, valid, rule)


def random_group(rng, size=8):
    vectors_GM = np.column_stack(
        [
            rng.integers(0, 2, size),
            rng.uniform(0, 0.4, size),
            rng.uniform(0, 200, size),
            rng.integers(0, 4, size),
        ]
    )
    return vectors_GM.astype(float), rng.uniform(0.01, 1, 4)


def test_objective_vector_follows_the_order_and_names_what_is_missing():
    values = {"cost_usd": 0.05, "outcome": 1.0, "unused": 7.0}
    np.testing.assert_array_equal(objective_vector(values, OUTCOME_COST), [1.0, 0.05])
    with pytest.raises(ValueError, match="latency_s"):
        objective_vector(values, (OUTCOME, LATENCY))


def test_group_range_by_hand():
    vectors = [[1, 0.02, 10], [1, 0.06, 10], [0, 0.10, 10]]
    normalized = normalize(np.array(vectors), (OUTCOME, COST, LATENCY), np.ones(3, bool), "group")
    np.testing.assert_allclose(normalized, [[1, 1, 0], [1, 0.5, 0], [0, 0, 0]], atol=1e-12)


def test_group_range_counts_zeros_of_tools():
    calls = Objective("calls/search", "maximize", 0.0, 1.0)
    vectors = np.array([[0.0], [1.0], [4.0]])
    np.testing.assert_allclose(normalize(vectors, (calls,), np.ones(3, bool), "group"), [[0], [0.25], [1]])
    np.testing.assert_allclose(normalize(vectors, (calls,), np.ones(3, bool), "reference"), [[0], [1], [1]])


def test_reference_range_clips_on_both_sides():
    vectors = np.array([[-0.1], [0.05], [0.3]])
    np.testing.assert_allclose(normalize(vectors, (COST,), np.ones(3, bool), "reference"), [[1], [0.75], [0]])


def test_range_floor_keeps_pennies_small():
    floored = Objective("cost_usd", "minimize", 0.0, 0.2, range_floor=0.1)
    valid = np.ones(2, bool)
    np.testing.assert_allclose(normalize(np.array([[0.100], [0.102]]), (floored,), valid, "group"), [[0.02], [0]])
    np.testing.assert_allclose(normalize(np.array([[0.1], [0.5]]), (floored,), valid, "group"), [[1], [0]])
    np.testing.assert_allclose(normalize(np.array([[0.1], [0.1]]), (floored,), valid, "group"), [[0], [0]])


def test_a_floor_has_a_fixed_place_as_far_as_the_values_let_it():
    floored = Objective("cost_usd", "minimize", 0.0, 0.2, range_floor=0.16)
    valid = np.ones(2, bool)
    for costs, expected in (
        ([0.02, 0.10], [0.875, 0.375]),  # $0 to $0.16
        ([0.02, 0.16], [0.875, 0.0]),
        ([0.10, 0.24], [0.875, 0.0]),  # pushed up: $0.08 to $0.24
        ([0.04, 0.24], [1.0, 0.0]),  # wider than the floor: the group's own
        ([0.06, 0.06], [0.625, 0.625]),
    ):
        found = normalize(np.array(costs)[:, None], (floored,), valid, "group")
        np.testing.assert_allclose(found[:, 0], expected, atol=1e-12)


def test_with_a_floor_at_the_reference_range_costs_within_it_have_the_utility_of_reference():
    """Up to the outcome's own coordinate, which is constant among equals: no advantage sees the difference."""
    rng = np.random.default_rng(5)
    floored = tuple(dataclasses.replace(each, range_floor=each.reference_high) for each in ALL)
    for _ in range(20):
        vectors_GM, weights_M = random_group(rng)
        vectors_GM[:, 1:3] /= 2.0  # at most $0.20 and 100 s
        expected_G = rewards(vectors_GM, weights_M, ALL, "reference")
        np.testing.assert_allclose(rewards(vectors_GM, weights_M, floored, "group"), expected_G, atol=1e-12)


def test_the_same_charges_in_another_order_are_one_cost():
    """0.1 + 0.2 is not 0.3 to the last bit; without a floor the paper's form would make a full unit of it."""
    for rule in ("group", "correct"):
        first, second = rewards([[1, 0.1 + 0.2], [1, 0.3]], [1, 1], OUTCOME_COST, rule)
        assert first == second


def test_reward_by_hand():
    vectors = [[1, 0.02], [1, 0.06], [0, 0.10]]
    # Weights 3 : 1 become 3/4 and 1/4.
    np.testing.assert_allclose(rewards(vectors, [3, 1], OUTCOME_COST, "group"), [1.0, 0.875, 0.0])
    np.testing.assert_allclose(rewards(vectors, [3, 1], OUTCOME_COST, "reference"), [0.975, 0.925, 0.0])


def test_all_correct_group_is_ordered_by_cost_alone_under_the_group_rule():
    np.testing.assert_allclose(rewards([[1, 0.02], [1, 0.06]], [3, 1], OUTCOME_COST, "group"), [0.25, 0.0])


@pytest.mark.parametrize("rule", RULES)
def test_a_constraint_is_paid_by_wrong_answers_too(rule):
    objectives = (OUTCOME, DISALLOWED)
    vectors = [[1, 0], [1, 3], [0, 0], [0, 1]]
    np.testing.assert_allclose(rewards(vectors, [5, 0.4], objectives, rule), [1.0, 0.6, 0.0, -0.4])


def test_a_constraint_that_the_whole_group_keeps_or_breaks_is_still_measured_absolutely():
    objectives = (OUTCOME, DISALLOWED)
    np.testing.assert_allclose(rewards([[0, 0], [1, 0]], [1, 0.4], objectives, "group"), [0.0, 1.0])
    np.testing.assert_allclose(rewards([[0, 2], [1, 2]], [1, 0.4], objectives, "group"), [-0.4, 0.6])
    consent = (OUTCOME, Objective("consent", "maximize", 0.0, 1.0, is_gated=False))
    np.testing.assert_allclose(rewards([[0, 0.5], [1, 1.0]], [1, 0.4], consent, "group"), [-0.2, 1.0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("column", [1, 2])
def test_cheaper_and_faster_are_better_all_else_equal(rule, column):
    rng = np.random.default_rng(0)
    for _ in range(20):
        vectors_GM, weights_M = random_group(rng)
        vectors_GM[0] = vectors_GM[1]
        vectors_GM[:2, 0] = 1
        vectors_GM[1, column], vectors_GM[0, column] = 0.15, 0.05  # both within the reference range
        first, second = rewards(vectors_GM, weights_M, ALL, rule)[:2]
        assert first > second


@pytest.mark.parametrize("rule", RULES)
def test_correct_is_never_below_incorrect(rule):
    rng = np.random.default_rng(1)
    for _ in range(50):
        vectors_GM, weights_M = random_group(rng)
        vectors_GM[:2, 0] = 0, 1
        scores_G = rewards(vectors_GM[:, :3], weights_M[:3], ALL[:3], rule)
        is_correct_G = vectors_GM[:, 0] == 1
        assert scores_G[is_correct_G].min() >= scores_G[~is_correct_G].max()
        assert scores_G.min() >= 0 and scores_G.max() <= 1 + 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_permutations_change_nothing(rule):
    rng = np.random.default_rng(2)
    vectors_GM, weights_M = random_group(rng)
    expected_G = rewards(vectors_GM, weights_M, ALL, rule)
    order = [2, 0, 3, 1]
    permuted = tuple(ALL[index] for index in order)
    np.testing.assert_allclose(rewards(vectors_GM[:, order], weights_M[order], permuted, rule), expected_G, rtol=1e-12)
    rollouts = rng.permutation(len(vectors_GM))
    np.testing.assert_allclose(rewards(vectors_GM[rollouts], weights_M, ALL, rule), expected_G[rollouts], rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_invalid_rollouts_do_not_enter_the_range(rule):
    vectors = [[1, 0.02], [0.3, np.nan], [1, 0.06], [0, 900.0], [0, 0.10]]
    valid = [True, False, True, False, True]
    scores_G = rewards(vectors, [3, 1], OUTCOME_COST, rule, valid)
    kept_G = rewards([vectors[0], vectors[2], vectors[4]], [3, 1], OUTCOME_COST, rule)
    np.testing.assert_array_equal(scores_G, [kept_G[0], 0, kept_G[1], 0, kept_G[2]])
    np.testing.assert_array_equal(rewards(vectors[:2], [3, 1], OUTCOME_COST, rule, [False, False]), [0, 0])


# The groups on which the release's arithmetic was seen to fail: three correct rollouts and a wrong one.
SPREAD = [[1, 0.01], [1, 0.05], [1, 0.10], [0, 0.05]]
NARROW = [[1, 0.100], [1, 0.101], [1, 0.102], [0, 0.101]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("group", [SPREAD, NARROW])
@pytest.mark.parametrize("cost_weight", [1.0, 0.3])
def test_release_failures_are_right_here(rule, group, cost_weight):
    scores_G = rewards(group, [1.0, cost_weight], OUTCOME_COST, rule)
    assert scores_G[0] > scores_G[1] > scores_G[2] > scores_G[3] == 0  # cheapest first, the wrong answer last
    assert scores_G.max() <= 1  # where the release gave 153 or -44.9
    worst_correct = 1 / (1 + cost_weight)
    assert scores_G[2] >= worst_correct - 1e-12  # even the dearest correct answer keeps the whole outcome share


def test_release_failure_of_narrow_ranges_needs_a_floor_to_be_proportionate():
    floored = (OUTCOME, Objective("cost_usd", "minimize", 0.0, 0.2, range_floor=0.1))
    np.testing.assert_allclose(rewards(NARROW, [1, 1], OUTCOME_COST, "group"), [1, 0.75, 0.5, 0])
    np.testing.assert_allclose(rewards(NARROW, [1, 1], floored, "group"), [0.51, 0.505, 0.5, 0])


def test_a_negative_weight_is_refused_by_name():
    with pytest.raises(ValueError, match="'cost_usd': -0.3"):
        rewards(SPREAD, [1.0, -0.3], OUTCOME_COST, "group")
    with pytest.raises(ValueError, match="disallowed_calls"):
        rewards([[1, 0]], [1.0, -1.0], (OUTCOME, DISALLOWED), "group")


def test_reference_reward_and_utility_equal_the_written_formula():
    rng = np.random.default_rng(3)
    for _ in range(20):
        vectors_GM, weights_M = random_group(rng)
        w_o, w_c, w_l = weights_M[:3] / weights_M[:3].sum()
        y, c, l, d = vectors_GM.T
        expected_G = y * (w_o + w_c * (1 - np.minimum(c / 0.2, 1)) + w_l * (1 - np.minimum(l / 100, 1)))
        expected_G -= weights_M[3] * np.minimum(d, 1)
        np.testing.assert_allclose(rewards(vectors_GM, weights_M, ALL, "reference"), expected_G, atol=1e-12)
        utilities = [utility(vector_M, weights_M, ALL) for vector_M in vectors_GM]
        np.testing.assert_allclose(utilities, expected_G, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "up"}, "'up'"),
        ({"reference_low": 2.0}, "reference_low 2.0"),
        ({"range_floor": -1.0}, "range_floor -1.0"),
        ({"name": "outcome", "is_gated": False}, "gate itself"),
        ({"name": "outcome", "direction": "minimize"}, "gate itself"),
    ],
)
def test_objectives_refuse_contradictions(change, message):
    good = {"name": "m", "direction": "maximize", "reference_low": 0.0, "reference_high": 1.0}
    with pytest.raises(ValueError, match=message):
        Objective(**(good | change))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="all zero"):
        rewards([[1, 0.0, 0]], [0, 0, 1], (OUTCOME, COST, DISALLOWED), "group")
    with pytest.raises(ValueError, match="missing from"):
        rewards([[0.1]], [1], (COST,), "group")
    with pytest.raises(ValueError, match="0.5"):
        rewards([[0.5, 0.1]], [1, 1], OUTCOME_COST, "group")
    with pytest.raises(ValueError, match="'batch'"):
        rewards([[1, 0.1]], [1, 1], OUTCOME_COST, "batch")
