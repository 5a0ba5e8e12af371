"""The tools of a function-calling task: the domain's functions, the user, and an expert to be asked for advice.

A call beyond the task's own number is refused, the one that talks to the user included: an episode that has spent its
calls cannot end well.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Protocol

from orchestra_jax.data.records import Offer
from orchestra_jax.environments.functions.function import Function, FunctionBroken, FunctionRefused, run_function
from orchestra_jax.environments.functions.session import Session
from orchestra_jax.environments.functions.user import Signal, User
from orchestra_jax.experts.expert import ExpertBound, ExpertReply, receipt_of
from orchestra_jax.tools.budget import Quote
from orchestra_jax.tools.ledger import make_receipt, token_cost_usd
from orchestra_jax.tools.tool import ToolContext, ToolResult
from orchestra_jax.tools.toolbox import refused
from orchestra_jax.types import CallStatus, Message, Reason, ToolCall

TELL_USER = "tell_user"
CALL_EXPERT = "call_expert"
SHORT_REFUSAL = "no"


@dataclasses.dataclass(frozen=True)
class CallPrice:
    """What a call of a function costs on the episode's ledger and clock."""

    cost_usd: float = 0.0
    latency_s: float = 0.0


class FunctionTool:
    """A function of the domain as a tool. What the function refuses is a result that the policy reads."""

    def __init__(self, function: Function, price: CallPrice):
        self.name, self.description = function.name, function.description
        self.parameters_schema = function.parameters_schema
        self._price = price

    def quote(self, arguments: dict[str, object], context: ToolContext) -> Quote:
        return Quote(self._price.cost_usd, self._price.latency_s)

    async def run(self, arguments: dict[str, object], context: ToolContext) -> ToolResult:
        session: Session = context.state
        if context.call_number >= session.max_calls:
            return refused(self.name, f"all {session.max_calls} calls are spent", Reason.TOO_MANY_CALLS)
        price = {"service_s": self._price.latency_s, "fixed_cost_usd": self._price.cost_usd}
        functions = session.domain.functions_by_name
        try:
            text = run_function(functions, session.database, self.name, arguments)
            summary = functions[self.name].summarize(text)
        except FunctionRefused as error:
            text, summary = f"refused: {error}", SHORT_REFUSAL
        except FunctionBroken as error:
            receipt = make_receipt(self.name, **price, status=CallStatus.FAILED, reason=Reason.BROKEN_FUNCTION)
            return ToolResult(str(error), "failed", receipt, CallStatus.FAILED)
        session.transcript.append((ToolCall(self.name, arguments), text))
        return ToolResult(text, summary, make_receipt(self.name, **price))


class TellUser:
    """Says something to the user, whose reply is the result. The user's signal ends the episode.

    The call is free and takes no time on the episode's clock: what a model that plays the user costs and takes is the
    experiment's, and charged as such.
    """

    name = TELL_USER
    description = (
        "Say something to the user: ask for what you need, or tell them that it is done and what they wanted to know."
    )
    parameters_schema = {
        "type": "object",
        "properties": {"text": {"type": "string", "description": "What the user reads."}},
        "required": ["text"],
        "additionalProperties": False,
    }

    def __init__(self, user: User):
        self._user = user

    def quote(self, arguments: dict[str, object], context: ToolContext) -> Quote:
        return Quote(0.0, is_on_clock=False)

    async def run(self, arguments: dict[str, object], context: ToolContext) -> ToolResult:
        session: Session = context.state
        if context.call_number >= session.max_calls:
            return refused(self.name, f"all {session.max_calls} calls are spent", Reason.TOO_MANY_CALLS)
        message = Message("assistant", str(arguments["text"]))
        said = [*session.said, message]  # what nobody answers was not said: another attempt says it once
        try:
            reply = await self._user.reply(session.task.scenario, said, session.user_tools, context.charge)
        except FunctionBroken as error:
            broken = make_receipt(self.name, service_s=0.0, status=CallStatus.FAILED, reason=Reason.BROKEN_FUNCTION)
            return ToolResult(f"the user's function is broken: {error}", "failed", broken, CallStatus.FAILED)
        receipt = make_receipt(self.name, service_s=0.0, status=reply.status, reason=reply.reason)
        if reply.status != CallStatus.OK:
            return ToolResult(f"the user does not answer: {reply.reason}", "failed", receipt, reply.status)
        session.said += [message, Message("user", reply.text)]
        session.signal = reply.signal
        is_over = reply.signal != Signal.NONE
        return ToolResult(reply.text, reply.text, receipt, answer=str(arguments["text"]) if is_over else None)


@dataclasses.dataclass(frozen=True)
class AdviceRequest:
    offer: Offer
    session: Session
    seed: int
    rollout_index: int


class Adviser(Protocol):
    def bound(self, request: AdviceRequest) -> ExpertBound:
        """The most that the advice can consume."""
        ...

    async def advise(self, request: AdviceRequest) -> ExpertReply:
        """What to do next, in words or as a call."""
        ...


class CallExpert:
    """Asks an expert on offer what to do next; charged at the offer's prices, like every expert."""

    name = CALL_EXPERT
    description = "Ask an expert what to do next. A strong one is dear: use it where you are not sure."
    parameters_schema = {
        "type": "object",
        "properties": {"expert": {"type": "string", "description": "The alias of the expert."}},
        "required": ["expert"],
        "additionalProperties": False,
    }

    def __init__(self, advisers: Callable[[str], Adviser]):
        self._advisers = advisers

    def quote(self, arguments: dict[str, object], context: ToolContext) -> Quote:
        offer = context.instance.offer(str(arguments["expert"]))
        if offer is None:
            return Quote(0.0)
        bound = self._advisers(offer.model).bound(self._request(offer, context))
        prices = offer.input_usd_per_million_tokens, offer.output_usd_per_million_tokens
        return Quote(token_cost_usd(bound.input_tokens, bound.output_tokens, *prices, 0.0), bound.latency_s)

    async def run(self, arguments: dict[str, object], context: ToolContext) -> ToolResult:
        session: Session = context.state
        if context.call_number >= session.max_calls:
            return refused(self.name, f"all {session.max_calls} calls are spent", Reason.TOO_MANY_CALLS)
        alias = str(arguments["expert"])
        offer = context.instance.offer(alias)
        if offer is None:
            return refused(self.name, f"{alias[:40]!r} is not on offer", Reason.NOT_ON_OFFER)
        reply = await self._advisers(offer.model).advise(self._request(offer, context))
        prices = offer.input_usd_per_million_tokens, offer.output_usd_per_million_tokens
        receipt = receipt_of(reply, self.name, offer.model, prices, alias)
        text = reply.text if reply.status == CallStatus.OK else f"{alias} gave no advice: {reply.reason}"
        return ToolResult(text, text, receipt, reply.status)

    def _request(self, offer: Offer, context: ToolContext) -> AdviceRequest:
        return AdviceRequest(offer, context.state, context.instance.seed, context.rollout_index)


def render_transcript(session: Session) -> str:
    """The conversation and the calls so far, as text for an adviser."""
    lines = [f"{'Agent' if each.role == 'assistant' else 'User'}: {each.content}" for each in session.said]
    lines += [
        f"Call: {call.name} {json.dumps(call.arguments, ensure_ascii=False)}\nResult: {result}"
        for call, result in session.transcript
    ]
    return "\n".join(lines)
