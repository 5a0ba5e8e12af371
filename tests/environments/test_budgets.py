"""A task's budget from the prompt to the metrics, and what an episode does with failures and unreadable calls."""

import asyncio

import pytest

from orchestra_jax import chat as chat_format
from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY, load_chat
from orchestra_jax.data.instances import draw_budget, make_instance
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.records import Budget, Document, Instance, Offer, Preference, Task
from orchestra_jax.environments.question_answering import QuestionAnswering, render_user_text
from orchestra_jax.environments.rollout import RolloutConfig, run_episode
from orchestra_jax.experts.delegation import Answer, EnhanceReasoning, Search
from orchestra_jax.experts.simulated import SimulatedExperts
from orchestra_jax.experts.world import WorldConfig
from orchestra_jax.generation.scripted_engine import ScriptedEngine
from orchestra_jax.tools.faults import FaultsConfig, FaultyTool
from orchestra_jax.tools.search.local_search import LocalSearch
from orchestra_jax.tools.toolbox import Toolbox
from orchestra_jax.types import CallStatus, EpisodeStatus, Reason, ToolCall

CHAT = load_chat(SMALL_TOKENIZER_DIRECTORY, "compact")
DEAR = Offer("expert-1", "gpt-5", False, 15.0, 15.0, 60.0)  # an answer: 1,500 tokens, $0.0225, 60 s
CHEAP = Offer("expert-3", "Qwen3-32B", True, 0.2, 0.2, 2.0)  # $0.0003, 2 s
TASK = Task(
    "t/0",
    "geography",
    "one_hop",
    "Which cat?",
    "tom",
    "search",
    ("a",),
    query="tom",
    poor_query="x",
    wrong_answer="rex",
)
NO_BUDGET = Budget()
WEIGHTS = {"outcome": 1.0, "cost_usd": 0.0, "latency_s": 0.0, "disallowed_calls": 0.0}


def play(turns, budget=NO_BUDGET, faults=None, calls_per_turn=1, max_calls=4, **settings):
    experts = SimulatedExperts(WorldConfig())
    tools = [
        Search(lambda model: experts, LocalSearch([Document("a", "Cats", "tom is a cat")])),
        EnhanceReasoning(lambda model: experts, None),
        Answer(lambda model: experts),
    ]
    if faults:
        tools = [FaultyTool(tool, faults) for tool in tools]
    environment = QuestionAnswering(Toolbox(tools, 20.0), max_calls, is_compact=True)
    instance = Instance("t/0", TASK, Preference("any", "Any.", WEIGHTS), (DEAR, CHEAP), 0, budget)
    scripts = [turn if isinstance(turn, list) else chat_format.encode_turn(CHAT, "", [turn]) for turn in turns]
    sizes = {"max_turn_tokens": 120, "max_tokens": 900, **settings}
    config = RolloutConfig(
        calls_per_turn=calls_per_turn, temperature=1.0, orchestrator_usd_per_million_tokens=0.2,
        orchestrator_tokens_per_s=200.0, **sizes,
    )  # fmt: skip
    engine = ScriptedEngine(lambda session_id, turn, prompt_tokens: scripts[turn], 0)
    return asyncio.run(run_episode(instance, 0, environment, engine, CHAT, config, seed=0))


def call(tool, offer):
    return ToolCall(tool, {"model": offer.alias})


def shown(trajectory):
    return chat_format.decode(CHAT, trajectory.tokens[trajectory.num_prompt_tokens :])


def test_limits_stand_in_the_prompt_and_without_any_the_prompt_is_as_it_was():
    limited = Instance("i", TASK, Preference("any", "Any.", WEIGHTS), (CHEAP,), 0, Budget(0.02, 60.0))
    assert render_user_text(limited, has_table=False) == "Which cat?\nAny.\nbudget $0.02 60s"
    half = Instance("i", TASK, Preference("any", "Any.", WEIGHTS), (CHEAP,), 0, Budget(latency_s=60.0))
    assert render_user_text(half, has_table=False).endswith("\nbudget 60s")
    free = Instance("i", TASK, Preference("any", "Any.", WEIGHTS), (CHEAP,), 0)
    assert render_user_text(free, has_table=False) == "Which cat?\nAny."


def test_a_call_that_cannot_be_paid_is_refused_told_and_free_and_a_cheaper_one_goes():
    trajectory = play([call("answer", DEAR), call("search", CHEAP), call("answer", CHEAP)], Budget(0.02, 100.0))
    assert [record.status for record in trajectory.calls] == ["refused", "ok", "ok"]
    receipts = [receipt for receipt in trajectory.receipts if receipt.tool != "orchestrator"]
    assert (receipts[0].reason, receipts[0].cost_usd) == (Reason.OVER_BUDGET, 0.0)
    text = shown(trajectory)
    assert "this can cost $0.0225 and the budget has $0.0200 left; choose something cheaper" in text
    assert trajectory.objectives["cost_usd"] <= 0.02 and trajectory.status == EpisodeStatus.ANSWERED
    response = text.split("<tool_response>")[2].split("</tool_response>")[0]
    assert "budget left $0.01" in response and response.rstrip().endswith("s")  # inside the response


def test_seconds_are_enforced_too():
    trajectory = play([call("answer", DEAR), call("answer", CHEAP)], Budget(latency_s=30.0))
    assert [record.status for record in trajectory.calls] == ["refused", "ok"]
    assert "this takes 60 s and the budget has" in shown(trajectory)
    assert trajectory.objectives["latency_s"] <= 30.0


def test_without_a_budget_nothing_of_it_is_shown():
    assert "budget" not in shown(play([call("search", CHEAP), call("answer", CHEAP)]))


def test_budgets_are_drawn_from_the_instances_seed_alone_and_disturb_no_other_draw():
    plain, limited = WorldConfig(), WorldConfig(budget_levels_usd=(0.01, 0.02), budget_levels_s=(30.0,))
    assert draw_budget(plain, 3) == Budget()
    drawn = {draw_budget(limited, seed) for seed in range(20)}
    assert drawn == {Budget(0.01, 30.0), Budget(0.02, 30.0)}
    instances = [make_instance(TASK, PREFERENCES["cheap"], world, 7) for world in (plain, limited)]
    assert instances[0].offers == instances[1].offers and instances[0].seed == instances[1].seed


@pytest.mark.parametrize(("ends", "status"), [(True, EpisodeStatus.TOOL_FAILURE), (False, EpisodeStatus.TURN_LIMIT)])
def test_a_failure_ends_the_episode_or_is_shown(ends, status):
    trajectory = play(
        [call("search", CHEAP)] * 2, faults=FaultsConfig(fail_rate=1.0), max_calls=2, ends_on_tool_failure=ends
    )
    assert trajectory.status == status and trajectory.calls[0].status == CallStatus.FAILED
    assert ("failed" in shown(trajectory)) == (not ends)


def broken_call():
    tokens = chat_format.encode_turn(CHAT, "", [call("search", CHEAP)])
    start = tokens.index(CHAT.start_of_call_id)
    return [*tokens[: start + 1], *tokens[start + 3 :]]


@pytest.mark.parametrize(("corrections", "status"), [(0, EpisodeStatus.MALFORMED), (1, EpisodeStatus.ANSWERED)])
def test_an_unreadable_call_ends_the_episode_or_is_corrected(corrections, status):
    trajectory = play([broken_call(), call("answer", CHEAP)], num_corrections=corrections)
    assert trajectory.status == status
    assert trajectory.receipts[1].reason == Reason.NOT_JSON and "not valid JSON" in trajectory.calls[0].result_text
    assert (trajectory.receipts[1].cost_usd, trajectory.calls[0].status) == (0.0, CallStatus.REFUSED)
    assert ("not valid JSON" in shown(trajectory)) == bool(corrections)


def test_an_unreadable_call_is_one_of_those_that_an_episode_may_make():
    trajectory = play([broken_call()], num_corrections=1, max_calls=1)
    assert trajectory.status == EpisodeStatus.TURN_LIMIT and len(trajectory.calls) == 1


@pytest.mark.parametrize(
    ("bad", "reason", "told"),
    [
        (ToolCall("browse", {"model": "expert-3"}), Reason.UNKNOWN_TOOL, "there is no tool 'browse'"),
        (ToolCall("search", {"model": 3}), Reason.WRONG_ARGUMENTS, "3 is not of type 'string'"),
        (ToolCall("search", {"model": "expert-3", "now": True}), Reason.EXTRA_FIELDS, "('now' was unexpected)"),
        (ToolCall("search", {"model": "x" * 9_000}), Reason.TOO_LONG, "characters of 8192"),
        (ToolCall("search", {"model": "x" * 200}), Reason.NOT_ON_OFFER, f"'{'x' * 40}' is not on offer"),
    ],
)
def test_with_corrections_a_short_prompts_policy_too_is_told_what_was_wrong(bad, reason, told):
    trajectory = play([bad, call("answer", CHEAP)], num_corrections=1, max_turn_tokens=20_000, max_tokens=30_000)
    assert trajectory.receipts[1].reason == reason and trajectory.status == EpisodeStatus.ANSWERED
    assert told in shown(trajectory)
    assert told not in shown(play([bad, call("answer", CHEAP)], max_turn_tokens=20_000, max_tokens=30_000))


def test_calls_beyond_the_turns_limit_say_so_in_their_receipt():
    tokens = chat_format.encode_turn(CHAT, "", [call("search", CHEAP), call("search", CHEAP), call("answer", CHEAP)])
    trajectory = play([tokens, call("answer", CHEAP)], calls_per_turn=2)
    reasons = [receipt.reason for receipt in trajectory.receipts if receipt.tool != "orchestrator"]
    assert reasons == [Reason.NONE, Reason.NONE, Reason.TOO_MANY_CALLS, Reason.NONE]
