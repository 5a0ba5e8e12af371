"""Rewards, filters and advantages of the groups of one step, with numbers worked out by hand.

The objectives: outcome, and a cost between $0 and $1. Under weights of 1/2 each and the reference ranges a right answer
for c dollars has the reward 1/2 + 1/2 (1 - c), a wrong one 0.
"""

import dataclasses

import numpy as np
import pytest

from orchestra_jax.grpo.filters import FilterReason
from orchestra_jax.grpo.scoring import ScoringSettings, score_groups
from orchestra_jax.rewards.objectives import Objective, tool_objective
from orchestra_jax.types import EpisodeStatus, Trajectory, TrajectoryGroup

OBJECTIVES = (Objective("outcome", "maximize", 0.0, 1.0), Objective("cost_usd", "minimize", 0.0, 1.0))
WEIGHTS = {"outcome": 0.5, "cost_usd": 0.5}
FAILED = EpisodeStatus.TOOL_FAILURE


def rollout(outcome, cost_usd, status=EpisodeStatus.ANSWERED):
    empty = np.zeros(0)
    values = {"outcome": outcome, "cost_usd": cost_usd}
    return Trajectory("i", 0, empty, empty, empty, empty, 0, (), (), status, "", values)


def group(*rollouts):
    return TrajectoryGroup("i", WEIGHTS, rollouts)


def score(*groups, **settings):
    return score_groups(groups, OBJECTIVES, ScoringSettings(**{"advantage": "dr_grpo", **settings}))


GOOD = group(rollout(1.0, 0.0), rollout(0.0, 0.3), rollout(1.0, 0.8), rollout(0.0, 0.0))  # 1, 0, 0.6, 0
EQUAL = group(*(rollout(1.0, cost_usd) for cost_usd in (0.2, 0.2, 0.21, 0.2)))
BROKEN = group(*(rollout(0.0, 0.0, FAILED) for _ in range(4)))


def test_rewards_and_advantages_by_hand():
    scored = score(GOOD)
    np.testing.assert_allclose(scored.rewards_PG, [[1.0, 0.0, 0.6, 0.0]])
    np.testing.assert_allclose(scored.advantages_KG, [[0.6, -0.4, 0.2, -0.4]])
    assert (scored.kept, scored.dropped) == ((0,), {})
    divided = score(GOOD, advantage="grpo")
    std = np.sqrt((0.36 + 0.16 + 0.04 + 0.16) / 3)
    np.testing.assert_allclose(divided.advantages_KG, [[0.6 / std, -0.4 / std, 0.2 / std, -0.4 / std]], rtol=1e-5)
    clipped = score(GOOD, advantage_clip=0.5)
    np.testing.assert_allclose(clipped.advantages_KG, [[0.5, -0.4, 0.2, -0.4]])
    assert clipped.is_clipped_KG.tolist() == [[True, False, False, False]]


def test_the_range_rule_is_passed_on():
    """The group's own range: costs 0 to 0.8, so the right answer for $0.8 has 1/2, the free one 1."""
    np.testing.assert_allclose(score(GOOD, range_rule="group").rewards_PG, [[1.0, 0.0, 0.5, 0.0]])
    with pytest.raises(ValueError, match="range_rule 'grup'"):
        score(GOOD, range_rule="grup")


@pytest.mark.parametrize("range_rule", ["reference", "group"])
@pytest.mark.parametrize("values", [(0.0, 0.0), (1.0, 1e6), (1.0, np.nan)])
def test_a_failed_rollout_changes_nothing_for_the_others(range_rule, values):
    with_failure = group(*GOOD.trajectories[:2], rollout(*values, FAILED), *GOOD.trajectories[2:])
    scored, without = (score(each, range_rule=range_rule) for each in (with_failure, GOOD))
    others = [0, 1, 3, 4]
    assert scored.valid_PG.tolist() == [[True, True, False, True, True]]
    np.testing.assert_array_equal(scored.rewards_PG[:, others], without.rewards_PG)
    np.testing.assert_array_equal(scored.advantages_KG[:, others], without.advantages_KG)
    assert scored.rewards_PG[0, 2] == scored.advantages_KG[0, 2] == 0.0


@pytest.mark.parametrize("status", sorted(set(EpisodeStatus) - {FAILED, EpisodeStatus.ENGINE_FAILURE}))
def test_what_the_policy_did_itself_is_never_left_out(status):
    assert score(group(rollout(0.0, 0.1, status), rollout(1.0, 0.0))).valid_PG.all()


def test_dropped_groups_are_counted_by_reason_and_the_kept_ones_keep_their_numbers():
    lonely = group(rollout(1.0, 0.0), *(rollout(0.0, 0.0, FAILED) for _ in range(3)))
    scored = score(BROKEN, GOOD, EQUAL, lonely, GOOD)
    assert scored.kept == (1, 4)
    assert scored.dropped == {FilterReason.TOO_FEW_VALID: 2, FilterReason.HOMOGENEOUS: 1}
    assert scored.rewards_PG.shape == scored.valid_PG.shape == (5, 4)
    np.testing.assert_array_equal(scored.advantages_KG, np.repeat(score(GOOD).advantages_KG, 2, axis=0))
    assert scored.is_clipped_KG.shape == (2, 4)


def test_without_a_threshold_equal_groups_are_kept_and_failed_ones_are_not():
    scored = score(BROKEN, EQUAL, min_group_std=0.0)
    assert (scored.kept, scored.dropped) == ((1,), {FilterReason.TOO_FEW_VALID: 1})


def test_a_step_may_keep_no_group_at_all():
    scored = score(BROKEN, BROKEN)
    assert (scored.kept, scored.dropped) == ((), {FilterReason.TOO_FEW_VALID: 2})
    assert scored.advantages_KG.shape == scored.is_clipped_KG.shape == (0, 4)
    assert not scored.valid_PG.any() and not scored.rewards_PG.any()


# The release's failures on groups of three right answers and a wrong one, through to the advantage.
@pytest.mark.parametrize("range_rule", ["reference", "group", "correct"])
@pytest.mark.parametrize("costs_usd", [(0.01, 0.05, 0.10), (0.100, 0.101, 0.102)])
def test_the_cheapest_right_answer_gains_most_and_the_wrong_one_loses(range_rule, costs_usd):
    rollouts = [rollout(1.0, cost_usd) for cost_usd in costs_usd]
    scored = score(group(*rollouts, rollout(0.0, costs_usd[1])), range_rule=range_rule, advantage="grpo")
    first, second, third, wrong = scored.advantages_KG[0]
    assert first > second > third > wrong and wrong < -1
    assert 0 == scored.rewards_PG[0, 3] < 0.5 <= scored.rewards_PG[0, 2] < scored.rewards_PG[0, 0] <= 1


def test_without_a_floor_a_hundredth_of_a_cent_has_a_full_size_advantage():
    """Two right answers for $0.0400 and $0.0401: the paper's form pays half the reward for the difference."""
    pennies = group(rollout(1.0, 0.0400), rollout(1.0, 0.0401))
    paper = score(pennies, range_rule="group", advantage="grpo")
    np.testing.assert_allclose(paper.rewards_PG, [[0.5, 0.0]])
    np.testing.assert_allclose(paper.advantages_KG, [[np.sqrt(0.5), -np.sqrt(0.5)]], rtol=1e-4)
    floored = (OBJECTIVES[0], dataclasses.replace(OBJECTIVES[1], range_floor=0.012))
    scored = score_groups([pennies], floored, ScoringSettings(range_rule="group"))
    np.testing.assert_allclose(scored.rewards_PG, [[0.5 / 120, 0.0]])
    assert scored.dropped == {FilterReason.HOMOGENEOUS: 1}


def test_a_tool_that_one_rollout_used_once_counts_and_the_others_are_not_negative():
    """The release takes a tool's range from its users alone: min == max, and whoever did not use it falls below 0."""
    objectives = (OBJECTIVES[0], tool_objective("search"))
    used = [dataclasses.replace(rollout(1.0, 0.0), objectives={"outcome": 1.0, "calls/search": n}) for n in (1, 0, 0)]
    weights = {"outcome": 0.5, "calls/search": 0.5}
    scored = score_groups([TrajectoryGroup("i", weights, tuple(used))], objectives, ScoringSettings(range_rule="group"))
    np.testing.assert_allclose(scored.rewards_PG, [[0.5, 0.0, 0.0]])


def test_per_objective_advantages_by_hand():
    """Components y n: outcomes 1, 1, 0 and cost coordinates 1, 0.5, 0; each centred, summed with weights of 1/2."""
    scored = score(
        group(rollout(1.0, 0.0), rollout(1.0, 0.5), rollout(0.0, 0.9)), reward_form="per_objective", advantage="dr_grpo"
    )
    np.testing.assert_allclose(scored.advantages_KG, [[(1 / 3 + 1 / 2) / 2, (1 / 3 + 0) / 2, (-2 / 3 - 1 / 2) / 2]])
    np.testing.assert_allclose(scored.rewards_PG, [[1.0, 0.75, 0.0]])
    divided = score(group(rollout(1.0, 0.0), rollout(1.0, 0.5), rollout(0.0, 0.9)),
                    reward_form="per_objective", advantage="grpo", std_epsilon=0.0)  # fmt: skip
    np.testing.assert_allclose(divided.advantages_KG[0, 1], (1 / 3) / np.sqrt(1 / 3) / 2)


def test_a_kl_penalty_moves_the_advantage_and_no_filter():
    penalty_PG = np.array([[0.0, 0.0, 0.2, 0.0]])
    scored = score_groups([GOOD], OBJECTIVES, ScoringSettings(advantage="dr_grpo"), kl_penalty_PG=penalty_PG)
    np.testing.assert_allclose(scored.rewards_PG, [[1.0, 0.0, 0.6, 0.0]])
    np.testing.assert_allclose(scored.advantages_KG, [[0.65, -0.35, 0.05, -0.35]])
    with pytest.raises(ValueError, match="'per_objective' has no one reward"):
        score_groups([GOOD], OBJECTIVES, ScoringSettings(reward_form="per_objective"), kl_penalty_PG=penalty_PG)


def with_logprobs(*logprobs):
    mask = np.array([False, True, True])
    return dataclasses.replace(
        rollout(1.0, 0.0), rollout_index=3, tokens=np.zeros(3, np.int32), loss_mask=mask,
        logprobs=np.array([0.0, *logprobs], np.float32), policy_versions=mask - 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (group(rollout(1.0, 0.0)), r"the group of task i has 1 trajectory \[0\]"),
        (TrajectoryGroup("t/7", {**WEIGHTS, "joy": 0.4}, GOOD.trajectories), "task t/7 .* weight 0.4 for 'joy', which"),
        (TrajectoryGroup("t/7", {**WEIGHTS, "cost_usd": -0.3}, GOOD.trajectories), "task t/7 .* -0.3 for 'cost_usd'"),
        (TrajectoryGroup("t/7", {**WEIGHTS, "outcome": 1.5}, GOOD.trajectories), r"1.5 for 'outcome'.*\[0, 1\]"),
        (TrajectoryGroup("t/7", {**WEIGHTS, "outcome": np.nan}, GOOD.trajectories), "weight nan for 'outcome'"),
        (TrajectoryGroup("t/7", {"outcome": 1.0}, GOOD.trajectories), "no value for the objectives .'cost_usd'"),
        (group(rollout(1.0, 0.0), with_logprobs(-1.0, np.nan)), "task i, trajectory 3: .* token 2 is nan"),
        (group(rollout(1.0, 0.0), with_logprobs(-np.inf, -1.0)), "task i, trajectory 3: .* token 1 is -inf"),
    ],
)
def test_bad_groups_are_refused_with_task_trajectory_and_value(bad, told):
    with pytest.raises(ValueError, match=told):
        score_groups([bad], OBJECTIVES, ScoringSettings())


def test_a_failed_rollout_may_hold_anything():
    broken = dataclasses.replace(with_logprobs(np.nan, np.nan), status=FAILED)
    assert score(group(*GOOD.trajectories, broken)).kept == (0,)
