"""What is the best that can be done? Backward induction over the finite decision tree of the simulated world.

At each node a policy chooses a tool and an expert. An evidence tool either brings the evidence or visibly fails; asking the
same expert again in the same role gives the same result. `answer` ends the episode with utility

    U = y (w_o + w_c (1 - min(c / c_ref, 1)) + w_l (1 - min(l / l_ref, 1))) - w_x d        (rewards/preference.py)

The optimum knows what the prompt reveals and the success probabilities, not the draws. The same recursion, with what the
policy *believes* put in the place of what is, gives the exact value of every policy with less information (price-blind,
preference-blind, one route per family), and with a mean in the place of the maximum that of the random policy. The
clairvoyant bound sees the draws too.

Shapes: I instances, A actions = tools x experts (experts in catalog order), E experts, S statistics (STATISTICS).
Everything is vectorised over instances: a node of the tree stands for all of them at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from orchestra_jax.data.records import Instance
from orchestra_jax.experts.catalog import EXPERTS, ROLES
from orchestra_jax.experts.world import FAMILY_INDEX, KIND_INDEX, WorldConfig, call_latency_s, call_tokens, skill_tables

EVIDENCE_TOOLS = ROLES[:2]
ANSWER = ROLES.index("answer")
NUM_EXPERTS = len(EXPERTS)


@dataclasses.dataclass(frozen=True)
class Charges:
    """What the world charges and knows, per instance and expert. Not offered experts have charges too, and a mask."""

    is_offered_IE: np.ndarray
    cost_usd_RIE: np.ndarray  # R: search, enhance_reasoning, answer, answer with evidence
    latency_s_RIE: np.ndarray
    success_RIE: np.ndarray  # evidence tools: 0 for the tool that cannot bring this task's evidence
    is_disallowed_IE: np.ndarray
    weights_IM: np.ndarray  # outcome, cost_usd, latency_s, disallowed_calls
    turn_cost_usd: float
    turn_latency_s: float
    reference_cost_usd: float
    reference_latency_s: float
    max_calls: int


@dataclasses.dataclass(frozen=True)
class Node:
    """A state of the episode: what has been spent, whether the evidence is there, which writers are known to fail."""

    has_evidence: bool
    cost_usd_I: np.ndarray
    latency_s_I: np.ndarray
    is_disallowed_I: np.ndarray
    calls: tuple[tuple[int, int], ...]  # (tool, expert), in order
    failed: frozenset[tuple[int, int]]


# What a policy is: (node, legal_IA, believed_IA) -> probabilities_IA. `believed_IA` are the expected utilities of the actions
# under the weights that the policy believes in, its own later choices included; 0 where not legal.
Policy = Callable[[Node, np.ndarray, np.ndarray], np.ndarray]

STATISTICS = (
    "utility",
    "accuracy",
    "cost_usd",
    "latency_s",
    *(f"calls/{tool}" for tool in ROLES),
    *(f"calls/{expert.alias}" for expert in EXPERTS),
)


def make_charges(instances: Sequence[Instance], config: WorldConfig) -> Charges:
    """The tables of the recursion; an expert that is not on offer has zero charges and a False mask."""
    skills, num_instances = skill_tables(config), len(instances)
    is_offered_IE = np.zeros((num_instances, NUM_EXPERTS), bool)
    is_disallowed_IE = np.zeros((num_instances, NUM_EXPERTS), bool)
    cost_RIE, latency_RIE, success_RIE = (np.zeros((4, num_instances, NUM_EXPERTS)) for _ in range(3))
    column = {expert.alias: index for index, expert in enumerate(EXPERTS)}
    for i, instance in enumerate(instances):
        family, kind = FAMILY_INDEX[instance.task.family], KIND_INDEX[instance.task.kind]
        for offer in instance.offers:
            e = column[offer.alias]
            is_offered_IE[i, e] = True
            is_disallowed_IE[i, e] = not offer.is_local
            for r, (role, has_evidence) in enumerate((*((role, False) for role in ROLES), ("answer", True))):
                num_input, num_output = call_tokens(config, role, has_evidence)
                price = num_input * offer.input_usd_per_million_tokens + num_output * offer.output_usd_per_million_tokens
                cost_RIE[r, i, e] = price * 1e-6
                latency_RIE[r, i, e] = call_latency_s(config, offer, role)
        right_tool = EVIDENCE_TOOLS.index(instance.task.evidence_tool)
        success_RIE[right_tool, i] = skills.writer_FE[family]
        success_RIE[2, i], success_RIE[3, i] = skills.answer_FKEV[family, kind].T
    names = ("outcome", "cost_usd", "latency_s", "disallowed_calls")
    context, turn = config.orchestrator_nominal_context_tokens, config.orchestrator_nominal_turn_tokens
    return Charges(
        is_offered_IE=is_offered_IE,
        cost_usd_RIE=cost_RIE,
        latency_s_RIE=latency_RIE,
        success_RIE=success_RIE,
        is_disallowed_IE=is_disallowed_IE,
        weights_IM=np.array([[instance.preference.weights[name] for name in names] for instance in instances]),
        turn_cost_usd=(context + turn) * config.orchestrator_usd_per_million_tokens * 1e-6,
        turn_latency_s=turn / config.orchestrator_tokens_per_s,
        reference_cost_usd=config.reference_cost_usd,
        reference_latency_s=config.reference_latency_s,
        max_calls=config.max_calls,
    )


def root(charges: Charges) -> Node:
    zeros = np.zeros(len(charges.weights_IM))
    return Node(False, zeros, zeros, zeros.astype(bool), (), frozenset())


def after_call(charges: Charges, node: Node, tool: int, expert: int, is_found: bool) -> Node:
    """The node behind an evidence call that brought the evidence (`is_found`) or did not."""
    return Node(
        node.has_evidence or is_found,
        node.cost_usd_I + charges.turn_cost_usd + charges.cost_usd_RIE[tool, :, expert],
        node.latency_s_I + charges.turn_latency_s + charges.latency_s_RIE[tool, :, expert],
        node.is_disallowed_I | charges.is_disallowed_IE[:, expert],
        (*node.calls, (tool, expert)),
        node.failed if is_found else node.failed | {(tool, expert)},
    )


def utility(charges: Charges, weights_IM, success_IE, cost_usd_IE, latency_s_IE, is_disallowed_IE) -> np.ndarray:
    """U in expectation over y ~ Bernoulli(success): [I, E]."""
    w_o, w_c, w_l, w_x = weights_IM.T[:, :, None]
    cheapness_IE = 1 - np.minimum(cost_usd_IE / charges.reference_cost_usd, 1)
    speed_IE = 1 - np.minimum(latency_s_IE / charges.reference_latency_s, 1)
    return success_IE * (w_o + w_c * cheapness_IE + w_l * speed_IE) - w_x * is_disallowed_IE


def answer(charges: Charges, node: Node, believed_weights_IM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends the episode with each of the experts: statistics [I, E, S] and believed utilities [I, E]."""
    role = ANSWER + int(node.has_evidence)
    outcome = (
        charges.success_RIE[role],
        node.cost_usd_I[:, None] + charges.turn_cost_usd + charges.cost_usd_RIE[role],
        node.latency_s_I[:, None] + charges.turn_latency_s + charges.latency_s_RIE[role],
    )
    is_disallowed_IE = node.is_disallowed_I[:, None] | charges.is_disallowed_IE
    tool_calls = np.array([sum(tool == t for tool, _ in node.calls) for t in range(len(ROLES))], float)
    tool_calls[ANSWER] += 1
    expert_calls_EE = np.eye(NUM_EXPERTS) + [sum(expert == e for _, expert in node.calls) for e in range(NUM_EXPERTS)]
    shape = outcome[0].shape
    statistics_IES = np.concatenate(
        [
            np.stack([utility(charges, charges.weights_IM, *outcome, is_disallowed_IE), *outcome], axis=-1),
            np.broadcast_to(tool_calls, (*shape, len(ROLES))),
            np.broadcast_to(expert_calls_EE, (*shape, NUM_EXPERTS)),
        ],
        axis=-1,
    )
    return statistics_IES, utility(charges, believed_weights_IM, *outcome, is_disallowed_IE)


def evaluate(
    charges: Charges, policy: Policy, believed_weights_IM: np.ndarray | None = None, node: Node | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Exact expected statistics [I, S] of a policy from a node on (the root if None), and its believed utility [I].

    The policy chooses by utilities under `believed_weights_IM` (the true weights if None).
    """
    node = root(charges) if node is None else node
    believed_weights_IM = charges.weights_IM if believed_weights_IM is None else believed_weights_IM
    num_instances, num_actions = len(charges.weights_IM), len(ROLES) * NUM_EXPERTS
    statistics_IAS = np.zeros((num_instances, num_actions, len(STATISTICS)))
    believed_IA = np.zeros((num_instances, num_actions))
    last = slice(ANSWER * NUM_EXPERTS, None)
    statistics_IAS[:, last], believed_IA[:, last] = answer(charges, node, believed_weights_IM)
    is_last_call = len(node.calls) + 1 == charges.max_calls
    # On the last call only `answer` is worth considering: an episode without an answer is worth nothing.
    is_legal_A = np.repeat([not is_last_call, not is_last_call, True], NUM_EXPERTS)
    for action in range(0 if is_last_call else ANSWER * NUM_EXPERTS):
        tool, expert = divmod(action, NUM_EXPERTS)
        found_I = charges.success_RIE[tool, :, expert] * ((tool, expert) not in node.failed)
        found_I = np.ones_like(found_I) if node.has_evidence else found_I
        for is_found, chance_I in ((True, found_I), (False, 1 - found_I)):
            if chance_I.any():
                child = after_call(charges, node, tool, expert, is_found)
                statistics_IS, believed_I = evaluate(charges, policy, believed_weights_IM, child)
                statistics_IAS[:, action] += chance_I[:, None] * statistics_IS
                believed_IA[:, action] += chance_I * believed_I
    legal_IA = np.tile(charges.is_offered_IE, (1, len(ROLES))) & is_legal_A
    chance_IA = policy(node, legal_IA, believed_IA)
    return np.einsum("ia,ias->is", chance_IA, statistics_IAS), np.einsum("ia,ia->i", chance_IA, believed_IA)


def optimal_policy(node: Node, legal_IA: np.ndarray, believed_IA: np.ndarray) -> np.ndarray:
    """Takes the action of the highest believed value; the first one among equals."""
    return np.eye(legal_IA.shape[1])[np.argmax(np.where(legal_IA, believed_IA, -np.inf), axis=1)]


def random_policy(node: Node, legal_IA: np.ndarray, believed_IA: np.ndarray) -> np.ndarray:
    """A tool uniformly, then an expert on offer uniformly: how the demonstrations of the warm start route."""
    return legal_IA / legal_IA.sum(axis=1, keepdims=True)


def clairvoyant_statistics(charges: Charges, seed: int, num_draws: int = 16) -> np.ndarray:
    """[I, S]: the optimum of a policy that sees every draw beforehand, averaged over `num_draws` draws. A bound, no policy."""
    rng = np.random.default_rng(seed)
    total = 0.0
    for _ in range(num_draws):
        draw_RIE = rng.random(charges.success_RIE.shape)
        draw_RIE[ANSWER + 1] = draw_RIE[ANSWER]  # whoever is right without the evidence is right with it
        drawn = dataclasses.replace(charges, success_RIE=(draw_RIE < charges.success_RIE).astype(float))
        total = total + evaluate(drawn, optimal_policy)[0]
    return total / num_draws
