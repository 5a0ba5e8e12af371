"""The world of a run on tau2-bench's tasks: its own training split to train on, its test split held out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import numpy as np
from absl import logging

from orchestra_jax.config import RunConfig
from orchestra_jax.data.records import Instance
from orchestra_jax.environments.functions.function_calling import FunctionSettings
from orchestra_jax.environments.functions.task import FunctionTask
from orchestra_jax.environments.functions.tools import TELL_USER, CallPrice
from orchestra_jax.environments.tau2.tau2_calling import Tau2Calling
from orchestra_jax.function_world import build_user
from orchestra_jax.tools.budget import Account
from orchestra_jax.types import ToolCall


def build_tau2_calling(config: RunConfig, account: Account) -> Tau2Calling:
    """Close it in the end. ValueError for a compact prompt, and for what the domain's interpreter cannot serve."""
    if config.prompt.rendering == "compact":
        raise ValueError('environment "tau2" has a policy and schemas to read: set prompt.rendering to "qwen3"')
    settings, functions = config.tau2, config.functions
    price = CallPrice(functions.call_cost_usd, functions.call_latency_s)
    environment = Tau2Calling(
        settings.domain,
        settings.server_python or sys.executable,
        build_user(functions, account),
        FunctionSettings(False, config.world.max_calls, price=price, tool_timeout_s=config.episode.tool_timeout_s),
        settings.checkout,
        settings.takes_any_version,
    )
    logging.info("%s: %s %s, data %s", settings.domain, environment.source, environment.version, environment.digest)
    if environment.judged_task_ids:
        logging.warning("%d tasks whose reward needs a judge are left out", len(environment.judged_task_ids))
    return environment


def tasks_of_split(environment: Tau2Calling, split: str) -> tuple[FunctionTask, ...]:
    """The playable tasks of a split. ValueError where there are none."""
    ids = set(environment.splits.get(split, ()))
    tasks = tuple(task for task in environment.tasks if task.task_id in ids)
    if not tasks:
        raise ValueError(
            f"{environment.source} {environment.version} has no tasks in a split {split!r}, its splits are "
            f"{sorted(environment.splits)}: take release 1.0.0 or a later one"
        )
    return tasks


def golden_turn(
    environment: Tau2Calling, instance: Instance, turn: int, shown: Callable[[], str], rng: np.random.Generator
) -> tuple[str, ToolCall]:
    """A demonstration: the golden calls, those of the user's functions as what the user is asked for, then all that is
    to be said. It is for the scripted user, who does what is spelled."""
    task = instance.task
    if turn == len(task.gold_calls):
        return "", ToolCall(TELL_USER, {"text": "; ".join(task.communicate_info) or "It is done."})
    call = task.gold_calls[turn]
    if call.name in {schema["function"]["name"] for schema in environment.user_schemas}:
        return "", ToolCall(TELL_USER, {"text": f"Please make {call.name}({json.dumps(call.arguments)}) now."})
    return "", ToolCall(call.name, call.arguments)
