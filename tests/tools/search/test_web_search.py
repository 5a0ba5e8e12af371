"""Web search against a real HTTP server that answers as Tavily and Serper do, or not at all."""

import asyncio
import dataclasses
import json
import logging
import threading

import pytest
from json_server import serve

from orchestra_jax.data.records import Instance, Preference, Task
from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.search.web_search import PROVIDERS, WebSearch
from orchestra_jax.tools.tool import Evidence, ToolContext
from orchestra_jax.types import CallStatus, Reason

KEY = "tvly-nobody-may-see-this"
TASK = Task("t", "geography", "one_hop", "", "", "search")
CONTEXT = ToolContext(Instance("i", TASK, Preference("any", "", {}), (), 0), 0, Evidence())
PAGE = {"title": "Paris", "url": "https://example.org/paris", "content": f"the key is {KEY}", "score": 0.9}


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for provider in PROVIDERS.values():
        monkeypatch.setenv(provider.api_key_variable, KEY)
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)


def ask(url, provider="tavily", account=None, timeout_s=5.0, query="capital of France"):
    tool = WebSearch(dataclasses.replace(PROVIDERS[provider], url=url), account or Account(), 2, timeout_s)

    async def go():
        result = await tool.run({"query": query}, CONTEXT)
        await tool.close()
        return result

    return asyncio.run(go())


def test_tavily_is_asked_and_read_and_charged():
    account = Account()
    reply = json.dumps({"results": [PAGE, {"url": "https://example.org/b"}, PAGE]}).encode()
    with serve(lambda *_: (200, {}, reply)) as (url, requests):
        result = ask(url, account=account, query="x" * 500)
    ((_, headers, body),) = requests
    assert headers["authorization"] == f"Bearer {KEY}"
    assert body == {"query": "x" * 390, "max_results": 2, "search_depth": "advanced"}
    assert result.status == CallStatus.OK and result.receipt.cost_usd == account.spent_usd == 0.01
    assert result.evidence.document_ids == ("https://example.org/paris", "https://example.org/b")
    assert "the key is [key]" in result.text and 0 < result.receipt.service_s < 5


@pytest.mark.parametrize(
    ("asked", "seconds"), [("0.5", 0.5), ("\u00b2", 0.0), ("9" * 400, 0.0), ("Fri, 01 Jan 2027 00:00:00 GMT", 0.0)]
)
def test_whatever_a_busy_provider_asks_for_is_read(asked, seconds):
    with serve(lambda *_: (429, {"Retry-After": asked}, b"")) as (url, _):
        assert ask(url).retry_after_s == seconds


def test_another_provider_is_a_matter_of_configuration():
    reply = json.dumps({"organic": [{"title": "Paris", "link": "https://p", "snippet": "a city"}]}).encode()
    with serve(lambda *_: (200, {}, reply)) as (url, requests):
        result = ask(url, "serper")
    assert requests[0][1]["x-api-key"] == KEY and requests[0][2] == {"q": "capital of France", "num": 2}
    assert result.text == "Paris\nhttps://p\na city" and result.receipt.cost_usd == 0.001


@pytest.mark.parametrize(
    ("status", "headers", "text", "reason", "cost_usd"),
    [
        (429, {"Retry-After": "7"}, b"", Reason.RATE_LIMITED, 0.0),
        (500, {}, KEY.encode(), Reason.SERVER_ERROR, 0.0),
        (200, {}, b"{", Reason.UNREADABLE, 0.01),
        (200, {}, b'{"hits": []}', Reason.UNREADABLE, 0.01),
        (200, {}, b'{"results": [3]}', Reason.UNREADABLE, 0.01),
        (200, {}, b"[" * 100_000, Reason.UNREADABLE, 0.01),
    ],
)
def test_what_goes_wrong_outside_is_a_typed_failure(status, headers, text, reason, cost_usd, caplog):
    caplog.set_level(logging.DEBUG)
    with serve(lambda *_: (status, headers, text)) as (url, _):
        result = ask(url)
    assert (result.status, result.receipt.reason, result.receipt.cost_usd) == (CallStatus.FAILED, reason, cost_usd)
    assert result.retry_after_s == (7.0 if reason == Reason.RATE_LIMITED else 0.0)
    assert KEY not in caplog.text + repr(result)


def test_a_hang_ends_at_the_deadline_and_counts():
    release, account = threading.Event(), Account()
    with serve(lambda *_: (release.wait(20), (200, {}, b"{}"))[1]) as (url, _):
        result = ask(url, account=account, timeout_s=0.2)
        release.set()
    assert (result.status, result.receipt.reason) == (CallStatus.TIMEOUT, Reason.DEADLINE)
    assert account.spent_usd == 0.01 and 0.2 <= result.receipt.service_s < 2


def test_nothing_found_nobody_there_and_nothing_to_spend():
    with serve(lambda *_: (200, {}, b'{"results": []}')) as (url, requests):
        assert ask(url).text == "nothing found"
        assert ask(url, account=Account(0.009)).receipt.reason == Reason.SPEND_CAP
        assert len(requests) == 1
    assert ask("http://127.0.0.1:1").receipt.reason == Reason.NO_CONNECTION


def test_a_missing_key_is_named(monkeypatch):
    monkeypatch.delenv("TAVILY_API_KEY")
    with pytest.raises(ValueError, match="'TAVILY_API_KEY' is not set"):
        WebSearch(PROVIDERS["tavily"], Account())
