"""What an episode is, rule by rule; each test names the rules that it holds `run_episode` to.

 1. Tokens, mask, log-probabilities and versions are of one length; sampled tokens carry the engine's, others 0 and -1.
 2. The stream is the template: rendering the episode's messages gives the same ids.
 3. With one call a turn, the turn ends at the call; `<|im_end|>` is forced behind it with mask 0.
 4. With more calls a turn, each starts when it is closed and they run side by side; none sees what another one of the
    turn brought. A call that ran is recorded and charged whatever becomes of its turn.
 5. Calls beyond `calls_per_turn`, or beyond what is left of `max_calls`, are refused and not run.
 6. A turn that is no valid call ends the episode as MALFORMED; it stays in the stream with mask 1. With
    `num_corrections` of 1 the first one is answered with what is wrong, and the second one ends the episode. Each call
    in it that did not run has a receipt of its own, free, with the reason, and is one of the `max_calls`.
 7. An unknown tool, wrong arguments or an expert that is not on offer are refused; the episode goes on.
 8. `max_calls` calls without an answer: TURN_LIMIT.
 9. A turn cut by the token limit, or no room left for another turn: TOKEN_LIMIT. No stream exceeds `max_tokens`.
10. A tool that fails or is late, or an aborted request: TOOL_FAILURE, without an answer.
11. `is_evidence_present` of a call is the state behind it; the first answer of an episode counts.
12. The objectives are those of the receipts: replaying them gives the same cost, and the critical path as latency.
"""

import asyncio
import os
import pathlib

import numpy as np
import pytest

from orchestra_jax import chat as chat_format
from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY, load_chat
from orchestra_jax.data.records import Document, Instance, Offer, Preference, Task
from orchestra_jax.environments.question_answering import QuestionAnswering
from orchestra_jax.environments.rollout import (
    CORRECTION,
    SHORT_CORRECTION,
    RolloutConfig,
    TokenStream,
    run_episode,
)
from orchestra_jax.experts.delegation import Answer, EnhanceReasoning, Search
from orchestra_jax.experts.expert import ExpertReply
from orchestra_jax.generation.engine import Completion
from orchestra_jax.generation.scripted_engine import ScriptedEngine
from orchestra_jax.tools.ledger import ORCHESTRATOR, replay, split_turns
from orchestra_jax.tools.sandbox.python_sandbox import PythonSandbox
from orchestra_jax.tools.search.local_search import LocalSearch
from orchestra_jax.tools.toolbox import Toolbox
from orchestra_jax.types import CallStatus, EpisodeStatus, Message, Reason, StopReason, ToolCall

REPOSITORY = pathlib.Path(__file__).parents[2]
QWEN3_DIRECTORY = pathlib.Path(
    os.environ.get("ORCHESTRA_QWEN3_TOKENIZER", REPOSITORY.parent / "shared" / "data" / "qwen3_tokenizer")
)
CHAT = load_chat(SMALL_TOKENIZER_DIRECTORY, "compact")
OFFERS = (
    Offer("expert-2", "gpt-5-mini", False, 4.0, 4.0, 10.0),
    Offer("expert-3", "Qwen3-32B", True, 1.0, 1.0, 3.0),
)
TASK = Task("t/0", "geography", "one_hop", "Which cat?", "tom", "search", gold_document_ids=("a",))
WEIGHTS = {"outcome": 0.3, "cost_usd": 0.35, "latency_s": 0.35, "disallowed_calls": 1.5}
INSTANCE = Instance("t/0/local/0", TASK, Preference("local", "Use local experts only.", WEIGHTS), OFFERS, seed=0)
DOCUMENTS = [Document("a", "Cats", "tom is a cat"), Document("b", "Dogs", "rex is a dog")]
SEARCH, LOOK_ELSEWHERE = ToolCall("search", {"model": "expert-2"}), ToolCall("search", {"model": "expert-3"})
COMPUTE, ANSWER = ToolCall("enhance_reasoning", {"model": "expert-3"}), ToolCall("answer", {"model": "expert-3"})
VERSION = 7


class Oracle:
    """Experts that know: expert-2 searches well, expert-3 badly; each answer says whether the evidence was there."""

    def __init__(self):
        self.requests = []

    async def reply(self, request):
        self.requests.append(request)
        query = "cat" if request.offer.alias == "expert-2" else "zebra"
        texts = {"search": query, "enhance_reasoning": "print('meow')", "answer": "tom"}
        return ExpertReply(texts[request.role], 1000, 500, request.offer.latency_s)


@pytest.fixture(scope="module")
def sandbox():
    with PythonSandbox(timeout_s=5.0) as made:
        yield made


@pytest.fixture
def experts():
    return Oracle()


@pytest.fixture
def environment(experts, sandbox):
    return make_environment(experts, sandbox)


def make_environment(experts, sandbox, timeout_s=20.0, is_compact=True, max_calls=3):
    tools = (
        Search(lambda model: experts, LocalSearch(DOCUMENTS)),
        EnhanceReasoning(lambda model: experts, sandbox),
        Answer(lambda model: experts),
    )
    return QuestionAnswering(Toolbox(tools, timeout_s), max_calls, is_compact)


class NoisyEngine(ScriptedEngine):
    """Scripted tokens with log-probabilities that tell the tokens apart, and a new version every turn."""

    async def generate(self, *arguments, **keywords):
        completion = await super().generate(*arguments, **keywords)
        logprobs = -np.arange(1, len(completion.tokens) + 1, dtype=np.float32) / 8
        await self.update_weights(None, self._version + 1)
        return Completion(completion.tokens, logprobs, completion.policy_versions, completion.stop_reason)


def play(
    environment, turns, chat=CHAT, engine=NoisyEngine, max_tokens=400, max_turn_tokens=120, calls_per_turn=1,
    num_corrections=0,
):  # fmt: skip
    """An episode whose turns are lists of tokens, or of calls, or single calls."""
    scripts = [_turn_tokens(chat, turn, number) for number, turn in enumerate(turns)]
    config = RolloutConfig(max_turn_tokens, max_tokens, calls_per_turn, 1.0, 0.2, 200.0, num_corrections)
    made = engine(lambda session_id, turn, prompt_tokens: scripts[turn], VERSION)
    return asyncio.run(run_episode(INSTANCE, 0, environment, made, chat, config, seed=0))


def _turn_tokens(chat, turn, number):
    calls = [turn] if isinstance(turn, ToolCall) else turn
    if calls and isinstance(calls[0], ToolCall):
        return chat_format.encode_turn(chat, "let us see" if number == 0 else "", calls)
    return calls


def statuses(trajectory):
    return [record.status for record in trajectory.calls]


def check_alignment(trajectory):
    length = len(trajectory.tokens)
    assert len(trajectory.loss_mask) == len(trajectory.logprobs) == len(trajectory.policy_versions) == length
    mask = trajectory.loss_mask
    assert (trajectory.tokens.dtype, mask.dtype) == (np.int32, np.bool_)
    assert (trajectory.logprobs.dtype, trajectory.policy_versions.dtype) == (np.float32, np.int32)
    assert not mask[: trajectory.num_prompt_tokens].any()
    assert (trajectory.logprobs[~mask] == 0).all() and (trajectory.policy_versions[~mask] == -1).all()
    assert (trajectory.logprobs[mask] < 0).all() and (trajectory.policy_versions[mask] >= VERSION).all()


def sampled_turns(trajectory):
    """The runs of sampled tokens, as (start, end)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trajectory.loss_mask.astype(int), [0]])))
    return list(zip(edges[::2], edges[1::2]))


def test_one_call_a_turn_records_what_was_sampled_and_forces_the_end_of_the_turn(environment):
    """Rules 1 and 3."""
    trajectory = play(environment, [SEARCH, ANSWER])
    assert (trajectory.status, trajectory.answer) == (EpisodeStatus.ANSWERED, "tom")
    check_alignment(trajectory)
    (start, end), (last_start, last_end) = sampled_turns(trajectory)
    assert start == trajectory.num_prompt_tokens and last_end == len(trajectory.tokens)
    for number, (begin, stop) in enumerate(((start, end), (last_start, last_end))):
        np.testing.assert_allclose(trajectory.logprobs[begin:stop], -np.arange(1, stop - begin + 1) / 8)
        assert set(trajectory.policy_versions[begin:stop]) == {VERSION + number}
        assert trajectory.tokens[stop - 1] == CHAT.end_of_call_id
    assert trajectory.tokens[end] == CHAT.end_of_turn_id and not trajectory.loss_mask[end]
    assert list(trajectory.tokens).count(CHAT.end_of_turn_id) == 3  # user, forced, observation


@pytest.mark.parametrize(
    ("directory", "rendering"),
    [(SMALL_TOKENIZER_DIRECTORY, "compact"), (SMALL_TOKENIZER_DIRECTORY, "qwen3"), (QWEN3_DIRECTORY, "qwen3")],
)
@pytest.mark.parametrize("calls_per_turn", [1, 2])
def test_the_stream_is_the_rendering_of_its_messages(experts, sandbox, directory, rendering, calls_per_turn):
    """Rule 2: also under the whole template, with the real tokenizer where there is one."""
    if not (directory / "tokenizer.json").is_file():
        pytest.skip("no Qwen3 tokenizer: set ORCHESTRA_QWEN3_TOKENIZER to a directory that holds one")
    chat = load_chat(directory, rendering)
    environment = make_environment(experts, sandbox, is_compact=rendering == "compact")
    first = [SEARCH] if calls_per_turn == 1 else [SEARCH, COMPUTE]
    turns = [first, ANSWER]
    trajectory = play(environment, turns, chat, max_tokens=4000, max_turn_tokens=300, calls_per_turn=calls_per_turn)
    assert trajectory.status == EpisodeStatus.ANSWERED
    messages, tools = environment.prompt(INSTANCE)
    shown = [
        environment.observation(record.result_text, "documents found" if record.call == SEARCH else "program printed")
        for record in trajectory.calls[: len(first)]
    ]
    messages = [
        *messages,
        Message("assistant", "", "let us see", tuple(first)),
        *(Message("tool", text) for text in shown),
    ]
    opening = chat_format.encode_prompt(chat, messages, tools)
    last_turn = chat_format.encode_turn(chat, "", [ANSWER])
    expected = opening + (last_turn[:-1] if calls_per_turn == 1 else last_turn)
    assert trajectory.tokens.tolist() == expected


def test_calls_of_one_turn_run_side_by_side_and_do_not_see_each_other(sandbox):
    """Rules 4 and 11: each of two experts waits for the other one; one after the other they would wait for ever."""

    class Pair(Oracle):
        def __init__(self):
            super().__init__()
            self.is_there = {"search": asyncio.Event(), "answer": asyncio.Event()}

        async def reply(self, request):
            self.is_there[request.role].set()
            await self.is_there["answer" if request.role == "search" else "search"].wait()
            return await super().reply(request)

    pair = Pair()
    trajectory = play(make_environment(pair, sandbox, timeout_s=10.0), [[SEARCH, ANSWER]], calls_per_turn=2)
    assert trajectory.status == EpisodeStatus.ANSWERED
    assert [record.is_evidence_present for record in trajectory.calls] == [True, True]  # behind the calls, in order
    assert [request.is_evidence_present for request in pair.requests] == [False, False]  # when they were asked
    assert trajectory.tokens[-1] == CHAT.end_of_turn_id and trajectory.loss_mask[-1]  # sampled, not forced


def test_a_call_runs_while_its_turn_goes_on(experts, sandbox):
    """Rule 4: the second call is only written when the first one's expert has been asked."""
    is_asked = asyncio.Event()

    class Hearing(Oracle):
        async def reply(self, request):
            is_asked.set()
            return await super().reply(request)

    class Patient(NoisyEngine):
        async def generate(self, *arguments, on_watched=None, **keywords):
            def hear(tokens):
                heard.append(tokens.tolist())
                on_watched(tokens)

            heard = []
            first = asyncio.ensure_future(super().generate(*arguments, on_watched=hear, **keywords))
            await asyncio.wait_for(is_asked.wait(), timeout=10.0)
            completion = await first
            assert [tokens[-1] for tokens in heard] == [CHAT.end_of_call_id] * 2
            return completion

    environment = make_environment(Hearing(), sandbox)
    trajectory = play(environment, [[SEARCH, ANSWER]], engine=Patient, calls_per_turn=2)
    assert trajectory.status == EpisodeStatus.ANSWERED and statuses(trajectory) == ["ok", "ok"]
    check_alignment(trajectory)


def test_a_call_that_ran_is_booked_whatever_becomes_of_its_turn(experts, environment):
    """Rules 1, 4 and 6: the turn goes wrong behind its first call, or is cut there."""
    whole = chat_format.encode_turn(CHAT, "", [SEARCH, ANSWER])
    end = whole.index(CHAT.end_of_call_id) + 1
    stray = [*whole[:end], CHAT.start_of_turn_id, *whole[end:]]
    trajectory = play(environment, [stray], calls_per_turn=2)
    assert (trajectory.status, trajectory.answer) == (EpisodeStatus.MALFORMED, "")
    assert statuses(trajectory) == ["ok", "refused"]
    assert [(receipt.tool, receipt.reason) for receipt in trajectory.receipts] == [
        (ORCHESTRATOR, ""), ("search", ""), ("answer", Reason.MALFORMED_TURN)
    ]  # fmt: skip
    assert (trajectory.objectives["calls/search"], trajectory.objectives["calls/answer"]) == (1.0, 0.0)
    cut = play(environment, [whole], max_turn_tokens=end + 1, calls_per_turn=2)
    assert (cut.status, statuses(cut), cut.num_completion_tokens) == (EpisodeStatus.TOKEN_LIMIT, ["ok"], end + 1)
    broken = broken_turn("no JSON")
    late = play(environment, [[*broken, *whole]], max_turn_tokens=len(broken) + 4, calls_per_turn=2)
    assert (late.status, [receipt.reason for receipt in late.receipts]) == (EpisodeStatus.TOKEN_LIMIT, ["", "not_json"])
    assert len(experts.requests) == 2
    check_alignment(cut)


def test_latency_is_the_critical_path_and_totals_are_those_of_the_receipts(environment):
    """Rule 12."""
    trajectory = play(environment, [[SEARCH, COMPUTE], ANSWER], calls_per_turn=2)
    turns = split_turns(trajectory.receipts)
    assert [[receipt.tool for receipt in turn] for turn in turns] == [
        [ORCHESTRATOR, "search", "enhance_reasoning"],
        [ORCHESTRATOR, "answer"],
    ]
    totals = replay(turns)
    assert (
        trajectory.objectives["cost_usd"] == totals.cost_usd and trajectory.objectives["latency_s"] == totals.latency_s
    )
    sampled = [end - start for start, end in sampled_turns(trajectory)]
    assert totals.latency_s == pytest.approx(sum(sampled) / 200.0 + max(10.0, 3.0) + 3.0)
    context = [start for start, _ in sampled_turns(trajectory)]
    own_usd = (sum(context) + sum(sampled)) * 0.2e-6
    assert totals.cost_usd == pytest.approx(own_usd + (1500 * 4.0 + 1500 * 1.0 + 1500 * 1.0) * 1e-6)
    assert [turn[0].input_tokens for turn in turns] == context
    assert [turn[0].output_tokens for turn in turns] == sampled
    assert trajectory.objectives["outcome"] == 1.0
    assert trajectory.objectives["disallowed_calls"] == 1.0  # expert-2 is remote
    assert (trajectory.objectives["calls/search"], trajectory.objectives["calls/answer"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("calls_per_turn", "max_calls", "first", "expected"),
    [
        (2, 3, [LOOK_ELSEWHERE, COMPUTE, ANSWER], ["ok", "ok", "refused"]),
        (5, 2, [LOOK_ELSEWHERE, COMPUTE, ANSWER], ["ok", "ok", "refused"]),
        (5, 3, [LOOK_ELSEWHERE, COMPUTE, ANSWER], ["ok", "ok", "ok"]),
    ],
)
def test_calls_beyond_the_limits_are_refused(experts, sandbox, calls_per_turn, max_calls, first, expected):
    """Rule 5."""
    environment = make_environment(experts, sandbox, max_calls=max_calls)
    trajectory = play(environment, [first], calls_per_turn=calls_per_turn)
    assert statuses(trajectory) == expected
    assert len(experts.requests) == expected.count("ok")
    is_answered = expected[-1] == "ok"
    assert trajectory.status == (EpisodeStatus.ANSWERED if is_answered else EpisodeStatus.TURN_LIMIT)
    assert trajectory.answer == ("tom" if is_answered else "")


def broken_turn(kind):
    call = chat_format.encode_turn(CHAT, "", [SEARCH])
    start, end = call.index(CHAT.start_of_call_id), call.index(CHAT.end_of_call_id)
    return {
        "text alone": [*CHAT.content_encoder.encode("expert-3", add_special_tokens=False).ids, CHAT.end_of_turn_id],
        "nothing": [CHAT.end_of_turn_id],
        "no JSON": [*call[: start + 1], *call[start + 3 : end + 1]],
        "unclosed thought": [CHAT.start_of_thinking_id, *call],
        "a control token inside": [*call[: end - 1], CHAT.start_of_turn_id, *call[end - 1 :]],
        "no opening": call[start + 1 :],
    }[kind]


@pytest.mark.parametrize(
    "kind", ["text alone", "nothing", "no JSON", "unclosed thought", "a control token inside", "no opening"]
)
def test_a_malformed_turn_ends_the_episode_and_is_trained_on(environment, experts, kind):
    """Rule 6."""
    broken = broken_turn(kind)
    trajectory = play(environment, [broken])
    assert (trajectory.status, trajectory.answer) == (EpisodeStatus.MALFORMED, "")
    errors = [call.error for call in chat_format.parse_turn(CHAT, broken).calls]
    assert len(errors) == (kind in ("no JSON", "a control token inside")) and all(errors)
    assert [(record.result_text, record.status) for record in trajectory.calls] == [(e, "refused") for e in errors]
    assert trajectory.loss_mask[trajectory.num_prompt_tokens :].all() and trajectory.num_completion_tokens > 0
    check_alignment(trajectory)
    assert not experts.requests and trajectory.objectives["outcome"] == 0.0
    turn, *refused = trajectory.receipts
    assert turn.tool == ORCHESTRATOR and turn.cost_usd > 0  # paid for all the same
    assert [(each.reason, each.cost_usd, each.attempt) for each in refused] == [(Reason.NOT_JSON, 0.0, 0)] * len(errors)


@pytest.mark.parametrize(
    "kind", ["text alone", "nothing", "no JSON", "unclosed thought", "a control token inside", "no opening"]
)
def test_the_first_malformed_turn_is_corrected_and_the_second_ends_the_episode(environment, kind):
    """Rule 6: the correction is an observation (mask 0) behind the end of the turn; the bad turn is trained on."""
    broken = broken_turn(kind)
    trajectory = play(environment, [broken, ANSWER], num_corrections=1)
    assert (trajectory.status, trajectory.answer) == (EpisodeStatus.ANSWERED, "tom")
    check_alignment(trajectory)
    errors = [call.error for call in chat_format.parse_turn(CHAT, broken).calls if call.error]
    assert [record.result_text for record in trajectory.calls[:-1]] == errors
    assert [receipt.reason for receipt in trajectory.receipts[1:-2]] == [Reason.NOT_JSON] * len(errors)
    (start, end), (last_start, _) = sampled_turns(trajectory)
    stops = chat_format.stop_ids(CHAT, 1)
    sampled = broken[: 1 + next(number for number, token in enumerate(broken) if token in stops)]
    assert trajectory.tokens[start:end].tolist() == sampled
    forced = [] if sampled[-1] == CHAT.end_of_turn_id else [CHAT.end_of_turn_id]
    told = errors or [environment.observation(CORRECTION, SHORT_CORRECTION)]
    assert trajectory.tokens[end:last_start].tolist() == forced + chat_format.encode_observation(CHAT, told)
    again = play(environment, [broken, broken, ANSWER], num_corrections=1)
    assert (again.status, len(again.calls)) == (EpisodeStatus.MALFORMED, 2 * len(errors))
    assert sum(receipt.tool == ORCHESTRATOR for receipt in again.receipts) == 2 and again.loss_mask[-1]


def test_a_good_call_between_two_malformed_turns_does_not_reset_the_count(environment):
    broken = broken_turn("nothing")
    trajectory = play(environment, [broken, SEARCH, broken, ANSWER], num_corrections=1)
    assert trajectory.status == EpisodeStatus.MALFORMED and len(trajectory.calls) == 1


def test_a_correction_for_which_there_is_no_room_ends_the_episode(environment):
    broken = broken_turn("text alone")
    room = play(environment, [broken]).num_prompt_tokens + len(broken) + 1
    assert play(environment, [broken], max_tokens=room, num_corrections=1).status == EpisodeStatus.TOKEN_LIMIT


@pytest.mark.parametrize(
    "call",
    [
        ToolCall("browse", {"model": "expert-3"}),
        ToolCall("search", {"model": "expert-9"}),
        ToolCall("search", {"model": "expert-1"}),  # exists, but is not on offer here
        ToolCall("search", {}),
        ToolCall("search", {"model": 3}),
        ToolCall("search", {"model": "expert-3", "query": "cat"}),
    ],
)
def test_a_call_that_cannot_be_run_is_refused_and_the_episode_goes_on(environment, experts, call):
    """Rule 7."""
    trajectory = play(environment, [call, SEARCH, ANSWER])
    assert statuses(trajectory) == [CallStatus.REFUSED, CallStatus.OK, CallStatus.OK]
    assert (trajectory.status, trajectory.answer, len(experts.requests)) == (EpisodeStatus.ANSWERED, "tom", 2)
    assert trajectory.receipts[1].cost_usd == 0.0 and trajectory.receipts[1].status == CallStatus.REFUSED


def test_too_many_calls_without_an_answer(environment):
    """Rule 8: refused calls count too, and nothing is shown behind the last one."""
    trajectory = play(environment, [SEARCH, ToolCall("browse", {}), COMPUTE])
    assert (trajectory.status, len(trajectory.calls), trajectory.answer) == (EpisodeStatus.TURN_LIMIT, 3, "")
    assert trajectory.loss_mask[-1] and trajectory.objectives["outcome"] == 0.0
    check_alignment(trajectory)


def test_a_turn_that_is_too_long_is_cut(environment, experts):
    """Rule 9."""
    whole = len(chat_format.encode_turn(CHAT, "let us see", [ANSWER])) - 1  # up to the end of the call
    assert play(environment, [ANSWER], max_turn_tokens=whole).status == EpisodeStatus.ANSWERED
    experts.requests.clear()
    cut = play(environment, [ANSWER], max_turn_tokens=whole - 1)
    assert (cut.status, cut.calls, cut.answer, experts.requests) == (EpisodeStatus.TOKEN_LIMIT, (), "", [])
    assert cut.num_completion_tokens == whole - 1 and cut.loss_mask[-1]


def test_no_stream_exceeds_the_token_limit(environment):
    """Rule 9: every limit between the prompt and the whole episode."""
    turns = [SEARCH, COMPUTE, ANSWER]
    whole = play(environment, turns)
    assert whole.status == EpisodeStatus.ANSWERED
    for max_tokens in range(whole.num_prompt_tokens + 1, len(whole.tokens) + 2):
        trajectory = play(environment, turns, max_tokens=max_tokens)
        is_enough = max_tokens >= len(whole.tokens)
        assert trajectory.status == (EpisodeStatus.ANSWERED if is_enough else EpisodeStatus.TOKEN_LIMIT), max_tokens
        assert len(trajectory.tokens) <= max_tokens and trajectory.loss_mask[-1]
        assert trajectory.tokens.tolist() == whole.tokens[: len(trajectory.tokens)].tolist()
        check_alignment(trajectory)


def test_a_prompt_without_room_is_a_mistake_of_the_config(environment):
    """Rule 9."""
    num_prompt = play(environment, [ANSWER]).num_prompt_tokens
    with pytest.raises(ValueError, match=rf"{num_prompt} tokens and max_tokens is {num_prompt}: raise"):
        play(environment, [ANSWER], max_tokens=num_prompt)


def test_a_late_tool_is_a_tool_failure(sandbox):
    """Rule 10: the call is recorded and charged its time."""

    class Sleeper(Oracle):
        async def reply(self, request):
            await asyncio.sleep(30)

    trajectory = play(make_environment(Sleeper(), sandbox, timeout_s=0.05), [SEARCH, ANSWER])
    assert (trajectory.status, trajectory.answer) == (EpisodeStatus.TOOL_FAILURE, "")
    assert statuses(trajectory) == [CallStatus.TIMEOUT] and trajectory.objectives["latency_s"] > 0.05


@pytest.mark.parametrize("status", [CallStatus.FAILED, CallStatus.TIMEOUT])
def test_an_expert_that_fails_is_a_tool_failure_even_beside_an_answer(sandbox, status):
    """Rule 10."""

    class Broken(Oracle):
        async def reply(self, request):
            done = CallStatus.OK if request.role == "answer" else status
            return ExpertReply("tom", 1000, 0, 1.0, done)

    trajectory = play(make_environment(Broken(), sandbox), [[SEARCH, ANSWER]], calls_per_turn=2)
    assert (trajectory.status, trajectory.answer) == (EpisodeStatus.TOOL_FAILURE, "")
    assert statuses(trajectory) == [status, CallStatus.OK]
    assert trajectory.objectives["outcome"] == 0.0 and trajectory.objectives["cost_usd"] > 0.004


def test_an_aborted_request_is_a_tool_failure(environment):
    """Rule 10: what was sampled before stays."""

    class Aborting(ScriptedEngine):
        async def generate(self, *arguments, **keywords):
            completion = await super().generate(*arguments, **keywords)
            return Completion(completion.tokens, completion.logprobs, completion.policy_versions, StopReason.ABORTED)

    trajectory = play(environment, [ANSWER], engine=Aborting)
    assert (trajectory.status, trajectory.calls) == (EpisodeStatus.TOOL_FAILURE, ())
    assert trajectory.num_completion_tokens > 0


def test_the_evidence_stays_once_it_is_there(environment, experts):
    """Rule 11."""
    trajectory = play(environment, [LOOK_ELSEWHERE, SEARCH, ANSWER])
    assert [record.is_evidence_present for record in trajectory.calls] == [False, True, True]
    assert [request.is_evidence_present for request in experts.requests] == [False, False, True]
    assert trajectory.calls[0].result_text == "no documents found" and "tom is a cat" in trajectory.calls[1].result_text
    blind = play(environment, [COMPUTE, ANSWER])
    assert not any(record.is_evidence_present for record in blind.calls)


def test_the_first_of_two_answers_counts(sandbox):
    """Rule 11."""

    class Named(Oracle):
        async def reply(self, request):
            return ExpertReply("tom" if request.offer.alias == "expert-3" else "rex", 1000, 500, 1.0)

    turn = [ANSWER, ToolCall("answer", {"model": "expert-2"})]
    trajectory = play(make_environment(Named(), sandbox), [turn], calls_per_turn=2)
    assert (trajectory.answer, trajectory.objectives["outcome"]) == ("tom", 1.0)


def test_an_engine_whose_arrays_differ_in_length_is_a_bug():
    """Rule 1."""
    torn = Completion(np.zeros(3, np.int32), np.zeros(2, np.float32), np.zeros(3, np.int32), StopReason.STOP)
    with pytest.raises(AssertionError, match=r"\(3, 2, 3\)"):
        TokenStream([1, 2]).append_sampled(torn)
