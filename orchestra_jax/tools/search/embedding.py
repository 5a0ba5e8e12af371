"""Texts to unit vectors by any OpenAI-compatible embedding endpoint: asked, paid for, recorded and replayed.

Failures outside are an `EmbeddingFailure`, which `search` turns into a failed call; the embedding of a corpus ends with
it. Money is reserved for the most that a batch can cost (a token has at least one byte) and settled by the endpoint's
own count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np

from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.credentials import clean_text, public_url, read_key
from orchestra_jax.tools.recording import Store
from orchestra_jax.tools.search.dense_search import unit
from orchestra_jax.types import Reason

QUERY_TIMEOUT_S = 60.0
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
    """A client. Embedding a corpus may want a longer `timeout_s` of a batch: a small server may be slow.

    ValueError if the variable that is to hold the key is not set, or the URL could hold one.
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
        num_retries = 0 if usd_per_million_tokens else 2  # an attempt that is cut may be billed, and nobody is told
        self._client = openai.OpenAI(
            base_url=endpoint, api_key=self._key or "none", timeout=timeout_s, max_retries=num_retries
        )
        self._batch_size = batch_size
        self._price, self._account = usd_per_million_tokens, account or Account()
        self.model = model

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D] float32, each of length 1. EmbeddingFailure if they cannot be had, or cannot be paid."""
        rows = []
        for start in range(0, len(texts), self._batch_size):
            rows += self._embed_batch(list(texts[start : start + self._batch_size]))
        try:
            return unit(np.asarray(rows, np.float32))
        except (ValueError, TypeError) as error:  # rows of several lengths, no numbers, zeros
            raise self._failure(error, Reason.UNREADABLE) from None

    def _embed_batch(self, batch: list[str]) -> list[list[float]]:
        import openai

        most_usd = most_cost_usd(batch, self._price)
        if not self._account.reserve(most_usd):
            raise EmbeddingFailure(f"{self.model} is not asked: the run's spending cap is reached", Reason.SPEND_CAP)
        paid_usd = most_usd
        try:
            reply = self._client.embeddings.create(model=self.model, input=batch, encoding_format="float")
            num_tokens = getattr(reply.usage, "prompt_tokens", None)
            if isinstance(num_tokens, int) and 0 < num_tokens * self._price / 1e6 <= most_usd:
                paid_usd = num_tokens * self._price / 1e6
            rows = [each.embedding for each in sorted(reply.data, key=lambda each: each.index)]
        except openai.APIStatusError as error:
            paid_usd = 0.0
            is_busy = isinstance(error, openai.RateLimitError)
            raise self._failure(error, Reason.RATE_LIMITED if is_busy else Reason.SERVER_ERROR) from None
        except openai.APIConnectionError as error:
            raise self._failure(error, Reason.NO_CONNECTION) from None
        except (
            openai.OpenAIError,
            AttributeError,
            TypeError,
            json.JSONDecodeError,
            UnicodeDecodeError,
            RecursionError,
        ) as error:  # no reply of that shape
            raise self._failure(error, Reason.UNREADABLE) from None
        finally:
            self._account.settle(most_usd, paid_usd)
        if len(rows) != len(batch):
            told = f"the embedding endpoint gave {len(rows)} vectors for {len(batch)} texts"
            raise EmbeddingFailure(told, Reason.UNREADABLE)
        return rows

    def _failure(self, error: Exception, reason: Reason) -> EmbeddingFailure:
        told = clean_text(f"{type(error).__name__}: {error}", self._key)
        return EmbeddingFailure(f"the embedding endpoint at {self._where} failed: {told}", reason)


def recorded(embed: Embed, model: str, store: Store) -> Embed:
    """`embed` with each text's vector kept in a store; from a replay nobody is asked, nor paid."""

    def embed_recorded(texts: Sequence[str]) -> np.ndarray:
        rows = []
        for text in texts:
            request = {"embedding": model, "text": text}
            held = store.load(request)
            if held is None and store.is_replay:
                raise EmbeddingFailure("this embedding was not recorded", Reason.NOT_RECORDED)
            if held is None:
                held = {"vector": embed([text])[0].tolist()}
                store.save(request, held)
            rows.append(held["vector"])
        return np.asarray(rows, np.float32)

    return embed_recorded
