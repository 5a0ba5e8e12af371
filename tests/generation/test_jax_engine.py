"""The embedded engine against a plain loop over the model, and what it does when things go wrong.

Legend: B rows, T tokens, C completion tokens, V vocab.
"""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.generation import decoding, jax_engine
from orchestra_jax.generation.engine import Sampling
from orchestra_jax.generation.jax_engine import JaxEngine, JaxEngineConfig
from orchestra_jax.grpo.batching import BatchShape, make_micro_batches
from orchestra_jax.grpo.train_step import batch_logprobs
from orchestra_jax.models import transformer
from orchestra_jax.models.config import MODELS
from orchestra_jax.types import EpisodeStatus, StopReason, Trajectory, TrajectoryGroup

TINY = MODELS["tiny"]
# One set of sizes for all tests: each is compiled once.
SIZES = JaxEngineConfig(
    num_rows=4,
    max_tokens=40,
    max_turn_tokens=8,
    prompts_per_prefill=2,
    prefill_buckets=(12,),
    turn_buckets=(6,),
    row_buckets=(2, 4),
    slot_buckets=(20,),
)
SHORT, LONG = [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]
OBSERVATIONS = ([11, 12, 13], [14, 15])  # what a session is given after its first and its second turn


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(TINY, jax.random.key(0))


@pytest.fixture(scope="module")
def other_params():
    return transformer.init_params(TINY, jax.random.key(1))


@pytest.fixture
def engine(params):
    return JaxEngine(TINY, params, SIZES, version=3)


@pytest.fixture
def calls(monkeypatch):
    """How often each compiled function ran, and how many prompts were prefilled."""
    counts = {"prefill": 0, "extend": 0, "decode": 0, "prompts": 0}

    def counted(name):
        function = getattr(decoding, name)

        def call(*args, **kwargs):
            counts[name] += 1
            if name == "prefill":
                counts["prompts"] += int((args[3] > 0).sum())
            return function(*args, **kwargs)

        return call

    for name in ("prefill", "extend", "decode"):
        monkeypatch.setattr(jax_engine, name, counted(name))
    return counts


def sampling(temperature=1.0, max_new_tokens=6, stop_ids=(), seed=0):
    return Sampling(temperature, max_new_tokens, frozenset(stop_ids), seed)


def generate(engine, prompts, how=None):
    """The completions of {session: prompt}, asked for at once, in an event loop of their own."""

    async def ask():
        requests = (
            engine.generate(prompt, how or sampling(), request_id=f"{session}@{len(prompt)}", session_id=session)
            for session, prompt in prompts.items()
        )
        return await asyncio.gather(*requests)

    return dict(zip(prompts, asyncio.run(ask()), strict=True))


def play(engine, prompts, how=None):
    """Three turns of each session with given tokens between -> {session: (stream, completions)}."""
    streams = {session: list(prompt) for session, prompt in prompts.items()}
    completions = {session: [] for session in prompts}
    for observation in (*OBSERVATIONS, []):
        for session, completion in generate(engine, streams, how).items():
            completions[session].append(completion)
            streams[session] = [*streams[session], *completion.tokens.tolist(), *observation]
    return {session: (streams[session], completions[session]) for session in prompts}


def trajectory(session, prompt, completions):
    tokens, mask, logprobs = list(prompt), [False] * len(prompt), [0.0] * len(prompt)
    for completion, observation in zip(completions, (*OBSERVATIONS, []), strict=True):
        tokens += [*completion.tokens.tolist(), *observation]
        mask += [True] * len(completion.tokens) + [False] * len(observation)
        logprobs += [*completion.logprobs.tolist(), *[0.0] * len(observation)]
    return Trajectory(
        instance_id="i", rollout_index=0, tokens=np.array(tokens, np.int32), loss_mask=np.array(mask),
        logprobs=np.array(logprobs, np.float32), policy_versions=np.where(mask, 3, -1), num_prompt_tokens=len(prompt),
        calls=(), receipts=(), status=EpisodeStatus.ANSWERED, answer="", objectives={},
    )  # fmt: skip


@jax.jit
def plain_logits(params, tokens_1T):
    positions_1T = jnp.arange(tokens_1T.shape[1])[None, :]
    hidden_1TD, _ = transformer.Transformer(TINY).apply(
        {"params": params}, tokens_1T, positions_1T, jnp.ones_like(tokens_1T)
    )
    return hidden_1TD[0] @ transformer.head_weights(params, TINY)


def plain_greedy(params, prompt, num_tokens):
    tokens = list(prompt)
    for _ in range(num_tokens):
        padded_1T = np.zeros((1, SIZES.max_tokens), np.int32)
        padded_1T[0, : len(tokens)] = tokens
        tokens.append(int(plain_logits(params, padded_1T)[len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_tokens_equal_an_uncached_loop(engine, params):
    prompts = {"a": SHORT, "b": LONG, "c": [7]}
    for session, completion in generate(engine, prompts, sampling(temperature=0.0)).items():
        assert completion.tokens.tolist() == plain_greedy(params, prompts[session], 6)
        assert completion.stop_reason == StopReason.LENGTH
        np.testing.assert_array_equal(completion.policy_versions, 3)
    assert engine.num_sampled_tokens == 18


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_over_turns_are_the_trainers(engine, params, temperature):
    prompts = {"a": SHORT, "b": SHORT, "c": LONG, "d": LONG}
    played = play(engine, prompts, sampling(temperature))
    groups = [
        TrajectoryGroup("i", {}, tuple(trajectory(name, prompts[name], played[name][1]) for name in names))
        for names in ("ab", "cd")
    ]
    shape = BatchShape(num_groups=2, group_size=2, prompt_buckets=(12,), completion_buckets=(24,))
    (batch,) = make_micro_batches(groups, np.ones((2, 2)), np.ones((2, 2), bool), shape)
    trained_BC = batch_logprobs(params, batch, temperature, config=TINY, chunk=64)
    assert batch.loss_mask_BC.sum() == 4 * 3 * 6
    np.testing.assert_allclose(
        batch.sampler_logprobs_BC[batch.loss_mask_BC], np.asarray(trained_BC)[batch.loss_mask_BC], atol=1e-4
    )


def test_a_prompt_is_prefilled_once_and_later_turns_feed_new_tokens_alone(engine, calls):
    play(engine, {"a": SHORT, "b": SHORT, "c": LONG, "d": SHORT})
    assert calls["prompts"] == 2 and calls["prefill"] == 1 and calls["extend"] == 2


def test_what_else_is_in_the_batch_does_not_matter_nor_does_a_lost_row(engine, params, calls):
    prompts = {"a": SHORT, "b": SHORT, "c": LONG, "d": LONG, "e": [7], "f": [8, 8]}  # six sessions, four rows
    how = sampling(max_new_tokens=8, stop_ids=range(6))  # turns of many lengths
    together = play(engine, prompts, how)
    assert calls["prompts"] > 5  # sessions lost their rows and were prefilled anew
    for session, prompt in prompts.items():
        stream, completions = play(JaxEngine(TINY, params, SIZES), {session: prompt}, how)[session]
        assert stream == together[session][0], session
        for alone, other in zip(completions, together[session][1], strict=True):
            np.testing.assert_allclose(alone.logprobs, other.logprobs, atol=1e-5)
    assert together["a"][0] != together["b"][0]  # one prompt, two sessions: samples of their own
    other_seed = sampling(max_new_tokens=8, stop_ids=range(6), seed=1)
    assert generate(engine, {"a": SHORT}, other_seed)["a"].tokens.tolist() != together["a"][1][0].tokens.tolist()


def test_the_row_that_a_chunk_leaves_over_goes_on_where_it_was(engine, params, calls):
    short, long = plain_greedy(params, SHORT, 8), plain_greedy(params, LONG, 8)
    stop = next(token for token in short[:7] if token not in long)
    prompts = {"a": SHORT, "b": SHORT, "c": SHORT, "d": LONG}
    completions = generate(engine, prompts, sampling(temperature=0.0, max_new_tokens=8, stop_ids=(stop,)))
    for name in "abc":
        assert completions[name].tokens.tolist() == short[: short.index(stop) + 1]
    assert completions["d"].tokens.tolist() == long
    assert calls["decode"] == 2


def test_a_session_that_changes_its_past_or_is_given_much_is_prefilled_anew(engine, params, calls):
    first = generate(engine, {"a": SHORT})["a"].tokens.tolist()
    changed = [*SHORT[:-1], 30, *first, 11]
    much = [*changed, *range(10, 20)]  # more than turn_buckets hold
    for stream in (changed, much):
        tokens = generate(engine, {"a": stream}, sampling(temperature=0.0))["a"].tokens.tolist()
        assert tokens == plain_greedy(params, stream, 6)
    assert calls["extend"] == 0 and calls["prefill"] == 3


def test_new_weights_forget_the_cache_and_stamp_their_version(engine, other_params):
    stream = [*SHORT, *generate(engine, {"a": SHORT})["a"].tokens.tolist(), 11]
    asyncio.run(engine.update_weights(other_params, 4))
    completion = generate(engine, {"a": stream}, sampling(temperature=0.0))["a"]
    assert completion.tokens.tolist() == plain_greedy(other_params, stream, 6)
    np.testing.assert_array_equal(completion.policy_versions, 4)


def test_a_stop_id_ends_the_turn_and_is_part_of_it(engine, params):
    greedy = plain_greedy(params, LONG, 6)
    stop = next(token for place, token in enumerate(greedy) if place > 1)
    end = greedy.index(stop) + 1
    prompts = {"a": LONG, "b": SHORT}
    completions = generate(engine, prompts, sampling(temperature=0.0, stop_ids=(stop, 36)))
    assert completions["a"].tokens.tolist() == greedy[:end]
    assert completions["a"].stop_reason == StopReason.STOP
    assert len(completions["a"].logprobs) == len(completions["a"].policy_versions) == end


def test_a_turn_that_is_over_does_not_stop_again_while_others_go_on(engine, params):
    (token,) = plain_greedy(params, SHORT, 1)
    stop_ids = plain_greedy(params, [token], 1)  # what the row, which sees no cache any more, would sample next

    async def ask():
        first = sampling(temperature=0.0, max_new_tokens=1, stop_ids=stop_ids)
        second = sampling(temperature=0.0, max_new_tokens=8)
        return await asyncio.gather(
            engine.generate(SHORT, first, request_id="a", session_id="a"),
            engine.generate(LONG, second, request_id="b", session_id="b"),
        )

    over, other = asyncio.run(ask())
    assert token not in stop_ids and over.tokens.tolist() == [token] and over.stop_reason == StopReason.LENGTH
    assert other.tokens.tolist() == plain_greedy(params, LONG, 8)


def test_deadline_and_abort_end_a_request_and_leave_the_others(engine):
    async def ask():
        def request(name, deadline_s=None):
            return engine.generate(LONG, sampling(), request_id=name, session_id=name, deadline_s=deadline_s)

        tasks = [asyncio.ensure_future(request(*args)) for args in (("a",), ("b", 0.0), ("c",), ("d", 100.0))]
        await asyncio.sleep(0)
        await engine.abort("c")
        return await asyncio.gather(*tasks)

    completions = asyncio.run(ask())
    length, aborted = StopReason.LENGTH, StopReason.ABORTED
    assert [completion.stop_reason for completion in completions] == [length, aborted, aborted, length]
    assert [len(completion.tokens) for completion in completions] == [6, 0, 0, 6]


@pytest.mark.parametrize("is_cache_lost", [False, True])
def test_a_failing_batch_raises_in_every_generate_that_waits(engine, params, monkeypatch, is_cache_lost):
    stream = [*SHORT, *generate(engine, {"a": SHORT})["a"].tokens.tolist(), 11]

    def fail(params, cache, *args, **kwargs):
        if is_cache_lost:
            cache.keys_LCKHS.delete()
        raise RuntimeError("out of memory")

    async def ask():
        names = [f"s{number}" for number in range(SIZES.num_rows + 2)]  # two wait for the next batch
        requests = (engine.generate(SHORT, sampling(), request_id=name, session_id=name) for name in names)
        return await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), timeout=60)

    with monkeypatch.context() as patch:
        patch.setattr(jax_engine, "decode", fail)
        errors = asyncio.run(ask())
    assert [str(error) for error in errors] == ["out of memory"] * (SIZES.num_rows + 2)
    after = generate(engine, {"a": stream}, sampling(temperature=0.0))["a"]
    assert after.tokens.tolist() == plain_greedy(params, stream, 6)


def test_close_leaves_nobody_waiting(engine):
    async def ask():
        names = [f"s{number}" for number in range(SIZES.num_rows + 2)]
        tasks = [
            asyncio.ensure_future(engine.generate(SHORT, sampling(), request_id=name, session_id=name))
            for name in names
        ]
        await asyncio.sleep(0)
        await engine.close()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout=60)

    assert all(isinstance(result, asyncio.CancelledError) for result in asyncio.run(ask()))


def test_an_event_loop_that_ends_in_an_error_leaves_the_engine_usable(engine, params):
    async def ask():
        async def break_down():
            await asyncio.sleep(0)
            raise RuntimeError("an episode's own bug")

        await asyncio.gather(engine.generate(SHORT, sampling(), request_id="a", session_id="a"), break_down())

    with pytest.raises(RuntimeError, match="own bug"):
        asyncio.run(ask())
    completion = generate(engine, {"a": SHORT}, sampling(temperature=0.0))["a"]
    assert completion.tokens.tolist() == plain_greedy(params, SHORT, 6)


@pytest.mark.parametrize(
    ("prompt", "how"),
    [
        ([], sampling()),
        ([1] * 35, sampling()),
        (SHORT, sampling(max_new_tokens=9)),
        (SHORT, sampling(max_new_tokens=0)),
        (SHORT, sampling(temperature=-1.0)),
        (SHORT, sampling(stop_ids=range(9))),
    ],
)
def test_a_request_that_fits_no_size_is_refused(engine, prompt, how):
    with pytest.raises(ValueError, match="request a@"):
        generate(engine, {"a": prompt}, how)


def test_a_second_request_of_a_waiting_session_is_refused(engine):
    async def ask():
        requests = (engine.generate(SHORT, sampling(), request_id=name, session_id="a") for name in "xy")
        return await asyncio.gather(*requests, return_exceptions=True)

    first, second = asyncio.run(ask())
    assert len(first.tokens) == 6
    assert isinstance(second, ValueError) and "await it first" in str(second)


def test_the_compiled_shapes_are_few_whatever_the_requests(engine):
    functions = (decoding.prefill, decoding.extend, decoding.decode)
    before = [function._cache_size() for function in functions]
    rng = np.random.default_rng(0)
    for num_sessions in (1, 3, 4, 7):
        for max_new_tokens in (1, 5, 8):
            prompts = {f"{i}": rng.integers(0, 37, rng.integers(1, 30)).tolist() for i in range(num_sessions)}
            completions = generate(engine, prompts, sampling(max_new_tokens=max_new_tokens, stop_ids=(2, 3)))
            longer = {name: [*prompts[name], *completions[name].tokens.tolist(), 1] for name in prompts}
            fitting = {name: tokens for name, tokens in longer.items() if len(tokens) <= 32}
            if fitting:
                generate(engine, fitting, sampling(max_new_tokens=max_new_tokens))
    num_new = [function._cache_size() - count for function, count in zip(functions, before, strict=True)]
    # Prefill and turn buckets with the longest; full chunks of two lengths, small ones of one.
    assert num_new[0] <= 2 and num_new[1] <= 1 and num_new[2] <= 3, num_new


def test_samples_follow_the_distribution_and_carry_its_logprobs():
    logits_V = jnp.log(jnp.array([0.05, 0.1, 0.15, 0.3, 0.4]))
    num_draws = 4000
    keys_B = jax.random.split(jax.random.key(5), num_draws)
    logits_BV = jnp.broadcast_to(logits_V, (num_draws, 5))
    for temperature, probabilities in ((1.0, [0.05, 0.1, 0.15, 0.3, 0.4]), (0.5, np.square([1, 2, 3, 6, 8]) / 114)):
        temperature_B = jnp.full(num_draws, temperature)
        tokens_B, logprobs_B = decoding._sample(logits_BV, temperature_B, keys_B, jnp.arange(num_draws))
        counts = np.bincount(tokens_B, minlength=5)
        expected = num_draws * np.array(probabilities)
        assert (np.square(counts - expected) / expected).sum() < 18.5  # chi-square, 4 degrees of freedom: 1 in 1,000
        np.testing.assert_allclose(logprobs_B, np.log(probabilities)[tokens_B], atol=1e-5)
    tokens_B, logprobs_B = decoding._sample(logits_BV, jnp.zeros(num_draws), keys_B, jnp.arange(num_draws))
    assert (tokens_B == 4).all()
    np.testing.assert_allclose(logprobs_B, np.log(0.4), atol=1e-5)  # greedy: of the logits' own distribution
