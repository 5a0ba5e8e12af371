import asyncio

import jax
import numpy as np
import pytest

from orchestra_jax.generation.engine import Sampling
from orchestra_jax.generation.jax_engine import JaxEngine, JaxEngineConfig
from orchestra_jax.generation.replicas import Replicas
from orchestra_jax.models import transformer
from orchestra_jax.models.config import MODELS
from orchestra_jax.types import StopReason

TINY = MODELS["tiny"]
SIZES = JaxEngineConfig(
    num_rows=8, max_tokens=40, row_buckets=(4,), slot_buckets=(20,), chunk_rows=2, chunk_buckets=(6, 12),
    steps_per_dispatch=4,
)  # fmt: skip
# Two rollouts of each of three prompts.
PROMPTS = {f"{name}#{k}": tokens for name, tokens in (("a", [3, 1, 4]), ("b", [9, 2]), ("c", [5])) for k in range(2)}


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(TINY, jax.random.key(0))


def generate(engine, prompts, max_new_tokens=6):
    async def ask():
        how = Sampling(1.0, max_new_tokens, frozenset(), seed=0)
        return await asyncio.gather(
            *(engine.generate(prompts[name], how, request_id=f"r{name}", session_id=name) for name in prompts)
        )

    return dict(zip(prompts, asyncio.run(ask()), strict=True))


def test_two_engines_sample_what_one_samples_to_the_last_bit(params):
    one, two = JaxEngine(TINY, params, SIZES), Replicas([JaxEngine(TINY, params, SIZES) for _ in range(2)])
    prompts, version = PROMPTS, 0
    for _ in range(2):  # two turns, new weights between them
        expected, completions = generate(one, prompts), generate(two, prompts)
        for name in prompts:
            np.testing.assert_array_equal(completions[name].tokens, expected[name].tokens)
            np.testing.assert_array_equal(completions[name].logprobs, expected[name].logprobs)
            assert set(completions[name].policy_versions) == {version}
        prompts = {name: [*prompts[name], *expected[name].tokens.tolist(), 7] for name in prompts}
        version += 1
        for engine in (one, two):
            asyncio.run(engine.update_weights(params, version))


def test_rollouts_of_a_prompt_go_to_one_engine_and_prompts_to_the_emptiest(params):
    engine = Replicas([JaxEngine(TINY, params, SIZES) for _ in range(2)])
    completions = generate(engine, PROMPTS)
    sampled = [each.counters.num_sampled_tokens for each in engine.engines]
    assert sorted(sampled) == [2 * 6, 4 * 6]
    # What a session sampled makes a prompt of its own of it; it stays where its prefix is.
    generate(engine, {name: [*PROMPTS[name], *completions[name].tokens.tolist(), 7] for name in PROMPTS})
    assert [each.counters.num_sampled_tokens for each in engine.engines] == [2 * count for count in sampled]


def test_an_abort_reaches_the_engine_that_plays_the_request(params):
    engine = Replicas([JaxEngine(TINY, params, SIZES) for _ in range(2)])

    async def play():
        how = Sampling(1.0, 30, frozenset(), seed=0)
        requests = [
            asyncio.create_task(engine.generate([3, number], how, request_id=f"{number}", session_id=f"{number}"))
            for number in range(4)
        ]
        await asyncio.sleep(0)
        await engine.abort("3")
        return await asyncio.gather(*requests)

    reasons = [completion.stop_reason for completion in asyncio.run(play())]
    assert reasons == [StopReason.LENGTH] * 3 + [StopReason.ABORTED]


def test_closing_cancels_whoever_waits_in_any_engine(params):
    engine = Replicas([JaxEngine(TINY, params, SIZES) for _ in range(2)])

    async def play():
        how = Sampling(1.0, 30, frozenset(), seed=0)
        requests = [
            asyncio.create_task(engine.generate([number], how, request_id=f"{number}", session_id=f"{number}"))
            for number in range(2)
        ]
        await asyncio.sleep(0)
        await engine.close()
        return await asyncio.gather(*requests, return_exceptions=True)

    assert all(isinstance(said, asyncio.CancelledError) for said in asyncio.run(play()))
