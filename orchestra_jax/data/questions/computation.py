"""Questions that a short program answers. Operands, answers and scorers come from reasoning-gym; the wording is ours.

reasoning-gym's own wordings carry instructions on the form of the answer; ours are one short sentence. Every task has
the program that prints its answer and one that fails in the open, by an exception.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator

from orchestra_jax.data.records import Task

_CHUNK = 64  # entries of one reasoning-gym data set, which is addressed by a seed and an index
_MAX_ENTRIES = 20_000  # of one cell; a cell's stream ends there


_SUM_WORDINGS = ("What is {}?", "Compute {}.", "Give the value of {}.")
_MULTIPLE_WORDINGS = (
    "What is the least common multiple of {}?",
    "Find the LCM of {}.",
    "Give the smallest positive number that both {} divide.",
)
_BASE_WORDINGS = (
    "Write {}, with lowercase letters.",
    "What is {}, in lowercase?",
    "Express {}; use lowercase letters.",
)

# Bugs that stop a program: a name never set, a module that does not exist, text where a number belongs, a lost bracket.
_MISTAKES: tuple[Callable[[str], str], ...] = (
    lambda program: f"{program.rsplit('print(', 1)[0]}print(reslut)",
    lambda program: f"import mathematics\n{program}",
    lambda program: f'limit = int("ten")\n{program}',
    lambda program: program[:-1],
)


@dataclasses.dataclass(frozen=True)
class _Source:
    """One reasoning-gym data set in one kind: its name there, its options, and our reader of its entries.

    `read` gives (operands, expression in words, program) from an entry's metadata; the expression fills `wordings`.
    """

    name: str
    options: dict[str, int]
    read: Callable[[dict[str, object]], tuple[str, str, str]]
    wordings: tuple[str, ...]


def generate(family: str, kind: str, tool: str, seed: int, is_ours: Callable[[str], bool]) -> Iterator[Task]:
    """An almost endless stream of distinct tasks of one cell; `is_ours` says whether operands belong to the split."""
    import reasoning_gym  # two seconds: paid by the run that builds tasks, not by every import of this file

    rng = random.Random(f"{family}/{kind}/{seed}")
    sources = _sources(family, kind)
    seen: set[str] = set()
    for _ in range(_MAX_ENTRIES // (_CHUNK * len(sources))):
        chunks = [
            reasoning_gym.create_dataset(source.name, seed=rng.getrandbits(48), size=_CHUNK, **source.options)
            for source in sources
        ]
        for index in range(_CHUNK):
            for source, entries in zip(sources, chunks, strict=True):
                entry = entries[index]
                operands, _, _ = source.read(entry["metadata"])
                subject = f"{source.name} {operands}"
                if is_ours(subject) and subject not in seen:
                    seen.add(subject)
                    yield _task(family, kind, tool, source, entry, rng)


def _task(family: str, kind: str, tool: str, source: _Source, entry: dict[str, object], rng: random.Random) -> Task:
    operands, expression, program = source.read(entry["metadata"])
    question = rng.choice(source.wordings).format(expression)
    return Task(
        task_id=f"{family}-{kind}-{hashlib.sha256(question.encode()).hexdigest()[:12]}",
        family=family,
        kind=kind,
        question=question,
        answer=entry["answer"],
        evidence_tool=tool,
        program=program,
        poor_program=rng.choice(_MISTAKES)(program),
        wrong_answer=_perturbed(entry["answer"], rng),
        scorer=source.name,
        metadata={"subject": f"{source.name} {operands}"},
    )


def _read_expression(metadata: dict[str, object]) -> tuple[str, str, str]:
    expression = metadata["expression"]
    return expression, expression, f"print({expression})"


def _read_numbers(metadata: dict[str, object]) -> tuple[str, str, str]:
    first, second = metadata["numbers"]
    operands = " ".join(str(number) for number in sorted((first, second)))
    return operands, f"{first} and {second}", f"import math\n\nprint(math.lcm({first}, {second}))"


def _read_bases(metadata: dict[str, object]) -> tuple[str, str, str]:
    source_base, target_base = metadata["source_base"], metadata["target_base"]
    digits = metadata["source_repr"]
    program = (
        f'value = int("{digits}", {source_base})\n'
        'digits = ""\n'
        "while value:\n"
        f"    value, rest = divmod(value, {target_base})\n"
        '    digits = "0123456789abcdef"[rest] + digits\n'
        "print(digits)"
    )
    expression = f"the base-{source_base} number {digits} in base {target_base}"
    return f"{digits} {source_base} {target_base}", expression, program


def _sources(family: str, kind: str) -> tuple[_Source, ...]:
    """Operands of two digits, or of eight to ten: no number of a small question is as long as those of a large one."""
    is_large = kind == "large"
    digits = {"min_digits": 8, "max_digits": 10} if is_large else {"min_digits": 2, "max_digits": 2}
    values = {"min_value": 10**8, "max_value": 10**10 - 1} if is_large else {"min_value": 10, "max_value": 99}
    choices = {
        "arithmetic": (
            _Source("chain_sum", {"min_terms": 3, "max_terms": 5, **digits}, _read_expression, _SUM_WORDINGS),
            _Source("products", {"min_terms": 2, "max_terms": 2, **digits}, _read_expression, _SUM_WORDINGS),
        ),
        "number_theory": (
            _Source("lcm", {"min_numbers": 2, "max_numbers": 2, **values}, _read_numbers, _MULTIPLE_WORDINGS),
            # Bases from 8 on keep the two digits of the small kind two or three in every base.
            _Source("base_conversion", {"min_base": 8, "max_base": 16, **values}, _read_bases, _BASE_WORDINGS),
        ),
    }
    return choices[family]


def _perturbed(answer: str, rng: random.Random) -> str:
    """Another answer of the same length: one digit changed, to one that every base from 8 on has."""
    places = [place for place, letter in enumerate(answer) if letter != "-"]
    place = rng.choice(places)
    others = [digit for digit in "1234567" if digit != answer[place]]
    return f"{answer[:place]}{rng.choice(others)}{answer[place + 1 :]}"
