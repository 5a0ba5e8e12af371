"""What an endpoint can do wrong: each ends within its deadline, with the right status, reason and charge."""

import asyncio
import collections
import dataclasses
import json
import logging
import threading
import time

import pytest

from orchestra_jax.data.records import Budget, Instance, Offer, Preference, Task
from orchestra_jax.experts.delegation import Answer
from orchestra_jax.experts.endpoint import EndpointExpert, load_endpoints
from orchestra_jax.experts.expert import ExpertRequest
from orchestra_jax.tools.budget import Account, Allowance
from orchestra_jax.tools.ledger import ORCHESTRATOR, make_receipt, replay
from orchestra_jax.tools.tool import Evidence, ToolContext
from orchestra_jax.tools.toolbox import Toolbox
from orchestra_jax.types import CallStatus, Reason, ToolCall

OFFER = Offer("expert-1", "gpt-5", False, 2.0, 8.0, 1.0)
TASK = Task("t/0", "geography", "one_hop", "What is the capital of France?", "Paris", "search", ("a",))
INSTANCE = Instance("t/0", TASK, Preference("any", "Any.", {"outcome": 1.0}), (OFFER,), seed=0)
REQUEST = ExpertRequest("answer", INSTANCE, OFFER, Evidence(), False, 0)
DEADLINE_S = 0.6
KEY = "sk-a-key-that-nobody-may-see"


def chunk(content=None, finish_reason=None, usage=None):
    choice = {"index": 0, "delta": {"content": content} if content else {}, "finish_reason": finish_reason}
    body = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
    return body if usage is None else {**body, "choices": [], "usage": usage}


def stream(*events):
    def write(handler):
        handler.open_stream()
        for event in events:
            handler.write_event(event)

    return write


def cut(handler):
    handler.close_connection = True  # without a byte of a reply


def cut_in_the_middle(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def hang(endpoint):
    return lambda body: (endpoint.release.wait(20), cut)[1]


GOOD_USAGE = {"prompt_tokens": 70, "completion_tokens": 11, "total_tokens": 81}
GOOD_STREAM = stream(chunk("<answer>Pa"), chunk("ris</answer>"), chunk(None, "stop"), chunk(usage=GOOD_USAGE), "[DONE]")

# name: (answer, is streaming, status, reason, output tokens, is estimated, attempts of at most 2)
CASES = {
    "busy": ((429, "text/plain", b"", {"Retry-After": "0.05"}), False, "failed", "rate_limited", 0, False, 2),
    "busy for longer than there is": (
        (429, "text/plain", b"", {"Retry-After": "30"}), False, "failed", "rate_limited", 0, False, 1,
    ),
    "broken": ((500, "text/plain", b"oh"), False, "failed", "server_error", 0, False, 2),
    "not allowed": ((403, "text/plain", b"no"), False, "failed", "server_error", 0, False, 1),
    "cut": (cut, False, "failed", "no_connection", 0, True, 2),
    "cut in the middle": (cut_in_the_middle, False, "failed", "no_connection", 0, True, 2),
    "no JSON": ((200, "application/json", b"{"), False, "failed", "unreadable", 0, True, 2),
    "empty choices": (
        (200, "application/json", json.dumps({"choices": [], "usage": GOOD_USAGE}).encode()),
        False, "failed", "unreadable", 22, False, 2,
    ),
    "busy stream": ((429, "text/plain", b""), True, "failed", "rate_limited", 0, False, 2),
    "broken stream": ((500, "text/plain", b"oh"), True, "failed", "server_error", 0, False, 2),
    "stream of no event": (stream("[DONE]"), True, "failed", "no_connection", 0, True, 2),
    "stream of empty choices": (
        stream({**chunk(), "choices": []}, chunk(usage=GOOD_USAGE), "[DONE]"),
        True, "failed", "no_connection", 0, True, 2,
    ),
    "stream of no content": (
        stream(chunk(None, "stop"), chunk(usage=GOOD_USAGE), "[DONE]"), True, "failed", "unreadable", 11, False, 1,
    ),
    "stream with impossible counts": (
        stream(chunk("<answer>Paris</answer>", "stop"), chunk(usage={**GOOD_USAGE, "completion_tokens": -1}), "[DONE]"),
        True, "ok", "", 6, True, 1,
    ),
    "cut stream": (stream(chunk("a"), chunk("bcdefg")), True, "failed", "no_connection", 4, True, 2),
    "no JSON in the stream": (stream(chunk("abcd"), "{"), True, "failed", "unreadable", 2, True, 2),
    "good stream": (GOOD_STREAM, True, "ok", "", 11, False, 1),
    "stream without counts": (
        stream(chunk("<answer>Paris</answer>"), chunk(None, "stop"), "[DONE]"), True, "ok", "", 6, True, 1,
    ),
}  # fmt: skip


def ask(expert, times=1):
    async def go():
        replies = await asyncio.gather(*(expert.reply(REQUEST) for _ in range(times)))
        await expert.close()
        return replies

    return asyncio.run(go())


@pytest.mark.parametrize("name", CASES)
def test_each_fault_ends_in_time_with_its_status_and_charge(endpoint, name):
    answer, is_streaming, status, reason, output_tokens, is_estimated, attempts = CASES[name]
    endpoint.respond = lambda body: answer
    expert = EndpointExpert(
        endpoint.url, "m", timeout_s=5.0, max_retries=1, first_wait_s=0.02, is_streaming=is_streaming
    )
    start_s = time.monotonic()
    (reply,) = ask(expert)
    assert time.monotonic() - start_s < 5.5
    assert (reply.status, reply.reason, reply.attempt) == (status, reason, attempts)
    assert (reply.output_tokens, reply.is_estimated) == (output_tokens, is_estimated)
    assert len(endpoint.requests) == attempts
    is_charged = is_estimated or output_tokens > 0
    assert (reply.input_tokens > 0) == is_charged
    assert (reply.retry_s > 0) == (attempts > 1)


@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_hang_ends_at_the_deadline_and_the_input_is_charged(endpoint, is_streaming):
    endpoint.respond = hang(endpoint)
    expert = EndpointExpert(endpoint.url, "m", timeout_s=DEADLINE_S, is_streaming=is_streaming)
    (reply,) = ask(expert)
    assert (reply.status, reply.reason, reply.attempt) == (CallStatus.TIMEOUT, Reason.DEADLINE, 1)
    assert reply.is_estimated and reply.input_tokens > 0 == reply.output_tokens
    assert DEADLINE_S * 0.9 <= reply.latency_s < DEADLINE_S + 1


def test_a_stream_that_stalls_is_charged_for_what_had_come(endpoint):
    def write(handler):
        handler.open_stream()
        handler.write_event(chunk("x" * 40))
        endpoint.release.wait(20)

    endpoint.respond = lambda body: write
    (reply,) = ask(EndpointExpert(endpoint.url, "m", timeout_s=5 * DEADLINE_S, is_streaming=True))
    assert (reply.status, reply.output_tokens, reply.is_estimated) == (CallStatus.TIMEOUT, 10, True)


def test_what_retry_after_asks_for_is_waited_and_apart_in_the_receipt(endpoint, completion):
    answers = iter([(429, "text/plain", b"", {"Retry-After": "0.3"}), completion("<answer>Paris</answer>")])
    endpoint.respond = lambda body: next(answers)
    expert = EndpointExpert(endpoint.url, "m", timeout_s=10, first_wait_s=0.01)
    box = Toolbox([Answer(lambda model: expert)], timeout_s=20)
    result = asyncio.run(box.call(ToolCall("answer", {"model": "expert-1"}), ToolContext(INSTANCE, 0, Evidence())))
    receipt = result.receipt
    assert (result.status, result.answer, receipt.attempt) == (CallStatus.OK, "Paris", 2)
    assert 0.3 <= receipt.retry_s < 5 and 0 < receipt.service_s < 5
    assert receipt.cost_usd == pytest.approx((70 * 2.0 + 11 * 8.0) / 1e6)


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 10**9, "completion_tokens": 11},
        {"prompt_tokens": 70, "completion_tokens": 10**9},
        {"prompt_tokens": True, "completion_tokens": 11},
        {"prompt_tokens": 70.5, "completion_tokens": 11},
        {"prompt_tokens": 70, "completion_tokens": 0},
        {},
        7,
    ],
)
def test_counts_that_cannot_be_are_replaced_by_an_estimate(endpoint, completion, usage):
    endpoint.respond = lambda body: completion("<answer>Paris</answer>", usage)
    (reply,) = ask(EndpointExpert(endpoint.url, "m", max_output_tokens=100))
    assert (reply.text, reply.output_tokens, reply.is_estimated) == ("Paris", 6, True)  # 22 bytes
    assert 20 < reply.input_tokens < 200


def test_200_concurrent_calls_respect_the_limits(endpoint, completion):
    lock, under_way, peak, starts = threading.Lock(), 0, 0, []

    def respond(body):
        nonlocal under_way, peak
        with lock:
            under_way += 1
            peak = max(peak, under_way)
            starts.append(time.monotonic())
        time.sleep(0.01)
        with lock:
            under_way -= 1
        return completion("<answer>Paris</answer>")

    endpoint.respond = respond
    expert = EndpointExpert(endpoint.url, "m", timeout_s=60, max_concurrent=7, requests_per_s=100)
    replies = ask(expert, 200)
    assert all(reply.status == CallStatus.OK for reply in replies) and len(endpoint.requests) == 200
    assert 1 < peak <= 7
    assert max(starts) - min(starts) >= 199 / 100 * 0.9  # evenly spaced: no second holds more than the rate
    assert max(reply.queue_s for reply in replies) > 1.0 and all(reply.latency_s < 10 for reply in replies)


def test_no_number_of_concurrent_calls_passes_the_spending_cap(endpoint, completion):
    endpoint.respond = lambda body: completion("<answer>Paris</answer>")
    expert = EndpointExpert(
        endpoint.url, "m", max_output_tokens=100, input_usd_per_million_tokens=10, output_usd_per_million_tokens=100
    )
    most_usd = (expert.bound(REQUEST).input_tokens * 10 + 100 * 100) / 1e6
    paid_usd = (70 * 10 + 11 * 100) / 1e6
    expert.account = Account(cap_usd=most_usd * 5)
    statuses = collections.Counter(reply.reason for reply in ask(expert, 50))
    assert statuses == {Reason.NONE: 5, Reason.SPEND_CAP: 45} and len(endpoint.requests) == 5
    assert expert.account.spent_usd == pytest.approx(5 * paid_usd)
    for left_usd, reason in ((most_usd * 1.01, Reason.NONE), (most_usd * 0.99, Reason.SPEND_CAP)):
        expert.account.set_state({"spent_usd": expert.account.cap_usd - left_usd})
        assert ask(expert)[0].reason == reason


def test_an_attempt_of_unknown_fate_counts_in_full_against_the_cap_and_an_error_does_not(endpoint):
    prices = {"input_usd_per_million_tokens": 10, "output_usd_per_million_tokens": 100}
    endpoint.respond = hang(endpoint)
    expert = EndpointExpert(endpoint.url, "m", timeout_s=0.2, max_retries=0, **prices)
    bound = expert.bound(REQUEST)
    ask(expert)
    assert expert.account.spent_usd == pytest.approx((bound.input_tokens * 10 + bound.output_tokens * 100) / 1e6)
    endpoint.respond = lambda body: (500, "text/plain", b"")
    fresh = EndpointExpert(endpoint.url, "m", max_retries=0, **prices)
    ask(fresh)
    assert fresh.account.spent_usd == 0.0


@pytest.mark.parametrize(
    ("answer", "num_quotes", "attempts"),
    [(cut, 1.5, 1), (cut, 2.5, 2), (cut, 9, 3), ((500, "text/plain", b""), 1.5, 3)],
)
def test_an_attempt_that_the_budget_of_the_task_cannot_pay_is_not_made(endpoint, answer, num_quotes, attempts):
    """An attempt that was cut may be billed; an error costs nothing, and what was put by pays the next one."""
    endpoint.respond = lambda body: answer
    expert = EndpointExpert(endpoint.url, "m", max_output_tokens=100, max_retries=2, first_wait_s=0.01)
    tool, context = Answer(lambda model: expert), ToolContext(INSTANCE, 0, Evidence())
    budget = Budget(cost_usd=num_quotes * tool.quote({"model": "expert-1"}, context).cost_usd)
    totals = replay([[make_receipt(ORCHESTRATOR, service_s=0.0)]])
    context = dataclasses.replace(context, allowance=Allowance(budget, totals))
    result = asyncio.run(Toolbox([tool], 20.0).call(ToolCall("answer", {"model": "expert-1"}), context))
    assert (result.status, result.receipt.attempt, len(endpoint.requests)) == (CallStatus.FAILED, attempts, attempts)
    assert result.receipt.cost_usd <= budget.cost_usd


def test_the_key_is_sent_and_shows_nowhere_else(endpoint, completion, monkeypatch, caplog, capfd):
    monkeypatch.setenv("SOME_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    url = endpoint.url.replace("http://", f"http://user:{KEY}@") + f"?key={KEY}"
    answers = iter(
        [
            (500, "application/json", json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()),
            completion(f"<answer>your key is {KEY}</answer>"),
        ]
    )
    endpoint.respond = lambda body: next(answers)
    expert = EndpointExpert(endpoint.url, "m", "SOME_KEY", first_wait_s=0.01)
    result = asyncio.run(Answer(lambda model: expert).run({"model": "expert-1"}, ToolContext(INSTANCE, 0, Evidence())))
    assert endpoint.requests[0][1]["authorization"] == f"Bearer {KEY}"
    endpoint.respond = lambda body: (401, "application/json", json.dumps({"error": {"message": KEY}}).encode())
    (refusal,) = ask(EndpointExpert(endpoint.url, "m", "SOME_KEY"))
    with pytest.raises(ValueError, match="has a user or a query in its URL") as error:
        EndpointExpert(url, "m", "SOME_KEY")
    shown = [caplog.text, *capfd.readouterr(), repr(result), repr(refusal), repr(expert), str(error.value)]
    assert result.answer == "your key is [key]" and "[key]" in caplog.text
    assert not any(KEY in text for text in shown)


def test_a_paid_endpoint_says_its_price_and_the_run_its_cap(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    path = tmp_path / "endpoints.json"
    entry = {"endpoint": "http://127.0.0.1:1/v1", "model": "m", "api_key_variable": "SOME_KEY"}
    path.write_text(json.dumps({"gpt-5": entry}))
    with pytest.raises(ValueError, match="'gpt-5' .* has a key and no prices"):
        load_endpoints(str(path), ["gpt-5"], Account())
    prices = {"input_usd_per_million_tokens": 1.25, "output_usd_per_million_tokens": 10}
    path.write_text(json.dumps({"gpt-5": {**entry, **prices}}))
    with pytest.raises(ValueError, match="'gpt-5' costs money and experts.spend_cap_usd is 0"):
        load_endpoints(str(path), ["gpt-5"], Account(0.0))
    account = Account(3.0)
    assert load_endpoints(str(path), ["gpt-5"], account)["gpt-5"].account is account


def test_a_receipt_of_a_failed_reply_has_its_price():
    receipt = make_receipt("answer", service_s=1.0, input_tokens=10, input_usd_per_million_tokens=3.0, status="failed")
    assert receipt.cost_usd == pytest.approx(30e-6)
