"""The carriers that every layer shares: messages, tool calls, receipts, trajectories.

Numpy and the standard library only: rollouts, tools and synthesis import this file without jax.

Worked example of a trajectory. P are prompt tokens, S sampled ones, F forced ones (the end-of-turn id after a call
under `calls_per_turn=1`), O observation tokens (a tool's response inside its template):

    tokens            P0 P1 S2 S3 S4 F5 O6 O7 S8 S9
    loss_mask          0  0  1  1  1  0  0  0  1  1
    logprobs           0  0 -a -b -c  0  0  0 -d -e     natural log, as sampled (temperature applied, untruncated)
    policy_versions   -1 -1  3  3  3 -1 -1 -1  3  3     the weights that sampled the token; -1 where none did

Mask, log-probability and version are written where the token is born and never derived again.
"""

from __future__ import annotations

import dataclasses
import enum

import numpy as np


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One call that the policy made. `error` is the reason why it cannot be run, in one sentence; empty if it can."""

    name: str
    arguments: dict[str, object]
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Message:
    """One chat message. `role` is system, user, assistant or tool; `reasoning` is an assistant's thinking."""

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class CallStatus(enum.StrEnum):
    OK = "ok"
    REFUSED = "refused"  # the call was not allowed or not understood; the policy's own fault
    TIMEOUT = "timeout"
    FAILED = "failed"  # the tool or its endpoint broke: says nothing about the policy


class Reason(enum.StrEnum):
    """Why a call did not end well, finer than its status. NONE for one that did."""

    NONE = ""
    UNKNOWN_TOOL = "unknown_tool"
    NOT_JSON = "not_json"  # what stands between the call's tags is no call
    MALFORMED_TURN = "malformed_turn"  # the call can be read, and what stands around it breaks the format
    WRONG_ARGUMENTS = "wrong_arguments"  # a type, a value or a missing field
    EXTRA_FIELDS = "extra_fields"
    TOO_LONG = "too_long"
    TOO_MANY_CALLS = "too_many_calls"
    NOT_ON_OFFER = "not_on_offer"
    OVER_BUDGET = "over_budget"  # of the task
    SPEND_CAP = "spend_cap"  # of the run
    DEADLINE = "deadline"
    RATE_LIMITED = "rate_limited"
    SERVER_ERROR = "server_error"  # a status of 4xx or 5xx other than 429
    NO_CONNECTION = "no_connection"  # none was made, or it was cut
    UNREADABLE = "unreadable"  # a reply that is no JSON, or has nothing in it
    NOT_RECORDED = "not_recorded"
    BROKEN_FUNCTION = "broken_function"  # a function of a domain that raised, looped or returned what is no JSON
    INJECTED = "injected"  # a fault on demand


@dataclasses.dataclass(frozen=True)
class Receipt:
    """What one charge cost: a tool call, or the orchestrator's own tokens of one turn.

    Prices carry their unit; `cost_usd` is what was charged. A call that was tried again has one receipt: its tokens are
    those of all attempts. Its time falls in three parts: `queue_s` waiting for a place under our own limits, `retry_s`
    earlier attempts and the waits behind them, `service_s` the last attempt and what the tool did with it, on the
    episode's clock.
    """

    tool: str
    alias: str
    model: str
    input_tokens: int
    output_tokens: int
    input_usd_per_million_tokens: float
    output_usd_per_million_tokens: float
    fixed_cost_usd: float
    cost_usd: float
    service_s: float
    status: CallStatus = CallStatus.OK
    queue_s: float = 0.0
    retry_s: float = 0.0
    attempt: int = 1  # the number of the last attempt; 0 for a call that never began
    is_cache_hit: bool = False  # replayed from a recording: charged as recorded, paid by nobody
    is_estimated: bool = False  # the endpoint gave no usable token counts
    reason: Reason = Reason.NONE


class StopReason(enum.StrEnum):
    STOP = "stop"  # one of the sampling's stop ids was sampled
    LENGTH = "length"  # the token budget ran out
    ABORTED = "aborted"  # cancelled, or past its deadline
    FAILED = "failed"  # the engine's servers did not do it; says nothing about the policy


class EpisodeStatus(enum.StrEnum):
    ANSWERED = "answered"  # the terminal tool ran
    MALFORMED = "malformed"  # a turn that is no valid call; a negative for the policy, never dropped
    TURN_LIMIT = "turn_limit"
    TOKEN_LIMIT = "token_limit"
    # Infrastructure: the trajectory leaves the group before any statistic.
    TOOL_FAILURE = "tool_failure"
    ENGINE_FAILURE = "engine_failure"


INFRASTRUCTURE_FAILURES = (EpisodeStatus.TOOL_FAILURE, EpisodeStatus.ENGINE_FAILURE)


@dataclasses.dataclass(frozen=True)
class CallRecord:
    """A call as it ran: what was asked, what came back, and whether the state now holds the gold evidence."""

    call: ToolCall
    result_text: str
    status: CallStatus
    is_evidence_present: bool


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One rollout of one instance: the token stream and everything that was charged or scored on the way."""

    instance_id: str
    rollout_index: int
    tokens: np.ndarray  # [T] int32
    loss_mask: np.ndarray  # [T] bool
    logprobs: np.ndarray  # [T] float32
    policy_versions: np.ndarray  # [T] int32
    num_prompt_tokens: int
    calls: tuple[CallRecord, ...]
    receipts: tuple[Receipt, ...]
    status: EpisodeStatus
    answer: str
    objectives: dict[str, float]  # unweighted, by objective name: outcome, cost_usd, latency_s, ...

    @property
    def num_completion_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


@dataclasses.dataclass(frozen=True)
class TrajectoryGroup:
    """The G rollouts of one instance, with the preference weights that they share."""

    instance_id: str
    weights: dict[str, float]  # by objective name
    trajectories: tuple[Trajectory, ...]
