"""GeneralThought, FRAMES and HLE rows become tasks that the exact scorer can score."""

import json

import pytest

from orchestra_jax.data.loaders.questions import load_questions
from orchestra_jax.data.loaders.rows import RowError
from orchestra_jax.rewards.outcome import score_answer

THOUGHT = {
    "question_id": 2400001,
    "question": "How many edges has a cube?",
    "reference_answer": "12",
    "prev_messages": None,
    "model_name": "some-model",
    "task": "geometry",
    "question_source": "hand-written",
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_general_thought_keeps_one_task_a_question(tmp_path):
    other = {**THOUGHT, "question_id": 7, "question": "How many faces has it?", "reference_answer": 6}
    path = write(tmp_path / "t.jsonl", THOUGHT, {**THOUGHT, "model_name": "another"}, other)
    loaded = load_questions(path, "general_thought")
    assert [(task.task_id, task.kind) for task in loaded.records] == [
        ("general_thought/2400001", "geometry"),
        ("general_thought/7", "geometry"),
    ]
    assert (loaded.num_repeated, loaded.num_rows) == (1, 3)
    assert [score_answer(loaded.records[1], answer) for answer in ("6", "")] == [1.0, 0.0]


def test_an_id_on_two_questions_is_an_error(tmp_path):
    path = write(tmp_path / "t.jsonl", THOUGHT, {**THOUGHT, "reference_answer": "13"})
    with pytest.raises(RowError, match="two different questions or answers"):
        load_questions(path, "general_thought")
    loaded = load_questions(path, "general_thought", on_error="skip")
    assert (len(loaded.records), len(loaded.errors), loaded.num_repeated) == (1, 1, 0)


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("general_thought", {**THOUGHT, "reference_answer": None}, "field reference_answer: None is not of type"),
        ("general_thought", {**THOUGHT, "reference_answer": " "}, "field answer: is blank"),
        (
            "general_thought",
            {**THOUGHT, "prev_messages": [{"role": "user"}]},
            "field prev_messages: the question goes on",
        ),
        ("frames", {"id": "wiki____0", "question": "Who?"}, "field answer: is missing"),
        ("frames", {"id": 3, "question": "Who?", "answer": "x"}, "field id: 3 is not of type 'string'"),
        (
            "hle",
            {"id": "a", "question": "See the picture", "answer": "x", "image": "data:png"},
            "field image: the question",
        ),
        ("hle", {"id": "a", "question": "", "answer": "x"}, "field question: '' "),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, row, told):
    with pytest.raises(RowError, match=told):
        load_questions(write(tmp_path / "t.jsonl", row), name)


def test_frames_and_hle_rows(tmp_path):
    rows = [{"id": "wiki____0", "question": "Who?", "answer": "Ada"}]
    (task,) = load_questions(write(tmp_path / "f.jsonl", *rows), "frames").records
    assert (task.task_id, task.answer, task.evidence_tool) == ("frames/wiki____0", "Ada", "search")
    rows = [{"id": "66e8", "question": "Why?", "answer": "B", "image": "", "answer_type": "multipleChoice"}]
    (task,) = load_questions(write(tmp_path / "h.jsonl", *rows), "hle").records
    assert (task.task_id, task.kind) == ("hle/66e8", "multipleChoice")
    with pytest.raises(ValueError, match="the format 'gaia' is not one of"):
        load_questions(tmp_path / "h.jsonl", "gaia")
