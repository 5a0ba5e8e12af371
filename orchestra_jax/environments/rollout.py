"""One episode: generate, run the calls, append what came back, until the terminal tool has run.

The token stream is append-only. A turn's tokens are recorded as they were sampled (mask 1), what is forced or shown is
appended with mask 0; nothing is rendered twice and no text is tokenised again.

    prompt -> [ sampled turn (mask 1) -> forced end of turn, results of the calls (mask 0) ]* -> sampled turn (mask 1)
"""

from __future__ import annotations

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
    num_corrections: int = 0  # malformed turns that are answered with CORRECTION; the next one ends the episode
    ends_on_tool_failure: bool = True  # else the policy sees the failure and goes on
    should_correct_calls: bool = False  # a call that cannot be read is told so; else the turn ends the episode


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
    answer: str | None = None
    num_malformed: int = 0


async def run_episode(
    instance: Instance,
    rollout_index: int,
    environment: Environment,
    engine: Engine,
    chat: Chat,
    config: RolloutConfig,
    seed: int,
) -> Trajectory:
    """Plays one rollout of an instance to its end.

    ValueError if the prompt leaves no room for a turn within `config.max_tokens`.
    """
    messages, tools = environment.prompt(instance)
    prompt_tokens = chat_format.encode_prompt(chat, messages, tools)
    if len(prompt_tokens) >= config.max_tokens:
        raise ValueError(
            f"the prompt of {instance.instance_id} has {len(prompt_tokens)} tokens and max_tokens is "
            f"{config.max_tokens}: raise rollout.max_tokens"
        )
    episode = Episode(TokenStream(prompt_tokens), len(prompt_tokens), Ledger(), [], Evidence())
    session_id = f"{instance.instance_id}#{rollout_index}"
    status = None
    while status is None:
        status = await _run_turn(episode, instance, rollout_index, environment, engine, chat, config, session_id, seed)
    totals = episode.ledger.totals()
    answer = episode.answer if status == EpisodeStatus.ANSWERED else None
    return Trajectory(
        instance_id=instance.instance_id,
        rollout_index=rollout_index,
        **episode.stream.arrays(),
        num_prompt_tokens=episode.num_prompt_tokens,
        calls=tuple(episode.calls),
        receipts=episode.ledger.receipts,
        status=status,
        answer=answer or "",
        objectives=environment.objectives(instance, episode.calls, answer, totals),
    )


async def _run_turn(
    episode: Episode, instance, rollout_index, environment, engine, chat, config, session_id, seed
) -> EpisodeStatus | None:
    """One turn and its calls; the episode's status if it ends with this turn."""
    stop_ids = chat_format.stop_ids(chat, config.calls_per_turn)
    num_context = len(episode.stream.tokens)
    room = min(config.max_turn_tokens, config.max_tokens - num_context)
    sampling = Sampling(config.temperature, room, stop_ids, seed)
    completion = await engine.generate(
        episode.stream.tokens, sampling, request_id=f"{session_id}@{num_context}", session_id=session_id
    )
    episode.stream.append_sampled(completion)
    num_sampled = len(completion.tokens)
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
    if completion.stop_reason == StopReason.ABORTED:
        return EpisodeStatus.TOOL_FAILURE
    if completion.stop_reason == StopReason.LENGTH:
        return EpisodeStatus.TOKEN_LIMIT
    turn = chat_format.parse_turn(chat, completion.tokens)
    if not (turn.calls and (turn.is_well_formed or config.should_correct_calls)):
        episode.num_malformed += 1
        if episode.num_malformed > config.num_corrections:
            return EpisodeStatus.MALFORMED
        return _show(episode, chat, config, [environment.observation(CORRECTION, SHORT_CORRECTION)])
    num_allowed = min(config.calls_per_turn, environment.max_calls - len(episode.calls))
    calls = [call if number < num_allowed else _one_too_many(call) for number, call in enumerate(turn.calls)]
    allowance = Allowance(instance.budget, episode.ledger.totals()) if instance.budget.is_limited else None
    context = ToolContext(instance, rollout_index, episode.evidence, len(episode.calls), allowance=allowance)
    results = await environment.toolbox.call_together(calls[:num_allowed], context)
    results += [refused(call.name, call.error, Reason.TOO_MANY_CALLS) for call in calls[num_allowed:]]
    return _record(episode, instance, environment, chat, config, calls, results)


def _one_too_many(call: ToolCall) -> ToolCall:
    return dataclasses.replace(call, error="no more calls are allowed in this turn")


def _is_broken(result: ToolResult) -> bool:
    """Whether infrastructure failed; a call that the task's own budget cut did not."""
    is_cut_by_budget = result.receipt.reason == Reason.OVER_BUDGET
    return result.status in (CallStatus.FAILED, CallStatus.TIMEOUT) and not is_cut_by_budget


def _shown(environment: Environment, config: RolloutConfig, result: ToolResult, rest: str) -> str:
    """What of a result the policy reads: all of it where it is to mend its call, and the rest of the budget."""
    is_refused = config.should_correct_calls and result.status == CallStatus.REFUSED
    is_told = is_refused or result.receipt.reason == Reason.OVER_BUDGET
    text = result.text if is_told else environment.observation(result.text, result.summary)
    return "\n".join(part for part in (text, rest) if part)


def _record(
    episode: Episode, instance, environment, chat, config, calls: Sequence[ToolCall], results: Sequence[ToolResult]
) -> EpisodeStatus | None:
    """Books the results of one turn in the order of its calls, and appends what the policy is shown."""
    for call, result in zip(calls, results, strict=True):
        episode.ledger.charge(result.receipt)
        episode.evidence = episode.evidence.joined(result.evidence)
        is_present = environment.is_evidence_present(instance, episode.evidence)
        episode.calls.append(CallRecord(call, result.text, result.status, is_present))
        if result.answer is not None and episode.answer is None:
            episode.answer = result.answer
    if config.ends_on_tool_failure and any(map(_is_broken, results)):
        return EpisodeStatus.TOOL_FAILURE
    if episode.answer is not None:
        return EpisodeStatus.ANSWERED
    if len(episode.calls) >= environment.max_calls:
        return EpisodeStatus.TURN_LIMIT
    rest = rest_text(instance.budget, episode.ledger.totals()) if instance.budget.is_limited else ""
    return _show(episode, chat, config, [_shown(environment, config, result, rest) for result in results])


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
