"""A preference pair: what a user wants, in words for the policy and as a vector for the reward.

Source: ToolOrchestra section 3.3 and appendix F. The vector has one weight in [0, 1] for each tool, then those of
outcome, cost and latency. A pair belongs to the tools and prices that it was made for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from orchestra_jax.data.records import Preference
from orchestra_jax.seeds import derive_seed

OBJECTIVES = ("outcome", "cost_usd", "latency_s")
MAX_CHARS = 600


@dataclasses.dataclass(frozen=True)
class ToolListing:
    """A tool as its user knows it. `usd_per_call` and `latency_s` are those of an average call."""

    name: str
    usd_per_call: float
    latency_s: float
    is_local: bool


@dataclasses.dataclass(frozen=True)
class PreferencePair:
    """`weights` are by tool name, then by OBJECTIVES. `kind` says what sort of wish it is."""

    kind: str
    text: str
    weights: dict[str, float]


def check_pair(pair: PreferencePair, tools: Sequence[ToolListing]) -> str:
    """Why a pair is none for these tools, in one sentence; empty if it is one."""
    names = {tool.name for tool in tools}
    wanted = [*(tool.name for tool in tools), *OBJECTIVES]
    if not 1 <= len(pair.text.strip()) <= MAX_CHARS:
        return f"the words have {len(pair.text.strip())} characters: they must have 1 to {MAX_CHARS}"
    if missing := sorted(set(wanted) - set(pair.weights)):
        return f"there is no weight for {missing[0]!r}"
    if unknown := sorted(set(pair.weights) - set(wanted)):
        return f"the weight for {unknown[0]!r} belongs to no tool on offer"
    for name, weight in pair.weights.items():
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not math.isfinite(weight) or not 0 <= weight <= 1:
            return f"the weight for {name!r} is {weight!r}: it must lie in 0 to 1"
    if not any(pair.weights.values()):
        return "all weights are 0: nothing is wanted"
    if len({pair.weights[name] for name in wanted}) == 1:
        return "all weights are equal: nothing is preferred"
    if not names:
        return "there is no tool that could be preferred"
    return ""


def split_pairs(
    pairs: Iterable[PreferencePair], test_share: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Train and test, without repeats. The words decide the side: a pair stays where it is when others are added.

    ValueError for a share outside 0 to 1.
    """
    if not 0 <= test_share <= 1:
        raise ValueError(f"test_share {test_share} must lie in 0 to 1")
    sides: tuple[dict[str, PreferencePair], dict[str, PreferencePair]] = ({}, {})
    for pair in pairs:
        words = " ".join(pair.text.lower().split())
        is_test = derive_seed(seed, "split", words) / 2**63 < test_share
        sides[is_test].setdefault(f"{words} {sorted(pair.weights.items())}", pair)
    return list(sides[0].values()), list(sides[1].values())


def as_preference(pair: PreferencePair, name: str) -> Preference:
    """For an instance and its reward: a tool's weight is that of the objective "calls/TOOL"."""
    weights = {key if key in OBJECTIVES else f"calls/{key}": float(weight) for key, weight in pair.weights.items()}
    return Preference(name, pair.text, weights)
