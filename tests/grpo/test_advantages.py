"""Group advantages and the group filter: hand numbers, invariances, masked members."""

import math

import numpy as np
import pytest

from orchestra_jax.grpo.advantages import FilterReason, filter_group, group_advantages, is_homogeneous

ALL_VALID = np.ones(4, bool)


def test_by_hand():
    rewards_G = np.array([1.0, 0.0, 0.0, 1.0])
    centred = group_advantages(rewards_G, ALL_VALID, divide_by_std=False)
    np.testing.assert_array_equal(centred.advantages_G, [0.5, -0.5, -0.5, 0.5])
    # Population std is 1/2, the sample's sqrt(4/3)/2.
    population = group_advantages(rewards_G, ALL_VALID, divide_by_std=True, std_ddof=0)
    np.testing.assert_allclose(population.advantages_G, [1, -1, -1, 1], rtol=1e-5)
    sample = group_advantages(rewards_G, ALL_VALID, divide_by_std=True)
    np.testing.assert_allclose(sample.advantages_G, np.array([1, -1, -1, 1]) * math.sqrt(3) / 2, rtol=1e-5)
    assert not sample.is_clipped_G.any()


def test_epsilon_is_added_to_the_std():
    result = group_advantages(np.array([1.0, -1.0]), np.ones(2, bool), divide_by_std=True, std_ddof=0, epsilon=1.0)
    np.testing.assert_allclose(result.advantages_G, [0.5, -0.5])


def test_invalid_members_enter_no_statistic_and_get_zero():
    rewards_G = np.array([1.0, np.nan, 0.0, 500.0, 0.5])
    valid_G = np.array([True, False, True, False, True])
    result = group_advantages(rewards_G, valid_G, divide_by_std=True, epsilon=0.0)
    np.testing.assert_allclose(result.advantages_G, [1.0, 0.0, -1.0, 0.0, 0.0])


@pytest.mark.parametrize("valid_G", [[True, False, False], [False, False, False]])
def test_fewer_than_two_valid_give_zero(valid_G):
    result = group_advantages(np.array([1.0, 2.0, 3.0]), np.array(valid_G), divide_by_std=True)
    np.testing.assert_array_equal(result.advantages_G, np.zeros(3))


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_shift_changes_nothing(divide_by_std):
    rng = np.random.default_rng(0)
    rewards_G, valid_G = rng.normal(size=8), rng.uniform(size=8) < 0.7
    base = group_advantages(rewards_G, valid_G, divide_by_std=divide_by_std)
    moved = group_advantages(rewards_G + 7.5, valid_G, divide_by_std=divide_by_std)
    np.testing.assert_allclose(moved.advantages_G, base.advantages_G, atol=1e-9)
    assert abs(base.advantages_G.sum()) < 1e-9


def test_scale_changes_nothing_only_with_the_std():
    rewards_G = np.random.default_rng(1).normal(size=8)
    valid_G = np.ones(8, bool)

    def scaled(factor, divide_by_std):
        return group_advantages(factor * rewards_G, valid_G, divide_by_std=divide_by_std, epsilon=1e-12).advantages_G

    np.testing.assert_allclose(scaled(100.0, True), scaled(1.0, True), rtol=1e-9)
    np.testing.assert_allclose(scaled(0.5, False), 0.5 * scaled(1.0, False), rtol=1e-9)


def test_clip_is_reported():
    # One winner among n = 16: (n - 1) / sqrt(n) = 3.75 sample standard deviations.
    rewards_G = np.zeros(16)
    rewards_G[3] = 1.0
    result = group_advantages(rewards_G, np.ones(16, bool), divide_by_std=True)
    assert result.advantages_G[3] == 3.0
    np.testing.assert_array_equal(np.flatnonzero(result.is_clipped_G), [3])
    free = group_advantages(rewards_G, np.ones(16, bool), divide_by_std=True, clip=math.inf)
    assert free.advantages_G[3] == pytest.approx(3.75, rel=1e-4) and not free.is_clipped_G.any()


def test_groups_are_independent():
    rng = np.random.default_rng(2)
    rewards_PG, valid_PG = rng.normal(size=(5, 6)), rng.uniform(size=(5, 6)) < 0.5
    together = group_advantages(rewards_PG, valid_PG, divide_by_std=True)
    homogeneous_P = is_homogeneous(rewards_PG, valid_PG, 0.6)
    for p in range(5):
        alone = group_advantages(rewards_PG[p], valid_PG[p], divide_by_std=True)
        np.testing.assert_allclose(together.advantages_G[p], alone.advantages_G, atol=1e-12)
        assert homogeneous_P[p] == is_homogeneous(rewards_PG[p], valid_PG[p], 0.6)
    assert 0 < homogeneous_P.sum() < 5


def test_filter_by_hand():
    # Sample std of (0.5, 0.5, 0.5, 0.7) is 0.1, the population's 0.0866.
    rewards_G = np.array([0.5, 0.5, 0.5, 0.7])
    assert is_homogeneous(rewards_G, ALL_VALID, 0.101) is True
    assert is_homogeneous(rewards_G, ALL_VALID, 0.099) is False
    assert is_homogeneous(rewards_G, ALL_VALID, 0.099, std_ddof=0) is True
    assert filter_group(rewards_G, ALL_VALID, min_std=0.099) is None
    assert filter_group(rewards_G, ALL_VALID, min_std=0.101) is FilterReason.HOMOGENEOUS
    assert filter_group(np.ones(4), ALL_VALID, min_std=0.0) is None


def test_filter_looks_at_valid_members_only():
    rewards_G = np.array([1.0, 1.0, 0.0, np.nan])
    assert filter_group(rewards_G, np.array([1, 1, 0, 0]), min_std=0.1) is FilterReason.HOMOGENEOUS
    assert filter_group(rewards_G, np.array([1, 0, 1, 0]), min_std=0.1) is None
    assert filter_group(rewards_G, np.array([0, 0, 1, 0]), min_std=0.0) is FilterReason.TOO_FEW_VALID


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="std_ddof 2"):
        group_advantages(np.ones(4), ALL_VALID, divide_by_std=True, std_ddof=2)
    with pytest.raises(ValueError, match="clip 0"):
        group_advantages(np.ones(4), ALL_VALID, divide_by_std=True, clip=0)
