"""Budgets on objectives, and the Lagrange multipliers that hold a policy to them.

    maximise E[y]  subject to  E[v_m] <= budget_m    (v_m: cost_usd or latency_s, wrong answers included)

    reward       (y - sum_m lambda_m (v_m - budget_m) / span_m) / (1 + sum_m lambda_m)        (rewards/preference.py)
    multipliers  lambda_m <- clip(lambda_m + rate * mean over valid rollouts of (v_m - budget_m) / span_m, 0, limit)

span_m is the objective's reference span, so lambda has no unit; the division by 1 + sum keeps the reward's size, which
the homogeneity filter reads (as Stooke et al., arXiv 2007.03964). The multipliers are explicit state: a plain
dict by objective name that goes from step to step and into the checkpoint.

By hand, a budget of $0.05 and a span of $0.20: rollouts of $0.07 and $0.11 exceed it by 0.1 and 0.3, 0.2 on average, so
with rate 0.5 a multiplier of 1 becomes 1.1.

Shape suffixes: G rollouts of a group, M objectives. All arrays take leading dims too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from orchestra_jax.rewards.objectives import Objective, reference_span

MULTIPLIER_LIMIT = 100.0  # an unreachable budget: beyond it the outcome counts for less than a hundredth


@dataclasses.dataclass(frozen=True)
class Budget:
    """`limit` is in the objective's own unit, on the mean over rollouts."""

    objective: str
    limit: float


def _index(objectives: Sequence[Objective], budget: Budget) -> int:
    names = [objective.name for objective in objectives]
    if budget.objective not in names or objectives[names.index(budget.objective)].direction != "minimize":
        raise ValueError(
            f"a budget on {budget.objective!r}: take an objective to minimize of {names}; a budget bounds from above"
        )
    return names.index(budget.objective)


def excess(vectors_GM: np.ndarray, objectives: Sequence[Objective], budget: Budget) -> np.ndarray:
    """[..., G]: by how much each rollout exceeds the budget, as a share of the reference span; negative below it.

    ValueError for a budget on an objective that is unknown or to be maximized.
    """
    index = _index(objectives, budget)
    return (vectors_GM[..., index] - budget.limit) / reference_span(objectives)[index]


def initial_multipliers(budgets: Sequence[Budget]) -> dict[str, float]:
    return {budget.objective: 0.0 for budget in budgets}


def updated_multipliers(
    multipliers: Mapping[str, float],
    vectors_GM: np.ndarray,
    valid_G: np.ndarray,
    objectives: Sequence[Objective],
    budgets: Sequence[Budget],
    rate: float,
) -> dict[str, float]:
    """One dual ascent step on the mean excess of the valid rollouts; unchanged where there is none."""
    if not valid_G.any():
        return dict(multipliers)
    return {
        budget.objective: float(
            np.clip(
                multipliers[budget.objective] + rate * excess(vectors_GM, objectives, budget)[valid_G].mean(),
                0.0,
                MULTIPLIER_LIMIT,
            )
        )
        for budget in budgets
    }
