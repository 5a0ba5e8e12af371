"""A clerk for the warm start: handles a short wish line by line, and guesses what is to be done.

For each line one call of a function that takes just the numbers in it, drawn uniformly; then it tells the user the
shelves that it has seen, or that it is done. It reads no verb: so it shows the grammar, where numbers go and when to
stop, and nothing about what to choose.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from orchestra_jax.data.records import Instance
from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.function import Function
from orchestra_jax.environments.functions.tools import TELL_USER
from orchestra_jax.types import ToolCall

_NUMBER = re.compile(r"\b([A-Z])\d+\b")
_SHELF = re.compile(r"\bS\d+\b")
KINDS = {"book_id": "B", "member_id": "M", "branch_id": "H"}
DONE = "done"


def guess(
    domain: Domain, instance: Instance, turn: int, shown: Callable[[], str], rng: np.random.Generator
) -> ToolCall:
    """The call of one turn. `shown` gives the context as text, results of earlier calls included."""
    lines = instance.task.scenario.reason_for_call.splitlines()
    if turn >= len(lines):
        shelves = list(dict.fromkeys(_SHELF.findall(shown())))
        return ToolCall(TELL_USER, {"text": " ".join(shelves) or DONE})
    numbers = {match[1]: match[0] for match in _NUMBER.finditer(lines[turn])}
    fit = [each for each in domain.functions if _kinds(each) == set(numbers)]
    if not fit:
        raise ValueError(f"no function takes just the numbers of {lines[turn]!r}: the clerk is for short wishes")
    function = fit[int(rng.integers(len(fit)))]
    names = function.parameters_schema["required"]
    return ToolCall(function.name, {name: numbers[KINDS[name]] for name in names})


def _kinds(function: Function) -> set[str] | None:
    """The kinds of numbers that a function takes, None if it takes anything else."""
    names = function.parameters_schema["properties"]
    return {KINDS[name] for name in names} if names and all(name in KINDS for name in names) else None
