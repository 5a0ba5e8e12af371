"""The pools of the catalog, and how instances are drawn from them."""

import collections

import pytest

from configs.catalog import EVALUATION, TRAINING, UNSEEN_MODELS, UNSEEN_PRICES
from orchestra_jax.data.instances import draw_pool_offers, make_instance
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.records import ROLES, Task
from orchestra_jax.environments.question_answering import tool_schemas
from orchestra_jax.experts.catalog import Listing, Pool
from orchestra_jax.experts.delegation import Answer, EnhanceReasoning, Search
from orchestra_jax.experts.world import WorldConfig
from orchestra_jax.tools.toolbox import Toolbox

TASK = Task("t", "geography", "one_hop", "Which?", "x", "search")
BOX = Toolbox([Search(None, None), EnhanceReasoning(None, None), Answer(None)], 1.0)


def by_alias(offers):
    return {offer.alias: offer for offer in offers}


def test_the_evaluation_pool_is_the_releases_table():
    offers = by_alias(draw_pool_offers(EVALUATION, 0))
    assert len(offers) == 12 and all(listing.is_published for listing in EVALUATION.listings)
    row = offers["reasoner-2"]
    assert (row.model, row.input_usd_per_million_tokens, row.output_usd_per_million_tokens, row.latency_s) == (
        "gpt-5-mini", 0.25, 2.0, 25.0,
    )  # fmt: skip
    assert (offers["answer-1"].latency_s, offers["answer-math-2"].output_usd_per_million_tokens) == (96.0, 0.2)
    assert draw_pool_offers(EVALUATION, 1) == draw_pool_offers(EVALUATION, 0)


def test_training_draws_subsets_aliases_prices_and_latencies_from_the_seed_alone():
    draws = [draw_pool_offers(TRAINING, seed) for seed in range(200)]
    assert draws == [draw_pool_offers(TRAINING, seed) for seed in range(200)]
    models_of = collections.defaultdict(set)
    sizes = collections.defaultdict(set)
    prices = set()
    for offers in draws:
        assert len(by_alias(offers)) == len(offers)
        for role in ROLES:
            sizes[role].add(sum(offer.roles == (role,) for offer in offers))
        for offer in offers:
            models_of[offer.alias].add(offer.model)
            if offer.model == "gpt-5":
                prices.add(offer.output_usd_per_million_tokens)
    assert sizes == {"search": set(range(2, 10)), "enhance_reasoning": {2, 3, 4}, "answer": set(range(2, 11))}
    assert len(models_of["search-1"]) == 9  # an alias says nothing of its model
    assert prices == {5.0, 7.0, 10.0, 14.0, 20.0}


def test_a_model_has_one_price_in_all_its_roles():
    for seed in range(50):
        prices = collections.defaultdict(set)
        for offer in draw_pool_offers(TRAINING, seed):
            prices[offer.model].add(offer.output_usd_per_million_tokens)
        assert all(len(each) == 1 for each in prices.values())


def test_unseen_models_and_unseen_prices_are_unseen():
    in_role = {(listing.role, listing.model) for listing in TRAINING.listings}
    assert not in_role & {(listing.role, listing.model) for listing in UNSEEN_MODELS.listings}
    assert not set(UNSEEN_PRICES.price_factors) & set(TRAINING.price_factors)
    assert {listing.model for listing in UNSEEN_PRICES.listings} == {listing.model for listing in EVALUATION.listings}


def test_each_tool_offers_the_aliases_of_its_role_and_says_what_is_known_of_them():
    instance = make_instance(TASK, PREFERENCES["cheap"], WorldConfig(), 3, pool=EVALUATION)
    schemas = {each["function"]["name"]: each["function"] for each in tool_schemas(BOX, instance, {"gpt-5": "Knows."})}
    models = {name: each["parameters"]["properties"]["model"] for name, each in schemas.items()}
    assert models["search"]["enum"] == ["search-1", "search-2", "search-3"]
    assert models["answer"]["enum"] == [f"answer-{n}" for n in (1, 2, 3, 4)] + ["answer-math-1", "answer-math-2"]
    assert "reasoner-1: Knows." in models["enhance_reasoning"]["description"]
    assert "gpt-5" not in str(schemas)
    assert "by time of a call:" in models["search"]["description"]  # of its own role: "search-1" takes 22 s
    assert "22s search-1" in models["search"]["description"]
    assert "by time of an answer:" in models["answer"]["description"]


def test_a_pool_that_cannot_be_drawn_from_is_refused():
    listing = Listing("answer", "a", "m", 1.0, 1.0, 1.0, True)
    with pytest.raises(ValueError, match="aliases of a pool must differ"):
        Pool((listing, listing))
    with pytest.raises(ValueError, match=r"roles \['cook'\] of a pool are not among"):
        Pool((Listing("cook", "b", "m", 1.0, 1.0, 1.0, True),))
    with pytest.raises(ValueError, match="price_factors .* must be positive"):
        Pool((listing,), price_factors=(0.0,))
