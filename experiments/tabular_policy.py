"""A policy that has nothing but the reward to learn from: a softmax table per instance of the quickstart's world.

Without a language model in between, what is left of the way to the optimum is the reward's and the advantage's doing:
a table over the nodes of the decision tree (evaluation/oracle.py) and the calls at each, drawn from and moved by plain
gradient ascent on draws of the simulated world. Rewards, filters and advantages are the learner's own
(grpo/scoring.py), and so are the weights of an aggregation (grpo/loss.py). Its value is exact, by the oracle's
recursion. A training takes seconds; `python -m experiments.ablate` crosses the choices.

Legend: I instances, G rollouts of each, K kept groups, O experts on offer, A = tools x O actions, N nodes, R roles, T
turns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from orchestra_jax.data.pipeline import evaluation_instances
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.questions import build_tasks
from orchestra_jax.data.records import Instance
from orchestra_jax.environments.question_answering import reference_objectives
from orchestra_jax.evaluation.baselines import scores
from orchestra_jax.evaluation.oracle import (
    ANSWER,
    EVIDENCE_TOOLS,
    Charges,
    evaluate,
    make_charges,
    optimal_policy,
    random_policy,
)
from orchestra_jax.experts.catalog import EXPERTS, ROLES
from orchestra_jax.experts.world import WorldConfig
from orchestra_jax.grpo.filters import RolloutFacts
from orchestra_jax.grpo.loss import AGGREGATIONS, rollouts_of
from orchestra_jax.grpo.scoring import ScoredGroups, ScoringSettings, score_vectors
from orchestra_jax.rewards.constraints import initial_multipliers, updated_multipliers
from orchestra_jax.rewards.objectives import objective_vector

NUM_PER_PREFERENCE = 20
NUM_OFFERED = WorldConfig().num_offered
NUM_ACTIONS = len(ROLES) * NUM_OFFERED
NUM_CHILDREN = 2 * len(EVIDENCE_TOOLS) * NUM_OFFERED  # an evidence call, and whether the evidence is there behind it
NUM_NODES = 1 + NUM_CHILDREN + NUM_CHILDREN**2
MAX_CALLS = WorldConfig().max_calls


@dataclasses.dataclass
class Play:
    """One rollout each for [I, G]: the nodes passed, the actions there, and what came of it. -1 behind the end."""

    nodes_IGT: np.ndarray
    actions_IGT: np.ndarray
    values_IGM: np.ndarray  # outcome, cost_usd, latency_s, disallowed_calls
    is_answered_IG: np.ndarray


def child(node, action, has_evidence):
    """The number of the node behind an evidence call; calls behind MAX_CALLS - 1 have none."""
    return 1 + node * NUM_CHILDREN + 2 * action + has_evidence


def softmax(logits):
    exps = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


def offered_columns(charges: Charges) -> np.ndarray:
    """[I, O]: the experts on offer, in catalog order."""
    return np.array([np.flatnonzero(row) for row in charges.is_offered_TIE[ANSWER]])


def play(charges: Charges, logits_INA: np.ndarray, group_size: int, rng: np.random.Generator) -> Play:
    """Samples an episode for each rollout: every draw is one of the world's, once an expert and a role."""
    num_instances = len(logits_INA)
    columns_IO = offered_columns(charges)
    rows_I1 = np.arange(num_instances)[:, None]
    shape = (num_instances, group_size)
    i_IG = np.broadcast_to(rows_I1, shape)
    g_IG = np.broadcast_to(np.arange(group_size), shape)
    cost_RIO, latency_RIO, success_RIO = (
        table_RIE[:, rows_I1, columns_IO]
        for table_RIE in (charges.cost_usd_RIE, charges.latency_s_RIE, charges.success_RIE)
    )
    is_disallowed_IO = charges.is_disallowed_IE[rows_I1, columns_IO]
    draws_IGRO = rng.random((*shape, len(ROLES), NUM_OFFERED))
    node_IG, is_running_IG, has_evidence_IG = np.zeros(shape, int), np.ones(shape, bool), np.zeros(shape, bool)
    values_IGM = np.zeros((*shape, 4))
    nodes, actions = [], []
    for _ in range(MAX_CALLS):
        chance_IGA = softmax(logits_INA[i_IG, np.where(is_running_IG, node_IG, 0)])
        action_IG = (rng.random((*shape, 1)) > chance_IGA.cumsum(axis=-1)).sum(axis=-1).clip(max=NUM_ACTIONS - 1)
        nodes.append(np.where(is_running_IG, node_IG, -1))
        actions.append(np.where(is_running_IG, action_IG, -1))
        tool_IG, o_IG = np.divmod(action_IG, NUM_OFFERED)
        is_answer_IG = tool_IG == ANSWER
        role_IG = tool_IG + (is_answer_IG & has_evidence_IG)
        is_success_IG = draws_IGRO[i_IG, g_IG, tool_IG, o_IG] < success_RIO[role_IG, i_IG, o_IG]
        values_IGM[..., 0] += is_running_IG & is_answer_IG & is_success_IG
        values_IGM[..., 1] += is_running_IG * (charges.turn_cost_usd + cost_RIO[role_IG, i_IG, o_IG])
        values_IGM[..., 2] += is_running_IG * (charges.turn_latency_s + latency_RIO[role_IG, i_IG, o_IG])
        values_IGM[..., 3] += is_running_IG & is_disallowed_IO[i_IG, o_IG]
        has_evidence_IG |= is_running_IG & ~is_answer_IG & is_success_IG
        is_running_IG &= ~is_answer_IG
        node_IG = child(node_IG, action_IG, has_evidence_IG)
    return Play(np.stack(nodes, -1), np.stack(actions, -1), values_IGM, ~is_running_IG)


def played_facts(played: Play) -> RolloutFacts:
    """What the filters read of a rollout; it has no tokens."""
    nothing_IG, zeros_IG = np.zeros(played.is_answered_IG.shape, bool), np.zeros(played.is_answered_IG.shape, int)
    return RolloutFacts(nothing_IG, nothing_IG, ~played.is_answered_IG, nothing_IG, zeros_IG, zeros_IG)


def token_weights(played: Play, kept, aggregation: str) -> np.ndarray:
    """[I, G, T]: what each action weighs in the loss of the kept groups, by the loss's own code, denominator too."""
    mask_IGT = (played.nodes_IGT >= 0) & np.isin(np.arange(len(played.nodes_IGT)), kept)[:, None, None]
    mask_BT = mask_IGT.reshape(-1, mask_IGT.shape[-1])  # of one shape whatever is kept: jax compiles once
    weigh, count = AGGREGATIONS[aggregation]
    rollouts = rollouts_of(mask_BT.shape)
    return np.asarray(weigh(mask_BT, rollouts) / count(mask_BT, rollouts, MAX_CALLS)).reshape(mask_IGT.shape)


def ascend(logits_INA, played: Play, kept, advantages_KG, rate, kl_coefficient, aggregation="sequence_mean") -> None:
    """Moves the logits by rate * K * (weighted sum of A * d log pi(action) - kl_coefficient * d KL(pi, uniform)).

    At every node that a rollout passed. K kept groups: a table is its instance's own, so its step is not to depend on
    how many others there are. The uniform policy is where the table starts: KL to the start, as in training.
    """
    kept_K = np.array(kept, int)
    weights_KGT = token_weights(played, kept, aggregation)[kept_K] * len(kept_K)
    for turn in range(MAX_CALLS):
        node_KG, action_KG = played.nodes_IGT[kept_K, :, turn], played.actions_IGT[kept_K, :, turn]
        k, g = np.nonzero(node_KG >= 0)
        i, node, action = kept_K[k], node_KG[k, g], action_KG[k, g]
        chance = softmax(logits_INA[i, node])
        surprise = np.log(chance) - (chance * np.log(chance)).sum(axis=1, keepdims=True)
        gradient = -chance * (advantages_KG[k, g, None] + kl_coefficient * surprise)
        gradient[np.arange(len(k)), action] += advantages_KG[k, g]
        np.add.at(logits_INA, (i, node), rate * weights_KGT[k, g, turn, None] * gradient)


def table_policy(charges: Charges, logits_INA: np.ndarray):
    """The softmax of the table as an `oracle.Policy`."""
    columns_IO = offered_columns(charges)
    slot_IE = np.zeros((len(columns_IO), len(EXPERTS)), int)
    np.put_along_axis(slot_IE, columns_IO, np.arange(NUM_OFFERED)[None, :], axis=1)
    rows_I = np.arange(len(columns_IO))
    catalog_action_IA = np.concatenate([tool * len(EXPERTS) + columns_IO for tool in range(len(ROLES))], axis=1)

    def policy(node, legal_IA, believed_IA):
        node_I = np.zeros(len(rows_I), int)  # what it is for instances that do not offer the experts: never reached
        for number, (tool, expert) in enumerate(node.calls):
            has_evidence = any(call not in node.failed for call in node.calls[: number + 1])
            node_I = child(node_I, tool * NUM_OFFERED + slot_IE[:, expert], has_evidence)
        chance_IA = np.zeros(legal_IA.shape)
        np.put_along_axis(chance_IA, catalog_action_IA, softmax(logits_INA[rows_I, node_I]), axis=1)
        return chance_IA

    return policy


class World(NamedTuple):
    instances: list[Instance]
    charges: Charges
    random_IS: np.ndarray  # exact statistics of the random policy and of the optimum
    optimal_IS: np.ndarray


@functools.cache
def make_world(
    num_per_preference: int = NUM_PER_PREFERENCE,
    reference_cost_usd: float = WorldConfig().reference_cost_usd,
    reference_latency_s: float = WorldConfig().reference_latency_s,
) -> World:
    """Test tasks, as many instances of each preference. Made once: nobody is to change it."""
    config = WorldConfig(reference_cost_usd=reference_cost_usd, reference_latency_s=reference_latency_s)
    tasks = build_tasks("test", num_per_cell=5, seed=0)
    instances = evaluation_instances(tasks, list(PREFERENCES.values()), config, num_per_preference, seed=3)
    charges = make_charges(instances, config)
    return World(instances, charges, *(evaluate(charges, policy)[0] for policy in (random_policy, optimal_policy)))


def mean_score(world: World, statistics_IS: np.ndarray) -> float:
    """0 is the random policy, 1 the optimum; all preferences alike."""
    names = np.array([instance.preference.name for instance in world.instances])
    return np.mean([scores(statistics_IS, world.random_IS, world.optimal_IS, names == name) for name in PREFERENCES])


class StepSize(NamedTuple):
    """How far advantages and weights move a table, whatever they say."""

    advantage: float  # root mean square over the rollouts of the kept groups
    weight: float  # of all actions of a group, in the mean


def step_size(played: Play, scored: ScoredGroups, aggregation: str) -> StepSize:
    weights_IGT = token_weights(played, scored.kept, aggregation)
    return StepSize(np.sqrt(np.mean(scored.advantages_KG**2)), weights_IGT.sum())


@dataclasses.dataclass(frozen=True)
class Trained:
    score: float  # mean over preferences; 0 is the random policy, 1 the optimum
    statistics_IS: np.ndarray  # exact, of each instance; columns as oracle.STATISTICS
    preferences: tuple[str, ...]  # of each instance
    multipliers: dict[str, float]


def train(
    scoring: ScoringSettings,
    aggregation: str = "sequence_mean",
    *,
    floors: Mapping[str, float] | None = None,
    num_steps: int = 400,
    group_size: int = 32,
    rate: float = 8.0,
    kl_coefficient: float = 1.0,
    final_kl_coefficient: float = 0.03,
    multiplier_rate: float = 0.05,
    world: World | None = None,
    seed: int = 0,
) -> Trained:
    """What training a table from the uniform policy comes to.

    `floors`: the range floor of objectives by name, in their own unit. The KL coefficient falls geometrically: far from
    the start, a table has to unlearn what paid while its later calls were random, "answer at once" above all.

    Rate and KL coefficient are those of "grpo" and "sequence_mean". Another advantage, another aggregation is scaled,
    once for all, so that its first step is as large as theirs on the same rollouts: what is compared is where the steps
    lead.
    """
    world = make_world() if world is None else world
    charges = world.charges
    objectives = tuple(
        dataclasses.replace(each, range_floor=(floors or {}).get(each.name, 0.0))
        for each in reference_objectives(charges.reference_cost_usd, charges.reference_latency_s)
    )
    weights_IM = np.array([objective_vector(instance.preference.weights, objectives) for instance in world.instances])
    multipliers, scale = initial_multipliers(scoring.budgets), None
    rng = np.random.default_rng(seed)
    logits_INA = np.zeros((len(world.instances), NUM_NODES, NUM_ACTIONS))
    for kl in np.geomspace(kl_coefficient, final_kl_coefficient, num_steps):
        played = play(charges, logits_INA, group_size, rng)
        score = functools.partial(
            score_vectors, played.values_IGM, weights_IM, played_facts(played), objectives, multipliers=multipliers
        )
        scored = score(scoring)
        if scale is None and scored.kept:
            wanted = step_size(played, score(dataclasses.replace(scoring, advantage="grpo")), "sequence_mean")
            scale = StepSize(*np.divide(wanted, step_size(played, scored, aggregation)))
        if scored.kept:
            advantages_KG = scale.advantage * scored.advantages_KG
            ascend(logits_INA, played, scored.kept, advantages_KG, rate * scale.weight, kl, aggregation)
        multipliers = updated_multipliers(
            multipliers, played.values_IGM, scored.valid_PG, objectives, scoring.budgets, multiplier_rate
        )
    statistics_IS = evaluate(charges, table_policy(charges, logits_INA))[0]
    names = tuple(instance.preference.name for instance in world.instances)
    return Trained(mean_score(world, statistics_IS), statistics_IS, names, multipliers)
