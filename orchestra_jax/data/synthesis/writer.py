"""A model that writes for a stage: asked through an endpoint, every reply remembered, every cost on a receipt.

A request is known by model, stage, messages and the number of the sample; its reply is kept in a content-addressed
store (tools/recording.py). A run that is started again asks for nothing that it has been told, and so goes on at the
very record where it stopped. A reply that failed is not kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from orchestra_jax.experts.expert import ExpertReply, receipt_of
from orchestra_jax.run_directory import json_value
from orchestra_jax.tools.recording import Store
from orchestra_jax.types import CallStatus, Reason, Receipt

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


class Endpoint(Protocol):
    """Whoever is asked, such as an EndpointExpert."""

    model: str
    max_output_tokens: int
    usd_per_million_tokens: tuple[float, float]  # input, output

    async def complete(self, messages: Sequence[Mapping[str, str]]) -> ExpertReply: ...


class Rejected(ValueError):
    """What a model wrote is not usable. `reason` is a word for the report's count, the message says it in full."""

    def __init__(self, reason: str, told: str):
        super().__init__(told)
        self.reason = reason


class Writer:
    """Asks one endpoint. `receipts` are those of this run, cache hits included, which nobody paid again."""

    def __init__(self, endpoint: Endpoint, store: Store | None):
        self._endpoint, self._store = endpoint, store
        self.receipts: list[Receipt] = []

    @property
    def model(self) -> str:
        return self._endpoint.model

    @property
    def paid_usd(self) -> float:
        return math.fsum(receipt.cost_usd for receipt in self.receipts if not receipt.is_cache_hit)

    async def ask(self, stage: str, system: str, user: str, sample: int = 0) -> str:
        """The text of a reply, without its thinking. Rejected where the endpoint gave none."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        reply = await self._reply(stage, messages, sample)
        prices = self._endpoint.usd_per_million_tokens
        self.receipts.append(receipt_of(reply, f"synthesis/{stage}", self.model, prices))
        if reply.status != CallStatus.OK:
            raise Rejected("no reply", f"{self.model} gave no reply: {reply.reason or reply.status}")
        return reply.text.rsplit("</think>", 1)[-1].strip()

    async def ask_json(self, stage: str, system: str, user: str, sample: int = 0) -> object:
        """The JSON value of a reply. Rejected where there is none."""
        return read_json(await self.ask(stage, system, user, sample))

    async def _reply(self, stage: str, messages: list[dict[str, str]], sample: int) -> ExpertReply:
        asked = {
            "model": self.model,
            "stage": stage,
            "messages": messages,
            "sample": sample,
            "max_output_tokens": self._endpoint.max_output_tokens,
        }
        held = self._store.load(asked) if self._store else None
        if held is not None:
            named = {**held, "status": CallStatus(held["status"]), "reason": Reason(held["reason"])}
            return dataclasses.replace(ExpertReply(**named), is_cache_hit=True, queue_s=0.0)
        reply = await self._endpoint.complete(messages)
        if self._store and reply.status == CallStatus.OK:
            self._store.save(asked, json_value(reply, "reply"))
        return reply


def read_json(text: str) -> object:
    """The JSON of a reply: in its last code fence, or from its first brace or bracket on. Rejected for none."""
    fences = _FENCE.findall(text)
    start = min((place for place in (text.find("{"), text.find("[")) if place >= 0), default=0)
    candidate = fences[-1] if fences else text[start:]
    try:
        value, _ = json.JSONDecoder(parse_constant=_refuse).raw_decode(candidate.strip())
    except (ValueError, RecursionError) as error:
        raise Rejected("not JSON", f"the reply holds no JSON ({error}): {text[:80]!r}") from error
    return value


def _refuse(spelling: str) -> float:
    raise ValueError(f"{spelling} is no JSON number")
