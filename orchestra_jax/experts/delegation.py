"""The three tools of the ToolOrchestra release, each of which hands a role to an expert.

    search(model)             the expert writes a query; BM25 over the corpus answers it
    enhance_reasoning(model)  the expert writes a Python program; the sandbox runs it
    answer(model)             the expert answers; the episode ends

Each has one short argument, the alias of the expert, so that a small policy has nothing to copy. The receipt charges
the expert's tokens at the prices of the instance's offer, and the expert's seconds. Where these are measured, the
tool's own are added, in the same parts: service is the search (the embedding of its query included, however often it
was asked for) or the program, queue the wait for a thread or a process of the sandbox. They are recorded, so that a
replay repeats them. On the virtual clock of a simulated expert the world's seconds are all there are.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from orchestra_jax.data.records import Document, Instance, Offer
from orchestra_jax.experts.expert import BoundedExpert, Expert, ExpertReply, ExpertRequest, receipt_of
from orchestra_jax.rewards.outcome import holds_evidence
from orchestra_jax.tools.budget import Quote
from orchestra_jax.tools.ledger import make_receipt, token_cost_usd
from orchestra_jax.tools.recording import Store
from orchestra_jax.tools.sandbox.python_sandbox import ProgramStatus, PythonSandbox
from orchestra_jax.tools.search.embedding import EmbeddingFailure
from orchestra_jax.tools.tool import Evidence, ToolContext, ToolResult
from orchestra_jax.types import CallStatus, Reason, Receipt

Value = TypeVar("Value")
NUM_SEARCH_RESULTS = 3
MAX_ALIAS_CHARS = 40
MAX_QUERY_CHARS = 1_000  # of what a writer wrote
PARAMETERS_SCHEMA = {
    "type": "object",
    "properties": {"model": {"type": "string", "description": "The alias of the expert that does the work."}},
    "required": ["model"],
    "additionalProperties": False,
}


def is_evidence_present(instance: Instance, evidence: Evidence) -> bool:
    """Whether the gold documents were all retrieved, or one of the programs printed the gold answer."""
    task = instance.task
    if task.gold_document_ids:
        return holds_evidence(task, evidence.document_ids, "")
    return any(holds_evidence(task, (), printed) for printed in evidence.printed)


class _Stopwatch:
    """Started when it is made, for work that may wait before it begins: in a thread, say."""

    def __init__(self):
        self._start_s = time.monotonic()
        self.work_s = 0.0

    @property
    def total_s(self) -> float:
        return time.monotonic() - self._start_s

    def run(self, work: Callable[[], Value]) -> Value:
        begin_s = time.monotonic()
        try:
            return work()
        finally:
            self.work_s = time.monotonic() - begin_s


class _Delegation:
    """Asks the expert on offer under the alias, and hands its reply to `_use`. `store` keeps the tool's own seconds."""

    name: str
    description: str
    parameters_schema = PARAMETERS_SCHEMA

    def __init__(self, experts: Callable[[str], Expert], store: Store | None = None):
        self._experts, self._store = experts, store

    def quote(self, arguments: dict[str, object], context: ToolContext) -> Quote:
        """What the expert's own bound costs at the offer's prices; 0 for one that has no bound."""
        offer = self._offer(arguments, context)
        expert = self._experts(offer.model) if offer else None
        if not isinstance(expert, BoundedExpert):
            return Quote(0.0)
        bound = expert.bound(self._request(offer, context))
        prices = offer.input_usd_per_million_tokens, offer.output_usd_per_million_tokens
        return Quote(token_cost_usd(bound.input_tokens, bound.output_tokens, *prices, 0.0), bound.latency_s)

    async def run(self, arguments: dict[str, object], context: ToolContext) -> ToolResult:
        offer = self._offer(arguments, context)
        if offer is None:
            return self._not_on_offer(str(arguments["model"]))
        request = self._request(offer, context)
        if context.allowance is not None:
            may_retry = functools.partial(self._can_pay_again, arguments, context)
            request = dataclasses.replace(request, may_retry=may_retry)
        reply = await self._experts(offer.model).reply(request)
        prices = offer.input_usd_per_million_tokens, offer.output_usd_per_million_tokens
        receipt = receipt_of(reply, self.name, offer.model, prices, offer.alias)
        if reply.status != CallStatus.OK:
            told = f"{offer.alias} gave no reply" + (f": {reply.reason}" if reply.reason else "")
            return ToolResult(told, str(reply.status), receipt, reply.status)
        return await self._use(reply, receipt, context)

    def _can_pay_again(self, arguments: dict[str, object], context: ToolContext) -> bool:
        return not context.allowance.admit(self.quote(arguments, context))

    def _offer(self, arguments: dict[str, object], context: ToolContext) -> Offer | None:
        """The offer under the alias, if it is one for this role."""
        offer = context.instance.offer(str(arguments["model"]))
        return offer if offer and self.name in offer.roles else None

    def _request(self, offer: Offer, context: ToolContext) -> ExpertRequest:
        has_evidence = is_evidence_present(context.instance, context.evidence)
        return ExpertRequest(self.name, context.instance, offer, context.evidence, has_evidence, context.rollout_index)

    def _not_on_offer(self, alias: str) -> ToolResult:
        alias = alias[:MAX_ALIAS_CHARS]  # the policy's own words
        receipt = make_receipt(
            self.name, service_s=0.0, alias=alias, status=CallStatus.REFUSED, attempt=0, reason=Reason.NOT_ON_OFFER
        )
        return ToolResult(f"{alias!r} is not on offer", "not on offer", receipt, CallStatus.REFUSED)

    def _with_work(
        self, receipt: Receipt, reply: ExpertReply, context: ToolContext, service_s: float, total_s: float
    ) -> Receipt:
        """The receipt with the tool's own seconds: `service_s` of the work, and what of `total_s` it waited before."""
        if not reply.is_measured:
            return receipt
        queue_s = max(total_s - service_s, 0.0)
        if self._store is not None:
            at = [context.instance.seed, context.rollout_index, context.call_number, context.attempt]
            asked = {"seconds_of": self.name, "text": reply.text, "at": at}
            held = self._store.load(asked)
            if held is not None:
                service_s, queue_s = held["service_s"], 0.0
            elif not self._store.is_replay:
                self._store.save(asked, {"service_s": service_s})
        times = {"service_s": receipt.service_s + service_s, "queue_s": receipt.queue_s + queue_s}
        return dataclasses.replace(receipt, **times)

    async def _use(self, reply: ExpertReply, receipt: Receipt, context: ToolContext) -> ToolResult:
        raise NotImplementedError


class SearchIndex(Protocol):
    """Documents that can be searched: LocalSearch, or DocumentIndex on disk, which may ask an endpoint first."""

    asks_outside: bool

    def query_cost_usd(self, query: str) -> float: ...

    def search(self, query: str, num_results: int) -> list[tuple[Document, float]]: ...


class Search(_Delegation):
    name = "search"
    description = "Look for documents: the expert writes the query."

    def __init__(self, experts: Callable[[str], Expert], index: SearchIndex, store: Store | None = None):
        super().__init__(experts, store)
        self._index = index

    def quote(self, arguments: dict[str, object], context: ToolContext) -> Quote:
        """The expert's, and the most that embedding its query can cost: no character is longer than this one."""
        quote = super().quote(arguments, context)
        embedding_usd = self._index.query_cost_usd("\U0010ffff" * MAX_QUERY_CHARS)
        return dataclasses.replace(quote, cost_usd=quote.cost_usd + embedding_usd)

    async def _use(self, reply: ExpertReply, receipt: Receipt, context: ToolContext) -> ToolResult:
        query = reply.text[:MAX_QUERY_CHARS]
        cost_usd = self._index.query_cost_usd(query)
        if cost_usd:
            receipt = _with_embedding(receipt, cost_usd)
        watch, found, failure = _Stopwatch(), [], Reason.NONE
        find = functools.partial(self._index.search, query, NUM_SEARCH_RESULTS)
        try:
            found = await asyncio.to_thread(watch.run, find) if self._index.asks_outside else watch.run(find)
        except EmbeddingFailure as error:
            failure = error.reason
        receipt = self._with_work(receipt, reply, context, watch.work_s, watch.total_s)
        if failure:
            status = CallStatus.TIMEOUT if failure == Reason.DEADLINE else CallStatus.FAILED
            receipt = dataclasses.replace(receipt, status=status, reason=failure)
            return ToolResult(f"search failed: {failure}", "search failed", receipt, status)
        documents = [document for document, _ in found]
        if not documents:
            return ToolResult("no documents found", "no documents", receipt)
        text = "\n\n".join(f"{document.title}\n{document.text}" for document in documents)
        evidence = Evidence(document_ids=tuple(document.document_id for document in documents), text=text)
        return ToolResult(text, "documents found", receipt, evidence=evidence)


def _with_embedding(receipt: Receipt, cost_usd: float) -> Receipt:
    """The receipt with the query's embedding on it, at the most that it can have cost."""
    return dataclasses.replace(
        receipt,
        fixed_cost_usd=receipt.fixed_cost_usd + cost_usd,
        cost_usd=receipt.cost_usd + cost_usd,
        is_estimated=True,
    )


class EnhanceReasoning(_Delegation):
    name = "enhance_reasoning"
    description = "Compute: the expert writes a Python program, which is run."

    def __init__(self, experts: Callable[[str], Expert], sandbox: PythonSandbox, store: Store | None = None):
        super().__init__(experts, store)
        self._sandbox = sandbox

    async def _use(self, reply: ExpertReply, receipt: Receipt, context: ToolContext) -> ToolResult:
        watch = _Stopwatch()
        # A thread takes longer to start than what is remembered to be looked up.
        result = self._sandbox.remembered(reply.text) or await asyncio.to_thread(self._sandbox.run, reply.text)
        receipt = self._with_work(receipt, reply, context, result.service_s, watch.total_s)
        if result.status != ProgramStatus.OK:
            return ToolResult(f"the program failed: {result.stderr_line}", "program failed", receipt)
        printed = result.stdout.strip()
        if not printed:
            return ToolResult("the program printed nothing", "no output", receipt)
        evidence = Evidence(printed=(printed,), text=printed)
        return ToolResult(result.stdout, "program printed", receipt, evidence=evidence)


class Answer(_Delegation):
    name = "answer"
    description = "Answer the question: the expert gives the answer and the episode ends."

    async def _use(self, reply: ExpertReply, receipt: Receipt, context: ToolContext) -> ToolResult:
        return ToolResult(reply.text, "answered", receipt, answer=reply.text)
