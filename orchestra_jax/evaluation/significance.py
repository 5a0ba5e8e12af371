"""Is a difference more than the luck of the draw? Paired tests over the held-out instances of one run.

Every policy plays the same draws (task, offers, prices), and every draw is played once under each preference, so all
comparisons are paired: by instance, and for obedience by draw between two preferences. What is resampled is the draw,
with all its preferences together, because the instances of one draw are not independent. Nothing here speaks of the
luck of *training*: that takes runs with several seeds.

    score   = (U - U_random) / (U_optimum - U_random), U the mean utility of a preference   (baselines.scores)
    p-value = (1 + number of resamples at least as extreme) / (1 + number of resamples)
    (Davison & Hinkley, Bootstrap Methods and their Application, section 4.2: the 1 keeps it above zero)

Shapes: I instances = P preferences x N draws, preference after preference; R resamples; S statistics
(oracle.STATISTICS).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from orchestra_jax.evaluation.oracle import STATISTICS

CONFIDENCE = 0.95
# What a preference asks for: (name, preference, the one that it is measured against, statistic, wanted direction).
OBEDIENCE = (
    ("cheap", "cheap", "balanced", "cost_usd", -1),
    ("fast", "fast", "balanced", "latency_s", -1),
    ("outcome", "outcome", "balanced", "accuracy", 1),
    ("cheap_against_outcome", "cheap", "outcome", "cost_usd", -1),  # the ends of the scale
)


def paired_bootstrap(
    utilities_I: np.ndarray,
    baseline_utilities_I: np.ndarray,
    random_I: np.ndarray,
    optimal_I: np.ndarray,
    preference_I: Sequence[str],
    seed: int,
    num_resamples: int = 2000,
) -> dict[str, float]:
    """Compares the mean score of a policy (mean over preferences) with a baseline's by resampling the draws.

    Args:
      utilities_I: [I] expected utility of the policy on each instance.
      baseline_utilities_I: [I] of the baseline.
      random_I: [I] of the random policy, which scores 0.
      optimal_I: [I] of the optimum, which scores 1.
      preference_I: [I] names; preference after preference, each over the same N draws in the same order.
      seed: of the resampling.
      num_resamples: R.

    Returns:
      "difference": score of the policy - score of the baseline.
      "low", "high": its 95 % percentile interval.
      "p_value": the bootstrap probability that the difference is 0 or less; between 1 / (R + 1) and 1.

    Raises:
      ValueError: the instances do not stand preference after preference with N draws each, or in a resample the optimum
        is no better than the random policy (too few draws for a score).
    """
    num_preferences = _num_blocks(preference_I)
    gain_PN, span_PN = (
        (np.asarray(above_I, float) - np.asarray(below_I, float)).reshape(num_preferences, -1)
        for above_I, below_I in ((utilities_I, baseline_utilities_I), (optimal_I, random_I))
    )
    num_draws = gain_PN.shape[1]
    # How often each draw is in each resample; row 0 is the sample itself.
    counts_RN = np.random.default_rng(seed).multinomial(num_draws, np.full(num_draws, 1 / num_draws), num_resamples)
    counts_RN = np.concatenate([np.ones((1, num_draws)), counts_RN])
    span_RP = counts_RN @ span_PN.T
    if not (span_RP > 0).all():
        raise ValueError(
            f"with {num_draws} draws the optimum does not beat the random policy in every resample: "
            "evaluate on more tasks"
        )
    difference_R = ((counts_RN @ gain_PN.T) / span_RP).mean(axis=1)
    difference, resampled_R = difference_R[0], difference_R[1:]
    low, high = np.quantile(resampled_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {
        "difference": float(difference),
        "low": float(low),
        "high": float(high),
        "p_value": (1 + int((resampled_R <= 0).sum())) / (1 + num_resamples),
    }


def permutation_p_value(a_N: np.ndarray, b_N: np.ndarray, seed: int, num_permutations: int = 2000) -> float:
    """One-sided paired permutation test: how likely a mean of `a - b` this large is if a and b can be exchanged.

    Args:
      a_N: [N] values that are claimed to be larger.
      b_N: [N] values paired with them.
      seed: of the sign flips.
      num_permutations: sign flips of all N differences.

    Returns:
      The p-value, between 1 / (num_permutations + 1) and 1; 1 if a == b.

    Raises:
      ValueError: a and b have different shapes, or are no vectors.
    """
    a_N, b_N = np.asarray(a_N, float), np.asarray(b_N, float)
    if a_N.shape != b_N.shape or a_N.ndim != 1:
        raise ValueError(f"paired values have one shape [N], got {a_N.shape} and {b_N.shape}")
    difference_N = a_N - b_N
    flips_RN = np.random.default_rng(seed).integers(0, 2, (num_permutations, len(difference_N)), dtype=np.int8) * 2 - 1
    tie = 1e-12 * np.abs(difference_N).sum()  # sums of the same numbers in another order differ by rounding
    num_extreme = int((flips_RN @ difference_N >= difference_N.sum() - tie).sum())
    return (1 + num_extreme) / (1 + num_permutations)


def obedience(
    statistics: Mapping[str, np.ndarray], optimal: Mapping[str, np.ndarray], seed: int = 0
) -> dict[str, dict[str, object]]:
    """Does a policy move as the preference asks: cheaper under "cheap", faster under "fast", more often right under
    "outcome", each against itself under "balanced" on the same draws; and cheaper under "cheap" than under "outcome"?

    Args:
      statistics: [N, S] of the policy by preference; row n is the same draw under every preference.
      optimal: [N, S] of the optimum by preference.
      seed: of the permutation test.

    Returns:
      By name (those of OBEDIENCE whose two preferences are there):
      "statistic": its name; "move": the mean under the preference - under the other one, in the statistic's unit;
      "optimal_move": the optimum's; "share": move / optimal_move, 1 is full obedience and below 0 the wrong way, None
      where the optimum itself does not move as asked; "p_value": one-sided, that the policy does not move as asked.
    """
    moves = {}
    for name, preference, reference, statistic, direction in OBEDIENCE:
        if not {preference, reference} <= statistics.keys():
            continue
        column = STATISTICS.index(statistic)
        policy_N, reference_N = (statistics[each][:, column] for each in (preference, reference))
        move = float((policy_N - reference_N).mean())
        optimal_move = float((optimal[preference] - optimal[reference])[:, column].mean())
        moves[name] = {
            "statistic": statistic,
            "move": move,
            "optimal_move": optimal_move,
            "share": move / optimal_move if direction * optimal_move > 0 else None,
            "p_value": permutation_p_value(direction * policy_N, direction * reference_N, seed),
        }
    return moves


def _num_blocks(preference_I):
    """The number of preferences, once their instances are known to stand in blocks of one size."""
    preference_I = np.asarray(preference_I)
    names = list(dict.fromkeys(preference_I.tolist()))
    if not names or not np.array_equal(preference_I, np.repeat(names, len(preference_I) // len(names))):
        raise ValueError(f"instances must stand preference after preference, with equally many of each of {names}")
    return len(names)
