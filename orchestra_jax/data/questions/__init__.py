"""Tasks with checkable answers: four families in two kinds, without a download.

    arithmetic     small, large         sums and products from reasoning-gym; the operands' digits say which
    number_theory  small, large         least common multiples and number bases from reasoning-gym
    geography      one_hop, two_hop     facts about countries; two_hop names the country by another of its facts
    chemistry      one_hop, two_hop     facts about elements

Family and kind (a cell) are visible in the wording, and each cell has one tool whose result can be the evidence.
Splits are disjoint in what is asked about, not only in the text: a country, an element or a set of operands belongs to
one split, by a hash of its own name, whatever the seed.
"""

from __future__ import annotations

import functools
import hashlib
import itertools

from orchestra_jax.data.questions import computation, facts
from orchestra_jax.data.records import Task

FAMILIES: dict[str, tuple[str, ...]] = {
    "arithmetic": ("small", "large"),
    "number_theory": ("small", "large"),
    "geography": ("one_hop", "two_hop"),
    "chemistry": ("one_hop", "two_hop"),
}
EVIDENCE_TOOL: dict[str, str] = {
    "arithmetic": "enhance_reasoning",
    "number_theory": "enhance_reasoning",
    "geography": "search",
    "chemistry": "search",
}
_GENERATORS = {
    "arithmetic": computation.generate,
    "number_theory": computation.generate,
    "geography": facts.generate,
    "chemistry": facts.generate,
}
# Of ten equal parts of the hash's range, those below the number that no earlier split took.
_SPLIT_ENDS = {"train": 6, "validation": 8, "test": 10}


def build_tasks(split: str, num_per_cell: int, seed: int) -> tuple[Task, ...]:
    """`num_per_cell` distinct tasks of each family and kind, cell after cell, in an order that `seed` decides.

    split: "train", "validation" or "test". The same arguments give the same tasks on every machine. Raises ValueError
    for an unknown split, or where a cell does not hold that many tasks.
    """
    if split not in _SPLIT_ENDS:
        raise ValueError(f"split must be one of {sorted(_SPLIT_ENDS)}, got {split!r}")
    if num_per_cell < 1:
        raise ValueError(f"num_per_cell must be at least 1, got {num_per_cell}")
    tasks: list[Task] = []
    for family, kinds in FAMILIES.items():
        for kind in kinds:
            is_ours = functools.partial(_is_in_split, split)
            stream = _GENERATORS[family](family, kind, EVIDENCE_TOOL[family], seed, is_ours)
            cell = list(itertools.islice(stream, num_per_cell))
            if len(cell) < num_per_cell:
                raise ValueError(
                    f"num_per_cell={num_per_cell}, but {family}/{kind} has {len(cell)} tasks in the split {split!r}:"
                    f" ask for at most {len(cell)}"
                )
            tasks += cell
    return tuple(tasks)


def _is_in_split(split: str, subject: str) -> bool:
    part = int.from_bytes(hashlib.sha256(subject.encode()).digest()[:8], "big") % 10
    return next(name for name, end in _SPLIT_ENDS.items() if part < end) == split
