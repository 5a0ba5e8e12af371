"""The tools of an environment behind one call: checks the name and the arguments, runs, limits the time.

A call that cannot be run is *refused*, a tool that takes too long is a *timeout*: both are results that the policy
sees, never exceptions. A bug inside a tool is an exception.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import jsonschema

from orchestra_jax.tools.ledger import make_receipt
from orchestra_jax.tools.tool import Tool, ToolContext, ToolResult
from orchestra_jax.types import CallStatus, ToolCall


class Toolbox:
    """ValueError for two tools of one name, or a parameters_schema that is no JSON schema."""

    def __init__(self, tools: Sequence[Tool], timeout_s: float):
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            raise ValueError(f"tools must have different names, got {names}")
        self._tools = {tool.name: tool for tool in tools}
        self._validators = {}
        for tool in tools:
            try:
                jsonschema.Draft202012Validator.check_schema(tool.parameters_schema)
            except jsonschema.SchemaError as error:
                raise ValueError(f"tool {tool.name!r}: parameters_schema is no JSON schema: {error.message}") from error
            self._validators[tool.name] = jsonschema.Draft202012Validator(tool.parameters_schema)
        self._timeout_s = timeout_s

    @property
    def tools(self) -> tuple[Tool, ...]:
        return tuple(self._tools.values())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tools)

    async def call(self, call: ToolCall, context: ToolContext) -> ToolResult:
        """Runs one call; the result says by its status how it went."""
        reason = self._refusal(call)
        if reason:
            return _without_effect(call.name, reason, CallStatus.REFUSED, 0.0)
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                return await self._tools[call.name].run(call.arguments, context)
        except TimeoutError:
            if not limit.expired():  # the tool's own, which it should have turned into a status: a bug
                raise
            reason = f"{call.name} gave no result within {self._timeout_s:g} s"
            return _without_effect(call.name, reason, CallStatus.TIMEOUT, self._timeout_s)

    def _refusal(self, call: ToolCall) -> str:
        if call.error:
            return call.error
        if call.name not in self._tools:
            return f"there is no tool {call.name!r}; the tools are {', '.join(self._tools)}"
        error = jsonschema.exceptions.best_match(self._validators[call.name].iter_errors(call.arguments))
        return f"{call.name}: {error.message}" if error else ""


def _without_effect(name: str, reason: str, status: CallStatus, service_s: float) -> ToolResult:
    receipt = make_receipt(name, service_s=service_s, status=status)
    return ToolResult(text=reason, summary=str(status), receipt=receipt, status=status)
