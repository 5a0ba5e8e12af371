"""The three tools on experts that say what they are told to, with a real index and a real sandbox."""

import asyncio

import pytest

from orchestra_jax.data.records import Document, Instance, Offer, Preference, Task
from orchestra_jax.experts.delegation import (
    NUM_SEARCH_RESULTS,
    Answer,
    EnhanceReasoning,
    Search,
    is_evidence_present,
)
from orchestra_jax.experts.expert import ExpertReply
from orchestra_jax.tools.sandbox.python_sandbox import PythonSandbox
from orchestra_jax.tools.search.local_search import LocalSearch
from orchestra_jax.tools.tool import Evidence, ToolContext
from orchestra_jax.types import CallStatus

OFFER = Offer("expert-2", "gpt-5-mini", False, 3.0, 12.0, 5.0)
FACT = Task("t/0", "geography", "two_hop", "Which?", "x", "search", gold_document_ids=("a", "b"))
SUM = Task("t/1", "arithmetic", "small", "3 + 4?", "7", "enhance_reasoning")
NO_EVIDENCE = Evidence()
DOCUMENTS = [
    Document(name, f"title {name}", f"text of {name} {word}")
    for name, word in zip("abcd", ("cat", "cat", "dog", "dog"))
]


class Parrot:
    """An expert that says the same to everybody and remembers what it was asked."""

    def __init__(self, text, status=CallStatus.OK):
        self.text, self.status, self.requests = text, status, []

    async def reply(self, request):
        self.requests.append(request)
        return ExpertReply(self.text, 1000, 500, 4.0, self.status)


def context(task, evidence=NO_EVIDENCE):
    instance = Instance("i", task, Preference("any", "Any.", {"outcome": 1.0}), (OFFER,), seed=0)
    return ToolContext(instance, 3, evidence)


def run(tool, call_context, alias="expert-2"):
    return asyncio.run(tool.run({"model": alias}, call_context))


@pytest.fixture(scope="module")
def sandbox():
    with PythonSandbox(timeout_s=5.0) as made:
        yield made


def test_the_receipt_charges_the_experts_tokens_at_the_offers_prices():
    receipt = run(Answer(lambda model: Parrot("x")), context(FACT)).receipt
    assert receipt.cost_usd == pytest.approx((1000 * 3.0 + 500 * 12.0) / 1e6)
    assert (receipt.tool, receipt.alias, receipt.model, receipt.service_s) == ("answer", "expert-2", "gpt-5-mini", 4.0)


def test_the_model_behind_the_alias_is_asked_with_the_whole_context():
    asked, expert = [], Parrot("x")
    evidence = Evidence(("a", "b"), (), "found")
    run(Answer(lambda model: asked.append(model) or expert), context(FACT, evidence))
    (request,) = expert.requests
    assert asked == ["gpt-5-mini"]
    assert (request.role, request.rollout_index, request.evidence) == ("answer", 3, evidence)
    assert request.is_evidence_present


@pytest.mark.parametrize("tool", [Search, Answer])
def test_an_expert_that_is_not_on_offer_is_refused_and_not_asked(tool):
    expert = Parrot("x")
    arguments = [lambda model: expert, LocalSearch(DOCUMENTS)][: 2 if tool is Search else 1]
    result = run(tool(*arguments), context(FACT), alias="expert-1")
    assert (result.status, result.answer, expert.requests) == (CallStatus.REFUSED, None, [])
    assert (result.receipt.cost_usd, result.receipt.service_s, result.receipt.status) == (0.0, 0.0, CallStatus.REFUSED)
    assert "expert-1" in result.text


@pytest.mark.parametrize("status", [CallStatus.FAILED, CallStatus.TIMEOUT])
def test_an_expert_that_fails_is_charged_and_brings_nothing(status, sandbox):
    for tool in (
        Search(lambda model: Parrot("cat", status), LocalSearch(DOCUMENTS)),
        EnhanceReasoning(lambda model: Parrot("print(7)", status), sandbox),
        Answer(lambda model: Parrot("x", status)),
    ):
        result = run(tool, context(FACT))
        assert (result.status, result.evidence, result.answer) == (status, Evidence(), None)
        assert result.receipt.cost_usd > 0 and result.receipt.status == status


def test_search_returns_the_documents_that_the_query_finds():
    result = run(Search(lambda model: Parrot("cat"), LocalSearch(DOCUMENTS)), context(FACT))
    assert set(result.evidence.document_ids) == {"a", "b"} and len(result.evidence.document_ids) <= NUM_SEARCH_RESULTS
    assert "text of a" in result.text and "text of b" in result.evidence.text
    nothing = run(Search(lambda model: Parrot("zebra"), LocalSearch(DOCUMENTS)), context(FACT))
    assert (nothing.evidence, nothing.summary, nothing.status) == (Evidence(), "no documents", CallStatus.OK)


def test_enhance_reasoning_runs_the_program(sandbox):
    result = run(EnhanceReasoning(lambda model: Parrot("print(3 + 4)"), sandbox), context(SUM))
    assert (result.text.strip(), result.evidence.printed, result.summary) == ("7", ("7",), "program printed")
    failed = run(EnhanceReasoning(lambda model: Parrot("print(3 +"), sandbox), context(SUM))
    assert (failed.evidence, failed.summary, failed.status) == (Evidence(), "program failed", CallStatus.OK)
    assert "SyntaxError" in failed.text
    for program in ("", "x = 3 + 4", "print()"):
        silent = run(EnhanceReasoning(lambda model, program=program: Parrot(program), sandbox), context(SUM))
        assert (silent.evidence, silent.summary, silent.status) == (Evidence(), "no output", CallStatus.OK)


def test_what_a_program_has_printed_before_is_looked_up_without_a_thread(sandbox, monkeypatch):
    tool = EnhanceReasoning(lambda model: Parrot("print(5 + 6)"), sandbox)
    assert sandbox.remembered("print(5 + 6)") is None
    first = run(tool, context(SUM))
    monkeypatch.setattr(asyncio, "to_thread", None)  # whoever calls it now fails
    again = run(tool, context(SUM))
    assert (first.text.strip(), again.text, again.evidence) == ("11", first.text, first.evidence)
    with pytest.raises(TypeError):
        run(EnhanceReasoning(lambda model: Parrot("print(5 + 7)"), sandbox), context(SUM))


def test_only_answer_ends_the_episode(sandbox):
    assert run(Answer(lambda model: Parrot("x")), context(FACT)).answer == "x"
    assert run(Search(lambda model: Parrot("cat"), LocalSearch(DOCUMENTS)), context(FACT)).answer is None
    assert run(EnhanceReasoning(lambda model: Parrot("print(7)"), sandbox), context(SUM)).answer is None


def test_what_counts_as_evidence():
    fact, computation = context(FACT).instance, context(SUM).instance
    assert not is_evidence_present(fact, Evidence(("a",)))
    assert is_evidence_present(fact, Evidence(("c", "b", "a")))
    assert not is_evidence_present(fact, Evidence((), ("x",)))  # printing the answer is no document
    assert is_evidence_present(computation, Evidence((), ("3", "7")))  # one of the programs is enough
    assert not is_evidence_present(computation, Evidence((), ("3", "4")))
    assert not is_evidence_present(computation, Evidence())
