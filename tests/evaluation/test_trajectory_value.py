"""Played episodes valued as the oracle values: the optimum, played, averages to the optimum."""

import asyncio

import numpy as np
import pytest

from orchestra_jax import chat as chat_format
from orchestra_jax.data.pipeline import evaluation_instances
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.demonstrations import demonstrate
from orchestra_jax.environments.rollout import run_episode
from orchestra_jax.evaluation.oracle import (
    ROLES,
    STATISTICS,
    evaluate,
    make_charges,
    optimal_policy,
    random_policy,
)
from orchestra_jax.evaluation.trajectory_value import expected_statistics
from orchestra_jax.experts.catalog import EXPERTS
from orchestra_jax.experts.world import WorldConfig
from orchestra_jax.generation.scripted_engine import ScriptedEngine
from orchestra_jax.tools.ledger import make_receipt
from orchestra_jax.types import CallRecord, CallStatus, EpisodeStatus, ToolCall, Trajectory

WORLD = WorldConfig()
NUM_ROLLOUTS = 10
FOUND = ("documents found", "program printed")


@pytest.fixture(scope="module")
def instances(components):
    return evaluation_instances(components.test_tasks, list(PREFERENCES.values()), WORLD, 40, seed=0)


@pytest.fixture(scope="module")
def charges(instances):
    return make_charges(instances, WORLD)


def standard_error(values_IR):
    """Of the mean over instances and rollouts. The draws are the same under every preference: one sample, not five."""
    by_draw_NR = values_IR.reshape(len(PREFERENCES), -1, values_IR.shape[1]).mean(axis=0)
    return np.sqrt((by_draw_NR.var(axis=1, ddof=1) / values_IR.shape[1]).sum()) / len(by_draw_NR)


def play_optimum(components, instances, charges):
    """`NUM_ROLLOUTS` episodes of each instance, every call the oracle's choice for what has come back so far."""
    choices = {}

    def recording(node, legal_IA, believed_IA):
        chance_IA = optimal_policy(node, legal_IA, believed_IA)
        choices[node.calls, node.has_evidence, node.failed] = chance_IA.argmax(axis=1)
        return chance_IA

    optimum_IS = evaluate(charges, recording)[0]
    row = {instance.instance_id: i for i, instance in enumerate(instances)}
    calls_so_far = {}

    def script(session_id, turn, prompt_tokens):
        instance_id = session_id.rsplit("#", 1)[0]
        calls = calls_so_far.setdefault(session_id, [])
        shown = chat_format.decode(components.chat, prompt_tokens).split("<tool_response>")[1:]
        is_found = [any(summary in text for summary in FOUND) for text in shown]
        assert len(is_found) == len(calls) == turn
        failed = frozenset(call for call, found in zip(calls, is_found) if not found)
        action = choices[tuple(calls), any(is_found), failed][row[instance_id]]
        tool, expert = divmod(int(action), len(EXPERTS))
        calls.append((tool, expert))
        return chat_format.encode_turn(components.chat, "", [ToolCall(ROLES[tool], {"model": EXPERTS[expert].alias})])

    async def play():
        engine = ScriptedEngine(script)
        return await asyncio.gather(
            *(
                run_episode(instance, rollout, components.environment, engine, components.chat, components.rollout, 0)
                for rollout in range(NUM_ROLLOUTS)
                for instance in instances
            )
        )

    return optimum_IS, asyncio.run(play())


def test_the_optimum_when_played_averages_to_the_optimum(components, instances, charges):
    optimum_IS, trajectories = play_optimum(components, instances, charges)
    num_instances = len(instances)
    played_RIS = np.stack(
        [
            expected_statistics(charges, trajectories[rollout * num_instances : (rollout + 1) * num_instances])
            for rollout in range(NUM_ROLLOUTS)
        ]
    )
    assert all(trajectory.status == EpisodeStatus.ANSWERED for trajectory in trajectories)
    for column, name in enumerate(STATISTICS):
        difference = played_RIS[..., column].mean() - optimum_IS[:, column].mean()
        error = standard_error(played_RIS[..., column].T)
        # A rare branch that no rollout took leaves no variance: one episode is the finest that can be told.
        resolution = played_RIS[..., column].max() / len(trajectories)
        assert abs(difference) <= 4 * error + resolution, (name, difference, error)
    assert 0.001 < played_RIS[..., 0].std(axis=0).mean() < 0.2  # what the evidence draws leave of chance


def test_money_and_time_are_the_ledgers_but_for_the_nominal_turns(components, instances, charges):
    groups = demonstrate(instances, 1, components.environment, components.chat, components.rollout, seed=3)
    trajectories = [group.trajectories[0] for group in groups]
    for trajectory, row_S in zip(trajectories, expected_statistics(charges, trajectories)):
        statistics = dict(zip(STATISTICS, row_S))
        own = [receipt for receipt in trajectory.receipts if receipt.tool == "orchestrator"]
        excess_tokens = sum(170 - receipt.input_tokens - receipt.output_tokens for receipt in own)
        excess_s = sum(20 - receipt.output_tokens for receipt in own) / WORLD.orchestrator_tokens_per_s
        usd = trajectory.objectives["cost_usd"] + excess_tokens * 0.2e-6
        assert statistics["cost_usd"] == pytest.approx(usd, abs=1e-12)
        assert statistics["latency_s"] == pytest.approx(trajectory.objectives["latency_s"] + excess_s, abs=1e-9)
        for tool in ROLES:
            assert statistics[f"calls/{tool}"] == trajectory.objectives[f"calls/{tool}"]


def test_demonstrations_come_to_the_random_policy(components, instances, charges):
    num_rollouts = 6
    groups = demonstrate(instances, num_rollouts, components.environment, components.chat, components.rollout, seed=5)
    values_IR = np.stack(
        [expected_statistics(charges, [group.trajectories[r] for group in groups])[:, 0] for r in range(num_rollouts)],
        1,
    )
    expected = evaluate(charges, random_policy)[0][:, 0].mean()
    assert abs(values_IR.mean() - expected) < 4 * standard_error(values_IR) < 0.1


def trajectory_of(turns, status=EpisodeStatus.ANSWERED):
    """A trajectory with these calls, (tool, alias, status, is_evidence_present) turn by turn, and no tokens."""
    records, receipts = [], []
    for turn in turns:
        receipts.append(make_receipt("orchestrator", service_s=0.1))
        for tool, alias, call_status, is_present in turn:
            records.append(CallRecord(ToolCall(tool, {"model": alias}), "", call_status, is_present))
            receipts.append(make_receipt(tool, service_s=1.0, status=call_status))
    empty = np.zeros(0, np.int32)
    fields = (empty, empty.astype(bool), empty.astype(np.float32), empty, 0, tuple(records), tuple(receipts))
    return Trajectory("i", 0, *fields, status, "", {})


def value_of(charges, turns, status=EpisodeStatus.ANSWERED):
    num_others = len(charges.weights_IM) - 1
    row_S = expected_statistics(charges, [trajectory_of(turns, status)] + [trajectory_of([])] * num_others)[0]
    return dict(zip(STATISTICS, row_S))


@pytest.fixture
def aliases(instances):
    return [offer.alias for offer in instances[0].offers]


def column(alias):
    return int(alias[-1]) - 1


def test_calls_of_one_turn_share_it_and_do_not_see_each_others_evidence(instances, charges, aliases):
    tool, (one, other) = instances[0].task.evidence_tool, aliases[:2]
    ok = CallStatus.OK
    together = value_of(charges, [[(tool, one, ok, True), ("answer", other, ok, True)]])
    assert together["accuracy"] == charges.success_RIE[2, 0, column(other)]  # not [3]: asked without the evidence
    seconds = (charges.latency_s_RIE[ROLES.index(tool), 0, column(one)], charges.latency_s_RIE[2, 0, column(other)])
    assert together["latency_s"] == pytest.approx(charges.turn_latency_s + max(seconds))
    in_turn = value_of(charges, [[(tool, one, ok, True)], [("answer", other, ok, True)]])
    assert in_turn["accuracy"] == charges.success_RIE[3, 0, column(other)]
    assert in_turn["latency_s"] == pytest.approx(2 * charges.turn_latency_s + sum(seconds))
    evidence_usd = charges.cost_usd_RIE[3, 0, column(other)] - charges.cost_usd_RIE[2, 0, column(other)]
    assert in_turn["cost_usd"] - together["cost_usd"] == pytest.approx(charges.turn_cost_usd + evidence_usd)


def test_the_first_of_two_answers_counts(charges, aliases):
    ok = CallStatus.OK
    both = value_of(charges, [[("answer", alias, ok, False) for alias in aliases[:2]]])
    assert both["accuracy"] == charges.success_RIE[2, 0, column(aliases[0])]
    assert both["calls/answer"] == 2.0


def test_what_did_not_run_costs_its_turn_alone(charges, aliases):
    refused = value_of(charges, [[("answer", aliases[0], CallStatus.REFUSED, False)], []], EpisodeStatus.MALFORMED)
    assert (refused["accuracy"], refused["utility"], refused["calls/answer"]) == (0.0, 0.0, 0.0)
    assert refused["cost_usd"] == pytest.approx(2 * charges.turn_cost_usd)
    assert refused["latency_s"] == pytest.approx(2 * charges.turn_latency_s)


def test_a_broken_rule_is_paid_without_an_answer(instances, charges):
    i = next(i for i, instance in enumerate(instances) if instance.preference.is_local_only)
    remote = next(offer.alias for offer in instances[i].offers if not offer.is_local)
    broken = trajectory_of([[("search", remote, CallStatus.OK, False)]], EpisodeStatus.TURN_LIMIT)
    trajectories = [broken if number == i else trajectory_of([]) for number in range(len(instances))]
    assert expected_statistics(charges, trajectories)[i, 0] == pytest.approx(-1.5)
