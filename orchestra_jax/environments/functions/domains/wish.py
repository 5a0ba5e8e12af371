"""Tasks put together from wishes: each wish is one thing that the user wants, on entries that no other wish uses.

Wishes that share no entry need all of their calls, in any order between wishes; a wish of several calls needs them in
its own order. A call that only reads stands among the golden ones where its entry is touched by nothing else: without
the look the information would be a guess.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from orchestra_jax.environments.functions.database import Base
from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.success import is_told, run_gold
from orchestra_jax.environments.functions.task import FunctionTask, GoldCall, UserScenario

MAX_ATTEMPTS = 1_000  # in a row that give no new task: then there is none


@dataclasses.dataclass(frozen=True)
class Wish:
    """`short` is the sentence for a policy with a small vocabulary."""

    sentence: str
    short: str
    calls: tuple[GoldCall, ...]
    told: tuple[str, ...] = ()
    facts: dict[str, str] = dataclasses.field(default_factory=dict)


class NothingFits(Exception):
    """No entry that a wish needs is left."""


class Draw:
    """Draws entries of a database for one task, each at most once."""

    def __init__(self, base: Base, rng: np.random.Generator):
        self._fields, self.rng = base.fields, rng
        self._used: set[tuple[str, str]] = set()

    def take(self, table: str, is_fit: Callable[[object], bool] = lambda entry: True):
        """An entry that fits and that the task has not used yet; frozen."""
        entries = self._fields[table]
        fit = [key for key, entry in entries.items() if (table, key) not in self._used and is_fit(entry)]
        if not fit:
            raise NothingFits(table)
        return self.take_this(table, fit[int(self.rng.integers(len(fit)))])

    def take_this(self, table: str, key: str):
        """The entry of this key, which must not have been used."""
        if (table, key) in self._used:
            raise NothingFits(table)
        self._used.add((table, key))
        return self._fields[table][key]

    def choose(self, values: Sequence):
        return values[int(self.rng.integers(len(values)))]


WishMaker = Callable[[Draw], Wish]


def gold(name: str, **arguments: object) -> GoldCall:
    return GoldCall(name=name, arguments=arguments)


def generate_tasks(
    domain: Domain,
    makers: Sequence[WishMaker],
    difficulties: Sequence[int],
    num_tasks: int,
    seed: int,
    prefix: str = "",
    is_short: bool = False,
) -> list[FunctionTask]:
    """`num_tasks` different tasks, difficulties in turn: the difficulty of a task is its number of golden calls.

    ValueError if the domain has no room for that many.
    """
    rng = np.random.default_rng(seed)
    tasks: dict[tuple, FunctionTask] = {}
    num_attempts = 0
    while len(tasks) < num_tasks and num_attempts < MAX_ATTEMPTS:
        num_before = len(tasks)
        difficulty = difficulties[len(tasks) % len(difficulties)]
        task_id = f"{prefix or domain.name}/{seed}/{len(tasks)}"
        task = _compose(domain, makers, difficulty, rng, task_id, is_short)
        if task is not None:
            # The same calls in another order are the same task.
            tasks.setdefault(tuple(sorted(call.model_dump_json() for call in task.gold_calls)), task)
        num_attempts = num_attempts + 1 if len(tasks) == num_before else 0
    if len(tasks) < num_tasks:
        raise ValueError(
            f"domain {domain.name!r} gives {len(tasks)} different tasks of difficulties {tuple(difficulties)}, "
            f"{num_tasks} are wanted: enlarge its database"
        )
    return list(tasks.values())


def _compose(
    domain: Domain, makers: Sequence[WishMaker], difficulty: int, rng: np.random.Generator, task_id: str, is_short: bool
) -> FunctionTask | None:
    """A task of `difficulty` golden calls; None where the draw leads nowhere."""
    draw, wishes, num_calls = Draw(domain.base, rng), [], 0
    while num_calls < difficulty:
        try:
            wish = draw.choose(makers)(draw)
        except NothingFits:
            return None
        wishes.append(wish)
        num_calls += len(wish.calls)
    told = [information for wish in wishes for information in wish.told]
    is_clear = all(not is_told(each, [*told[:k], *told[k + 1 :]]) for k, each in enumerate(told))
    if num_calls > difficulty or not is_clear:
        return None
    known = {topic: fact for wish in wishes for topic, fact in wish.facts.items()}
    sentences = [wish.short if is_short else wish.sentence for wish in wishes]
    task = FunctionTask(
        task_id=task_id,
        domain=domain.name,
        scenario=UserScenario(
            reason_for_call=("\n" if is_short else " ").join(sentences),
            known_info=" ".join(f"Your {topic} is {fact}." for topic, fact in known.items()),
            task_instructions="Ask for all of it at once. You want nothing else.",
            facts=known,
        ),
        gold_calls=tuple(call for wish in wishes for call in wish.calls),
        communicate_info=tuple(told),
        difficulty=difficulty,
    )
    run_gold(domain, task)
    return task
