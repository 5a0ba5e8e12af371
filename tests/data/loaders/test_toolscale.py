"""ToolScale rows as Parquet holds them: the union of all arguments, nulls to strip, dates that became timestamps."""

import dataclasses
import datetime
import json

import pytest

from orchestra_jax.data.loaders.release import ReleaseRow
from orchestra_jax.data.loaders.rows import RowError
from orchestra_jax.data.loaders.toolscale import load_toolscale, read_example
from orchestra_jax.environments.functions.task import GoldCall


def make_row(**changes):
    row = {
        "id": "17",
        "description": {"purpose": "cancel", "relevant_policies": None, "notes": None},
        "user_scenario": {
            "persona": None,
            "instructions": {
                "task_instructions": "Be short.",
                "reason_for_call": "Cancel my order.",
                "known_info": "You are Ada, order O1.",
                "unknown_info": None,
                "domain": "shop",
            },
        },
        "initial_state": None,
        "evaluation_criteria": {
            "actions": [
                {"action_id": "a1", "name": "cancel_order", "arguments": {"order_id": "O1", "day": None, "box": None}},
                {
                    "action_id": "a2",
                    "name": "book",
                    "arguments": {
                        "order_id": None,
                        "day": datetime.datetime(2024, 5, 1),
                        "box": {"size": 0, "colour": None, "at": datetime.datetime(2024, 5, 1, 9, 30)},
                    },
                },
            ],
            "communicate_info": ["12"],
            "nl_assertions": None,
        },
    }
    return {**row, **changes}


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_a_parquet_row_becomes_a_task_without_the_nulls_of_the_union(tmp_path):
    (record,) = load_toolscale(write_parquet(tmp_path / "train.parquet", [make_row()])).records
    task = record.task
    assert (task.task_id, task.domain, task.difficulty, task.communicate_info) == ("17", "shop", 2, ("12",))
    assert task.gold_calls == (
        GoldCall(name="cancel_order", arguments={"order_id": "O1"}),
        GoldCall(name="book", arguments={"day": "2024-05-01", "box": {"size": 0, "at": "2024-05-01T09:30:00"}}),
    )
    field = "evaluation_criteria.actions[1].arguments"
    assert sorted(record.dates) == [f"{field}.box.at", f"{field}.day"]
    scenario = task.scenario
    assert (scenario.reason_for_call, scenario.known_info, scenario.unknown_info) == (
        "Cancel my order.",
        "You are Ada, order O1.",
        "",
    )


def test_falsy_values_are_no_nulls(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = make_row()
    arguments = {"a": 0, "b": "", "c": False, "d": [], "e": {}, "f": [None, 1], "g": None}
    row["evaluation_criteria"]["actions"] = [{"name": "f", "arguments": arguments}]
    path.write_text(json.dumps(row) + "\n")
    (record,) = load_toolscale(path).records
    assert record.task.gold_calls[0].arguments == {"a": 0, "b": "", "c": False, "d": [], "e": {}, "f": [None, 1]}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"id": 17}, "row 1, field id: 17 is not of type 'string'"),
        (
            {"user_scenario": {"instructions": {"domain": "shop"}}},
            "field user_scenario.instructions.reason_for_call: is missing",
        ),
        ({"initial_state": {"x": 1}}, "field initial_state: is not null"),
        (
            {"evaluation_criteria": {"actions": [{"name": ""}]}},
            r"field evaluation_criteria.actions\[0\].name: ''",
        ),
        (
            {"evaluation_criteria": {"actions": [{"name": "f", "arguments": "x=1"}]}},
            r"field evaluation_criteria.actions\[0\].arguments: 'x=1' is not of type",
        ),
    ],
)
def test_a_bad_row_is_named_and_can_be_skipped(tmp_path, changes, told):
    path = tmp_path / "rows.jsonl"
    bad = make_row(evaluation_criteria={"actions": []}) | changes
    good = make_row(evaluation_criteria={"actions": None})
    path.write_text("".join(json.dumps(row) + "\n" for row in (bad, good)))
    with pytest.raises(RowError, match=told):
        load_toolscale(path)
    loaded = load_toolscale(path, on_error="skip")
    assert [record.task.task_id for record in loaded.records] == ["17"] and len(loaded.errors) == 1


def test_the_example_of_a_release_row_is_such_a_task():
    row = ReleaseRow("shop____3", "func_call", "p", "", (), {}, {}, {}, 0.0, 0.0, 0.0, {}, make_row())
    assert [call.name for call in read_example(row).task.gold_calls] == ["cancel_order", "book"]
    with pytest.raises(RowError, match="row 'shop____3', example, field id: is missing"):
        read_example(dataclasses.replace(row, example={}))
