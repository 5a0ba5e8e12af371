"""The embedded engine against a plain loop over the model, and what it does when things go wrong.

Legend: B rows, T tokens, C completion tokens, V vocab.
"""

import asyncio
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.generation import decoding, jax_engine, lanes
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
    num_rows=8,
    max_tokens=40,
    row_buckets=(4,),
    slot_buckets=(20,),
    chunk_rows=2,
    chunk_buckets=(6, 12),
    steps_per_dispatch=4,
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
def fed(monkeypatch):
    """(start, number of tokens) of each prefix that was extended, call by call."""
    calls = []

    def counted(params, store, source_rows_R, rows_R, lengths_R, num_rows, tokens_RT, num_tokens_R, **sizes):
        calls.append(list(zip(lengths_R[:num_rows].tolist(), num_tokens_R[:num_rows].tolist())))
        return decoding.extend(
            params, store, source_rows_R, rows_R, lengths_R, num_rows, tokens_RT, num_tokens_R, **sizes
        )

    monkeypatch.setattr(jax_engine, "extend", counted)
    return calls


def num_compiled():
    functions = (decoding.extend, decoding.copy_rows, decoding.decode, decoding.decode_few)
    return [function._cache_size() for function in functions]


def sampling(temperature=1.0, max_new_tokens=6, stop_ids=(), seed=0, **options):
    return Sampling(temperature, max_new_tokens, frozenset(stop_ids), seed, **options)


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
    assert engine.counters.num_sampled_tokens == 18


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_over_turns_are_the_trainers(engine, params, temperature):
    prompts = {"a": SHORT, "b": SHORT, "c": LONG, "d": LONG}
    played = play(engine, prompts, sampling(temperature))
    groups = [
        TrajectoryGroup("i", {}, tuple(trajectory(name, prompts[name], played[name][1]) for name in names))
        for names in ("ab", "cd")
    ]
    shape = BatchShape(num_groups=2, group_size=2, prefix_buckets=(12,), completion_buckets=(24,))
    (batch,) = make_micro_batches(groups, np.ones((2, 2)), np.ones((2, 2), bool), shape)
    trained_BC = batch_logprobs(params, batch, temperature, config=TINY, chunk=64)
    assert batch.loss_mask_BC.sum() == 4 * 3 * 6
    np.testing.assert_allclose(
        batch.sampler_logprobs_BC[batch.loss_mask_BC], np.asarray(trained_BC)[batch.loss_mask_BC], atol=1e-4
    )


def test_a_prompt_is_prefilled_once_and_later_turns_feed_new_tokens_alone(engine, fed):
    play(engine, {"a": SHORT, "b": SHORT, "c": LONG, "d": SHORT})
    first, second, third = fed[:2], fed[2:4], fed[4:]
    assert sorted(first) == [[(0, 4)], [(0, 10)]]
    # The last sampled token, and all but the last given one.
    assert sorted(sum(second, [])) == [(10, 3)] * 3 + [(16, 3)]
    assert sorted(sum(third, [])) == [(19, 2)] * 3 + [(25, 2)]


def test_a_long_prompt_is_fed_in_chunks_while_others_go_on(engine, params, fed):
    prompt = np.random.default_rng(1).integers(0, 37, 33).tolist()
    completions = generate(engine, {"a": prompt, "b": SHORT}, sampling(temperature=0.0))
    assert [call for call in fed if call[0][0] or call[0][1] == 12] == [[(0, 12)], [(12, 12)], [(24, 8)]]
    assert completions["a"].tokens.tolist() == plain_greedy(params, prompt, 6)
    assert completions["b"].tokens.tolist() == plain_greedy(params, SHORT, 6)


def test_results_are_the_same_to_the_last_bit_whatever_else_is_in_the_batch(engine, params):
    rng = np.random.default_rng(0)
    prompts = {f"s{n}": rng.integers(0, 37, rng.integers(1, 12)).tolist() for n in range(7)}  # seven in four rows
    prompts["s7"] = prompts["s6"]
    how = sampling(max_new_tokens=8, stop_ids=range(6))  # turns of many lengths
    together = play(engine, prompts, how)
    for session in ("s0", "s3", "s6", "s7"):
        stream, completions = play(JaxEngine(TINY, params, SIZES), {session: prompts[session]}, how)[session]
        assert stream == together[session][0], session
        for alone, other in zip(completions, together[session][1], strict=True):
            np.testing.assert_array_equal(alone.logprobs, other.logprobs)
    assert together["s6"][0] != together["s7"][0]  # one prompt, two sessions: samples of their own
    other_seed = sampling(max_new_tokens=8, stop_ids=range(6), seed=1)
    first = together["s1"][1][0].tokens.tolist()
    assert generate(engine, {"s1": prompts["s1"]}, other_seed)["s1"].tokens.tolist() != first


def test_a_prefix_that_was_evicted_is_computed_anew_to_the_same_numbers(params, fed):
    prompts = {f"s{n}": [n + 1, *SHORT] for n in range(6)}
    plenty = play(JaxEngine(TINY, params, SIZES), prompts)
    num_fed = len(sum(fed, []))
    scarce = play(JaxEngine(TINY, params, dataclasses.replace(SIZES, num_rows=2)), prompts)
    assert len(sum(fed, [])) - num_fed > num_fed
    for session in prompts:
        assert scarce[session][0] == plenty[session][0]
        for one, other in zip(scarce[session][1], plenty[session][1], strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_turns_join_and_leave_at_any_step(engine, params):
    """One long turn and many short ones: nobody waits for the longest, and rows are busy while turns wait."""
    order = []

    async def ask(name, max_new_tokens):
        how = sampling(temperature=0.0, max_new_tokens=max_new_tokens)
        completion = await engine.generate(SHORT, how, request_id=name, session_id=name)
        order.append(name)
        assert completion.tokens.tolist() == plain_greedy(params, SHORT, max_new_tokens)

    async def ask_all():
        await asyncio.gather(ask("long", 15), *(ask(f"s{n}", 1 + n % 3) for n in range(9)))

    asyncio.run(ask_all())
    assert order[-1] == "long" and len(order) == 10
    counters = engine.counters
    assert counters.num_waited_used_row_steps >= 0.9 * counters.num_waited_row_steps > 0


def test_the_few_rows_that_are_left_go_on_in_a_smaller_batch(params):
    engine = JaxEngine(TINY, params, dataclasses.replace(SIZES, row_buckets=(2, 4), slot_buckets=()))
    short, long = plain_greedy(params, SHORT, 8), plain_greedy(params, LONG, 8)
    stop = next(token for token in short[:4] if token not in long)
    prompts = {"a": SHORT, "b": SHORT, "c": SHORT, "d": LONG}
    completions = generate(engine, prompts, sampling(temperature=0.0, max_new_tokens=8, stop_ids=(stop,)))
    for name in "abc":
        assert completions[name].tokens.tolist() == short[: short.index(stop) + 1]
    assert completions["d"].tokens.tolist() == long
    assert engine.counters.num_row_steps == 4 * 4 + 2 * 4


def test_a_session_that_changes_its_past_is_computed_anew_from_there(engine, params, fed):
    first = generate(engine, {"a": SHORT})["a"].tokens.tolist()
    changed = [*SHORT[:-1], 30, *first, 11]
    much = [*changed, *range(10, 20)]  # more than one chunk
    for stream in (changed, much):
        tokens = generate(engine, {"a": stream}, sampling(temperature=0.0))["a"].tokens.tolist()
        assert tokens == plain_greedy(params, stream, 6)
    assert fed == [[(0, 4)], [(4, 7)], [(12, 9)]]  # what was fed or sampled before is there


def test_stop_sequences_and_watched_ids(engine, params):
    greedy, heard = plain_greedy(params, LONG, 8), []
    how = sampling(temperature=0.0, max_new_tokens=8, stop_sequences=(tuple(greedy[3:5]), (36, 36)))
    completion = generate(engine, {"a": LONG}, how)["a"]
    end = next(n for n in range(2, 9) if greedy[n - 2 : n] == greedy[3:5])
    assert completion.tokens.tolist() == greedy[:end] and completion.stop_reason == StopReason.STOP
    # The session goes on behind it as if nothing had been sampled beyond.
    stream = [*LONG, *greedy[:end], 11]
    assert generate(engine, {"a": stream}, sampling(temperature=0.0))["a"].tokens.tolist() == plain_greedy(
        params, stream, 6
    )

    async def ask():
        how = sampling(temperature=0.0, max_new_tokens=8, watch_ids=frozenset(greedy[2:3]))
        return await engine.generate(LONG, how, request_id="b", session_id="b", on_watched=heard.append)

    assert asyncio.run(ask()).tokens.tolist() == greedy
    places = [n + 1 for n, token in enumerate(greedy) if token == greedy[2]]
    assert [tokens.tolist() for tokens in heard] == [greedy[:place] for place in places]


def test_new_weights_forget_the_cache_and_stamp_their_version(engine, other_params):
    stream = [*SHORT, *generate(engine, {"a": SHORT})["a"].tokens.tolist(), 11]
    asyncio.run(engine.update_weights(other_params, 4))
    completion = generate(engine, {"a": stream}, sampling(temperature=0.0))["a"]
    assert completion.tokens.tolist() == plain_greedy(other_params, stream, 6)
    np.testing.assert_array_equal(completion.policy_versions, 4)


def test_new_weights_compile_nothing_and_nothing_cached_under_the_old_is_used(engine, params, other_params, fed):
    prompts = {"a": SHORT, "b": SHORT, "c": LONG}
    old = play(engine, prompts)
    num_before, fed_before = num_compiled(), list(fed)
    asyncio.run(engine.update_weights(other_params, 4))
    fed.clear()
    new = play(engine, prompts)
    assert num_compiled() == num_before
    assert fed == fed_before  # every prefix is computed again
    expected = play(JaxEngine(TINY, other_params, SIZES), prompts)
    for session in prompts:
        assert new[session][0] == expected[session][0] != old[session][0]


def test_first_tokens_of_many_sessions_follow_the_models_distribution(engine, params):
    num_sessions = 800
    completions = generate(engine, {f"{n}": SHORT for n in range(num_sessions)}, sampling(max_new_tokens=1))
    padded_1T = np.zeros((1, SIZES.max_tokens), np.int32)
    padded_1T[0, : len(SHORT)] = SHORT
    probability_V = np.asarray(jax.nn.softmax(plain_logits(params, padded_1T)[len(SHORT) - 1]), np.float64)
    counts_V = np.bincount([completion.tokens[0] for completion in completions.values()], minlength=TINY.vocab_size)
    groups = np.array_split(np.argsort(probability_V), 8)  # pooled, so that each is expected often enough
    expected = num_sessions * np.array([probability_V[group].sum() for group in groups])
    found = np.array([counts_V[group].sum() for group in groups])
    assert expected.min() > 5
    assert (np.square(found - expected) / expected).sum() < 24.3  # 7 degrees of freedom: 1 in 1,000


def test_turns_under_way_go_on_with_new_weights_and_each_token_keeps_its_version(engine, params, other_params):
    async def ask():
        how = sampling(temperature=0.0, max_new_tokens=8, watch_ids=frozenset(plain_greedy(params, LONG, 2)[1:]))
        updates = []

        def swap(tokens):
            if not updates:
                updates.append(asyncio.ensure_future(engine.update_weights(other_params, 4)))

        return await engine.generate(LONG, how, request_id="a", session_id="a", on_watched=swap)

    completion = asyncio.run(ask())
    num_old = int((completion.policy_versions == 3).sum())
    assert 1 <= num_old < 8 and (completion.policy_versions[num_old:] == 4).all()
    tokens = completion.tokens.tolist()
    assert tokens[:num_old] == plain_greedy(params, LONG, num_old)
    assert tokens[num_old:] == plain_greedy(other_params, [*LONG, *tokens[:num_old]], 8 - num_old)


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


def test_a_turn_that_ends_while_its_prompt_is_prefilled_is_not_sampled(engine, monkeypatch):
    lengths, heard = [], []

    def counted(params, store, source_rows_R, rows_R, lengths_R, *args, **sizes):
        lengths.append(int(lengths_R[0]))
        if lengths[-1] == 12:
            asyncio.run(engine.abort("a"))
        return decoding.extend(params, store, source_rows_R, rows_R, lengths_R, *args, **sizes)

    async def ask():
        how = sampling(stop_ids=(), watch_ids=frozenset({1, 2}))
        prompt = list(range(33))
        return await engine.generate(prompt, how, request_id="a", session_id="a", on_watched=heard.append)

    monkeypatch.setattr(jax_engine, "extend", counted)
    completion = asyncio.run(ask())
    assert completion.stop_reason == StopReason.ABORTED and len(completion.tokens) == 0
    generate(engine, {"b": SHORT})
    assert lengths[:3] == [0, 12, 24] and engine.counters.num_sampled_tokens == 6 and not heard


def test_a_request_that_was_cancelled_hears_of_nothing(engine, params, monkeypatch):
    greedy, heard = plain_greedy(params, LONG, 8), []

    async def ask():
        loop = asyncio.get_running_loop()

        def cancel_first(*args, **sizes):
            loop.call_soon_threadsafe(task.cancel)
            return decoding.decode(*args, **sizes)

        monkeypatch.setattr(lanes, "decode", cancel_first)
        how = sampling(temperature=0.0, max_new_tokens=8, watch_ids=frozenset(greedy[1:2]))
        request = engine.generate(LONG, how, request_id="a", session_id="a", on_watched=heard.append)
        task = asyncio.ensure_future(request)
        with pytest.raises(asyncio.CancelledError):
            await task
        return await engine.generate(SHORT, sampling(temperature=0.0), request_id="b", session_id="b")

    assert asyncio.run(ask()).tokens.tolist() == plain_greedy(params, SHORT, 6) and not heard


def test_a_listener_that_raises_ends_its_own_request_alone(engine, params):
    greedy, heard = plain_greedy(params, LONG, 8), []

    def raise_error(tokens):
        raise LookupError("a listener's own bug")

    async def ask():
        how = sampling(temperature=0.0, max_new_tokens=8, watch_ids=frozenset(greedy[1:2]))
        requests = (
            engine.generate(LONG, how, request_id=name, session_id=name, on_watched=listener)
            for name, listener in (("a", raise_error), ("b", heard.append))
        )
        return await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), timeout=60)

    error, completion = asyncio.run(ask())
    assert isinstance(error, LookupError) and completion.tokens.tolist() == greedy
    assert heard[0].tolist() == greedy[: greedy.index(greedy[1]) + 1]


class Constraint:
    def __init__(self, allowed):
        self.allowed = allowed

    def allowed_tokens(self, sampled):
        return self.allowed(sampled)


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        (lambda sampled: [][0], "index out of range"),
        (lambda sampled: np.ones(TINY.vocab_size + 1, bool), "request a@.*38.* the model has 37"),
        (lambda sampled: np.full(TINY.vocab_size, len(sampled) < 2), "request a@.* nothing behind 2 tokens"),
    ],
)
def test_a_constraint_that_fails_ends_its_own_request_alone(engine, params, allowed, message):
    async def ask():
        requests = (
            engine.generate(LONG, how, request_id=f"{name}@", session_id=name)
            for name, how in (("a", sampling(constraint=Constraint(allowed))), ("b", sampling(temperature=0.0)))
        )
        return await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), timeout=60)

    error, completion = asyncio.run(ask())
    with pytest.raises((IndexError, ValueError), match=message):
        raise error
    assert completion.tokens.tolist() == plain_greedy(params, LONG, 6)


@pytest.mark.parametrize("is_cache_lost", [False, True])
def test_a_failing_batch_raises_in_every_generate_that_waits(engine, params, monkeypatch, is_cache_lost):
    stream = [*SHORT, *generate(engine, {"a": SHORT})["a"].tokens.tolist(), 11]

    def fail(params, lane, *args, **kwargs):
        if is_cache_lost:
            lane.keys_LCKHS.delete()
        raise RuntimeError("out of memory")

    async def ask():
        names = [f"s{number}" for number in range(SIZES.num_rows + 2)]  # more than a lane has rows
        requests = (engine.generate(SHORT, sampling(), request_id=name, session_id=name) for name in names)
        return await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), timeout=60)

    with monkeypatch.context() as patch:
        patch.setattr(lanes, "decode", fail)
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
        ([3, -1], sampling()),
        ([3, TINY.vocab_size], sampling()),
        (SHORT, sampling(max_new_tokens=36)),
        (SHORT, sampling(max_new_tokens=0)),
        (SHORT, sampling(temperature=-1.0)),
        (SHORT, sampling(temperature=float("nan"))),
        (SHORT, sampling(temperature=0.0, top_k=3)),
        (SHORT, sampling(top_k=-1)),
        (SHORT, sampling(top_p=0.0)),
        (SHORT, sampling(top_p=1.5)),
        (SHORT, sampling(min_p=1.0)),
        (SHORT, sampling(stop_sequences=((1,), ()))),
        (SHORT, sampling(stop_ids=range(9))),
        (SHORT, sampling(watch_ids=frozenset(range(3)))),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_disturbs_nobody(engine, params, monkeypatch, prompt, how):
    with monkeypatch.context() as patch:  # refused before any device work
        for module, name in ((lanes, "decode"), (jax_engine, "extend"), (jax_engine, "copy_rows")):
            patch.setattr(module, name, None)
        with pytest.raises(ValueError, match="request a@"):
            generate(engine, {"a": prompt}, how)

    async def ask():
        requests = (
            engine.generate(tokens, given, request_id=f"{name}@", session_id=name)
            for name, tokens, given in (("good", SHORT, sampling(temperature=0.0)), ("a", prompt, how))
        )
        return await asyncio.gather(*requests, return_exceptions=True)

    good, error = asyncio.run(ask())
    assert isinstance(error, ValueError) and "request a@" in str(error)
    assert good.tokens.tolist() == plain_greedy(params, SHORT, 6)


def test_a_deadline_that_is_no_number_is_refused(engine):
    with pytest.raises(ValueError, match="deadline_s nan"):
        asyncio.run(engine.generate(SHORT, sampling(), request_id="a", session_id="a", deadline_s=float("nan")))


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"constraint": object()}])
def test_an_engine_that_trains_refuses_what_would_be_off_policy(params, options):
    engine = JaxEngine(TINY, params, SIZES, is_training=True)
    with pytest.raises(ValueError, match="request a@.* another distribution"):
        generate(engine, {"a": SHORT}, sampling(**options))
    assert len(generate(engine, {"a": SHORT}, sampling(temperature=0.5))["a"].tokens) == 6


@pytest.mark.parametrize(
    ("field", "value"),
    [("row_buckets", ()), ("row_buckets", (4, 2)), ("chunk_buckets", (0, 4)), ("num_rows", 0), ("chunk_rows", -1)],
)
def test_sizes_that_make_no_sense_are_refused(params, field, value):
    with pytest.raises(ValueError, match=f"jax_engine.{field}"):
        JaxEngine(TINY, params, dataclasses.replace(SIZES, **{field: value}))


def test_a_second_request_of_a_waiting_session_is_refused(engine):
    async def ask():
        requests = (engine.generate(SHORT, sampling(), request_id=name, session_id="a") for name in "xy")
        return await asyncio.gather(*requests, return_exceptions=True)

    first, second = asyncio.run(ask())
    assert len(first.tokens) == 6
    assert isinstance(second, ValueError) and "await it first" in str(second)


@pytest.mark.slow
def test_the_compiled_shapes_are_few_whatever_the_requests(params):
    sizes = dataclasses.replace(SIZES, row_buckets=(2, 4))
    engine = JaxEngine(TINY, params, sizes)
    functions = (decoding.extend, decoding.copy_rows, decoding.decode, decoding.decode_few)
    for function in functions:
        function.clear_cache()
    rng = np.random.default_rng(0)
    for num_sessions in (1, 3, 4, 7):
        for max_new_tokens in (1, 5, 8):
            prompts = {f"{i}": rng.integers(0, 37, rng.integers(1, 30)).tolist() for i in range(num_sessions)}
            how = sampling(max_new_tokens=max_new_tokens, stop_ids=(2, 3), top_k=num_sessions, seed=max_new_tokens)
            completions = generate(engine, prompts, how)
            longer = {name: [*prompts[name], *completions[name].tokens.tolist(), 1] for name in prompts}
            fitting = {name: tokens for name, tokens in longer.items() if len(tokens) <= 32}
            if fitting:
                generate(engine, fitting, sampling(max_new_tokens=max_new_tokens))
    num_lanes, num_widths = 2, 2
    most = (num_widths * num_lanes, 2 * num_lanes, num_lanes, num_lanes)
    assert all(0 < function._cache_size() <= n for function, n in zip(functions, most, strict=True))
