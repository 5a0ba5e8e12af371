"""Offers: who is on offer, at independent prices and latencies; instances: what a preference may not change."""

import collections
import dataclasses

import numpy as np
import pytest

from orchestra_jax.data.instances import draw_offers, make_instance
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.records import Task
from orchestra_jax.experts.catalog import EXPERTS
from orchestra_jax.experts.world import WorldConfig

CONFIG = WorldConfig()
TASK = Task("geography/0", "geography", "one_hop", "Which?", "x", "search")
NUM_DRAWS = 2000


@pytest.fixture(scope="module")
def drawn():
    return [draw_offers(CONFIG, seed) for seed in range(NUM_DRAWS)]


def test_every_offer_has_its_number_of_experts_in_catalog_order_one_of_them_local(drawn):
    order = {expert.alias: index for index, expert in enumerate(EXPERTS)}
    for offers in drawn:
        places = [order[offer.alias] for offer in offers]
        assert len(offers) == CONFIG.num_offered and places == sorted(set(places))
        assert any(offer.is_local for offer in offers)
        for offer, place in zip(offers, places):
            assert (offer.model, offer.is_local) == (EXPERTS[place].model, EXPERTS[place].is_local)
            assert offer.input_usd_per_million_tokens == offer.output_usd_per_million_tokens


def test_price_and_latency_are_uniform_and_independent_of_each_other_and_of_the_expert(drawn):
    offers = [offer for each in drawn for offer in each]
    prices, latencies = CONFIG.price_levels_usd_per_million_tokens, CONFIG.latency_levels_s
    table = np.zeros((len(EXPERTS), len(prices), len(latencies)))
    for offer in offers:
        row = prices.index(offer.output_usd_per_million_tokens), latencies.index(offer.latency_s)
        table[(int(offer.alias[-1]) - 1, *row)] += 1
    assert (
        abs(np.corrcoef([[o.output_usd_per_million_tokens for o in offers], [o.latency_s for o in offers]])[0, 1])
        < 0.04
    )
    expected = table.sum(axis=(1, 2), keepdims=True) / 9
    excess = ((table - expected) ** 2 / expected).sum() - 6 * 8  # chi-square of 6 x 8 degrees of freedom
    assert abs(excess) < 4 * np.sqrt(2 * 6 * 8)


def test_offers_vary_and_every_expert_is_often_on_offer(drawn):
    counts = collections.Counter(offer.alias for offers in drawn for offer in offers)
    # A remote expert is one of the num_offered - 1 that are drawn besides the local one.
    share = (CONFIG.num_offered - 1) / (len(EXPERTS) - 1)
    assert min(counts[expert.alias] for expert in EXPERTS) > 0.9 * share * NUM_DRAWS
    choices = {tuple(offer.alias for offer in offers) for offers in drawn}
    assert len(choices) == 19  # 3 out of 6, but for the one choice of three remote ones
    assert len(set(drawn)) > 0.9 * NUM_DRAWS  # of 19 * 9^3 offers


@pytest.mark.parametrize("num_offered", [1, 2, 6])
def test_any_number_of_experts_can_be_on_offer(num_offered):
    config = dataclasses.replace(CONFIG, num_offered=num_offered)
    for seed in range(30):
        offers = draw_offers(config, seed)
        assert len({offer.alias for offer in offers}) == num_offered and any(offer.is_local for offer in offers)


def test_the_same_draw_under_another_preference_differs_in_nothing_else():
    made = [make_instance(TASK, preference, CONFIG, seed=3) for preference in PREFERENCES.values()]
    assert len({instance.instance_id for instance in made}) == len(PREFERENCES)
    first = made[0]
    for other in made[1:]:
        same = dataclasses.replace(other, preference=first.preference, instance_id=first.instance_id)
        assert same == first


def test_another_seed_or_task_draws_anew():
    preference = PREFERENCES["cheap"]
    other_task = dataclasses.replace(TASK, task_id="geography/1")
    made = [make_instance(task, preference, CONFIG, seed) for task in (TASK, other_task) for seed in range(20)]
    assert len({instance.seed for instance in made}) == len({instance.instance_id for instance in made}) == 40
    assert len({instance.offers for instance in made}) == 40
    assert make_instance(TASK, preference, CONFIG, 5) == make_instance(TASK, preference, CONFIG, 5)


def test_weights_of_the_gated_objectives_sum_to_one():
    for preference in PREFERENCES.values():
        weights = dict(preference.weights)
        penalty = weights.pop("disallowed_calls")
        assert sum(weights.values()) == pytest.approx(1.0) and min(weights.values()) >= 0
        assert preference.is_local_only == (penalty > 0) == (preference.name == "local")
