"""What is the best that can be done? Backward induction over the finite decision tree of the simulated world.

At each node a policy chooses a tool and an expert. An evidence tool either brings the evidence or visibly fails; asking
the same expert again in the same role gives the same result. `answer` ends the episode with utility

    U = y (w_o + w_c (1 - min(c / c_ref, 1)) + w_l (1 - min(l / l_ref, 1))) - w_x d        (rewards/preference.py)

The optimum knows what the prompt reveals and the success probabilities, not the draws. The same recursion, with what
the policy *believes* put in the place of what is, gives the exact value of every policy with less information
(price-blind, preference-blind, one route per family), and with a mean in the place of the maximum that of the random
policy. The clairvoyant bound sees the draws too. Who stands behind an alias is taken as known; of budgets and faults
the recursion knows nothing.

Shapes: I instances, A actions = tools x experts (experts in the world's order), E experts, S statistics (STATISTICS in
the default world).
Everything is vectorised over instances: a node of the tree stands for all of them at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from orchestra_jax.data.records import Instance
from orchestra_jax.experts.catalog import ROLES
from orchestra_jax.experts.world import (
    FAMILY_INDEX,
    KIND_INDEX,
    WorldConfig,
    call_latency_s,
    call_tokens,
    expert_names,
    skill_tables,
)

EVIDENCE_TOOLS = ROLES[:2]
ANSWER = ROLES.index("answer")


@dataclasses.dataclass(frozen=True)
class Charges:
    """What the world charges and knows, per instance and expert. Not offered experts have charges too, and a mask."""

    columns_I: tuple[dict[str, int], ...]  # by alias, of each instance: where its expert stands in E
    is_offered_TIE: np.ndarray  # T: tools, in the order of ROLES
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
    reach_I: np.ndarray  # the chance of coming here for whoever makes these calls; 0 where one of them is not on offer


# What a policy is: (node, legal_IA, believed_IA) -> probabilities_IA. `believed_IA` are the expected utilities of the
# actions under the weights that the policy believes in, its own later choices included; 0 where not legal.
Policy = Callable[[Node, np.ndarray, np.ndarray], np.ndarray]


def statistic_names(config: WorldConfig) -> tuple[str, ...]:
    """The columns of every table of statistics of a world; those before the experts are the same in each."""
    called = (*ROLES, *expert_names(config))
    return ("utility", "accuracy", "cost_usd", "latency_s", *(f"calls/{name}" for name in called))


STATISTICS = statistic_names(WorldConfig())  # of the default world


def make_charges(instances: Sequence[Instance], config: WorldConfig) -> Charges:
    """The tables of the recursion; an expert that is not on offer has zero charges and a False mask."""
    skills, num_instances = skill_tables(config), len(instances)
    # In memory the instances come last, so that numpy's inner loop runs over them and not over a handful of experts.
    column, num_experts = {model: index for index, model in enumerate(skills.models)}, len(skills.models)
    is_offered_TIE = np.zeros((len(ROLES), num_experts, num_instances), bool).swapaxes(1, 2)
    is_disallowed_IE = np.zeros((num_experts, num_instances), bool).T
    cost_RIE, latency_RIE, success_RIE = (np.zeros((4, num_experts, num_instances)).swapaxes(1, 2) for _ in range(3))
    for i, instance in enumerate(instances):
        family, kind = FAMILY_INDEX[instance.task.family], KIND_INDEX[instance.task.kind]
        for offer in instance.offers:
            e = column[offer.model]
            is_disallowed_IE[i, e] = not offer.is_local
            for r, (role, has_evidence) in enumerate((*((role, False) for role in ROLES), ("answer", True))):
                if role not in offer.roles:
                    continue
                is_offered_TIE[ROLES.index(role), i, e] = True
                num_input, num_output = call_tokens(config, role, has_evidence)
                price = (
                    num_input * offer.input_usd_per_million_tokens + num_output * offer.output_usd_per_million_tokens
                )
                cost_RIE[r, i, e] = price * 1e-6
                latency_RIE[r, i, e] = call_latency_s(config, offer, role)
        right_tool = EVIDENCE_TOOLS.index(instance.task.evidence_tool)
        success_RIE[right_tool, i] = skills.writer_FE[family]
        success_RIE[2, i], success_RIE[3, i] = skills.answer_FKEV[family, kind].T
    names = ("outcome", "cost_usd", "latency_s", "disallowed_calls")
    context, turn = config.orchestrator_nominal_context_tokens, config.orchestrator_nominal_turn_tokens
    return Charges(
        columns_I=tuple({offer.alias: column[offer.model] for offer in instance.offers} for instance in instances),
        is_offered_TIE=is_offered_TIE,
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
    num_instances = len(charges.weights_IM)
    zeros_I = np.zeros(num_instances)
    return Node(False, zeros_I, zeros_I, zeros_I.astype(bool), (), frozenset(), np.ones(num_instances))


def found_chance(charges: Charges, node: Node, tool: int, expert: int) -> np.ndarray:
    """[I]: the chance that the evidence is there behind an evidence call; a writer that failed once fails again."""
    if node.has_evidence:
        return np.ones(len(charges.weights_IM))
    return charges.success_RIE[tool, :, expert] * ((tool, expert) not in node.failed)


def after_call(charges: Charges, node: Node, tool: int, expert: int, is_found: bool) -> Node:
    """The node behind an evidence call that brought the evidence (`is_found`) or did not."""
    found_I = found_chance(charges, node, tool, expert)
    return Node(
        node.has_evidence or is_found,
        node.cost_usd_I + charges.turn_cost_usd + charges.cost_usd_RIE[tool, :, expert],
        node.latency_s_I + charges.turn_latency_s + charges.latency_s_RIE[tool, :, expert],
        node.is_disallowed_I | charges.is_disallowed_IE[:, expert],
        (*node.calls, (tool, expert)),
        node.failed if is_found else node.failed | {(tool, expert)},
        node.reach_I * charges.is_offered_TIE[tool, :, expert] * (found_I if is_found else 1 - found_I),
    )


def utility(charges: Charges, weights_IM, success_IE, cost_usd_IE, latency_s_IE, is_disallowed_IE) -> np.ndarray:
    """U in expectation over y ~ Bernoulli(success): [I, E]."""
    w_o, w_c, w_l, w_x = weights_IM.T[:, :, None]
    cheapness_IE = 1 - np.minimum(cost_usd_IE / charges.reference_cost_usd, 1)
    speed_IE = 1 - np.minimum(latency_s_IE / charges.reference_latency_s, 1)
    return success_IE * (w_o + w_c * cheapness_IE + w_l * speed_IE) - w_x * is_disallowed_IE


def answer(charges: Charges, node: Node) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What ending the episode by each expert comes to: success, cost_usd, latency_s, is_disallowed; each [I, E]."""
    role = ANSWER + int(node.has_evidence)
    return (
        charges.success_RIE[role],
        node.cost_usd_I[:, None] + charges.turn_cost_usd + charges.cost_usd_RIE[role],
        node.latency_s_I[:, None] + charges.turn_latency_s + charges.latency_s_RIE[role],
        node.is_disallowed_I[:, None] | charges.is_disallowed_IE,
    )


def evaluate(
    charges: Charges, policy: Policy, believed_weights_IM: np.ndarray | None = None, node: Node | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Exact expected statistics [I, S] of a policy from a node on (the root if None), and its believed utility [I].

    The policy chooses by utilities under `believed_weights_IM` (the true weights if None).
    """
    node = root(charges) if node is None else node
    believed_weights_IM = charges.weights_IM if believed_weights_IM is None else believed_weights_IM
    num_instances, num_experts = charges.is_disallowed_IE.shape
    num_early = ANSWER * num_experts
    # On the last call only `answer` is worth considering: an episode without an answer is worth nothing.
    is_last_call = len(node.calls) + 1 == charges.max_calls
    believed_IA = np.zeros((num_early + num_experts, num_instances)).T
    early = []  # (action, chance_I, statistics_IS) by evidence call and what it brings
    for action in range(0 if is_last_call else num_early):
        tool, expert = divmod(action, num_experts)
        if not charges.is_offered_TIE[tool, :, expert].any():
            continue
        found_I = found_chance(charges, node, tool, expert)
        for is_found, chance_I in ((True, found_I), (False, 1 - found_I)):
            if chance_I.any():
                child = after_call(charges, node, tool, expert, is_found)
                statistics_IS, believed_I = evaluate(charges, policy, believed_weights_IM, child)
                early.append((action, chance_I, statistics_IS))
                believed_IA[:, action] += chance_I * believed_I
    answered = answer(charges, node)
    utility_IE = utility(charges, charges.weights_IM, *answered)
    is_believed_true = believed_weights_IM is charges.weights_IM
    believed_IA[:, num_early:] = utility_IE if is_believed_true else utility(charges, believed_weights_IM, *answered)

    legal_IA = np.concatenate(
        [charges.is_offered_TIE[tool] & (tool == ANSWER or not is_last_call) for tool in range(len(ROLES))], 1
    )
    chance_IA = policy(node, legal_IA, believed_IA)
    statistics_IS = _answer_statistics(node, chance_IA[:, num_early:], (utility_IE, *answered[:3]))
    for action, chance_I, further_IS in early:
        statistics_IS += (chance_IA[:, action] * chance_I)[:, None] * further_IS
    return statistics_IS, np.einsum("ia,ia->i", chance_IA, believed_IA)


def _answer_statistics(node: Node, chance_IE: np.ndarray, values_IE: Sequence[np.ndarray]) -> np.ndarray:
    """[I, S]: the share that ending the episode here, by each expert with its chance, has in the expected statistics.

    values_IE: the first four of STATISTICS. How often each tool and expert was called before is the same for all of I.
    """
    num_experts = chance_IE.shape[1]
    statistics_IS = np.empty((len(values_IE) + len(ROLES) + num_experts, len(chance_IE))).T
    for column, value_IE in enumerate(values_IE):
        statistics_IS[:, column] = np.einsum("ie,ie->i", chance_IE, value_IE)
    ending_I = chance_IE.sum(axis=1)
    columns = iter(range(len(values_IE), statistics_IS.shape[1]))
    for tool, column in zip(range(len(ROLES)), columns):
        count = sum(called == tool for called, _ in node.calls) + int(tool == ANSWER)
        statistics_IS[:, column] = count * ending_I
    for expert, column in zip(range(num_experts), columns):
        count = sum(called == expert for _, called in node.calls)
        statistics_IS[:, column] = count * ending_I + chance_IE[:, expert]
    return statistics_IS


def optimal_policy(node: Node, legal_IA: np.ndarray, believed_IA: np.ndarray) -> np.ndarray:
    """Takes the action of the highest believed value; among equals the last one: it rather answers than calls on."""
    value_IA = np.where(legal_IA, believed_IA, -np.inf)
    is_best_IA = value_IA == value_IA.max(axis=1, keepdims=True)
    num_best_from_here_IA = np.cumsum(is_best_IA[:, ::-1], axis=1)[:, ::-1]
    return (is_best_IA & (num_best_from_here_IA == 1)).astype(float)


def random_policy(node: Node, legal_IA: np.ndarray, believed_IA: np.ndarray) -> np.ndarray:
    """A tool uniformly, then an expert on offer uniformly: how the demonstrations of the warm start route."""
    num_legal_IT = legal_IA.reshape(len(legal_IA), len(ROLES), -1).sum(axis=2)
    num_tools_I1 = (num_legal_IT > 0).sum(axis=1, keepdims=True)
    ways_IA = np.repeat(np.maximum(num_legal_IT, 1) * num_tools_I1, legal_IA.shape[1] // len(ROLES), axis=1)
    return np.divide(legal_IA, ways_IA, order="F")


def clairvoyant_statistics(charges: Charges, seed: int, num_draws: int = 16) -> np.ndarray:
    """[I, S]: the optimum of one who sees every draw beforehand, a mean over `num_draws` draws. A bound, no policy."""
    rng = np.random.default_rng(seed)
    total = 0.0
    for _ in range(num_draws):
        draw_RIE = rng.random(charges.success_RIE.shape)
        draw_RIE[ANSWER + 1] = draw_RIE[ANSWER]  # whoever is right without the evidence is right with it
        drawn = dataclasses.replace(charges, success_RIE=(draw_RIE < charges.success_RIE).astype(float))
        total = total + evaluate(drawn, optimal_policy)[0]
    return total / num_draws
