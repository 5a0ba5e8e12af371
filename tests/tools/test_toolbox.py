"""The toolbox: what is refused, what is late, what is a bug."""

import asyncio
import re
import time

import pytest

from orchestra_jax.data.records import Instance, Preference, Task
from orchestra_jax.tools.ledger import JUDGE, ORCHESTRATOR, USER, make_receipt, replay_receipts, split_turns
from orchestra_jax.tools.tool import Evidence, ToolContext, ToolResult
from orchestra_jax.tools.toolbox import Toolbox
from orchestra_jax.types import CallStatus, Reason, ToolCall

TASK = Task("t/0", "geography", "one_hop", "Which?", "x", "search")
CONTEXT = ToolContext(Instance("i", TASK, Preference("any", "Any.", {}), (), 0), 0, Evidence())
SCHEMA = {
    "type": "object",
    "properties": {"wait_s": {"type": "number"}},
    "required": ["wait_s"],
    "additionalProperties": False,
}


class Sleeper:
    description = "Sleeps."
    parameters_schema = SCHEMA

    def __init__(self, name="sleep", error=None):
        self.name, self.error, self.num_runs = name, error, 0

    async def run(self, arguments, context):
        self.num_runs += 1
        await asyncio.sleep(arguments["wait_s"])
        if self.error:
            raise self.error
        return ToolResult("slept", "slept", make_receipt(self.name, service_s=arguments["wait_s"]))


def call(toolbox, name="sleep", arguments=None, error=""):
    arguments = {"wait_s": 0.0} if arguments is None else arguments
    return asyncio.run(toolbox.call(ToolCall(name, arguments, error), CONTEXT))


def test_a_valid_call_runs():
    result = call(Toolbox([Sleeper()], timeout_s=5.0))
    assert (result.text, result.status, result.receipt.tool) == ("slept", CallStatus.OK, "sleep")


@pytest.mark.parametrize(
    ("name", "arguments", "error", "told"),
    [
        ("rest", {"wait_s": 0}, "", "there is no tool 'rest'; the tools are sleep"),
        ("sleep", {}, "", "'wait_s' is a required property"),
        ("sleep", {"wait_s": "long"}, "", "'long' is not of type 'number'"),
        ("sleep", {"wait_s": 0, "why": 1}, "", "'why' was unexpected"),
        ("sleep", {"wait_s": 0}, "not JSON", "not JSON"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason_and_costs_nothing(name, arguments, error, told):
    tool = Sleeper()
    result = call(Toolbox([tool], timeout_s=5.0), name, arguments, error)
    assert result.status == result.receipt.status == CallStatus.REFUSED and told in result.text
    assert (tool.num_runs, result.receipt.cost_usd, result.receipt.service_s, result.answer) == (0, 0.0, 0.0, None)


def test_arguments_are_checked_once_for_each_tool_and_value():
    other = Sleeper("nap")
    other.parameters_schema = {"properties": {"wait_s": {"type": "string"}}}
    toolbox = Toolbox([Sleeper(), other], timeout_s=5.0)
    statuses = [call(toolbox, "nap", {"wait_s": value}).status for value in (0, 0)]
    assert statuses == [CallStatus.REFUSED] * 2 and call(toolbox, "sleep", {"wait_s": 0}).status == CallStatus.OK
    assert "is not of type" in call(toolbox, "sleep", {"wait_s": "0"}).text  # another value of the same look
    assert "is not of type" in call(toolbox, "sleep", {"wait_s": True}).text
    assert toolbox._check_arguments.cache_info().hits == 1


def test_a_late_tool_is_a_timeout_that_took_the_limit():
    start_s = time.monotonic()
    result = call(Toolbox([Sleeper()], timeout_s=0.05), arguments={"wait_s": 30})
    assert time.monotonic() - start_s < 5
    assert result.status == result.receipt.status == CallStatus.TIMEOUT
    assert (result.receipt.service_s, result.text) == (0.05, "sleep gave no result within 0.05 s")


def test_definitions_within_a_schema_hold_and_a_number_beyond_all_floats_is_refused():
    tool = Sleeper()
    tool.parameters_schema = {
        "properties": {"wait_s": {"$ref": "#/$defs/half"}},
        "$defs": {"half": {"type": "number", "multipleOf": 0.5}},
    }
    box = Toolbox([tool], 5.0)
    assert call(box, arguments={"wait_s": 0.0}).status == CallStatus.OK
    told = [call(box, arguments={"wait_s": wait_s}).text for wait_s in (0.3, 10**400)]
    assert told == ["sleep: 0.3 is not a multiple of 0.5", "sleep: a number in the arguments is too large"]


@pytest.mark.parametrize("name", [ORCHESTRATOR, JUDGE, USER])
def test_no_call_can_pass_for_one_of_the_ledgers_own_receipts(name):
    """Else a policy that writes the name opens a turn, or pays nothing."""
    receipt = call(Toolbox([Sleeper()], timeout_s=5.0), name).receipt
    assert (receipt.tool, receipt.reason) == (f"{name}?", Reason.UNKNOWN_TOOL)
    turn = make_receipt(ORCHESTRATOR, service_s=1.0)
    assert replay_receipts([turn, receipt]).num_calls == len(split_turns([turn, receipt])) == 1
    with pytest.raises(ValueError, match=f"'{name}'.* the ledger's own receipts: give the tools other ones"):
        Toolbox([Sleeper(name)], 1.0)


@pytest.mark.parametrize("error", [KeyError("bug"), TimeoutError("the tool's own")])
def test_a_bug_in_a_tool_is_an_exception(error):
    with pytest.raises(type(error)):
        call(Toolbox([Sleeper(error=error)], timeout_s=5.0))


def test_a_cancelled_call_is_cancelled_and_no_timeout():
    async def go():
        task = asyncio.create_task(Toolbox([Sleeper()], 5.0).call(ToolCall("sleep", {"wait_s": 30}), CONTEXT))
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(go())


def test_tools_are_checked_when_the_box_is_made():
    with pytest.raises(ValueError, match=r"different names, got \['sleep', 'sleep'\]"):
        Toolbox([Sleeper(), Sleeper()], 1.0)
    broken = Sleeper("broken")
    broken.parameters_schema = {"type": "objekt"}
    with pytest.raises(ValueError, match="'broken': parameters_schema is no JSON schema"):
        Toolbox([broken], 1.0)
    for reference in ("#/$defs/nothing", "http://127.0.0.1:9/schema.json"):
        broken.parameters_schema = {"properties": {"wait_s": {"anyOf": [{"$ref": reference}]}}}
        with pytest.raises(ValueError, match=f"'broken': parameters_schema refers to '{re.escape(reference)}'"):
            Toolbox([broken], 1.0)
    box = Toolbox([Sleeper("b"), Sleeper("a")], 1.0)
    assert box.names == ("b", "a") == tuple(tool.name for tool in box.tools)
