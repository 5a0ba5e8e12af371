"""Success of a task: the database as the golden calls leave it, the information told, the golden entries touched.

    outcome = 1 if  database == golden database  and  every piece of information was said to the user
                    and  every entry that the golden calls touch was touched,   else 0

Source: ToolOrchestra section 3.3, "execution correctness, process fidelity, operation completeness".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from orchestra_jax.environments.functions.database import Database, Key
from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.function import FunctionBroken, FunctionRefused, run_function
from orchestra_jax.environments.functions.task import FunctionTask, GoldCall


@dataclasses.dataclass(frozen=True)
class Success:
    is_database_equal: bool
    is_information_told: bool
    is_all_touched: bool

    @property
    def outcome(self) -> float:
        return float(self.is_database_equal and self.is_information_told and self.is_all_touched)


@dataclasses.dataclass(frozen=True)
class Gold:
    """What the golden calls of a task come to; made once a task."""

    database: Database
    results: tuple[str, ...]


class BadTask(ValueError):
    """A task that no run can be measured by: names task and call."""


def replay(domain: Domain, calls: Iterable[GoldCall]) -> tuple[Database, tuple[str, ...]]:
    """The database behind the calls, and their results. FunctionRefused, FunctionBroken: as a function raises it."""
    database = domain.open_database()
    results = tuple(run_function(domain.functions_by_name, database, each.name, each.arguments) for each in calls)
    return database, results


def run_gold(domain: Domain, task: FunctionTask) -> Gold:
    """BadTask if a golden call fails."""
    database, results = domain.open_database(), []
    for number, call in enumerate(task.gold_calls, start=1):
        try:
            results.append(run_function(domain.functions_by_name, database, call.name, call.arguments))
        except (FunctionRefused, FunctionBroken) as error:
            told = f"task {task.task_id}: golden call {number}, {call.name}({call.arguments}), fails: {error}"
            raise BadTask(told[:500]) from error
    return Gold(database, tuple(results))


def is_told(information: str, texts: Sequence[str]) -> bool:
    """Whether one of the texts says it, in whole words ("142" is not "42"); case, thousands commas, spaces aside."""
    wanted = re.escape(_normal(information))
    pattern = re.compile(rf"(?<![\w.]){wanted}(?![\w]|\.\d)")
    return any(pattern.search(_normal(text)) for text in texts)


def judge(gold: Gold, task: FunctionTask, database: Database, texts_to_user: Sequence[str]) -> Success:
    missing: set[Key] = gold.database.touched - database.touched
    return Success(
        is_database_equal=gold.database.is_equal(database),
        is_information_told=all(is_told(each, texts_to_user) for each in task.communicate_info),
        is_all_touched=not missing,
    )


def keep_sound_tasks(
    domain: Domain, tasks: Iterable[FunctionTask], should_skip: bool
) -> tuple[list[FunctionTask], list[str]]:
    """The tasks whose golden calls run, and a sentence for each that was skipped. BadTask for the first bad one unless
    bad ones are to be skipped."""
    sound, reasons = [], []
    for task in tasks:
        try:
            run_gold(domain, task)
        except BadTask as error:
            if not should_skip:
                raise
            reasons.append(str(error))
        else:
            sound.append(task)
    return sound, reasons


def _normal(text: str) -> str:
    return " ".join(re.sub(r"(?<=\d),(?=\d{3})", "", text.lower()).split())
