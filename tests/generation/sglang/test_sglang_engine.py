"""The engine over HTTP: tokens as they were sampled, interception, placement, limits, abort, bad input."""

import asyncio
import time

import numpy as np
import pytest

from orchestra_jax.generation.engine import Constraint, Sampling
from orchestra_jax.types import StopReason
from tests.generation.sglang.servers import STOP, VOCAB_SIZE, ProtocolServer, generate, rollout, sampling


def test_tokens_logprobs_and_versions_are_those_of_the_server(make_engine, server):
    engine = make_engine(server.url, version=3)
    completion = generate(engine, [1, 2, 3], sampling(6, stop_ids=()))
    tokens = rollout([1, 2, 3], 3, 6)
    assert completion.tokens.tolist() == tokens and completion.tokens.dtype == np.int32
    np.testing.assert_allclose(completion.logprobs, [-0.5 - token / 100 for token in tokens], rtol=1e-6)
    assert completion.policy_versions.tolist() == [3] * 6
    assert completion.stop_reason == StopReason.LENGTH


def test_what_is_asked_for_is_on_policy_and_token_exact(make_engine, server):
    generate(make_engine(server.url), np.array([1, 2, 3], np.int32))
    (payload,) = server.payloads
    parameters = payload["sampling_params"]
    assert payload["input_ids"] == [1, 2, 3] and "text" not in payload and payload["return_logprob"] is True
    assert (parameters["top_p"], parameters["top_k"], parameters["min_p"], parameters["temperature"]) == (1, -1, 0, 1)
    assert parameters["stop_token_ids"] == [STOP] and "stop" not in parameters and parameters["no_stop_trim"] is True


def stopping_prompt(count=4):
    """A prompt behind which the first stop id comes as the count-th token."""
    for first in range(VOCAB_SIZE):
        for second in range(VOCAB_SIZE):
            if STOP in (tokens := rollout([first, second], 1, 8)) and tokens.index(STOP) == count - 1:
                return [first, second]
    raise AssertionError("no such prompt")


@pytest.mark.parametrize("is_watching", [False, True])
def test_a_stop_id_ends_the_turn_and_is_part_of_it(make_engine, server, is_watching):
    prompt = stopping_prompt()
    watch = {"on_watched": lambda tokens: None} if is_watching else {}
    asked = sampling(watch_ids=frozenset({3}) if is_watching else frozenset())
    completion = generate(make_engine(server.url), prompt, asked, **watch)
    assert completion.tokens.tolist() == rollout(prompt, 1, 4) and completion.tokens[-1] == STOP
    assert completion.stop_reason == StopReason.STOP


@pytest.mark.parametrize("is_incremental", [False, True])
def test_a_watched_id_is_told_while_the_turn_goes_on(make_engine, is_incremental):
    with ProtocolServer(token_s=0.1, is_incremental=is_incremental) as server:
        engine, heard = make_engine(server.url), []
        tokens = rollout([1, 2], 1, 6)
        watched = tokens[1]
        start_s = time.monotonic()
        completion = generate(
            engine, [1, 2], sampling(6, stop_ids=(), watch_ids=frozenset({watched})),
            on_watched=lambda so_far: heard.append((so_far.tolist(), time.monotonic() - start_s)),
        )  # fmt: skip
    assert completion.tokens.tolist() == tokens
    expected = [tokens[: place + 1] for place, token in enumerate(tokens) if token == watched]
    assert [so_far for so_far, _ in heard] == expected
    assert heard[0][1] < 0.45  # born at .2 s; the turn takes .6 s


def test_a_stop_sequence_of_ids_ends_the_turn_at_its_last_id(make_engine):
    with ProtocolServer(token_s=0.02) as server:
        tokens = rollout([1, 2], 1, 8)
        asked = sampling(8, stop_ids=(), stop_sequences=((49, 49), tuple(tokens[2:4])))
        completion = generate(make_engine(server.url), [1, 2], asked)
    assert completion.tokens.tolist() == tokens[:4] and completion.stop_reason == StopReason.STOP


def test_an_end_of_text_that_nobody_asked_for_ends_nothing(make_engine):
    tokens = rollout([1, 2], 1, 8)
    with ProtocolServer(eos=tokens[2]) as server:
        completion = generate(make_engine(server.url), [1, 2], sampling(8, stop_ids=()))
    assert completion.tokens.tolist() == tokens and completion.stop_reason == StopReason.LENGTH
    assert [len(each["input_ids"]) for each in server.payloads][:2] == [2, 5]  # goes on behind it


def test_what_a_server_had_sampled_when_it_aborted_is_kept_and_continued(make_engine):
    with ProtocolServer(token_s=0.05) as server:
        engine = make_engine(server.url)

        asked = sampling(8, stop_ids=())

        async def run():
            task = asyncio.ensure_future(engine.generate([1, 2], asked, request_id="r", session_id="s"))
            await asyncio.sleep(0.2)
            server._aborted.add(server.payloads[0]["rid"])  # as pause_generation with mode "abort" does
            return await task

        completion = asyncio.run(run())
    assert completion.tokens.tolist() == rollout([1, 2], 1, 8) and completion.stop_reason == StopReason.LENGTH
    first, second = server.payloads
    num_kept = len(second["input_ids"]) - 2
    assert 1 <= num_kept < 8 and second["sampling_params"]["max_new_tokens"] == 8 - num_kept
    assert first["rid"] != second["rid"]


def test_abort_returns_what_there_is(make_engine):
    with ProtocolServer(token_s=0.05) as server:
        engine = make_engine(server.url)

        asked = sampling(100, stop_ids=())

        async def run():
            task = asyncio.ensure_future(engine.generate([1], asked, request_id="r", session_id="s"))
            await asyncio.sleep(0.3)
            await engine.abort("r")
            await engine.abort("unknown")
            return await task

        completion = asyncio.run(run())
    num = len(completion.tokens)
    assert completion.stop_reason == StopReason.ABORTED and 1 <= num < 20
    assert completion.tokens.tolist() == rollout([1], 1, num)


def test_a_deadline_of_the_caller_aborts(make_engine):
    with ProtocolServer(token_s=0.2) as server:
        start_s = time.monotonic()
        completion = generate(make_engine(server.url), [1], sampling(100), deadline_s=0.3)
        assert completion.stop_reason == StopReason.ABORTED and time.monotonic() - start_s < 2


def test_a_session_stays_and_rollouts_of_one_prompt_share_a_server(make_engine):
    with ProtocolServer() as one, ProtocolServer() as two:
        engine = make_engine(one.url, two.url)

        async def run():
            for turn in range(3):  # 8 prompts, 2 rollouts each, 3 turns
                await asyncio.gather(
                    *(
                        engine.generate(
                            [prompt] * (turn + 1), sampling(2), request_id=f"{prompt}#{g}@{turn}",
                            session_id=f"{prompt}#{g}",
                        )
                        for prompt in range(8)
                        for g in range(2)
                    )
                )  # fmt: skip

        asyncio.run(run())
    places = {}
    for number, server in enumerate((one, two)):
        for payload in server.payloads:
            prompt = payload["input_ids"][0]
            places.setdefault(prompt, set()).add(number)
    assert all(len(each) == 1 for each in places.values()), places
    assert len(one.payloads) + len(two.payloads) == 48 and min(len(one.payloads), len(two.payloads)) >= 12


def test_no_more_requests_are_under_way_than_allowed(make_engine):
    with ProtocolServer(token_s=0.01) as server:
        engine = make_engine(server.url, max_concurrent=5)

        async def run():
            asked = sampling(2)
            await asyncio.gather(
                *(engine.generate([1], asked, request_id=f"{n}", session_id=f"{n}") for n in range(40))
            )

        asyncio.run(run())
        assert server.peak == 5 and len(server.payloads) == 40


def test_through_a_router_requests_carry_their_session_and_control_calls_go_to_the_servers(make_engine):
    with ProtocolServer() as router, ProtocolServer() as one, ProtocolServer() as two:
        router.label = "1"  # a router passes a worker's answer on
        engine = make_engine(one.url, two.url, router_url=router.url)
        assert generate(engine, [1, 2]).tokens.tolist() == rollout([1, 2], 1, 8)[: len(generate(engine, [1, 2]).tokens)]
        assert set(router.events) == {"/generate"}
        assert "/generate" not in one.events + two.events and one.label == two.label == "1"


class Anything(Constraint):
    def allowed_tokens(self, sampled):
        return None


@pytest.mark.parametrize(
    ("prompt", "asked", "told"),
    [
        ([], sampling(), "there is no prompt"),
        ([1] * 999, sampling(2), "999 prompt tokens and 2 new ones do not fit sglang.context_length 1000"),
        ([1, VOCAB_SIZE], sampling(), r"token ids 1 to 50 are not all in \[0, 50\)"),
        ([-1, 1], sampling(), r"token ids -1 to 7 are not all in \[0, 50\)"),
        ([1], sampling(stop_ids=(VOCAB_SIZE,)), "are not all in"),
        ([1], sampling(0), "max_new_tokens 0 must be 1 or more"),
        ([1], Sampling(0.0, 4, frozenset(), 0, top_k=5), "temperature 0 is greedy and takes no top_k 5"),
        ([1], sampling(constraint=Anything()), "a constraint is for engine=jax alone"),
    ],
)
def test_bad_input_never_reaches_the_server(make_engine, server, prompt, asked, told):
    engine = make_engine(server.url)
    with pytest.raises(ValueError, match=told):
        generate(engine, prompt, asked)
    assert not server.payloads and not server.is_dead
    assert generate(engine, [1, 2], sampling(2)).tokens.tolist() == rollout([1, 2], 1, 2)  # others are not disturbed


def test_a_second_request_of_one_name_is_refused(make_engine):
    with ProtocolServer(token_s=0.05) as server:
        engine = make_engine(server.url)

        async def run():
            first = asyncio.ensure_future(engine.generate([1], sampling(3), request_id="r", session_id="s"))
            await asyncio.sleep(0.05)
            with pytest.raises(ValueError, match="request r is under way"):
                await engine.generate([1], sampling(3), request_id="r", session_id="s")
            return await first

        assert len(asyncio.run(run()).tokens)


def test_an_engine_without_weights_or_servers_says_so(make_engine, server):
    with pytest.raises(ValueError, match="call update_weights before generate"):
        generate(make_engine(server.url, version=None), [1])
    with pytest.raises(ValueError, match=r"sglang.urls \(\) must name servers"):
        make_engine()
