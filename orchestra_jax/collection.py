"""The groups of one training step: drawn, played and scored, and drawn again where a group says nothing.

A homogeneous group has no gradient (DAPO, arXiv 2503.14476, section 3.2, "dynamic sampling"). With `max_resamples` it
is replaced by a group of a fresh instance, played by the same policy; at most so many rounds, and what is homogeneous
even then is dropped as ever. Infrastructure failures are not replaced: what broke breaks again.

What was replaced is right throughout or wrong throughout: means over the groups that are trained on are no means of the
policy any more. `first_groups` are those, before any was replaced.

Knows neither engine nor data: it is given the three things that it does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from orchestra_jax.data.records import Instance
from orchestra_jax.grpo.filters import FilterReason
from orchestra_jax.grpo.scoring import ScoredGroups
from orchestra_jax.types import TrajectoryGroup


class Collected(NamedTuple):
    instances: list[Instance]
    groups: list[TrajectoryGroup]  # in the order of the instances
    scored: ScoredGroups
    first_groups: list[TrajectoryGroup]  # of the first round alone
    num_resampled: int  # groups that were played in the place of homogeneous ones
    score_s: float


def collect(
    draw: Callable[[], Sequence[Instance]],
    play: Callable[[Sequence[Instance], int], Sequence[TrajectoryGroup]],
    score: Callable[[Sequence[TrajectoryGroup]], ScoredGroups],
    max_resamples: int,
) -> Collected:
    """Plays what `draw` gives, and replaces homogeneous groups up to `max_resamples` times.

    `play` is told the number of the round, for its seed. A fresh draw is a whole batch of instances; those that are
    not needed are passed over.
    """
    instances = list(draw())
    groups, num_resampled, score_s = list(play(instances, 0)), 0, 0.0
    first_groups = list(groups)
    for round_number in range(1, max_resamples + 2):
        start_s = time.monotonic()
        scored = score(groups)
        score_s += time.monotonic() - start_s
        alike = [each.group for each in scored.decisions if each.reason == FilterReason.HOMOGENEOUS]
        if round_number > max_resamples or not alike:
            break
        fresh = list(draw())[: len(alike)]
        for place, instance, group in zip(alike, fresh, play(fresh, round_number)):
            instances[place], groups[place] = instance, group
        num_resampled += len(fresh)
    return Collected(instances, groups, scored, first_groups, num_resampled, score_s)
