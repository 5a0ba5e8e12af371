"""From the unweighted objective vectors of a group to one scalar reward per rollout.

This is the preference-weighted, outcome-gated reward and the utility that evaluation reports; it is neither the scorer
of answers (outcome.py) nor the advantage (grpo/advantages.py).

    R = y * sum_{gated m} w_m n_m  -  sum_{ungated m} w_m (1 - n_m)

y is the raw value of the objective "outcome" (0 or 1), which is also one of the gated coordinates; n_m in [0, 1] is the
normalised coordinate, 1 is best; w are the weights of the instance's preference, gated ones scaled to sum 1. An ungated
objective is a constraint: a wrong answer pays for it too, its weight is taken as given, and it is always measured
against its declared reference points, since a broken constraint is no better for being broken by the whole group.

Range rules:
    "group"      ToolOrchestra (section 3.2): min and max over all valid rollouts of the group, zeros included, and 0
                 where max == min. It stretches whatever difference is left to a full unit; `range_floor` bounds that.
    "reference"  min and max are the declared reference points and values are clipped to them. With outcome 0..1,
                 cost 0..c_ref, latency 0..l_ref and disallowed calls 0..1 the reward is, exactly,
                     U = y (w_o + w_c (1 - min(c / c_ref, 1)) + w_l (1 - min(l / l_ref, 1))) - w_x min(d, 1).

The paper's tool coordinates are ordinary gated objectives, Objective("calls/<tool>", "maximize", 0.0, 1.0): "reference"
caps the count to used or not used; "group" compares the counts themselves, as the paper does, and so pays for repeats.

Shape suffixes: G rollouts of a group, M objectives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

OUTCOME = "outcome"
DIRECTIONS = ("maximize", "minimize")


@dataclasses.dataclass(frozen=True)
class Objective:
    """One coordinate of the objective vector; reference points and floor are in the objective's own unit."""

    name: str
    direction: str  # "maximize" or "minimize"
    reference_low: float
    reference_high: float
    range_floor: float = 0.0  # the smallest difference that "group" stretches to a full unit
    is_gated: bool = True  # False: a constraint, paid by wrong answers too

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise ValueError(f"objective {self.name!r}: direction {self.direction!r} must be one of {DIRECTIONS}")
        if not self.reference_low < self.reference_high:
            raise ValueError(
                f"objective {self.name!r}: reference_low {self.reference_low} must lie below reference_high "
                f"{self.reference_high}; say what is better by `direction`"
            )
        if not self.range_floor >= 0:
            raise ValueError(f"objective {self.name!r}: range_floor {self.range_floor} must be 0 or more")
        if self.name == OUTCOME and not (self.is_gated and self.direction == "maximize"):
            raise ValueError(f"objective {OUTCOME!r} is the gate itself: it must be gated and maximized")


def objective_vector(values: Mapping[str, float], objectives: Sequence[Objective]) -> np.ndarray:
    """Orders named values (a trajectory's objectives, or a preference's weights) as `objectives` stand.

    Returns:
      [M] float64, in each objective's own unit.

    Raises:
      ValueError: an objective has no value.
    """
    missing = [objective.name for objective in objectives if objective.name not in values]
    if missing:
        raise ValueError(f"no value for the objectives {missing}; there are values for {sorted(values)}")
    return np.array([values[objective.name] for objective in objectives], dtype=np.float64)


def _reference_range(vectors_GM, objectives, valid_G):
    del vectors_GM, valid_G
    low_M = np.array([objective.reference_low for objective in objectives], dtype=np.float64)
    high_M = np.array([objective.reference_high for objective in objectives], dtype=np.float64)
    return low_M, high_M, high_M - low_M


def _group_range(vectors_GM, objectives, valid_G):
    reference_low_M, reference_high_M, reference_span_M = _reference_range(vectors_GM, objectives, valid_G)
    is_gated_M = np.array([objective.is_gated for objective in objectives])
    floor_M = np.array([objective.range_floor for objective in objectives], dtype=np.float64)
    low_M, high_M = vectors_GM[valid_G].min(axis=0), vectors_GM[valid_G].max(axis=0)
    return (
        np.where(is_gated_M, low_M, reference_low_M),
        np.where(is_gated_M, high_M, reference_high_M),
        np.where(is_gated_M, np.maximum(high_M - low_M, floor_M), reference_span_M),
    )


# Each rule gives (low_M, high_M, span_M): values are clipped to low..high and divided by span.
RANGE_RULES = {"group": _group_range, "reference": _reference_range}


def normalize(
    vectors_GM: np.ndarray, objectives: Sequence[Objective], valid_G: np.ndarray, range_rule: str
) -> np.ndarray:
    """Maps every coordinate to [0, 1], where 1 is best.

    Args:
      vectors_GM: [G, M] raw values, each in its objective's unit.
      objectives: M of them.
      valid_G: [G] bool; the other rollouts enter no statistic, and their rows may hold anything.
      range_rule: a key of RANGE_RULES.

    Returns:
      [G, M] float64; rows of invalid rollouts are 0.

    Raises:
      ValueError: an unknown range rule.
    """
    if range_rule not in RANGE_RULES:
        raise ValueError(f"range_rule {range_rule!r} must be one of {sorted(RANGE_RULES)}")
    vectors_GM, valid_G = np.asarray(vectors_GM, dtype=np.float64), np.asarray(valid_G, dtype=bool)
    shape = (len(valid_G), len(objectives))
    assert vectors_GM.shape == shape, f"vectors_GM has shape {vectors_GM.shape}, expected {shape}"
    assert np.isfinite(vectors_GM[valid_G]).all(), f"a valid rollout has a non-finite objective: {vectors_GM[valid_G]}"
    normalized_GM = np.zeros(shape)
    if not valid_G.any():
        return normalized_GM
    low_M, high_M, span_M = RANGE_RULES[range_rule](vectors_GM, objectives, valid_G)
    clipped_VM = np.clip(vectors_GM[valid_G], low_M, high_M)  # V: the valid rollouts
    is_maximized_M = np.array([objective.direction == "maximize" for objective in objectives])
    gain_VM = np.where(is_maximized_M, clipped_VM - low_M, high_M - clipped_VM)
    normalized_GM[valid_G] = np.where(span_M > 0, gain_VM / np.where(span_M > 0, span_M, 1.0), 0.0)
    return normalized_GM


def _normalized_weights(weights_M, objectives):
    """Gated weights scaled to sum 1; ungated ones as given."""
    weights_M = np.asarray(weights_M, dtype=np.float64)
    assert weights_M.shape == (len(objectives),), (
        f"weights_M has shape {weights_M.shape}, for {len(objectives)} objectives"
    )
    named = {objective.name: float(weight) for objective, weight in zip(objectives, weights_M, strict=True)}
    if not (np.isfinite(weights_M).all() and (weights_M >= 0).all()):
        raise ValueError(f"weights must be finite and non-negative, got {named}; what is better is said by `direction`")
    is_gated_M = np.array([objective.is_gated for objective in objectives])
    total = weights_M[is_gated_M].sum()
    if total == 0:
        raise ValueError(
            f"the weights of the gated objectives are all zero, got {named}; give at least one of them weight"
        )
    return np.where(is_gated_M, weights_M / total, weights_M)


def preference_reward(
    vectors_GM: np.ndarray,
    weights_M: np.ndarray,
    objectives: Sequence[Objective],
    valid_G: np.ndarray,
    range_rule: str,
) -> np.ndarray:
    """The reward of each rollout of one group, by the formula at the top of this file.

    Args:
      vectors_GM: [G, M] raw values, each in its objective's unit; "outcome" is 0 or 1.
      weights_M: [M] non-negative weights of the group's preference.
      objectives: M of them, "outcome" among them.
      valid_G: [G] bool; False where a rollout says nothing about the policy.
      range_rule: a key of RANGE_RULES.

    Returns:
      [G] float64: at most 1, and at least 0 without ungated objectives. Invalid rollouts get 0.

    Raises:
      ValueError: no "outcome" among the objectives, or one that is neither 0 nor 1; a negative weight, or no gated
        weight at all; an unknown range rule.
    """
    names = [objective.name for objective in objectives]
    if OUTCOME not in names:
        raise ValueError(f"the reward is gated by the objective {OUTCOME!r}, which is missing from {names}")
    weights_M = _normalized_weights(weights_M, objectives)
    normalized_GM = normalize(vectors_GM, objectives, valid_G, range_rule)
    valid_G = np.asarray(valid_G, dtype=bool)
    outcome_G = np.where(valid_G, np.asarray(vectors_GM, dtype=np.float64)[:, names.index(OUTCOME)], 0.0)
    # A fractional outcome would enter twice, as gate and as coordinate, and be squared.
    if not np.isin(outcome_G, (0.0, 1.0)).all():
        raise ValueError(
            f"outcomes must be 0 or 1, got {outcome_G.tolist()}; decide partial credit where answers are scored"
        )
    is_gated_M = np.array([objective.is_gated for objective in objectives])
    gated_G = (normalized_GM * np.where(is_gated_M, weights_M, 0.0)).sum(axis=1)
    penalty_G = ((1.0 - normalized_GM) * np.where(is_gated_M, 0.0, weights_M)).sum(axis=1)
    return np.where(valid_G, outcome_G * gated_G - penalty_G, 0.0)


def utility(vector_M: np.ndarray, weights_M: np.ndarray, objectives: Sequence[Objective]) -> float:
    """U of one rollout: `preference_reward` under the "reference" rule, where no other rollout matters.

    The expected utility of a success probability p is p * U(outcome=1) + (1 - p) * U(outcome=0).
    """
    vectors_GM = np.asarray(vector_M, dtype=np.float64)[np.newaxis]
    return float(preference_reward(vectors_GM, weights_M, objectives, np.array([True]), "reference")[0])
