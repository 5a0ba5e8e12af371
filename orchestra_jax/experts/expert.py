"""What an expert is: a larger model that fills a role when the orchestrator calls it.

Roles (ToolOrchestra section 3.1 and its release): `search` writes a query, `enhance_reasoning` writes a Python program,
`answer` answers. An expert only writes text; running it is the tool's work (experts/delegation.py).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from orchestra_jax.data.records import Instance, Offer
from orchestra_jax.tools.tool import Evidence
from orchestra_jax.types import CallStatus


@dataclasses.dataclass(frozen=True)
class ExpertRequest:
    role: str
    instance: Instance
    offer: Offer
    evidence: Evidence
    is_evidence_present: bool
    rollout_index: int


@dataclasses.dataclass(frozen=True)
class ExpertReply:
    """`text` is the query, the program or the answer. A failed reply is charged for what it consumed."""

    text: str
    input_tokens: int
    output_tokens: int
    latency_s: float
    status: CallStatus = CallStatus.OK


class Expert(Protocol):
    async def reply(self, request: ExpertRequest) -> ExpertReply: ...
