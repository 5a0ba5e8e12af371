"""From groups of trajectories to advantages: objective vectors, rewards, filters, each in its place. Numpy only.

    1. a rollout that infrastructure ended leaves its group before any statistic                (grpo/filters.py)
    2. raw rewards of the valid ones                                                       (rewards/preference.py)
    3. groups with too few valid rollouts, or with raw rewards that hardly differ, are dropped
    4. what shapes the reward without being part of it: the soft length penalty, the KL penalty
    5. advantages of what is left, component by component, clipped                             (grpo/advantages.py)
    6. rollouts that leave the loss: malformed or unanswered ("paper"), overlong, stale

Legend: P groups, G rollouts of each, M objectives, C components of a reward, K kept groups.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from orchestra_jax.grpo.advantages import clip_advantages, raw_advantages
from orchestra_jax.grpo.filters import (
    Decision,
    Effect,
    FilterReason,
    RolloutFacts,
    group_reasons,
    loss_reasons,
    overlong_penalty,
    rollout_decisions,
    rollout_facts,
)
from orchestra_jax.rewards.constraints import Budget
from orchestra_jax.rewards.objectives import Objective, objective_vector
from orchestra_jax.rewards.preference import Rewards, reward_components
from orchestra_jax.types import INFRASTRUCTURE_FAILURES, TrajectoryGroup


@dataclasses.dataclass(frozen=True)
class ScoringSettings:
    """How rollouts become advantages; the choices are keys of the dicts named behind them."""

    range_rule: str = "reference"  # rewards.normalization.RANGE_RULES
    reward_form: str = "gated_sum"  # rewards.preference.FORMS
    budgets: tuple[Budget, ...] = ()  # of "constrained"
    advantage: str = "grpo"  # grpo.advantages.ADVANTAGES
    std_ddof: int = 1
    std_epsilon: float = 1e-6
    std_floor: float = 0.0
    min_group_std: float = 0.1
    advantage_clip: float = 3.0
    filters: str = "negatives_stay"  # grpo.filters.FILTERS
    overlong: str = "keep"  # grpo.filters.OVERLONG
    overlong_buffer_tokens: int = 32
    max_tokens: int = 0  # of an episode; read by overlong "soft"
    max_policy_lag: int = 4


@dataclasses.dataclass(frozen=True)
class ScoredGroups:
    rewards_PG: np.ndarray  # raw: neither length nor KL penalty
    valid_PG: np.ndarray  # rollouts that say something about the policy
    trained_PG: np.ndarray  # valid ones that no filter takes out of the loss; of dropped groups too
    kept: tuple[int, ...]  # numbers of the groups that are trained on
    advantages_KG: np.ndarray
    is_clipped_KG: np.ndarray
    dropped: dict[FilterReason, int]  # groups by reason
    decisions: tuple[Decision, ...]  # every decision of every filter, in their order


def score_groups(
    groups: Sequence[TrajectoryGroup],
    objectives: Sequence[Objective],
    settings: ScoringSettings,
    *,
    policy_version: int = 0,
    multipliers: Mapping[str, float] | None = None,
    kl_penalty_PG: np.ndarray | float = 0.0,
) -> ScoredGroups:
    """Rewards and advantages of the groups of one step.

    Args:
      groups: all of one size.
      objectives: of every objective vector; every weight of a group's preference belongs to one of them.
      settings: the choices.
      policy_version: the version of the policy that is about to be updated.
      multipliers: the Lagrange multipliers of the budgets.
      kl_penalty_PG: subtracted from the rewards behind the filters (loss_kl "k1_reward").

    Raises:
      ValueError: names task, trajectory and value of what is wrong with a group (`check_group`), or a setting.
    """
    for group in groups:
        check_group(group, objectives)
    vectors_PGM = np.array(
        [[objective_vector(each.objectives, objectives) for each in group.trajectories] for group in groups]
    )
    weights_PM = np.array([objective_vector(group.weights, objectives) for group in groups])
    facts = rollout_facts(groups)
    return score_vectors(
        vectors_PGM, weights_PM, facts, objectives, settings,
        policy_version=policy_version, multipliers=multipliers, kl_penalty_PG=kl_penalty_PG,
    )  # fmt: skip


def score_vectors(
    vectors_PGM: np.ndarray,
    weights_PM: np.ndarray,
    facts: RolloutFacts,
    objectives: Sequence[Objective],
    settings: ScoringSettings,
    *,
    policy_version: int = 0,
    multipliers: Mapping[str, float] | None = None,
    kl_penalty_PG: np.ndarray | float = 0.0,
) -> ScoredGroups:
    """`score_groups` on arrays: the arithmetic, without the check."""
    valid_PG = ~facts.is_failed_PG
    decisions = rollout_decisions(FilterReason.INFRASTRUCTURE, Effect.LEAVES_GROUP, facts.is_failed_PG)
    rewards = reward_components(
        vectors_PGM, weights_PM, objectives, valid_PG,
        settings.range_rule, settings.reward_form, settings.budgets, multipliers,
    )  # fmt: skip
    reasons = group_reasons(rewards.rewards_G, valid_PG, min_std=settings.min_group_std, std_ddof=settings.std_ddof)
    for reason in (FilterReason.TOO_FEW_VALID, FilterReason.HOMOGENEOUS):
        decisions += [Decision(reason, Effect.DROPS_GROUP, p, None) for p, each in enumerate(reasons) if each == reason]
    kept = tuple(number for number, reason in enumerate(reasons) if reason is None)
    shaping_PG, is_penalised_PG = _shaping(facts, settings, kl_penalty_PG)
    decisions += rollout_decisions(FilterReason.OVERLONG, Effect.LOWERS_REWARD, is_penalised_PG & valid_PG)
    raw_KG = _advantages(rewards, valid_PG, shaping_PG, list(kept), settings)
    advantages = clip_advantages(raw_KG, settings.advantage_clip)
    decisions += [
        Decision(FilterReason.CLIPPED, Effect.CUTS_ADVANTAGE, kept[k], int(g))
        for k, g in np.argwhere(advantages.is_clipped_G)
    ]
    trained_PG = valid_PG
    leaving = loss_reasons(
        facts, filters=settings.filters, overlong=settings.overlong,
        policy_version=policy_version, max_policy_lag=settings.max_policy_lag,
    )  # fmt: skip
    for reason, is_leaving_PG in leaving.items():
        decisions += rollout_decisions(reason, Effect.LEAVES_LOSS, is_leaving_PG & trained_PG)
        trained_PG = trained_PG & ~is_leaving_PG
    return ScoredGroups(
        rewards.rewards_G,
        valid_PG,
        trained_PG,
        kept,
        advantages.advantages_G,
        advantages.is_clipped_G,
        dict(collections.Counter(reason for reason in reasons if reason is not None)),
        tuple(decisions),
    )


def _shaping(facts: RolloutFacts, settings: ScoringSettings, kl_penalty_PG):
    """What is added to the rewards behind the filters, [P, G], and who pays for length."""
    length_PG = np.zeros(facts.num_tokens_PG.shape)
    if settings.overlong == "soft":
        length_PG = overlong_penalty(
            facts.num_tokens_PG, max_tokens=settings.max_tokens, buffer_tokens=settings.overlong_buffer_tokens
        )
    return length_PG - kl_penalty_PG, length_PG < 0


def _advantages(rewards: Rewards, valid_PG, shaping_PG, kept: list[int], settings: ScoringSettings) -> np.ndarray:
    """[K, G]: the weighted sum of each component's advantages; there is one component but in "per_objective"."""
    num_components = rewards.components_GC.shape[-1]
    if num_components > 1 and np.any(shaping_PG):
        raise ValueError(
            f"reward form {settings.reward_form!r} has no one reward that a length or KL penalty could be taken from: "
            "set overlong to keep or mask and loss_kl to k2 or k3"
        )
    advantages_KG = np.zeros((len(kept), valid_PG.shape[1]))
    for c in range(num_components):
        component_KG = (rewards.components_GC[..., c] + shaping_PG)[kept]
        advantages_KG += rewards.weights_C[kept, c, None] * raw_advantages(
            component_KG, valid_PG[kept], settings.advantage,
            std_ddof=settings.std_ddof, epsilon=settings.std_epsilon, std_floor=settings.std_floor,
        )  # fmt: skip
    return advantages_KG


def check_group(group: TrajectoryGroup, objectives: Sequence[Objective]) -> None:
    """ValueError for a group of one, a weight of no objective or outside its range, or a log-probability that is none.

    Weights of gated objectives lie in [0, 1] (ToolOrchestra, section 3.2), those of constraints are 0 or more.
    """
    name, rollouts = group.instance_id, group.trajectories
    if len(rollouts) < 2:
        raise ValueError(
            f"the group of task {name} has {len(rollouts)} trajectory {[each.rollout_index for each in rollouts]}: "
            "an advantage compares two at least, raise grpo.group_size"
        )
    known = {objective.name: objective for objective in objectives}
    for objective, weight in group.weights.items():
        if objective not in known:
            raise ValueError(
                f"the preference of task {name} (trajectories 0 to {len(rollouts) - 1}) has the weight {weight} for "
                f"{objective!r}, which is no objective: there are {sorted(known)}"
            )
        limit = 1.0 if known[objective].is_gated else math.inf
        if not 0.0 <= weight <= limit or math.isinf(weight):
            raise ValueError(
                f"the preference of task {name} (trajectories 0 to {len(rollouts) - 1}) has the weight {weight} for "
                f"{objective!r}: it must lie in [0, {limit:g}]; what is better is said by the objective's direction"
            )
    for trajectory in rollouts:
        _check_logprobs(name, trajectory)


def _check_logprobs(name: str, trajectory) -> None:
    if trajectory.status in INFRASTRUCTURE_FAILURES or np.isfinite(trajectory.logprobs.sum(dtype=np.float64)):
        return  # the sum: one pass where all is well
    for position in np.flatnonzero(~np.isfinite(trajectory.logprobs) & trajectory.loss_mask):
        raise ValueError(
            f"task {name}, trajectory {trajectory.rollout_index}: the log-probability of sampled token {position} is "
            f"{trajectory.logprobs[position]}; look at the sampler, a rollout that failed must say so by its status"
        )
