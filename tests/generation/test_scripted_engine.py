import asyncio

import numpy as np

from orchestra_jax.generation.engine import Sampling
from orchestra_jax.generation.scripted_engine import ScriptedEngine
from orchestra_jax.types import StopReason

STOP = 9


def generate(engine, max_new_tokens=10, session_id="a", prompt=(1, 2)):
    sampling = Sampling(1.0, max_new_tokens, frozenset({STOP}), seed=0)
    return asyncio.run(engine.generate(prompt, sampling, request_id="r", session_id=session_id))


def test_a_turn_ends_behind_its_first_stop_id():
    completion = generate(ScriptedEngine(lambda *_: [3, STOP, 4, STOP]))
    assert (completion.tokens.tolist(), completion.stop_reason) == ([3, STOP], StopReason.STOP)


def test_the_limit_cuts_a_turn_as_a_sampling_engine_would():
    engine = ScriptedEngine(lambda *_: [3, 4, STOP])
    exact, short = generate(engine, max_new_tokens=3), generate(engine, max_new_tokens=2)
    assert (exact.tokens.tolist(), exact.stop_reason) == ([3, 4, STOP], StopReason.STOP)
    assert (short.tokens.tolist(), short.stop_reason) == ([3, 4], StopReason.LENGTH)


def test_the_script_sees_session_turn_and_prompt():
    seen = []
    engine = ScriptedEngine(lambda *arguments: seen.append(arguments) or [STOP])
    for session_id, prompt in (("a", [1]), ("b", [2]), ("a", [1, 5])):
        generate(engine, session_id=session_id, prompt=prompt)
    assert seen == [("a", 0, [1]), ("b", 0, [2]), ("a", 1, [1, 5])]


def test_tokens_carry_log_probability_zero_and_the_version_in_force():
    engine = ScriptedEngine(lambda *_: [3, STOP], version=4)
    before = generate(engine)
    asyncio.run(engine.update_weights(None, 5))
    after = generate(engine)
    assert before.policy_versions.tolist() == [4, 4] and after.policy_versions.tolist() == [5, 5]
    assert (before.logprobs == 0).all() and len(before.logprobs) == 2
    assert [a.dtype for a in (before.tokens, before.logprobs, before.policy_versions)] == [
        np.int32,
        np.float32,
        np.int32,
    ]
