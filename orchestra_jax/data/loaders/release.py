"""The training rows of the ToolOrchestra release: one task with its tools, models, prices and preference.

    {"index": "wiki____7", "category": "qa" | "func_call", "problem", "answer", "tools": [JSON schemas],
     "model_mapping": {alias: model}, "tool_pricing": {model: {"input_tokens_per_million", "output_tokens_per_million"},
     "code_interpreter_per_second", "tavily": {"search", "extract"}},
     "pref_vec": {alias: weight, "accuracy", "cost", "latency"}, "example": a tau2 task (func_call alone)}

Two things of the release are said by whoever loads, and never guessed: its price fields are named per million and hold
dollars a token (`price_unit`), and its code only makes sense with cost and latency weights below zero (`are_negated`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence

import jsonschema

from orchestra_jax.data.loaders.rows import (
    STRING,
    TEXT,
    FieldError,
    Loaded,
    Row,
    RowFormat,
    list_schema,
    load,
    object_schema,
)
from orchestra_jax.data.records import Instance, Offer, Preference, Task
from orchestra_jax.experts.catalog import Listing
from orchestra_jax.seeds import derive_seed

CATEGORIES = ("qa", "func_call")
USD_PER_MILLION = {"per_token": 1e6, "per_million": 1.0}  # what a price of that unit is multiplied with
PLAUSIBLE_USD_PER_MILLION = (0.001, 1000.0)
INTERPRETER, SEARCHER = "code_interpreter_per_second", "tavily"
ROLES_BY_STEM = {"search": "search", "reasoner": "enhance_reasoning", "answer": "answer", "expert": "call_expert"}
OBJECTIVES = {"accuracy": "outcome", "cost": "cost_usd", "latency": "latency_s"}


@dataclasses.dataclass(frozen=True)
class ReleaseRow:
    """One row, in our units. `weights` are as they stand in the file; `example` is a tau2 task, {} for a question."""

    row_id: str
    category: str
    problem: str
    answer: str
    tools: tuple[Row, ...]
    models: dict[str, str]  # by alias
    input_usd_per_million_tokens: dict[str, float]  # by model
    output_usd_per_million_tokens: dict[str, float]
    interpreter_usd_per_s: float
    search_usd: float
    extract_usd: float
    weights: dict[str, float]
    example: Row

    @property
    def domain(self) -> str:
        """What stands before the number in the id; "wiki" is retrieved from Wikipedia."""
        return self.row_id.split("____")[0]


def load_release_rows(path: str | os.PathLike, price_unit: str, on_error: str = "refuse") -> Loaded[ReleaseRow]:
    """Rows of a file whose prices are "per_token" (the release's own file) or "per_million".

    Raises:
      ValueError: an unknown unit, a file that is none, or (under "refuse") a row that breaks the format by field.
    """
    if price_unit not in USD_PER_MILLION:
        raise ValueError(f"price_unit is {price_unit!r}: say what the file holds, one of {sorted(USD_PER_MILLION)}")
    parse = functools.partial(_parse, factor=USD_PER_MILLION[price_unit])
    return load(path, RowFormat("release", SCHEMA, parse), on_error)


def make_preference(row: ReleaseRow, are_negated: bool) -> Preference:
    """The row's weights by objective name, aliases as "calls/ALIAS"; the words stand in the problem already.

    Args:
      row: a row of the file.
      are_negated: the file holds the weights of cost and latency below zero.

    Raises:
      ValueError: a weight whose sign is not as said.
    """
    weights = {}
    for name, weight in row.weights.items():
        is_negated = are_negated and name in ("cost", "latency")
        if weight * (-1 if is_negated else 1) < 0:
            raise ValueError(
                f"pref_vec.{name} of row {row.row_id!r} is {weight}, against are_negated={are_negated}: say how "
                "the file holds its weights"
            )
        weights[OBJECTIVES.get(name, f"calls/{name}")] = abs(weight)
    return Preference(row.row_id, "", weights)


def make_offers(row: ReleaseRow, listings: Sequence[Listing]) -> tuple[Offer, ...]:
    """The row's aliases as offers at the row's prices. Latency and place, which no row holds, are the listings'.

    Raises:
      ValueError: an alias of no known role, or a model that no listing has in that role.
    """
    known = {(listing.role, listing.model): listing for listing in listings}
    offers = []
    for alias, model in row.models.items():
        role = ROLES_BY_STEM.get(alias.split("-")[0])
        # An expert of a function-calling task answers in words: it takes the time of an answer.
        listing = known.get(("answer" if role == "call_expert" else role, model))
        if listing is None:
            raise ValueError(
                f"model_mapping.{alias} of row {row.row_id!r} is {model!r}, which no listing has in the role {role!r}: "
                "add one with its latency"
            )
        prices = row.input_usd_per_million_tokens[model], row.output_usd_per_million_tokens[model]
        offers.append(Offer(alias, model, listing.is_local, *prices, listing.latency_s, (role,)))
    return tuple(offers)


def make_instance(row: ReleaseRow, listings: Sequence[Listing], are_negated: bool) -> Instance:
    """The instance of a question, with the row's own models, prices and preference; ValueError for another category."""
    if row.category != "qa":
        raise ValueError(f"row {row.row_id!r} is a {row.category}: its task is toolscale.read_example(row)")
    task = Task(row.row_id, row.domain, "qa", row.problem, row.answer, "search")
    preference = make_preference(row, are_negated)
    return Instance(row.row_id, task, preference, make_offers(row, listings), derive_seed("release", row.row_id))


def _parse(row: Row, factor: float) -> ReleaseRow:
    if row["category"] == "func_call" and not row.get("example"):
        raise FieldError("example", "is missing, and a func_call row is nothing without it")
    if row["category"] == "qa" and not str(row.get("answer", "")).strip():
        raise FieldError("answer", "is missing, and a question is nothing without it")
    if not set(OBJECTIVES) <= set(row["pref_vec"]):
        missing = sorted(set(OBJECTIVES) - set(row["pref_vec"]))
        raise FieldError(f"pref_vec.{missing[0]}", "is missing")
    for number, tool in enumerate(row["tools"]):
        try:
            jsonschema.Draft202012Validator.check_schema(tool["function"]["parameters"])
        except jsonschema.SchemaError as error:
            raise FieldError(f"tools[{number}].function.parameters", f"is no JSON schema ({error.message})") from error
    inputs, outputs = _prices(row, factor)
    searcher = row["tool_pricing"].get(SEARCHER, {})
    return ReleaseRow(
        row_id=row["index"],
        category=row["category"],
        problem=row["problem"],
        answer=str(row.get("answer", "")),
        tools=tuple(row["tools"]),
        models=dict(row["model_mapping"]),
        input_usd_per_million_tokens=inputs,
        output_usd_per_million_tokens=outputs,
        interpreter_usd_per_s=float(row["tool_pricing"].get(INTERPRETER, 0.0)),
        search_usd=float(searcher.get("search", 0.0)),
        extract_usd=float(searcher.get("extract", 0.0)),
        weights={name: float(weight) for name, weight in row["pref_vec"].items()},
        example=dict(row.get("example") or {}),
    )


def _prices(row: Row, factor: float) -> tuple[dict[str, float], dict[str, float]]:
    """Dollars per million tokens of every model that an alias stands for."""
    both: tuple[dict[str, float], dict[str, float]] = ({}, {})
    least, most = PLAUSIBLE_USD_PER_MILLION
    for model in dict.fromkeys(row["model_mapping"].values()):
        entry = row["tool_pricing"].get(model)
        for prices, name in zip(both, ("input_tokens_per_million", "output_tokens_per_million")):
            field = f"tool_pricing.{model}.{name}"
            value = entry.get(name) if isinstance(entry, Mapping) else None
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise FieldError(field, "is missing, and model_mapping offers this model")
            if value and not least <= value * factor <= most:
                raise FieldError(field, f"{value} makes {value * factor:g} dollars per million tokens: see price_unit")
            prices[model] = value * factor
    return both


_PRICE = {"type": "number", "minimum": 0}
_TOOL = object_schema(
    {
        "type": {"const": "function"},
        "function": object_schema({"name": TEXT, "description": STRING, "parameters": {"type": "object"}}),
    }
)
SCHEMA = object_schema(
    {
        "index": {"type": "string", "pattern": "^.+____[0-9]+$"},
        "category": {"enum": list(CATEGORIES)},
        "problem": TEXT,
        "tools": list_schema(_TOOL, least=1),
        "model_mapping": {"type": "object", "additionalProperties": TEXT, "minProperties": 1},
        "tool_pricing": {
            "type": "object",
            "properties": {INTERPRETER: _PRICE, SEARCHER: object_schema({}, {"search": _PRICE, "extract": _PRICE})},
            "additionalProperties": {"type": "object", "additionalProperties": _PRICE},
        },
        "pref_vec": {"type": "object", "additionalProperties": {"type": "number"}},
    },
    {"answer": {"type": ["string", "number"]}, "example": {"type": ["object", "null"]}},
)
