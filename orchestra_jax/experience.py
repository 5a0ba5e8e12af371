"""The experience of one step: rollouts, their scores, the micro-batches of its updates, the reference's view of them.

Nothing here depends on the policy that is updated, but for the weights in the engine: it can be made beside the update
of the step before (sampler.py).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from orchestra_jax.collection import Collected, collect
from orchestra_jax.components import Components
from orchestra_jax.config import GrpoConfig, RunConfig
from orchestra_jax.data.records import Instance
from orchestra_jax.environments.groups import run_groups
from orchestra_jax.generation.engine import Engine
from orchestra_jax.grpo.batching import BatchShape, MicroBatch, make_micro_batches
from orchestra_jax.grpo.kl_penalty import KL_IN_REWARD, reference_kl
from orchestra_jax.grpo.packing import PackedBatch, PackedShape, make_packed_batches
from orchestra_jax.grpo.scoring import ScoredGroups, score_groups
from orchestra_jax.grpo.train_step import batch_logprobs
from orchestra_jax.policy import on_mesh, run_mesh
from orchestra_jax.seeds import derive_seed
from orchestra_jax.settings import batch_shape, packed_shape, scoring_settings
from orchestra_jax.types import TrajectoryGroup

Batch = MicroBatch | PackedBatch


class Experience(NamedTuple):
    collected: Collected
    updates: list[list[Batch]]  # an optimizer step for each, of so many micro-batches
    reference_logprobs: list[list[jax.Array] | None]  # of each update's micro-batches; None: the update computes them
    seconds: tuple[float, float]  # of the rollouts; of scores, micro-batches and the reference


def make_experience(
    config: RunConfig,
    parts: Components,
    engine: Engine,
    draw: Callable[[], Sequence[Instance]],
    reference_params,
    step: int,
    multipliers: Mapping[str, float],
) -> Experience:
    """What `step` trains on, sampled by the weights in `engine`; `draw` gives its instances."""
    start_s = time.monotonic()
    collected = collect(
        draw,
        functools.partial(play, config, parts, engine, step),
        functools.partial(score, config, parts, reference_params, step, multipliers),
        config.grpo.max_resamples,
    )
    played_s = time.monotonic() - start_s - collected.score_s
    seed = derive_seed(config.seed, "split", step)
    updates = split_into_updates(collected.groups, collected.scored, config.grpo, batch_shape(config), seed)
    logprobs = [None] * len(updates)
    if config.grpo.rollout_lag and loss_kl_coefficient(config.grpo, step) and run_mesh(config) is None:
        settings = {"config": parts.model_config, "chunk": config.grpo.logprob_chunk}
        temperature = parts.rollout.temperature
        logprobs = [
            [batch_logprobs(reference_params, batch, temperature, **settings) for batch in batches]
            for batches in updates
        ]
        jax.block_until_ready(logprobs)
    return Experience(collected, updates, logprobs, (played_s, time.monotonic() - start_s - played_s))


def play(config: RunConfig, parts: Components, engine: Engine, step: int, instances, round_number: int):
    """The groups of `instances`; round 0 is a step's first, later ones resample."""
    rounds = (round_number,) if round_number else ()
    seed = derive_seed(config.seed, "rollout", step, *rounds)
    return run_groups(instances, config.grpo.group_size, parts.environment, engine, parts.chat, parts.rollout, seed)


def score(
    config: RunConfig,
    parts: Components,
    reference_params,
    step: int,
    multipliers: Mapping[str, float],
    groups: list[TrajectoryGroup],
) -> ScoredGroups:
    settings, penalty_PG = config.grpo, 0.0
    coefficient = kl_coefficient(settings, step)
    if settings.kl == KL_IN_REWARD and coefficient:
        with on_mesh(config):
            nats_PG = reference_kl(
                groups, reference_params, parts.rollout.temperature,
                config=parts.model_config, chunk=settings.logprob_chunk, shape=packed_shape(settings),
            )  # fmt: skip
        penalty_PG = coefficient * nats_PG
    return score_groups(
        groups, parts.objectives, scoring_settings(config),
        policy_version=step, multipliers=multipliers, kl_penalty_PG=penalty_PG,
    )  # fmt: skip


def split_into_updates(
    groups: list[TrajectoryGroup],
    scored: ScoredGroups,
    settings: GrpoConfig,
    shape: BatchShape | PackedShape,
    seed: int,
) -> list[list[MicroBatch | PackedBatch]]:
    """Deals the kept groups out at random to updates of equal size, give or take one, each a list of micro-batches.

    There are as many updates as if all groups had been kept, so that the rate falls over a run as configured, however
    many the filter drops; fewer only where that would leave one without a group.
    Later updates of a step are slightly off-policy; the truncated importance correction (old over sampler) is what
    accounts for it. More, smaller optimizer steps on the same rollouts learn much faster here (docs/log.md).
    """
    # A group whose rollouts have all left the loss makes no update: its gradient is 0, and the momentum would step.
    numbers = [k for k, group in enumerate(scored.kept) if scored.trained_PG[group].any()]
    if not numbers:
        return []
    shuffled = np.array(numbers)[np.random.default_rng(seed).permutation(len(numbers))]
    kept = np.array(scored.kept)
    make_batches = make_packed_batches if isinstance(shape, PackedShape) else make_micro_batches
    return [
        make_batches(
            [groups[number] for number in kept[part]],
            scored.advantages_KG[part],
            scored.trained_PG[kept[part]],
            shape,
        )
        for part in np.array_split(shuffled, min(len(numbers), updates_per_step(settings)))
    ]


def updates_per_step(settings: GrpoConfig) -> int:
    """Into how many updates a step's groups are dealt out."""
    return -(-settings.num_groups // settings.groups_per_update)


def kl_coefficient(settings: GrpoConfig, step: int) -> float:
    """Falls linearly from the first to the final one: explore near the warm start first, then commit."""
    share = step / max(settings.num_steps - 1, 1)
    return settings.kl_coefficient + (settings.final_kl_coefficient - settings.kl_coefficient) * share


def loss_kl_coefficient(settings: GrpoConfig, step: int) -> float:
    """Of the loss's own KL term: 0 where the reward has it."""
    return 0.0 if settings.kl == KL_IN_REWARD else kl_coefficient(settings, step)
