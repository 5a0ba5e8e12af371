"""Replies of a real endpoint recorded, then replayed with the server gone and without its key."""

import asyncio
import dataclasses
import json
import threading
import time

import numpy as np
import pytest

from orchestra_jax.components import build_components
from orchestra_jax.config import RunConfig
from orchestra_jax.data.pipeline import evaluation_instances
from orchestra_jax.data.records import Document, Instance, Offer, Preference, Task
from orchestra_jax.demonstrations import demonstrate
from orchestra_jax.experts.endpoint import EndpointExpert, load_endpoints
from orchestra_jax.experts.expert import ExpertRequest
from orchestra_jax.experts.replay import RecordedExpert
from orchestra_jax.experts.world import model_names
from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.ledger import ORCHESTRATOR, replay_receipts
from orchestra_jax.tools.recording import Store
from orchestra_jax.tools.search.document_index import build_index
from orchestra_jax.tools.search.embedding import EmbeddingEndpoint
from orchestra_jax.tools.tool import Evidence
from orchestra_jax.types import CallStatus, EpisodeStatus, Reason

OFFER = Offer("expert-1", "gpt-5", False, 2.0, 8.0, 1.0)
TASK = Task("t/0", "geography", "one_hop", "What is the capital of France?", "Paris", "search", ("a",))
INSTANCE = Instance("t/0", TASK, Preference("any", "Any.", {"outcome": 1.0}), (OFFER,), seed=0)
KEY = "sk-a-key-that-nobody-may-see"


def request(rollout_index=0, seed=0, evidence=""):
    instance = dataclasses.replace(INSTANCE, seed=seed)
    return ExpertRequest("answer", instance, OFFER, Evidence(text=evidence), False, rollout_index)


def ask(expert, *requests):
    async def go():
        replies = [await expert.reply(one) for one in requests]
        await expert.close()
        return replies

    return asyncio.run(go())


@pytest.fixture
def everything(endpoint, completion, tmp_path):
    """A run whose experts, judge and embeddings are asked of one server, which never says the same twice."""
    rng, lock = np.random.default_rng(0), threading.Lock()

    def respond(body):
        with lock:
            number, vectors = rng.integers(10**6), rng.normal(size=(len(body.get("input", ())), 4)).tolist()
        if "input" in body:
            data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(vectors)]
            return 200, "application/json", json.dumps({"object": "list", "data": data, "model": "m"}).encode()
        verdict = "right" if number % 2 else "wrong"
        answer = f"<answer>{number % 3}</answer>"  # rollouts that say the same are one question to the judge
        return completion(
            f"<query>{number}</query>{answer}<verdict>{verdict}</verdict>\n```python\nprint({number})\n```"
        )

    endpoint.respond = respond
    config = RunConfig(model="tiny")
    config.data.num_tasks_per_cell = config.data.num_test_tasks_per_cell = 1
    entry = {"endpoint": endpoint.url, "model": "m", "api_key_variable": "SOME_KEY"}
    entry |= {"input_usd_per_million_tokens": 1.0, "output_usd_per_million_tokens": 1.0}
    path = tmp_path / "endpoints.json"
    path.write_text(json.dumps({model: entry for model in (*model_names(config.world), "judge")}))
    config.experts.endpoints_path, config.experts.outcome = str(path), "judged"
    build_index(tmp_path / "index", [Document(name, name, name) for name in "abcdefgh"], EmbeddingEndpoint(
        endpoint.url, "m").embed)  # fmt: skip
    config.tools.index_directory, config.tools.ranking = str(tmp_path / "index"), "dense"
    config.tools.embedding_endpoint, config.tools.embedding_model = endpoint.url, "m"
    config.tools.embedding_usd_per_million_tokens, config.tools.embedding_key_variable = 1.0, "SOME_KEY"
    config.tools.recording_directory = str(tmp_path / "store")
    return config


def play(config):
    """Groups of random routes, all at once, and what they cost in real money."""
    parts = build_components(config)
    with parts.resources:
        instances = evaluation_instances(parts.test_tasks, parts.preferences, config.world, 3, 0)
        groups = demonstrate(instances, 4, parts.environment, parts.chat, parts.rollout, 0)
    return [each for group in groups for each in group.trajectories], parts.account.spent_usd


def test_a_whole_run_repeats_offline(everything, endpoint, monkeypatch):
    """Answers, verdicts, documents, costs and seconds, those of tools included; nobody is asked and nothing is paid."""
    monkeypatch.setenv("SOME_KEY", KEY)
    everything.experts.spend_cap_usd = 10.0
    recorded, spent_usd = play(everything)
    assert len(recorded) == 60 and all(each.status == EpisodeStatus.ANSWERED for each in recorded)
    assert {each.objectives["outcome"] for each in recorded} == {0.0, 1.0} and spent_usd > 0.0
    monkeypatch.delenv("SOME_KEY")
    endpoint.shutdown()
    everything.experts.spend_cap_usd, everything.tools.recording_mode = 0.0, "replay"
    replayed, spent_usd = play(everything)
    assert spent_usd == 0.0
    for before, after in zip(recorded, replayed, strict=True):
        assert after.tokens.tolist() == before.tokens.tolist()
        assert (after.calls, after.answer, after.objectives) == (before.calls, before.answer, before.objectives)
        assert list(after.receipts) == [as_replayed(receipt) for receipt in before.receipts]
        assert replay_receipts(after.receipts).latency_s == replay_receipts(before.receipts).latency_s
    assert KEY not in repr(recorded) + repr(replayed)


def as_replayed(receipt):
    if receipt.tool == ORCHESTRATOR:
        return receipt
    return dataclasses.replace(receipt, is_cache_hit=True, queue_s=0.0)


def test_who_asks_the_same_at_once_waits_for_the_one_that_asks(endpoint, completion, tmp_path):
    def respond(body):
        time.sleep(0.1)
        return completion(f"<answer>{len(endpoint.requests)}</answer>")

    endpoint.respond = respond
    expert = RecordedExpert(EndpointExpert(endpoint.url, "m"), Store(tmp_path, "record"))
    messages = [{"role": "user", "content": "?"}]

    async def go():
        first = asyncio.create_task(expert.complete(messages))
        await asyncio.sleep(0.02)
        others = [expert.complete(messages) for _ in range(3)] + [expert.reply(request())]
        replies = [await first, *await asyncio.gather(*others)]
        late = asyncio.create_task(expert.complete([{"role": "user", "content": "!"}]))
        await asyncio.sleep(0.02)
        after = asyncio.create_task(expert.complete([{"role": "user", "content": "!"}]))
        await asyncio.sleep(0.02)
        late.cancel()  # who waited asks then
        replies.append(await after)
        await expert.close()
        return replies

    *same, other, after = asyncio.run(go())
    assert len(endpoint.requests) == 4 and other.text != same[0].text
    assert [reply.is_cache_hit for reply in same] == [False, True, True, True] and not after.is_cache_hit
    assert {reply.text for reply in same} == {same[0].text} and after.status == CallStatus.OK


def test_a_run_against_a_paid_endpoint_repeats_offline(endpoint, completion, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    endpoint.respond = lambda body: completion(f"<answer>Paris {len(endpoint.requests)}</answer>")
    entry = {"endpoint": endpoint.url, "model": "m", "api_key_variable": "SOME_KEY"}
    prices = {"input_usd_per_million_tokens": 1.0, "output_usd_per_million_tokens": 1.0}
    path = tmp_path / "endpoints.json"
    path.write_text(json.dumps({"gpt-5": {**entry, **prices}}))
    account = Account(10.0)
    asked = [request(), request(1), request(seed=5), request(evidence="x")]

    online = RecordedExpert(load_endpoints(str(path), ["gpt-5"], account)["gpt-5"], Store(tmp_path / "store", "record"))
    first, again = ask(online, *asked), ask(online, *asked)
    assert len(endpoint.requests) == 4 and len({reply.text for reply in first}) == 4  # each sample is its own
    assert account.spent_usd == pytest.approx(4 * 81e-6)  # what is replayed costs nobody anything

    monkeypatch.delenv("SOME_KEY")
    endpoint.shutdown()
    offline_expert = load_endpoints(str(path), ["gpt-5"], Account(0.0), is_offline=True)["gpt-5"]
    offline = ask(RecordedExpert(offline_expert, Store(tmp_path / "store", "replay")), *asked, request(9))
    expected = [dataclasses.replace(reply, is_cache_hit=True, queue_s=0.0) for reply in first]
    assert again == expected == offline[:-1]
    assert (offline[-1].status, offline[-1].reason) == (CallStatus.FAILED, Reason.NOT_RECORDED)
    files = "".join(file.read_text() for file in (tmp_path / "store").rglob("*.json"))
    assert KEY not in files and "Paris 1" in files
