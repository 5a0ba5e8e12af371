"""What learner and rollouts read of a run's config: shapes of micro-batches, settings of scoring and loss."""

from __future__ import annotations

import dataclasses
import math

from orchestra_jax.config import GrpoConfig, RunConfig
from orchestra_jax.grpo.batching import BatchShape
from orchestra_jax.grpo.kl_penalty import KL_IN_REWARD
from orchestra_jax.grpo.packing import PackedShape
from orchestra_jax.grpo.scoring import ScoringSettings
from orchestra_jax.grpo.train_step import LossSettings
from orchestra_jax.rewards.constraints import Budget


def completion_buckets(config: RunConfig) -> tuple[int, ...]:
    """The configured padded lengths, and one that holds the longest episode there can be."""
    return (*config.grpo.completion_buckets, config.episode.max_tokens)


def packed_shape(settings: GrpoConfig) -> PackedShape:
    return PackedShape(settings.rows_per_micro_batch, settings.tokens_per_row, settings.segments_per_row)


def batch_shape(config: RunConfig) -> BatchShape | PackedShape:
    settings = config.grpo
    if settings.batching == "packed":
        return packed_shape(settings)
    return BatchShape(
        settings.groups_per_micro_batch,
        settings.group_size,
        settings.prefix_buckets,
        completion_buckets(config),
        settings.num_shared,
    )


def num_threads(config: RunConfig) -> int:
    """That compute the micro-batches of an update, or play episodes: a mesh is known to one thread alone."""
    return 1 if max(dataclasses.astuple(config.mesh)) > 1 else config.compute.num_threads


def warm_start_shape(config: RunConfig) -> BatchShape:
    settings = config.warm_start
    return BatchShape(
        settings.groups_per_micro_batch,
        settings.group_size,
        config.grpo.prefix_buckets,
        completion_buckets(config),
        config.grpo.num_shared,
    )


def scoring_settings(config: RunConfig) -> ScoringSettings:
    settings = config.grpo
    limits = {"cost_usd": settings.budget_cost_usd, "latency_s": settings.budget_latency_s}
    is_constrained = settings.reward_form == "constrained"
    budgets = tuple(Budget(name, limit) for name, limit in limits.items() if is_constrained and math.isfinite(limit))
    given = {"budgets": budgets, "max_tokens": config.episode.max_tokens}
    names = {field.name for field in dataclasses.fields(ScoringSettings)} - given.keys()
    return ScoringSettings(**given, **{name: getattr(settings, name) for name in names})


def loss_settings(config: RunConfig) -> LossSettings:
    given = {"aggregation_length": config.episode.max_tokens}
    if config.grpo.kl == KL_IN_REWARD:
        given["kl"] = "k2"  # not read: the loss is given no reference
    names = {field.name for field in dataclasses.fields(LossSettings)} - given.keys()
    return LossSettings(**given, **{name: getattr(config.grpo, name) for name in names})
