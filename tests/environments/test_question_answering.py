"""The default environment: what the policy reads, and what an episode was worth."""

import dataclasses
import json

import pytest

from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.records import Instance, Offer, Preference, Task
from orchestra_jax.environments.question_answering import (
    QuestionAnswering,
    is_disallowed,
    reference_objectives,
    render_offers,
    restate,
    tool_schemas,
)
from orchestra_jax.experts.delegation import Answer, EnhanceReasoning, Search
from orchestra_jax.rewards.objectives import objective_vector
from orchestra_jax.rewards.preference import utility
from orchestra_jax.tools.ledger import Totals
from orchestra_jax.tools.toolbox import Toolbox
from orchestra_jax.types import CallRecord, CallStatus, ToolCall

OFFERS = (
    Offer("expert-2", "gpt-5-mini", False, 15.0, 15.0, 2.0),
    Offer("expert-3", "Qwen3-32B", True, 0.2, 0.2, 60.0),
)
TASK = Task("t/0", "geography", "two_hop", "Which river?", "Po", "search", gold_document_ids=("a",))
LOCAL = Preference(
    "local", "Use local experts only.", {"outcome": 0.3, "cost_usd": 0.35, "latency_s": 0.35, "disallowed_calls": 1.5}
)
FAST = Preference(
    "fast", "I need it fast.", {"outcome": 0.05, "cost_usd": 0.0, "latency_s": 0.95, "disallowed_calls": 0.0}
)
TOOLBOX = Toolbox([Search(None, None), EnhanceReasoning(None, None), Answer(None)], timeout_s=1.0)


def instance(preference=LOCAL):
    return Instance("i", TASK, preference, OFFERS, seed=0)


def record(tool, alias, status=CallStatus.OK):
    return CallRecord(ToolCall(tool, {"model": alias}), "", status, False)


def totals(cost_usd=0.004, latency_s=10.0):
    return Totals(cost_usd, latency_s, latency_s, 0, 0, 1, 1, 0)


def test_the_compact_prompt_says_question_preference_and_every_expert_but_no_model():
    messages, tools = QuestionAnswering(TOOLBOX, 3, is_compact=True).prompt(instance())
    (message,) = messages
    assert message.role == "user" and tools == []
    assert message.content.splitlines() == [
        "Which river?",
        "Use local experts only.",
        "price local $0.2 expert-3 remote $15 expert-2",
        "time 2s expert-2 60s expert-3",
    ]


def test_the_full_prompt_says_it_in_schemas_restricted_to_the_offer():
    messages, tools = QuestionAnswering(TOOLBOX, 3, is_compact=False).prompt(instance())
    assert [message.role for message in messages] == ["system", "user"]
    assert messages[1].content == "Which river?\nUse local experts only."
    assert [tool["function"]["name"] for tool in tools] == ["search", "enhance_reasoning", "answer"]
    for tool in tool_schemas(TOOLBOX, instance()):
        model = tool["function"]["parameters"]["properties"]["model"]
        assert model["enum"] == ["expert-2", "expert-3"]
        assert "price local $0.2 expert-3" in model["description"] and "expert-4" not in model["description"]
    text = json.dumps(tools)
    assert not any(offer.model in text for offer in OFFERS)  # an alias stands for its model


def test_the_prompt_gives_away_neither_answer_nor_evidence_tool_and_differs_by_preference_alone():
    for is_compact in (True, False):
        environment = QuestionAnswering(TOOLBOX, 3, is_compact)
        local, fast = (environment.prompt(instance(preference)) for preference in (LOCAL, FAST))
        assert str(local).replace(LOCAL.text, FAST.text) == str(fast)
        assert "'Po'" not in str(local) and TASK.answer not in local[0][-1].content.split()


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("outcome", "expert-2 expert-3"),
        ("cheap", "price $0.2 expert-3 $15 expert-2"),
        ("fast", "time 2s expert-2 60s expert-3"),
        ("balanced", "price $0.2 expert-3 $15 expert-2 time 2s expert-2 60s expert-3"),
        ("local", "price $0.2 expert-3 $15 expert-2 time 2s expert-2 60s expert-3"),
    ],
)
def test_a_restatement_names_all_on_offer_in_the_lists_of_its_preference_and_recommends_nothing(name, who):
    text = restate(instance(PREFERENCES[name]))
    assert text == f"{who} geography two_hop {name}"
    assert not any(tool in text for tool in TOOLBOX.names)


def test_equal_prices_and_latencies_keep_the_order_of_the_catalog():
    same = tuple(dataclasses.replace(offer, output_usd_per_million_tokens=5.0, latency_s=2.0) for offer in OFFERS)
    assert render_offers(same) == "price remote $5 expert-2 local $5 expert-3\ntime 2s expert-2 2s expert-3"


@pytest.mark.parametrize(("is_compact", "shown"), [(True, "documents found"), (False, "The Po is a river.")])
def test_the_compact_policy_sees_summaries_the_other_one_the_text(is_compact, shown):
    assert QuestionAnswering(TOOLBOX, 3, is_compact).observation("The Po is a river.", "documents found") == shown


def test_objectives_are_the_outcome_the_totals_and_the_counts():
    calls = [record("search", "expert-2"), record("search", "expert-3"), record("answer", "expert-2")]
    values = QuestionAnswering(TOOLBOX, 3, True).objectives(instance(), calls, " po ", totals())
    assert values == {
        "outcome": 1.0,
        "cost_usd": 0.004,
        "latency_s": 10.0,
        "disallowed_calls": 2.0,
        "calls/search": 2.0,
        "calls/enhance_reasoning": 0.0,
        "calls/answer": 1.0,
    }
    assert QuestionAnswering(TOOLBOX, 3, True).objectives(instance(), calls, None, totals())["outcome"] == 0.0
    assert (
        QuestionAnswering(TOOLBOX, 3, True).objectives(instance(FAST), calls, "Po", totals())["disallowed_calls"] == 0.0
    )


def test_a_refused_call_used_nobody():
    calls = [record("search", "expert-2", CallStatus.REFUSED), record("answer", "expert-3")]
    assert QuestionAnswering(TOOLBOX, 3, True).objectives(instance(), calls, "Po", totals())["disallowed_calls"] == 0.0


def test_what_is_disallowed():
    assert is_disallowed(instance(), ToolCall("answer", {"model": "expert-2"}))
    assert not is_disallowed(instance(), ToolCall("answer", {"model": "expert-3"}))
    assert not is_disallowed(instance(), ToolCall("answer", {"model": "expert-1"}))  # not on offer: nobody was called
    assert not is_disallowed(instance(), ToolCall("answer", {}))
    assert not is_disallowed(instance(FAST), ToolCall("answer", {"model": "expert-2"}))


def test_the_utility_of_an_episode_by_hand():
    objectives = reference_objectives(0.01, 40.0)
    environment = QuestionAnswering(TOOLBOX, 3, True)
    values = environment.objectives(instance(), [record("answer", "expert-3")], "Po", totals())
    weights_M = objective_vector(LOCAL.weights, objectives)
    # 0.3 + 0.35 * (1 - 0.004 / 0.01) + 0.35 * (1 - 10 / 40)
    assert utility(objective_vector(values, objectives), weights_M, objectives) == pytest.approx(0.3 + 0.21 + 0.2625)
    broken = environment.objectives(instance(), [record("answer", "expert-2")] * 2, "Rhine", totals())
    assert utility(objective_vector(broken, objectives), weights_M, objectives) == pytest.approx(-1.5)
