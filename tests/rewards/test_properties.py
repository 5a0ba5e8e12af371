"""What the reward promises, whatever the group: searched for counterexamples by hypothesis."""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestra_jax.grpo.advantages import ADVANTAGES, raw_advantages
from orchestra_jax.rewards.objectives import Objective, tool_objective
from orchestra_jax.rewards.preference import FORMS, preference_reward

OBJECTIVES = (
    Objective("outcome", "maximize", 0.0, 1.0),
    Objective("cost_usd", "minimize", 0.0, 0.2, range_floor=0.02),
    Objective("latency_s", "minimize", 0.0, 100.0),
    tool_objective("search"),
    tool_objective("code"),
    Objective("disallowed_calls", "minimize", 0.0, 1.0, is_gated=False),
)
COST, LATENCY, TOOLS = 1, 2, (3, 4)
RULES = ("group", "correct", "reference")
UNCONSTRAINED = tuple(form for form in FORMS if form != "constrained")
GATED = tuple(form for form in UNCONSTRAINED if form != "ungated_sum")
NUM_EXAMPLES = 10  # each of several forms under several rules
SLACK = 1e-9  # of rounding

# Costs in hundredths of a cent and whole seconds: differences are real ones, not the last bits.
rollout = st.tuples(
    st.integers(0, 1).map(float),
    st.integers(0, 4000).map(lambda hundredths: hundredths * 1e-4),
    st.integers(0, 200).map(float),
    st.integers(0, 3).map(float),
    st.integers(0, 3).map(float),
    st.just(0.0),
)
weight = st.integers(0, 20).map(lambda twentieths: twentieths / 20)


@st.composite
def groups(draw):
    vectors_GM = np.array(draw(st.lists(rollout, min_size=2, max_size=6)))
    weights_M = np.array(draw(st.tuples(*[weight] * len(OBJECTIVES))))
    assume(weights_M[:-1].sum() > 0)
    return vectors_GM, weights_M


def rewards(vectors_GM, weights_M, rule, form="gated_sum", objectives=OBJECTIVES):
    return preference_reward(vectors_GM, weights_M, objectives, np.ones(len(vectors_GM), bool), rule, form)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", UNCONSTRAINED)
@given(groups(), st.sampled_from([COST, LATENCY]), st.integers(1, 1000))
@settings(max_examples=NUM_EXAMPLES, deadline=None)
def test_cheaper_and_faster_are_never_worse_all_else_equal(form, rule, group, column, saved):
    vectors_GM, weights_M = group
    vectors_GM[0] = vectors_GM[1]
    vectors_GM[1, column] = vectors_GM[0, column] + saved * (1e-4 if column == COST else 0.1)
    scores_G = rewards(vectors_GM, weights_M, rule, form)
    assert scores_G[0] >= scores_G[1] - SLACK


@pytest.mark.parametrize("form", GATED)
@pytest.mark.parametrize("rule", RULES)
@given(groups())
@settings(max_examples=NUM_EXAMPLES, deadline=None)
def test_a_right_answer_is_never_below_a_wrong_one(rule, form, group):
    vectors_GM, weights_M = group
    scores_G = rewards(vectors_GM, weights_M, rule, form)
    is_right_G = vectors_GM[:, 0] == 1
    assume(is_right_G.any() and not is_right_G.all())
    assert scores_G[is_right_G].min() >= scores_G[~is_right_G].max() - SLACK
    assert (scores_G[~is_right_G] == 0).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", UNCONSTRAINED)
@given(groups(), st.randoms(use_true_random=False))
@settings(max_examples=NUM_EXAMPLES, deadline=None)
def test_the_order_of_objectives_tools_and_rollouts_changes_nothing(form, rule, group, random):
    vectors_GM, weights_M = group
    order_M, order_G = list(range(len(OBJECTIVES))), list(range(len(vectors_GM)))
    random.shuffle(order_M)
    random.shuffle(order_G)
    permuted = tuple(OBJECTIVES[m] for m in order_M)
    found_G = rewards(vectors_GM[order_G][:, order_M], weights_M[order_M], rule, form, permuted)
    np.testing.assert_allclose(found_G, rewards(vectors_GM, weights_M, rule, form)[order_G], atol=SLACK)


@pytest.mark.parametrize("has_floor", [False, True])
@pytest.mark.parametrize("rule", ["group", "correct"])
@given(groups(), st.sampled_from([COST, LATENCY]), st.integers(1, 50))
@settings(max_examples=NUM_EXAMPLES, deadline=None)
def test_a_constant_added_to_a_coordinate_changes_nothing(rule, has_floor, group, column, constant):
    """In the paper's form whatever is declared; a floor has a place, which the constant moves with the values."""
    vectors_GM, weights_M = group
    added = constant * (1e-3 if column == COST else 1.0)
    plain = [dataclasses.replace(each, range_floor=each.range_floor * has_floor) for each in OBJECTIVES]
    moved = list(plain)
    if has_floor:
        low, high = plain[column].reference_low + added, plain[column].reference_high + added
        moved[column] = dataclasses.replace(plain[column], reference_low=low, reference_high=high)
    moved_GM = vectors_GM.copy()
    moved_GM[:, column] += added
    found_G, expected_G = (
        rewards(moved_GM, weights_M, rule, objectives=moved),
        rewards(vectors_GM, weights_M, rule, objectives=plain),
    )
    np.testing.assert_allclose(found_G, expected_G, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", UNCONSTRAINED)
@given(groups(), st.sampled_from([0.01, 100.0, 1000.0]))
@settings(max_examples=NUM_EXAMPLES, deadline=None)
def test_the_unit_of_a_cost_changes_nothing_if_all_that_is_declared_changes_with_it(form, rule, group, factor):
    vectors_GM, weights_M = group
    cost = OBJECTIVES[COST]
    scaled = dataclasses.replace(
        cost, reference_high=cost.reference_high * factor, range_floor=cost.range_floor * factor
    )
    scaled_GM = vectors_GM * np.where(np.arange(len(OBJECTIVES)) == COST, factor, 1.0)
    objectives = (OBJECTIVES[0], scaled, *OBJECTIVES[2:])
    np.testing.assert_allclose(
        rewards(scaled_GM, weights_M, rule, form, objectives), rewards(vectors_GM, weights_M, rule, form), atol=1e-7
    )


@pytest.mark.parametrize("rule", RULES)
@given(groups(), st.sampled_from(TOOLS), st.integers(1, 5))
@settings(max_examples=NUM_EXAMPLES, deadline=None)
def test_repeating_a_favoured_call_never_raises_the_reward(rule, group, tool, num_more):
    """Nor does it change the others'. A repeat costs money and time too; here it is given away for nothing."""
    vectors_GM, weights_M = group
    vectors_GM[0, tool] = max(vectors_GM[0, tool], 1.0)
    repeated_GM = vectors_GM.copy()
    repeated_GM[0, tool] += num_more
    np.testing.assert_allclose(rewards(repeated_GM, weights_M, rule), rewards(vectors_GM, weights_M, rule), atol=SLACK)


def test_raw_counts_do_pay_for_repeats():
    """Why the cap is the default: the same group with raw counts."""
    vectors_GM = np.array([[1.0, 1.0], [1.0, 4.0]])
    for is_raw, expected in ((False, [0.0, 0.0]), (True, [0.0, 0.5])):
        objectives = (OBJECTIVES[0], tool_objective("search", is_raw))
        np.testing.assert_allclose(rewards(vectors_GM, np.ones(2), "group", objectives=objectives), expected)


@pytest.mark.parametrize("kind", sorted(ADVANTAGES.keys() - {"batch"}))
@given(groups(), st.integers(2, 6))
@settings(max_examples=NUM_EXAMPLES, deadline=None)
def test_a_group_of_equals_has_no_advantage(kind, group, size):
    vectors_GM, weights_M = group
    alike_GM = np.repeat(vectors_GM[:1], size, axis=0)
    for rule in RULES:
        advantages_G = raw_advantages(rewards(alike_GM, weights_M, rule), np.ones(size, bool), kind)
        assert not advantages_G.any()
