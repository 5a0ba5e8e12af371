"""A model's verdict as the outcome, asked of a real HTTP server: who is asked, what is charged to whom, what fails."""

import asyncio
import json

import pytest

from orchestra_jax import chat as chat_format
from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY, load_chat
from orchestra_jax.components import build_components
from orchestra_jax.config import RunConfig
from orchestra_jax.data.records import Document, Instance, Offer, Preference, Task
from orchestra_jax.environments.question_answering import QuestionAnswering
from orchestra_jax.environments.rollout import RolloutConfig, run_episode
from orchestra_jax.experts.delegation import Answer, EnhanceReasoning, Search
from orchestra_jax.experts.endpoint import EndpointExpert
from orchestra_jax.experts.judge import INSTRUCTION, Judge
from orchestra_jax.experts.replay import RecordedExpert
from orchestra_jax.experts.simulated import SimulatedExperts
from orchestra_jax.experts.world import WorldConfig
from orchestra_jax.generation.scripted_engine import ScriptedEngine
from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.ledger import JUDGE, replay_receipts
from orchestra_jax.tools.recording import Store
from orchestra_jax.tools.search.local_search import LocalSearch
from orchestra_jax.tools.toolbox import Toolbox
from orchestra_jax.types import CallStatus, EpisodeStatus, Reason, ToolCall

TASK = Task("t", "geography", "one_hop", "Which river?", "Po", "search", ("a",), wrong_answer="the river Po")
OFFER = Offer("expert-3", "Qwen3-32B", True, 0.2, 0.2, 2.0)
WEIGHTS = {"outcome": 1.0, "cost_usd": 0.0, "latency_s": 0.0, "disallowed_calls": 0.0}
PRICES = {"input_usd_per_million_tokens": 2.0, "output_usd_per_million_tokens": 8.0}
COST_USD = (70 * 2.0 + 11 * 8.0) / 1e6  # of the tests' endpoint: 70 and 11 tokens a reply


def verdict_on(endpoint, answer, **settings):
    async def go():
        expert = EndpointExpert(endpoint.url, "m", timeout_s=5.0, max_retries=0, **PRICES, **settings)
        made = await Judge(expert).judge(TASK, answer)
        await expert.close()
        return made

    return asyncio.run(go())


@pytest.mark.parametrize(("answer", "outcome"), [("", 0.0), (" \n", 0.0), ("po", 1.0), ("Po " * 501, 0.0)])
def test_what_needs_no_model_asks_none(endpoint, answer, outcome):
    verdict = verdict_on(endpoint, answer)
    assert (verdict.outcome, verdict.receipts, verdict.is_known) == (outcome, (), True)
    assert endpoint.requests == []


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("<verdict>right</verdict>", 1.0),
        ("It says so.\n<verdict> WRONG </verdict>", 0.0),
        ("<think><verdict>right</verdict></think> No. <verdict>wrong</verdict>", 0.0),
        ("<verdict>wrong</verdict>, no: <verdict>right</verdict>", 1.0),
    ],
)
def test_the_last_verdict_counts_and_is_charged_to_the_judge(endpoint, completion, reply, outcome):
    endpoint.respond = lambda body: completion(reply)
    verdict = verdict_on(endpoint, "the river Po")
    (receipt,) = verdict.receipts
    assert (verdict.outcome, verdict.is_known) == (outcome, True)
    assert (receipt.tool, receipt.model, receipt.status, receipt.input_tokens) == (JUDGE, "m", CallStatus.OK, 70)
    assert receipt.cost_usd == pytest.approx(COST_USD)
    system, user = (message["content"] for message in endpoint.requests[0][2]["messages"])
    assert system == INSTRUCTION
    assert all(part in user for part in ("Which river?", "Right answer: Po", "the river Po"))


@pytest.mark.parametrize(
    ("respond", "reason", "cost_usd"),
    [
        (lambda completion: completion("I cannot say."), Reason.UNREADABLE, COST_USD),
        (lambda completion: (500, "text/plain", b""), Reason.SERVER_ERROR, 0.0),
    ],
)
def test_a_failed_judge_gives_no_verdict_and_is_charged(endpoint, completion, respond, reason, cost_usd):
    endpoint.respond = lambda body: respond(completion)
    verdict = verdict_on(endpoint, "the river Po")
    (receipt,) = verdict.receipts
    assert (verdict.is_known, receipt.status, receipt.reason) == (False, CallStatus.FAILED, reason)
    assert receipt.cost_usd == pytest.approx(cost_usd)


def play(judge):
    """One episode whose expert answers "the river Po", which no exact match takes."""
    experts = SimulatedExperts(WorldConfig(evidence_factor_by_kind=(0.0, 0.0)))
    tools = [
        Search(lambda model: experts, LocalSearch([Document("a", "Cats", "tom is a cat")])),
        EnhanceReasoning(lambda model: experts, None),
        Answer(lambda model: experts),
    ]
    chat = load_chat(SMALL_TOKENIZER_DIRECTORY, "compact")
    environment = QuestionAnswering(Toolbox(tools, 20.0), 2, is_compact=True, judge=judge)
    instance = Instance("t", TASK, Preference("any", "Any.", WEIGHTS), (OFFER,), 0)
    turn = chat_format.encode_turn(chat, "", [ToolCall("answer", {"model": "expert-3"})])
    engine = ScriptedEngine(lambda session_id, number, prompt_tokens: turn, 0)
    config = RolloutConfig(120, 900, 1, 1.0, 0.2, 200.0)
    return asyncio.run(run_episode(instance, 0, environment, engine, chat, config, seed=0))


def test_an_episode_is_scored_by_the_judge_whose_bill_is_no_part_of_the_policys(endpoint, completion):
    computed = play(None)
    assert computed.answer == "the river Po" and computed.objectives["outcome"] == 0.0
    endpoint.respond = lambda body: completion("<verdict>right</verdict>")
    judged = play(Judge(EndpointExpert(endpoint.url, "m", **PRICES)))
    assert judged.objectives == {**computed.objectives, "outcome": 1.0}
    assert judged.receipts[:-1] == computed.receipts and judged.receipts[-1].tool == JUDGE
    totals = replay_receipts(judged.receipts)
    assert totals.judge_cost_usd == pytest.approx(COST_USD) and totals.cost_usd == judged.objectives["cost_usd"]


def test_an_episode_without_a_verdict_leaves_the_group(endpoint):
    endpoint.respond = lambda body: (403, "text/plain", b"")
    trajectory = play(Judge(EndpointExpert(endpoint.url, "m", **PRICES)))
    assert trajectory.status == EpisodeStatus.TOOL_FAILURE and trajectory.receipts[-1].reason == Reason.SERVER_ERROR


def test_no_verdict_is_bought_beyond_the_runs_cap_and_recorded_ones_are_free(endpoint, completion, tmp_path):
    endpoint.respond = lambda body: completion("<verdict>right</verdict>")
    expert = EndpointExpert(endpoint.url, "m", **PRICES)
    expert.account = Account(1e-4)
    verdict = asyncio.run(Judge(expert).judge(TASK, "the river Po"))
    assert (verdict.is_known, verdict.receipts[0].reason, endpoint.requests) == (False, Reason.SPEND_CAP, [])
    expert.account = Account(1.0)
    recorded, again = (
        asyncio.run(Judge(RecordedExpert(expert, Store(tmp_path, mode))).judge(TASK, "the river Po"))
        for mode in ("record", "replay")
    )
    assert len(endpoint.requests) == 1 and again.outcome == recorded.outcome == 1.0
    assert again.receipts[0].is_cache_hit and again.receipts[0].cost_usd == recorded.receipts[0].cost_usd
    assert expert.account.spent_usd == pytest.approx(COST_USD)


def test_a_run_is_judged_by_configuration(endpoint, tmp_path):
    config = RunConfig(model="tiny")
    config.data.num_tasks_per_cell = config.data.num_test_tasks_per_cell = 1
    config.experts.outcome = "judged"
    with pytest.raises(ValueError, match="\"judged\" wants an entry 'judge' in experts.endpoints_path ''"):
        build_components(config)
    path = tmp_path / "endpoints.json"
    path.write_text(json.dumps({"judge": {"endpoint": endpoint.url, "model": "m", **PRICES}}))
    config.experts.endpoints_path = str(path)
    with pytest.raises(ValueError, match="the endpoint of 'judge' costs money and experts.spend_cap_usd is 0"):
        build_components(config)
    config.experts.spend_cap_usd = 1.0
    parts = build_components(config)
    assert isinstance(parts.environment._judge, Judge)
    parts.resources.close()
    config.experts.outcome = "guessed"
    with pytest.raises(ValueError, match="experts.outcome 'guessed' is not one of"):
        build_components(config)
