"""A random policy writes well-formed calls of the tools at hand when it is held to them."""

import asyncio
import dataclasses

import jax
import jsonschema
import numpy as np
import pytest

from orchestra_jax import chat as chat_format
from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY, load_chat
from orchestra_jax.generation.engine import Sampling
from orchestra_jax.generation.jax_engine import JaxEngine, JaxEngineConfig
from orchestra_jax.models.config import MODELS
from orchestra_jax.models.transformer import init_params
from orchestra_jax.types import StopReason, ToolCall

constraint = pytest.importorskip("orchestra_jax.generation.constraint")
pytest.importorskip("llguidance")

CHAT = load_chat(SMALL_TOKENIZER_DIRECTORY, "compact")
VOCAB_SIZE = CHAT.vocab_size + 7  # a padded embedding
PARAMETERS = {
    "type": "object",
    "properties": {"model": {"enum": ["expert-1", "expert-2"]}},
    "required": ["model"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("search", "answer")]


@pytest.fixture(scope="module")
def held():
    return constraint.ToolCallConstraint(CHAT, TOOLS, VOCAB_SIZE)


def test_outside_a_call_everything_is_allowed(held):
    call = chat_format.encode_turn(CHAT, "", [ToolCall("search", {"model": "expert-2"})])
    start = call.index(CHAT.start_of_call_id)
    for tokens in ([], call[:start], call, [CHAT.start_of_thinking_id, CHAT.start_of_call_id]):
        assert held.allowed_tokens(tokens) is None
    assert held.allowed_tokens(call[: start + 1]) is not None


def test_every_token_of_a_right_call_is_allowed_and_of_a_wrong_one_is_not(held):
    def is_followed(call):
        tokens = chat_format.encode_turn(CHAT, "", [call])
        start, end = tokens.index(CHAT.start_of_call_id), tokens.index(CHAT.end_of_call_id)
        return all(held.allowed_tokens(tokens[:n])[tokens[n]] for n in range(start + 1, end + 1))

    assert is_followed(ToolCall("search", {"model": "expert-1"}))
    assert is_followed(ToolCall("answer", {"model": "expert-2"}))
    for wrong in (ToolCall("browse", {"model": "expert-1"}), ToolCall("search", {"model": "expert-9"})):
        with np.testing.assert_raises((AssertionError, ValueError)):
            assert is_followed(wrong)


def test_random_calls_under_the_constraint_are_well_formed(held):
    rng = np.random.default_rng(0)
    names = set()
    for _ in range(20):
        tokens = [CHAT.start_of_call_id]
        while tokens[-1] != CHAT.end_of_call_id:
            is_allowed_V = held.allowed_tokens(tokens)
            assert is_allowed_V.any() and len(tokens) < 200
            # White space may go on for ever: text first, where there is some.
            choices = [int(t) for t in np.flatnonzero(is_allowed_V) if CHAT.tokenizer.decode([int(t)]).strip()]
            tokens.append(int(rng.choice(choices or np.flatnonzero(is_allowed_V))))
            if held.allowed_tokens(tokens) is not None and held.allowed_tokens(tokens)[CHAT.end_of_call_id]:
                tokens.append(CHAT.end_of_call_id)
        turn = chat_format.parse_turn(CHAT, tokens)
        assert turn.is_well_formed and turn.calls[0].arguments["model"] in ("expert-1", "expert-2")
        names.add(turn.calls[0].name)
    assert names == {"search", "answer"}


QUERY = {"query": {"type": "string", "maxLength": 8}, "top": {"type": "integer", "minimum": 1, "maximum": 9}}
LEGS = {"legs": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3}}
SCHEMAS = {
    name: {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    for name, fields in (("search", QUERY), ("answer", PARAMETERS["properties"]), ("route", LEGS))
}


class TwoCalls:
    """Holds a turn to two calls and its end, for a random policy would hardly begin one."""

    def __init__(self, held):
        self._held = held

    def allowed_tokens(self, sampled):
        inside = self._held.allowed_tokens(sampled)
        if inside is not None:
            return inside
        is_over = sampled.count(CHAT.end_of_call_id) == 2
        return np.arange(VOCAB_SIZE) == (CHAT.end_of_turn_id if is_over else CHAT.start_of_call_id)


@pytest.mark.slow
def test_every_call_that_the_engine_samples_under_the_constraint_fits_its_schema():
    tools = [{"name": name, "parameters": parameters} for name, parameters in SCHEMAS.items()]
    model = dataclasses.replace(MODELS["tiny"], vocab_size=VOCAB_SIZE)
    sizes = JaxEngineConfig(
        num_rows=12, max_tokens=200, row_buckets=(12,), slot_buckets=(), chunk_rows=12, chunk_buckets=(8,)
    )
    engine = JaxEngine(model, init_params(model, jax.random.key(0)), sizes)
    constraint_of_turn = TwoCalls(constraint.ToolCallConstraint(CHAT, tools, VOCAB_SIZE))
    stop_ids = frozenset({CHAT.end_of_turn_id})
    held, free = (Sampling(1.0, 190, stop_ids, 0, constraint=which) for which in (constraint_of_turn, None))

    async def ask():  # two of twelve are free: what holds the others does not hold them
        hows = [held] * 10 + [free] * 2
        requests = (engine.generate([5, 6, 7], how, request_id=f"{n}", session_id=f"{n}") for n, how in enumerate(hows))
        return await asyncio.gather(*requests)

    *completions, first_free, second_free = asyncio.run(ask())
    called = []
    for completion in completions:
        turn = chat_format.parse_turn(CHAT, completion.tokens)
        assert completion.stop_reason == StopReason.STOP and turn.is_well_formed and len(turn.calls) == 2
        for call in turn.calls:
            jsonschema.validate(call.arguments, SCHEMAS[call.name])
            called.append(call.name)
    assert set(called) == set(SCHEMAS)
    for completion in (first_free, second_free):
        assert CHAT.start_of_call_id not in completion.tokens[:2]


def test_no_tools_are_a_mistake():
    with pytest.raises(ValueError, match="tools is empty"):
        constraint.ToolCallConstraint(CHAT, [], VOCAB_SIZE)
