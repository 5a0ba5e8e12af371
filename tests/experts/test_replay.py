"""Replies of a real endpoint recorded, then replayed with the server gone and without its key."""

import asyncio
import dataclasses
import json

import pytest

from orchestra_jax.data.records import Instance, Offer, Preference, Task
from orchestra_jax.experts.endpoint import load_endpoints
from orchestra_jax.experts.expert import ExpertRequest
from orchestra_jax.experts.replay import RecordedExpert
from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.recording import Store
from orchestra_jax.tools.tool import Evidence
from orchestra_jax.types import CallStatus, Reason

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
