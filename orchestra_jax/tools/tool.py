"""What a tool is: a name, a JSON schema, and one coroutine. It returns text for the policy, a receipt, a typed status.

Source of the interface: ToolOrchestra section 3.1 (every tool, a larger model included, is one JSON object) and the
OpenAI function format that the Qwen3 chat template renders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from orchestra_jax.data.records import Instance
from orchestra_jax.tools.budget import Allowance, Quote
from orchestra_jax.types import CallStatus, Receipt


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the episode's calls have brought so far: retrieved document ids, printed outputs, and both as text."""

    document_ids: tuple[str, ...] = ()
    printed: tuple[str, ...] = ()
    text: str = ""

    def joined(self, other: Evidence) -> Evidence:
        return Evidence(
            self.document_ids + other.document_ids,
            self.printed + other.printed,
            "\n".join(text for text in (self.text, other.text) if text),
        )


def charge_nobody(receipt: Receipt) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class ToolContext:
    """What a call may know besides its arguments: the instance, which rollout of it this is, the evidence so far.

    `call_number` counts the episode's calls from 0, `attempt` the toolbox's attempts at this one from 1. `allowance` is
    what the turn may still use; None: no limit. `state` is what the environment opened the episode with. `charge` books
    what is the experiment's bill and not the call's (ledger.EXPERIMENT), at once: it stands though the call be cut.
    """

    instance: Instance
    rollout_index: int
    evidence: Evidence
    call_number: int = 0
    attempt: int = 1
    allowance: Allowance | None = None
    state: object = None
    charge: Callable[[Receipt], None] = charge_nobody


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """What came back. `text` is the full result; `summary` is one line of it, for policies with short prompts.

    `answer` is set by the terminal tool alone, and ends the episode. `retry_after_s` is what a busy endpoint asked for.
    """

    text: str
    summary: str
    receipt: Receipt
    status: CallStatus = CallStatus.OK
    evidence: Evidence = Evidence()
    answer: str | None = None
    retry_after_s: float = 0.0


class Tool(Protocol):
    name: str
    description: str
    parameters_schema: dict[str, object]

    async def run(self, arguments: dict[str, object], context: ToolContext) -> ToolResult: ...


@runtime_checkable
class PricedTool(Tool, Protocol):
    """A tool that can say beforehand what a call costs at most: what a budget needs to refuse it in time."""

    def quote(self, arguments: dict[str, object], context: ToolContext) -> Quote: ...
