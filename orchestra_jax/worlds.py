"""What is particular to an environment, built from a run's config: its tools, tasks and preferences.

A world opens what it needs (a sandbox, servers) on the ExitStack that it is given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os

from orchestra_jax.config import RunConfig
from orchestra_jax.data.corpus import build_documents, load_documents
from orchestra_jax.data.pipeline import DrawInstance, Part
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.questions import build_tasks
from orchestra_jax.data.records import Preference, Task
from orchestra_jax.demonstrations import DemonstratedTurn, question_turn
from orchestra_jax.environments.environment import Environment
from orchestra_jax.environments.question_answering import QuestionAnswering
from orchestra_jax.function_files import build_task_parts, open_domain_folder, split_domain_folder
from orchestra_jax.function_world import (
    DEMONSTRATIONS,
    FIRST_TEST_SEED,
    build_domains,
    build_function_calling,
    build_function_preferences,
    build_function_tasks,
    check_functions,
)
from orchestra_jax.tau2_world import build_tau2_calling, golden_turn, tasks_of_split
from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.sandbox.python_sandbox import PythonSandbox
from orchestra_jax.toolset import build_judge, build_toolbox, load_descriptions


@dataclasses.dataclass(frozen=True)
class World:
    """What is particular to an environment."""

    environment: Environment
    train_tasks: tuple[Task, ...]
    test_tasks: tuple[Task, ...]
    preferences: tuple[Preference, ...]
    demonstrated_turn: DemonstratedTurn  # of the warm start
    train_parts: tuple[Part, ...] = ()  # of files, mixed by weight; if there are any, there are no `train_tasks`


def build_preferences(weights: tuple[float, ...]) -> tuple[Preference, ...]:
    """The five of the default world, or the one that `data.weights` describes in the words of "balanced"."""
    if not weights:
        return tuple(PREFERENCES.values())
    if len(weights) != 3 or not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
        raise ValueError(f"data.weights {weights} must be three weights, 0 or more: outcome, cost_usd, latency_s")
    outcome, cost_usd, latency_s = (weight / sum(weights) for weight in weights)
    named = {"outcome": outcome, "cost_usd": cost_usd, "latency_s": latency_s, "disallowed_calls": 0.0}
    return (dataclasses.replace(PREFERENCES["balanced"], weights=named),)


def _build_questions(config: RunConfig, account: Account, opened: contextlib.ExitStack) -> World:
    documents = load_documents(config.data.corpus_path) if config.data.corpus_path else build_documents()
    descriptions = load_descriptions(config.experts.descriptions_path) if config.experts.descriptions_path else {}
    sandbox = opened.enter_context(PythonSandbox(isolation=config.tools.isolation))
    toolbox = build_toolbox(config, documents, sandbox, account, opened)
    is_compact, judge = config.prompt.rendering == "compact", build_judge(config, account)
    return World(
        QuestionAnswering(toolbox, config.world.max_calls, is_compact, descriptions, judge),
        build_tasks("train", config.data.num_tasks_per_cell, config.data.seed),
        build_tasks("test", config.data.num_test_tasks_per_cell, config.data.seed),
        build_preferences(config.data.weights),
        question_turn,
    )


def _build_functions(config: RunConfig, account: Account, opened: contextlib.ExitStack) -> World:
    settings = config.functions
    check_functions(settings)
    if is_folder := os.path.isdir(settings.domain):
        sandbox = opened.enter_context(PythonSandbox(isolation=config.tools.isolation))
        train = test = open_domain_folder(settings.domain, sandbox)
    else:
        train, test = build_domains(settings, 0), build_domains(settings, FIRST_TEST_SEED)
    preferences, train_parts, train_tasks = build_function_preferences(settings), (), ()
    if settings.task_paths:
        train_parts, test_tasks = build_task_parts(settings, {**train, **test}, DrawInstance(preferences, config.world))
    elif is_folder:
        train_tasks, test_tasks = split_domain_folder(settings.domain)
    else:
        train_tasks = build_function_tasks(settings, train, settings.num_tasks, config.data.seed)
        test_tasks = build_function_tasks(settings, test, settings.num_test_tasks, config.data.seed)
    return World(
        build_function_calling(config, {**train, **test}, account),
        train_tasks,
        test_tasks,
        preferences,
        DEMONSTRATIONS[settings.demonstrations],
        train_parts,
    )


def _build_tau2(config: RunConfig, account: Account, opened: contextlib.ExitStack) -> World:
    environment = build_tau2_calling(config, account)
    opened.callback(environment.close)
    return World(
        environment,
        tasks_of_split(environment, "train"),
        tasks_of_split(environment, "test"),
        build_function_preferences(config.functions),
        golden_turn,
    )


WORLDS = {"question_answering": _build_questions, "functions": _build_functions, "tau2": _build_tau2}
