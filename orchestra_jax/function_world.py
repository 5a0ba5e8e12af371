"""The world of function-calling tasks of a run, built from its config: databases, tasks, user, environment.

Training and held-out tasks live on different databases of the same domain.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from orchestra_jax.config import FunctionsConfig, RunConfig
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.records import Instance, Preference
from orchestra_jax.environments.functions.advisers import SimulatedAdviser
from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.domains.courier import make_courier
from orchestra_jax.environments.functions.domains.courier_tasks import WISHES as COURIER_WISHES
from orchestra_jax.environments.functions.domains.guessing_clerk import guess
from orchestra_jax.environments.functions.domains.library import make_library
from orchestra_jax.environments.functions.domains.library_tasks import SHORT_WISHES
from orchestra_jax.environments.functions.domains.library_tasks import WISHES as LIBRARY_WISHES
from orchestra_jax.environments.functions.domains.wish import generate_tasks
from orchestra_jax.environments.functions.function_calling import FunctionCalling, FunctionSettings
from orchestra_jax.environments.functions.task import FunctionTask
from orchestra_jax.environments.functions.tools import TELL_USER, CallPrice
from orchestra_jax.environments.functions.user import ModelUser, ScriptedUser, User
from orchestra_jax.experts.catalog import EXPERTS
from orchestra_jax.experts.endpoint import EndpointExpert
from orchestra_jax.experts.replay import RecordedExpert
from orchestra_jax.function_files import check_task_paths
from orchestra_jax.tools.budget import Account
from orchestra_jax.tools.faults import FaultyTool
from orchestra_jax.tools.limits import Limits
from orchestra_jax.tools.recording import Store
from orchestra_jax.tools.tool import Tool
from orchestra_jax.toolset import load_limits, open_store
from orchestra_jax.types import ToolCall

DOMAINS = {"library": (make_library, LIBRARY_WISHES), "courier": (make_courier, COURIER_WISHES)}
FIRST_TEST_SEED = 1_000  # of databases: those of training begin with 0


def check_functions(settings: FunctionsConfig) -> None:
    """ValueError for an unknown domain or preference, and numbers that are out of range."""
    if settings.domain not in DOMAINS and not os.path.isdir(settings.domain):
        raise ValueError(
            f"functions.domain {settings.domain!r} is not one of {sorted(DOMAINS)}, and there is no such folder"
        )
    if settings.demonstrations not in DEMONSTRATIONS:
        raise ValueError(f"functions.demonstrations {settings.demonstrations!r} is not one of {sorted(DEMONSTRATIONS)}")
    if settings.demonstrations == "guessed" and not settings.has_short_wishes:
        raise ValueError(
            'functions.demonstrations "guessed" reads short wishes alone: set functions.has_short_wishes, or "golden"'
        )
    check_task_paths(settings)
    if settings.has_short_wishes and settings.domain != "library":
        raise ValueError(f"functions.has_short_wishes is for the library, not for {settings.domain!r}")
    if not 1 <= settings.num_databases < FIRST_TEST_SEED:
        raise ValueError(f"functions.num_databases {settings.num_databases} must lie in 1 to {FIRST_TEST_SEED - 1}")
    if not settings.difficulties or min(settings.difficulties) < 1 or settings.num_spare_calls < 0:
        raise ValueError(
            f"functions.difficulties {settings.difficulties} must be 1 or more each, and functions.num_spare_calls "
            f"{settings.num_spare_calls} 0 or more"
        )


def build_domains(settings: FunctionsConfig, first_seed: int) -> dict[str, Domain]:
    """Domains by name, `num_databases` of them."""
    make = DOMAINS[settings.domain][0]
    sizes = (settings.num_people, settings.num_things, settings.num_places)
    seeds = range(first_seed, first_seed + settings.num_databases)
    return {f"{settings.domain}-{seed}": make(seed, *sizes, name=f"{settings.domain}-{seed}") for seed in seeds}


def build_function_tasks(
    settings: FunctionsConfig, domains: dict[str, Domain], num_tasks: int, seed: int
) -> tuple[FunctionTask, ...]:
    """`num_tasks` tasks, in equal parts on each of the databases."""
    wishes = SHORT_WISHES if settings.has_short_wishes else DOMAINS[settings.domain][1]
    shares = np.bincount(np.arange(num_tasks) % len(domains), minlength=len(domains))
    tasks: list[FunctionTask] = []
    for domain, share in zip(domains.values(), shares):
        tasks += generate_tasks(
            domain, wishes, settings.difficulties, int(share), seed, is_short=settings.has_short_wishes
        )
    return tuple(tasks)


def build_function_preferences(settings: FunctionsConfig) -> tuple[Preference, ...]:
    """ValueError for none, and for one that there is not."""
    if unknown := sorted(set(settings.preferences) - set(PREFERENCES)) or not settings.preferences:
        raise ValueError(f"functions.preferences {unknown or ()} must be some of {sorted(PREFERENCES)}")
    return tuple(PREFERENCES[name] for name in settings.preferences)


def build_user(settings: FunctionsConfig, account: Account, store: Store | None = None) -> User:
    """ValueError for an endpoint with a key and no prices, and for one that costs money under a cap of 0."""
    if not settings.user_endpoint:
        return ScriptedUser()
    prices, key_variable = settings.user_usd_per_million_tokens, settings.user_key_variable
    is_offline = store is not None and store.is_replay  # nobody is asked
    if len(prices) != 2 and (prices or key_variable):
        raise ValueError(
            f"functions.user_usd_per_million_tokens {prices} must be the prices of input and output of the user's "
            "endpoint, which the run's spending cap counts with: (0.0, 0.0) for one that bills nobody"
        )
    input_usd, output_usd = prices or (0.0, 0.0)
    endpoint = EndpointExpert(
        settings.user_endpoint,
        settings.user_model,
        "" if is_offline else key_variable,
        input_usd_per_million_tokens=input_usd,
        output_usd_per_million_tokens=output_usd,
    )
    if endpoint.is_paid and not account.cap_usd and not is_offline:
        raise ValueError("the user's endpoint costs money and experts.spend_cap_usd is 0: set it to what may be spent")
    endpoint.account = account
    return ModelUser(endpoint if store is None else RecordedExpert(endpoint, store))


def build_call_settings(config: RunConfig) -> FunctionSettings:
    return FunctionSettings(
        config.prompt.rendering == "compact",
        config.world.max_calls,
        config.functions.num_spare_calls,
        CallPrice(config.functions.call_cost_usd, config.functions.call_latency_s),
        config.episode.tool_timeout_s,
    )


def build_wrap_and_limits(config: RunConfig) -> tuple[Callable[[Tool], Tool], dict[str, Limits] | None]:
    """What stands between a domain's tools and the toolbox: faults, and limits by name.

    ValueError for what `load_limits` refuses, and for tools that a domain does not take.
    """
    for name in ("index_directory", "web_provider", "mcp_path"):
        if value := getattr(config.tools, name):
            raise ValueError(
                f"tools.{name} {value!r} is without effect with environment {config.environment!r}, whose tools are "
                "the domain's: leave it out"
            )
    limits = load_limits(config.tools.limits_path) if config.tools.limits_path else None
    return (lambda tool: FaultyTool(tool, config.faults)) if config.faults.is_on else (lambda tool: tool), limits


def build_function_calling(config: RunConfig, domains: dict[str, Domain], account: Account) -> FunctionCalling:
    """ValueError for what `build_user` and `build_wrap_and_limits` refuse."""
    settings = config.functions
    skills = {expert.model: settings.adviser_skill for expert in EXPERTS}
    return FunctionCalling(
        domains,
        build_user(settings, account, open_store(config)),
        build_call_settings(config),
        (lambda model: SimulatedAdviser(skills)) if settings.has_experts else None,
        *build_wrap_and_limits(config),
    )


def guessed_turn(
    environment: FunctionCalling, instance: Instance, turn: int, shown: Callable[[], str], rng: np.random.Generator
) -> tuple[str, ToolCall]:
    """A demonstration's thought, which is none, and its call: a clerk's, who guesses what a short wish wants."""
    return "", guess(environment.domains[instance.task.domain], instance, turn, shown, rng)


def golden_turn(
    environment: FunctionCalling, instance: Instance, turn: int, shown: Callable[[], str], rng: np.random.Generator
) -> tuple[str, ToolCall]:
    """The golden calls, then all that is to be said."""
    task = instance.task
    if turn < len(task.gold_calls):
        return "", ToolCall(task.gold_calls[turn].name, task.gold_calls[turn].arguments)
    return "", ToolCall(TELL_USER, {"text": "; ".join(task.communicate_info) or "It is done."})


DEMONSTRATIONS = {"golden": golden_turn, "guessed": guessed_turn}
