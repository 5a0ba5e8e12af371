"""What the toolbox refuses and why, budgets, retries under limits, and many calls at once."""

import asyncio
import dataclasses
import json
import time

import pytest

from orchestra_jax.data.records import Budget, Instance, Preference, Task
from orchestra_jax.tools.budget import Allowance, Quote
from orchestra_jax.tools.ledger import ORCHESTRATOR, make_receipt, replay
from orchestra_jax.tools.limits import Limits
from orchestra_jax.tools.tool import Evidence, ToolContext, ToolResult
from orchestra_jax.tools.toolbox import MAX_ARGUMENT_CHARS, MAX_MESSAGE_CHARS, Toolbox
from orchestra_jax.types import CallStatus, Reason, ToolCall

TASK = Task("t", "geography", "one_hop", "", "", "search")
CONTEXT = ToolContext(Instance("i", TASK, Preference("any", "", {}), (), 0), 0, Evidence())
SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string", "maxLength": 20}, "work_s": {"type": "number"}},
    "required": ["text"],
    "additionalProperties": False,
}


class Worker:
    """Fails as often as it is told to; each attempt costs a cent and a second."""

    name, description, parameters_schema = "work", "Works.", SCHEMA

    def __init__(self, num_failures=0, quote=None):
        self.left, self.num_under_way, self.peak, self.quoted = num_failures, 0, 0, quote or Quote(0.01, 1.0)

    def quote(self, arguments, context):
        return self.quoted

    async def run(self, arguments, context):
        self.num_under_way += 1
        self.peak = max(self.peak, self.num_under_way)
        await asyncio.sleep(arguments.get("work_s", 0.0))
        self.num_under_way -= 1
        status, reason = CallStatus.OK, Reason.NONE
        if self.left:
            self.left, status, reason = self.left - 1, CallStatus.FAILED, Reason.SERVER_ERROR
        receipt = make_receipt("work", service_s=1.0, fixed_cost_usd=0.01, status=status, reason=reason)
        return ToolResult("done", "done", receipt, status)


def call(box, arguments, name="work", error="", context=CONTEXT):
    return asyncio.run(box.call(ToolCall(name, arguments, error), context))


@pytest.mark.parametrize(
    ("name", "arguments", "error", "reason"),
    [
        ("rest", {"text": "a"}, "", Reason.UNKNOWN_TOOL),
        ("x" * 5000, {}, "", Reason.UNKNOWN_TOOL),
        ("", {}, "The call is not valid JSON: Expecting value.", Reason.NOT_JSON),
        ("work", {}, "", Reason.WRONG_ARGUMENTS),
        ("work", {"text": 7}, "", Reason.WRONG_ARGUMENTS),
        ("work", {"text": ["x" * 4000]}, "", Reason.WRONG_ARGUMENTS),
        ("work", {"text": "a", "why": "x" * 4000}, "", Reason.EXTRA_FIELDS),
        ("work", {"text": "x" * 21}, "", Reason.TOO_LONG),
        ("work", {"text": "x" * (MAX_ARGUMENT_CHARS + 1)}, "", Reason.TOO_LONG),
    ],
)
def test_bad_input_is_one_short_message_and_the_receipt_says_which(name, arguments, error, reason):
    result = call(Toolbox([Worker()], 5.0), arguments, name, error)
    assert (result.status, result.receipt.status, result.receipt.reason) == ("refused", "refused", reason)
    assert 0 < len(result.text) <= MAX_MESSAGE_CHARS and "\n" not in result.text and len(result.receipt.tool) <= 40
    assert (result.receipt.cost_usd, result.receipt.attempt) == (0.0, 0)


def test_retries_are_one_receipt_with_the_cost_and_the_time_of_all_attempts():
    box = Toolbox([Worker(2)], 5.0, {"work": Limits(5.0, max_attempts=3, first_wait_s=0.01)})
    receipt = call(box, {"text": "a"}).receipt
    assert (receipt.status, receipt.attempt, receipt.service_s) == (CallStatus.OK, 3, 1.0)
    assert receipt.cost_usd == pytest.approx(0.03) and 2.0 < receipt.retry_s < 2.5
    used_up = call(Toolbox([Worker(9)], 5.0, {"work": Limits(5.0, max_attempts=2, first_wait_s=0.01)}), {"text": "a"})
    assert (used_up.status, used_up.receipt.attempt, used_up.receipt.cost_usd) == (CallStatus.FAILED, 2, 0.02)


@pytest.mark.parametrize("has_limits", [False, True])
def test_a_late_call_is_charged_the_most_that_it_can_have_cost(has_limits):
    limits = {"work": Limits(0.1)} if has_limits else {}
    result = call(Toolbox([Worker()], 0.1, limits), {"text": "a", "work_s": 30})
    receipt = result.receipt
    assert (result.status, receipt.reason, receipt.attempt) == (CallStatus.TIMEOUT, Reason.DEADLINE, 1)
    assert receipt.cost_usd == 0.01 and receipt.is_estimated
    assert receipt.service_s == pytest.approx(0.1, abs=0.09)


def with_budget(cost_usd, latency_s, spent_usd=0.0, spent_s=0.0):
    totals = replay([[make_receipt(ORCHESTRATOR, service_s=spent_s, fixed_cost_usd=spent_usd)]])
    return dataclasses.replace(CONTEXT, allowance=Allowance(Budget(cost_usd, latency_s), totals))


def test_what_cannot_be_paid_is_refused_and_calls_of_a_turn_share_the_money():
    tool = Worker()
    context = with_budget(0.025, 60.0)

    async def turn():
        box = Toolbox([tool], 5.0)
        return await asyncio.gather(*(box.call(ToolCall("work", {"text": "a"}), context) for _ in range(3)))

    results = asyncio.run(turn())
    assert [result.receipt.reason for result in results] == [Reason.NONE, Reason.NONE, Reason.OVER_BUDGET]
    assert results[2].text == "refused: this can cost $0.0100 and the budget has $0.0050 left; choose something cheaper"
    assert call(Toolbox([tool], 5.0), {"text": "a"}, context=with_budget(1.0, 60.0, spent_s=59.5)).text == (
        "refused: this takes 1 s and the budget has 0.5 s left"
    )


@pytest.mark.parametrize(("budget_usd", "attempts"), [(0.015, 1), (0.025, 2), (0.10, 3)])
def test_an_attempt_that_the_budget_cannot_pay_is_not_made(budget_usd, attempts):
    """Each attempt costs $.01, those that fail too."""
    box = Toolbox([Worker(9)], 5.0, {"work": Limits(5.0, max_attempts=3, first_wait_s=0.001)})
    receipt = call(box, {"text": "a"}, context=with_budget(budget_usd, 60.0)).receipt
    assert (receipt.status, receipt.attempt) == (CallStatus.FAILED, attempts)
    assert receipt.cost_usd == pytest.approx(0.01 * attempts) and receipt.cost_usd <= budget_usd


def test_a_call_that_outlasts_the_seconds_of_the_budget_is_cut():
    tool = Worker(quote=Quote(0.01))  # does not know how long it takes
    result = call(Toolbox([tool], 20.0), {"text": "a", "work_s": 30}, context=with_budget(1.0, 0.2))
    assert (result.status, result.receipt.reason) == (CallStatus.TIMEOUT, Reason.OVER_BUDGET)
    assert result.text == "work gave no result within the 0.2 s of the budget"


def test_a_modelled_time_is_not_measured_against_the_wall_clock():
    tool = Worker(quote=Quote(0.01, 0.05))
    result = call(Toolbox([tool], 20.0), {"text": "a", "work_s": 0.2}, context=with_budget(1.0, 0.1))
    assert (result.status, result.receipt.service_s) == (CallStatus.OK, 1.0)


@pytest.mark.parametrize("has_limits", [False, True])
def test_1000_calls_at_once(has_limits):
    tool = Worker()
    box = Toolbox([tool], 60.0, {"work": Limits(60.0, max_concurrent=50)} if has_limits else {})

    async def go():
        calls = [ToolCall("work", {"text": "a", "work_s": 0.01})] * 1000
        return await asyncio.gather(*(box.call(call, CONTEXT) for call in calls))

    start_s = time.process_time()
    results = asyncio.run(go())
    assert time.process_time() - start_s < 2.0  # 200 microseconds a call would be 0.2
    assert len(results) == 1000 and all(result.status == CallStatus.OK for result in results)
    assert tool.peak == (50 if has_limits else 1000)


def test_limits_of_no_tool_are_named():
    with pytest.raises(ValueError, match=r"limits are given for \['rest'\], which are no tools"):
        Toolbox([Worker()], 5.0, {"rest": Limits(1.0)})


def test_a_message_never_repeats_a_long_value():
    result = call(Toolbox([Worker()], 5.0), {"text": "secret " * 1000})
    assert "secret" not in result.text and json.dumps(result.text)
