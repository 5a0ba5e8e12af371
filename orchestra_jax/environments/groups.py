"""The G rollouts of each of several instances, all at once: what one training step or one evaluation plays."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from orchestra_jax.chat import Chat
from orchestra_jax.data.records import Instance
from orchestra_jax.environments.environment import Environment
from orchestra_jax.environments.rollout import RolloutConfig, run_episode
from orchestra_jax.generation.engine import Engine
from orchestra_jax.types import Trajectory, TrajectoryGroup


def run_groups(
    instances: Sequence[Instance],
    group_size: int,
    environment: Environment,
    engine: Engine,
    chat: Chat,
    config: RolloutConfig,
    seed: int,
) -> list[TrajectoryGroup]:
    """Groups in the order of `instances`, rollouts in the order of their index, however the episodes interleave."""

    trajectories: list[Trajectory] = []

    async def play() -> None:
        # Not returned: asyncio.run spells out the result of its coroutine when it puts the signal handler back.
        episodes = (
            run_episode(instance, index, environment, engine, chat, config, seed)
            for instance in instances
            for index in range(group_size)
        )
        trajectories.extend(await asyncio.gather(*episodes))

    asyncio.run(play())
    return [
        TrajectoryGroup(
            instance.instance_id,
            instance.preference.weights,
            tuple(trajectories[number * group_size : (number + 1) * group_size]),
        )
        for number, instance in enumerate(instances)
    ]
