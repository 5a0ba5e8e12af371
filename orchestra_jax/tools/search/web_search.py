"""Web search through a provider's HTTP API: Tavily, or another one by configuration.

A provider is described, not programmed: where to post the query, how the key goes along, and where the results stand in
the reply. Prices are per call (Tavily's as the ToolOrchestra release has it).
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from typing import TYPE_CHECKING

from orchestra_jax.data.records import Document
from orchestra_jax.tools.budget import Account, Quote
from orchestra_jax.tools.credentials import clean_text
from orchestra_jax.tools.ledger import make_receipt
from orchestra_jax.tools.limits import read_retry_after
from orchestra_jax.tools.tool import Evidence, ToolContext, ToolResult
from orchestra_jax.types import CallStatus, Reason

if TYPE_CHECKING:
    import httpx2

MAX_QUERY_CHARS = 390  # Tavily refuses more than 400


@dataclasses.dataclass(frozen=True)
class WebProvider:
    """One POST of JSON and one list of results. Names of fields are the provider's own."""

    url: str
    api_key_variable: str
    key_header: str
    key_prefix: str
    query_field: str
    count_field: str
    fixed_fields: tuple[tuple[str, object], ...]
    results_field: str
    title_field: str
    url_field: str
    text_field: str
    cost_usd_per_call: float


PROVIDERS = {
    "tavily": WebProvider(
        "https://api.tavily.com/search", "TAVILY_API_KEY", "Authorization", "Bearer ", "query", "max_results",
        (("search_depth", "advanced"),), "results", "title", "url", "content", cost_usd_per_call=0.01,
    ),
    "serper": WebProvider(
        "https://google.serper.dev/search", "SERPER_API_KEY", "X-API-KEY", "", "q", "num",
        (), "organic", "title", "link", "snippet", cost_usd_per_call=0.001,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class WebFailure:
    reason: Reason
    retry_after_s: float = 0.0


class WebSearch:
    """A `Tool` (tool.py). `is_offline`: nobody will be asked (all is replayed), so no key is looked for.

    ValueError if the variable that holds the provider's key is not set.
    """

    name = "web_search"
    description = "Search the web."
    parameters_schema = {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "What to look for.", "maxLength": MAX_QUERY_CHARS}},
        "required": ["query"],
        "additionalProperties": False,
    }

    def __init__(
        self,
        provider: WebProvider,
        account: Account,
        num_results: int = 5,
        timeout_s: float = 30.0,
        is_offline: bool = False,
    ):
        self._key = "" if is_offline else os.environ.get(provider.api_key_variable, "")
        if not self._key and not is_offline:
            raise ValueError(f"the environment variable {provider.api_key_variable!r} is not set: put the key into it")
        self._provider, self._account = provider, account
        self._num_results, self._timeout_s = num_results, timeout_s
        self._client: httpx2.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def quote(self, arguments: dict[str, object], context: ToolContext) -> Quote:
        return Quote(self._provider.cost_usd_per_call)

    async def run(self, arguments: dict[str, object], context: ToolContext) -> ToolResult:
        start_s = time.monotonic()
        found = await self.find(str(arguments["query"]))
        is_failed = isinstance(found, WebFailure)
        status = CallStatus.OK
        if is_failed:
            status = CallStatus.TIMEOUT if found.reason == Reason.DEADLINE else CallStatus.FAILED
        is_free = is_failed and found.reason in (Reason.RATE_LIMITED, Reason.SERVER_ERROR, Reason.SPEND_CAP)
        receipt = make_receipt(
            self.name,
            service_s=time.monotonic() - start_s,
            fixed_cost_usd=0.0 if is_free else self._provider.cost_usd_per_call,
            status=status,
            reason=found.reason if is_failed else Reason.NONE,
        )
        if is_failed:
            told = f"web_search failed: {found.reason}"
            return ToolResult(told, str(status), receipt, status, retry_after_s=found.retry_after_s)
        if not found:
            return ToolResult("nothing found", "nothing found", receipt)
        text = "\n\n".join(f"{document.title}\n{document.document_id}\n{document.text}" for document in found)
        evidence = Evidence(document_ids=tuple(document.document_id for document in found), text=text)
        return ToolResult(text, "pages found", receipt, evidence=evidence)

    async def find(self, query: str) -> list[Document] | WebFailure:
        """Pages with their URLs as ids, best first, keys struck out; or why there are none. Counts the real money."""
        cost_usd = self._provider.cost_usd_per_call
        if not self._account.reserve(cost_usd):
            return WebFailure(Reason.SPEND_CAP)
        paid_usd = cost_usd
        try:
            found = await self._post(query[:MAX_QUERY_CHARS])
            if isinstance(found, WebFailure) and found.reason in (Reason.RATE_LIMITED, Reason.SERVER_ERROR):
                paid_usd = 0.0
            return found
        finally:
            self._account.settle(cost_usd, paid_usd)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _post(self, query: str) -> list[Document] | WebFailure:
        import httpx2

        provider = self._provider
        body = {provider.query_field: query, provider.count_field: self._num_results, **dict(provider.fixed_fields)}
        headers = {provider.key_header: provider.key_prefix + self._key}
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await self._connect().post(provider.url, json=body, headers=headers)
        except (TimeoutError, httpx2.TimeoutException):
            return WebFailure(Reason.DEADLINE)
        except httpx2.HTTPError:
            return WebFailure(Reason.NO_CONNECTION)
        if reply.status_code == 429:
            return WebFailure(Reason.RATE_LIMITED, read_retry_after(reply.headers))
        if reply.status_code != 200:
            return WebFailure(Reason.SERVER_ERROR)
        try:
            results = reply.json()[provider.results_field]
            return [self._document(each) for each in results[: self._num_results]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # no JSON, or of another shape
            return WebFailure(Reason.UNREADABLE)

    def _document(self, result: dict[str, object]) -> Document:
        provider = self._provider
        fields = (result[provider.url_field], result.get(provider.title_field), result.get(provider.text_field))
        return Document(*(clean_text(str(field or ""), self._key) for field in fields))

    def _connect(self) -> httpx2.AsyncClient:
        """A client for the loop that runs now."""
        import httpx2

        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            self._client, self._loop = httpx2.AsyncClient(timeout=None), loop
        return self._client
