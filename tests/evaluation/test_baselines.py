"""What each baseline may know: prices, preferences, families; and that "best" means best under that."""

import dataclasses
import functools

import numpy as np
import pytest

from orchestra_jax.data.pipeline import evaluation_instances
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.questions import build_tasks
from orchestra_jax.data.records import Offer
from orchestra_jax.evaluation.baselines import by_score, evaluate_baselines, knowing_only, scores
from orchestra_jax.evaluation.oracle import (
    ANSWER,
    STATISTICS,
    evaluate,
    make_charges,
    optimal_policy,
    random_policy,
)
from orchestra_jax.experts.catalog import EXPERTS
from orchestra_jax.experts.world import WorldConfig, skill_tables

CONFIG = WorldConfig()
UTILITY = STATISTICS.index("utility")


def draw_instances(config, num_draws):
    return evaluation_instances(build_test_tasks(), list(PREFERENCES.values()), config, num_draws, seed=0)


@functools.cache
def build_test_tasks():
    return build_tasks("test", num_per_cell=10, seed=0)


def choices(charges, policy):
    """The actions [I] that a deterministic policy takes, by (calls, has_evidence, failed)."""
    taken = {}

    def recording(node, legal_IA, believed_IA):
        chance_IA = policy(node, legal_IA, believed_IA)
        taken[node.calls, node.has_evidence, node.failed] = chance_IA.argmax(axis=1)
        return chance_IA

    evaluate(charges, recording)
    return taken


def cell_key(instances):
    return np.array([f"{i.task.family} {i.task.kind} {i.preference.name}" for i in instances])


def test_a_price_blind_policy_ignores_prices_and_latencies():
    instances = draw_instances(CONFIG, num_draws=80)
    taken = choices(make_charges(instances, CONFIG), knowing_only(cell_key(instances)))
    alike = {}
    for i, instance in enumerate(instances):
        alike.setdefault((cell_key([instance])[0], tuple(offer.alias for offer in instance.offers)), []).append(i)
    groups = [rows for rows in alike.values() if len(rows) > 1]
    assert len(groups) > 20
    for actions_I in taken.values():
        assert all(len(set(actions_I[rows])) == 1 for rows in groups)


def test_knowing_everything_is_the_optimum():
    instances = draw_instances(CONFIG, num_draws=8)
    charges = make_charges(instances, CONFIG)
    everything = evaluate(charges, knowing_only(np.arange(len(instances))))[0]
    np.testing.assert_allclose(everything[:, UTILITY], evaluate(charges, optimal_policy)[0][:, UTILITY], atol=1e-12)


def test_those_who_cannot_come_to_a_node_have_no_say_there():
    """Instances without expert-1 do not change what the others do once they have called expert-1."""
    config = dataclasses.replace(CONFIG, max_calls=3)  # deep enough for many nodes behind the first call
    instances = draw_instances(config, num_draws=40)
    with_first = [i for i in instances if i.offer("expert-1") is not None]
    without_first = [i for i in instances if i.offer("expert-1") is None]
    alone, together = (
        choices(make_charges(some, config), knowing_only(cell_key(some)))
        for some in (with_first, with_first + without_first)
    )
    behind_first = [key for key in alone if any(expert == 0 for _, expert in key[0])]
    assert len(behind_first) > 50
    for key in behind_first:
        rows = [i for i, instance in enumerate(with_first) if _can_come(key, instance)]
        np.testing.assert_array_equal(alone[key][rows], together[key][rows])


def _can_come(key, instance):
    return all(instance.offer(EXPERTS[expert].alias) is not None for _, expert in key[0])


def test_more_knowledge_is_worth_more():
    config = WorldConfig()
    instances = draw_instances(config, num_draws=160)
    charges = make_charges(instances, config)
    means = {
        name: statistics_IS[:, UTILITY].mean()
        for name, statistics_IS in evaluate_baselines(instances, charges, skill_tables(config)).items()
    }
    optimum = evaluate(charges, optimal_policy)[0][:, UTILITY].mean()
    assert means["best_fixed_route"] < means["best_route_per_family"] < means["price_blind"] < optimum
    assert means["random"] < means["best_fixed_route"] and means["preference_blind"] < optimum
    assert means["cheapest"] < means["cheapest_with_evidence"]


def test_static_routes_call_what_they_say():
    instances = draw_instances(CONFIG, num_draws=16)
    charges, skills = make_charges(instances, CONFIG), skill_tables(CONFIG)
    statistics = evaluate_baselines(instances, charges, skills)
    calls = {name: dict(zip(STATISTICS, table_IS.T)) for name, table_IS in statistics.items()}
    for name in ("strongest", "cheapest"):
        np.testing.assert_allclose(calls[name]["calls/search"] + calls[name]["calls/enhance_reasoning"], 0.0)
        np.testing.assert_allclose(calls[f"{name}_with_evidence"]["calls/answer"], 1.0)
        is_fact_I = np.array([instance.task.evidence_tool == "search" for instance in instances])
        np.testing.assert_allclose(calls[f"{name}_with_evidence"]["calls/search"], is_fact_I)
        np.testing.assert_allclose(calls[f"{name}_with_evidence"]["calls/enhance_reasoning"], ~is_fact_I)
    mean_strength = skills.answer_FKEV[..., 1].mean(axis=(0, 1))
    for i, instance in enumerate(instances):
        strongest = max(instance.offers, key=lambda offer: mean_strength[int(offer.alias[-1]) - 1])
        assert calls["strongest"][f"calls/{strongest.alias}"][i] == 1.0
        price = min(offer.output_usd_per_million_tokens for offer in instance.offers)
        chosen = next(offer for offer in instance.offers if calls["cheapest"][f"calls/{offer.alias}"][i] == 1.0)
        assert chosen.output_usd_per_million_tokens == price


def test_a_score_outside_the_offer_is_never_taken():
    instances = draw_instances(CONFIG, num_draws=8)
    wanted = np.arange(3 * len(EXPERTS), dtype=float) + np.repeat([-1e9, -1e9, 0.0], len(EXPERTS))
    taken = choices(make_charges(instances, CONFIG), by_score(np.tile(wanted, (len(instances), 1))))[
        (), False, frozenset()
    ]
    assert [instance.offers[-1].alias for instance in instances] == [
        EXPERTS[a - ANSWER * len(EXPERTS)].alias for a in taken
    ]


def test_a_score_is_0_at_random_and_1_at_the_optimum():
    charges = make_charges(draw_instances(CONFIG, num_draws=4), CONFIG)
    random_IS, optimum_IS = (evaluate(charges, policy)[0] for policy in (random_policy, optimal_policy))
    assert scores(random_IS, random_IS, optimum_IS, slice(None)) == 0.0
    assert scores(optimum_IS, random_IS, optimum_IS, slice(None)) == 1.0
    assert scores((random_IS + optimum_IS) / 2, random_IS, optimum_IS, slice(4, 8)) == pytest.approx(0.5)


def test_charges_of_an_instance_by_hand():
    instance = draw_instances(CONFIG, num_draws=1)[0]
    offer = Offer("expert-5", "Qwen2.5-Math-72B-Instruct", True, 2.0, 10.0, 25.0)
    charges = make_charges([dataclasses.replace(instance, offers=(offer,))], CONFIG)
    assert charges.is_offered_TIE.tolist() == 3 * [[[False, False, False, False, True, False]]]
    np.testing.assert_allclose(charges.cost_usd_RIE[:, 0, 4], [0.003, 0.003, 0.007, 0.008])
    np.testing.assert_allclose(charges.latency_s_RIE[:, 0, 4], [17.5, 17.5, 25.0, 25.0])
    assert charges.turn_cost_usd == pytest.approx(170 * 0.2e-6) and charges.turn_latency_s == pytest.approx(0.1)
