"""Messages and tokens: the Qwen3 chat template written in ids, and the tool-call grammar read back from ids.

The only file that knows special tokens. It is not a tokenizer and no jinja template: what is written here equals the
template of `Qwen/Qwen3-8B` (tokenizer_config.json), ids and all, wherever the contents spell no control token (the
tests prove it). A turn as the policy writes it, control ids in angle brackets:

    <think>\n{reasoning}\n</think>\n\n<tool_call>\n{"name": "x", "arguments": {"model": "y"}}\n</tool_call><|im_end|>

Control tokens are written and recognised by id alone. Content goes through a second encoder of the same vocabulary
that has no added tokens, since the usual "no special tokens" switches leave `<tool_call>` and its kin (added tokens
with `special=false`) control ids: a spelled-out `</tool_call>` or `<|im_end|>` is therefore always text.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import pathlib
from collections.abc import Sequence

import tokenizers

from orchestra_jax.types import Message, ToolCall

SMALL_TOKENIZER_DIRECTORY = pathlib.Path(__file__).parent / "assets" / "small_tokenizer"

RENDERINGS = ("qwen3", "compact")

CONTROL_SPELLINGS = {  # by the field of `Chat` that holds the id
    "start_of_turn_id": "<|im_start|>",
    "end_of_turn_id": "<|im_end|>",
    "end_of_text_id": "<|endoftext|>",
    "start_of_call_id": "<tool_call>",
    "end_of_call_id": "</tool_call>",
    "start_of_response_id": "<tool_response>",
    "end_of_response_id": "</tool_response>",
    "start_of_thinking_id": "<think>",
    "end_of_thinking_id": "</think>",
}

UNCLOSED_CALL = "The call is not closed by </tool_call>."
SHORT_CHARS = 12  # texts up to this length are remembered

TOOLS_OPENING = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
# Where the template decides whether an earlier turn shows its thinking.
DROPS_THINKING = "loop.index0 > ns.last_query_index %}"
KEEPS_THINKING = "loop.index0 > ns.last_query_index or reasoning_content %}"

TOOLS_CLOSING = "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
    """A tokenizer and how messages are written with it.

    `rendering` is "qwen3" (the whole template, JSON tool schemas in the system turn) or "compact" (no system turn and
    no schemas: what the policy must know of its tools stands in the user text).
    """

    tokenizer: tokenizers.Tokenizer = dataclasses.field(repr=False)  # with the control tokens; only reads ids
    content_encoder: tokenizers.Tokenizer = dataclasses.field(repr=False)  # the same vocabulary, no added token at all
    rendering: str
    start_of_turn_id: int
    end_of_turn_id: int
    end_of_text_id: int  # the padding id as well
    start_of_call_id: int
    end_of_call_id: int
    start_of_response_id: int
    end_of_response_id: int
    start_of_thinking_id: int
    end_of_thinking_id: int

    @property
    def vocab_size(self) -> int:
        """The number of ids that have a spelling, control ids included; a model may pad its embedding beyond."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)


@dataclasses.dataclass(frozen=True)
class ParsedTurn:
    """An assistant turn read back from its tokens.

    `calls` are in the order of the turn, those that cannot be run among them (`ToolCall.error`). `is_well_formed` says
    that the turn has the shape that the template writes (closed thinking first, then text, then calls, no stray control
    token, nothing behind the end of the turn) and that every call can be run. The end-of-turn id itself may be absent.
    """

    reasoning: str
    content: str
    calls: tuple[ToolCall, ...]
    is_well_formed: bool


def load_chat(tokenizer_directory: str | pathlib.Path, rendering: str) -> Chat:
    """Reads `tokenizer.json` of a Hugging Face tokenizer directory. `rendering` is one of `RENDERINGS`.

    Raises:
      ValueError: for an unknown rendering, a directory without tokenizer.json, a control token that the tokenizer
        lacks, or one that stands in the plain vocabulary, where content could make it.
    """
    if rendering not in RENDERINGS:
        raise ValueError(f"rendering is {rendering!r}; choose one of {RENDERINGS}")
    path = pathlib.Path(tokenizer_directory) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"no {path}; give the directory of a tokenizer saved in the fast (tokenizers) format")
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    content_encoder = tokenizers.Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        content_encoder.normalizer = tokenizer.normalizer
    content_encoder.pre_tokenizer = tokenizer.pre_tokenizer
    content_encoder.decoder = tokenizer.decoder
    control_ids = {}
    for field, spelling in CONTROL_SPELLINGS.items():
        token = tokenizer.token_to_id(spelling)
        if token is None:
            raise ValueError(f"{path} has no token {spelling!r}; use a tokenizer of the Qwen3 family")
        if content_encoder.token_to_id(spelling) is not None:
            raise ValueError(f"{spelling!r} stands in the plain vocabulary of {path}; make it an added token only")
        control_ids[field] = token
    return Chat(tokenizer, content_encoder, rendering, **control_ids)


def keep_thinking(template: str) -> str:
    """The jinja template of Qwen3, changed to show thinking wherever it stands, as an episode does.

    ValueError for another template.
    """
    if template.count(DROPS_THINKING) != 1:
        raise ValueError(f"the chat template is not that of Qwen3: {DROPS_THINKING!r} does not stand in it once")
    return template.replace(DROPS_THINKING, KEEPS_THINKING)


def stop_ids(chat: Chat, calls_per_turn: int) -> frozenset[int]:
    """The ids that end a generation. With one call a turn, the end of a call ends the turn too.

    Raises:
      ValueError: for fewer than one call a turn.
    """
    if calls_per_turn < 1:
        raise ValueError(f"calls_per_turn is {calls_per_turn}; a turn needs room for at least 1 call")
    ids = {chat.end_of_turn_id}
    if calls_per_turn == 1:
        ids.add(chat.end_of_call_id)
    return frozenset(ids)


def encode_prompt(chat: Chat, messages: Sequence[Message], tools: Sequence[dict]) -> list[int]:
    """The opening of an episode, up to and including `<|im_start|>assistant` and its newline.

    `tools` are JSON function schemas as the template takes them; the compact rendering leaves them out. Thinking before
    the last user message is dropped, as the template does.

    Raises:
      ValueError: without messages, for an unknown role, or for a system message under the compact rendering.
    """
    if not messages:
        raise ValueError("messages is empty; give at least one user message")
    if chat.rendering == "compact":
        if any(message.role == "system" for message in messages):
            raise ValueError("the compact rendering has no system turn; put the text into the user message")
        tools = ()
    pieces: list[str | int] = []
    if tools:
        preamble = messages[0].content + "\n\n" if messages[0].role == "system" else ""
        pieces += _tools_pieces(chat, preamble, tools)
    last_query = max((i for i, m in enumerate(messages) if m.role == "user"), default=len(messages) - 1)
    for i, message in enumerate(messages):
        if message.role == "system" and i == 0 and tools:
            continue  # stands in the tools' system turn
        if message.role in ("user", "system"):
            pieces += [chat.start_of_turn_id, f"{message.role}\n{message.content}", chat.end_of_turn_id, "\n"]
        elif message.role == "assistant":
            has_thinking = i > last_query and (bool(message.reasoning) or i == len(messages) - 1)
            pieces += [chat.start_of_turn_id, "assistant\n"]
            pieces += _assistant_pieces(chat, message, has_thinking)
            pieces += ["\n"]
        elif message.role == "tool":
            is_first = i == 0 or messages[i - 1].role != "tool"
            is_last = i == len(messages) - 1 or messages[i + 1].role != "tool"
            pieces += [chat.start_of_turn_id, "user"] if is_first else []
            pieces += _response_pieces(chat, message.content)
            pieces += [chat.end_of_turn_id, "\n"] if is_last else []
        else:
            raise ValueError(f"role is {message.role!r}; choose system, user, assistant or tool")
    return _encode(chat, [*pieces, chat.start_of_turn_id, "assistant\n"])


def encode_turn(chat: Chat, reasoning: str, calls: Sequence[ToolCall]) -> list[int]:
    """An assistant turn as the policy should write it, up to and including `<|im_end|>`.

    Raises:
      ValueError: for a call with an error, or arguments that JSON cannot hold (NaN, infinities).
    """
    message = Message("assistant", "", reasoning, tuple(calls))
    return _encode(chat, _assistant_pieces(chat, message, bool(reasoning)))


def encode_observation(chat: Chat, texts: Sequence[str]) -> list[int]:
    """What follows a turn's `<|im_end|>`: the responses to its calls in one user turn, and the next turn's opening.

    Raises:
      ValueError: without texts.
    """
    if not texts:
        raise ValueError("texts is empty; a turn without calls has no observation")
    pieces: list[str | int] = ["\n", chat.start_of_turn_id, "user"]
    for text in texts:
        pieces += _response_pieces(chat, text)
    return _encode(chat, [*pieces, chat.end_of_turn_id, "\n", chat.start_of_turn_id, "assistant\n"])


def decode(chat: Chat, tokens: Sequence[int]) -> str:
    """Tokens as text for people, control tokens spelled out. Ids without a spelling are left out."""
    # Models pad their embedding beyond the tokenizer, so a sampled id need not have a spelling.
    vocab_size = chat.vocab_size
    ids = [int(token) for token in tokens if 0 <= token < vocab_size]
    return chat.tokenizer.decode(ids, skip_special_tokens=False)


def parse_turn(chat: Chat, tokens: Sequence[int]) -> ParsedTurn:
    """Reads one assistant turn, whatever the tokens are; mistakes become `ToolCall.error` and `is_well_formed`.

    `tokens` are those behind the opening `<|im_start|>assistant` and its newline. A turn that is still being written
    can be read at each `</tool_call>`: the calls of such a beginning are the first calls of the whole.
    """
    ids = [int(token) for token in tokens]
    body = ids[: _find(ids, chat.end_of_turn_id, 0)]
    is_well_formed = len(ids) - len(body) <= 1
    num_text_ids = chat.content_encoder.get_vocab_size()
    reasonings, contents, calls = [], [], []
    position = 0
    while position < len(body):
        token = body[position]
        if token in (chat.start_of_thinking_id, chat.start_of_call_id):
            closing_id = chat.end_of_thinking_id if token == chat.start_of_thinking_id else chat.end_of_call_id
            end = _find(body, closing_id, position + 1)
            inner = body[position + 1 : end]
            if token == chat.start_of_call_id:
                calls.append(_read_call(chat, inner, is_closed=end < len(body)))
            else:
                is_first = not (reasonings or contents or calls)
                is_plain = all(0 <= inner_id < num_text_ids for inner_id in inner)
                is_well_formed &= is_first and is_plain and end < len(body)
                reasonings.append(decode(chat, inner).strip("\n"))
            position = end + 1
        elif 0 <= token < num_text_ids:
            end = position
            while end < len(body) and 0 <= body[end] < num_text_ids:
                end += 1
            text = chat.content_encoder.decode(body[position:end]).strip("\n")
            if text.strip():
                contents.append(text)
                is_well_formed &= not calls  # the template writes text before the calls
            position = end
        else:
            is_well_formed = False
            position += 1
    is_well_formed &= not any(call.error for call in calls)
    return ParsedTurn("\n".join(reasonings), "\n".join(contents), tuple(calls), is_well_formed)


def _encode(chat: Chat, pieces: Sequence[str | int]) -> list[int]:
    """Ids of pieces: an int is a control id, a string content. Neighbouring strings are encoded as one text."""
    ids = []
    for is_text, group in itertools.groupby(pieces, lambda piece: isinstance(piece, str)):
        if is_text:
            # A lone surrogate (outside text can hold one) has no UTF-8 form: it becomes "?".
            text = "".join(group).encode("utf-8", "replace").decode("utf-8")
            ids += _short_ids(chat, text) if len(text) <= SHORT_CHARS else _text_ids(chat, text)
        else:
            ids += group
    return ids


def _text_ids(chat: Chat, text: str) -> list[int]:
    return chat.content_encoder.encode(text, add_special_tokens=False).ids


@functools.lru_cache(maxsize=256)
def _short_ids(chat: Chat, text: str) -> tuple[int, ...]:
    """Ids of the few words between control ids that every prompt has."""
    return tuple(_text_ids(chat, text))


def _tools_pieces(chat: Chat, preamble: str, tools: Sequence[dict]) -> list[str | int]:
    schemas = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    return [
        chat.start_of_turn_id,
        "system\n" + preamble + TOOLS_OPENING + schemas + TOOLS_CLOSING,
        chat.start_of_call_id,
        chat.end_of_call_id,
        " XML tags:\n",
        chat.start_of_call_id,
        '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
        chat.end_of_call_id,
        chat.end_of_turn_id,
        "\n",
    ]


def _assistant_pieces(chat: Chat, message: Message, has_thinking: bool) -> list[str | int]:
    pieces: list[str | int] = [message.content]
    if has_thinking:
        thinking = "\n" + message.reasoning.strip("\n") + "\n"
        pieces = [chat.start_of_thinking_id, thinking, chat.end_of_thinking_id, "\n\n", message.content.lstrip("\n")]
    for i, call in enumerate(message.tool_calls):
        if call.error:
            raise ValueError(f"the call {call} cannot be written: {call.error}; give calls without an error")
        arguments = json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)
        name = json.dumps(call.name, ensure_ascii=False)
        pieces += ["\n"] if i > 0 or message.content else []
        pieces += [chat.start_of_call_id, f'\n{{"name": {name}, "arguments": {arguments}}}\n', chat.end_of_call_id]
    return [*pieces, chat.end_of_turn_id]


def _response_pieces(chat: Chat, text: str) -> list[str | int]:
    return ["\n", chat.start_of_response_id, f"\n{text}\n", chat.end_of_response_id]


def _find(ids: Sequence[int], wanted: int, start: int) -> int:
    """The first index of `wanted` from `start` on, or the length where there is none."""
    return next((i for i in range(start, len(ids)) if ids[i] == wanted), len(ids))


def _read_call(chat: Chat, inner: Sequence[int], is_closed: bool) -> ToolCall:
    """The call between `<tool_call>` and its end; every mistake becomes `error`."""
    if not is_closed:
        return ToolCall("", {}, UNCLOSED_CALL)
    num_text_ids = chat.content_encoder.get_vocab_size()
    strays = [token for token in inner if not 0 <= token < num_text_ids]
    if strays:
        return ToolCall("", {}, f"The call contains the control token {decode(chat, strays[:1])!r}.")
    try:
        call = json.loads(
            chat.content_encoder.decode(inner),
            object_pairs_hook=_object_of_unique_keys,
            parse_constant=_refuse_number,
            parse_float=_finite_float,
        )
        json.dumps(call, ensure_ascii=False).encode("utf-8")  # refuses escapes of a lone surrogate
    except (ValueError, RecursionError) as error:
        return ToolCall("", {}, f"The call is not valid JSON: {error}.")
    if not isinstance(call, dict):
        return ToolCall("", {}, f"The call is a JSON {type(call).__name__}, not an object.")
    # The sentences are shown to the policy: what it wrote is not repeated, it may be as long as a turn.
    name = call.pop("name", None)
    if not isinstance(name, str) or not name:
        return ToolCall("", {}, 'The call has no "name" that is a non-empty string.')
    arguments = call.pop("arguments", None)
    if not isinstance(arguments, dict):
        return ToolCall(name, {}, 'The call has no "arguments" that are an object.')
    if call:
        return ToolCall(name, {}, 'The call has keys besides "name" and "arguments".')
    return ToolCall(name, arguments)


def _object_of_unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key[:40]!r}")
        result[key] = value
    return result


def _refuse_number(spelling: str) -> float:
    raise ValueError(f"{spelling[:40]} is no JSON number")


def _finite_float(spelling: str) -> float:
    value = float(spelling)
    return value if math.isfinite(value) else _refuse_number(spelling)
