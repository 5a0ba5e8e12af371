"""Who the policy talks to: a user by script, or one that a model plays.

Both are handed the scenario and what was said so far, and hold no state. A reply may carry a signal that ends the
conversation: the wish is met (STOP), the policy hands over to a human (TRANSFER), or the scenario does not say what the
policy asks for (OUT_OF_SCOPE). The signals are those of tau2-bench. In some domains the user has functions too, on a
phone of their own, say: they are called within the user's turn, and the policy hears what the user says of it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from orchestra_jax.environments.functions.task import UserScenario
from orchestra_jax.experts.expert import ExpertBound, ExpertReply, receipt_of
from orchestra_jax.tools.ledger import USER
from orchestra_jax.tools.tool import charge_nobody
from orchestra_jax.types import CallStatus, Message, Reason, Receipt, ToolCall

Charge = Callable[[Receipt], None]

MAX_UNANSWERED = 2  # questions in a row that the script has no answer to
MAX_CALLS_A_TURN = 20  # of the user's own functions


class Signal(enum.StrEnum):
    NONE = ""
    STOP = "###STOP###"
    TRANSFER = "###TRANSFER###"
    OUT_OF_SCOPE = "###OUT-OF-SCOPE###"


@dataclasses.dataclass(frozen=True)
class UserReply:
    """`status` is FAILED or TIMEOUT where the endpoint broke; then there is no text."""

    text: str
    signal: Signal = Signal.NONE
    status: CallStatus = CallStatus.OK
    reason: Reason = Reason.NONE


@dataclasses.dataclass(frozen=True)
class UserCall:
    """A call that the user made behind the first `num_said` messages of the conversation, and what it gave."""

    num_said: int
    call: ToolCall
    result: str


class UserTools(Protocol):
    """The functions that the user of one episode has, and the calls made of them so far."""

    schemas: Sequence[dict]  # in the OpenAI function format
    calls: list[UserCall]

    def run(self, call: ToolCall, num_said: int) -> str:
        """Appends to `calls` and returns the result; what a function refuses is its result. FunctionBroken."""
        ...


class User(Protocol):
    async def reply(
        self,
        scenario: UserScenario,
        said: Sequence[Message],
        tools: UserTools | None = None,
        charge: Charge = charge_nobody,
    ) -> UserReply:
        """`said` in order, the policy's messages with role "assistant", the user's own with "user"; the last is the
        policy's. `charge` is told what it costs. FunctionBroken, of the user's functions, where there are some."""
        ...


_TRANSFER = re.compile(r"\b(transfer\w*|hand\w* (you )?over)\b.*\b(human|agent|colleague|person)\b")
_CONFIRM = re.compile(
    r"\b(confirm|proceed|go ahead|shall i|should i|do you want|would you like|yes/no|correct\?|right\?)"
)


class ScriptedUser:
    """Deterministic. It says a fact when a question names its topic, says that it does not know where a question names
    an unknown topic, and agrees when it is asked to confirm. What is no question ends the conversation. With functions
    it first makes the calls that a message spells, as `toggle_wifi()` or `grant({"app": "mail"})`, and says what they
    give."""

    async def reply(
        self,
        scenario: UserScenario,
        said: Sequence[Message],
        tools: UserTools | None = None,
        charge: Charge = charge_nobody,
    ) -> UserReply:
        if tools is not None and (calls := _spelled_calls(said[-1].content, tools.schemas)):
            return UserReply("\n".join(tools.run(call, len(said)) for call in calls))
        text = said[-1].content.lower()
        if _TRANSFER.search(text):
            return UserReply("", Signal.TRANSFER)
        if "?" not in text:
            return UserReply("Thank you, that is all.", Signal.STOP)
        sentences = [f"My {topic} is {fact}." for topic, fact in scenario.facts.items() if _names(text, topic)]
        sentences += [f"I do not know my {topic}." for topic in scenario.unknown if _names(text, topic)]
        if sentences:
            return UserReply(" ".join(sentences))
        if _CONFIRM.search(text):
            return UserReply("Yes, please.")
        return self._shrug(scenario, said)

    def _shrug(self, scenario: UserScenario, said: Sequence[Message]) -> UserReply:
        """The first question without an answer gets all that the user knows; one more, and it gives up."""
        told = " ".join(part for part in (scenario.reason_for_call, scenario.known_info) if part)
        num_before = sum(message.role == "user" and message.content == told for message in said)
        if num_before + 1 >= MAX_UNANSWERED:
            return UserReply("", Signal.OUT_OF_SCOPE)
        return UserReply(told)


def _names(text: str, topic: str) -> bool:
    return re.search(rf"\b{re.escape(topic.lower())}\b", text) is not None


def _spelled_calls(text: str, schemas: Sequence[dict]) -> list[ToolCall]:
    """The calls that stand in a text as NAME() or NAME({JSON object}), in order."""
    names, calls = {schema["function"]["name"] for schema in schemas}, []
    for match in re.finditer(r"\b(\w+)\(", text):
        if match[1] not in names:
            continue
        behind = text[match.end() :]
        try:
            arguments, end = ({}, 0) if behind.startswith(")") else json.JSONDecoder().raw_decode(behind)
        except ValueError:
            continue
        if isinstance(arguments, dict) and behind[end:].startswith(")"):
            calls.append(ToolCall(match[1], arguments))
    return calls


GUIDELINES = f"""You play a customer who talks to a service agent. Stay in the role that the scenario below describes.
- Write one short message at a time, as a person would, and nothing besides it.
- Say only what the scenario lets you know, and only when it is needed; do not tell all of it at once.
- Invent nothing. If the agent asks for something that the scenario does not say, tell the agent that you do not know.
- When what you want is done and you have been told what you wanted to hear, reply {Signal.STOP}
- When the agent says that it hands you over to a human, reply {Signal.TRANSFER}
- When you cannot go on because the scenario does not say enough, reply {Signal.OUT_OF_SCOPE}"""

# Calls are text, so that any endpoint serves, with a parser for calls or without.
TOOL_GUIDELINES = """You have functions of your own, listed below one a line: what you can see and do, on a phone say.
- When the agent asks you to look at something or to do something that a function does, call it instead of making up
  what you see. Call none that nobody asked for.
- A call is a message with nothing but <tool_call>{"name": NAME, "arguments": {...}}</tool_call>. Its result comes back
  to you alone as <tool_response>; call again, or tell the agent in your own words what came of it."""

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class UserModel(Protocol):
    """Who is asked: an EndpointExpert, or a recorded one. Prices are of input and output."""

    model: str
    usd_per_million_tokens: tuple[float, float]

    def bound_of(self, messages: Sequence[Mapping[str, str]]) -> ExpertBound: ...

    async def complete(self, messages: Sequence[Mapping[str, str]]) -> ExpertReply: ...


class ModelUser:
    """A model behind an OpenAI-compatible endpoint plays the user; the endpoint's account pays.

    With functions it is asked again behind each call; after MAX_CALLS_A_TURN calls it gives up as OUT_OF_SCOPE. Each
    reply is charged as tool USER, the bill of the experiment and not of the policy (tools/ledger.py).
    """

    def __init__(self, endpoint: UserModel, guidelines: str = GUIDELINES):
        self._endpoint, self._guidelines = endpoint, guidelines

    async def reply(
        self,
        scenario: UserScenario,
        said: Sequence[Message],
        tools: UserTools | None = None,
        charge: Charge = charge_nobody,
    ) -> UserReply:
        for _ in range(MAX_CALLS_A_TURN):
            reply = await self._ask(self._messages(scenario, said, tools), charge)
            if reply.status != CallStatus.OK:
                return UserReply("", status=reply.status, reason=reply.reason)
            text = reply.text.rsplit("</think>", 1)[-1].strip()
            if tools is None or (match := _CALL.search(text)) is None:
                signal = next((each for each in Signal if each and each in text), Signal.NONE)
                return UserReply(text.replace(signal, "").strip() if signal else text, signal)
            tools.run(_read_call(match[1]), len(said))
        return UserReply("", Signal.OUT_OF_SCOPE)

    async def _ask(self, messages: Sequence[Mapping[str, str]], charge: Charge) -> ExpertReply:
        start_s = time.monotonic()
        prices = self._endpoint.usd_per_million_tokens
        try:
            reply = await self._endpoint.complete(messages)
        except asyncio.CancelledError:  # the tool's deadline: the most that it can have cost, as the account has it
            most = self._endpoint.bound_of(messages)
            cut = ExpertReply(
                "",
                most.input_tokens,
                most.output_tokens,
                time.monotonic() - start_s,
                CallStatus.TIMEOUT,
                Reason.DEADLINE,
                is_estimated=True,
            )
            charge(receipt_of(cut, USER, self._endpoint.model, prices))
            raise
        charge(receipt_of(reply, USER, self._endpoint.model, prices))
        return reply

    def _messages(
        self, scenario: UserScenario, said: Sequence[Message], tools: UserTools | None
    ) -> list[dict[str, str]]:
        """The conversation as the model that plays the user sees it, its own calls among what was said."""
        system = f"{self._guidelines}\n\n{render_scenario(scenario)}"
        if tools is not None:
            system += "\n\n" + "\n".join([TOOL_GUIDELINES, *(json.dumps(each["function"]) for each in tools.schemas)])
        messages = [{"role": "system", "content": system}]
        if said[0].role == "user":  # endpoints want a conversation to be opened by the other side
            messages.append({"role": "user", "content": "Hello, what can I do for you?"})
        roles = {"assistant": "user", "user": "assistant"}  # for the model that plays it, the user is itself
        calls = tools.calls if tools is not None else []
        for number, message in enumerate(said, start=1):
            messages.append({"role": roles[message.role], "content": message.content})
            for made in (each for each in calls if each.num_said == number):
                spelled = json.dumps({"name": made.call.name, "arguments": made.call.arguments}, ensure_ascii=False)
                messages.append({"role": "assistant", "content": f"<tool_call>{spelled}</tool_call>"})
                messages.append({"role": "user", "content": f"<tool_response>{made.result}</tool_response>"})
        return messages


def _read_call(text: str) -> ToolCall:
    """The call between the tags; one that is none has its `error`."""
    try:
        read = json.loads(text)
    except ValueError:
        read = None
    if not isinstance(read, dict) or not isinstance(read.get("name"), str):
        return ToolCall(text.strip(), {}, "a call is one JSON object with a name and arguments")
    arguments = read.get("arguments") or {}
    if not isinstance(arguments, dict):
        return ToolCall(read["name"], {}, "the arguments of a call are a JSON object")
    return ToolCall(read["name"], arguments)


def render_scenario(scenario: UserScenario) -> str:
    """The scenario as text for whoever plays it; parts that are empty are left out."""
    parts = {
        "Who you are": scenario.persona,
        "Why you call": scenario.reason_for_call,
        "What you know": scenario.known_info,
        "What you do not know": scenario.unknown_info,
        "How you behave": scenario.task_instructions,
    }
    return "\n".join(["<scenario>", *(f"{name}: {text}" for name, text in parts.items() if text), "</scenario>"])
