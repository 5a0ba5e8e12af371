"""The full cross of reward form, advantage and aggregation on tables, and its table in Markdown.

Everything else is the default: filters, clip, deviations, the schedule of `tabular_policy.train`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

from experiments.tabular_policy import Trained, make_world, train
from orchestra_jax.grpo.advantages import ADVANTAGES
from orchestra_jax.grpo.loss import AGGREGATIONS
from orchestra_jax.grpo.scoring import ScoringSettings
from orchestra_jax.rewards.constraints import Budget

FLOORS = {"cost_usd": 0.012, "latency_s": 50.0}  # the default world's reference ranges
BUDGETS = (Budget("cost_usd", 0.004), Budget("latency_s", 20.0))
CROSS_FORMS: dict[str, dict[str, object]] = {
    "anchored": {"range_rule": "reference"},
    "paper": {"range_rule": "group"},
    "paper_with_floor": {"range_rule": "group"},  # and FLOORS
    "correct_only": {"range_rule": "correct"},
    "ungated": {"reward_form": "ungated_sum"},
    "weight_then_normalize": {"reward_form": "weight_then_normalize"},
    "chebyshev": {"reward_form": "chebyshev"},
    "per_objective": {"reward_form": "per_objective"},
    "constrained": {"reward_form": "constrained", "budgets": BUDGETS},
}
Cell = tuple[str, str, str]  # reward form, advantage, aggregation


def cross() -> list[Cell]:
    return list(itertools.product(CROSS_FORMS, ADVANTAGES, AGGREGATIONS))


def scoring(form: str, advantage: str) -> ScoringSettings:
    """Every setting but form and advantage is the default."""
    return ScoringSettings(advantage=advantage, **CROSS_FORMS[form])


def train_cell(cell: Cell, num_steps: int, seed: int = 0, num_per_preference: int = 12) -> Trained:
    form, advantage, aggregation = cell
    return train(
        scoring(form, advantage), aggregation, floors=FLOORS if form == "paper_with_floor" else {},
        num_steps=num_steps, world=make_world(num_per_preference), seed=seed,
    )  # fmt: skip


def train_cross(
    num_steps: int, seed: int = 0, num_per_preference: int = 12, report: Callable[[str], None] = lambda _: None
) -> dict[Cell, float]:
    """The score of every cell: 0 is the random policy, 1 the optimum. Under a minute of CPU at 60 steps."""
    found = {}
    for cell in cross():
        found[cell] = train_cell(cell, num_steps, seed, num_per_preference).score
        report(f"{' '.join(cell)} {found[cell]:.3f}")
    return found


def format_cross(found: Mapping[Cell, float]) -> str:
    """A Markdown table: a row for each form and advantage, a column for each aggregation."""
    lines = [f"| reward form | advantage | {' | '.join(AGGREGATIONS)} |", "|---|---|" + "---|" * len(AGGREGATIONS)]
    for form, advantage in itertools.product(CROSS_FORMS, ADVANTAGES):
        cells = " | ".join(f"{found[form, advantage, aggregation]:.3f}" for aggregation in AGGREGATIONS)
        lines.append(f"| {form} | {advantage} | {cells} |")
    return "\n".join(lines)
