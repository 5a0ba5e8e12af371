"""Policies to beat: the static ones a sensible person would write, and the optimum with one piece of information withheld.

Each is a `Policy` of the oracle's recursion, so its value is exact. "Best" ones are best in hindsight: they choose by the
true mean value, over the very instances they are judged on, of every action under what they are allowed to know.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orchestra_jax.data.records import Instance
from orchestra_jax.evaluation.oracle import (
    ANSWER,
    EVIDENCE_TOOLS,
    NUM_EXPERTS,
    STATISTICS,
    Charges,
    Node,
    Policy,
    evaluate,
    optimal_policy,
    random_policy,
)
from orchestra_jax.experts.world import SkillTables


def by_score(score_IA: np.ndarray) -> Policy:
    """Takes the legal action of the highest score, whatever happened before."""

    def policy(node: Node, legal_IA: np.ndarray, believed_IA: np.ndarray) -> np.ndarray:
        return optimal_policy(node, legal_IA, score_IA)

    return policy


def with_evidence_first(score_IE: np.ndarray, right_tool_I: np.ndarray) -> Policy:
    """Calls the tool that can bring the evidence once, then answers; at both by the expert of the highest score."""

    def policy(node: Node, legal_IA: np.ndarray, believed_IA: np.ndarray) -> np.ndarray:
        wanted_I = np.full(len(score_IE), ANSWER) if node.calls else right_tool_I
        score_IA = np.where(np.arange(legal_IA.shape[1]) // NUM_EXPERTS == wanted_I[:, None], np.tile(score_IE, 3), -1e9)
        return optimal_policy(node, legal_IA, score_IA)

    return policy


def knowing_only(key_I: np.ndarray) -> Policy:
    """The best policy that sees its key, who is on offer and what came back, but nothing else of the instance.

    An action's value is its mean over the instances of the same key *for which it is legal*.
    """
    groups = [np.flatnonzero(key_I == key) for key in np.unique(key_I)]

    def policy(node: Node, legal_IA: np.ndarray, believed_IA: np.ndarray) -> np.ndarray:
        mean_IA = np.zeros_like(believed_IA)
        for rows in groups:
            count_A = np.maximum(legal_IA[rows].sum(axis=0), 1)
            mean_IA[rows] = (believed_IA[rows] * legal_IA[rows]).sum(axis=0) / count_A
        return optimal_policy(node, legal_IA, mean_IA)

    return policy


def evaluate_baselines(instances: Sequence[Instance], charges: Charges, skills: SkillTables) -> dict[str, np.ndarray]:
    """Expected statistics [I, S] by the baseline's name."""
    preference = np.array([instance.preference.name for instance in instances])
    family = np.array([instance.task.family for instance in instances])
    kind = np.array([instance.task.kind for instance in instances])
    right_tool_I = np.array([EVIDENCE_TOOLS.index(instance.task.evidence_tool) for instance in instances])
    strength_IE = np.tile(skills.answer_FKEV[..., 1].mean(axis=(0, 1)), (len(instances), 1))
    cheapness_IE = -charges.cost_usd_RIE[ANSWER]
    answer_only = np.repeat([-1e9, -1e9, 0.0], NUM_EXPERTS)
    family_key = np.char.add(family, preference)
    cell_key = np.char.add(np.char.add(family, kind), preference)
    mean_weights_IM = np.broadcast_to(charges.weights_IM.mean(axis=0), charges.weights_IM.shape)
    policies = {
        "random": random_policy,
        "strongest": by_score(np.tile(strength_IE, 3) + answer_only),
        "strongest_with_evidence": with_evidence_first(strength_IE, right_tool_I),
        "cheapest": by_score(np.tile(cheapness_IE, 3) + answer_only),
        "cheapest_with_evidence": with_evidence_first(cheapness_IE, right_tool_I),
        "best_fixed_route": knowing_only(preference),
        "best_route_per_family": knowing_only(family_key),
        "price_blind": knowing_only(cell_key),
    }
    statistics = {name: evaluate(charges, policy)[0] for name, policy in policies.items()}
    statistics["preference_blind"] = evaluate(charges, optimal_policy, mean_weights_IM)[0]
    return statistics


def scores(statistics_IS: np.ndarray, random_IS: np.ndarray, optimal_IS: np.ndarray, rows) -> float:
    """(U - U_random) / (U_optimum - U_random) over the instances in `rows`: 0 is random, 1 the optimum."""
    policy, random, optimum = (array[rows, STATISTICS.index("utility")].mean() for array in (statistics_IS, random_IS, optimal_IS))
    return float((policy - random) / (optimum - random))
