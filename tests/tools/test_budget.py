"""Budgets of a task and the account of a run, by hand."""

import concurrent.futures
import math
import random

import pytest

from orchestra_jax.data.records import Budget
from orchestra_jax.tools.budget import Account, Allowance, Quote, rest_text
from orchestra_jax.tools.ledger import ORCHESTRATOR, make_receipt, replay


def spent(cost_usd, latency_s):
    return replay([[make_receipt(ORCHESTRATOR, service_s=latency_s, fixed_cost_usd=cost_usd)]])


def test_calls_of_a_turn_share_the_money_and_run_side_by_side_in_time():
    allowance = Allowance(Budget(0.10, 60.0), spent(0.04, 20.0))
    assert allowance.admit(Quote(0.04, 40.0)) == ""
    assert allowance.admit(Quote(0.01, 40.0)) == ""  # not 80 s
    told = allowance.admit(Quote(0.02, 1.0))
    assert told == "refused: this can cost $0.0200 and the budget has $0.0100 left; choose something cheaper"
    assert allowance.admit(Quote(0.0, 41.0)) == "refused: this takes 41 s and the budget has 40.0 s left"
    assert allowance.admit(Quote(0.0, 0.0)) == ""


def test_with_nothing_left_even_a_call_without_a_price_is_refused():
    assert "$0.0000 left" in Allowance(Budget(cost_usd=0.10), spent(0.11, 5.0)).admit(Quote(0.0))
    assert "0.0 s left" in Allowance(Budget(latency_s=5.0), spent(0.0, 5.0)).admit(Quote(0.0))


def test_the_rest_is_told_for_the_limits_that_there_are():
    assert rest_text(Budget(), spent(1.0, 1.0)) == ""
    assert rest_text(Budget(cost_usd=0.10), spent(0.025, 1.0)) == "budget left $0.0750"
    assert rest_text(Budget(0.10, 60.0), spent(0.2, 15.5)) == "budget left $0.0000 44.5s"


def test_an_account_never_passes_its_cap_whatever_its_threads_do():
    account = Account(cap_usd=1.0)

    def spend(seed):
        rng = random.Random(seed)
        for _ in range(200):
            amount_usd = rng.uniform(0, 0.02)
            if account.reserve(amount_usd):
                account.settle(amount_usd, rng.uniform(0, amount_usd))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(spend, range(8)))
    assert 0.97 < account.spent_usd <= 1.0


def test_an_account_survives_a_resume_with_what_was_under_way():
    account = Account(1.0)
    assert account.reserve(0.5) and account.reserve(0.2)
    account.settle(0.5, 0.4)
    resumed = Account(1.0)
    resumed.set_state(account.get_state())
    assert resumed.spent_usd == pytest.approx(0.6)  # 0.4 paid, 0.2 reserved
    assert not resumed.reserve(0.41) and resumed.reserve(0.39)


def test_what_was_spent_behind_the_last_checkpoint_counts_after_a_kill(tmp_path):
    path = tmp_path / "run" / "spending.json"
    account = Account(1.0)
    account.keep_in(path)
    assert account.reserve(0.0) and not path.exists()  # nothing to tell
    checkpoint = account.get_state()
    assert account.reserve(0.5)
    account.settle(0.5, 0.4)
    assert account.reserve(0.2)  # and killed here
    resumed = Account(1.0)
    resumed.keep_in(path)
    resumed.set_state(checkpoint)
    assert resumed.spent_usd == pytest.approx(0.6)
    assert not resumed.reserve(0.41) and resumed.reserve(0.39)
    path.write_text("{}")
    with pytest.raises(ValueError, match="spending.json does not say what was spent"):
        Account(1.0).keep_in(path)


def test_what_is_free_is_never_refused_and_a_cap_of_zero_refuses_the_rest():
    account = Account(0.0)
    assert account.reserve(0.0) and not account.reserve(1e-9)
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="must be 0 dollars or more"):
            Account(wrong)
