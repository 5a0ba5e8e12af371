"""Tool calls that cannot be malformed: between `<tool_call>` and its end only what the schemas allow is sampled.

For serving alone: a policy that is held by the hand samples from another distribution than the one that the learner
differentiates, so an episode (environments.rollout) has no field for a constraint and a training run's engine refuses
one (jax_engine). A turn that its limit of tokens cuts may end within a call. The grammar of JSON is llguidance's
(the `constraints` extra); which ids open and close a call is known here, for control tokens are recognised by id and
never by spelling.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from orchestra_jax.chat import Chat

JSON_AS_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Where only one text can follow, every token that begins it is allowed, and not only the one that llguidance would
# take: the tokens of a trained policy may reach beyond that text.
NO_FORCING = json.dumps({"no_forcing": True})


class ToolCallConstraint:
    """A `Constraint` (engine.py) for calls of the given tools, JSON function schemas as chat.encode_prompt takes them.

    ValueError without tools, or for schemas that llguidance cannot compile; ImportError without the extra.
    """

    def __init__(self, chat: Chat, tools: Sequence[dict], vocab_size: int):
        import llguidance  # an extra: needed only by who constrains

        self._llguidance = llguidance
        self._chat, self._vocab_size = chat, vocab_size
        self._tokenizer = llguidance.LLTokenizer(chat.tokenizer.to_str(), n_vocab=vocab_size)
        if not tools:
            raise ValueError("tools is empty: a constraint needs the schema of one tool at least")
        calls = [_call_schema(tool.get("function", tool)) for tool in tools]
        # Line breaks and spaces are those that the template writes: free white space could go on for ever.
        schema = json.dumps({"anyOf": calls, "x-guidance": JSON_AS_WRITTEN})
        rules = f'%llguidance {NO_FORCING}\nstart: "\\n" call "\\n"\ncall: %json {schema}'
        self._grammar = llguidance.LLMatcher.grammar_from_lark(rules)
        error = llguidance.LLMatcher.validate_grammar(self._grammar, self._tokenizer)
        if error:
            raise ValueError(f"the schemas of {[tool.get('name') for tool in tools]} have no grammar: {error}")

    def allowed_tokens(self, sampled: Sequence[int]) -> np.ndarray | None:
        """bool [V]: what may follow the turn's tokens so far; None for everything, outside a call."""
        inner = self._open_call(sampled)
        if inner is None:
            return None
        matcher = self._llguidance.LLMatcher(self._tokenizer, self._grammar)
        if inner and not matcher.consume_tokens(inner):
            raise ValueError(f"tokens {inner} of a call do not follow its grammar: was the turn begun without it?")
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        is_allowed_V = np.zeros(self._vocab_size, bool)
        allowed = np.unpackbits(bits, bitorder="little")[: self._chat.content_encoder.get_vocab_size()]
        is_allowed_V[: len(allowed)] = allowed  # text alone: control ids and padding stay shut
        is_allowed_V[self._chat.end_of_call_id] = matcher.is_accepting()
        return is_allowed_V

    def _open_call(self, sampled: Sequence[int]) -> list[int] | None:
        """The tokens of the call that is open; None in text, and in thinking, where a call is none."""
        chat = self._chat
        inner, is_thinking = None, False
        for token in map(int, sampled):
            if is_thinking:
                is_thinking = token != chat.end_of_thinking_id
            elif inner is not None:
                inner = None if token == chat.end_of_call_id else [*inner, token]
            else:
                is_thinking = token == chat.start_of_thinking_id
                inner = [] if token == chat.start_of_call_id else None
        return inner


def _call_schema(function: dict) -> dict:
    properties = {"name": {"const": function["name"]}, "arguments": function["parameters"]}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
