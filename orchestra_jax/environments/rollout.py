"""One episode: generate, run the calls, append what came back, until the terminal tool has run.

The token stream is append-only. A turn's tokens are recorded as they were sampled (mask 1), what is forced or shown is
appended with mask 0; nothing is rendered twice and no text is tokenised again.

    prompt -> [ sampled turn (mask 1) -> forced end of turn, results of the calls (mask 0) ]* -> sampled turn (mask 1)
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np

from orchestra_jax import chat as chat_format
from orchestra_jax.chat import Chat
from orchestra_jax.data.records import Instance
from orchestra_jax.environments.environment import Environment
from orchestra_jax.generation.engine import Completion, Engine, Sampling
from orchestra_jax.tools.budget import Allowance, rest_text
from orchestra_jax.tools.ledger import ORCHESTRATOR, Ledger, make_receipt
from orchestra_jax.tools.tool import Evidence, ToolContext, ToolResult
from orchestra_jax.tools.toolbox import refused
from orchestra_jax.types import CallRecord, CallStatus, EpisodeStatus, Reason, StopReason, ToolCall, Trajectory


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Limits of an episode, and what the orchestrator's own tokens cost (its list price, its speed)."""

    max_turn_tokens: int
    max_tokens: int  # prompt and all turns
    calls_per_turn: int
    temperature: float
    orchestrator_usd_per_million_tokens: float
    orchestrator_tokens_per_s: float
    num_corrections: int = 0  # malformed turns that are answered with what is wrong; the next one ends the episode
    ends_on_tool_failure: bool = True  # else the policy sees the failure and goes on


CORRECTION = "Malformed call. Close your thinking, then write one call with its name and its arguments."
SHORT_CORRECTION = "malformed call"


class TokenStream:
    """The growing trajectory: every token with its mask, log-probability and policy version."""

    def __init__(self, prompt_tokens: Sequence[int]):
        self.tokens: list[int] = []
        self._loss_mask: list[bool] = []
        self._logprobs: list[float] = []
        self._policy_versions: list[int] = []
        self.append_given(prompt_tokens)

    def append_given(self, tokens: Sequence[int]) -> None:
        """Tokens that the policy did not sample."""
        self.tokens.extend(tokens)
        self._loss_mask.extend([False] * len(tokens))
        self._logprobs.extend([0.0] * len(tokens))
        self._policy_versions.extend([-1] * len(tokens))

    def append_sampled(self, completion: Completion) -> None:
        """A turn as the engine returned it, and what the engine recorded with each token."""
        lengths = tuple(len(field) for field in (completion.tokens, completion.logprobs, completion.policy_versions))
        assert len(set(lengths)) == 1, (
            f"tokens, log-probabilities and versions of a completion differ in length: {lengths}"
        )
        self.tokens.extend(completion.tokens.tolist())
        self._loss_mask.extend([True] * len(completion.tokens))
        self._logprobs.extend(completion.logprobs.tolist())
        self._policy_versions.extend(completion.policy_versions.tolist())

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "tokens": np.array(self.tokens, np.int32),
            "loss_mask": np.array(self._loss_mask, bool),
            "logprobs": np.array(self._logprobs, np.float32),
            "policy_versions": np.array(self._policy_versions, np.int32),
        }


@dataclasses.dataclass
class Episode:
    """What an episode has come to. Lives inside `run_episode` alone."""

    stream: TokenStream
    num_prompt_tokens: int
    ledger: Ledger
    calls: list[CallRecord]
    evidence: Evidence
    state: object = None  # the environment's own
    answer: str | None = None
    num_malformed: int = 0


def encode_instance(instance: Instance, environment: Environment, chat: Chat) -> list[int]:
    """The prompt, which all rollouts of the instance share."""
    messages, tools = environment.prompt(instance)
    return chat_format.encode_prompt(chat, messages, tools)


async def run_episode(
    instance: Instance,
    rollout_index: int,
    environment: Environment,
    engine: Engine,
    chat: Chat,
    config: RolloutConfig,
    seed: int,
    prompt_tokens: Sequence[int] | None = None,
) -> Trajectory:
    """Plays one rollout of an instance to its end. `prompt_tokens`: its `encode_instance`, where that is known already.

    ValueError if the prompt leaves no room for a turn within `config.max_tokens`.
    """
    if prompt_tokens is None:
        prompt_tokens = encode_instance(instance, environment, chat)
    if len(prompt_tokens) >= config.max_tokens:
        raise ValueError(
            f"the prompt of {instance.instance_id} has {len(prompt_tokens)} tokens and max_tokens is "
            f"{config.max_tokens}: raise rollout.max_tokens"
        )
    episode = Episode(
        TokenStream(prompt_tokens), len(prompt_tokens), Ledger(), [], Evidence(), environment.open(instance)
    )
    session_id = f"{instance.instance_id}#{rollout_index}"
    status = None
    while status is None:
        status = await _run_turn(episode, instance, rollout_index, environment, engine, chat, config, session_id, seed)
    answer = episode.answer if status == EpisodeStatus.ANSWERED else None
    objectives = environment.objectives(instance, episode.calls, answer, episode.ledger.totals(), episode.state)
    if answer is not None and hasattr(environment, "judge"):  # a JudgedEnvironment
        verdict = await environment.judge(instance, answer)
        for receipt in verdict.receipts:
            episode.ledger.charge(receipt)
        objectives["outcome"] = verdict.outcome
        status = status if verdict.is_known else EpisodeStatus.TOOL_FAILURE
    return Trajectory(
        instance_id=instance.instance_id,
        rollout_index=rollout_index,
        **episode.stream.arrays(),
        num_prompt_tokens=episode.num_prompt_tokens,
        calls=tuple(episode.calls),
        receipts=episode.ledger.receipts,
        status=status,
        answer=answer or "",
        objectives=objectives,
    )


class _RunningCalls:
    """The calls of one turn, each started the moment its closing id is born: side by side, and with the turn itself."""

    def __init__(self, episode: Episode, instance, rollout_index, environment, chat, config):
        self._toolbox, self._chat, self._config = environment.toolbox, chat, config
        self._num_allowed = min(config.calls_per_turn, environment.max_calls - len(episode.calls))
        self._episode, self._context = (
            episode,
            ToolContext(instance, rollout_index, episode.evidence, state=episode.state, charge=episode.ledger.charge),
        )
        self.calls: list[ToolCall] = []
        self._tasks: list[asyncio.Task[ToolResult]] = []
        self._refused: list[ToolResult] = []  # behind those of the tasks

    def hear(self, tokens: np.ndarray) -> None:
        """Starts what is new in a turn that is still being written; nothing of one that went wrong already."""
        turn = chat_format.parse_turn(self._chat, tokens)
        if turn.is_well_formed:
            self.start(turn.calls)

    def start(self, calls: Sequence[ToolCall]) -> None:
        """`calls` are all that the turn has so far; those of an earlier time are its first."""
        budget = self._context.instance.budget
        if budget.is_limited and self._context.allowance is None:  # one for all calls of the turn
            allowance = Allowance(budget, self._episode.ledger.totals())
            self._context = dataclasses.replace(self._context, allowance=allowance)
        for number in range(len(self.calls), len(calls)):
            self.calls.append(calls[number])
            self._tasks.append(asyncio.ensure_future(self._run(calls[number], number)))

    async def _run(self, call: ToolCall, number: int) -> ToolResult:
        if number >= self._num_allowed:
            return refused(call.name, "no more calls are allowed in this turn", Reason.TOO_MANY_CALLS)
        call_number = len(self._episode.calls) + number
        return await self._toolbox.call(call, dataclasses.replace(self._context, call_number=call_number))

    def refuse_rest(self, calls: Sequence[ToolCall]) -> None:
        """`calls` are all of a turn that went wrong: what of them has not run leaves a receipt that says why."""
        for call in calls[len(self.calls) :]:
            reason, told = (Reason.NOT_JSON, call.error) if call.error else (Reason.MALFORMED_TURN, CORRECTION)
            self.calls.append(call)
            self._refused.append(dataclasses.replace(refused(call.name, told, reason), summary=SHORT_CORRECTION))

    async def results(self) -> list[ToolResult]:
        return [*await asyncio.gather(*self._tasks), *self._refused]

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()


async def _run_turn(
    episode: Episode, instance, rollout_index, environment, engine, chat, config, session_id, seed
) -> EpisodeStatus | None:
    """One turn and its calls; the episode's status if it ends with this turn.

    A call that ran while the turn went on is booked whatever becomes of the turn: it has cost what it cost.
    """
    stop_ids = chat_format.stop_ids(chat, config.calls_per_turn)
    num_context = len(episode.stream.tokens)
    room = min(config.max_turn_tokens, config.max_tokens - num_context)
    watch_ids = frozenset({chat.end_of_call_id}) - stop_ids
    sampling = Sampling(config.temperature, room, stop_ids, seed, watch_ids=watch_ids)
    running = _RunningCalls(episode, instance, rollout_index, environment, chat, config)
    try:
        completion = await engine.generate(
            episode.stream.tokens, sampling, request_id=f"{session_id}@{num_context}", session_id=session_id,
            on_watched=running.hear,
        )  # fmt: skip
        _book_turn(episode, config, completion)
        turn = chat_format.parse_turn(chat, completion.tokens)
        is_sound = completion.stop_reason == StopReason.STOP and bool(turn.calls) and turn.is_well_formed
        num_run = len(running.calls)
        if is_sound:
            running.start(turn.calls)
        elif completion.stop_reason == StopReason.STOP:
            running.refuse_rest(turn.calls)
        elif completion.stop_reason == StopReason.LENGTH:  # what the limit cut short is no call
            running.refuse_rest([call for call in turn.calls if call.error != chat_format.UNCLOSED_CALL])
        results = await running.results()
    finally:
        running.cancel()
    _book_calls(episode, instance, environment, running.calls, results)
    rest = rest_text(instance.budget, episode.ledger.totals()) if instance.budget.is_limited else ""
    shown = [_shown(environment, config, result, rest) for result in results]
    if completion.stop_reason == StopReason.ABORTED:
        return EpisodeStatus.TOOL_FAILURE
    if completion.stop_reason == StopReason.FAILED:
        return EpisodeStatus.ENGINE_FAILURE
    if completion.stop_reason == StopReason.LENGTH:
        return EpisodeStatus.TOKEN_LIMIT
    if is_sound:
        status = _status(episode, environment, config, results)
        return status if status is not None else _show(episode, chat, config, shown)
    episode.num_malformed += 1
    if episode.num_malformed > config.num_corrections:
        return EpisodeStatus.MALFORMED
    if len(episode.calls) >= environment.max_calls:
        return EpisodeStatus.TURN_LIMIT
    told = [] if len(turn.calls) > num_run else [environment.observation(CORRECTION, SHORT_CORRECTION)]
    return _show(episode, chat, config, [*shown, *told])


def _is_broken(result: ToolResult) -> bool:
    """Whether infrastructure failed; a call that the task's own budget cut did not."""
    is_cut_by_budget = result.receipt.reason == Reason.OVER_BUDGET
    return result.status in (CallStatus.FAILED, CallStatus.TIMEOUT) and not is_cut_by_budget


def _shown(environment: Environment, config: RolloutConfig, result: ToolResult, rest: str) -> str:
    """What of a result the policy reads: all of it where it is to mend its call, and the rest of the budget."""
    reason = result.receipt.reason
    is_refused = result.status == CallStatus.REFUSED and reason != Reason.MALFORMED_TURN
    is_told = (config.num_corrections > 0 and is_refused) or reason == Reason.OVER_BUDGET
    text = result.text if is_told else environment.observation(result.text, result.summary)
    return "\n".join(part for part in (text, rest) if part)


def _book_turn(episode: Episode, config: RolloutConfig, completion: Completion) -> None:
    """Records what was sampled and charges it."""
    num_context, num_sampled = len(episode.stream.tokens), len(completion.tokens)
    episode.stream.append_sampled(completion)
    episode.ledger.charge(
        make_receipt(
            ORCHESTRATOR,
            service_s=num_sampled / config.orchestrator_tokens_per_s,
            input_tokens=num_context,
            output_tokens=num_sampled,
            input_usd_per_million_tokens=config.orchestrator_usd_per_million_tokens,
            output_usd_per_million_tokens=config.orchestrator_usd_per_million_tokens,
        )
    )


def _book_calls(
    episode: Episode, instance, environment, calls: Sequence[ToolCall], results: Sequence[ToolResult]
) -> None:
    """Books the results of one turn in the order of its calls."""
    for call, result in zip(calls, results, strict=True):
        episode.ledger.charge(result.receipt)
        episode.evidence = episode.evidence.joined(result.evidence)
        is_present = environment.is_evidence_present(instance, episode.evidence)
        episode.calls.append(CallRecord(call, result.text, result.status, is_present))
        if result.answer is not None and episode.answer is None:
            episode.answer = result.answer


def _status(
    episode: Episode, environment, config: RolloutConfig, results: Sequence[ToolResult]
) -> EpisodeStatus | None:
    """How the episode ends with the results of a sound turn, or None if it goes on."""
    if config.ends_on_tool_failure and any(map(_is_broken, results)):
        return EpisodeStatus.TOOL_FAILURE
    if episode.answer is not None:
        return EpisodeStatus.ANSWERED
    if len(episode.calls) >= environment.max_calls:
        return EpisodeStatus.TURN_LIMIT
    return None


def _show(episode: Episode, chat: Chat, config: RolloutConfig, shown: Sequence[str]) -> EpisodeStatus | None:
    """Ends the turn and appends what the policy is shown.

    Where no token is left behind that, the episode ends and nothing is appended: a stream never exceeds max_tokens.
    """
    forced = [] if episode.stream.tokens[-1] == chat.end_of_turn_id else [chat.end_of_turn_id]
    given = forced + chat_format.encode_observation(chat, list(shown))
    if len(episode.stream.tokens) + len(given) >= config.max_tokens:
        return EpisodeStatus.TOKEN_LIMIT
    episode.stream.append_given(given)
    return None
