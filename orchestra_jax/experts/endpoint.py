"""An expert behind any OpenAI-compatible endpoint: a vendor's API, or a server of one's own (SGLang, vLLM).

One prompt per role, in words of our own; the query, the program or the answer is read out of what comes back. Tokens
are those that the endpoint counts in `usage`, latency is the wall clock around the whole reply, retries included. What
goes wrong outside (no connection, a status of 4xx or 5xx, a hang, an empty or unreadable reply) is a typed ExpertReply
and never an exception. Prices are not known here: the instance's offer has them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pathlib
import re
import time
from typing import TYPE_CHECKING

from orchestra_jax.experts.catalog import EXPERTS
from orchestra_jax.experts.expert import ExpertReply, ExpertRequest
from orchestra_jax.types import CallStatus

if TYPE_CHECKING:
    import openai

INSTRUCTIONS = {
    "search": (
        "Write one query for a keyword search engine, such that the documents it finds let somebody answer the "
        "question. Do not answer. Reply with the query alone, on one line."
    ),
    "enhance_reasoning": (
        "Write one Python program, with the standard library alone, that computes what the question asks for and "
        "prints the result and nothing else. Reply with the program in one ```python code block."
    ),
    "answer": (
        "Answer the question. Use the evidence where there is any. Give the final answer alone, without a sentence "
        "around it, between <answer> and </answer>."
    ),
}

_logger = logging.getLogger(__name__)

_PYTHON_BLOCK = re.compile(r"```(?:python|py)[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_ANY_BLOCK = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def render_messages(request: ExpertRequest) -> list[dict[str, str]]:
    """The request as chat messages: the role's instruction, then the question and the evidence so far."""
    text = f"Question: {request.instance.task.question}"
    if request.evidence.text:
        text += f"\n\nEvidence:\n{request.evidence.text}"
    return [{"role": "system", "content": INSTRUCTIONS[request.role]}, {"role": "user", "content": text}]


def extract(role: str, content: str) -> str:
    """The query, program or answer in an endpoint's reply; empty if there is none.

    Thinking up to a closing </think> is left out. A program stands in the first Python code block, else in the first
    block, else it is the whole text; an answer stands in the last <answer>, else on the last line; a query on the
    first.
    """
    text = content.rsplit("</think>", 1)[-1].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if role == "enhance_reasoning":
        block = _PYTHON_BLOCK.search(text) or _ANY_BLOCK.search(text)
        return block[1].strip("\n") if block else text
    if role == "answer":
        answers = _ANSWER.findall(text)
        return (answers or lines or [""])[-1].strip()
    return lines[0].strip("\"'`") if lines else ""


class EndpointExpert:
    """An `Expert` (expert.py).

    Args:
      endpoint: the base URL, such as "http://127.0.0.1:30000/v1", or an openai.AsyncOpenAI made elsewhere, which then
        brings its own key and retries.
      model: the name under which the endpoint knows the model.
      api_key_variable: the environment variable that holds the key; "" for a server that wants none.
      timeout_s: of one reply, retries included.
      max_output_tokens: of one reply, thinking included.
      max_retries: how often the client asks again after a connection error, a 429 or a 5xx.

    Raises:
      ValueError: the variable is not set, or a limit is not positive.
    """

    def __init__(
        self,
        endpoint: openai.AsyncOpenAI | str,
        model: str,
        api_key_variable: str = "",
        timeout_s: float = 120.0,
        max_output_tokens: int = 4096,
        max_retries: int = 2,
    ):
        if timeout_s <= 0 or max_output_tokens < 1 or max_retries < 0:
            raise ValueError(
                f"timeout_s {timeout_s} must be positive, max_output_tokens {max_output_tokens} at least 1 and "
                f"max_retries {max_retries} at least 0"
            )
        if api_key_variable and not os.environ.get(api_key_variable):
            raise ValueError(
                f"the environment variable {api_key_variable!r} is not set: put the key of {endpoint!r} into it, or "
                'give api_key_variable="" for a server that wants none'
            )
        self._endpoint, self._model = endpoint, model
        self._api_key = os.environ[api_key_variable] if api_key_variable else "none"
        self._timeout_s, self._max_output_tokens, self._max_retries = timeout_s, max_output_tokens, max_retries
        self._client: openai.AsyncOpenAI | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def reply(self, request: ExpertRequest) -> ExpertReply:
        """Asks once. A failed reply carries the tokens that the endpoint reported, if it got that far."""
        import openai  # a second to import: paid by runs that call an endpoint

        start_s = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                completion = await self._ask(render_messages(request))
        except (TimeoutError, openai.APITimeoutError):
            _logger.warning("%s at %s gave no reply within %g s", self._model, self._endpoint, self._timeout_s)
            return ExpertReply("", 0, 0, time.monotonic() - start_s, CallStatus.TIMEOUT)
        except (
            openai.OpenAIError,
            json.JSONDecodeError,
            UnicodeDecodeError,
        ) as error:  # the last two: no JSON, or no text
            _logger.warning("%s at %s failed: %s", self._model, self._endpoint, error)
            return ExpertReply("", 0, 0, time.monotonic() - start_s, CallStatus.FAILED)
        latency_s = time.monotonic() - start_s
        content, input_tokens, output_tokens = _read(completion)
        text = extract(request.role, content)
        return ExpertReply(text, input_tokens, output_tokens, latency_s, CallStatus.OK if text else CallStatus.FAILED)

    async def close(self) -> None:
        """Gives back the connections of a client that was made here."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def _ask(self, messages: list[dict[str, str]]) -> object:
        return await self._connect().chat.completions.create(
            model=self._model,
            messages=messages,
            max_completion_tokens=self._max_output_tokens,
            timeout=self._timeout_s,
        )

    def _connect(self) -> openai.AsyncOpenAI:
        """A client for the loop that runs now: pooled connections do not outlive the loop that opened them."""
        import openai

        if isinstance(self._endpoint, openai.AsyncOpenAI):
            return self._endpoint
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            self._client = openai.AsyncOpenAI(
                base_url=self._endpoint, api_key=self._api_key, max_retries=self._max_retries
            )
            self._loop = loop
        return self._client


def load_endpoints(path: str) -> dict[str, EndpointExpert]:
    """Endpoint experts by the catalog's model that they stand in for, from a JSON file.

        {"gpt-5": {"endpoint": "https://api.openai.com/v1", "model": "gpt-5", "api_key_variable": "OPENAI_API_KEY"}}

    Each entry holds the arguments of `EndpointExpert`. ValueError for a file that is missing or no JSON object, a model
    that is not in the catalog, an argument that is missing or unknown, and what `EndpointExpert` refuses.
    """
    try:
        entries = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the endpoints file {path} cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"the endpoints file {path} holds no JSON object: write one entry for each model")
    models = [expert.model for expert in EXPERTS]
    experts = {}
    for model, arguments in entries.items():
        if model not in models:
            raise ValueError(f"{model!r} in {path} is not a model of the catalog: choose one of {models}")
        try:
            experts[model] = EndpointExpert(**arguments)
        except TypeError as error:
            raise ValueError(f"the entry of {model!r} in {path} is not understood: {error}") from error
    return experts


def _read(completion: object) -> tuple[str, int, int]:
    """Content, input tokens and output tokens.

    The client builds its object from whatever JSON came (a page of HTML even stays a string): any field may be missing.
    """
    choices = getattr(completion, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    content = getattr(message, "content", None)
    usage = getattr(completion, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    input_tokens, output_tokens = (count if isinstance(count, int) and count >= 0 else 0 for count in counts)
    return content if isinstance(content, str) else "", input_tokens, output_tokens
