"""Policies to beat: the static ones that a sensible person would write, and the optimum with one piece of information
withheld.

Each is a `Policy` of the oracle's recursion, so its value is exact. "Best" ones are best in hindsight: they choose by
the true mean value, over the very instances they are judged on, of every action under what they are allowed to know.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orchestra_jax.data.records import Instance
from orchestra_jax.evaluation.oracle import (
    ANSWER,
    EVIDENCE_TOOLS,
    STATISTICS,
    Charges,
    Node,
    Policy,
    evaluate,
    optimal_policy,
    random_policy,
)
from orchestra_jax.experts.catalog import ROLES
from orchestra_jax.experts.world import SkillTables


def by_score(score_IA: np.ndarray) -> Policy:
    """Takes the legal action of the highest score, whatever happened before."""
    score_IA = np.asfortranarray(score_IA)  # as the oracle lays out its arrays

    def policy(node: Node, legal_IA: np.ndarray, believed_IA: np.ndarray) -> np.ndarray:
        return optimal_policy(node, legal_IA, score_IA)

    return policy


def with_evidence_first(score_IE: np.ndarray, right_tool_I: np.ndarray) -> Policy:
    """Calls the tool that can bring the evidence once, then answers; at both by the expert of the highest score."""
    tool_A = np.repeat(np.arange(len(ROLES)), score_IE.shape[1])
    score_IA = np.asfortranarray(np.tile(score_IE, len(ROLES)))
    gathering_IA = np.where(tool_A == right_tool_I[:, None], score_IA, -1e9)
    answering_IA = np.where(tool_A == ANSWER, score_IA, -1e9)

    def policy(node: Node, legal_IA: np.ndarray, believed_IA: np.ndarray) -> np.ndarray:
        return optimal_policy(node, legal_IA, answering_IA if node.calls else gathering_IA)

    return policy


def knowing_only(key_I: np.ndarray) -> Policy:
    """The best policy that sees its key, who is on offer and what came back, but nothing else of the instance.

    An action's value is its mean over the instances of the same key for which it is legal, each with the chance of
    coming to the node at all: whoever lacks one of the experts called so far says nothing about what to do next.
    """
    row_of_key, group_I = np.unique(key_I, return_inverse=True)
    order_I = np.argsort(group_I, kind="stable")
    starts_K = np.searchsorted(group_I[order_I], np.arange(len(row_of_key)))

    def policy(node: Node, legal_IA: np.ndarray, believed_IA: np.ndarray) -> np.ndarray:
        chance_IA = legal_IA * node.reach_I[:, None]
        total_KA = np.add.reduceat((believed_IA * chance_IA)[order_I], starts_K)
        chance_KA = np.add.reduceat(chance_IA[order_I], starts_K)
        mean_KA = total_KA / np.where(chance_KA > 0, chance_KA, 1.0)
        return optimal_policy(node, legal_IA, mean_KA[group_I])

    return policy


def evaluate_baselines(instances: Sequence[Instance], charges: Charges, skills: SkillTables) -> dict[str, np.ndarray]:
    """Expected statistics [I, S] by the baseline's name."""
    preference = np.array([instance.preference.name for instance in instances])
    family = np.array([instance.task.family for instance in instances])
    kind = np.array([instance.task.kind for instance in instances])
    right_tool_I = np.array([EVIDENCE_TOOLS.index(instance.task.evidence_tool) for instance in instances])
    strength_IE = np.tile(skills.answer_FKEV[..., 1].mean(axis=(0, 1)), (len(instances), 1))
    cheapness_IE = -charges.cost_usd_RIE[ANSWER]
    answer_only = np.repeat([-1e9, -1e9, 0.0], strength_IE.shape[1])
    family_key = np.char.add(family, preference)
    cell_key = np.char.add(np.char.add(family, kind), preference)
    mean_weights_IM = np.broadcast_to(charges.weights_IM.mean(axis=0), charges.weights_IM.shape)
    policies = {
        "random": random_policy,
        "strongest": by_score(np.tile(strength_IE, len(ROLES)) + answer_only),
        "strongest_with_evidence": with_evidence_first(strength_IE, right_tool_I),
        "cheapest": by_score(np.tile(cheapness_IE, len(ROLES)) + answer_only),
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
    policy, random, optimum = (
        array[rows, STATISTICS.index("utility")].mean() for array in (statistics_IS, random_IS, optimal_IS)
    )
    return float((policy - random) / (optimum - random))
