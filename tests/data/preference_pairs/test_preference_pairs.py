"""Preference pairs: words and vector agree, what is none is refused, no words stand on both sides of the split."""

import asyncio
import json
import math
import re

import pytest

from orchestra_jax.data.preference_pairs.pair import (
    OBJECTIVES,
    PreferencePair,
    ToolListing,
    as_preference,
    check_pair,
    split_pairs,
)
from orchestra_jax.data.preference_pairs.templates import KINDS, make_pair
from orchestra_jax.data.preference_pairs.written import write_pairs
from orchestra_jax.data.synthesis.writer import Rejected

TOOLS = (
    ToolListing("web_search", 0.01, 2.0, False),
    ToolListing("local_search", 0.0, 4.0, True),
    ToolListing("expert-1", 0.05, 30.0, False),
    ToolListing("expert-3", 0.002, 8.0, True),
)
GOOD = {"web_search": 0, "local_search": 1, "expert-1": 0, "expert-3": 1, "outcome": 0, "cost_usd": 0, "latency_s": 0.5}


@pytest.mark.parametrize("kind", KINDS)
def test_words_and_vector_of_a_template_agree(kind):
    for seed in range(60):
        pair = make_pair(TOOLS, seed, kind)
        assert check_pair(pair, TOOLS) == "" and pair == make_pair(TOOLS, seed, kind)
        weights = {tool.name: pair.weights[tool.name] for tool in TOOLS}
        named = {tool.name for tool in TOOLS if tool.name in pair.text}
        if kind == "liked":
            assert {name for name, weight in weights.items() if weight > 0} == named != set(weights)
        elif kind == "avoided":
            assert {name for name, weight in weights.items() if weight == 0} == named and named
        elif kind == "local":
            assert weights == {"web_search": 0, "local_search": 1, "expert-1": 0, "expert-3": 1}
        elif kind == "cheap":
            limit = float(re.search(r"\$([\d.e-]+) a call", pair.text)[1])
            assert (
                {name for name, weight in weights.items() if weight}
                == {tool.name for tool in TOOLS if tool.usd_per_call <= limit}
                != set(weights)
            )
        elif kind == "fast":
            limit = float(re.search(r"([\d.]+) s,", pair.text)[1])
            assert (
                {name for name, weight in weights.items() if weight}
                == {tool.name for tool in TOOLS if tool.latency_s <= limit}
                != set(weights)
            )
        else:
            assert not any(weights.values())


def test_kinds_are_drawn_and_vary_with_the_seed():
    pairs = [make_pair(TOOLS, seed) for seed in range(300)]
    assert {pair.kind for pair in pairs} == set(KINDS) and len({pair.text for pair in pairs}) > 60
    alike = tuple(ToolListing(tool.name, tool.usd_per_call, tool.latency_s, True) for tool in TOOLS)
    assert "local" not in {make_pair(alike, seed).kind for seed in range(100)}
    with pytest.raises(ValueError, match="the kind 'local' is none of those that fit"):
        make_pair(alike, 0, "local")
    with pytest.raises(ValueError, match="two tools of different names"):
        make_pair(TOOLS[:1], 0)


@pytest.mark.parametrize(
    ("text", "changes", "told"),
    [
        ("Stay local.", {}, ""),
        (" ", {}, "the words have 0 characters"),
        ("x" * 601, {}, "the words have 601 characters"),
        ("Stay local.", {"expert-1": None}, "the weight for 'expert-1' is None"),
        ("Stay local.", {"expert-1": True}, "the weight for 'expert-1' is True"),
        ("Stay local.", {"expert-1": 1.01}, "the weight for 'expert-1' is 1.01"),
        ("Stay local.", {"cost_usd": -0.3}, "the weight for 'cost_usd' is -0.3"),
        ("Stay local.", {"cost_usd": math.nan}, "the weight for 'cost_usd' is nan"),
        ("Stay local.", {"expert-9": 1}, "the weight for 'expert-9' belongs to no tool"),
        ("Stay local.", dict.fromkeys(GOOD, 0), "all weights are 0"),
        ("Stay local.", dict.fromkeys(GOOD, 0.5), "all weights are equal"),
    ],
)
def test_what_is_no_pair_is_told(text, changes, told):
    assert check_pair(PreferencePair("written", text, {**GOOD, **changes}), TOOLS).startswith(told)
    assert bool(told) == bool(check_pair(PreferencePair("written", text, {**GOOD, **changes}), TOOLS))


def test_a_missing_weight_is_told():
    weights = {name: weight for name, weight in GOOD.items() if name != "latency_s"}
    assert check_pair(PreferencePair("written", "Stay local.", weights), TOOLS) == "there is no weight for 'latency_s'"


def test_the_split_holds_words_apart_and_does_not_move():
    pairs = [make_pair(TOOLS, seed) for seed in range(400)]
    train, test = split_pairs(pairs, 0.25, seed=0)
    words = [{pair.text for pair in side} for side in (train, test)]
    assert not words[0] & words[1] and words[0] | words[1] == {pair.text for pair in pairs}
    assert 0.1 < len(words[1]) / len(words[0] | words[1]) < 0.4
    fewer = split_pairs(pairs[:100], 0.25, seed=0)
    assert {pair.text for pair in fewer[0]} <= words[0] and {pair.text for pair in fewer[1]} <= words[1]
    shouted = PreferencePair("written", train[0].text.upper(), train[0].weights)
    assert split_pairs([*pairs, shouted], 0.25, seed=0) == (train, test)  # a repeat is no other pair
    assert split_pairs(pairs, 0.0, 0)[1] == [] and split_pairs(pairs, 1.0, 0)[0] == []
    with pytest.raises(ValueError, match="test_share 2"):
        split_pairs(pairs, 2, 0)


def test_a_preference_weighs_calls():
    preference = as_preference(PreferencePair("written", "Stay local.", GOOD), "mine")
    assert preference.weights["calls/local_search"] == 1.0 and preference.weights["latency_s"] == 0.5
    assert set(preference.weights) == {f"calls/{tool.name}" for tool in TOOLS} | set(OBJECTIVES)


class Saying:
    """A writer with a list of replies by sample, or one function of the question."""

    def __init__(self, replies):
        self._replies = replies

    async def ask_json(self, stage, system, user, sample=0):
        reply = self._replies(user) if callable(self._replies) else self._replies[sample]
        if isinstance(reply, Rejected):
            raise reply
        return reply


def test_written_pairs_are_checked_twice():
    replies = [
        {"instruction": "Stay on our machines.", "weights": GOOD},
        {"instruction": "stay on  our machines.", "weights": GOOD},
        {"instruction": "Use the web.", "weights": GOOD},
        {"instruction": "Fast!", "weights": {**GOOD, "latency_s": 7}},
        {"weights": GOOD},
        {"instruction": "Fast!", "weights": [1]},
        Rejected("not JSON", "no"),
        {"instruction": "Silence.", "weights": GOOD},
    ]

    def check(user):
        said = json.loads(user)["user"]
        if said == "Silence.":
            return {"verdict": "fine"}
        return {"is_consistent": said != "Use the web.", "reason": "the web is ruled out"}

    pairs, report = asyncio.run(write_pairs(TOOLS, len(replies), Saying(replies), Saying(check)))
    assert [pair.text for pair in pairs] == ["Stay on our machines."] and list(pairs[0].weights) == list(GOOD)
    assert dict(report.reasons) == {
        "repeated": 1, "inconsistent": 1, "wrong vector": 1, "wrong form": 2, "not JSON": 1, "no verdict": 1,
    }  # fmt: skip
    assert "the web is ruled out" in report.examples["inconsistent"][0] and report.num_accepted == 1
