"""Group advantages and the group filter: hand numbers, invariances, masked members."""

import math

import numpy as np
import pytest

from orchestra_jax.grpo.advantages import ADVANTAGES, group_advantages, is_homogeneous
from orchestra_jax.grpo.filters import FilterReason, group_reasons

ALL_VALID = np.ones(4, bool)


def test_by_hand():
    rewards_G = np.array([1.0, 0.0, 0.0, 1.0])
    centred = group_advantages(rewards_G, ALL_VALID, "dr_grpo")
    np.testing.assert_array_equal(centred.advantages_G, [0.5, -0.5, -0.5, 0.5])
    # Population std is 1/2, the sample's sqrt(4/3)/2.
    population = group_advantages(rewards_G, ALL_VALID, std_ddof=0)
    np.testing.assert_allclose(population.advantages_G, [1, -1, -1, 1], rtol=1e-5)
    sample = group_advantages(rewards_G, ALL_VALID)
    np.testing.assert_allclose(sample.advantages_G, np.array([1, -1, -1, 1]) * math.sqrt(3) / 2, rtol=1e-5)
    assert not sample.is_clipped_G.any()


def test_the_other_baselines_by_hand():
    rewards_G = np.array([1.0, 0.0, 0.0, 1.0])
    rloo = group_advantages(rewards_G, ALL_VALID, "rloo")
    np.testing.assert_allclose(rloo.advantages_G, [2 / 3, -2 / 3, -2 / 3, 2 / 3])
    # The others of the first are 0, 0, 1: mean 1/3, sample variance 1/3.
    left_out = group_advantages(rewards_G, ALL_VALID, "leave_one_out")
    np.testing.assert_allclose(left_out.advantages_G, np.array([1, -1, -1, 1]) * 2 / math.sqrt(3), rtol=1e-5)
    # Over both groups: mean 1/2, sample variance 8/4 / 7.
    batch = group_advantages(np.array([rewards_G, [1.0, 1.0, 0.0, 0.0]]), np.ones((2, 4), bool), "batch")
    np.testing.assert_allclose(batch.advantages_G[1], np.array([1, 1, -1, -1]) / 2 / math.sqrt(2 / 7), rtol=1e-5)


def test_one_deviation_for_all_groups_by_hand():
    rewards_PG = np.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.3, 0.3], [0.2, 0.9, 0.9, 0.9]])
    valid_PG = np.array([[True] * 4, [True] * 4, [True, False, False, False]])
    # Squares 4 / 4 and 4 / 100 about means of 1/2 and .4, three of four free in each; one alone says nothing.
    found = group_advantages(rewards_PG, valid_PG, "batch_std", epsilon=0.0)
    expected_PG = np.array([[0.5, -0.5, -0.5, 0.5], [0.1, 0.1, -0.1, -0.1], [0.0] * 4]) / math.sqrt(1.04 / 6)
    np.testing.assert_allclose(found.advantages_G, expected_PG, rtol=1e-12)


def test_a_lone_winner_is_at_the_clip_unless_the_std_has_a_floor():
    lone_G = np.array([0.0, 0.0, 0.3, 0.0])
    assert group_advantages(lone_G, ALL_VALID, "leave_one_out").advantages_G[2] == 3.0
    floored = group_advantages(lone_G, ALL_VALID, "leave_one_out", std_floor=0.2, epsilon=0.0)
    np.testing.assert_allclose(floored.advantages_G[2], 1.5)
    group = group_advantages(lone_G, ALL_VALID, "grpo", std_floor=0.5, epsilon=0.0)
    np.testing.assert_allclose(group.advantages_G, [-0.15, -0.15, 0.45, -0.15])


def test_epsilon_is_added_to_the_std():
    result = group_advantages(np.array([1.0, -1.0]), np.ones(2, bool), std_ddof=0, epsilon=1.0)
    np.testing.assert_allclose(result.advantages_G, [0.5, -0.5])


def test_invalid_members_enter_no_statistic_and_get_zero():
    rewards_G = np.array([1.0, np.nan, 0.0, 500.0, 0.5])
    valid_G = np.array([True, False, True, False, True])
    result = group_advantages(rewards_G, valid_G, epsilon=0.0)
    np.testing.assert_allclose(result.advantages_G, [1.0, 0.0, -1.0, 0.0, 0.0])


@pytest.mark.parametrize("valid_G", [[True, False, False], [False, False, False]])
def test_fewer_than_two_valid_give_zero(valid_G):
    result = group_advantages(np.array([1.0, 2.0, 3.0]), np.array(valid_G))
    np.testing.assert_array_equal(result.advantages_G, np.zeros(3))


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_shift_changes_nothing(kind):
    rng = np.random.default_rng(0)
    rewards_G, valid_G = rng.normal(size=8), rng.uniform(size=8) < 0.7
    base = group_advantages(rewards_G, valid_G, kind)
    moved = group_advantages(rewards_G + 7.5, valid_G, kind)
    np.testing.assert_allclose(moved.advantages_G, base.advantages_G, atol=1e-9)
    if kind != "leave_one_out":  # whose scale differs from rollout to rollout
        assert abs(base.advantages_G.sum()) < 1e-9


def test_scale_changes_nothing_only_with_the_std():
    rewards_G = np.random.default_rng(1).normal(size=8)
    valid_G = np.ones(8, bool)

    def scaled(factor, kind):
        return group_advantages(factor * rewards_G, valid_G, kind, epsilon=1e-12).advantages_G

    for kind in ("grpo", "leave_one_out", "batch", "batch_std"):
        np.testing.assert_allclose(scaled(100.0, kind), scaled(1.0, kind), rtol=1e-9)
    for kind in ("dr_grpo", "rloo"):
        np.testing.assert_allclose(scaled(0.5, kind), 0.5 * scaled(1.0, kind), rtol=1e-9)


def test_clip_is_reported():
    # One winner among n = 16: (n - 1) / sqrt(n) = 3.75 sample standard deviations.
    rewards_G = np.zeros(16)
    rewards_G[3] = 1.0
    result = group_advantages(rewards_G, np.ones(16, bool))
    assert result.advantages_G[3] == 3.0
    np.testing.assert_array_equal(np.flatnonzero(result.is_clipped_G), [3])
    free = group_advantages(rewards_G, np.ones(16, bool), clip=math.inf)
    assert free.advantages_G[3] == pytest.approx(3.75, rel=1e-4) and not free.is_clipped_G.any()


def test_groups_are_independent():
    rng = np.random.default_rng(2)
    rewards_PG, valid_PG = rng.normal(size=(5, 6)), rng.uniform(size=(5, 6)) < 0.5
    together = group_advantages(rewards_PG, valid_PG)
    homogeneous_P = is_homogeneous(rewards_PG, valid_PG, 0.6)
    for p in range(5):
        alone = group_advantages(rewards_PG[p], valid_PG[p])
        np.testing.assert_allclose(together.advantages_G[p], alone.advantages_G, atol=1e-12)
        assert homogeneous_P[p] == is_homogeneous(rewards_PG[p], valid_PG[p], 0.6)
    assert 0 < homogeneous_P.sum() < 5


def test_filter_by_hand():
    # Sample std of (0.5, 0.5, 0.5, 0.7) is 0.1, the population's 0.0866.
    rewards_G = np.array([0.5, 0.5, 0.5, 0.7])
    assert is_homogeneous(rewards_G, ALL_VALID, 0.101) is True
    assert is_homogeneous(rewards_G, ALL_VALID, 0.099) is False
    assert is_homogeneous(rewards_G, ALL_VALID, 0.099, std_ddof=0) is True
    assert group_reasons(rewards_G[None], ALL_VALID[None], min_std=0.099)[0] is None
    assert group_reasons(rewards_G[None], ALL_VALID[None], min_std=0.101)[0] is FilterReason.HOMOGENEOUS
    assert group_reasons(np.ones(4)[None], ALL_VALID[None], min_std=0.0)[0] is None


def test_filter_looks_at_valid_members_only():
    rewards_G = np.array([1.0, 1.0, 0.0, np.nan])

    def reason(valid_G, min_std):
        return group_reasons(rewards_G[None], np.array([valid_G], bool), min_std=min_std)[0]

    assert reason([1, 1, 0, 0], 0.1) is FilterReason.HOMOGENEOUS
    assert reason([1, 0, 1, 0], 0.1) is None
    assert reason([0, 0, 1, 0], 0.0) is FilterReason.TOO_FEW_VALID


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="std_ddof 2"):
        group_advantages(np.ones(4), ALL_VALID, std_ddof=2)
    with pytest.raises(ValueError, match="'ppo'"):
        group_advantages(np.ones(4), ALL_VALID, "ppo")
    with pytest.raises(ValueError, match="clip 0"):
        group_advantages(np.ones(4), ALL_VALID, clip=0)
