"""Whoever tries a task for the filter: a named solver, here a model behind an endpoint.

It is given policy, functions and the user's whole scenario at once: a task that it cannot solve so in k attempts is
taken for one that cannot be solved. There is no user to ask; that is the environment's matter.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Protocol

from orchestra_jax.data.synthesis.writer import Rejected, Writer
from orchestra_jax.environments.functions.database import Database
from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.function import FunctionBroken, FunctionRefused, run_function
from orchestra_jax.environments.functions.task import FunctionTask

SYSTEM = (
    "You serve a customer by calling functions. Write one step at a time, as JSON alone: "
    '{"call": {"name": "...", "arguments": {...}}} to call a function, {"say": "..."} to tell the customer something, '
    '{"done": true} when the customer has all that was asked for. Do nothing that was not asked for, and look up what '
    "you are not told."
)


@dataclasses.dataclass(frozen=True)
class Played:
    """The database behind an attempt, and what was said to the user."""

    database: Database
    texts_to_user: tuple[str, ...]


class Solver(Protocol):
    name: str

    async def attempt(self, domain: Domain, task: FunctionTask, number: int) -> Played: ...


class EndpointSolver:
    """A `Solver`: one model, `max_turns` steps an attempt. A step that cannot be read ends the attempt."""

    def __init__(self, writer: Writer, max_turns: int = 20):
        self._writer, self._max_turns = writer, max_turns
        self.name = writer.model

    async def attempt(self, domain: Domain, task: FunctionTask, number: int) -> Played:
        database, texts, transcript = domain.open_database(), [], []
        schemas = json.dumps([function.schema["function"] for function in domain.functions])
        system = f"{SYSTEM}\n\nPolicy:\n{domain.policy}\n\nFunctions:\n{schemas}"
        scenario = task.scenario
        opening = f"Customer: {scenario.reason_for_call}\n{scenario.known_info}\n{scenario.task_instructions}"
        for _ in range(self._max_turns):
            try:
                step = await self._writer.ask_json("filter", system, "\n".join([opening, *transcript]), number)
            except Rejected:
                break
            if not isinstance(step, dict) or not (
                isinstance(step.get("say"), str) or isinstance(step.get("call"), dict)
            ):
                break
            transcript.append(f"You: {json.dumps(step, sort_keys=True)}")
            if "say" in step:
                texts.append(step["say"])
                continue
            transcript.append("Result: " + await asyncio.to_thread(_call, domain, database, step["call"]))
        return Played(database, tuple(texts))


def _call(domain: Domain, database: Database, call: dict) -> str:
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return 'a call has a "name" and "arguments" that are an object'
    try:
        return run_function(domain.functions_by_name, database, name, arguments)
    except (FunctionRefused, FunctionBroken) as error:
        return f"Error: {error}"
