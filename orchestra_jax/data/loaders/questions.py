"""Questions with a reference answer, from the files that ToolOrchestra trains and evaluates on.

    general_thought   {"question_id"?, "question", "reference_answer", "task"?, "question_source"?, "prev_messages"?}
                      several rows a question (one per model that answered it): the first one stays
    frames            {"id": "wiki____3", "question", "answer"}
    hle               {"id", "question", "answer", "answer_type"?, "image"?}; a question with an image is refused

A record is a `Task` whose answer is compared exactly (rewards/outcome.py); free-form answers want a judge. There are no
gold documents: whether evidence is present cannot be computed for these.
"""

from __future__ import annotations

import os

from orchestra_jax.data.loaders.rows import (
    STRING,
    TEXT,
    FieldError,
    Loaded,
    Row,
    RowError,
    RowFormat,
    load,
    nullable,
    object_schema,
)
from orchestra_jax.data.records import Task

SEARCH, REASON = "search", "enhance_reasoning"
WIKI_PREFIX = "wiki"

_ID = {"type": ["string", "integer"]}
_ANSWER = {"type": ["string", "integer", "number"]}


def _task(identifier: object, family: str, kind: str, question: str, answer: object, evidence_tool: str) -> Task:
    answer = answer if isinstance(answer, str) else str(answer)
    for field, text in (("question", question), ("answer", answer)):
        if not text.strip():
            raise FieldError(field, "is blank")
    return Task(f"{family}/{identifier}", family, kind, question, answer, evidence_tool)


def _general_thought(row: Row) -> Task:
    if row.get("prev_messages"):
        raise FieldError(
            "prev_messages", "the question goes on from an earlier conversation, which a task has no place for"
        )
    identifier = row.get("question_id", row.get("question"))
    kind = row.get("task") or "unknown"
    return _task(identifier, "general_thought", kind, row["question"], row["reference_answer"], REASON)


def _frames(row: Row) -> Task:
    return _task(row["id"], "frames", "multi_hop", row["question"], row["answer"], SEARCH)


def _hle(row: Row) -> Task:
    if row.get("image"):
        raise FieldError("image", "the question has an image, which a text policy cannot see")
    return _task(row["id"], "hle", row.get("answer_type") or "unknown", row["question"], row["answer"], SEARCH)


_MESSAGES = nullable({"type": "array"})
FORMATS = {
    "general_thought": RowFormat(
        "general_thought",
        object_schema(
            {"question": TEXT, "reference_answer": _ANSWER},
            {"question_id": _ID, "task": nullable(STRING), "prev_messages": _MESSAGES},
        ),
        _general_thought,
    ),
    "frames": RowFormat("frames", object_schema({"id": TEXT, "question": TEXT, "answer": _ANSWER}), _frames),
    "hle": RowFormat(
        "hle",
        object_schema(
            {"id": _ID, "question": TEXT, "answer": _ANSWER},
            {"image": nullable(STRING), "answer_type": nullable(STRING)},
        ),
        _hle,
    ),
}


def load_questions(path: str | os.PathLike, name: str, on_error: str = "refuse") -> Loaded[Task]:
    """Tasks of a file in one of `FORMATS`. A row that repeats another one's question and answer is counted, not kept.

    Raises:
      ValueError: an unknown format, a file that is none; under "refuse" a row that breaks the format, named by field,
        or one that repeats an id with another question or answer.
    """
    if name not in FORMATS:
        raise ValueError(f"the format {name!r} is not one of {sorted(FORMATS)}")
    loaded = load(path, FORMATS[name], on_error)
    first: dict[str, Task] = {}
    errors = []
    for task in loaded.records:
        other = first.setdefault(task.task_id, task)
        if (other.question, other.answer) != (task.question, task.answer):
            errors.append(f"{path}: the id of {task.task_id!r} stands on two different questions or answers")
    if errors and on_error == "refuse":
        raise RowError(errors[0])
    num_repeated = len(loaded.records) - len(first) - len(errors)
    return Loaded(tuple(first.values()), (*loaded.errors, *errors), num_repeated)
