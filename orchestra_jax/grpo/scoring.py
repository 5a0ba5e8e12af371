"""From groups of trajectories to advantages: objective vectors, rewards, filters, each group by itself. Numpy only.

    1. a rollout that infrastructure ended is not valid: it leaves the group before any statistic
    2. rewards of the valid ones (rewards/preference.py)
    3. a group with too few valid rollouts, or with rewards that hardly differ, is dropped (grpo/advantages.py)
    4. advantages of what is left

Legend: P groups, G rollouts of each, M objectives, K kept groups.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from orchestra_jax.grpo.advantages import FilterReason, filter_group, group_advantages
from orchestra_jax.rewards.preference import Objective, objective_vector, preference_reward
from orchestra_jax.types import EpisodeStatus, TrajectoryGroup


@dataclasses.dataclass(frozen=True)
class ScoredGroups:
    rewards_PG: np.ndarray
    valid_PG: np.ndarray
    kept: tuple[int, ...]  # numbers of the groups that are trained on
    advantages_KG: np.ndarray
    is_clipped_KG: np.ndarray
    dropped: dict[FilterReason, int]


def score_groups(
    groups: Sequence[TrajectoryGroup],
    objectives: Sequence[Objective],
    *,
    range_rule: str,
    divide_by_std: bool,
    min_group_std: float,
    advantage_clip: float,
) -> ScoredGroups:
    """Rewards and advantages of the groups of one step."""
    valid_PG = np.array(
        [[each.status != EpisodeStatus.TOOL_FAILURE for each in group.trajectories] for group in groups]
    )
    rewards_PG = np.stack(
        [
            preference_reward(
                np.stack([objective_vector(each.objectives, objectives) for each in group.trajectories]),
                objective_vector(group.weights, objectives),
                objectives,
                valid_G,
                range_rule,
            )
            for group, valid_G in zip(groups, valid_PG, strict=True)
        ]
    )
    reasons = [
        filter_group(rewards_G, valid_G, min_std=min_group_std)
        for rewards_G, valid_G in zip(rewards_PG, valid_PG, strict=True)
    ]
    kept = tuple(number for number, reason in enumerate(reasons) if reason is None)
    advantages = group_advantages(
        rewards_PG[list(kept)], valid_PG[list(kept)], divide_by_std=divide_by_std, clip=advantage_clip
    )
    return ScoredGroups(
        rewards_PG,
        valid_PG,
        kept,
        advantages.advantages_G,
        advantages.is_clipped_G,
        dict(collections.Counter(reason for reason in reasons if reason is not None)),
    )
