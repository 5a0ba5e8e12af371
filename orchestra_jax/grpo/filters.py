"""What never reaches the loss, and why: typed decisions, in one order, each counted by its reason.

    1. infrastructure   the rollout ended for reasons that are not the policy's: it leaves its group
    2. too few valid    fewer than two rollouts are left to compare: the group is dropped
    3. homogeneous      the standard deviation of the raw rewards, on weights that sum to 1, is below `min_std`: dropped
    4. clipped          the advantage is cut to +-clip; the rollout stays
    5. malformed, 6. unanswered     "paper" alone: the rollout leaves the loss
    7. overlong         the token limit ended it: it leaves the loss ("mask"), or pays in its reward ("soft")
    8. stale            its first token is older than `max_policy_lag` versions: it leaves the loss

A rollout that leaves its group enters no statistic; one that leaves the loss has been in the baseline of its group and
is in neither the loss nor its denominator. Without "paper" a malformed call, a missing answer and a spent turn limit
are outcomes of 0 and are trained on: who drops them never teaches the policy to avoid them. docs/filters.md goes
through an example.

Numpy only. Legend: P groups, G rollouts of each.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from orchestra_jax.grpo.advantages import is_homogeneous
from orchestra_jax.types import INFRASTRUCTURE_FAILURES, EpisodeStatus, TrajectoryGroup


class FilterReason(enum.StrEnum):
    INFRASTRUCTURE = "infrastructure"
    TOO_FEW_VALID = "too_few_valid"
    HOMOGENEOUS = "homogeneous"
    CLIPPED = "clipped"
    MALFORMED = "malformed"
    UNANSWERED = "unanswered"
    OVERLONG = "overlong"
    STALE = "stale"


class Effect(enum.StrEnum):
    LEAVES_GROUP = "leaves_group"
    DROPS_GROUP = "drops_group"
    CUTS_ADVANTAGE = "cuts_advantage"
    LOWERS_REWARD = "lowers_reward"
    LEAVES_LOSS = "leaves_loss"


class Decision(NamedTuple):
    """One decision of one filter; `rollout` is None where the whole group is meant."""

    reason: FilterReason
    effect: Effect
    group: int
    rollout: int | None


class RolloutFacts(NamedTuple):
    """What the filters read of each rollout, all [P, G]."""

    is_failed_PG: np.ndarray
    is_malformed_PG: np.ndarray
    is_unanswered_PG: np.ndarray
    is_truncated_PG: np.ndarray
    num_tokens_PG: np.ndarray  # prompt and all turns
    policy_version_PG: np.ndarray  # of the first sampled token, the oldest one; -1 without any


FILTERS = {  # which statuses leave the loss
    "negatives_stay": (),
    "paper": (FilterReason.MALFORMED, FilterReason.UNANSWERED),
}
OVERLONG = ("keep", "mask", "soft")
UNANSWERED_STATUSES = (EpisodeStatus.TURN_LIMIT, EpisodeStatus.TOKEN_LIMIT)


def rollout_facts(groups: Sequence[TrajectoryGroup]) -> RolloutFacts:
    rollouts_PG = [group.trajectories for group in groups]
    status_PG = np.array([[each.status for each in rollouts] for rollouts in rollouts_PG])
    return RolloutFacts(
        np.isin(status_PG, INFRASTRUCTURE_FAILURES),
        status_PG == EpisodeStatus.MALFORMED,
        np.isin(status_PG, UNANSWERED_STATUSES),
        status_PG == EpisodeStatus.TOKEN_LIMIT,
        np.array([[len(each.tokens) for each in rollouts] for rollouts in rollouts_PG]),
        np.array([[_first_version(each) for each in rollouts] for rollouts in rollouts_PG]),
    )


def _first_version(trajectory) -> int:
    """Versions only rise along a trajectory, so the first sampled token has the oldest."""
    if not len(trajectory.loss_mask):
        return -1
    first = int(np.argmax(trajectory.loss_mask))
    return int(trajectory.policy_versions[first]) if trajectory.loss_mask[first] else -1


def group_reasons(
    rewards_PG: np.ndarray, valid_PG: np.ndarray, *, min_std: float, std_ddof: int = 1
) -> list[FilterReason | None]:
    """Why each group is left out of training, or None if it is not. `rewards_PG` are the raw ones."""
    is_alike_P = is_homogeneous(rewards_PG, valid_PG, min_std, std_ddof)
    return [
        FilterReason.TOO_FEW_VALID if num_valid < 2 else FilterReason.HOMOGENEOUS if is_alike else None
        for num_valid, is_alike in zip(valid_PG.sum(axis=1), is_alike_P, strict=True)
    ]


def loss_reasons(
    facts: RolloutFacts, *, filters: str, overlong: str, policy_version: int, max_policy_lag: int
) -> dict[FilterReason, np.ndarray]:
    """Who leaves the loss, [P, G] bool by reason, in the order of the filters.

    ValueError for an unknown `filters` or `overlong`.
    """
    if filters not in FILTERS or overlong not in OVERLONG:
        raise ValueError(
            f"filters {filters!r} must be one of {sorted(FILTERS)}, and overlong {overlong!r} one of {OVERLONG}"
        )
    statuses = {FilterReason.MALFORMED: facts.is_malformed_PG, FilterReason.UNANSWERED: facts.is_unanswered_PG}
    reasons = {reason: statuses[reason] for reason in FILTERS[filters]}
    if overlong == "mask":
        reasons[FilterReason.OVERLONG] = facts.is_truncated_PG
    is_sampled_PG = facts.policy_version_PG >= 0
    reasons[FilterReason.STALE] = is_sampled_PG & (policy_version - facts.policy_version_PG > max_policy_lag)
    return reasons


def overlong_penalty(num_tokens_PG: np.ndarray, *, max_tokens: int, buffer_tokens: int) -> np.ndarray:
    """The soft penalty of DAPO (arXiv 2503.14476, equation 13), in [-1, 0]: it grows over the last `buffer_tokens`.

    By hand, max_tokens 100 and a buffer of 20: 80 tokens cost 0, 90 cost 0.5, 100 cost 1. ValueError for a buffer that
    does not lie in 1 to max_tokens.
    """
    if not 1 <= buffer_tokens <= max_tokens:
        raise ValueError(f"overlong_buffer_tokens {buffer_tokens} must lie between 1 and max_tokens {max_tokens}")
    return -np.clip((num_tokens_PG - (max_tokens - buffer_tokens)) / buffer_tokens, 0.0, 1.0)


def rollout_decisions(reason: FilterReason, effect: Effect, is_meant_PG: np.ndarray) -> list[Decision]:
    return [Decision(reason, effect, int(p), int(g)) for p, g in np.argwhere(is_meant_PG)]
