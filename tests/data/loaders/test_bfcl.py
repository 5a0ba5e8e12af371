"""BFCL files, in the shapes of the packaged data: one turn, several turns, no call wanted, an answer in words."""

import json

import pytest

from orchestra_jax.data.loaders.bfcl import load_bfcl
from orchestra_jax.data.loaders.rows import RowError

FUNCTION = {
    "name": "area.of",
    "description": "The area.",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "float", "description": "in m"},
            "tags": {"type": "tuple", "items": {"type": "any"}},
            "box": {"type": "HashMap", "properties": {"deep": {"type": "long"}}},
        },
        "required": ["base"],
    },
}
QUESTION = {"id": "simple_0", "question": [[{"role": "user", "content": "The area?"}]], "function": [FUNCTION]}


def write(folder, name, questions, answers=None):
    (folder / "possible_answer").mkdir(exist_ok=True)
    for directory, rows in ((folder, questions), (folder / "possible_answer", answers)):
        if rows is not None:
            (directory / f"BFCL_v4_{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_single_turn_has_json_schemas_and_the_values_that_are_right(tmp_path):
    truth = [{"area.of": {"base": [2, 2.0], "tags": [""]}}]
    write(tmp_path, "simple", [QUESTION], [{"id": "simple_0", "ground_truth": truth}])
    (task,) = load_bfcl(tmp_path, "simple").records
    assert (task.category, task.calls, task.calls_by_turn) == ("simple", tuple(truth), ())
    assert task.turns[0][0].content == "The area?"
    parameters = task.functions[0]["function"]["parameters"]
    assert parameters == {
        "type": "object",
        "properties": {
            "base": {"type": "number", "description": "in m"},
            "tags": {"type": "array", "items": {}},
            "box": {"type": "object", "properties": {"deep": {"type": "integer"}}},
        },
        "required": ["base"],
    }


def test_turns_words_and_no_call(tmp_path):
    turns = {
        "id": "m_0",
        "question": [QUESTION["question"][0]] * 2,
        "initial_config": {"A": {"b": 1}},
        "involved_classes": ["A"],
    }
    write(tmp_path, "multi", [turns], [{"id": "m_0", "ground_truth": [["ls(a=True)"], []]}])
    (task,) = load_bfcl(tmp_path, "multi").records
    assert (task.calls_by_turn, task.initial_config) == ((("ls(a=True)",), ()), {"A": {"b": 1}}) and len(
        task.turns
    ) == 2
    write(tmp_path, "web", [{"id": "w_0", "question": QUESTION["question"]}], [{"id": "w_0", "ground_truth": ["Ada"]}])
    assert load_bfcl(tmp_path, "web").records[0].answers == ("Ada",)
    write(tmp_path, "none", [QUESTION])
    (task,) = load_bfcl(tmp_path, "none").records
    assert (task.calls, task.calls_by_turn, task.answers) == ((), (), ())


@pytest.mark.parametrize(
    ("question", "answer", "told"),
    [
        ({**QUESTION, "question": [{"role": "user"}]}, {}, r"row 1, field question\[0\]: "),
        (
            {**QUESTION, "function": [{"name": "f", "description": ""}]},
            {},
            r"field function\[0\].parameters: is missing",
        ),
        (
            {**QUESTION, "function": [{**FUNCTION, "parameters": {"properties": {"x": {"type": "blob"}}}}]},
            {},
            r"field function\[0\].parameters.properties.x.type: 'blob' is no type of BFCL",
        ),
        (QUESTION, {"id": "simple_1"}, "no row has the field id 'simple_0'"),
        (QUESTION, {"ground_truth": [{"f": {}, "g": {}}]}, r"field ground_truth\[0\]: names 2 functions"),
        (QUESTION, {"ground_truth": [{"f": {}}, "words"]}, "field ground_truth: is not all calls"),
    ],
)
def test_a_bad_row_is_named_and_can_be_skipped(tmp_path, question, answer, told):
    write(tmp_path, "simple", [question], [{"id": "simple_0", "ground_truth": [{"area.of": {}}], **answer}])
    with pytest.raises(RowError, match=told):
        load_bfcl(tmp_path, "simple")
    loaded = load_bfcl(tmp_path, "simple", on_error="skip")
    assert loaded.records == () and loaded.errors
