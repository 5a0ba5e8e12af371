"""The world of a run on tau2-bench's tasks: its own training split to train on, its test split held out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import numpy as np
from absl import logging

from orchestra_jax import function_world
from orchestra_jax.config import RunConfig
from orchestra_jax.data.records import Instance
from orchestra_jax.environments.functions.task import FunctionTask
from orchestra_jax.environments.functions.tools import TELL_USER
from orchestra_jax.environments.tau2.tau2_calling import Tau2Calling
from orchestra_jax.tools.budget import Account
from orchestra_jax.toolset import open_store
from orchestra_jax.types import ToolCall


def build_tau2_calling(config: RunConfig, account: Account) -> Tau2Calling:
    """Close it in the end. ValueError for a compact prompt, for what the domain's interpreter cannot serve, and for
    what `build_user` and `build_wrap_and_limits` refuse."""
    if config.prompt.rendering == "compact":
        raise ValueError('environment "tau2" has a policy and schemas to read: set prompt.rendering to "qwen3"')
    settings = config.tau2
    environment = Tau2Calling(
        settings.domain,
        settings.server_python or sys.executable,
        function_world.build_user(config.functions, account, open_store(config)),
        function_world.build_call_settings(config),
        settings.checkout,
        settings.takes_any_version,
        *function_world.build_wrap_and_limits(config),
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
    thought, call = function_world.golden_turn(environment, instance, turn, shown, rng)
    if call.name in {schema["function"]["name"] for schema in environment.user_schemas}:
        call = ToolCall(TELL_USER, {"text": f"Please make {call.name}({json.dumps(call.arguments)}) now."})
    return thought, call
