"""Preference pairs from templates: a wish drawn for a set of tools, said in words and worked out as a vector.

Words and vector come from the same wish, so that they agree by construction. Works offline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from orchestra_jax.data.preference_pairs.pair import OBJECTIVES, PreferencePair, ToolListing, check_pair
from orchestra_jax.seeds import derive_seed

Wish = tuple[str, dict[str, float], tuple[float, float, float]]  # words, weights by tool, weights of OBJECTIVES
STRENGTHS = {0.3: "if it makes no great difference", 0.6: "preferably", 1.0: "in any case"}


def _outcome(tools: Sequence[ToolListing], rng: np.random.Generator) -> Wish:
    words = _one_of(
        rng, "Take what it takes, but the answer has to be right.", "Nothing matters to me but a right answer."
    )
    return words, {}, (1.0, 0.0, 0.0)


def _cheap(tools: Sequence[ToolListing], rng: np.random.Generator) -> Wish:
    limit = _middle(rng, [tool.usd_per_call for tool in tools])
    weight, how = _strength(rng)
    words = _one_of(
        rng,
        f"Money is short: leave out tools above ${limit:.4g} a call, {how}.",
        f"Stay with what costs ${limit:.4g} a call or less, {how}.",
    )
    return words, {tool.name: weight * (tool.usd_per_call <= limit) for tool in tools}, (0.2, weight, 0.0)


def _fast(tools: Sequence[ToolListing], rng: np.random.Generator) -> Wish:
    limit = _middle(rng, [tool.latency_s for tool in tools])
    weight, how = _strength(rng)
    words = _one_of(
        rng,
        f"I am in a hurry: no tool that takes longer than {limit:.4g} s, {how}.",
        f"Everything you call should be back within {limit:.4g} s, {how}.",
    )
    return words, {tool.name: weight * (tool.latency_s <= limit) for tool in tools}, (0.2, 0.0, weight)


def _local(tools: Sequence[ToolListing], rng: np.random.Generator) -> Wish:
    words = _one_of(
        rng,
        "What I ask about is confidential: use only what runs on our own machines.",
        "None of this may leave our servers, so call no outside service.",
    )
    return words, {tool.name: float(tool.is_local) for tool in tools}, (0.0, 0.0, 0.0)


def _liked(tools: Sequence[ToolListing], rng: np.random.Generator) -> Wish:
    chosen = _some(rng, tools)
    weight, how = _strength(rng)
    words = _one_of(rng, f"Work with {_listed(chosen)}, {how}.", f"I trust {_listed(chosen)}: use that, {how}.")
    return words, {tool.name: weight * (tool.name in chosen) for tool in tools}, (0.4, 0.0, 0.0)


def _avoided(tools: Sequence[ToolListing], rng: np.random.Generator) -> Wish:
    chosen = _some(rng, tools)
    words = _one_of(rng, f"Anything but {_listed(chosen)}, please.", f"Do not call {_listed(chosen)}.")
    return words, {tool.name: float(tool.name not in chosen) for tool in tools}, (0.4, 0.0, 0.0)


def _both(tools: Sequence[ToolListing], rng: np.random.Generator) -> Wish:
    cost = float(rng.choice([0.2, 0.5, 0.8]))
    more = "the bill" if cost > 0.5 else "the wait" if cost < 0.5 else "neither more than the other"
    words = _one_of(
        rng, f"Mind the bill and the wait alike; most of all {more}.", f"Cheap and quick, and {more} first."
    )
    return words, {}, (0.2, cost, 1.0 - cost)


KINDS: dict[str, Callable[[Sequence[ToolListing], np.random.Generator], Wish]] = {
    "outcome": _outcome,
    "cheap": _cheap,
    "fast": _fast,
    "local": _local,
    "liked": _liked,
    "avoided": _avoided,
    "both": _both,
}


def make_pair(tools: Sequence[ToolListing], seed: int, kind: str = "") -> PreferencePair:
    """A pair for these tools; `kind` is one of KINDS, or "" for one that is drawn among those that fit.

    ValueError for fewer than two tools or names that repeat, an unknown kind, and "local" where all or no tools are.
    """
    if len(tools) < 2 or len({tool.name for tool in tools}) < len(tools):
        raise ValueError(f"a preference chooses among two tools of different names at least, got {tools}")
    is_split = len({tool.is_local for tool in tools}) == 2
    fitting = [name for name in KINDS if name != "local" or is_split]
    if kind and kind not in fitting:
        raise ValueError(f"the kind {kind!r} is none of those that fit these tools: {fitting}")
    rng = np.random.default_rng(derive_seed("preference pair", seed, *(tool.name for tool in tools)))
    kind = kind or fitting[int(rng.integers(len(fitting)))]
    text, by_tool, objectives = KINDS[kind](tools, rng)
    weights = {tool.name: by_tool.get(tool.name, 0.0) for tool in tools}
    pair = PreferencePair(kind, text, {**weights, **dict(zip(OBJECTIVES, objectives))})
    told = check_pair(pair, tools)
    assert not told, f"the template {kind!r} made a pair of which {told}"
    return pair


def _one_of(rng: np.random.Generator, *texts: str) -> str:
    return texts[int(rng.integers(len(texts)))]


def _strength(rng: np.random.Generator) -> tuple[float, str]:
    weights = list(STRENGTHS)
    weight = weights[int(rng.integers(len(weights)))]
    return weight, STRENGTHS[weight]


def _middle(rng: np.random.Generator, values: Sequence[float]) -> float:
    """A limit that some tools keep; where values differ, some break it."""
    ordered = sorted(set(values))
    return ordered[int(rng.integers(max(len(ordered) - 1, 1)))]


def _some(rng: np.random.Generator, tools: Sequence[ToolListing]) -> list[str]:
    """Names of one or more tools, but never of all."""
    size = int(rng.integers(1, len(tools)))
    chosen = set(rng.choice(len(tools), size, replace=False).tolist())
    return [tool.name for index, tool in enumerate(tools) if index in chosen]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
