"""Users that have functions of their own: what they call, what the model that plays them sees, when they give up."""

import asyncio
import json

import pytest

from orchestra_jax.data.records import Instance
from orchestra_jax.environments.functions.function import FunctionBroken
from orchestra_jax.environments.functions.function_calling import FunctionCalling, FunctionSettings
from orchestra_jax.environments.functions.task import UserScenario
from orchestra_jax.environments.functions.tools import TellUser
from orchestra_jax.environments.functions.user import MAX_CALLS_A_TURN, ModelUser, ScriptedUser, UserCall
from orchestra_jax.experts.endpoint import EndpointExpert
from orchestra_jax.tools.tool import Evidence, ToolContext
from orchestra_jax.types import CallStatus, Message, ToolCall
from tests.environments.functions.small_domain import make_domain
from tests.environments.functions.test_function_calling import PREFERENCE, TASK
from tests.experts.conftest import completion, endpoint  # noqa: F401

SCENARIO = UserScenario(reason_for_call="My lamp is dark.", facts={"name": "Ada"})


class Lamp:
    """A `UserTools`: one lamp, with a switch and a dimmer."""

    schemas = [
        {"type": "function", "function": {"name": name, "description": name, "parameters": {"type": "object"}}}
        for name in ("switch", "dim")
    ]

    def __init__(self, is_broken=False):
        self.calls, self.is_on, self.is_broken = [], False, is_broken

    def run(self, call, num_said):
        if self.is_broken:
            raise FunctionBroken("the fuse is gone")
        if call.name == "switch":
            self.is_on = not self.is_on
        result = f"Error: {call.error}" if call.error else f"{call.name} {call.arguments}: {self.is_on}"
        self.calls.append(UserCall(num_said, call, result))
        return result


def said(*texts):
    """A conversation that the user opens, in turns."""
    return [Message("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]


def reply(user, conversation, tools):
    return asyncio.run(user.reply(SCENARIO, conversation, tools))


def test_the_scripted_user_makes_the_calls_that_are_spelled():
    lamp = Lamp()
    text = 'Please switch() it, then dim({"level": 3, "of": "f(x)"}). Do not switch off or explode().'
    answer = reply(ScriptedUser(), said("My lamp is dark.", text), lamp)
    assert answer.text == "switch {}: True\ndim {'level': 3, 'of': 'f(x)'}: True" and not answer.signal
    assert [each.call for each in lamp.calls] == [
        ToolCall("switch", {}),
        ToolCall("dim", {"level": 3, "of": "f(x)"}),
    ]
    assert (
        reply(ScriptedUser(), said("My lamp is dark.", "dim(3) or dim({]) or switch({}"), lamp).signal == "###STOP###"
    )
    assert reply(ScriptedUser(), said("My lamp is dark.", "What is your name?"), lamp).text == "My name is Ada."
    assert reply(ScriptedUser(), said("My lamp is dark.", "switch()"), None).signal == "###STOP###"
    assert len(lamp.calls) == 2


def test_the_model_sees_its_calls_where_it_made_them(endpoint, completion):  # noqa: F811
    answers = iter(['<think>hm</think><tool_call>{"name": "switch"}</tool_call>', "It is on.", "Fine. ###STOP###"])
    endpoint.respond = lambda body: completion(next(answers))
    user, lamp = ModelUser(EndpointExpert(endpoint.url, "m", timeout_s=120)), Lamp()
    conversation = said("My lamp is dark.", "Switch it on.")
    assert reply(user, conversation, lamp).text == "It is on."
    conversation += said("It is on.", "Good?")
    last = reply(user, conversation, lamp)
    assert (last.text, last.signal) == ("Fine.", "###STOP###")
    first, second, third = (body["messages"] for _, _, body in endpoint.requests)
    assert json.dumps(Lamp.schemas[1]["function"]) in first[0]["content"]
    call = [
        {"role": "assistant", "content": '<tool_call>{"name": "switch", "arguments": {}}</tool_call>'},
        {"role": "user", "content": "<tool_response>switch {}: True</tool_response>"},
    ]
    assert second == first + call
    assert [each["content"] for each in third[-5:]] == [
        "Switch it on.",
        *(each["content"] for each in call),
        "It is on.",
        "Good?",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("switch", "Error: a call is one JSON object with a name and arguments"),
        ("[1]", "Error: a call is one JSON object with a name and arguments"),
        ('{"name": "dim", "arguments": 3}', "Error: the arguments of a call are a JSON object"),
    ],
)
def test_a_call_that_is_none_is_answered_with_what_is_wrong(endpoint, completion, text, told):  # noqa: F811
    answers = iter([f"<tool_call>{text}</tool_call>", "Sorry?"])
    endpoint.respond = lambda body: completion(next(answers))
    lamp = Lamp()
    assert reply(ModelUser(EndpointExpert(endpoint.url, "m", timeout_s=120)), said("A.", "B."), lamp).text == "Sorry?"
    assert [each.result for each in lamp.calls] == [told]


def test_a_user_that_calls_without_end_gives_up(endpoint, completion):  # noqa: F811
    endpoint.respond = lambda body: completion('<tool_call>{"name": "switch"}</tool_call>')
    lamp = Lamp()
    answer = reply(ModelUser(EndpointExpert(endpoint.url, "m", timeout_s=120)), said("A.", "B."), lamp)
    assert answer.signal == "###OUT-OF-SCOPE###" and len(lamp.calls) == MAX_CALLS_A_TURN


def test_a_broken_function_of_the_user_is_a_failure_of_infrastructure():
    domain = make_domain()
    environment = FunctionCalling({domain.name: domain}, ScriptedUser(), FunctionSettings(False, 5))
    instance = Instance(TASK.task_id, TASK, PREFERENCE, (), seed=0)
    session = environment.open(instance)
    session.user_tools = Lamp(is_broken=True)
    context = ToolContext(instance, 0, Evidence(), state=session)
    result = asyncio.run(TellUser(ScriptedUser()).run({"text": "switch()"}, context))
    assert (result.status, result.receipt.reason) == (CallStatus.FAILED, "broken_function")
    assert result.text == "the user's function is broken: the fuse is gone"
