"""Demonstrations for the warm start: real episodes, their route drawn without a look at question, price or preference.

At each turn a tool uniformly, then an expert on offer uniformly; the last call that is allowed is `answer`. This is the
random policy of evaluation/oracle.py. The first turn opens with a thought that restates the prompt and recommends
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from orchestra_jax import chat as chat_format
from orchestra_jax.chat import Chat
from orchestra_jax.data.records import Instance
from orchestra_jax.environments.environment import Environment
from orchestra_jax.environments.groups import run_groups
from orchestra_jax.environments.question_answering import restate
from orchestra_jax.environments.rollout import RolloutConfig
from orchestra_jax.experts.catalog import ROLES
from orchestra_jax.generation.scripted_engine import ScriptedEngine
from orchestra_jax.seeds import derive_seed
from orchestra_jax.types import ToolCall, TrajectoryGroup

Shown = Callable[[], str]
DemonstratedTurn = Callable[[Environment, Instance, int, Shown, np.random.Generator], tuple[str, ToolCall]]


def random_turn(instance: Instance, turn: int, max_calls: int, rng: np.random.Generator) -> ToolCall:
    """The call of one turn of a random route."""
    tool = "answer" if turn + 1 == max_calls else ROLES[int(rng.integers(len(ROLES)))]
    offers = [offer for offer in instance.offers if tool in offer.roles]
    offer = offers[int(rng.integers(len(offers)))]
    return ToolCall(tool, {"model": offer.alias})


def question_turn(
    environment: Environment, instance: Instance, turn: int, shown: Shown, rng: np.random.Generator
) -> tuple[str, ToolCall]:
    """The thought and the call of one turn of a question's demonstration."""
    call = random_turn(instance, turn, environment.max_calls, rng)
    return restate(instance) if turn == 0 else "", call


def demonstrate(
    instances: Sequence[Instance],
    group_size: int,
    environment: Environment,
    chat: Chat,
    config: RolloutConfig,
    seed: int,
    demonstrated_turn: DemonstratedTurn = question_turn,
) -> list[TrajectoryGroup]:
    """`group_size` demonstrations of each instance, played through the environment's tools.

    `demonstrated_turn` is told environment, instance, number of the turn, and how to get the context
    as text.
    """
    by_session = {
        f"{instance.instance_id}#{index}": (
            instance,
            np.random.default_rng(derive_seed(seed, instance.instance_id, index)),
        )
        for instance in instances
        for index in range(group_size)
    }

    def script(session_id: str, turn: int, prompt_tokens: Sequence[int]) -> list[int]:
        instance, rng = by_session[session_id]

        def shown() -> str:
            return chat_format.decode(chat, prompt_tokens)

        thought, call = demonstrated_turn(environment, instance, turn, shown, rng)
        return chat_format.encode_turn(chat, thought, [call])

    return run_groups(instances, group_size, environment, ScriptedEngine(script), chat, config, seed)
