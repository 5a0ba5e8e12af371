"""EndpointExpert against a real HTTP server on the loopback interface that speaks /v1/chat/completions."""

import asyncio
import json

import openai
import pytest

from orchestra_jax.data.records import Instance, Offer, Preference, Task
from orchestra_jax.experts.delegation import Answer
from orchestra_jax.experts.endpoint import EndpointExpert, load_endpoints
from orchestra_jax.experts.expert import ExpertRequest
from orchestra_jax.experts.roles import extract
from orchestra_jax.tools.tool import Evidence, ToolContext
from orchestra_jax.types import CallStatus, Reason

MODELS = ("gpt-5", "gpt-5-mini")
OFFER = Offer("expert-1", "gpt-5", False, 2.0, 8.0, 1.0)
TASK = Task("t/0", "geography", "one_hop", "What is the capital of France?", "Paris", "search", ("a",))
INSTANCE = Instance("t/0", TASK, Preference("any", "Any.", {"outcome": 1.0}), (OFFER,), seed=0)


def request(role, evidence=""):
    return ExpertRequest(role, INSTANCE, OFFER, Evidence(text=evidence), bool(evidence), 0)


def ask(expert, *requests):
    async def go():
        replies = [await expert.reply(one) for one in requests]
        await expert.close()
        return replies

    return asyncio.run(go())


REPLIES_BY_ROLE = {
    "search": ('"capital France"\n', "capital France"),
    "enhance_reasoning": ("Sure:\n```python\nx = 6\nprint(x * 7)\n```\nDone.", "x = 6\nprint(x * 7)"),
    "answer": ("It is known.\n<answer> Paris </answer>", "Paris"),
}


@pytest.mark.parametrize("role", REPLIES_BY_ROLE)
def test_each_role_is_asked_and_read(endpoint, role, monkeypatch, completion):
    monkeypatch.setenv("SOME_KEY", "secret")
    content, expected = REPLIES_BY_ROLE[role]
    endpoint.respond = lambda body: completion(content)
    expert = EndpointExpert(endpoint.url, "some-model", "SOME_KEY", timeout_s=20, max_output_tokens=99)
    (reply,) = ask(expert, request(role, "Paris is a city."))
    assert (reply.text, reply.status, reply.input_tokens, reply.output_tokens) == (expected, CallStatus.OK, 70, 11)
    assert 0 < reply.latency_s < 20
    ((path, headers, body),) = endpoint.requests
    assert path == "/v1/chat/completions" and headers["authorization"] == "Bearer secret"
    assert (body["model"], body["max_completion_tokens"]) == ("some-model", 99)
    system, user = (message["content"] for message in body["messages"])
    assert TASK.question in user and "Paris is a city." in user
    assert {"search": "query", "enhance_reasoning": "program", "answer": "<answer>"}[role] in system
    assert TASK.answer not in system


def test_without_evidence_none_is_mentioned(endpoint, completion):
    endpoint.respond = lambda body: completion("<answer>Paris</answer>")
    ask(EndpointExpert(endpoint.url, "m"), request("answer"))
    assert endpoint.requests[0][2]["messages"][1]["content"] == f"Question: {TASK.question}"


@pytest.mark.parametrize(
    ("role", "content", "expected"),
    [
        ("answer", "<answer>Lyon</answer> no, <answer>Paris</answer>", "Paris"),
        ("answer", "I think\nParis\n\n", "Paris"),
        ("answer", "<think>is it <answer>Lyon</answer>?</think>Paris", "Paris"),
        ("answer", "<answer>\n</answer>", ""),
        ("answer", "  \n", ""),
        ("enhance_reasoning", "print(1)", "print(1)"),
        ("enhance_reasoning", "```\nprint(1)\n```", "print(1)"),
        ("enhance_reasoning", "```text\n1\n```\n```Python\nif 1:\n    print(1)\n```", "if 1:\n    print(1)"),
        ("search", "\n`a b`\nbecause", "a b"),
        ("search", "", ""),
    ],
)
def test_reading_of_unusual_replies(role, content, expected):
    assert extract(role, content) == expected


def test_errors_of_the_server_are_retried_then_failed(endpoint):
    endpoint.respond = lambda body: (500, "application/json", b'{"error": {"message": "broken"}}')
    (reply,) = ask(EndpointExpert(endpoint.url, "m", timeout_s=20, max_retries=1), request("answer"))
    assert (reply.status, reply.text, reply.input_tokens, reply.output_tokens) == (CallStatus.FAILED, "", 0, 0)
    assert len(endpoint.requests) == 2 and reply.latency_s > 0


def test_a_retry_can_succeed(endpoint, completion):
    answers = iter([(503, "text/plain", b"busy"), completion("<answer>Paris</answer>")])
    endpoint.respond = lambda body: next(answers)
    (reply,) = ask(EndpointExpert(endpoint.url, "m", timeout_s=20, max_retries=1), request("answer"))
    assert (reply.status, reply.text, len(endpoint.requests)) == (CallStatus.OK, "Paris", 2)


def test_a_refused_request_is_not_retried(endpoint):
    endpoint.respond = lambda body: (401, "application/json", b'{"error": {"message": "who are you"}}')
    (reply,) = ask(EndpointExpert(endpoint.url, "m", max_retries=5), request("answer"))
    assert (reply.status, len(endpoint.requests)) == (CallStatus.FAILED, 1)


def test_a_hang_ends_in_a_timeout_retries_included(endpoint, completion):
    def hang(body):
        endpoint.release.wait(20)
        return completion("too late")

    endpoint.respond = hang
    (reply,) = ask(EndpointExpert(endpoint.url, "m", timeout_s=0.3, max_retries=5), request("answer"))
    assert (reply.status, reply.text) == (CallStatus.TIMEOUT, "")
    assert 0.25 <= reply.latency_s < 5


@pytest.mark.parametrize(
    "garbage",
    [
        (200, "application/json", b"not json"),
        (200, "application/json", b"\xff\xfe{"),
        (200, "application/json", b""),
        (200, "text/html", b"<html>login</html>"),
        (200, "application/json", b"[]"),
        (200, "application/json", b'{"choices": []}'),
        (200, "application/json", b'{"choices": [7], "usage": 3}'),
        (200, "application/json", b'{"choices": [{"message": null}]}'),
        (200, "application/json", b"[" * 100_000),
    ],
)
def test_garbage_is_a_failed_reply(endpoint, garbage):
    endpoint.respond = lambda body: garbage
    (reply,) = ask(EndpointExpert(endpoint.url, "m", timeout_s=20, max_retries=0), request("answer"))
    assert (reply.status, reply.reason, reply.text) == (CallStatus.FAILED, Reason.UNREADABLE, "")
    assert reply.is_estimated and reply.input_tokens > 0 == reply.output_tokens  # it was asked, and may bill it


def test_an_empty_reply_is_failed_and_charged(endpoint, completion):
    endpoint.respond = lambda body: completion(None)
    expert = EndpointExpert(endpoint.url, "m")
    result = asyncio.run(Answer(lambda model: expert).run({"model": "expert-1"}, ToolContext(INSTANCE, 0, Evidence())))
    assert (result.status, result.answer) == (CallStatus.FAILED, None)
    assert result.receipt.cost_usd == pytest.approx((70 * 2.0 + 11 * 8.0) / 1e6)


def test_no_server_at_all_is_a_failed_reply(endpoint):
    url = endpoint.url
    endpoint.shutdown()
    endpoint.server_close()
    (reply,) = ask(EndpointExpert(url, "m", timeout_s=20, max_retries=0), request("answer"))
    assert reply.status == CallStatus.FAILED


def test_counts_that_are_none_are_estimated(endpoint, completion):
    endpoint.respond = lambda body: completion("Paris", usage={"prompt_tokens": "7", "completion_tokens": -2})
    (reply,) = ask(EndpointExpert(endpoint.url, "m"), request("answer"))
    sent = sum(len(message["content"]) for message in endpoint.requests[0][2]["messages"])
    assert (reply.text, reply.output_tokens, reply.is_estimated) == ("Paris", 2, True)  # 5 bytes
    assert sent / 4 <= reply.input_tokens <= sent / 4 + 2


def test_one_expert_serves_one_event_loop_after_another(endpoint, completion):
    endpoint.respond = lambda body: completion("Paris")
    expert = EndpointExpert(endpoint.url, "m", max_retries=0)
    for _ in range(3):
        assert asyncio.run(expert.reply(request("answer"))).status == CallStatus.OK


def test_a_client_made_elsewhere_is_used(endpoint, completion):
    endpoint.respond = lambda body: completion("Paris, not theirs")

    async def go():
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key="theirs") as client:
            return await EndpointExpert(client, "m").reply(request("answer"))

    assert asyncio.run(go()).text == "Paris, not [key]"  # its key is struck out too
    assert endpoint.requests[0][1]["authorization"] == "Bearer theirs"


def test_what_no_file_and_no_request_can_hold_comes_as_a_question_mark(endpoint, completion):
    endpoint.respond = lambda body: completion("<answer>Par\ud800is</answer>")  # as JSON escapes can spell it
    assert ask(EndpointExpert(endpoint.url, "m"), request("answer"))[0].text == "Par?is"


def test_an_endpoint_is_told_the_limit_by_the_name_that_it_knows(endpoint, completion):
    endpoint.respond = lambda body: completion("Paris")
    ask(EndpointExpert(endpoint.url, "m", max_output_tokens=9, limit_field="max_tokens"), request("answer"))
    body = endpoint.requests[0][2]
    assert body["max_tokens"] == 9 and "max_completion_tokens" not in body


def test_mistakes_are_named(monkeypatch):
    monkeypatch.delenv("MISSING_KEY", raising=False)
    with pytest.raises(ValueError, match="'MISSING_KEY' is not set"):
        EndpointExpert("http://127.0.0.1:1/v1", "m", "MISSING_KEY")
    with pytest.raises(ValueError, match="timeout_s 0"):
        EndpointExpert("http://127.0.0.1:1/v1", "m", timeout_s=0)


def test_a_file_says_which_models_have_an_endpoint(endpoint, tmp_path, completion):
    endpoint.respond = lambda body: completion("<answer>Paris</answer>")
    path = tmp_path / "endpoints.json"
    path.write_text(json.dumps({"gpt-5": {"endpoint": endpoint.url, "model": "served"}}))
    experts = load_endpoints(str(path), MODELS)
    assert list(experts) == ["gpt-5"]
    (reply,) = ask(experts["gpt-5"], request("answer"))
    assert reply.text == "Paris" and endpoint.requests[0][2]["model"] == "served"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no JSON object"),
        ('{"gpt-6": {}}', "'gpt-6' in .* is not a model of the run: choose one of .*'gpt-5'"),
        ('{"gpt-5": {"model": "m"}}', "the entry of 'gpt-5' .* is not understood: .*endpoint"),
        ('{"gpt-5": {"endpoint": "http://x/v1", "model": "m", "key": "k"}}', "is not understood: .*'key'"),
        ('{"gpt-5": "http://x/v1"}', "the entry of 'gpt-5' .* is not understood"),
        ('{"gpt-5": {"endpoint": "http://x/v1", "model": "m", "api_key_variable": "NO_SUCH"}}', "'NO_SUCH' is not set"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(text, told, tmp_path):
    path = tmp_path / "endpoints.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        load_endpoints(str(path), MODELS)


def test_a_file_that_is_missing_is_named():
    with pytest.raises(ValueError, match="/nowhere.json cannot be read"):
        load_endpoints("/nowhere.json", MODELS)
