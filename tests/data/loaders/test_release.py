"""The release's training rows: units and signs are what the caller says, and a row that contradicts it is refused."""

import copy
import json

import pytest

from orchestra_jax.data.loaders.release import load_release_rows, make_instance, make_offers, make_preference
from orchestra_jax.data.loaders.rows import RowError
from orchestra_jax.experts.catalog import Listing

ROW = {
    "index": "wiki____7",
    "id": "wiki____7",
    "category": "qa",
    "problem": "Who wrote it? Keep it cheap.",
    "answer": "Ada",
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "answer",
                "description": "Answers.",
                "parameters": {"type": "object", "properties": {"model": {"type": "string"}}, "required": ["model"]},
            },
        }
    ],
    "model_mapping": {"answer-1": "gpt-5", "search-3": "Qwen3-32B"},
    "tool_pricing": {
        "gpt-5": {"input_tokens_per_million": 1.25e-6, "output_tokens_per_million": 1e-5},
        "Qwen3-32B": {"input_tokens_per_million": 8e-7, "output_tokens_per_million": 8e-7},
        "code_interpreter_per_second": 8.3e-6,
        "tavily": {"search": 0.01, "extract": 0.002},
    },
    "pref_vec": {"answer-1": 0.2, "accuracy": 1.0, "cost": -0.3, "latency": -0.1},
}
LISTINGS = (
    Listing("answer", "a", "gpt-5", 1.25, 10.0, 96.0, is_local=False),
    Listing("search", "b", "Qwen3-32B", 0.8, 0.8, 8.0, is_local=True),
)


def load_one(tmp_path, row, price_unit="per_token"):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (record,) = load_release_rows(path, price_unit).records
    return record


def changed(path, value):
    """ROW with the field at `path` set to `value`, or without it for `del`."""
    row = copy.deepcopy(ROW)
    holder = row
    *way, last = path
    for name in way:
        holder = holder[name]
    if value is del_:
        del holder[last]
    else:
        holder[last] = value
    return row


del_ = object()


def test_a_question_becomes_an_instance_at_its_own_prices(tmp_path):
    row = load_one(tmp_path, ROW)
    assert (row.domain, row.interpreter_usd_per_s, row.search_usd, row.extract_usd) == ("wiki", 8.3e-6, 0.01, 0.002)
    instance = make_instance(row, LISTINGS, are_negated=True)
    assert instance.preference.weights == pytest.approx(
        {"calls/answer-1": 0.2, "outcome": 1.0, "cost_usd": 0.3, "latency_s": 0.1}
    )
    first, second = instance.offers
    assert (first.alias, first.roles, first.latency_s, first.is_local) == ("answer-1", ("answer",), 96.0, False)
    prices = [(o.input_usd_per_million_tokens, o.output_usd_per_million_tokens) for o in (first, second)]
    assert prices == [pytest.approx((1.25, 10.0)), pytest.approx((0.8, 0.8))]
    assert (instance.task.question, instance.task.answer) == (ROW["problem"], "Ada")


def test_signs_are_said_and_not_guessed(tmp_path):
    row = load_one(tmp_path, ROW)
    with pytest.raises(ValueError, match="pref_vec.cost of row 'wiki____7' is -0.3, against are_negated=False"):
        make_preference(row, are_negated=False)
    positive = load_one(tmp_path, changed(["pref_vec"], {"accuracy": 1, "cost": 0.3, "latency": 0}))
    assert make_preference(positive, are_negated=False).weights == {"outcome": 1.0, "cost_usd": 0.3, "latency_s": 0.0}
    with pytest.raises(ValueError, match="against are_negated=True"):
        make_preference(positive, are_negated=True)


def test_the_unit_of_prices_is_said_and_checked(tmp_path):
    with pytest.raises(
        RowError, match="field tool_pricing.gpt-5.input_tokens_per_million: 1.25e-06 makes 1.25e-06 dollars"
    ):
        load_one(tmp_path, ROW, "per_million")
    with pytest.raises(ValueError, match="price_unit is 'cents'"):
        load_one(tmp_path, ROW, "cents")


def test_a_function_calling_row_carries_its_task(tmp_path):
    row = {**ROW, "category": "func_call", "example": {"id": "1"}, "model_mapping": {"expert-1": "gpt-5"}}
    loaded = load_one(tmp_path, row)
    assert loaded.example == {"id": "1"}
    assert make_offers(loaded, LISTINGS)[0].roles == ("call_expert",)
    with pytest.raises(ValueError, match="is a func_call"):
        make_instance(loaded, LISTINGS, are_negated=True)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (["index"], "wiki-7", "field index: 'wiki-7' does not match"),
        (["category"], "chat", "field category: 'chat' is not one of"),
        (["category"], "func_call", "field example: is missing"),
        (["answer"], del_, "field answer: is missing"),
        (["tools", 0, "function", "name"], del_, r"field tools\[0\].function.name: is missing"),
        (
            ["tools", 0, "function", "parameters", "type"],
            "thing",
            r"field tools\[0\].function.parameters: is no JSON schema",
        ),
        (["tool_pricing", "gpt-5"], del_, "field tool_pricing.gpt-5.input_tokens_per_million: is missing"),
        (["tool_pricing", "tavily", "search"], "free", "field tool_pricing.tavily.search: 'free' is not of type"),
        (["pref_vec", "cost"], del_, "field pref_vec.cost: is missing"),
        (["pref_vec", "cost"], "low", "field pref_vec.cost: 'low' is not of type 'number'"),
        (["model_mapping"], {}, "field model_mapping: "),
    ],
)
def test_a_bad_row_is_named_by_its_field(tmp_path, path, value, told):
    with pytest.raises(RowError, match=told):
        load_one(tmp_path, changed(path, value))


def test_an_offer_needs_a_listing(tmp_path):
    with pytest.raises(ValueError, match="model_mapping.search-3 of row 'wiki____7' is 'Qwen3-32B', which no listing"):
        make_offers(load_one(tmp_path, ROW), LISTINGS[:1])
