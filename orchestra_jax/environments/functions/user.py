"""Who the policy talks to: a user by script, or one that a model plays.

Both are handed the scenario and what was said so far, and hold no state. A reply may carry a signal that ends the
conversation: the wish is met (STOP), the policy hands over to a human (TRANSFER), or the scenario does not say what the
policy asks for (OUT_OF_SCOPE). The signals are those of tau2-bench.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Sequence
from typing import Protocol

from orchestra_jax.environments.functions.task import UserScenario
from orchestra_jax.experts.endpoint import EndpointExpert
from orchestra_jax.types import CallStatus, Message, Reason

MAX_UNANSWERED = 2  # questions in a row that the script has no answer to


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


class User(Protocol):
    async def reply(self, scenario: UserScenario, said: Sequence[Message]) -> UserReply:
        """`said` in order, the policy's messages with role "assistant", the user's own with "user"; the last is the
        policy's."""
        ...


_TRANSFER = re.compile(r"\b(transfer\w*|hand\w* (you )?over)\b.*\b(human|agent|colleague|person)\b")
_CONFIRM = re.compile(
    r"\b(confirm|proceed|go ahead|shall i|should i|do you want|would you like|yes/no|correct\?|right\?)"
)


class ScriptedUser:
    """Deterministic. It says a fact when a question names its topic, says that it does not know where a question names
    an unknown topic, and agrees when it is asked to confirm. What is no question ends the conversation."""

    async def reply(self, scenario: UserScenario, said: Sequence[Message]) -> UserReply:
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


GUIDELINES = f"""You play a customer who talks to a service agent. Stay in the role that the scenario below describes.
- Write one short message at a time, as a person would, and nothing besides it.
- Say only what the scenario lets you know, and only when it is needed; do not tell all of it at once.
- Invent nothing. If the agent asks for something that the scenario does not say, tell the agent that you do not know.
- When what you want is done and you have been told what you wanted to hear, reply {Signal.STOP}
- When the agent says that it hands you over to a human, reply {Signal.TRANSFER}
- When you cannot go on because the scenario does not say enough, reply {Signal.OUT_OF_SCOPE}"""


class ModelUser:
    """A model behind an OpenAI-compatible endpoint plays the user; the endpoint's account pays."""

    def __init__(self, endpoint: EndpointExpert, guidelines: str = GUIDELINES):
        self._endpoint, self._guidelines = endpoint, guidelines

    async def reply(self, scenario: UserScenario, said: Sequence[Message]) -> UserReply:
        roles = {"assistant": "user", "user": "assistant"}  # for the model that plays it, the user is itself
        messages = [{"role": "system", "content": f"{self._guidelines}\n\n{render_scenario(scenario)}"}]
        if said[0].role == "user":  # endpoints want a conversation to be opened by the other side
            messages.append({"role": "user", "content": "Hello, what can I do for you?"})
        messages += [{"role": roles[message.role], "content": message.content} for message in said]
        reply = await self._endpoint.complete(messages)
        if reply.status != CallStatus.OK:
            return UserReply("", status=reply.status, reason=reply.reason)
        text = reply.text.rsplit("</think>", 1)[-1].strip()
        signal = next((each for each in Signal if each and each in text), Signal.NONE)
        return UserReply(text.replace(signal, "").strip() if signal else text, signal)


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
