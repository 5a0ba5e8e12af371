"""Near-duplicates among tasks: the share of word triples that two have in common.

similarity = |A and B| / |A or B|,   A, B: the triples of words of a task's scenario and golden calls
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

from orchestra_jax.environments.functions.task import FunctionTask

TRIPLE = 3
_WORD = re.compile(r"\w+")


def find_duplicates(tasks: Sequence[FunctionTask], max_similarity: float) -> dict[str, str]:
    """By the id of a task that goes, the id of the earlier one that it is like (similarity above the limit)."""
    kept: dict[str, frozenset] = {}
    holders = collections.defaultdict(list)  # triple -> ids of kept tasks that have it
    duplicates = {}
    for task in tasks:
        triples = _triples(task)
        shared = collections.Counter(other for triple in triples for other in holders[triple])
        like = next(
            (
                other
                for other, count in shared.most_common()
                if count / (len(triples) + len(kept[other]) - count) > max_similarity
            ),
            None,
        )
        if like is not None:
            duplicates[task.task_id] = like
            continue
        kept[task.task_id] = triples
        for triple in triples:
            holders[triple].append(task.task_id)
    return duplicates


def _triples(task: FunctionTask) -> frozenset[tuple[str, ...]]:
    scenario = task.scenario
    calls = " ".join(f"{call.name} {call.arguments}" for call in task.gold_calls)
    words = _WORD.findall(" ".join((scenario.reason_for_call, scenario.known_info, calls)).lower())
    return frozenset(tuple(words[start : start + TRIPLE]) for start in range(max(len(words) - TRIPLE + 1, 1)))
