"""From raw objective values to coordinates in [0, 1], where 1 is best. Neither weights nor the gate are known here.

Range rules:
    "group"      ToolOrchestra (section 3.2): min and max over all valid rollouts of the group, zeros included, and 0
                 where max == min. It stretches whatever difference is left to a full unit; `range_floor` bounds that:
                 a range narrower than the floor is widened to it, and lies as near to reference_low..reference_low +
                 floor as the group's values let it. Where all values lie in there, the coordinate is that of
                 "reference" with the floor for its range: no other rollout matters, and what is maximised is a fixed
                 utility. Widened at the worst value of the group instead, the zero point would move with the group, and
                 through the gate what a right answer is worth (docs/ablations.md).
    "correct"    The same over the valid rollouts with outcome 1 alone; the outcome, which is constant among them, keeps
                 its reference range. A wrong answer says nothing of what an answer costs. Without any right answer: as
                 "group".
    "reference"  min and max are the declared reference points and values are clipped to them; no other rollout matters.

An objective that is not gated is measured against its reference points under every rule: a broken constraint is no
better for being broken by the whole group.

By hand: costs of $0.02, $0.06, $0.10 and "minimize" are 1, 0.5, 0 under "group"; with a floor of $0.16, and so a range
of $0 to $0.16, they are 0.875, 0.625, 0.375; with reference points $0 and $0.20 they are 0.9, 0.7, 0.5 under
"reference".

Shape suffixes: G rollouts of a group, M objectives. All arrays take leading dims too, as in [P, G, M] for P groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orchestra_jax.rewards.objectives import Objective, is_gated, outcome_index

ROUNDING = 1e-9  # as a share of the value: the same charges added in another order are one cost


def _reference_range(vectors_GM, objectives, valid_G):
    del vectors_GM, valid_G
    low_M = np.array([objective.reference_low for objective in objectives], dtype=np.float64)
    high_M = np.array([objective.reference_high for objective in objectives], dtype=np.float64)
    return low_M, high_M, high_M - low_M


def _group_range(vectors_GM, objectives, valid_G):
    reference_low_M, reference_high_M, reference_span_M = _reference_range(vectors_GM, objectives, valid_G)
    floor_M = np.array([objective.range_floor for objective in objectives], dtype=np.float64)
    is_valid_G1, has_any_11 = valid_G[..., None], valid_G.any(axis=-1)[..., None, None]
    low_1M = np.where(is_valid_G1, vectors_GM, np.inf).min(axis=-2, keepdims=True)
    high_1M = np.where(is_valid_G1, vectors_GM, -np.inf).max(axis=-2, keepdims=True)
    low_1M, high_1M = np.where(has_any_11, low_1M, 0.0), np.where(has_any_11, high_1M, 0.0)
    is_constant_1M = high_1M - low_1M <= ROUNDING * np.maximum(np.abs(low_1M), np.abs(high_1M))
    span_1M = np.maximum(np.where(is_constant_1M, 0.0, high_1M - low_1M), floor_M)
    is_narrow_1M = high_1M - low_1M < floor_M
    low_1M = np.where(is_narrow_1M, np.clip(reference_low_M, high_1M - floor_M, low_1M), low_1M)
    high_1M = np.where(is_narrow_1M, low_1M + floor_M, high_1M)
    is_gated_M = is_gated(objectives)
    return (
        np.where(is_gated_M, low_1M, reference_low_M),
        np.where(is_gated_M, high_1M, reference_high_M),
        np.where(is_gated_M, span_1M, reference_span_M),
    )


def _correct_range(vectors_GM, objectives, valid_G):
    index = outcome_index(objectives)
    correct_G = valid_G & (vectors_GM[..., index] == 1.0)
    used_G = np.where(correct_G.any(axis=-1)[..., None], correct_G, valid_G)
    ranges = _group_range(vectors_GM, objectives, used_G)
    is_outcome_M = np.arange(len(objectives)) == index
    reference = _reference_range(vectors_GM, objectives, valid_G)
    return tuple(np.where(is_outcome_M, reference_M, each) for reference_M, each in zip(reference, ranges))


# Each rule gives (low, high, span), [M] or [..., 1, M]: values are clipped to low..high and divided by span.
RANGE_RULES = {"group": _group_range, "correct": _correct_range, "reference": _reference_range}


def coordinates(
    vectors_GM: np.ndarray, objectives: Sequence[Objective], valid_G: np.ndarray, range_rule: str
) -> tuple[np.ndarray, np.ndarray]:
    """Maps every coordinate to [0, 1], where 1 is best, and says which coordinates have a range at all.

    Args:
      vectors_GM: [..., G, M] raw values, each in its objective's unit.
      objectives: M of them.
      valid_G: [..., G] bool; the other rollouts enter no statistic, and their rows may hold anything.
      range_rule: a key of RANGE_RULES.

    Returns:
      [..., G, M] float64, 0 in rows of invalid rollouts and in coordinates without a range; and [..., G, M] bool.

    Raises:
      ValueError: an unknown range rule.
    """
    if range_rule not in RANGE_RULES:
        raise ValueError(f"range_rule {range_rule!r} must be one of {sorted(RANGE_RULES)}")
    vectors_GM, valid_G = np.asarray(vectors_GM, dtype=np.float64), np.asarray(valid_G, dtype=bool)
    shape = (*valid_G.shape, len(objectives))
    assert vectors_GM.shape == shape, f"vectors_GM has shape {vectors_GM.shape}, expected {shape}"
    is_valid_G1 = valid_G[..., None]
    assert (np.isfinite(vectors_GM) | ~is_valid_G1).all(), "a valid rollout has a non-finite objective"
    vectors_GM = np.minimum(vectors_GM, [objective.cap for objective in objectives])
    low_M, high_M, span_M = RANGE_RULES[range_rule](vectors_GM, objectives, valid_G)
    clipped_GM = np.clip(np.where(is_valid_G1, vectors_GM, low_M), low_M, high_M)
    is_maximized_M = np.array([objective.direction == "maximize" for objective in objectives])
    gain_GM = np.where(is_maximized_M, clipped_GM - low_M, high_M - clipped_GM)
    has_range_GM = np.broadcast_to(span_M > 0, shape)
    normalized_GM = np.where(has_range_GM, gain_GM / np.where(span_M > 0, span_M, 1.0), 0.0)
    return np.where(is_valid_G1, normalized_GM, 0.0), has_range_GM


def normalize(
    vectors_GM: np.ndarray, objectives: Sequence[Objective], valid_G: np.ndarray, range_rule: str
) -> np.ndarray:
    """The coordinates of `coordinates` alone."""
    return coordinates(vectors_GM, objectives, valid_G, range_rule)[0]
