"""The tools of an environment behind one call: checks, budget, limits, retries, time.

A call that cannot be run or paid is *refused*, a tool that takes too long is a *timeout*, one that breaks has *failed*:
all three are results that the policy sees in one short sentence, never exceptions; the receipt says which by its
`reason`. A bug inside a tool is an exception.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence

import jsonschema
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from orchestra_jax.tools.budget import Quote
from orchestra_jax.tools.ledger import EXPERIMENT, ORCHESTRATOR, make_receipt
from orchestra_jax.tools.limits import Attempt, Limiter, Limits, Outcome
from orchestra_jax.tools.tool import PricedTool, Tool, ToolContext, ToolResult
from orchestra_jax.types import CallStatus, Reason, ToolCall

MAX_ARGUMENT_CHARS = 8_192
MAX_MESSAGE_CHARS = 300
MAX_NAME_CHARS = 40
MAX_REMEMBERED_ARGUMENTS = 1_024  # a policy with few things to say says them over and over
RESERVED_NAMES = (ORCHESTRATOR, *EXPERIMENT)  # a receipt of theirs is no call's
NOT_RETRIED = (Reason.SPEND_CAP, Reason.NOT_RECORDED, Reason.OVER_BUDGET)  # another attempt ends the same way


class Toolbox:
    """`timeout_s` holds for every tool that `limits`, by name, does not give limits of its own.

    ValueError for two tools of one name, a reserved name, limits for no tool, or a parameters_schema that is no JSON
    schema.
    """

    def __init__(self, tools: Sequence[Tool], timeout_s: float, limits: Mapping[str, Limits] | None = None):
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            raise ValueError(f"tools must have different names, got {names}")
        if reserved := sorted(set(names) & set(RESERVED_NAMES)):
            raise ValueError(f"{reserved} are names of the ledger's own receipts: give the tools other ones")
        if unknown := sorted(set(limits or {}) - set(names)):
            raise ValueError(f"limits are given for {unknown}, which are no tools: the tools are {names}")
        self._tools = {tool.name: tool for tool in tools}
        self._validators = {}
        for tool in tools:
            _check_schema(tool)
            # The registry is empty: without it a schema that refers to a URL has it fetched, and waits.
            self._validators[tool.name] = jsonschema.Draft202012Validator(tool.parameters_schema, registry=Registry())
        self._check_arguments = functools.lru_cache(MAX_REMEMBERED_ARGUMENTS)(self._check_arguments_anew)
        self._timeout_s = timeout_s
        self._limiters = {name: Limiter(each) for name, each in (limits or {}).items()}

    @property
    def tools(self) -> tuple[Tool, ...]:
        return tuple(self._tools.values())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tools)

    async def call(self, call: ToolCall, context: ToolContext) -> ToolResult:
        """Runs one call; the result says by its status how it went."""
        reason, message = self._refusal(call)
        if reason:
            return refused(call.name, message, reason)
        tool = self._tools[call.name]
        left_s = math.inf
        if context.allowance is not None:
            quote = _quote(tool, call, context)
            is_modelled = quote.latency_s > 0
            if quote.is_on_clock and not is_modelled:  # else no wall clock may cut it
                left_s = context.allowance.left_s
            if message := context.allowance.admit(quote):
                return refused(call.name, message, Reason.OVER_BUDGET)
        if call.name in self._limiters:
            return await self._run_limited(tool, call, context, left_s)
        timeout_s = min(self._timeout_s, left_s)
        try:
            async with asyncio.timeout(timeout_s) as limit:
                return await tool.run(call.arguments, context)
        except TimeoutError:
            if not limit.expired():  # the tool's own, which it should have turned into a status: a bug
                raise
            return _late(call.name, _quote(tool, call, context), timeout_s, timeout_s < self._timeout_s)

    async def _run_limited(self, tool: Tool, call: ToolCall, context: ToolContext, left_s: float) -> ToolResult:
        limiter, attempts = self._limiters[call.name], itertools.count(1)

        async def attempt() -> Attempt[ToolResult]:
            number = next(attempts)
            result = await tool.run(call.arguments, dataclasses.replace(context, attempt=number))
            is_broken = result.status in (CallStatus.FAILED, CallStatus.TIMEOUT)
            may_retry = is_broken and result.receipt.reason not in NOT_RETRIED and number < limiter.limits.max_attempts
            if may_retry and context.allowance is not None and result.receipt.cost_usd:  # what was put by is spent
                may_retry = not context.allowance.admit(_quote(tool, call, context))
            return Attempt(result, may_retry, result.retry_after_s)

        outcome = await limiter.run(attempt, left_s)
        if outcome.is_late:
            quote = _quote(tool, call, context) if outcome.num_attempts > len(outcome.values) else Quote(0.0)
            late = _late(call.name, quote, min(left_s, limiter.limits.timeout_s), left_s < limiter.limits.timeout_s)
            outcome.values.append(_with_time(late, outcome.service_s))
        return _joined(outcome)

    def _refusal(self, call: ToolCall) -> tuple[Reason, str]:
        if call.error:
            return Reason.NOT_JSON, call.error
        if call.name not in self._tools:
            return (
                Reason.UNKNOWN_TOOL,
                f"there is no tool {call.name[:MAX_NAME_CHARS]!r}; the tools are {', '.join(self._tools)}",
            )
        text = json.dumps(call.arguments, ensure_ascii=False)
        if len(text) > MAX_ARGUMENT_CHARS:
            return Reason.TOO_LONG, f"{call.name}: the arguments have {len(text)} characters of {MAX_ARGUMENT_CHARS}"
        return self._check_arguments(call.name, text)

    def _check_arguments_anew(self, name: str, text: str) -> tuple[Reason, str]:
        """What the tool's schema says of arguments written as JSON: it is the same each time."""
        validator, arguments = self._validators[name], json.loads(text)
        try:
            if validator.is_valid(arguments):
                return Reason.NONE, ""
        except OverflowError:  # an integer that is to be a multiple of a fraction
            return Reason.WRONG_ARGUMENTS, f"{name}: a number in the arguments is too large"
        error = jsonschema.exceptions.best_match(validator.iter_errors(arguments))
        message = f"{name}: {error.message}"
        if len(message) > MAX_MESSAGE_CHARS:  # it repeats the value
            message = f"{name}: {'.'.join(map(str, error.path)) or 'the arguments'} breaks {error.validator!r}"
        kinds = {"additionalProperties": Reason.EXTRA_FIELDS, "maxLength": Reason.TOO_LONG, "maxItems": Reason.TOO_LONG}
        return kinds.get(error.validator, Reason.WRONG_ARGUMENTS), message


def _check_schema(tool: Tool) -> None:
    """ValueError unless the tool's schema is one, and refers to nothing outside of itself."""
    try:
        jsonschema.Draft202012Validator.check_schema(tool.parameters_schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"tool {tool.name!r}: parameters_schema is no JSON schema: {error.message}") from error
    root = DRAFT202012.create_resource(tool.parameters_schema)
    resolver, pending = Registry().resolver_with_root(root), [root]
    while pending:
        part = pending.pop()
        pending += part.subresources()
        reference = part.contents.get("$ref") if isinstance(part.contents, dict) else None
        try:
            if reference is not None:
                resolver.lookup(reference)
        except Unresolvable as error:
            raise ValueError(
                f"tool {tool.name!r}: parameters_schema refers to {reference!r}, which it does not hold: have it stand "
                "under $defs"
            ) from error


def _quote(tool: Tool, call: ToolCall, context: ToolContext) -> Quote:
    return tool.quote(call.arguments, context) if isinstance(tool, PricedTool) else Quote(0.0)


def refused(name: str, message: str, reason: Reason) -> ToolResult:
    """A call that was not begun: free, and told why. `name` may be any that the policy wrote."""
    shown = f"{name[:MAX_NAME_CHARS]}{'?' if name in RESERVED_NAMES else ''}"
    receipt = make_receipt(shown, service_s=0.0, status=CallStatus.REFUSED, attempt=0, reason=reason)
    return ToolResult(message[:MAX_MESSAGE_CHARS], str(CallStatus.REFUSED), receipt, CallStatus.REFUSED)


def _joined(outcome: Outcome[ToolResult]) -> ToolResult:
    """The last attempt's result; its receipt has the tokens, the cost and the time of all of them."""
    last = outcome.values[-1].receipt
    receipts = [each.receipt for each in outcome.values]
    earlier_s = (each.service_s + each.retry_s for each in receipts[:-1])
    receipt = dataclasses.replace(
        last,
        input_tokens=sum(each.input_tokens for each in receipts),
        output_tokens=sum(each.output_tokens for each in receipts),
        fixed_cost_usd=math.fsum(each.fixed_cost_usd for each in receipts),
        cost_usd=math.fsum(each.cost_usd for each in receipts),
        queue_s=math.fsum((outcome.queue_s, *(each.queue_s for each in receipts))),
        retry_s=math.fsum((last.retry_s, outcome.wait_s, *earlier_s)),
        attempt=outcome.num_attempts,
        is_estimated=any(each.is_estimated for each in receipts),
    )
    return dataclasses.replace(outcome.values[-1], receipt=receipt)


def _late(name: str, quote: Quote, timeout_s: float, is_budget: bool) -> ToolResult:
    """A call that was cut: charged with the most that it can have cost."""
    reason = Reason.OVER_BUDGET if is_budget else Reason.DEADLINE
    receipt = make_receipt(
        name,
        service_s=timeout_s,
        fixed_cost_usd=quote.cost_usd,
        status=CallStatus.TIMEOUT,
        is_estimated=quote.cost_usd > 0,
        reason=reason,
    )
    text = f"{name} gave no result within {'the ' if is_budget else ''}{timeout_s:g} s"
    return ToolResult(f"{text}{' of the budget' if is_budget else ''}", "timeout", receipt, CallStatus.TIMEOUT)


def _with_time(result: ToolResult, service_s: float) -> ToolResult:
    return dataclasses.replace(result, receipt=dataclasses.replace(result.receipt, service_s=service_s))
