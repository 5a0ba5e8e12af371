"""The Berkeley Function Calling Leaderboard, version 4, as the PyPI package bfcl-eval carries it.

Two files a category, one JSON object a line, joined by id:

    BFCL_v4_NAME.json                  {"id", "question": [[{"role", "content"}]], "function": [...]}, and for several
                                       turns {"initial_config", "involved_classes", "excluded_function"?}
    possible_answer/BFCL_v4_NAME.json  {"id", "ground_truth": [{function: {argument: [allowed values]}}], or one list of
                                       calls as Python text for each turn}

Categories without such a file (irrelevance, relevance) want no call, or leave it open. The functions' types are BFCL's
own ("dict", "float", "tuple", "any"): `functions` has them as JSON schema names. "" among the allowed values: the
argument may be left out.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib

from orchestra_jax.data.loaders.rows import (
    STRING,
    TEXT,
    FieldError,
    Loaded,
    Row,
    RowError,
    RowFormat,
    list_schema,
    load,
    object_schema,
)
from orchestra_jax.types import Message

PREFIX = "BFCL_v4_"
JSON_TYPES = {
    "dict": "object", "hashmap": "object", "float": "number", "double": "number", "long": "integer", "short": "integer",
    "byte": "integer", "tuple": "array", "arraylist": "array", "list": "array", "set": "array", "char": "string",
    "bool": "boolean",
}  # fmt: skip
KNOWN_TYPES = ("object", "number", "integer", "array", "string", "boolean", "null")
UNTYPED = ("any",)

Alternatives = dict[str, dict[str, list[object]]]  # function -> argument -> values that are right


@dataclasses.dataclass(frozen=True)
class BfclTask:
    """One task. `turns` are the user's messages, turn by turn.

    `calls`: of a single turn, each call with the values that are right. `calls_by_turn`: of several turns, Python text.
    `answers`: words of which one is the answer (web_search, memory). All are empty where no call is wanted.
    """

    task_id: str
    category: str
    turns: tuple[tuple[Message, ...], ...]
    functions: tuple[Row, ...]  # JSON schemas in the OpenAI format
    calls: tuple[Alternatives, ...]
    calls_by_turn: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]
    initial_config: Row
    involved_classes: tuple[str, ...]


def load_bfcl(directory: str | os.PathLike, category: str, on_error: str = "refuse") -> Loaded[BfclTask]:
    """The tasks of a category such as "simple_python", from the package's folder `data`.

    Raises:
      ValueError: no such file, or (under "refuse") a row that breaks the format or has no possible answer.
    """
    directory = pathlib.Path(directory)
    path, answers_path = (
        directory / f"{PREFIX}{category}.json",
        directory / "possible_answer" / f"{PREFIX}{category}.json",
    )
    questions = load(path, RowFormat("bfcl", QUESTION_SCHEMA, _parse_question), on_error)
    if not answers_path.is_file():
        tasks = tuple(dataclasses.replace(task, category=category) for task in questions.records)
        return Loaded(tasks, questions.errors)
    answers = load(answers_path, RowFormat("bfcl answers", ANSWER_SCHEMA, _parse_answer), on_error)
    by_id, tasks, errors = dict(answers.records), [], [*questions.errors, *answers.errors]
    for task in questions.records:
        if task.task_id not in by_id:
            told = f"{answers_path}: no row has the field id {task.task_id!r}, which {path.name} asks for"
            if on_error == "refuse":
                raise RowError(told)
            errors.append(told)
            continue
        tasks.append(dataclasses.replace(task, category=category, **by_id[task.task_id]))
    return Loaded(tuple(tasks), tuple(errors))


def _parse_question(row: Row) -> BfclTask:
    return BfclTask(
        task_id=row["id"],
        category="",
        turns=tuple(tuple(Message(each["role"], each["content"]) for each in turn) for turn in row["question"]),
        functions=tuple(_function(each, f"function[{number}]") for number, each in enumerate(row.get("function", ()))),
        calls=(),
        calls_by_turn=(),
        answers=(),
        initial_config=row.get("initial_config", {}),
        involved_classes=tuple(row.get("involved_classes", ())),
    )


def _parse_answer(row: Row) -> tuple[str, dict[str, tuple]]:
    """The id, and the fields of a BfclTask that hold its possible answer."""
    truth = row["ground_truth"]
    kinds = {type(each) for each in truth}
    if kinds == {dict}:
        for number, call in enumerate(truth):
            if len(call) != 1:
                raise FieldError(f"ground_truth[{number}]", f"names {len(call)} functions: a call is one")
        return row["id"], {"calls": tuple(truth)}
    if kinds == {list}:
        return row["id"], {"calls_by_turn": tuple(map(tuple, truth))}
    if kinds == {str}:
        return row["id"], {"answers": tuple(truth)}
    raise FieldError("ground_truth", "is not all calls, all turns, or all answers in words")


def _function(entry: Row, field: str) -> Row:
    parameters = _json_schema(entry["parameters"], f"{field}.parameters")
    return {
        "type": "function",
        "function": {"name": entry["name"], "description": entry["description"], "parameters": parameters},
    }


def _json_schema(schema: Row, field: str) -> Row:
    """BFCL's schema with the type names of JSON schema; what is there besides stays."""
    written = dict(schema)
    kind = str(schema.get("type", "any")).lower()
    if kind in UNTYPED:
        written.pop("type", None)
    elif kind in JSON_TYPES or kind in KNOWN_TYPES:
        written["type"] = JSON_TYPES.get(kind, kind)
    else:
        raise FieldError(f"{field}.type", f"{schema['type']!r} is no type of BFCL")
    properties = schema.get("properties")
    if isinstance(properties, dict):
        written["properties"] = {
            name: _json_schema(each, f"{field}.properties.{name}") if isinstance(each, dict) else each
            for name, each in properties.items()
        }
    if isinstance(schema.get("items"), dict):
        written["items"] = _json_schema(schema["items"], f"{field}.items")
    return written


QUESTION_SCHEMA = object_schema(
    {
        "id": TEXT,
        "question": list_schema(
            list_schema(object_schema({"role": {"enum": ["system", "user", "assistant"]}, "content": STRING}))
        ),
    },
    {
        "function": list_schema(object_schema({"name": TEXT, "description": STRING, "parameters": {"type": "object"}})),
        "initial_config": {"type": "object"},
        "involved_classes": list_schema(TEXT),
    },
)
_TRUTH = {"type": ["object", "array", "string"], "items": STRING, "minLength": 1}
ANSWER_SCHEMA = object_schema({"id": TEXT, "ground_truth": list_schema(_TRUTH, least=1)})
