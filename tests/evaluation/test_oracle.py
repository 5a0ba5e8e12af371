"""The oracle against plain recursion on one instance: written from the rules of the world, sharing no code with it.

The reference knows an instance, the price rules and the probabilities; it has no arrays, no masks and no tables.
"""

import asyncio
import dataclasses
import itertools

import numpy as np
import pytest

from orchestra_jax.data.instances import make_instance
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.questions import FAMILIES
from orchestra_jax.data.records import Task
from orchestra_jax.demonstrations import random_turn
from orchestra_jax.evaluation.baselines import evaluate_baselines
from orchestra_jax.evaluation.oracle import (
    STATISTICS,
    clairvoyant_statistics,
    evaluate,
    make_charges,
    optimal_policy,
    random_policy,
)
from orchestra_jax.experts.expert import ExpertRequest
from orchestra_jax.experts.simulated import SimulatedExperts
from orchestra_jax.experts.world import WorldConfig, skill_tables
from orchestra_jax.seeds import derive_seed
from orchestra_jax.tools.tool import Evidence

UTILITY = STATISTICS.index("utility")


def make_task(family, kind, number=0):
    is_fact = family in ("geography", "chemistry")
    return Task(
        f"{family}/{kind}/{number}",
        family,
        kind,
        "?",
        "right",
        "search" if is_fact else "enhance_reasoning",
        gold_document_ids=("a",) if is_fact else (),
        query="good",
        poor_query="poor",
        program="good",
        poor_program="poor",
        wrong_answer="wrong",
    )


def draw_instances(config, num_draws, seed=0):
    cells = [(family, kind) for family, kinds in FAMILIES.items() for kind in kinds]
    return [
        make_instance(make_task(*cells[number % len(cells)], number), preference, config, seed + number)
        for preference in PREFERENCES.values()
        for number in range(num_draws)
    ]


class Reference:
    """The value of one instance by recursion; `choose` reduces the values of the possible calls, tool by tool."""

    def __init__(self, instance, config, choose):
        self.instance, self.config, self.choose = instance, config, choose
        self.experts = SimulatedExperts(config)

    def chance(self, role, offer, has_evidence):
        return self.experts.success_probability(ExpertRequest(role, self.instance, offer, Evidence(), has_evidence, 0))

    def charge(self, role, offer, has_evidence):
        """Dollars and seconds of a call and of the orchestrator's turn that makes it."""
        c = self.config
        tokens = {
            "search": (500, 200),
            "enhance_reasoning": (500, 200),
            "answer": (1500 if has_evidence else 1000, 500),
        }
        num_input, num_output = tokens[role]
        cost_usd = num_input * offer.input_usd_per_million_tokens + num_output * offer.output_usd_per_million_tokens
        turn_tokens = c.orchestrator_nominal_context_tokens + c.orchestrator_nominal_turn_tokens
        cost_usd += turn_tokens * c.orchestrator_usd_per_million_tokens
        share = 1.0 if role == "answer" else c.writer_latency_share
        turn_s = c.orchestrator_nominal_turn_tokens / c.orchestrator_tokens_per_s
        return cost_usd / 1e6, offer.latency_s * share + turn_s

    def utility(self, chance, cost_usd, latency_s, is_disallowed):
        w = self.instance.preference.weights
        cheap = 1 - min(cost_usd / self.config.reference_cost_usd, 1)
        fast = 1 - min(latency_s / self.config.reference_latency_s, 1)
        return (
            chance * (w["outcome"] + w["cost_usd"] * cheap + w["latency_s"] * fast)
            - w["disallowed_calls"] * is_disallowed
        )

    def value(
        self, num_calls=0, has_evidence=False, failed=frozenset(), cost_usd=0.0, latency_s=0.0, is_disallowed=False
    ):
        values = {}
        for role, offer in itertools.product(("search", "enhance_reasoning", "answer"), self.instance.offers):
            call_usd, call_s = self.charge(role, offer, has_evidence)
            spent = (cost_usd + call_usd, latency_s + call_s, is_disallowed or not offer.is_local)
            if role == "answer":
                values.setdefault(role, []).append(self.utility(self.chance(role, offer, has_evidence), *spent))
            elif num_calls + 1 < self.config.max_calls:
                key = (role, offer.alias)
                chance = 1.0 if has_evidence else 0.0 if key in failed else self.chance(role, offer, False)
                found = self.value(num_calls + 1, True, failed, *spent) if chance > 0 else 0.0
                missed = self.value(num_calls + 1, False, failed | {key}, *spent) if chance < 1 else 0.0
                values.setdefault(role, []).append(chance * found + (1 - chance) * missed)
        return self.choose(list(values.values()))


def best(values_by_tool):
    return max(max(values) for values in values_by_tool)


def mean_of_means(values_by_tool):
    return float(np.mean([np.mean(values) for values in values_by_tool]))


WORLDS = {
    "default": WorldConfig(),
    "other tables, 2 calls": WorldConfig(seed=5, max_calls=2),
    "other references": WorldConfig(seed=1, num_offered=3, reference_cost_usd=0.02, reference_latency_s=120.0),
    "1 call": WorldConfig(seed=2, max_calls=1),
}


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize(("policy", "choose"), [(optimal_policy, best), (random_policy, mean_of_means)])
def test_equals_plain_recursion(name, policy, choose):
    config = WORLDS[name]
    instances = draw_instances(config, num_draws=8, seed=100)[:: 1 if config.max_calls < 3 else 3]
    values_I = evaluate(make_charges(instances, config), policy)[0][:, UTILITY]
    expected_I = [Reference(instance, config, choose).value() for instance in instances]
    np.testing.assert_allclose(values_I, expected_I, rtol=0, atol=1e-12)


def test_no_closed_loop_plan_beats_the_optimum():
    """Every deterministic plan of a world with 2 calls: a first call, and an answer for each of its two results."""
    config = WorldConfig(max_calls=2, num_offered=2)
    instances = draw_instances(config, num_draws=4)
    optimum_I = evaluate(make_charges(instances, config), optimal_policy)[0][:, UTILITY]
    for instance, optimum in zip(instances, optimum_I):
        plans = []
        for first in itertools.product(("search", "enhance_reasoning", "answer"), instance.offers):
            plans += [
                _plan_value(instance, config, first, then) for then in itertools.product(instance.offers, repeat=2)
            ]
        assert max(plans) == pytest.approx(optimum, abs=1e-12)


def _plan_value(instance, config, first, then):
    """A first call, and who answers behind it: then[0] with the evidence, then[1] without."""
    reference, (role, offer) = Reference(instance, config, best), first
    usd, seconds = reference.charge(role, offer, False)
    chance = reference.chance(role, offer, False)
    if role == "answer":
        return reference.utility(chance, usd, seconds, not offer.is_local)
    value = 0.0
    for share, has_evidence, answering in ((chance, True, then[0]), (1 - chance, False, then[1])):
        more_usd, more_s = reference.charge("answer", answering, has_evidence)
        is_disallowed = not (offer.is_local and answering.is_local)
        right = reference.chance("answer", answering, has_evidence)
        value += share * reference.utility(right, usd + more_usd, seconds + more_s, is_disallowed)
    return value


@pytest.mark.parametrize("seed", [0, 4])
def test_optimum_beats_every_baseline_on_every_instance(seed):
    config = WorldConfig(seed=seed)
    instances = draw_instances(config, num_draws=24)
    charges = make_charges(instances, config)
    optimum_I = evaluate(charges, optimal_policy)[0][:, UTILITY]
    for name, statistics_IS in evaluate_baselines(instances, charges, skill_tables(config)).items():
        assert (statistics_IS[:, UTILITY] <= optimum_I + 1e-12).all(), name
        assert (statistics_IS[:, UTILITY] < optimum_I - 1e-6).any(), name


def test_random_policy_is_what_random_turns_come_to():
    """Monte Carlo: `random_turn` played against SimulatedExperts, with realised answers, by the reward's formula."""
    config, num_rollouts = WorldConfig(), 60
    instances = draw_instances(config, num_draws=4)
    statistics_IS = evaluate(make_charges(instances, config), random_policy)[0]
    experts, played = SimulatedExperts(config), np.zeros((len(instances), num_rollouts, 3))

    async def play(instance, rollout):
        rng = np.random.default_rng(derive_seed("test", instance.instance_id, rollout))
        reference = Reference(instance, config, best)
        has_evidence, cost_usd, latency_s, is_disallowed = False, 0.0, 0.0, False
        for turn in range(config.max_calls):
            call = random_turn(instance, turn, config.max_calls, rng)
            offer = instance.offer(call.arguments["model"])
            usd, seconds = reference.charge(call.name, offer, has_evidence)
            cost_usd, latency_s, is_disallowed = (
                cost_usd + usd,
                latency_s + seconds,
                is_disallowed or not offer.is_local,
            )
            reply = await experts.reply(ExpertRequest(call.name, instance, offer, Evidence(), has_evidence, rollout))
            if call.name == "answer":
                right = float(reply.text == "right")
                return reference.utility(right, cost_usd, latency_s, is_disallowed), right, cost_usd
            has_evidence = has_evidence or reply.text == "good"
        raise AssertionError("the last call that is allowed is an answer")

    async def play_all():
        for i, instance in enumerate(instances):
            for rollout in range(num_rollouts):
                played[i, rollout] = await play(instance, rollout)

    asyncio.run(play_all())
    for column, (name, tolerance) in enumerate({"utility": 0.02, "accuracy": 0.02, "cost_usd": 5e-4}.items()):
        values = played[..., column]
        error = np.sqrt((values.var(axis=1, ddof=1) / num_rollouts).sum()) / len(instances)
        expected = statistics_IS[:, STATISTICS.index(name)].mean()
        assert abs(values.mean() - expected) < 4 * error, (name, values.mean(), expected)
        assert error < tolerance, (name, error)


def test_clairvoyance_is_worth_something_and_never_costs():
    config = WorldConfig()
    instances = draw_instances(config, num_draws=16)
    charges = make_charges(instances, config)
    optimum = evaluate(charges, optimal_policy)[0][:, UTILITY].mean()
    assert clairvoyant_statistics(charges, seed=0, num_draws=8)[:, UTILITY].mean() > optimum + 0.02
    # Where nothing is left to chance, there is nothing to foresee.
    certain = dataclasses.replace(charges, success_RIE=(charges.success_RIE > 0.5).astype(float))
    foreseen_I = clairvoyant_statistics(certain, seed=0, num_draws=2)[:, UTILITY]
    np.testing.assert_allclose(foreseen_I, evaluate(certain, optimal_policy)[0][:, UTILITY], atol=1e-12)


def test_counts_and_sums_of_the_statistics():
    config = WorldConfig(max_calls=3)
    instances = draw_instances(config, num_draws=8)
    for policy in (optimal_policy, random_policy):
        statistics = dict(zip(STATISTICS, evaluate(make_charges(instances, config), policy)[0].T))
        tools = [statistics[f"calls/{tool}"] for tool in ("search", "enhance_reasoning", "answer")]
        experts = [value for name, value in statistics.items() if name.startswith("calls/expert")]
        np.testing.assert_allclose(tools[2], 1.0, atol=1e-12)  # every episode ends with one answer
        np.testing.assert_allclose(np.sum(tools, axis=0), np.sum(experts, axis=0), atol=1e-12)
        assert (statistics["accuracy"] > 0).all() and (np.sum(tools, axis=0) <= config.max_calls + 1e-12).all()
    random_calls = statistics["calls/search"]  # 1/3 in the first turn; in the second 1/3 of the 2/3 that go on
    np.testing.assert_allclose(random_calls, 1 / 3 + 2 / 9, atol=1e-12)


def test_a_dearer_rule_is_broken_less_and_never_pays():
    config, values = WorldConfig(), []
    for penalty in (0.0, 0.1, 0.3, 1.5):
        weights = {**PREFERENCES["local"].weights, "disallowed_calls": penalty}
        preference = dataclasses.replace(PREFERENCES["local"], weights=weights)
        instances = [make_instance(make_task("geography", "two_hop", n), preference, config, n) for n in range(60)]
        statistics = dict(zip(STATISTICS, evaluate(make_charges(instances, config), optimal_policy)[0].T))
        remote = sum(statistics[f"calls/expert-{number}"] for number in (1, 2, 6))
        values.append((statistics["utility"], remote))
    for (utility_I, remote_I), (dearer_I, fewer_I) in itertools.pairwise(values):
        assert (dearer_I <= utility_I + 1e-12).all() and (fewer_I.mean() < remote_I.mean())
    np.testing.assert_allclose(values[-1][1], 0.0, atol=1e-12)  # at 1.5 nobody calls a remote expert


def test_a_tie_goes_to_the_answer():
    legal_IA = np.ones((2, 18), bool)
    legal_IA[1, 12:] = False
    np.testing.assert_array_equal(optimal_policy(None, legal_IA, np.zeros((2, 18))).argmax(axis=1), [17, 11])
    np.testing.assert_array_equal(optimal_policy(None, legal_IA, np.zeros((2, 18))).sum(axis=1), [1, 1])
