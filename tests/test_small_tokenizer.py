"""The committed small tokenizer: units are one token each, every byte has a place, the script is deterministic."""

import itertools
import json
import sys

import pytest
from tokenizers import Tokenizer

from experiments import build_tokenizer
from orchestra_jax import chat as chat_lib
from orchestra_jax.data.questions import build_tasks

# Written out again here, so that a unit that the script loses is missed.
ALIASES = [f"expert-{number}" for number in range(1, 7)]
WORDS = [
    *("arithmetic", "number_theory", "geography", "chemistry", "small", "large", "one_hop", "two_hop"),
    *("outcome", "cheap", "fast", "balanced", "local"),
]
UNITS = [
    *ALIASES,
    *(f" ${price} " for price in ("0.2", "1", "5", "15", "25")),
    *(f" {latency}s " for latency in (2, 10, 25, 60, 90)),
    *(prefix + word for prefix in ("", " ") for word in WORDS),
    *("remote", " remote", "price", " price", "time", " time"),
    *("documents found", "no documents", "program printed", "program failed", "no output"),
    '\n{"name": "search", "arguments": {"model": "',
    '\n{"name": "enhance_reasoning", "arguments": {"model": "',
    '\n{"name": "answer", "arguments": {"model": "',
    '"}}\n',
    *"0123456789",
    *("user\n", "assistant\n", "system\n", "\n", "\n\n"),
]


@pytest.fixture(scope="module")
def chat():
    return chat_lib.load_chat(chat_lib.SMALL_TOKENIZER_DIRECTORY, "compact")


def encode(chat, text):
    return chat.content_encoder.encode(text).ids


@pytest.mark.parametrize("unit", UNITS)
def test_unit_is_one_token_wherever_it_stands(chat, unit):
    (token,) = encode(chat, unit)
    assert chat.content_encoder.decode([token]) == unit
    # Neighbours that begin or end a word of their own do not merge with it.
    assert encode(chat, f"({unit})") == [*encode(chat, "("), token, *encode(chat, ")")]


def test_units_in_a_row_stay_apart(chat):
    line = "\nprice local $0.2 expert-4 remote $15 expert-1\ntime 2s expert-1 25s expert-4\n\n"
    assert [chat.content_encoder.decode([token]) for token in encode(chat, line)] == [
        *("\n", "price", " local", " $0.2 ", "expert-4", " remote", " $15 ", "expert-1", "\n"),
        *("time", " 2s ", "expert-1", " 25s ", "expert-4", "\n\n"),
    ]


def test_an_alias_is_the_same_token_in_the_table_in_a_thought_and_in_a_call(chat):
    (alias,) = encode(chat, "expert-4")
    for text in ("price local $0.2 expert-4\n", "time 25s expert-4 60s expert-1", '{"model": "expert-4"}'):
        assert encode(chat, text).count(alias) == 1, text


@pytest.mark.parametrize("text", ["smallest", "breakfast", "locally", "expert-12", "superuser\n", " 12s", " 25sec"])
def test_part_of_a_longer_word_is_no_unit(chat, text):
    pieces = [chat.content_encoder.decode([token]) for token in encode(chat, text)]
    assert "".join(pieces) == text
    assert not set(pieces) & {"small", "fast", "local", "expert-1", "user\n", " 2s ", " 25s "}


def test_numbers_are_single_digits(chat):
    assert len(encode(chat, "9876543210")) == 10


def test_vocabulary_is_dense_small_and_holds_every_byte(chat):
    assert chat.vocab_size <= 1024
    assert sorted(chat.tokenizer.get_vocab().values()) == list(range(chat.vocab_size))
    text = "".join(map(chr, itertools.chain(range(0x250), range(0x1F600, 0x1F610)))) + "\u2603 \ufffd"
    assert chat.content_encoder.decode(encode(chat, text)) == text
    assert set(build_tokenizer.pre_tokenizers.ByteLevel.alphabet()) <= set(chat.content_encoder.get_vocab())


def test_control_flags_are_those_of_qwen3(chat):
    added = {token.content: token.special for token in chat.tokenizer.get_added_tokens_decoder().values()}
    special, ordinary = ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), ("tool_call", "tool_response", "think")
    assert added == dict.fromkeys(special, True) | {f"<{end}{word}>": False for word in ordinary for end in ("", "/")}


def test_unseen_questions_are_as_short_as_seen_ones(chat):
    """Names must not have merged with the phrases around them: a new name would leave phrases never trained on."""
    means = []
    for split in ("train", "test"):
        lengths = [len(encode(chat, task.question)) for task in build_tasks(split, 30, seed=1)]
        means.append(sum(lengths) / len(lengths))
    assert means[0] < 15
    assert means[1] < 1.15 * means[0]


def test_build_is_deterministic_and_reads_back():
    texts = ["What is the capital of France?", "Calculate 5 - 3 - 6.", "Keep it cheap."] * 20
    built = build_tokenizer.build(texts)
    assert build_tokenizer.build(list(reversed(texts))) == built
    tokenizer = Tokenizer.from_str(built)
    pieces = [tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.encode(texts[1]).ids]
    assert pieces == ["Calculate ", "5", " - ", "3", " - ", "6", "."]


def test_main_writes_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(build_tokenizer, "sample_texts", lambda: ["What is the capital of France?"] * 20)
    monkeypatch.setattr(sys, "argv", ["build_tokenizer", f"--tokenizer_directory={tmp_path}"])
    with pytest.raises(SystemExit) as exit_info:
        build_tokenizer.app.run(build_tokenizer.main)
    assert not exit_info.value.code
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["ignore_merges"]
