"""Faults on demand: at their rates, the same every time, seen by the policy and by the ledger."""

import asyncio
import dataclasses

import pytest

from orchestra_jax.data.records import Instance, Offer, Preference, Task
from orchestra_jax.tools.budget import Quote
from orchestra_jax.tools.faults import FaultsConfig, FaultyTool
from orchestra_jax.tools.ledger import make_receipt
from orchestra_jax.tools.limits import Limits
from orchestra_jax.tools.tool import Evidence, ToolContext, ToolResult
from orchestra_jax.tools.toolbox import Toolbox
from orchestra_jax.types import CallStatus, Reason, ToolCall

OFFER = Offer("expert-1", "m", False, 2.0, 4.0, 1.0)
TASK = Task("t", "geography", "one_hop", "", "", "search")
INSTANCE = Instance("i", TASK, Preference("any", "", {}), (OFFER,), 0)


class Seller:
    """Charges 1,000 output tokens at the price that it is shown."""

    name, description, parameters_schema = "sell", "Sells.", {"type": "object"}

    async def run(self, arguments, context):
        price = context.instance.offers[0].output_usd_per_million_tokens
        receipt = make_receipt("sell", service_s=2.0, output_tokens=1000, output_usd_per_million_tokens=price)
        return ToolResult("sold", "sold", receipt, evidence=Evidence(text="x"), answer="yes")

    def quote(self, arguments, context):
        return Quote(context.instance.offers[0].output_usd_per_million_tokens / 1000)


def calls(config, num_calls=1, num_rollouts=400):
    """Results of the calls of each of many rollouts."""
    tool = FaultyTool(Seller(), config)

    async def go():
        return [
            [
                await tool.run({}, ToolContext(INSTANCE, rollout, Evidence(), call_number=number))
                for number in range(num_calls)
            ]
            for rollout in range(num_rollouts)
        ]

    return asyncio.run(go())


def test_without_a_rate_nothing_changes():
    assert not FaultsConfig().is_on
    ((result,),) = calls(FaultsConfig(), num_rollouts=1)
    assert (result.text, result.answer, result.receipt.cost_usd) == ("sold", "yes", 0.004)


def test_faults_come_at_their_rates_and_the_same_every_time():
    config = FaultsConfig(fail_rate=0.3, busy_rate=0.2, slow_rate=0.25)
    results = [row[0] for row in calls(config)]
    assert results == [row[0] for row in calls(config)]
    assert results != [row[0] for row in calls(dataclasses.replace(config, seed=1))]
    busy = [each for each in results if each.receipt.reason == Reason.RATE_LIMITED]
    failed = [each for each in results if each.receipt.reason == Reason.INJECTED]
    slow = [each for each in results if each.receipt.service_s == 8.0]
    assert 0.2 == pytest.approx(len(busy) / 400, abs=0.06)
    assert 0.3 * 0.8 == pytest.approx(len(failed) / 400, abs=0.06)
    assert 0.25 * 0.8 == pytest.approx(len(slow) / 400, abs=0.06)
    assert all(each.status == CallStatus.FAILED and each.answer is None for each in (*busy, *failed))
    assert all(each.receipt.cost_usd == 0.0 for each in busy)
    assert all(each.receipt.cost_usd == 0.004 and each.evidence == Evidence() for each in failed)  # the work was done


def test_a_price_change_is_announced_once_and_holds():
    rows = calls(FaultsConfig(price_change_rate=0.3), num_calls=4)
    for row in rows:
        prices = [each.receipt.cost_usd for each in row]
        told = ["prices are now times 3" in each.text and "times 3" in each.summary for each in row]
        assert prices[0] == 0.004 and sum(told) <= 1
        first = told.index(True) if any(told) else 4
        assert prices == pytest.approx([0.004 if number <= first else 0.012 for number in range(4)])
    assert sum(any("times 3" in each.text for each in row) for row in rows) / 400 == pytest.approx(1 - 0.7**4, abs=0.07)


def test_a_quote_knows_the_present_price():
    tool = FaultyTool(Seller(), FaultsConfig(price_change_rate=1.0))
    first, second = (ToolContext(INSTANCE, 0, Evidence(), call_number=number) for number in (0, 1))
    assert (tool.quote({}, first), tool.quote({}, second)) == (Quote(0.004), Quote(0.012))


def test_another_attempt_is_another_draw_and_the_receipt_counts_both():
    box = Toolbox(
        [FaultyTool(Seller(), FaultsConfig(fail_rate=0.5))], 5.0,
        {"sell": Limits(5.0, max_attempts=8, first_wait_s=0.001)},
    )  # fmt: skip

    async def go():
        contexts = [ToolContext(INSTANCE, rollout, Evidence()) for rollout in range(60)]
        return await asyncio.gather(*(box.call(ToolCall("sell", {}), context) for context in contexts))

    results = asyncio.run(go())
    assert sum(result.status == CallStatus.OK for result in results) >= 58
    for receipt in (result.receipt for result in results):
        assert receipt.output_tokens == 1000 * receipt.attempt
        assert receipt.cost_usd == pytest.approx(0.004 * receipt.attempt)
        assert receipt.service_s == 2.0 and receipt.retry_s == pytest.approx(2.0 * (receipt.attempt - 1), abs=0.5)
    assert {1, 2} <= {result.receipt.attempt for result in results}


def test_an_impossible_rate_is_named():
    with pytest.raises(ValueError, match="faults.slow_rate must be within 0 and 1, got -0.1"):
        FaultyTool(Seller(), FaultsConfig(slow_rate=-0.1))
