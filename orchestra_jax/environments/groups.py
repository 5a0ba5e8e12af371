"""The G rollouts of each of several instances, all at once: what one training step or one evaluation plays.

The episodes go in lockstep: a turn is sampled when all of them wait for one. How long a tool takes to run then decides
nothing about which requests an engine puts into one batch, and with that nothing about the last bits of its numbers:
same seed, same machine, same log-probabilities.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from orchestra_jax.chat import Chat
from orchestra_jax.data.records import Instance
from orchestra_jax.environments.environment import Environment
from orchestra_jax.environments.rollout import RolloutConfig, encode_instance, run_episode
from orchestra_jax.generation.engine import Completion, Engine, Sampling
from orchestra_jax.types import Trajectory, TrajectoryGroup


class Lockstep:
    """Lets `num_running` episodes on to their next turn together, in the order of their numbers. For one event loop."""

    def __init__(self, num_running: int):
        self._num_running = num_running
        self._waiting: dict[int, asyncio.Future] = {}

    async def wait(self, number: int) -> None:
        """Returns when every episode that still runs waits."""
        assert number not in self._waiting, f"episode {number} waits already"
        loop = asyncio.get_running_loop()
        future = self._waiting[number] = loop.create_future()
        loop.call_soon(self._let_go)  # not at once: a future that is done already would let this one go first
        await future

    def leave(self) -> None:
        """Says that an episode has ended; nobody waits for it any more."""
        self._num_running -= 1
        self._let_go()

    def _let_go(self) -> None:
        if len(self._waiting) < self._num_running:
            return
        waiting, self._waiting = self._waiting, {}
        for number in sorted(waiting):
            if not waiting[number].done():  # cancelled, where another episode failed
                waiting[number].set_result(None)


class _Turns:
    """The engine as one episode sees it: a turn begins when the others' do."""

    def __init__(self, engine: Engine, lockstep: Lockstep, number: int):
        self._engine, self._lockstep, self._number = engine, lockstep, number

    async def generate(self, prompt_tokens: Sequence[int], sampling: Sampling, **names: object) -> Completion:
        await self._lockstep.wait(self._number)
        return await self._engine.generate(prompt_tokens, sampling, **names)


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
    prompts = [encode_instance(instance, environment, chat) for instance in instances]

    async def play() -> None:
        # Not returned: asyncio.run spells out the result of its coroutine when it puts the signal handler back.
        lockstep = Lockstep(len(instances) * group_size)

        async def play_one(number: int) -> Trajectory:
            instance, prompt = instances[number // group_size], prompts[number // group_size]
            turns = _Turns(engine, lockstep, number)
            try:
                return await run_episode(instance, number % group_size, environment, turns, chat, config, seed, prompt)
            finally:
                lockstep.leave()

        trajectories.extend(await asyncio.gather(*map(play_one, range(len(instances) * group_size))))

    asyncio.run(play())
    return [
        TrajectoryGroup(
            instance.instance_id,
            instance.preference.weights,
            tuple(trajectories[number * group_size : (number + 1) * group_size]),
        )
        for number, instance in enumerate(instances)
    ]
