"""One request to /v1/chat/completions and what came of it, streamed or not; every failure outside as a value.

The client builds its objects from whatever JSON came (a page of HTML even stays a string): any field may be missing or
of another type. A stream that ends without a finish reason was cut, however politely the connection was closed.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from typing import TYPE_CHECKING

from orchestra_jax.tools.limits import read_retry_after
from orchestra_jax.types import Reason

if TYPE_CHECKING:
    import openai

BYTES_PER_TOKEN = 4


class Partial(list[str]):
    """What has been streamed so far."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """`input_tokens` and `output_tokens` are as the endpoint sent them: anything, or None."""

    content: str
    input_tokens: object
    output_tokens: object
    has_choice: bool


@dataclasses.dataclass(frozen=True)
class Failure:
    """`told` may hold whatever the endpoint wrote, keys included: to be cleaned before it is shown."""

    reason: Reason
    told: str
    is_retryable: bool
    is_charged: bool  # the endpoint may have worked for it
    retry_after_s: float = 0.0


def estimate_tokens(text: str) -> int:
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN)


async def ask(
    client: openai.AsyncOpenAI, arguments: dict[str, object], is_streaming: bool, partial: Partial
) -> Completion | Failure:
    """Sends one request. `arguments` are those of `chat.completions.create`; `partial` receives the streamed text."""
    import openai

    # The HTTP library under the client: errors in the middle of a stream come from it as they are.
    http = importlib.import_module(openai.DefaultAsyncHttpxClient.__base__.__module__.partition(".")[0])
    try:
        if is_streaming:
            return await _stream(client, arguments, partial)
        return _read(await client.chat.completions.create(**arguments))
    except openai.RateLimitError as error:
        return Failure(Reason.RATE_LIMITED, str(error), True, False, read_retry_after(error.response.headers))
    except openai.APIStatusError as error:
        is_retryable = error.status_code >= 500 or error.status_code in (408, 409)
        retry_after_s = read_retry_after(error.response.headers) if is_retryable else 0.0
        return Failure(Reason.SERVER_ERROR, str(error), is_retryable, False, retry_after_s)
    except (openai.APIConnectionError, http.HTTPError) as error:
        cause = error.__cause__ or error
        was_sent = not isinstance(cause, (http.ConnectError, http.ConnectTimeout))
        return Failure(Reason.NO_CONNECTION, f"{type(cause).__name__}: {cause}", True, was_sent)
    except (openai.OpenAIError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:  # no JSON, no text
        return Failure(Reason.UNREADABLE, f"{type(error).__name__}: {error}", True, True)


async def _stream(client: openai.AsyncOpenAI, arguments: dict[str, object], partial: Partial) -> Completion | Failure:
    usage, has_finished = None, False
    stream = await client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    async with stream:
        async for chunk in stream:
            usage = getattr(chunk, "usage", None) or usage
            choice = _first(getattr(chunk, "choices", None))
            content = getattr(getattr(choice, "delta", None), "content", None)
            if isinstance(content, str):
                partial.append(content)
            has_finished |= getattr(choice, "finish_reason", None) is not None
    if not has_finished:
        return Failure(Reason.NO_CONNECTION, "the stream ended before the reply did", True, True)
    return Completion("".join(partial), *_counts(usage), has_choice=True)


def _read(completion: object) -> Completion:
    choice = _first(getattr(completion, "choices", None))
    message = getattr(choice, "message", None)
    content = getattr(message, "content", None)
    counts = _counts(getattr(completion, "usage", None))
    return Completion(content if isinstance(content, str) else "", *counts, has_choice=message is not None)


def _first(choices: object) -> object:
    return choices[0] if isinstance(choices, list) and choices else None


def _counts(usage: object) -> tuple[object, object]:
    return getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
