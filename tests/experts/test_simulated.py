"""Simulated experts: what a draw depends on, what evidence does, and that frequencies are the world's probabilities."""

import asyncio
import dataclasses

import numpy as np
import pytest

from orchestra_jax.data.records import Instance, Offer, Preference, Task
from orchestra_jax.experts.catalog import EXPERTS, ROLES
from orchestra_jax.experts.expert import ExpertRequest
from orchestra_jax.experts.simulated import SimulatedExperts
from orchestra_jax.experts.world import WorldConfig, skill_tables
from orchestra_jax.tools.tool import Evidence
from orchestra_jax.types import CallStatus

TASK = Task(
    "t/0",
    "geography",
    "two_hop",
    "Which?",
    "right",
    "search",
    gold_document_ids=("a",),
    query="good query",
    poor_query="poor query",
    wrong_answer="wrong",
)
OFFERS = tuple(Offer(expert.alias, expert.model, expert.is_local, 5.0, 5.0, 10.0) for expert in EXPERTS)
PREFERENCE = Preference("any", "Any.", {"outcome": 1.0, "cost_usd": 0.0, "latency_s": 0.0, "disallowed_calls": 0.0})
CONFIG = WorldConfig()
EXPERTS_IN_WORLD = SimulatedExperts(CONFIG)


def request(role, expert, has_evidence=False, rollout_index=0, seed=0, task=TASK):
    instance = Instance(f"t/{seed}", task, PREFERENCE, OFFERS, seed)
    return ExpertRequest(role, instance, OFFERS[expert], Evidence(), has_evidence, rollout_index)


def texts(requests):
    async def go():
        return [(await EXPERTS_IN_WORLD.reply(one)).text for one in requests]

    return asyncio.run(go())


def test_the_same_request_gives_the_same_reply_whatever_was_asked_before():
    asked = [request(role, expert) for role in ("search", "answer") for expert in range(6)]
    assert texts(asked) == texts(reversed(asked))[::-1] == texts(asked)


def test_price_latency_and_preference_do_not_enter_the_draw():
    one = request("answer", 2)
    dear = dataclasses.replace(OFFERS[2], output_usd_per_million_tokens=99.0, latency_s=1.0)
    other_preference = dataclasses.replace(PREFERENCE, name="other")
    for rollout in range(50):
        plain = dataclasses.replace(one, rollout_index=rollout)
        instance = dataclasses.replace(one.instance, instance_id="else", preference=other_preference)
        assert texts([plain]) == texts([dataclasses.replace(plain, offer=dear, instance=instance)])


@pytest.mark.parametrize(
    ("role", "good", "is_evidence"), [("search", "good query", 0), ("answer", "right", 0), ("answer", "right", 1)]
)
def test_frequencies_are_the_probabilities_of_the_tables(role, good, is_evidence):
    skills, num_draws = skill_tables(CONFIG), 1500
    for expert in (0, 3):
        chance = skills.writer_FE[2, expert] if role == "search" else skills.answer_FKEV[2, 1, expert, is_evidence]
        asked = [request(role, expert, bool(is_evidence), rollout, seed=17) for rollout in range(num_draws)]
        share = np.mean([text == good for text in texts(asked)])
        assert EXPERTS_IN_WORLD.success_probability(asked[0]) == chance
        assert abs(share - chance) < 4 * np.sqrt(chance * (1 - chance) / num_draws)


def test_evidence_never_turns_a_right_answer_into_a_wrong_one():
    pairs = [(request("answer", 1, False, r), request("answer", 1, True, r)) for r in range(300)]
    without, with_evidence = texts([a for a, _ in pairs]), texts([b for _, b in pairs])
    assert all(b == "right" for a, b in zip(without, with_evidence) if a == "right")
    assert with_evidence.count("right") > without.count("right")


def test_experts_rollouts_and_seeds_draw_independently():
    num_draws = 1500
    draws = {
        "expert 1": texts([request("answer", 1, True, r) for r in range(num_draws)]),
        "expert 4": texts([request("answer", 4, True, r) for r in range(num_draws)]),
        "next rollout": texts([request("answer", 1, True, r + 1) for r in range(num_draws)]),
        "other seed": texts([request("answer", 1, True, r, seed=1) for r in range(num_draws)]),
        "search": texts([request("search", 1, True, r) for r in range(num_draws)]),
    }
    hits = np.array([[text in ("right", "good query") for text in row] for row in draws.values()], float)
    correlation = np.corrcoef(hits) - np.eye(len(hits))
    assert np.abs(correlation).max() < 4 / np.sqrt(num_draws)


def test_the_tool_that_cannot_bring_the_evidence_never_does():
    program = dataclasses.replace(TASK, program="print(1)", poor_program="raise ValueError")
    asked = [request("enhance_reasoning", e, rollout_index=r, task=program) for e in range(6) for r in range(20)]
    assert set(texts(asked)) == {"raise ValueError"}
    assert EXPERTS_IN_WORLD.success_probability(asked[0]) == 0.0


def test_a_reply_reports_the_tokens_and_the_time_of_its_role():
    replies = {role: asyncio.run(EXPERTS_IN_WORLD.reply(request(role, 0, has_evidence=True))) for role in ROLES}
    assert (replies["search"].input_tokens, replies["search"].output_tokens) == (500, 200)
    assert (replies["answer"].input_tokens, replies["answer"].output_tokens) == (1500, 500)
    assert (replies["search"].latency_s, replies["answer"].latency_s) == (pytest.approx(7.0), 10.0)
    assert all(reply.status == CallStatus.OK for reply in replies.values())
