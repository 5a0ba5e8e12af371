"""What one training step did, as named numbers: the values of metrics.METRICS. Computes; writes nothing.

A rollout that infrastructure ended says nothing about the policy: it counts in `filter/`, `speed/` and the shares of
statuses alone. A value that there is nothing to take a mean of is left out.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence

import numpy as np

from orchestra_jax.data.records import Instance
from orchestra_jax.grpo.scoring import ScoredGroups
from orchestra_jax.rewards.objectives import Objective, objective_vector
from orchestra_jax.rewards.preference import utility
from orchestra_jax.tools.ledger import EXPERIMENT, replay_receipts
from orchestra_jax.types import CallStatus, EpisodeStatus, Reason, Trajectory, TrajectoryGroup

TRUNCATED = (EpisodeStatus.TOKEN_LIMIT, EpisodeStatus.TURN_LIMIT)


def rollout_metrics(
    instances: Sequence[Instance],
    groups: Sequence[TrajectoryGroup],
    scored: ScoredGroups,
    objectives: Sequence[Objective],
    losses: Sequence[Mapping[str, float]],
    seconds: Sequence[float],
    is_on_policy: bool = True,
) -> dict[str, float]:
    """Values by metric name.

    Args:
      instances: of the step.
      groups: their rollouts, in the same order.
      scored: what became of the groups.
      objectives: of every objective vector.
      losses: of each optimizer step; none if no group was kept.
      seconds: of the rollouts, of scoring and packing, until both were there, of the updates.
      is_on_policy: sampler and trainer had the same weights when the updates began.
    """
    rollouts = [each for group in groups for each in group.trajectories]
    return {
        **_scores(instances, groups, scored, objectives),
        **_calls(instances, groups, scored),
        **_budgets(instances, groups, scored),
        **_episodes([each for each, is_valid in zip(rollouts, scored.valid_PG.flat, strict=True) if is_valid]),
        **_bills(rollouts),
        **_statuses(rollouts),
        **_filters(scored, rollouts),
        **_losses(losses, is_on_policy),
        **_speed(rollouts, seconds),
    }


class SamplerGapError(RuntimeError):
    """What samples is not what is trained."""


def check_sampler_gap(mean_gap: float, most: float) -> None:
    """SamplerGapError if the mean gap of a step's first update, where both have the same weights, is beyond `most`."""
    if not mean_gap <= most:
        raise SamplerGapError(
            f"the log-probabilities of sampler and trainer differ by {mean_gap:.3g} nats on average, and "
            f"grpo.max_sampler_gap is {most}: every ratio of the step is wrong by as much. Look whether the engine has "
            "the trainer's weights, dtype and temperature; the last checkpoint is from before this step"
        )


def _losses(losses: Sequence[Mapping[str, float]], is_on_policy: bool) -> dict[str, float]:
    """Means over the optimizer steps of the training step; counts add up, the largest gap is the largest."""
    if not losses:
        return {}
    combine = {"num_tokens": np.sum, "num_rollouts": np.sum, "sampler_gap_max": np.max}
    names = {"loss": "loss/total", "gradient_norm": "optimizer/gradient_norm"}
    gap = {"sampler/gap_mean": float(losses[0]["sampler_gap_mean"])} if is_on_policy else {}
    return gap | {
        names.get(name, f"loss/{name}"): float(combine.get(name, np.mean)([some[name] for some in losses]))
        for name in losses[0]
    }


def _scores(instances, groups, scored: ScoredGroups, objectives) -> dict[str, float]:
    sums = collections.defaultdict(list)
    for number, (instance, group) in enumerate(zip(instances, groups, strict=True)):
        weights_M = objective_vector(group.weights, objectives)
        for g in np.flatnonzero(scored.valid_PG[number]):
            values = group.trajectories[g].objectives
            scores = {
                "reward": scored.rewards_PG[number, g],
                "accuracy": values["outcome"],
                "utility": utility(objective_vector(values, objectives), weights_M, objectives),
            }
            for name, score in scores.items():
                sums[f"score/{name}"].append(score)
                sums[f"score/{name}/{instance.preference.name}"].append(score)
            for objective in objectives:
                sums[f"objective/{objective.name}"].append(values[objective.name])
                sums[f"objective/{instance.preference.name}/{objective.name}"].append(values[objective.name])
    return {name: float(np.mean(numbers)) for name, numbers in sums.items()}


def _calls(instances, groups, scored: ScoredGroups) -> dict[str, float]:
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    num_rollouts: collections.Counter = collections.Counter()
    for instance, group, valid_G in zip(instances, groups, scored.valid_PG, strict=True):
        preference = instance.preference.name
        rollouts = [group.trajectories[g] for g in np.flatnonzero(valid_G)]
        num_rollouts[preference] += len(rollouts)
        for record in (record for each in rollouts for record in each.calls):
            if record.status == CallStatus.OK:
                counts[preference][record.call.name] += 1
                if "model" in record.call.arguments:
                    counts[preference][str(record.call.arguments["model"])] += 1
    return {
        f"calls/{preference}/{name}": count / num_rollouts[preference]
        for preference, counter in counts.items()
        for name, count in counter.items()
    }


def _budgets(instances, groups, scored: ScoredGroups) -> dict[str, float]:
    violated, refused, used = [], [], []
    for instance, group, valid_G in zip(instances, groups, scored.valid_PG, strict=True):
        budget = instance.budget
        if not budget.is_limited:
            continue
        for each in (group.trajectories[g] for g in np.flatnonzero(valid_G)):
            totals = replay_receipts(each.receipts)
            used.append(max(totals.cost_usd / budget.cost_usd, totals.latency_s / budget.latency_s))
            violated.append(totals.cost_usd > budget.cost_usd or totals.latency_s > budget.latency_s)
            refused.append(any(receipt.reason == Reason.OVER_BUDGET for receipt in each.receipts))
    named = {"violation_rate": violated, "refused_share": refused, "used_share": used}
    return {f"budget/{name}": float(np.mean(values)) for name, values in named.items() if values}


def _episodes(rollouts: Sequence[Trajectory]) -> dict[str, float]:
    if not rollouts:
        return {}
    calls = [record for each in rollouts for record in each.calls]
    sampled = np.concatenate([each.logprobs[each.loss_mask] for each in rollouts])
    receipts = [receipt for each in rollouts for receipt in each.receipts if receipt.tool not in EXPERIMENT]
    reasons = collections.Counter(receipt.reason for receipt in receipts if receipt.reason)
    return {
        "calls/per_rollout": len(calls) / len(rollouts),
        "calls/refused_share": sum(record.status == CallStatus.REFUSED for record in calls) / max(len(calls), 1),
        **{f"calls/reason/{reason}": count / max(len(calls), 1) for reason, count in reasons.items()},
        "episode/completion_tokens": float(np.mean([each.num_completion_tokens for each in rollouts])),
        "episode/prompt_tokens": float(np.mean([each.num_prompt_tokens for each in rollouts])),
        "episode/truncated_share": sum(each.status in TRUNCATED for each in rollouts) / len(rollouts),
        **({"sampler/logprob_mean": float(sampled.mean())} if len(sampled) else {}),
    }


def _bills(rollouts: Sequence[Trajectory]) -> dict[str, float]:
    receipts = [receipt for each in rollouts for receipt in each.receipts]
    paid = {tool: [receipt.cost_usd for receipt in receipts if receipt.tool == tool] for tool in EXPERIMENT}
    return {f"spend/{tool}_usd": math.fsum(costs) for tool, costs in paid.items() if costs}


def _statuses(rollouts: Sequence[Trajectory]) -> dict[str, float]:
    counts = collections.Counter(each.status for each in rollouts)
    return {f"episode/status/{status}": count / len(rollouts) for status, count in counts.items()}


def _filters(scored: ScoredGroups, rollouts) -> dict[str, float]:
    num_groups = len(scored.rewards_PG)
    completion_mask = np.concatenate([each.loss_mask[each.num_prompt_tokens :] for each in rollouts])
    values = {
        "filter/kept_groups_share": len(scored.kept) / num_groups,
        "filter/failed_share": float(1 - scored.valid_PG.mean()),
        "filter/masked_tokens_share": float(1 - completion_mask.mean()) if len(completion_mask) else 0.0,
        **{f"filter/reason/{reason}": count / num_groups for reason, count in scored.dropped.items()},
    }
    of_rollouts = collections.Counter(
        (each.effect, each.reason) for each in scored.decisions if each.rollout is not None
    )
    for (effect, reason), count in of_rollouts.items():
        values[f"filter/rollouts/{effect}/{reason}"] = count / len(rollouts)
    if scored.kept:
        values["advantage/std"] = float(scored.advantages_KG.std())
        values["advantage/clipped_share"] = float(scored.is_clipped_KG.mean())
    return values


def _speed(rollouts, seconds) -> dict[str, float]:
    rollout_s, batch_s, waited_s, train_s = (float(each) for each in seconds)
    step_s = waited_s + train_s
    num_sampled = sum(int(each.loss_mask.sum()) for each in rollouts)
    return {
        "speed/rollout_s": rollout_s,
        "speed/batch_s": batch_s,
        "speed/waited_s": waited_s,
        "speed/train_s": train_s,
        "speed/step_s": step_s,
        "speed/rollouts_per_s": len(rollouts) / step_s,
        "speed/trained_tokens_per_s": num_sampled / step_s,
        "sampler/tokens_per_s": num_sampled / rollout_s,
    }
