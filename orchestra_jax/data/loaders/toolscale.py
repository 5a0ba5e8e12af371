"""Rows of nvidia/ToolScale, and the tau2-shaped tasks in the release's `example`: function-calling tasks.

    {"id", "description": {"purpose"}, "user_scenario": {"persona", "instructions": {"task_instructions",
     "reason_for_call", "known_info", "unknown_info", "domain"}}, "initial_state": null,
     "evaluation_criteria": {"actions": [{"action_id", "name", "arguments"}], "communicate_info", "nl_assertions"}}

Parquet gives every `arguments` the columns of all functions: those that a call does not use are null and are left out.
Some dates became timestamps on the way; they are written back as ISO dates, and `dates` names where.
"""

from __future__ import annotations

import dataclasses
import datetime
import os

from orchestra_jax.data.loaders.release import ReleaseRow
from orchestra_jax.data.loaders.rows import (
    STRING,
    TEXT,
    FieldError,
    Loaded,
    Row,
    RowFormat,
    date_text,
    list_schema,
    load,
    nullable,
    object_schema,
)
from orchestra_jax.environments.functions.task import FunctionTask, GoldCall, UserScenario


@dataclasses.dataclass(frozen=True)
class ToolScaleTask:
    """`dates` are the fields whose timestamp was written back as a date."""

    task: FunctionTask
    purpose: str
    nl_assertions: tuple[str, ...]
    dates: tuple[str, ...]


def load_toolscale(path: str | os.PathLike, on_error: str = "refuse") -> Loaded[ToolScaleTask]:
    """Tasks of a file; ValueError for one that is none, or (under "refuse") a row that breaks the format by field."""
    return load(path, RowFormat("toolscale", SCHEMA, parse_task), on_error)


def read_example(row: ReleaseRow) -> ToolScaleTask:
    """The task of a func_call row of the release. RowError for an example that breaks the format by field."""
    return RowFormat("toolscale", SCHEMA, parse_task).read(row.example, f"row {row.row_id!r}, example")


def parse_task(row: Row) -> ToolScaleTask:
    """The task of a row that obeys SCHEMA. FieldError for what a schema cannot say."""
    criteria, instructions = row["evaluation_criteria"], row["user_scenario"]["instructions"]
    dates: list[str] = []
    calls = []
    for number, action in enumerate(criteria.get("actions") or ()):
        field = f"evaluation_criteria.actions[{number}].arguments"
        arguments = _plain(action.get("arguments") or {}, field, dates)
        calls.append(GoldCall(name=action["name"], arguments=arguments))
    if row.get("initial_state") is not None:
        raise FieldError("initial_state", "is not null: a task that starts from a state of its own is not supported")
    scenario = UserScenario(
        reason_for_call=instructions["reason_for_call"],
        known_info=instructions.get("known_info") or "",
        unknown_info=instructions.get("unknown_info") or "",
        task_instructions=instructions.get("task_instructions") or "",
        persona=row["user_scenario"].get("persona") or "",
    )
    task = FunctionTask(
        task_id=row["id"],
        domain=instructions["domain"],
        scenario=scenario,
        gold_calls=tuple(calls),
        communicate_info=tuple(criteria.get("communicate_info") or ()),
        difficulty=max(len(calls), 1),
    )
    purpose = (row.get("description") or {}).get("purpose") or ""
    return ToolScaleTask(task, purpose, tuple(criteria.get("nl_assertions") or ()), tuple(dates))


def _plain(value: object, field: str, dates: list[str]) -> object:
    """JSON without the nulls of the union, dates as text."""
    if isinstance(value, dict):
        kept = {name: each for name, each in value.items() if each is not None}
        return {name: _plain(each, f"{field}.{name}", dates) for name, each in kept.items()}
    if isinstance(value, list):
        return [_plain(each, f"{field}[{number}]", dates) for number, each in enumerate(value)]
    if isinstance(value, datetime.date):  # a datetime is one
        dates.append(field)
        return date_text(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise FieldError(field, f"{value!r} is a {type(value).__name__}, which JSON does not have")


_INSTRUCTIONS = object_schema(
    {"reason_for_call": TEXT, "domain": TEXT},
    {"task_instructions": nullable(STRING), "known_info": nullable(STRING), "unknown_info": nullable(STRING)},
)
_ACTION = object_schema({"name": TEXT}, {"arguments": {"type": ["object", "null"]}})
SCHEMA = object_schema(
    {
        "id": TEXT,
        "user_scenario": object_schema({"instructions": _INSTRUCTIONS}, {"persona": nullable(STRING)}),
        "evaluation_criteria": object_schema(
            {"actions": nullable(list_schema(_ACTION))},
            {"communicate_info": nullable(list_schema(TEXT)), "nl_assertions": nullable(list_schema(STRING))},
        ),
    },
    {"description": nullable(object_schema({}, {"purpose": nullable(STRING)}))},
)
