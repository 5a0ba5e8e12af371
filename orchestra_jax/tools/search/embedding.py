"""Texts to unit vectors by any OpenAI-compatible embedding endpoint: asked, paid for, recorded and replayed.

Failures outside are an `EmbeddingFailure`, which `search` turns into a failed call; the embedding of a corpus ends with
it. Money is reserved for the most that a batch can cost (a token has at least one byte) and settled by the endpoint's
own count. Whoever asks waits in a thread; the requests run in an event loop of their own, where a deadline can cut one
that is answered byte by byte.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence

import numpy as np

from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.credentials import clean_text, public_url, read_key
from orchestra_jax.tools.limits import Attempt, Limiter, Limits, read_retry_after
from orchestra_jax.tools.recording import Store
from orchestra_jax.tools.search.dense_search import unit
from orchestra_jax.types import Reason

QUERY_TIMEOUT_S = 60.0
MAX_ATTEMPTS = 3  # where nobody is billed: an attempt that is cut may be, and nobody is told
Embed = Callable[[Sequence[str]], np.ndarray]


class EmbeddingFailure(ValueError):
    """No vectors came; `reason` says why, and the message holds no key."""

    def __init__(self, message: str, reason: Reason):
        super().__init__(message)
        self.reason = reason


def most_cost_usd(texts: Sequence[str], usd_per_million_tokens: float) -> float:
    """The most that embedding the texts can cost."""
    return sum(len(text.encode("utf-8", "replace")) for text in texts) * usd_per_million_tokens / 1e6


class EmbeddingEndpoint:
    """A client. Safe to share between threads.

    `timeout_s` is the deadline of a batch, attempts and the waits between them included: a corpus embedded by a small
    server may want a longer one. ValueError if it is none, the variable that is to hold the key is not set, or the URL
    could hold one.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        api_key_variable: str = "",
        batch_size: int = 64,
        timeout_s: float = QUERY_TIMEOUT_S,
        usd_per_million_tokens: float = 0.0,
        account: Account | None = None,
    ):
        import openai

        self._where, self._key = public_url(endpoint), read_key(api_key_variable, endpoint)
        self._limiter = Limiter(Limits(timeout_s, max_attempts=1 if usd_per_million_tokens else MAX_ATTEMPTS))
        self._client = openai.AsyncOpenAI(base_url=endpoint, api_key=self._key or "none", timeout=None, max_retries=0)
        self._batch_size, self._lock = batch_size, threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._price, self._account = usd_per_million_tokens, account or Account()
        self.model = model

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D] float32, each of length 1. EmbeddingFailure if they cannot be had, or cannot be paid."""
        rows = []
        for start in range(0, len(texts), self._batch_size):
            batch = self._embed_batch(list(texts[start : start + self._batch_size]))
            rows += asyncio.run_coroutine_threadsafe(batch, self._own_loop()).result()
        try:
            return unit(np.asarray(rows, np.float32))
        except (ValueError, TypeError) as error:  # rows of several lengths, no numbers, zeros
            raise self._failure(error, Reason.UNREADABLE) from None

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        """The loop that the client's connections live in, in a thread that ends with the process."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="embedding", daemon=True).start()
            return self._loop

    async def _embed_batch(self, batch: list[str]) -> list[list[float]]:
        outcome = await self._limiter.run(lambda: self._attempt(batch))
        if outcome.is_late:
            raise self._failure(f"no vectors within {self._limiter.limits.timeout_s:g} s", Reason.DEADLINE)
        if isinstance(made := outcome.values[-1], EmbeddingFailure):
            raise made
        return made

    async def _attempt(self, batch: list[str]) -> Attempt[list[list[float]] | EmbeddingFailure]:
        most_usd = most_cost_usd(batch, self._price)
        if not self._account.reserve(most_usd):
            told = f"{self.model} is not asked: the run's spending cap is reached"
            return Attempt(EmbeddingFailure(told, Reason.SPEND_CAP), False)
        paid_usd = most_usd  # should this be cancelled: nobody knows what the endpoint did by then
        try:
            made, paid_usd = await self._ask(batch, most_usd)
            return made
        finally:
            self._account.settle(most_usd, paid_usd)

    async def _ask(
        self, batch: list[str], most_usd: float
    ) -> tuple[Attempt[list[list[float]] | EmbeddingFailure], float]:
        """What one request came to, and what it is taken to have cost."""
        import openai

        paid_usd = most_usd
        try:
            reply = await self._client.embeddings.create(model=self.model, input=batch, encoding_format="float")
            num_tokens = getattr(reply.usage, "prompt_tokens", None)
            if isinstance(num_tokens, int) and 0 < num_tokens * self._price / 1e6 <= most_usd:
                paid_usd = num_tokens * self._price / 1e6
            rows = [each.embedding for each in sorted(reply.data, key=lambda each: each.index)]
        except openai.APIStatusError as error:
            is_busy = isinstance(error, openai.RateLimitError)
            is_retryable = error.status_code >= 500 or error.status_code in (408, 409, 429)
            failure = self._failure(error, Reason.RATE_LIMITED if is_busy else Reason.SERVER_ERROR)
            return Attempt(failure, is_retryable, read_retry_after(error.response.headers)), 0.0
        except openai.APIConnectionError as error:
            return Attempt(self._failure(error, Reason.NO_CONNECTION), True), paid_usd
        except (
            openai.OpenAIError,
            AttributeError,
            TypeError,
            json.JSONDecodeError,
            UnicodeDecodeError,
            RecursionError,
        ) as error:  # no reply of that shape
            return Attempt(self._failure(error, Reason.UNREADABLE), False), paid_usd
        if len(rows) != len(batch):
            told = f"it gave {len(rows)} vectors for {len(batch)} texts"
            return Attempt(self._failure(told, Reason.UNREADABLE), False), paid_usd
        return Attempt(rows, False), paid_usd

    def _failure(self, error: Exception | str, reason: Reason) -> EmbeddingFailure:
        told = clean_text(error if isinstance(error, str) else f"{type(error).__name__}: {error}", self._key)
        return EmbeddingFailure(f"the embedding endpoint at {self._where} failed: {told}", reason)


def recorded(embed: Embed, model: str, store: Store) -> Embed:
    """`embed` with each text's vector kept in a store; from a replay nobody is asked, nor paid."""

    lock = threading.Lock()  # of two that embed the same text at once, the first one's vector holds for both

    def embed_recorded(texts: Sequence[str]) -> np.ndarray:
        rows = []
        for text in texts:
            request = {"embedding": model, "text": text}
            held = store.load(request)
            if held is None and store.is_replay:
                raise EmbeddingFailure("this embedding was not recorded", Reason.NOT_RECORDED)
            if held is None:
                made = {"vector": embed([text])[0].tolist()}
                with lock:
                    held = store.load(request)
                    if held is None:
                        store.save(request, held := made)
            rows.append(held["vector"])
        return np.asarray(rows, np.float32)

    return embed_recorded
