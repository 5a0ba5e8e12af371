"""What an episode cost in dollars and in seconds: the sum and the critical path of its receipts.

Every charge is a Receipt (types.py); this file makes them, keeps them in order and adds them up. It has no clock: times
are the `service_s` of the receipts, measured or modelled by whoever made them, and enforcing a limit is not done here.

    cost_usd  = fixed + (input_tokens * input price + output_tokens * output price) / 1e6   prices per million tokens
    latency_s = sum over turns of (generation + max over the turn's parallel calls)         the critical path
    service_s, retry_s, queue_s = sums over all receipts                                    nothing in parallel

A call's share of the critical path is `retry_s + service_s`, what its endpoint made the user wait. `queue_s` is kept
apart: it is the wait for a place under our own limits, which grows with the number of episodes that run at once.

A turn opens with the orchestrator's own receipt (tool ORCHESTRATOR); the calls charged after it are the turn's and run
in parallel. So a trajectory's flat tuple of receipts is enough to repeat the totals. Failed, refused and late calls are
charged like any other. The receipts of a judge, and of a model that plays the user (tools JUDGE and USER), are the bill
of the experiment and not of the policy: they belong to no turn, their seconds to no latency, and each has a total of
its own. Sums are exact (math.fsum): the order in which parallel calls finish shows in no total.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from orchestra_jax.types import CallStatus, Reason, Receipt

ORCHESTRATOR = "orchestrator"
JUDGE = "judge"
USER = "user"
EXPERIMENT = (JUDGE, USER)  # whose receipts are the experiment's bill


@dataclasses.dataclass(frozen=True)
class Totals:
    """What a sequence of turns cost."""

    cost_usd: float
    latency_s: float  # critical path
    service_s: float  # sum over all receipts, as retry_s and queue_s
    input_tokens: int
    output_tokens: int
    num_turns: int
    num_calls: int  # without the orchestrator's own
    num_calls_not_ok: int
    retry_s: float = 0.0
    queue_s: float = 0.0
    judge_cost_usd: float = 0.0  # in none of the above, as the next
    user_cost_usd: float = 0.0


def token_cost_usd(
    input_tokens: int,
    output_tokens: int,
    input_usd_per_million_tokens: float,
    output_usd_per_million_tokens: float,
    fixed_cost_usd: float,
) -> float:
    """The price of one call in dollars.

    Raises:
      ValueError: a count or price is negative or not finite.
    """
    amounts = {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "input_usd_per_million_tokens": input_usd_per_million_tokens,
        "output_usd_per_million_tokens": output_usd_per_million_tokens,
        "fixed_cost_usd": fixed_cost_usd,
    }
    if not all(math.isfinite(amount) and amount >= 0 for amount in amounts.values()):
        raise ValueError(f"counts and prices must be finite and 0 or more, got {amounts}")
    input_usd = input_tokens * input_usd_per_million_tokens / 1e6
    output_usd = output_tokens * output_usd_per_million_tokens / 1e6
    return math.fsum((fixed_cost_usd, input_usd, output_usd))


def make_receipt(
    tool: str,
    *,
    service_s: float,
    alias: str = "",
    model: str = "",
    input_tokens: int = 0,
    output_tokens: int = 0,
    input_usd_per_million_tokens: float = 0.0,
    output_usd_per_million_tokens: float = 0.0,
    fixed_cost_usd: float = 0.0,
    status: CallStatus = CallStatus.OK,
    queue_s: float = 0.0,
    retry_s: float = 0.0,
    attempt: int = 1,
    is_cache_hit: bool = False,
    is_estimated: bool = False,
    reason: Reason = Reason.NONE,
) -> Receipt:
    """A receipt whose `cost_usd` follows from its tokens and prices, whatever its status.

    Raises:
      ValueError: a count, price or time is negative or not finite.
    """
    for name, value in (("service_s", service_s), ("queue_s", queue_s), ("retry_s", retry_s), ("attempt", attempt)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} {value} of a call of {tool!r} must be finite and 0 or more")
    return Receipt(
        tool=tool,
        alias=alias,
        model=model,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        input_usd_per_million_tokens=input_usd_per_million_tokens,
        output_usd_per_million_tokens=output_usd_per_million_tokens,
        fixed_cost_usd=fixed_cost_usd,
        cost_usd=token_cost_usd(
            input_tokens, output_tokens, input_usd_per_million_tokens, output_usd_per_million_tokens, fixed_cost_usd
        ),
        service_s=service_s,
        status=status,
        queue_s=queue_s,
        retry_s=retry_s,
        attempt=attempt,
        is_cache_hit=is_cache_hit,
        is_estimated=is_estimated,
        reason=reason,
    )


def read_receipt(fields: Mapping[str, object]) -> Receipt:
    """A receipt from its JSON fields, as trajectories/step_*.jsonl holds them; TypeError for other fields."""
    named = {**fields, "status": CallStatus(fields["status"]), "reason": Reason(fields["reason"])}
    return Receipt(**named)


def split_turns(receipts: Iterable[Receipt]) -> tuple[tuple[Receipt, ...], ...]:
    """Cuts a flat sequence, such as a trajectory's, into turns: each begins with the orchestrator's receipt.

    The experiment's receipts are left out.
    """
    turns: list[list[Receipt]] = []
    for receipt in receipts:
        if receipt.tool in EXPERIMENT:
            continue
        if receipt.tool == ORCHESTRATOR:
            turns.append([])
        assert turns, (
            f"a charge of {receipt.tool!r} stands before the first turn: charge the {ORCHESTRATOR!r} receipt first"
        )
        turns[-1].append(receipt)
    return tuple(tuple(turn) for turn in turns)


def replay(receipts_by_turn: Sequence[Sequence[Receipt]]) -> Totals:
    """Totals of turns, each the orchestrator's receipt followed by those of its parallel calls, in any order."""
    critical_path_s = []
    for turn in receipts_by_turn:
        assert turn and turn[0].tool == ORCHESTRATOR, f"a turn begins with the {ORCHESTRATOR!r} receipt, got {turn!r}"
        calls_s = (call.retry_s + call.service_s for call in turn[1:])
        critical_path_s += [turn[0].service_s, max(calls_s, default=0.0)]
    receipts = [receipt for turn in receipts_by_turn for receipt in turn]
    calls = [call for turn in receipts_by_turn for call in turn[1:]]
    return Totals(
        cost_usd=math.fsum(receipt.cost_usd for receipt in receipts),
        latency_s=math.fsum(critical_path_s),
        service_s=math.fsum(receipt.service_s for receipt in receipts),
        retry_s=math.fsum(receipt.retry_s for receipt in receipts),
        queue_s=math.fsum(receipt.queue_s for receipt in receipts),
        input_tokens=sum(receipt.input_tokens for receipt in receipts),
        output_tokens=sum(receipt.output_tokens for receipt in receipts),
        num_turns=len(receipts_by_turn),
        num_calls=len(calls),
        num_calls_not_ok=sum(call.status != CallStatus.OK for call in calls),
    )


def replay_receipts(receipts: Sequence[Receipt]) -> Totals:
    """Totals of a flat sequence, the experiment's bill included: what `Ledger.totals` said when they were charged."""
    judge_usd, user_usd = (
        math.fsum(receipt.cost_usd for receipt in receipts if receipt.tool == tool) for tool in EXPERIMENT
    )
    return dataclasses.replace(replay(split_turns(receipts)), judge_cost_usd=judge_usd, user_cost_usd=user_usd)


class Ledger:
    """The receipts of one episode, in the order in which they were charged."""

    def __init__(self):
        self._receipts: list[Receipt] = []

    def charge(self, receipt: Receipt) -> None:
        """Books one receipt; the orchestrator's opens a turn, others but the experiment's belong to the open turn."""
        assert self._receipts or receipt.tool in (ORCHESTRATOR, *EXPERIMENT), (
            f"a charge of {receipt.tool!r} stands before the first turn: charge the {ORCHESTRATOR!r} receipt first"
        )
        self._receipts.append(receipt)

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        return tuple(self._receipts)

    def totals(self) -> Totals:
        """Totals so far."""
        return replay_receipts(self._receipts)
