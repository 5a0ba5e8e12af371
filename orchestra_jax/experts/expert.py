"""What an expert is: a larger model that fills a role when the orchestrator calls it.

Roles (ToolOrchestra section 3.1 and its release): `search` writes a query, `enhance_reasoning` writes a Python program,
`answer` answers. An expert only writes text; running it is the tool's work (experts/delegation.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from orchestra_jax.data.records import Instance, Offer
from orchestra_jax.tools.ledger import make_receipt
from orchestra_jax.tools.tool import Evidence
from orchestra_jax.types import CallStatus, Reason, Receipt


def always() -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class ExpertRequest:
    role: str
    instance: Instance
    offer: Offer
    evidence: Evidence
    is_evidence_present: bool
    rollout_index: int
    may_retry: Callable[[], bool] = always  # whether one more attempt can be paid; takes its price off the budget


@dataclasses.dataclass(frozen=True)
class ExpertReply:
    """`text` is the query, the program or the answer. A failed reply is charged for what it consumed.

    Tokens are those of all attempts; `latency_s` is the last attempt, `retry_s` what went before it, `queue_s` the wait
    under our own limits; `is_measured` says that a clock measured them, where a simulated expert's are the world's. The
    other fields below `status` are those of a receipt (types.py).
    """

    text: str
    input_tokens: int
    output_tokens: int
    latency_s: float
    status: CallStatus = CallStatus.OK
    reason: Reason = Reason.NONE
    queue_s: float = 0.0
    retry_s: float = 0.0
    attempt: int = 1
    is_estimated: bool = False
    is_cache_hit: bool = False
    is_measured: bool = False


def receipt_of(
    reply: ExpertReply, tool: str, model: str, usd_per_million_tokens: tuple[float, float], alias: str = ""
) -> Receipt:
    """What a reply is charged as, at these prices of input and output."""
    return make_receipt(
        tool,
        service_s=reply.latency_s,
        alias=alias,
        model=model,
        input_tokens=reply.input_tokens,
        output_tokens=reply.output_tokens,
        input_usd_per_million_tokens=usd_per_million_tokens[0],
        output_usd_per_million_tokens=usd_per_million_tokens[1],
        status=reply.status,
        queue_s=reply.queue_s,
        retry_s=reply.retry_s,
        attempt=reply.attempt,
        is_cache_hit=reply.is_cache_hit,
        is_estimated=reply.is_estimated,
        reason=reply.reason,
    )


@dataclasses.dataclass(frozen=True)
class ExpertBound:
    """The most tokens that one attempt at a reply can consume, and its seconds where they are known (else 0)."""

    input_tokens: int
    output_tokens: int
    latency_s: float


class Expert(Protocol):
    async def reply(self, request: ExpertRequest) -> ExpertReply: ...


@runtime_checkable
class BoundedExpert(Expert, Protocol):
    """An expert that knows beforehand what a reply can cost: what a budget needs."""

    def bound(self, request: ExpertRequest) -> ExpertBound: ...
