"""Hard limits on money and time: what one task may cost, and what a whole run may spend.

The budget of a task is part of the instance (data/records.py) and of the prompt. A call is admitted when the most that
it can cost and take fits into what is left; calls of one turn share the money and run side by side in time:

    quoted cost of the turn's admitted calls <= cost_usd - spent,    each quoted time <= latency_s - elapsed

The account of a run counts real money alone: replayed and simulated calls never touch it. Money is reserved before a
request is sent and settled behind it, so that no number of concurrent calls can pass the cap; and what is reserved
stands in a file first, so that a run that is killed and resumed, wherever its last checkpoint is, cannot either.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import threading

from orchestra_jax.data.records import Budget
from orchestra_jax.tools.ledger import Totals


@dataclasses.dataclass(frozen=True)
class Quote:
    """The most that a call can cost, and how long it takes where that is known beforehand (0 where it is not).

    `is_on_clock` is False for a call whose seconds are not the episode's: no budget cuts it.
    """

    cost_usd: float
    latency_s: float = 0.0
    is_on_clock: bool = True


class Allowance:
    """What one turn of an episode may still use. `totals` are those when the turn's calls begin."""

    def __init__(self, budget: Budget, totals: Totals):
        self.left_usd = budget.cost_usd - totals.cost_usd
        self.left_s = budget.latency_s - totals.latency_s

    def admit(self, quote: Quote) -> str:
        """Takes the quote off the money that is left; or says, in one sentence, why the call cannot be paid."""
        if self.left_s <= 0 or quote.latency_s > self.left_s:
            return f"refused: this takes {quote.latency_s:g} s and the budget has {max(self.left_s, 0):.1f} s left"
        if self.left_usd <= 0 or quote.cost_usd > self.left_usd:
            return (
                f"refused: this can cost ${quote.cost_usd:.4f} and the budget has ${max(self.left_usd, 0):.4f} left; "
                "choose something cheaper"
            )
        self.left_usd -= quote.cost_usd
        return ""


def rest_text(budget: Budget, totals: Totals) -> str:
    """What is left of a budget, for the policy; empty without a limit. Overspent amounts show as 0."""
    parts = []
    if math.isfinite(budget.cost_usd):
        parts.append(f"${max(budget.cost_usd - totals.cost_usd, 0):.4f}")
    if math.isfinite(budget.latency_s):
        parts.append(f"{max(budget.latency_s - totals.latency_s, 0):.1f}s")
    return f"budget left {' '.join(parts)}" if parts else ""


class Account:
    """The real money of a run, shared by everything that spends any. Safe for threads and event loops.

    ValueError for a cap that is negative or no number.
    """

    def __init__(self, cap_usd: float = math.inf):
        if not cap_usd >= 0:
            raise ValueError(f"the spending cap of a run must be 0 dollars or more, got {cap_usd}")
        self.cap_usd = cap_usd
        self._lock = threading.Lock()
        self._spent_usd = 0.0
        self._reserved_usd = 0.0
        self._path: pathlib.Path | None = None

    @property
    def spent_usd(self) -> float:
        return self._spent_usd

    def reserve(self, amount_usd: float) -> bool:
        """Whether the cap has room for this much besides all that is spent and reserved; if so it is reserved."""
        assert amount_usd >= 0, f"cannot reserve {amount_usd} dollars"
        with self._lock:
            if amount_usd and self._spent_usd + self._reserved_usd + amount_usd > self.cap_usd:
                return False
            self._reserved_usd += amount_usd
            self._write(amount_usd)
            return True

    def settle(self, reserved_usd: float, paid_usd: float) -> None:
        """Gives a reservation back and books what was really paid."""
        with self._lock:
            self._reserved_usd = max(self._reserved_usd - reserved_usd, 0.0)
            self._spent_usd += paid_usd
            self._write(reserved_usd or paid_usd)

    def keep_in(self, path: str | os.PathLike) -> None:
        """Counts what an earlier process has written to the file `path`, and writes there from now on.

        ValueError for a file that is none of an account.
        """
        self._path = pathlib.Path(path)
        if not self._path.exists():
            return
        try:
            self.set_state(json.loads(self._path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f'{path} does not say what was spent ({error}): write {{"spent_usd": the dollars}} into it'
            ) from error

    def _write(self, moved_usd: float) -> None:
        """Written whole or not at all. The lock is held."""
        if self._path is None or not moved_usd:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".tmp")
        draft.write_text(json.dumps({"spent_usd": self._spent_usd + self._reserved_usd}), encoding="utf-8")
        os.replace(draft, self._path)

    def get_state(self) -> dict[str, float]:
        """For a checkpoint. Money that is reserved counts as spent: whoever resumes does not know what became of it."""
        with self._lock:
            return {"spent_usd": self._spent_usd + self._reserved_usd}

    def set_state(self, state: dict[str, float]) -> None:
        """What was spent by then; not less than is known here already."""
        with self._lock:
            self._spent_usd = max(self._spent_usd, float(state["spent_usd"]))
