"""Paired tests over draws: known shifts are found, no shift is not, signs and blocks are handled."""

import numpy as np
import pytest

from orchestra_jax.evaluation.oracle import STATISTICS
from orchestra_jax.evaluation.significance import obedience, paired_bootstrap, permutation_p_value

NUM_DRAWS = 40


def two_preferences(gain_first, gain_second, seed=0):
    """Arguments of paired_bootstrap: the span is 0.5 under the first preference and 0.25 under the second."""
    rng = np.random.default_rng(seed)
    random_I = rng.random(2 * NUM_DRAWS)
    optimal_I = random_I + np.repeat([0.5, 0.25], NUM_DRAWS)
    baseline_I = random_I + 0.1
    policy_I = baseline_I + np.repeat([gain_first, gain_second], NUM_DRAWS)
    return policy_I, baseline_I, random_I, optimal_I, np.repeat(["cheap", "fast"], NUM_DRAWS)


def test_a_constant_gain_is_the_mean_of_the_preferences_scores():
    # 0.05 / 0.5 = 0.1 under the first, 0.05 / 0.25 = 0.2 under the second.
    comparison = paired_bootstrap(*two_preferences(0.05, 0.05), seed=0, num_resamples=999)
    assert [comparison[name] for name in ("difference", "low", "high")] == pytest.approx([0.15] * 3)
    assert comparison["p_value"] == 1 / 1000


def test_a_policy_that_is_worse_or_the_same_has_probability_one():
    # A gain of 0.05 under one preference, a loss worth twice the score under the other.
    comparison = paired_bootstrap(*two_preferences(0.05, -0.05), seed=0, num_resamples=99)
    assert comparison["difference"] == pytest.approx(-0.05) and comparison["p_value"] == 1.0
    policy_I, _, *others = two_preferences(0.0, 0.0)
    same = paired_bootstrap(policy_I, policy_I, *others, seed=0, num_resamples=99)
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}


def test_draws_are_resampled_with_their_preferences_together():
    # What a draw gains under one preference it loses under the other: then every resample has difference 0.
    gain_N = np.random.default_rng(1).normal(size=NUM_DRAWS)
    zeros_I, ones_I = np.zeros(2 * NUM_DRAWS), np.ones(2 * NUM_DRAWS)
    preferences = ["a"] * NUM_DRAWS + ["b"] * NUM_DRAWS
    comparison = paired_bootstrap(
        np.concatenate([gain_N, -gain_N]), zeros_I, zeros_I, ones_I, preferences, seed=0, num_resamples=200
    )
    assert [comparison[name] for name in ("difference", "low", "high")] == pytest.approx([0.0] * 3, abs=1e-12)


def test_the_interval_has_the_width_of_the_standard_error():
    # Span 1: the difference is the mean of 400 gains of standard deviation 1, so its standard error is 0.05.
    gain_N = np.random.default_rng(2).normal(size=400)
    gain_N = (gain_N - gain_N.mean()) / gain_N.std() + 0.1
    zeros_N = np.zeros(400)
    comparison = paired_bootstrap(gain_N, zeros_N, zeros_N, zeros_N + 1, ["a"] * 400, seed=0, num_resamples=4000)
    assert comparison["difference"] == pytest.approx(0.1)
    assert comparison["low"] == pytest.approx(0.1 - 1.96 * 0.05, abs=0.01)
    assert comparison["high"] == pytest.approx(0.1 + 1.96 * 0.05, abs=0.01)
    assert comparison["p_value"] == pytest.approx(0.0228, abs=0.01)  # two standard errors below the mean


@pytest.mark.parametrize("preferences", [["a", "b"] * 4, ["a"] * 5 + ["b"] * 3, ["a"] * 3 + ["b"] * 3 + ["a"] * 2, []])
def test_instances_out_of_order_are_refused(preferences):
    ones = np.ones(len(preferences))
    with pytest.raises(ValueError, match="preference after preference"):
        paired_bootstrap(ones, 0 * ones, 0 * ones, ones, preferences, seed=0)


def test_too_few_draws_for_a_score_are_refused():
    # One of three draws alone separates the optimum from random: some resample misses it.
    with pytest.raises(ValueError, match="with 3 draws the optimum does not beat the random policy in every resample"):
        paired_bootstrap(np.ones(3), np.zeros(3), np.zeros(3), np.array([1.0, 0, 0]), ["a"] * 3, seed=0)


def test_permutation_p_value_of_shifts():
    values_N = np.random.default_rng(0).random(30)
    assert permutation_p_value(values_N + 0.1, values_N, seed=0, num_permutations=999) == 1 / 1000
    assert permutation_p_value(values_N, values_N + 0.1, seed=0, num_permutations=999) == 1.0
    assert permutation_p_value(values_N, values_N, seed=0, num_permutations=999) == 1.0


def test_permutation_p_value_of_three_pairs_counts_ties():
    # 8 sign patterns; only the one of all pluses reaches the observed sum, which itself is one of them.
    assert permutation_p_value(np.array([0.1, 0.2, 0.3]), np.zeros(3), 0, 20_000) == pytest.approx(1 / 8, abs=0.01)
    # Sums of +-1: 7 of 8 patterns reach the observed -1.
    assert permutation_p_value(np.array([1.0, -1.0, -1.0]), np.zeros(3), 0, 20_000) == pytest.approx(7 / 8, abs=0.01)


def test_permutation_p_values_without_an_effect_are_uniform():
    rng = np.random.default_rng(3)
    p_values = [permutation_p_value(rng.normal(size=20), rng.normal(size=20), seed, 200) for seed in range(400)]
    shares = np.histogram(p_values, bins=5, range=(0, 1))[0] / 400
    assert np.abs(shares - 0.2).max() < 0.06  # three standard errors of 0.02


def test_permutation_refuses_unpaired_values():
    with pytest.raises(ValueError, match=r"one shape \[N\], got \(2,\) and \(3,\)"):
        permutation_p_value(np.zeros(2), np.zeros(3), seed=0)


def played(**means):
    """[N, S] statistics with these means and noise that is the same for every call, as a draw's luck is."""
    noise_N = np.random.default_rng(0).normal(scale=1e-4, size=NUM_DRAWS)
    statistics_NS = np.zeros((NUM_DRAWS, len(STATISTICS)))
    for name, mean in means.items():
        statistics_NS[:, STATISTICS.index(name)] = mean + noise_N - noise_N.mean()
    return statistics_NS


def test_obedience_by_hand():
    policy = {
        "balanced": played(cost_usd=0.010, latency_s=20.0, accuracy=0.6),
        "cheap": played(cost_usd=0.006, latency_s=30.0, accuracy=0.5),
        "fast": played(cost_usd=0.010, latency_s=22.0, accuracy=0.5),
        "outcome": played(cost_usd=0.012, latency_s=20.0, accuracy=0.6),
    }
    optimal = {
        "balanced": played(cost_usd=0.008, latency_s=20.0, accuracy=0.7),
        "cheap": played(cost_usd=0.003, latency_s=20.0, accuracy=0.7),
        "fast": played(cost_usd=0.008, latency_s=12.0, accuracy=0.7),
        "outcome": played(cost_usd=0.018, latency_s=20.0, accuracy=0.7),
    }
    moves = obedience(policy, optimal)
    assert {name: entry["statistic"] for name, entry in moves.items()} == {
        "cheap": "cost_usd",
        "fast": "latency_s",
        "outcome": "accuracy",
        "cheap_against_outcome": "cost_usd",
    }
    assert moves["cheap"]["move"] == pytest.approx(-0.004) and moves["cheap"]["optimal_move"] == pytest.approx(-0.005)
    assert moves["cheap"]["share"] == pytest.approx(0.8) and moves["cheap"]["p_value"] < 0.001
    assert moves["fast"]["share"] == pytest.approx(-0.25) and moves["fast"]["p_value"] == 1.0  # slower: the wrong way
    assert moves["outcome"]["share"] is None  # the optimum does not move either
    assert moves["outcome"]["p_value"] == 1.0
    ends = moves["cheap_against_outcome"]
    assert ends["move"] == pytest.approx(-0.006) and ends["optimal_move"] == pytest.approx(-0.015)
    assert ends["share"] == pytest.approx(0.4) and ends["p_value"] < 0.001


def test_obedience_needs_both_preferences():
    statistics = {"cheap": played(cost_usd=0.1), "fast": played(latency_s=1.0)}
    assert obedience(statistics, statistics) == {}
    with_balanced = {**statistics, "balanced": played(cost_usd=0.2, latency_s=1.0)}
    assert list(obedience(with_balanced, with_balanced)) == ["cheap", "fast"]
    ends = {"cheap": statistics["cheap"], "outcome": played(cost_usd=0.3)}
    assert list(obedience(ends, ends)) == ["cheap_against_outcome"]
