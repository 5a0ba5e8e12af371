"""The embedding endpoint against a real HTTP server: vectors, failures, money, keys, and search on top of it."""

import asyncio
import dataclasses
import json
import logging
import time

import numpy as np
import pytest
from json_server import serve

from orchestra_jax.config import RunConfig
from orchestra_jax.data.records import Document, Instance, Offer, Preference, Task
from orchestra_jax.experts.delegation import Search
from orchestra_jax.experts.simulated import SimulatedExperts
from orchestra_jax.experts.world import WorldConfig
from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.recording import Store
from orchestra_jax.tools.search.document_index import DocumentIndex, build_index
from orchestra_jax.tools.search.embedding import EmbeddingEndpoint, EmbeddingFailure, most_cost_usd
from orchestra_jax.tools.tool import Evidence, ToolContext
from orchestra_jax.toolset import build_index as build_run_index
from orchestra_jax.types import CallStatus, Reason
from tests.experts.conftest import endpoint  # noqa: F401

KEY = "sk-nobody-may-see-this"
OFFER = Offer("expert-1", "gpt-5", False, 1.0, 1.0, 2.0)
TASK = Task("t", "geography", "one_hop", "Which?", "tom", "search", ("a",), query="cat", poor_query="cat")
CONTEXT = ToolContext(Instance("i", TASK, Preference("any", "", {}), (OFFER,), 0), 0, Evidence())
DOCUMENTS = (Document("a", "Cats", "a cat"), Document("b", "Dogs", "a dog"))


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)


def vectors(path, headers, body, num_tokens=3):
    """Cats lie along one axis, dogs along the other; the rows come in the wrong order."""
    rows = [[3.0, 0.0] if "cat" in text.lower() else [0.0, 5.0] for text in body["input"]]
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    reply = {"object": "list", "data": data[::-1], "model": "m", "usage": usage}
    return 200, {"Content-Type": "application/json"}, json.dumps(reply).encode()


def rows(embeddings):
    """An endpoint whose vectors are these."""
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(embeddings)]
    text = json.dumps({"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": 3, "total_tokens": 3}})
    return broken(200, text.encode())


def broken(status, text=b"", **headers):
    return lambda *_: (status, {"Content-Type": "application/json", **headers}, text)


def test_vectors_come_in_order_at_length_one_and_the_account_books_the_endpoints_count():
    account = Account(1.0)
    with serve(vectors) as (url, requests):
        made = EmbeddingEndpoint(url, "m", "SOME_KEY", 2, usd_per_million_tokens=1.0, account=account)
        found = made.embed(["cat", "dog", "cats"])
    np.testing.assert_allclose(found, [[1, 0], [0, 1], [1, 0]])
    assert [body["input"] for _, _, body in requests] == [["cat", "dog"], ["cats"]]
    assert requests[0][1]["authorization"] == f"Bearer {KEY}"
    assert account.spent_usd == pytest.approx(6e-6)  # three tokens a request


@pytest.mark.parametrize(
    ("respond", "reason", "paid_usd"),
    [
        (broken(429, b"{}", **{"Retry-After": "0"}), Reason.RATE_LIMITED, 0.0),
        (broken(401, json.dumps({"error": {"message": f"wrong key {KEY}"}}).encode()), Reason.SERVER_ERROR, 0.0),
        (broken(200, b"{"), Reason.UNREADABLE, 3e-6),
        (broken(200, b'{"data": []}'), Reason.UNREADABLE, 3e-6),
        (lambda path, headers, body: vectors(path, headers, {"input": []}), Reason.UNREADABLE, 3e-6),
        (rows([["a"]]), Reason.UNREADABLE, 3e-6),
        (rows([[0.0, 0.0]]), Reason.UNREADABLE, 3e-6),
        (rows([[float("nan"), 1.0]]), Reason.UNREADABLE, 3e-6),
        (broken(200, b"[" * 100_000), Reason.UNREADABLE, 3e-6),
    ],
)
def test_each_failure_has_its_reason_and_charge_and_tells_no_key(respond, reason, paid_usd, caplog):
    caplog.set_level(logging.DEBUG)
    account = Account(1.0)
    with serve(respond) as (url, requests):
        made = EmbeddingEndpoint(url, "m", "SOME_KEY", usd_per_million_tokens=1.0, account=account)
        with pytest.raises(EmbeddingFailure) as error:
            made.embed(["cat"])
    assert (error.value.reason, len(requests)) == (reason, 1)  # who is billed is asked once
    assert account.spent_usd == pytest.approx(paid_usd)
    assert KEY not in str(error.value) + repr(error.value) and KEY not in caplog.text


def drip(handler):
    """A reply that never stalls and never ends."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while not handler.server.release.wait(0.02):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def hang(handler):
    handler.server.release.wait(30)


@pytest.mark.parametrize(("stall", "price"), [(drip, 0.0), (hang, 1.0)])
def test_the_deadline_holds_for_the_whole_call(endpoint, stall, price, tmp_path):  # noqa: F811
    endpoint.respond = lambda body: stall
    account = Account(1.0)
    made = EmbeddingEndpoint(endpoint.url, "m", timeout_s=1.0, usd_per_million_tokens=price, account=account)
    begin_s = time.monotonic()
    with pytest.raises(EmbeddingFailure, match="failed: no vectors within 1 s") as error:
        made.embed(["cat"])
    assert 1.0 <= time.monotonic() - begin_s < 20
    assert (error.value.reason, len(endpoint.requests)) == (Reason.DEADLINE, 1)
    assert account.spent_usd == pytest.approx(3e-6 * price)  # nobody knows what the endpoint did by then
    build_index(tmp_path / "index", DOCUMENTS, lambda texts: np.eye(2, dtype=np.float32)[: len(texts)])
    late = search(DocumentIndex(tmp_path / "index", "dense", made.embed, price))
    assert (late.status, late.receipt.status, late.receipt.reason) == ("timeout", "timeout", Reason.DEADLINE)


def test_who_bills_nobody_is_asked_again_within_the_deadline():
    replies = iter([broken(503), broken(429)])
    with serve(lambda *asked: next(replies, vectors)(*asked)) as (url, requests):
        begin_s = time.monotonic()
        np.testing.assert_allclose(EmbeddingEndpoint(url, "m").embed(["cat"]), [[1, 0]])
        assert len(requests) == 3 and time.monotonic() - begin_s >= 0.25 + 0.5
    with serve(broken(503, **{"Retry-After": "60"})) as (url, requests):
        with pytest.raises(EmbeddingFailure) as error:
            EmbeddingEndpoint(url, "m", timeout_s=20.0).embed(["cat"])  # no time for the wait that it asks for
        assert (error.value.reason, len(requests)) == (Reason.SERVER_ERROR, 1)
    with pytest.raises(ValueError, match="timeout_s must be positive, got 0"):
        EmbeddingEndpoint(url, "m", timeout_s=0)


def test_one_client_serves_many_threads():
    """As concurrent searches ask it, each from a thread, in the loops of one training step after another."""
    with serve(vectors) as (url, requests):
        made = EmbeddingEndpoint(url, "m")

        async def go():
            texts = ["cat", "dog"] * 10
            return await asyncio.gather(*(asyncio.to_thread(made.embed, [text]) for text in texts))

        for _ in range(2):
            found = asyncio.run(go())
            np.testing.assert_allclose(np.concatenate(found), np.tile(np.eye(2), (10, 1)))
        assert len(requests) == 40


def test_nobody_is_asked_beyond_the_cap_and_no_url_holds_a_key():
    with serve(vectors) as (url, requests):
        made = EmbeddingEndpoint(url, "m", usd_per_million_tokens=1e6, account=Account(1.0))
        with pytest.raises(EmbeddingFailure, match="spending cap") as error:
            made.embed(["cat"])
    assert error.value.reason == Reason.SPEND_CAP and requests == []
    with pytest.raises(ValueError, match="a user or a query in its URL") as told:
        EmbeddingEndpoint(f"http://127.0.0.1:1/v1?key={KEY}", "m")
    assert KEY not in str(told.value)
    with pytest.raises(ValueError, match="'NO_SUCH' is not set"):
        EmbeddingEndpoint("http://127.0.0.1:1/v1", "m", "NO_SUCH")


def search(index):
    experts = SimulatedExperts(WorldConfig())
    return asyncio.run(Search(lambda model: experts, index).run({"model": "expert-1"}, CONTEXT))


def test_a_search_by_vectors_is_charged_for_its_query_and_fails_as_data(tmp_path):
    with serve(vectors) as (url, _):
        embed = EmbeddingEndpoint(url, "m").embed
        build_index(tmp_path / "index", DOCUMENTS, embed)
        index = DocumentIndex(tmp_path / "index", "dense", embed, usd_per_million_tokens=2.0)
        found, words = search(index), search(DocumentIndex(tmp_path / "index"))
    assert found.evidence.document_ids[0] == "a"
    assert found.receipt.cost_usd - words.receipt.cost_usd == pytest.approx(most_cost_usd(["cat"], 2.0)) == 6e-6
    nobody = EmbeddingEndpoint("http://127.0.0.1:1/v1", "m", usd_per_million_tokens=2.0).embed
    failed = search(DocumentIndex(tmp_path / "index", "dense", nobody, usd_per_million_tokens=2.0))
    assert (failed.status, failed.receipt.reason) == (CallStatus.FAILED, Reason.NO_CONNECTION)
    assert failed.receipt.cost_usd == found.receipt.cost_usd and failed.evidence == Evidence()


def test_a_budget_knows_beforehand_what_a_query_can_cost(tmp_path):
    """A query is cut, so that its price has a bound; without vectors it costs nothing."""
    build_index(tmp_path / "index", DOCUMENTS, lambda texts: np.eye(2, dtype=np.float32)[: len(texts)])
    asked = []

    def embed(texts):
        asked.extend(texts)
        return np.eye(2, dtype=np.float32)[:1]

    index = DocumentIndex(tmp_path / "index", "dense", embed, usd_per_million_tokens=2.0)
    experts = SimulatedExperts(WorldConfig())
    tool, plain = (Search(lambda model: experts, each) for each in (index, DocumentIndex(tmp_path / "index")))
    long = dataclasses.replace(TASK, query="\u20ac" * 5_000, poor_query="\u20ac" * 5_000)
    context = dataclasses.replace(CONTEXT, instance=dataclasses.replace(CONTEXT.instance, task=long))
    most_usd, words_usd = (each.quote({"model": "expert-1"}, context).cost_usd for each in (tool, plain))
    result = asyncio.run(tool.run({"model": "expert-1"}, context))
    assert [len(text) for text in asked] == [1_000]
    assert most_usd - words_usd == pytest.approx(4_000 * 2e-6)
    assert words_usd < result.receipt.cost_usd <= most_usd
    assert result.receipt.cost_usd - words_usd == pytest.approx(3_000 * 2e-6)


def test_a_query_of_another_embedding_model_is_named(tmp_path):
    build_index(tmp_path / "index", DOCUMENTS, lambda texts: np.eye(2, dtype=np.float32)[: len(texts)])
    index = DocumentIndex(tmp_path / "index", "dense", lambda texts: np.eye(3, dtype=np.float32)[:1])
    with pytest.raises(ValueError, match="has 3 dims and those of the index have 2: name the embedding model"):
        index.search("cat", 1)


def test_embeddings_are_recorded_and_replayed_without_key_or_money(tmp_path, monkeypatch):
    account = Account(1.0)
    config = RunConfig()
    config.tools.index_directory, config.tools.ranking = str(tmp_path / "index"), "fused"
    config.tools.embedding_model, config.tools.embedding_key_variable = "m", "SOME_KEY"
    config.tools.embedding_usd_per_million_tokens = 1.0
    with serve(vectors) as (url, requests):
        config.tools.embedding_endpoint = url
        build_index(tmp_path / "index", DOCUMENTS, EmbeddingEndpoint(url, "m").embed)
        with pytest.raises(ValueError, match="embeddings cost .1 a million tokens and experts.spend_cap_usd is 0"):
            build_run_index(config, DOCUMENTS, account)
        config.experts.spend_cap_usd = 1.0
        online = build_run_index(config, DOCUMENTS, account, Store(tmp_path / "store", "record"))
        before = len(requests)
        first, again = online.search("cat", 2), online.search("cat", 2)
        assert len(requests) == before + 1
    monkeypatch.delenv("SOME_KEY")
    config.experts.spend_cap_usd = 0.0
    offline = build_run_index(config, DOCUMENTS, account, Store(tmp_path / "store", "replay"))
    assert offline.search("cat", 2) == again == first
    assert account.spent_usd == pytest.approx(3e-6)
    with pytest.raises(EmbeddingFailure, match="not recorded"):
        offline.search("dog", 2)
    assert KEY not in "".join(p.read_text() for p in (tmp_path / "store").rglob("*.json"))
