"""What an environment is: it opens an episode with a prompt, offers tools, and says what the episode was worth.

The loop itself is `rollout.run_episode`; an environment holds no state of an episode: what one has changed lives in
what `open` returns, which the loop hands to the tools and back to `objectives`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from orchestra_jax.data.records import Instance
from orchestra_jax.experts.judge import Verdict
from orchestra_jax.tools.ledger import Totals
from orchestra_jax.tools.tool import Evidence
from orchestra_jax.tools.toolbox import Toolbox
from orchestra_jax.types import CallRecord, Message


class Environment(Protocol):
    max_calls: int
    toolbox: Toolbox

    def open(self, instance: Instance) -> object:
        """The state of a new episode; None where calls change nothing."""
        ...

    def prompt(self, instance: Instance) -> tuple[Sequence[Message], Sequence[dict]]:
        """The opening messages and the tools as JSON schemas in the OpenAI function format."""
        ...

    def is_evidence_present(self, instance: Instance, evidence: Evidence) -> bool: ...

    def observation(self, text: str, summary: str) -> str:
        """What of a result the policy is shown."""
        ...

    def objectives(
        self, instance: Instance, calls: Sequence[CallRecord], answer: str | None, totals: Totals, state: object
    ) -> dict[str, float]:
        """Unweighted values by objective name."""
        ...


class JudgedEnvironment(Environment, Protocol):
    """An environment whose outcome may need a model's verdict: it takes the place of the outcome in `objectives`."""

    async def judge(self, instance: Instance, answer: str) -> Verdict: ...
