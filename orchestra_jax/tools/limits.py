"""Limits of calls to one endpoint or tool: how many at once, how many a second, how often again, and until when.

    wait behind attempt n = max(uniform(1/2, 1) * min(longest_wait_s, first_wait_s * 2^(n - 1)), what the server asks)

The deadline covers everything: the queue, all attempts, and the waits between them. A server that asks for a pause
(Retry-After) gets it from every call behind this limiter. A limiter serves one event loop after another, as a run does
that opens one for each training step; the rate goes on from loop to loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Limits:
    """ValueError for a limit under which no call can run."""

    timeout_s: float  # of a call, queue, retries and waits included
    max_concurrent: int = 0  # 0: as many as come
    calls_per_s: float = 0.0  # evenly spaced attempts; 0: as fast as they come
    max_attempts: int = 1
    first_wait_s: float = 0.5
    longest_wait_s: float = 20.0

    def __post_init__(self):
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {self.timeout_s}")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")
        for name in ("max_concurrent", "calls_per_s", "first_wait_s", "longest_wait_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Attempt(Generic[Value]):
    """What one attempt came to, and whether another one may do better."""

    value: Value
    is_retryable: bool
    retry_after_s: float = 0.0


@dataclasses.dataclass
class Outcome(Generic[Value]):
    """A whole call. `values` are those of the attempts that came to their end; a late call's last one did not."""

    values: list[Value] = dataclasses.field(default_factory=list)
    num_attempts: int = 0
    is_late: bool = False
    queue_s: float = 0.0
    retry_s: float = 0.0  # earlier attempts, and the waits
    wait_s: float = 0.0  # of `retry_s`, the waits
    service_s: float = 0.0  # the last attempt


def read_retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks for by Retry-After; 0 where it asks for none, or for a date, which few send."""
    try:
        seconds = float(headers.get("retry-after", 0))
    except ValueError:
        return 0.0
    return seconds if 0 < seconds < math.inf else 0.0


class Limiter:
    """Safe to share between event loops and threads; the limit on concurrency holds within each loop."""

    def __init__(self, limits: Limits, seed: int = 0):
        self.limits = limits
        self._random = random.Random(seed)
        self._lock = threading.Lock()  # guards the rate and the random numbers
        self._next_start_s = 0.0
        self._places: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )

    async def run(self, attempt: Callable[[], Awaitable[Attempt[Value]]], timeout_s: float = float("inf")) -> Outcome:
        """Attempts until one need not be repeated, the attempts are used up, or the deadline (the nearer one) comes."""
        outcome: Outcome[Value] = Outcome()
        timeout_s = min(timeout_s, self.limits.timeout_s)
        start_s = time.monotonic()
        began_s = None
        try:
            async with asyncio.timeout(timeout_s) as limit:
                while True:
                    queued_s, began_s = time.monotonic(), None
                    async with self._place():
                        began_s = time.monotonic()
                        outcome.queue_s += began_s - queued_s
                        outcome.num_attempts += 1
                        made = await attempt()
                    outcome.service_s = time.monotonic() - began_s
                    outcome.values.append(made.value)
                    wait_s = self._wait_s(outcome.num_attempts, made)
                    is_in_time = time.monotonic() - start_s + wait_s < timeout_s
                    if not made.is_retryable or outcome.num_attempts == self.limits.max_attempts or not is_in_time:
                        return outcome
                    await asyncio.sleep(wait_s)
                    outcome.wait_s += wait_s
                    outcome.retry_s += outcome.service_s + wait_s
                    outcome.service_s = 0.0
        except TimeoutError:
            if not limit.expired():  # the attempt's own: a bug
                raise
            outcome.is_late = True
            if began_s is None:
                outcome.queue_s += time.monotonic() - queued_s
            else:
                outcome.service_s = time.monotonic() - began_s
            return outcome

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """One of the concurrent places, at a moment that the rate allows."""
        if not self.limits.max_concurrent:
            await self._pace()
            yield
            return
        loop = asyncio.get_running_loop()
        with self._lock:
            places = self._places.setdefault(loop, asyncio.Semaphore(self.limits.max_concurrent))
        async with places:
            await self._pace()
            yield

    async def _pace(self) -> None:
        with self._lock:
            now_s = time.monotonic()
            start_s = max(now_s, self._next_start_s)
            if self.limits.calls_per_s:
                self._next_start_s = start_s + 1 / self.limits.calls_per_s
        if start_s > now_s:
            await asyncio.sleep(start_s - now_s)

    def _wait_s(self, num_attempts: int, made: Attempt) -> float:
        if not made.is_retryable:
            return 0.0
        with self._lock:
            backoff_s = min(self.limits.longest_wait_s, self.limits.first_wait_s * 2 ** (num_attempts - 1))
            if made.retry_after_s:
                self._next_start_s = max(self._next_start_s, time.monotonic() + made.retry_after_s)
            return max(made.retry_after_s, backoff_s * self._random.uniform(0.5, 1.0))
