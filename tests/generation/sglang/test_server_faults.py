"""Servers that hang, refuse, answer 500, garbage or half a reply, or are killed: every case ends in its deadline."""

import asyncio
import collections
import time

import numpy as np
import pytest

from orchestra_jax.types import StopReason
from tests.generation.sglang.servers import FaultProxy, ProtocolServer, generate, rollout, sampling

SLACK_S = 20.0  # for a machine with other work


@pytest.mark.parametrize("fault", ["500", "503", "reset", "garbage", "other json", "truncated", "stale", "hang"])
@pytest.mark.parametrize("is_watching", [False, True])
def test_two_faults_are_passed_over_and_nothing_is_lost(make_engine, server, fault, is_watching):
    proxy = FaultProxy(server.url, lambda path, number: fault if path == "/generate" and number <= 2 else "pass")
    with proxy:
        engine = make_engine(proxy.url, attempt_timeout_s=0.5 if fault == "hang" else 5.0)
        heard = []
        watched = frozenset(range(50)) if is_watching else frozenset()
        asked = sampling(4, stop_ids=(), watch_ids=watched)
        completion = generate(engine, [1, 2], asked, on_watched=lambda tokens: heard.append(tokens.tolist()))
    tokens = rollout([1, 2], 1, 4)
    assert completion.tokens.tolist() == tokens and completion.stop_reason == StopReason.LENGTH
    assert proxy.counts["/generate"] >= 3
    assert heard == ([tokens[:count] for count in range(1, 5)] if is_watching else [])  # each told once


def test_a_stream_that_is_cut_goes_on_behind_what_was_heard(make_engine, server):
    def fault(path, number):
        return "cut stream" if path == "/generate" and number == 1 else "pass"

    with FaultProxy(server.url, fault) as proxy:
        heard, asked = [], sampling(6, stop_ids=(), watch_ids=frozenset(range(50)))
        completion = generate(
            make_engine(proxy.url), [1, 2], asked, on_watched=lambda tokens: heard.append(tokens.tolist())
        )
    tokens = rollout([1, 2], 1, 6)
    assert completion.tokens.tolist() == tokens and heard == [tokens[:count] for count in range(1, 7)]
    assert [len(each["input_ids"]) for each in server.payloads] == [2, 4]


def test_a_slow_server_is_waited_for(make_engine, server):
    with FaultProxy(server.url, lambda path, number: "slow" if path == "/generate" else "pass") as proxy:
        completion = generate(make_engine(proxy.url), [1, 2], sampling(4, stop_ids=()))
    assert completion.tokens.tolist() == rollout([1, 2], 1, 4) and len(server.payloads) == 1


@pytest.mark.parametrize("fault", ["500", "reset", "garbage", "truncated", "stale", "hang"])
def test_a_fault_that_stays_ends_in_a_typed_failure(make_engine, server, fault):
    with FaultProxy(server.url, lambda path, number: fault if path == "/generate" else "pass") as proxy:
        engine = make_engine(proxy.url, attempt_timeout_s=0.2, timeout_s=3.0, max_attempts=3)
        start_s = time.monotonic()
        completion = generate(engine, [1, 2])
        assert time.monotonic() - start_s < 3 + SLACK_S
    assert completion.stop_reason == StopReason.FAILED and not len(completion.tokens)
    assert 1 <= proxy.counts["/generate"] <= 3  # bounded


def test_a_server_that_refuses_ends_in_a_typed_failure_or_the_callers_deadline(make_engine):
    with ProtocolServer() as server:
        engine = make_engine(server.url, timeout_s=1.0, first_wait_s=0.05)
    start_s = time.monotonic()
    assert generate(engine, [1, 2]).stop_reason == StopReason.FAILED
    assert generate(engine, [1, 2], deadline_s=0.05).stop_reason in (StopReason.ABORTED, StopReason.FAILED)
    assert time.monotonic() - start_s < 2 + SLACK_S


def test_a_server_that_hangs_altogether_ends_at_the_deadline(make_engine, server):
    is_hanging = []
    with FaultProxy(server.url, lambda path, number: "hang" if is_hanging else "pass") as proxy:
        engine = make_engine(proxy.url, timeout_s=0.6, attempt_timeout_s=0.2)
        is_hanging.append(True)
        start_s = time.monotonic()
        assert generate(engine, [1, 2]).stop_reason == StopReason.FAILED
        assert time.monotonic() - start_s < 0.6 + SLACK_S


def test_a_request_that_is_wrong_raises_what_the_server_says(make_engine, server, monkeypatch):
    from aiohttp import web

    async def refuse(self, request, body):
        return web.Response(status=400, text="The input is longer than the model's context length")

    monkeypatch.setattr(ProtocolServer, "_generate", refuse)
    with pytest.raises(ValueError, match="answered 400: The input is longer than the model's context length"):
        generate(make_engine(server.url), [1, 2])
    assert server.events.count("/generate") == 1


def test_retries_wait_longer_each_time_with_jitter(make_engine, server):
    """Three waits of .1, .2 and .4 s, each times 1/2 to 1."""
    with FaultProxy(server.url, lambda path, number: "500" if path == "/generate" else "pass") as proxy:
        engine = make_engine(proxy.url, first_wait_s=0.1, max_attempts=4)
        start_s = time.monotonic()
        generate(engine, [1, 2])
        assert 0.35 <= time.monotonic() - start_s < 0.7 + SLACK_S
    assert proxy.counts["/generate"] == 4


def test_a_server_killed_mid_rollout_loses_no_episode_and_serves_again_with_the_current_weights(make_engine, tmp_path):
    with ProtocolServer(token_s=0.02) as one, ProtocolServer(token_s=0.02) as two:
        engine = make_engine(one.url, two.url, version=4, max_attempts=20)
        revived = ProtocolServer(port=two.port, label="2")  # with old weights

        async def run():
            episodes = [
                engine.generate([n], sampling(5, stop_ids=()), request_id=f"{n}", session_id=f"{n}") for n in range(24)
            ]
            tasks = [asyncio.ensure_future(each) for each in episodes]
            while not two._under_way:
                await asyncio.sleep(0.005)
            await asyncio.to_thread(two.stop)
            revived.__enter__()
            completions = await asyncio.gather(*tasks)
            for n in range(100, 140):  # until the revived one has had its turn
                await engine.generate([n % 50], sampling(2), request_id=f"{n}", session_id=f"{n}")
                if revived.label == "4" and revived.events[-1] == "/generate":
                    break
                await asyncio.sleep(0.05)
            return completions

        completions = asyncio.run(run())
        revived.stop()
    assert [each.tokens.tolist() for each in completions] == [rollout([n], 4, 5) for n in range(24)]
    assert all((each.policy_versions == 4).all() for each in completions)
    # A request may have been on its way to it before anybody knew: what old weights sample is not believed (above).
    assert revived.label == "4" and revived.events.count("/update_weights_from_disk") == 1
    assert "/generate" in revived.events[revived.events.index("/continue_generation") :]


def test_a_server_that_comes_back_with_other_weights_unseen_is_found_by_its_first_reply(make_engine, server):
    engine = make_engine(server.url, version=4)
    server.label = "3"
    completion = generate(engine, [1, 2], sampling(4, stop_ids=()))
    assert completion.policy_versions.tolist() == [4] * 4 and completion.tokens.tolist() == rollout([1, 2], 4, 4)
    assert collections.Counter(server.events)["/update_weights_from_disk"] == 2


def test_an_episode_whose_engine_fails_says_so(components, make_engine):
    from orchestra_jax.data.pipeline import evaluation_instances
    from orchestra_jax.environments.groups import run_groups
    from orchestra_jax.experts.world import WorldConfig
    from orchestra_jax.grpo.filters import rollout_facts
    from orchestra_jax.types import EpisodeStatus

    with ProtocolServer() as server:
        engine = make_engine(server.url, timeout_s=0.3)
    engine._vocab_size = 10_000
    instances = evaluation_instances(components.test_tasks, components.preferences, WorldConfig(), 1, 0)
    groups = run_groups(instances[:1], 2, components.environment, engine, components.chat, components.rollout, 0)
    assert [each.status for each in groups[0].trajectories] == [EpisodeStatus.ENGINE_FAILURE] * 2
    assert np.all(rollout_facts(groups).is_failed_PG)
