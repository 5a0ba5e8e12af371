"""A random policy writes well-formed calls of the tools at hand when it is held to them."""

import numpy as np
import pytest

from orchestra_jax import chat as chat_format
from orchestra_jax.chat import SMALL_TOKENIZER_DIRECTORY, load_chat
from orchestra_jax.types import ToolCall

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


def test_no_tools_are_a_mistake():
    with pytest.raises(ValueError, match="tools is empty"):
        constraint.ToolCallConstraint(CHAT, [], VOCAB_SIZE)
