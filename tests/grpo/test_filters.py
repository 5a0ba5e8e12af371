"""Filters as decisions, in their order. The group of docs/filters.md goes through all of them, by hand."""

import dataclasses

import numpy as np
import pytest

from orchestra_jax.grpo.filters import Decision, Effect, FilterReason, loss_reasons, overlong_penalty, rollout_facts
from orchestra_jax.grpo.scoring import ScoringSettings, score_groups
from orchestra_jax.rewards.objectives import Objective
from orchestra_jax.types import EpisodeStatus, Trajectory, TrajectoryGroup

OBJECTIVES = (Objective("outcome", "maximize", 0.0, 1.0), Objective("cost_usd", "minimize", 0.0, 1.0))
STATUS = EpisodeStatus
VERSION = 9


def rollout(outcome, status=STATUS.ANSWERED, num_tokens=40, version=VERSION, cost_usd=0.0):
    mask = np.arange(num_tokens) >= 10
    return Trajectory(
        "t", 0, np.zeros(num_tokens, np.int32), mask, -mask.astype(np.float32), np.where(mask, version, -1), 10,
        (), (), status, "", {"outcome": outcome, "cost_usd": cost_usd},
    )  # fmt: skip


def group(*rollouts):
    return TrajectoryGroup("t", {"outcome": 1.0, "cost_usd": 0.0}, rollouts)


def score(*groups, **settings):
    return score_groups(groups, OBJECTIVES, ScoringSettings(**settings), policy_version=VERSION)


# docs/filters.md: a right answer, a wrong one, a broken endpoint, a malformed call, a spent turn limit, a cut turn, and
# a right answer of six versions ago.
EXAMPLE = group(
    rollout(1.0),
    rollout(0.0),
    rollout(0.0, STATUS.TOOL_FAILURE),
    rollout(0.0, STATUS.MALFORMED),
    rollout(0.0, STATUS.TURN_LIMIT),
    rollout(0.0, STATUS.TOKEN_LIMIT, num_tokens=100),
    rollout(1.0, version=VERSION - 6),
)
ALIKE = group(*[rollout(1.0)] * 7)
LONELY = group(rollout(1.0), *[rollout(0.0, STATUS.TOOL_FAILURE)] * 6)


def test_the_worked_example():
    scored = score(EXAMPLE, ALIKE, LONELY, advantage="dr_grpo", overlong="mask", advantage_clip=0.6)
    assert scored.decisions == (
        Decision(FilterReason.INFRASTRUCTURE, Effect.LEAVES_GROUP, 0, 2),
        *(Decision(FilterReason.INFRASTRUCTURE, Effect.LEAVES_GROUP, 2, g) for g in range(1, 7)),
        Decision(FilterReason.TOO_FEW_VALID, Effect.DROPS_GROUP, 2, None),
        Decision(FilterReason.HOMOGENEOUS, Effect.DROPS_GROUP, 1, None),
        Decision(FilterReason.CLIPPED, Effect.CUTS_ADVANTAGE, 0, 0),
        Decision(FilterReason.CLIPPED, Effect.CUTS_ADVANTAGE, 0, 6),
        Decision(FilterReason.OVERLONG, Effect.LEAVES_LOSS, 0, 5),
        Decision(FilterReason.STALE, Effect.LEAVES_LOSS, 0, 6),
    )
    # Six valid rollouts, mean 1/3: 2/3 for a right answer, cut to 0.6; the failure is in no statistic.
    third = -1 / 3
    np.testing.assert_allclose(scored.advantages_KG, [[0.6, third, 0.0, third, third, third, 0.6]])
    assert scored.trained_PG[0].tolist() == [True, True, False, True, True, False, False]
    assert scored.kept == (0,) and scored.dropped == {FilterReason.TOO_FEW_VALID: 1, FilterReason.HOMOGENEOUS: 1}


def test_the_papers_filters_drop_negatives_that_have_been_in_the_baseline():
    """Malformed and unanswered rollouts have no gradient, yet the mean is that of all six."""
    plain, paper = (score(EXAMPLE, advantage="dr_grpo", filters=name) for name in ("negatives_stay", "paper"))
    np.testing.assert_array_equal(plain.advantages_KG, paper.advantages_KG)
    assert plain.trained_PG[0].tolist() == [True, True, False, True, True, True, False]
    assert paper.trained_PG[0].tolist() == [True, True, False, False, False, False, False]
    reasons = [(each.reason, each.rollout) for each in paper.decisions if each.effect == Effect.LEAVES_LOSS]
    assert reasons == [
        (FilterReason.MALFORMED, 3),
        (FilterReason.UNANSWERED, 4),
        (FilterReason.UNANSWERED, 5),
        (FilterReason.STALE, 6),
    ]


def test_the_soft_penalty_lowers_the_reward_behind_the_homogeneity_filter():
    np.testing.assert_allclose(
        overlong_penalty(np.array([79, 80, 90, 100, 101]), max_tokens=100, buffer_tokens=20), [0, 0, -0.5, -1, -1]
    )
    long = group(rollout(1.0), rollout(0.0), rollout(1.0, num_tokens=90))
    scored = score(long, advantage="dr_grpo", overlong="soft", overlong_buffer_tokens=20, max_tokens=100)
    np.testing.assert_allclose(scored.rewards_PG, [[1.0, 0.0, 1.0]])  # raw
    np.testing.assert_allclose(scored.advantages_KG, [[0.5, -0.5, 0.0]])  # of 1, 0, 0.5
    assert scored.decisions == (Decision(FilterReason.OVERLONG, Effect.LOWERS_REWARD, 0, 2),)
    # Length alone makes no group worth training on.
    alike = score(group(rollout(1.0), rollout(1.0, num_tokens=100)), overlong="soft", max_tokens=100)
    assert alike.dropped == {FilterReason.HOMOGENEOUS: 1}
    with pytest.raises(ValueError, match="overlong_buffer_tokens 200"):
        overlong_penalty(np.array([1]), max_tokens=100, buffer_tokens=200)


def test_staleness_is_that_of_the_first_sampled_token():
    old = rollout(1.0, version=VERSION - 2)
    mixed = dataclasses.replace(old, policy_versions=np.where(np.arange(40) < 20, old.policy_versions, VERSION))
    unsampled = dataclasses.replace(old, loss_mask=np.zeros(40, bool))
    facts = rollout_facts([group(old, mixed, unsampled)])
    assert facts.policy_version_PG.tolist() == [[VERSION - 2, VERSION - 2, -1]]
    for lag, expected in ((2, [False, False, False]), (1, [True, True, False])):
        reasons = loss_reasons(
            facts, filters="negatives_stay", overlong="keep", policy_version=VERSION, max_policy_lag=lag
        )
        assert reasons[FilterReason.STALE].tolist() == [expected]


@pytest.mark.parametrize(("setting", "value"), [("filters", "none"), ("overlong", "cut")])
def test_unknown_choices_are_named(setting, value):
    with pytest.raises(ValueError, match=f"{setting} '{value}'"):
        score(EXAMPLE, **{setting: value})
