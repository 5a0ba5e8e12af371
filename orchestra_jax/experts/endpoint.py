"""An expert behind any OpenAI-compatible endpoint: a vendor's API, or a server of one's own (SGLang, vLLM).

What goes wrong outside (no connection, a status of 4xx or 5xx, a hang, an empty or unreadable reply) is a typed
ExpertReply and never an exception. Prices of the episode are not known here: the instance's offer has them. The prices
below are those of the real bill, which the run's account counts.

What an attempt is charged: the endpoint's own counts where they are possible (no more input tokens than bytes were
sent, no more output tokens than were asked for); else an estimate of one token for four bytes, marked as such. An
error status costs nothing; a hang, a cut connection or an unreadable reply costs the input and what had come by then.
The account is stricter: where the counts are not known it books the most that the attempt can have cost.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from orchestra_jax.experts.chat_completion import Failure, Partial, ask, estimate_tokens
from orchestra_jax.experts.expert import ExpertBound, ExpertReply, ExpertRequest, always
from orchestra_jax.experts.roles import extract, render_messages
from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.credentials import clean_text, public_url, read_key
from orchestra_jax.tools.ledger import token_cost_usd
from orchestra_jax.tools.limits import Attempt, Limiter, Limits, Outcome
from orchestra_jax.types import CallStatus, Reason

if TYPE_CHECKING:
    import openai

TEMPLATE_TOKENS = 4_096  # the most that a server's own chat template adds to what was sent

_logger = logging.getLogger(__name__)


class EndpointExpert:
    """An `Expert` (expert.py) whose replies have a bound.

    Args:
      endpoint: the base URL, such as "http://127.0.0.1:30000/v1", or an openai.AsyncOpenAI made elsewhere, which then
        brings its own key.
      model: the name under which the endpoint knows the model.
      api_key_variable: the environment variable that holds the key; "" for a server that wants none.
      timeout_s: of one reply, queue, retries and waits included.
      max_output_tokens: of one reply, thinking included.
      limit_field: under which name the endpoint is told so; some know "max_tokens" alone.
      max_retries: how often to ask again after a lost connection, a 408, 409, 429 or 5xx, or an unreadable reply.
      first_wait_s: before the second attempt, doubled for each further one, with jitter.
      is_streaming: read the reply as it is written; a reply that is cut is then charged for what had come.
      max_concurrent: requests under way at once, 0 for no limit.
      requests_per_s: attempts a second, evenly spaced, 0 for no limit.
      input_usd_per_million_tokens, output_usd_per_million_tokens: the real bill; 0 for a server of one's own.

    Raises:
      ValueError: the variable is not set, a key stands in the URL, or a limit or price is out of range.
    """

    def __init__(
        self,
        endpoint: openai.AsyncOpenAI | str,
        model: str,
        api_key_variable: str = "",
        timeout_s: float = 120.0,
        max_output_tokens: int = 4096,
        limit_field: str = "max_completion_tokens",
        max_retries: int = 2,
        first_wait_s: float = 0.5,
        is_streaming: bool = False,
        max_concurrent: int = 0,
        requests_per_s: float = 0.0,
        input_usd_per_million_tokens: float = 0.0,
        output_usd_per_million_tokens: float = 0.0,
    ):
        import openai  # takes a second or more: here, and not within the first reply's deadline

        if timeout_s <= 0 or max_output_tokens < 1 or max_retries < 0:
            raise ValueError(
                f"timeout_s {timeout_s} must be positive, max_output_tokens {max_output_tokens} at least 1 and "
                f"max_retries {max_retries} at least 0"
            )
        self._where = public_url(endpoint) if isinstance(endpoint, str) else "the given client"
        self._endpoint, self.model, self._is_own_client = endpoint, model, not isinstance(endpoint, openai.AsyncOpenAI)
        self._api_key = read_key(api_key_variable, self._where) if self._is_own_client else str(endpoint.api_key)
        self.has_key = bool(self._api_key)
        self.max_output_tokens, self._is_streaming = max_output_tokens, is_streaming
        self._limit_field = limit_field
        self._limiter = Limiter(Limits(timeout_s, max_concurrent, requests_per_s, max_retries + 1, first_wait_s))
        self.usd_per_million_tokens = input_usd_per_million_tokens, output_usd_per_million_tokens  # the real bill
        token_cost_usd(1, 1, *self.usd_per_million_tokens, 0.0)  # refuses prices that are none
        self.account = Account()
        self._client: openai.AsyncOpenAI | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_paid(self) -> bool:
        return any(price > 0 for price in self.usd_per_million_tokens)

    @property
    def timeout_s(self) -> float:
        return self._limiter.limits.timeout_s

    def bound(self, request: ExpertRequest) -> ExpertBound:
        return self.bound_of(render_messages(request))

    def bound_of(self, messages: Sequence[Mapping[str, str]]) -> ExpertBound:
        """A token has at least one byte, so bytes bound the input tokens; the seconds are not known beforehand."""
        return ExpertBound(self._most_input_tokens(messages), self.max_output_tokens, 0.0)

    async def reply(self, request: ExpertRequest) -> ExpertReply:
        """Asks for what the role wants. A reply without it has failed, and is charged."""
        reply = await self.complete(render_messages(request), request.may_retry)
        if reply.status != CallStatus.OK:
            return reply
        text = extract(request.role, reply.text)
        if text:
            return dataclasses.replace(reply, text=text)
        return dataclasses.replace(reply, text="", status=CallStatus.FAILED, reason=Reason.UNREADABLE)

    async def complete(
        self, messages: Sequence[Mapping[str, str]], may_retry: Callable[[], bool] = always
    ) -> ExpertReply:
        """The reply to chat messages as it comes, keys struck out. `may_retry`: asked behind an attempt that cost."""
        partial, attempts = Partial(), itertools.count(1)

        async def attempt() -> Attempt[ExpertReply]:
            partial.clear()
            made = await self._attempt(messages, partial)
            is_charged = made.value.input_tokens + made.value.output_tokens > 0
            is_another = made.is_retryable and next(attempts) < self._limiter.limits.max_attempts
            return dataclasses.replace(made, is_retryable=is_another and (not is_charged or may_retry()))

        outcome = await self._limiter.run(attempt)
        if outcome.is_late:
            _logger.warning("%s at %s gave no reply in time", self.model, self._where)
        return _joined(outcome, _late_reply(messages, partial, outcome))

    async def close(self) -> None:
        """Gives back the connections of a client that was made here."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def _attempt(self, messages: Sequence[Mapping[str, str]], partial: Partial) -> Attempt[ExpertReply]:
        prices = self.usd_per_million_tokens
        most_usd = token_cost_usd(self._most_input_tokens(messages), self.max_output_tokens, *prices, 0.0)
        if not self.account.reserve(most_usd):
            _logger.warning("%s at %s is not asked: the run's spending cap is reached", self.model, self._where)
            return Attempt(ExpertReply("", 0, 0, 0.0, CallStatus.FAILED, Reason.SPEND_CAP), False)
        paid_usd = most_usd  # should this be cancelled: nobody knows what the endpoint did by then
        try:
            made = await self._ask(messages, partial)
            if not made.value.is_estimated:
                paid_usd = token_cost_usd(made.value.input_tokens, made.value.output_tokens, *prices, 0.0)
            return made
        finally:
            self.account.settle(most_usd, paid_usd)

    async def _ask(self, messages: Sequence[Mapping[str, str]], partial: Partial) -> Attempt[ExpertReply]:
        arguments = {
            "model": self.model,
            "messages": list(messages),
            self._limit_field: self.max_output_tokens,
        }
        came = await ask(self._connect(), arguments, self._is_streaming, partial)
        if isinstance(came, Failure):
            told = self._clean(came.told)
            _logger.warning("%s at %s failed: %s (%s)", self.model, self._where, came.reason, told)
            charged = (_input_estimate(messages), _output_estimate(partial)) if came.is_charged else (0, 0)
            reply = ExpertReply("", *charged, 0.0, CallStatus.FAILED, came.reason, is_estimated=came.is_charged)
            return Attempt(reply, came.is_retryable, came.retry_after_s)
        counts, is_estimated = (came.input_tokens, came.output_tokens), False
        if not self._is_possible(messages, came):
            counts, is_estimated = (_input_estimate(messages), estimate_tokens(came.content)), True
        content = self._clean(came.content)
        status, reason = (CallStatus.OK, Reason.NONE) if content else (CallStatus.FAILED, Reason.UNREADABLE)
        reply = ExpertReply(content, *counts, 0.0, status, reason, is_estimated=is_estimated)
        return Attempt(reply, is_retryable=not came.has_choice)

    def _is_possible(self, messages: Sequence[Mapping[str, str]], came) -> bool:
        for count, most in (
            (came.input_tokens, self._most_input_tokens(messages)),
            (came.output_tokens, self.max_output_tokens),
        ):
            if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= most:
                return False
        return came.output_tokens > 0 or not came.content

    def _most_input_tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        return (
            sum(len(text.encode("utf-8", "replace")) for each in messages for text in each.values()) + TEMPLATE_TOKENS
        )

    def _clean(self, text: str) -> str:
        return clean_text(text, self._api_key)

    def _connect(self) -> openai.AsyncOpenAI:
        """A client for the loop that runs now: pooled connections do not outlive the loop that opened them."""
        import openai

        if not self._is_own_client:
            return self._endpoint.with_options(max_retries=0)
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            self._client = openai.AsyncOpenAI(
                base_url=self._endpoint, api_key=self._api_key or "none", max_retries=0, timeout=None
            )
            self._loop = loop
        return self._client


def _late_reply(messages, partial: Partial, outcome: Outcome[ExpertReply]) -> ExpertReply | None:
    """The attempt that the deadline cut: its input, and what had been streamed. None without a deadline."""
    if not outcome.is_late:
        return None
    is_under_way = outcome.num_attempts > len(outcome.values)
    counts = (_input_estimate(messages), _output_estimate(partial)) if is_under_way else (0, 0)
    return ExpertReply("", *counts, 0.0, CallStatus.TIMEOUT, Reason.DEADLINE, is_estimated=is_under_way)


def _joined(outcome: Outcome[ExpertReply], late: ExpertReply | None) -> ExpertReply:
    """The last attempt's reply with the tokens of all attempts and the time in its three parts."""
    replies = [*outcome.values, *([late] if late else [])]
    return dataclasses.replace(
        replies[-1],
        input_tokens=sum(each.input_tokens for each in replies),
        output_tokens=sum(each.output_tokens for each in replies),
        latency_s=outcome.service_s,
        queue_s=outcome.queue_s,
        retry_s=outcome.retry_s,
        attempt=outcome.num_attempts,
        is_estimated=any(each.is_estimated for each in replies),
        is_measured=True,
    )


def _input_estimate(messages: Sequence[Mapping[str, str]]) -> int:
    return sum(estimate_tokens(each["content"]) for each in messages)


def _output_estimate(partial: Partial) -> int:
    return estimate_tokens("".join(partial))


def load_endpoints(
    path: str, models: Sequence[str], account: Account | None = None, is_offline: bool = False
) -> dict[str, EndpointExpert]:
    """Endpoint experts by the one of `models` that they stand in for, from a JSON file. They share `account`.

        {"gpt-5": {"endpoint": "https://api.openai.com/v1", "model": "gpt-5", "api_key_variable": "OPENAI_API_KEY",
                   "input_usd_per_million_tokens": 1.25, "output_usd_per_million_tokens": 10}}

    Each entry holds the arguments of `EndpointExpert`; one with a key says its prices too. `is_offline`: nobody will be
    asked (all is replayed), so no key is looked for and no price wanted. ValueError for a file that
    is missing or no JSON object, a model that is none of `models`, an argument that is missing or unknown, what
    `EndpointExpert` refuses, and a paid endpoint under an account whose cap is 0.
    """
    try:
        entries = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the endpoints file {path} cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"the endpoints file {path} holds no JSON object: write one entry for each model")
    experts = {}
    for model, arguments in entries.items():
        if model not in models:
            raise ValueError(f"{model!r} in {path} is not a model of the run: choose one of {list(models)}")
        try:
            expert = EndpointExpert(**{**arguments, "api_key_variable": ""} if is_offline else arguments)
        except TypeError as error:
            raise ValueError(f"the entry of {model!r} in {path} is not understood: {error}") from error
        if not is_offline:
            _check_prices(path, model, arguments, expert, account)
        experts[model] = expert
    return experts


def _check_prices(path: str, model: str, arguments: dict, expert: EndpointExpert, account: Account | None) -> None:
    names = ("input_usd_per_million_tokens", "output_usd_per_million_tokens")
    if expert.has_key and not all(name in arguments for name in names):
        raise ValueError(
            f"the entry of {model!r} in {path} has a key and no prices: give {names[0]} and {names[1]}, which the "
            "run's spending cap counts with (0 for an endpoint that bills nobody)"
        )
    if account is not None:
        if expert.is_paid and math.isclose(account.cap_usd, 0.0):
            raise ValueError(
                f"the endpoint of {model!r} costs money and experts.spend_cap_usd is 0: set it to the dollars that "
                "the run may spend"
            )
        expert.account = account
