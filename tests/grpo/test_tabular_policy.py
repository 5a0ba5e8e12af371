"""Rewards, filters and advantages teach a policy that has nothing else to learn: a softmax table per instance.

Without a language model in between, what is left of the way to the optimum is the reward's and the advantage's doing:
a table over the nodes of the decision tree (evaluation/oracle.py) and the calls at each, drawn from and moved by plain
gradient ascent, sum over the rollouts of A * (one-hot(action) - softmax(logits)), on draws of the simulated world. Its
value is exact, by the oracle's recursion.

Legend: I instances, G rollouts of each, O experts on offer, A = tools x O actions, N nodes, R roles.
"""

import dataclasses

import numpy as np
import pytest

from orchestra_jax.config import GrpoConfig
from orchestra_jax.data.pipeline import evaluation_instances
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.questions import build_tasks
from orchestra_jax.environments.question_answering import reference_objectives
from orchestra_jax.evaluation.baselines import scores
from orchestra_jax.evaluation.oracle import (
    ANSWER,
    EVIDENCE_TOOLS,
    NUM_EXPERTS,
    STATISTICS,
    Charges,
    evaluate,
    make_charges,
    optimal_policy,
    random_policy,
)
from orchestra_jax.experts.catalog import ROLES
from orchestra_jax.experts.world import WorldConfig
from orchestra_jax.grpo.scoring import score_groups
from orchestra_jax.types import EpisodeStatus, Trajectory, TrajectoryGroup

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
    return np.array([np.flatnonzero(row) for row in charges.is_offered_IE])


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


def as_groups(instances, objectives, played: Play) -> list[TrajectoryGroup]:
    """What `score_groups` reads of a rollout; it has no tokens."""
    nothing = {"tokens": (), "loss_mask": (), "logprobs": (), "policy_versions": (), "num_prompt_tokens": 0}
    names = [objective.name for objective in objectives]
    groups = []
    for instance, values_GM, is_answered_G in zip(
        instances, played.values_IGM.tolist(), played.is_answered_IG.tolist()
    ):
        trajectories = tuple(
            Trajectory(
                instance_id=instance.instance_id,
                rollout_index=g,
                **nothing,
                calls=(),
                receipts=(),
                status=EpisodeStatus.ANSWERED if is_answered else EpisodeStatus.TURN_LIMIT,
                answer="",
                objectives=dict(zip(names, values_M)),
            )
            for g, (values_M, is_answered) in enumerate(zip(values_GM, is_answered_G))
        )
        groups.append(TrajectoryGroup(instance.instance_id, instance.preference.weights, trajectories))
    return groups


def ascend(logits_INA, played: Play, kept, advantages_KG, rate, kl_coefficient) -> None:
    """Moves the logits by rate * mean over the group of A * d log pi(action) - kl_coefficient * d KL(pi, uniform).

    At every node that a rollout passed. The uniform policy is where the table starts: KL to the start, as in training.
    """
    group_size = advantages_KG.shape[1]
    kept_K = np.array(kept, int)
    for turn in range(MAX_CALLS):
        node_KG, action_KG = played.nodes_IGT[kept_K, :, turn], played.actions_IGT[kept_K, :, turn]
        k, g = np.nonzero(node_KG >= 0)
        i, node, action = kept_K[k], node_KG[k, g], action_KG[k, g]
        chance = softmax(logits_INA[i, node])
        surprise = np.log(chance) - (chance * np.log(chance)).sum(axis=1, keepdims=True)
        gradient = -chance * (advantages_KG[k, g, None] + kl_coefficient * surprise)
        gradient[np.arange(len(k)), action] += advantages_KG[k, g]
        np.add.at(logits_INA, (i, node), rate / group_size * gradient)


def table_policy(charges: Charges, logits_INA: np.ndarray):
    """The softmax of the table as an `oracle.Policy`."""
    columns_IO = offered_columns(charges)
    slot_IE = np.zeros((len(columns_IO), NUM_EXPERTS), int)
    np.put_along_axis(slot_IE, columns_IO, np.arange(NUM_OFFERED)[None, :], axis=1)
    rows_I = np.arange(len(columns_IO))
    catalog_action_IA = np.concatenate([tool * NUM_EXPERTS + columns_IO for tool in range(len(ROLES))], axis=1)

    def policy(node, legal_IA, believed_IA):
        node_I = np.zeros(len(rows_I), int)  # what it is for instances that do not offer the experts: never reached
        for number, (tool, expert) in enumerate(node.calls):
            has_evidence = any(call not in node.failed for call in node.calls[: number + 1])
            node_I = child(node_I, tool * NUM_OFFERED + slot_IE[:, expert], has_evidence)
        chance_IA = np.zeros(legal_IA.shape)
        np.put_along_axis(chance_IA, catalog_action_IA, softmax(logits_INA[rows_I, node_I]), axis=1)
        return chance_IA

    return policy


def make_world(num_per_preference=NUM_PER_PREFERENCE):
    config = WorldConfig()
    tasks = build_tasks("test", num_per_cell=5, seed=0)
    instances = evaluation_instances(tasks, list(PREFERENCES.values()), config, num_per_preference, seed=3)
    return config, instances, make_charges(instances, config)


def mean_score(charges, instances, statistics_IS):
    """0 is the random policy, 1 the optimum; all preferences alike."""
    random_IS, optimal_IS = (evaluate(charges, policy)[0] for policy in (random_policy, optimal_policy))
    names = np.array([instance.preference.name for instance in instances])
    return np.mean([scores(statistics_IS, random_IS, optimal_IS, names == name) for name in PREFERENCES])


def train(range_rule, num_steps=400, group_size=32, rate=8.0, kl_coefficient=1.0, final_kl_coefficient=0.03, seed=0):
    """Score and exact statistics [S] of the table that training from the uniform policy comes to.

    The KL coefficient falls geometrically: far from the start, a table has to unlearn what paid while its later calls
    were random, "answer at once" above all.
    """
    config, instances, charges = make_world()
    objectives = reference_objectives(config.reference_cost_usd, config.reference_latency_s)
    rng, settings = np.random.default_rng(seed), GrpoConfig()
    logits_INA = np.zeros((len(instances), NUM_NODES, NUM_ACTIONS))
    for kl in np.geomspace(kl_coefficient, final_kl_coefficient, num_steps):
        played = play(charges, logits_INA, group_size, rng)
        scored = score_groups(
            as_groups(instances, objectives, played),
            objectives,
            range_rule=range_rule,
            divide_by_std=settings.divide_by_std,
            min_group_std=settings.min_group_std,
            advantage_clip=settings.advantage_clip,
        )
        ascend(logits_INA, played, scored.kept, scored.advantages_KG, rate, kl)
    statistics_IS = evaluate(charges, table_policy(charges, logits_INA))[0]
    return mean_score(charges, instances, statistics_IS), statistics_IS.mean(axis=0)


def test_what_is_played_is_what_the_recursion_takes_the_table_to_be():
    """Means over sampled episodes against exact values, for a table of random numbers."""
    _, instances, charges = make_world(num_per_preference=4)
    logits_INA = np.random.default_rng(1).normal(size=(len(instances), NUM_NODES, NUM_ACTIONS))
    exact_IS = evaluate(charges, table_policy(charges, logits_INA))[0]
    played = play(charges, logits_INA, 4000, np.random.default_rng(0))
    outcome_IG, answered_IG = played.values_IGM[..., 0], played.is_answered_IG
    # The recursion counts nothing for an episode that ends without an answer.
    means = {
        "accuracy": outcome_IG,
        "cost_usd": played.values_IGM[..., 1] * answered_IG,
        "latency_s": played.values_IGM[..., 2] * answered_IG,
        "calls/answer": answered_IG,
    }
    for name, values_IG in means.items():
        error_I = values_IG.std(axis=1) / np.sqrt(values_IG.shape[1])
        difference_I = np.abs(values_IG.mean(axis=1) - exact_IS[:, STATISTICS.index(name)])
        assert (difference_I < 4.5 * error_I + 1e-12).all(), name


def test_one_step_raises_what_had_a_good_advantage():
    logits_INA = np.zeros((2, NUM_NODES, NUM_ACTIONS))
    nodes_IGT = np.array([[[0, 5, -1], [0, -1, -1]]] * 2)
    actions_IGT = np.array([[[1, 7, -1], [8, -1, -1]]] * 2)
    played = Play(nodes_IGT, actions_IGT, np.zeros((2, 2, 4)), np.ones((2, 2), bool))
    ascend(logits_INA, played, (1,), np.array([[1.0, -1.0]]), rate=2.0, kl_coefficient=1.0)
    expected_NA = np.zeros((NUM_NODES, NUM_ACTIONS))
    expected_NA[0, 1], expected_NA[0, 8] = 1.0, -1.0  # the uniform parts of both rollouts cancel
    expected_NA[5] = -1 / NUM_ACTIONS
    expected_NA[5, 7] += 1.0
    np.testing.assert_allclose(logits_INA, [np.zeros_like(expected_NA), expected_NA], atol=1e-12)


@pytest.mark.slow
def test_a_table_learns_the_optimum():
    score, _ = train("reference")
    assert score >= 0.95


@pytest.mark.slow
def test_the_range_of_the_group_sells_accuracy_for_pennies():
    """The paper's own form, with all else equal."""
    (anchored, anchored_S), (plain, plain_S) = train("reference"), train("group")
    accuracy = STATISTICS.index("accuracy")
    assert plain < anchored - 0.05 and plain_S[accuracy] < anchored_S[accuracy] - 0.03
