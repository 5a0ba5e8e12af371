"""Concurrency, rate, retries and the deadline of one endpoint, with limits below a second."""

import asyncio
import threading
import time

import pytest

from orchestra_jax.tools.limits import Attempt, Limiter, Limits


def scripted(*answers, work_s=0.0):
    """Attempts that are retryable until the last answer: (value, is_retryable, retry_after_s)."""
    left = iter(answers)

    async def attempt():
        await asyncio.sleep(work_s)
        return Attempt(*next(left))

    return attempt


def run(limits, attempt):
    return asyncio.run(Limiter(limits).run(attempt))


def test_one_good_attempt_is_the_whole_call():
    outcome = run(Limits(5.0, max_attempts=3), scripted(("a", False), work_s=0.05))
    assert (outcome.values, outcome.num_attempts, outcome.is_late) == (["a"], 1, False)
    assert outcome.retry_s == outcome.wait_s == 0.0 and 0.05 <= outcome.service_s < 1


def test_time_falls_into_service_and_retry():
    attempt = scripted(("a", True), ("b", True), ("c", False), work_s=0.1)
    outcome = run(Limits(5.0, max_attempts=3, first_wait_s=0.1), attempt)
    assert (outcome.values, outcome.num_attempts) == (["a", "b", "c"], 3)
    assert 0.05 + 0.1 <= outcome.wait_s <= 0.1 + 0.2  # each wait within half and all of 0.1 and 0.2
    assert outcome.retry_s == pytest.approx(outcome.wait_s + 0.2, abs=0.1)
    assert outcome.service_s == pytest.approx(0.1, abs=0.09)


def test_attempts_end_when_they_are_used_up_or_a_wait_would_pass_the_deadline():
    outcome = run(Limits(5.0, max_attempts=2, first_wait_s=0.01), scripted(*[("a", True)] * 9))
    assert (outcome.num_attempts, outcome.is_late) == (2, False)
    start_s = time.monotonic()
    outcome = run(Limits(0.5, max_attempts=9), scripted(("a", True, 30.0), ("b", False)))
    assert (outcome.values, time.monotonic() - start_s < 0.4) == (["a"], True)


def test_the_deadline_cuts_an_attempt_and_a_queue():
    outcome = run(Limits(0.1), scripted(("a", False), work_s=30))
    assert (outcome.values, outcome.is_late, outcome.num_attempts) == ([], True, 1)
    assert outcome.service_s == pytest.approx(0.1, abs=0.09)

    async def go():
        limiter = Limiter(Limits(0.4, max_concurrent=1))
        first = asyncio.create_task(limiter.run(scripted(("a", False), work_s=30)))
        await asyncio.sleep(0.01)
        return await limiter.run(scripted(("b", False)), timeout_s=0.15), await first

    queued, _ = asyncio.run(go())
    assert (queued.is_late, queued.num_attempts, queued.service_s) == (True, 0, 0.0) and queued.queue_s > 0.1


def test_a_pause_that_a_server_asks_for_holds_for_every_call():
    async def go():
        limiter = Limiter(Limits(5.0, max_attempts=2, first_wait_s=0.01))
        busy = asyncio.create_task(limiter.run(scripted(("busy", True, 0.3), ("ok", False))))
        await asyncio.sleep(0.05)
        return await limiter.run(scripted(("other", False))), await busy

    other, busy = asyncio.run(go())
    assert other.queue_s > 0.15 and busy.values == ["busy", "ok"] and busy.wait_s >= 0.3


def test_concurrency_holds_in_one_loop_after_another_and_with_1000_calls():
    limiter = Limiter(Limits(60.0, max_concurrent=8))
    peak = under_way = 0

    async def attempt():
        nonlocal peak, under_way
        under_way += 1
        peak = max(peak, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return Attempt("x", False)

    async def go():
        return await asyncio.gather(*(limiter.run(attempt) for _ in range(1000)))

    for _ in range(2):
        assert len(asyncio.run(go())) == 1000
    assert peak == 8


def test_threads_share_the_rate():
    limiter = Limiter(Limits(60.0, calls_per_s=100))
    starts = []

    async def attempt():
        starts.append(time.monotonic())
        return Attempt("x", False)

    def work():
        async def go():
            for _ in range(10):
                await limiter.run(attempt)

        asyncio.run(go())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(starts) == 30 and max(starts) - min(starts) >= 29 / 100 * 0.95


def test_a_bug_stays_an_exception():
    async def broken():
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        run(Limits(5.0), broken)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"timeout_s": 0.0}, "timeout_s must be positive"),
        ({"timeout_s": 1.0, "max_attempts": 0}, "max_attempts must be at least 1"),
        ({"timeout_s": 1.0, "max_concurrent": -1}, "max_concurrent must be 0 or more"),
        ({"timeout_s": 1.0, "calls_per_s": float("nan")}, "calls_per_s must be 0 or more"),
    ],
)
def test_impossible_limits_are_named(wrong, told):
    with pytest.raises(ValueError, match=told):
        Limits(**wrong)
