"""What one episode of a function-calling task has come to: its database, its conversation, the calls it has left."""

from __future__ import annotations

import dataclasses

from orchestra_jax.environments.functions.database import Database
from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.task import FunctionTask
from orchestra_jax.environments.functions.user import Signal, UserTools
from orchestra_jax.types import Message, ToolCall


@dataclasses.dataclass
class Session:
    """Made when the episode opens, handed to its tools in `ToolContext.state`, judged in the end."""

    task: FunctionTask
    domain: Domain
    database: Database
    max_calls: int
    said: list[Message]
    transcript: list[tuple[ToolCall, str]] = dataclasses.field(default_factory=list)  # calls of functions, and results
    signal: Signal = Signal.NONE
    user_tools: UserTools | None = None  # of domains whose user has functions

    @property
    def texts_to_user(self) -> list[str]:
        return [message.content for message in self.said if message.role == "assistant"]
