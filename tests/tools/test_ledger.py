"""The ledger: prices by hand, the critical path, and the same totals from a trajectory's receipts."""

import json
import math
import random

import pytest

from orchestra_jax.run_directory import json_value
from orchestra_jax.tools.ledger import (
    JUDGE,
    ORCHESTRATOR,
    USER,
    Ledger,
    make_receipt,
    read_receipt,
    replay,
    replay_receipts,
    split_turns,
    token_cost_usd,
)
from orchestra_jax.types import CallStatus, Reason


def generation(service_s, output_tokens=1_000):
    return make_receipt(
        ORCHESTRATOR, service_s=service_s, output_tokens=output_tokens, output_usd_per_million_tokens=0.2
    )


def call(service_s, fixed_cost_usd=0.0, status=CallStatus.OK):
    return make_receipt("search", service_s=service_s, fixed_cost_usd=fixed_cost_usd, status=status)


def test_price_of_a_call_by_hand():
    # 2,000 tokens in at $1.25, 500 out at $10 per million, and half a cent per call.
    assert token_cost_usd(2_000, 500, 1.25, 10.0, 0.005) == pytest.approx(0.0025 + 0.005 + 0.005, rel=1e-12)
    assert token_cost_usd(1_000_000, 0, 3.0, 10.0, 0.0) == 3.0


@pytest.mark.parametrize("wrong", [(-1, 0, 1.0, 1.0, 0.0), (1, 0, -1.0, 1.0, 0.0), (1, 0, 1.0, math.nan, 0.0)])
def test_price_refuses_negative_and_nan(wrong):
    with pytest.raises(ValueError, match="finite and 0 or more"):
        token_cost_usd(*wrong)


def test_receipt_carries_what_the_charge_follows_from():
    receipt = make_receipt(
        "answer",
        service_s=4.0,
        alias="answer-1",
        model="some-model",
        input_tokens=100,
        output_tokens=50,
        input_usd_per_million_tokens=2.0,
        output_usd_per_million_tokens=8.0,
        fixed_cost_usd=0.001,
    )
    assert receipt.cost_usd == pytest.approx(0.001 + 0.0002 + 0.0004, rel=1e-12)
    assert (receipt.tool, receipt.alias, receipt.model) == ("answer", "answer-1", "some-model")
    assert (receipt.input_tokens, receipt.output_tokens, receipt.service_s) == (100, 50, 4.0)
    with pytest.raises(ValueError, match="service_s -1"):
        make_receipt("answer", service_s=-1)


def test_latency_is_the_critical_path():
    ledger = Ledger()
    charges = [generation(1.0), call(5.0, 0.01), call(3.0, 0.02), generation(0.5), generation(2.0), call(4.0, 0.03)]
    for receipt in charges:
        ledger.charge(receipt)
    totals = ledger.totals()
    assert totals.latency_s == (1.0 + 5.0) + 0.5 + (2.0 + 4.0)
    assert totals.service_s == 15.5
    assert totals.cost_usd == pytest.approx(0.06 + 3 * 0.0002, rel=1e-12)
    assert (totals.num_turns, totals.num_calls, totals.output_tokens) == (3, 3, 3_000)


def test_totals_grow_with_every_charge():
    ledger = Ledger()
    assert ledger.totals().cost_usd == ledger.totals().latency_s == 0
    ledger.charge(generation(1.0))
    ledger.charge(call(5.0, 0.01))
    before = ledger.totals()
    ledger.charge(call(3.0, 0.02))  # hidden behind the longer call, but not free
    after = ledger.totals()
    assert after.latency_s == before.latency_s == 6.0
    assert after.cost_usd == pytest.approx(before.cost_usd + 0.02, rel=1e-12)


@pytest.mark.parametrize("status", [CallStatus.FAILED, CallStatus.TIMEOUT, CallStatus.REFUSED])
def test_failing_is_not_free(status):
    failed, fine = (replay([[generation(1.0), call(7.0, 0.05, outcome)]]) for outcome in (status, CallStatus.OK))
    assert (failed.cost_usd, failed.latency_s) == (fine.cost_usd, fine.latency_s)
    assert (failed.num_calls_not_ok, fine.num_calls_not_ok) == (1, 0)


def test_replay_of_the_receipts_gives_the_same_totals_in_any_order_of_completion():
    rng = random.Random(0)
    turns = [
        [generation(rng.random(), rng.randrange(500)), *(call(rng.random(), rng.random() * 10**-k) for k in range(6))]
        for _ in range(20)
    ]
    ledger = Ledger()
    for turn in turns:
        for receipt in turn:
            ledger.charge(receipt)
    totals = ledger.totals()
    assert replay(split_turns(ledger.receipts)) == totals
    for _ in range(5):
        shuffled = [[turn[0], *rng.sample(turn[1:], 6)] for turn in turns]
        assert shuffled != turns and replay(shuffled) == totals
    by_hand_s = sum(turn[0].service_s + max(receipt.service_s for receipt in turn[1:]) for turn in turns)
    assert totals.latency_s == pytest.approx(by_hand_s, rel=1e-12)


def test_sums_are_exact():
    # Ten dimes added one by one make 0.9999999999999999.
    totals = replay([[make_receipt(ORCHESTRATOR, service_s=0.1, fixed_cost_usd=0.1)]] * 10)
    assert totals.cost_usd == totals.latency_s == totals.service_s == 1.0


def test_a_call_outside_any_turn_is_an_error():
    with pytest.raises(AssertionError, match="'search' stands before the first turn"):
        Ledger().charge(call(1.0))
    with pytest.raises(AssertionError, match="before the first turn"):
        split_turns([call(1.0)])
    with pytest.raises(AssertionError, match="a turn begins with"):
        replay([[call(1.0)]])


def test_time_in_three_parts_and_what_of_it_the_user_waits():
    retried = make_receipt("answer", service_s=4.0, retry_s=3.0, queue_s=9.0, attempt=2)
    totals = replay([[generation(1.0), retried, call(6.0)]])
    assert totals.latency_s == 1.0 + 7.0  # the queue is ours, and depends on how many episodes run
    assert (totals.service_s, totals.retry_s, totals.queue_s) == (11.0, 3.0, 9.0)
    with pytest.raises(ValueError, match="queue_s nan of a call of 'x'"):
        make_receipt("x", service_s=0.0, queue_s=math.nan)


def test_judge_and_user_are_charged_and_are_no_part_of_the_episode():
    ledger = Ledger()
    judged = make_receipt(JUDGE, service_s=30.0, fixed_cost_usd=0.5)
    played = make_receipt(USER, service_s=20.0, fixed_cost_usd=0.25)
    for receipt in (played, generation(1.0), played, call(5.0, 0.01), judged):
        ledger.charge(receipt)
    totals = ledger.totals()
    assert (totals.judge_cost_usd, totals.user_cost_usd) == (0.5, 0.5)
    assert (totals.latency_s, totals.service_s, totals.num_calls) == (6.0, 6.0, 1)
    assert totals.cost_usd == pytest.approx(0.01 + 0.0002)
    assert [len(turn) for turn in split_turns(ledger.receipts)] == [2]


def test_receipts_read_back_from_json_replay_to_the_same_totals():
    rng = random.Random(1)
    receipts = [generation(rng.random())]
    for _ in range(30):
        receipts.append(
            make_receipt(
                "answer", service_s=rng.random(), retry_s=rng.random(), queue_s=rng.random(), alias="expert-1",
                input_tokens=rng.randrange(9999), input_usd_per_million_tokens=rng.random(), attempt=3,
                status=CallStatus.FAILED, reason=Reason.SERVER_ERROR, is_cache_hit=True, is_estimated=True,
            )
        )  # fmt: skip
    written = json.loads(json.dumps(json_value(receipts, "receipts")))
    read = [read_receipt(fields) for fields in written]
    assert read == receipts and replay_receipts(read) == replay_receipts(receipts)
