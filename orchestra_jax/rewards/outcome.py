"""Whether an answer is right, and whether the evidence for it is there. Both are computed; no model judges.

`score_answer` is the outcome objective, in {0, 1}. Partial credit, which some reasoning-gym scorers give, counts as 0.
`holds_evidence` is what separates a right answer from a lucky one: see `Task.evidence_tool`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

from orchestra_jax.data.records import Task

EXACT = "exact"


def score_answer(task: Task, answer: str) -> float:
    """1.0 if `answer` is right, else 0.0.

    "exact" ignores case and runs of white space; any other `task.scorer` is the reasoning-gym data set whose own scorer
    must give full marks. Raises ValueError for a scorer that reasoning-gym does not know.
    """
    if task.scorer == EXACT:
        return float(_normalize(answer) == _normalize(task.answer))
    entry = {"question": task.question, "answer": task.answer, "metadata": task.metadata}
    return float(_gym_scorer(task.scorer)(answer.strip(), entry) >= 1.0)


def holds_evidence(task: Task, retrieved_document_ids: Collection[str], printed: str) -> bool:
    """Whether every gold document was retrieved; for a task without any, whether the printed output is the answer."""
    if task.gold_document_ids:
        return set(task.gold_document_ids) <= set(retrieved_document_ids)
    return score_answer(task, printed) == 1.0


def _normalize(text: str) -> str:
    return " ".join(text.split()).casefold()


@functools.cache
def _gym_scorer(name: str) -> Callable[[str, dict[str, object]], float]:
    import reasoning_gym  # two seconds: paid by the first computation task, not by every import of this file
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ValueError(f"scorer {name!r} is unknown: use {EXACT!r} or the name of a reasoning-gym data set")
    return reasoning_gym.get_score_answer_fn(name)
