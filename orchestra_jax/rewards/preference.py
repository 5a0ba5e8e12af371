"""From the unweighted objective vectors of a group to one scalar reward per rollout.

This is the preference-weighted, outcome-gated reward and the utility that evaluation reports; it is neither the scorer
of answers (outcome.py) nor the advantage (grpo/advantages.py).

    R = y * sum_{gated m} w_m n_m  -  sum_{ungated m} w_m (1 - n_m)                              form "gated_sum"

y is the raw value of the objective "outcome" (0 or 1), which is also one of the gated coordinates; n_m in [0, 1] is the
normalised coordinate (rewards/normalization.py), 1 is best; w are the weights of the instance's preference, gated ones
scaled to sum 1. An ungated objective is a constraint: a wrong answer pays for it too and its weight is taken as given.

With the range rule "group" and no floor this is the paper's reward (ToolOrchestra, section 3.2). With "reference",
outcome 0..1, cost 0..c_ref, latency 0..l_ref and disallowed calls 0..1 it is, exactly,

    U = y (w_o + w_c (1 - min(c / c_ref, 1)) + w_l (1 - min(l / l_ref, 1))) - w_x min(d, 1).

By hand, weights 3 : 1 on outcome and cost, right answers for $0.02 and $0.06 and a wrong one for $0.10: "group" gives
3/4 + 1/4, 3/4 + 1/8 and 0. A group of the two right answers alone gives 1/4 and 0: the outcome has no range there.

Other forms, for ablation; the last term, which ungated objectives cost, is in all of them:
    "ungated_sum"            sum_{gated} w_m n_m: a cheap wrong answer is paid for being cheap.
    "weight_then_normalize"  y (s - min s) / (max s - min s), s = sum_{gated} w_m v_m / reference span (minus where less
                             is better), min and max over the group: weights meet raw values. 0 where s is constant.
    "chebyshev"              y (1 - max_{gated} w_m (1 - n_m)): the worst coordinate decides; one without a range has
                             no gap.
    "per_objective"          the components y n_m keep apart, and their group advantages are summed with weights w_m
                             (grpo/scoring.py). The rewards themselves are those of "gated_sum".
    "constrained"            (y - sum_m lambda_m (v_m - budget_m) / reference span) / (1 + sum_m lambda_m): the outcome,
                             at a price for cost and latency that rises while the budget is exceeded, and that wrong
                             answers pay too (rewards/constraints.py). Weights of gated objectives are not read.

Shape suffixes: G rollouts of a group, M objectives, C components. All arrays take leading dims too, as in [P, G, M].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from orchestra_jax.rewards.constraints import Budget, excess
from orchestra_jax.rewards.normalization import coordinates
from orchestra_jax.rewards.objectives import Objective, is_gated, outcome_index, reference_span


class Rewards(NamedTuple):
    """rewards_G is what is reported and filtered by; the advantage is that of the components, weighted and summed."""

    rewards_G: np.ndarray
    components_GC: np.ndarray
    weights_C: np.ndarray


class Terms(NamedTuple):
    """What the forms are made of; rows of invalid rollouts are 0."""

    outcome_G: np.ndarray
    vectors_GM: np.ndarray
    normalized_GM: np.ndarray
    has_range_GM: np.ndarray
    weights_M: np.ndarray  # gated ones with sum 1
    valid_G: np.ndarray
    objectives: Sequence[Objective]
    budgets: Sequence[Budget]
    multipliers: Mapping[str, float]


def _gated_weights(terms: Terms) -> np.ndarray:
    return np.where(is_gated(terms.objectives), terms.weights_M, 0.0)[..., None, :]


def _weighted_sum(terms: Terms) -> np.ndarray:
    return (terms.normalized_GM * _gated_weights(terms)).sum(axis=-1)


def _gated_sum(terms: Terms) -> np.ndarray:
    return terms.outcome_G * _weighted_sum(terms)


def _weight_then_normalize(terms: Terms) -> np.ndarray:
    signs_M = np.array([1.0 if each.direction == "maximize" else -1.0 for each in terms.objectives])
    scaled_GM = terms.vectors_GM * (signs_M / reference_span(terms.objectives))
    score_G = (scaled_GM * _gated_weights(terms)).sum(axis=-1)
    low_1 = np.where(terms.valid_G, score_G, np.inf).min(axis=-1, keepdims=True)
    high_1 = np.where(terms.valid_G, score_G, -np.inf).max(axis=-1, keepdims=True)
    has_range_1 = high_1 > low_1  # false without a valid rollout
    span_1 = np.where(has_range_1, high_1 - np.where(has_range_1, low_1, 0.0), 1.0)
    return terms.outcome_G * np.where(has_range_1, (score_G - np.where(has_range_1, low_1, 0.0)) / span_1, 0.0)


def _chebyshev(terms: Terms) -> np.ndarray:
    gap_GM = np.where(terms.has_range_GM, 1.0 - terms.normalized_GM, 0.0)
    return terms.outcome_G * (1.0 - (gap_GM * _gated_weights(terms)).max(axis=-1))


def _constrained(terms: Terms) -> np.ndarray:
    price_G, total = np.zeros_like(terms.outcome_G), 0.0
    for budget in terms.budgets:
        multiplier = terms.multipliers[budget.objective]
        price_G = price_G + multiplier * excess(terms.vectors_GM, terms.objectives, budget)
        total += multiplier
    return (terms.outcome_G - price_G) / (1.0 + total)


FORMS: dict[str, Callable[[Terms], np.ndarray]] = {
    "gated_sum": _gated_sum,
    "ungated_sum": _weighted_sum,
    "weight_then_normalize": _weight_then_normalize,
    "chebyshev": _chebyshev,
    "per_objective": _gated_sum,
    "constrained": _constrained,
}


def _penalty(terms: Terms) -> np.ndarray:
    ungated_M = np.where(is_gated(terms.objectives), 0.0, terms.weights_M)[..., None, :]
    return ((1.0 - terms.normalized_GM) * ungated_M).sum(axis=-1)


def _per_objective_components(terms: Terms) -> np.ndarray:
    """[..., G, M]: y n_m of the gated objectives, -(1 - n_m) of the others."""
    gated_GM = terms.outcome_G[..., None] * terms.normalized_GM
    return np.where(is_gated(terms.objectives), gated_GM, terms.normalized_GM - 1.0) * terms.valid_G[..., None]


def _normalized_weights(weights_M, objectives):
    """Gated weights scaled to sum 1; ungated ones as given."""
    weights_M = np.asarray(weights_M, dtype=np.float64)
    assert weights_M.shape[-1:] == (len(objectives),), (
        f"weights_M has shape {weights_M.shape}, for {len(objectives)} objectives"
    )
    is_bad = ~(np.isfinite(weights_M) & (weights_M >= 0)).all(axis=-1)
    total_1 = np.where(is_gated(objectives), weights_M, 0.0).sum(axis=-1, keepdims=True)
    for is_wrong, what in (
        (is_bad, "weights must be finite and non-negative, got {}; what is better is said by `direction`"),
        (total_1[..., 0] == 0, "the weights of the gated objectives are all zero, got {}; give one of them weight"),
    ):
        if np.any(is_wrong):
            first_M = weights_M.reshape(-1, len(objectives))[np.argmax(np.ravel(is_wrong))]
            raise ValueError(what.format({each.name: float(w) for each, w in zip(objectives, first_M, strict=True)}))
    return np.where(is_gated(objectives), weights_M / total_1, weights_M)


def _outcomes(vectors_GM, objectives, valid_G):
    outcome_G = np.where(valid_G, vectors_GM[..., outcome_index(objectives)], 0.0)
    # A fractional outcome would enter twice, as gate and as coordinate, and be squared.
    if not ((outcome_G == 0.0) | (outcome_G == 1.0)).all():
        raise ValueError(
            f"outcomes must be 0 or 1, got {outcome_G.tolist()}; decide partial credit where answers are scored"
        )
    return outcome_G


def reward_components(
    vectors_GM: np.ndarray,
    weights_M: np.ndarray,
    objectives: Sequence[Objective],
    valid_G: np.ndarray,
    range_rule: str,
    form: str = "gated_sum",
    budgets: Sequence[Budget] = (),
    multipliers: Mapping[str, float] | None = None,
) -> Rewards:
    """Rewards of the rollouts of one group, or of several, and the components that advantages are made of.

    Args:
      vectors_GM: [..., G, M] raw values, each in its objective's unit; "outcome" is 0 or 1.
      weights_M: [..., M] non-negative weights of the group's preference.
      objectives: M of them, "outcome" among them.
      valid_G: [..., G] bool; False where a rollout says nothing about the policy.
      range_rule: a key of normalization.RANGE_RULES.
      form: a key of FORMS.
      budgets: what "constrained" holds to; read by no other form.
      multipliers: the Lagrange multiplier of each budget, by objective name.

    Returns:
      Rewards with 0 for invalid rollouts. "gated_sum" is at most 1, and at least 0 without ungated objectives.

    Raises:
      ValueError: no "outcome" among the objectives, or one that is neither 0 nor 1; a negative weight, or no gated
        weight at all; an unknown range rule or form.
    """
    if form not in FORMS:
        raise ValueError(f"reward form {form!r} must be one of {sorted(FORMS)}")
    outcome_index(objectives)
    weights_M = _normalized_weights(weights_M, objectives)
    valid_G = np.asarray(valid_G, dtype=bool)
    vectors_GM = np.asarray(vectors_GM, dtype=np.float64)
    normalized_GM, has_range_GM = coordinates(vectors_GM, objectives, valid_G, range_rule)
    outcome_G = _outcomes(vectors_GM, objectives, valid_G)
    kept_GM = np.where(valid_G[..., None], np.minimum(vectors_GM, [each.cap for each in objectives]), 0.0)
    terms = Terms(
        outcome_G, kept_GM, normalized_GM, has_range_GM, weights_M, valid_G, objectives, budgets, multipliers or {}
    )
    rewards_G = np.where(valid_G, FORMS[form](terms) - _penalty(terms), 0.0)
    if form == "per_objective":
        return Rewards(rewards_G, _per_objective_components(terms), weights_M)
    return Rewards(rewards_G, rewards_G[..., None], np.ones((*weights_M.shape[:-1], 1)))


def preference_reward(
    vectors_GM: np.ndarray,
    weights_M: np.ndarray,
    objectives: Sequence[Objective],
    valid_G: np.ndarray,
    range_rule: str,
    form: str = "gated_sum",
) -> np.ndarray:
    """[..., G]: the rewards of `reward_components` alone, without budgets."""
    return reward_components(vectors_GM, weights_M, objectives, valid_G, range_rule, form).rewards_G


def utility(vector_M: np.ndarray, weights_M: np.ndarray, objectives: Sequence[Objective]) -> float:
    """U of one rollout: `preference_reward` under the "reference" rule, where no other rollout matters.

    The expected utility of a success probability p is p * U(outcome=1) + (1 - p) * U(outcome=0).
    """
    vectors_GM = np.asarray(vector_M, dtype=np.float64)[np.newaxis]
    return float(preference_reward(vectors_GM, weights_M, objectives, np.array([True]), "reference")[0])
