"""The seconds of a call whose expert is a real endpoint: the tool's own are on the receipt, apart, and replay."""

import asyncio
import concurrent.futures
import dataclasses
import json
import time

import pytest

from orchestra_jax import chat as chat_format
from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY, load_chat
from orchestra_jax.config import RunConfig
from orchestra_jax.data.records import Document, Instance, Offer, Preference, Task
from orchestra_jax.environments.question_answering import QuestionAnswering
from orchestra_jax.environments.rollout import RolloutConfig, run_episode
from orchestra_jax.experts.delegation import Answer, EnhanceReasoning, Search
from orchestra_jax.experts.endpoint import EndpointExpert
from orchestra_jax.experts.simulated import SimulatedExperts
from orchestra_jax.experts.world import WorldConfig, call_latency_s
from orchestra_jax.generation.scripted_engine import ScriptedEngine
from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.ledger import replay_receipts
from orchestra_jax.tools.sandbox.python_sandbox import PythonSandbox
from orchestra_jax.tools.search.document_index import DocumentIndex, build_index
from orchestra_jax.tools.search.embedding import EmbeddingEndpoint
from orchestra_jax.tools.search.local_search import LocalSearch
from orchestra_jax.tools.tool import Evidence, ToolContext
from orchestra_jax.tools.toolbox import Toolbox
from orchestra_jax.toolset import build_toolbox
from orchestra_jax.types import CallStatus, Reason, ToolCall

OFFER = Offer("expert-1", "gpt-5", False, 1.0, 1.0, 2.0)
TASK = Task("t", "geography", "one_hop", "Which cat?", "tom", "search", ("a",), query="cat", poor_query="cat")
WEIGHTS = {"outcome": 1.0, "cost_usd": 0.0, "latency_s": 0.0, "disallowed_calls": 0.0}
INSTANCE = Instance("t", TASK, Preference("any", "Any.", WEIGHTS), (OFFER,), 7)
CONTEXT = ToolContext(INSTANCE, 0, Evidence())
DOCUMENTS = (Document("a", "Cats", "tom is a cat"), Document("b", "Dogs", "rex is a dog"))
EMBEDDING_S, PROGRAM_S, QUEUE_S = 0.3, 0.2, 0.25
PROGRAM = f"import time; time.sleep({PROGRAM_S}); print(7)"
SEARCH, COMPUTE, ANSWER = (ToolCall(name, {"model": "expert-1"}) for name in ("search", "enhance_reasoning", "answer"))


@pytest.fixture
def world(endpoint, completion):
    """A server that writes queries, programs and answers at once, and embeds slowly."""

    def respond(body):
        if "input" in body:
            time.sleep(EMBEDDING_S)
            rows = [[3.0, 0.0] if "cat" in text.lower() else [0.0, 5.0] for text in body["input"]]
            data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
            return 200, "application/json", json.dumps({"object": "list", "data": data, "model": "m"}).encode()
        return completion(f"<query>cat</query>\n<answer>tom</answer>\n```python\n{PROGRAM}\n```")

    endpoint.respond = respond
    return endpoint


@pytest.fixture
def index(world, tmp_path):
    embed = EmbeddingEndpoint(world.url, "m").embed
    build_index(tmp_path / "index", DOCUMENTS, embed)
    return DocumentIndex(tmp_path / "index", "dense", embed)


@pytest.fixture(scope="module")
def sandbox():
    with PythonSandbox(timeout_s=5.0) as made:
        made.run("pass")  # the server is warm
        yield made


def make_tools(expert, index, sandbox):
    experts = lambda model: expert  # noqa: E731
    return [Search(experts, index), EnhanceReasoning(experts, sandbox), Answer(experts)]


def run(tool, expert=None):
    async def go():
        result = await tool.run({"model": "expert-1"}, CONTEXT)
        if expert:
            await expert.close()
        return result

    return asyncio.run(go())


class Noting:
    """An expert whose replies are kept, to tell its seconds from the tool's."""

    def __init__(self, url, **settings):
        self.expert, self.replies = EndpointExpert(url, "m", **settings), []

    async def reply(self, request):
        self.replies.append(await self.expert.reply(request))
        return self.replies[-1]

    async def close(self):
        await self.expert.close()


def own_seconds(expert, result):
    """What the receipt says beyond the seconds of the last reply."""
    return result.receipt.service_s - expert.replies[-1].latency_s


def test_a_search_and_a_program_add_what_they_took_to_the_experts_seconds(world, index, sandbox):
    expert = Noting(world.url)
    search, compute, answer = make_tools(expert, index, sandbox)
    found = run(search, expert)
    assert found.evidence.document_ids[0] == "a" and own_seconds(expert, found) >= EMBEDDING_S - 1e-6
    printed = run(compute, expert)
    program_s = sandbox.run(PROGRAM).service_s  # remembered; so is the time that it took
    assert printed.evidence.printed == ("7",) and program_s >= PROGRAM_S
    assert own_seconds(expert, printed) == pytest.approx(program_s) == own_seconds(expert, run(compute, expert))
    assert own_seconds(expert, run(answer, expert)) == 0.0


def test_on_the_virtual_clock_the_worlds_seconds_are_all(index, sandbox):
    experts = SimulatedExperts(WorldConfig())
    by_vectors, in_memory = (run(Search(lambda model: experts, each)) for each in (index, LocalSearch(DOCUMENTS)))
    assert by_vectors.receipt == in_memory.receipt
    assert by_vectors.receipt.service_s == call_latency_s(WorldConfig(), OFFER, "search")
    assert by_vectors.receipt.queue_s == 0.0
    task = dataclasses.replace(TASK, program=PROGRAM, poor_program=PROGRAM)
    context = dataclasses.replace(CONTEXT, instance=dataclasses.replace(INSTANCE, task=task))
    compute = EnhanceReasoning(lambda model: experts, sandbox).run({"model": "expert-1"}, context)
    receipt = asyncio.run(compute).receipt
    assert (receipt.service_s, receipt.queue_s) == (call_latency_s(WorldConfig(), OFFER, "enhance_reasoning"), 0.0)


def test_a_search_that_fails_has_taken_its_time(world, index):
    expert, answers = Noting(world.url), world.respond

    def respond(body):
        if "input" not in body:
            return answers(body)
        time.sleep(EMBEDDING_S)
        return 403, "text/plain", b"no"

    world.respond = respond
    failed = run(Search(lambda model: expert, index), expert)
    assert (failed.receipt.status, failed.receipt.reason) == (CallStatus.FAILED, Reason.SERVER_ERROR)
    assert own_seconds(expert, failed) >= EMBEDDING_S - 1e-6


class Crowding(Noting):
    """Behind each reply the only thread has something else to do first."""

    async def reply(self, request):
        reply = await super().reply(request)
        asyncio.get_running_loop().run_in_executor(None, time.sleep, QUEUE_S)
        return reply


def test_the_experts_retries_and_the_wait_for_a_thread_are_apart_from_the_work(world, completion, sandbox):
    program = f"{PROGRAM}  # not run before"
    answers = iter([(503, "text/plain", b""), completion(f"```python\n{program}\n```")])
    world.respond = lambda body: next(answers)
    expert = Crowding(world.url, first_wait_s=0.4)

    async def go():
        asyncio.get_running_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor(1))
        result = await EnhanceReasoning(lambda model: expert, sandbox).run({"model": "expert-1"}, CONTEXT)
        await expert.close()
        return result

    result = asyncio.run(go())
    assert result.receipt.attempt == 2 and result.receipt.retry_s == expert.replies[0].retry_s >= 0.2
    assert own_seconds(expert, result) == pytest.approx(sandbox.run(program).service_s)
    assert result.receipt.queue_s >= QUEUE_S - 0.01


def test_latency_is_the_critical_path_of_calls_with_their_tools_seconds(world, index, sandbox):
    expert = EndpointExpert(world.url, "m")
    environment = QuestionAnswering(Toolbox(make_tools(expert, index, sandbox), 20.0), 4, is_compact=True)
    chat = load_chat(SMALL_TOKENIZER_DIRECTORY, "compact")
    turns = [chat_format.encode_turn(chat, "", calls) for calls in ([SEARCH, COMPUTE], [ANSWER])]
    engine = ScriptedEngine(lambda session_id, number, prompt_tokens: turns[number], 0)
    config = RolloutConfig(120, 900, 2, 1.0, 0.2, 200.0)
    trajectory = asyncio.run(run_episode(INSTANCE, 0, environment, engine, chat, config, seed=0))
    first, search, compute, second, answer = trajectory.receipts
    assert (search.tool, compute.tool, answer.tool) == ("search", "enhance_reasoning", "answer")
    calls_s = [search.retry_s + search.service_s, compute.retry_s + compute.service_s]
    assert max(calls_s) >= EMBEDDING_S and min(calls_s) >= PROGRAM_S
    expected_s = first.service_s + max(calls_s) + second.service_s + answer.retry_s + answer.service_s
    assert trajectory.objectives["latency_s"] == pytest.approx(expected_s, rel=1e-12)
    totals = replay_receipts(trajectory.receipts)
    assert totals.latency_s == trajectory.objectives["latency_s"] < totals.service_s


def test_a_replay_repeats_the_tools_seconds(world, index, sandbox, tmp_path):
    (tmp_path / "endpoints.json").write_text(json.dumps({"gpt-5": {"endpoint": world.url, "model": "m"}}))
    config = RunConfig()
    config.experts.endpoints_path = str(tmp_path / "endpoints.json")
    config.tools.index_directory, config.tools.ranking = str(tmp_path / "index"), "dense"
    config.tools.embedding_endpoint, config.tools.embedding_model = world.url, "m"
    config.tools.recording_directory = str(tmp_path / "store")

    def play():
        """Two searches alike, one behind the other, and a program: the second search has nobody to ask any more."""
        box = build_toolbox(config, DOCUMENTS, sandbox, Account(), None)
        calls = [SEARCH, SEARCH, COMPUTE]

        async def go():
            contexts = [dataclasses.replace(CONTEXT, call_number=number) for number in range(3)]
            return [(await box.call(*each)).receipt for each in zip(calls, contexts)]

        return asyncio.run(go())

    recorded, again = play(), play()
    world.shutdown()
    sandbox._results.clear()  # the program runs again, and takes another time
    config.tools.recording_mode = "replay"
    replayed = play()
    assert replayed == again == [dataclasses.replace(each, is_cache_hit=True, queue_s=0.0) for each in recorded]
    assert recorded[0].service_s >= EMBEDDING_S and recorded[2].service_s >= PROGRAM_S
