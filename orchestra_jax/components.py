"""The parts of a run, built once from its config: chat, tasks, tools, environment, model shape."""

from __future__ import annotations

import dataclasses

from orchestra_jax.chat import Chat, load_chat
from orchestra_jax.config import RunConfig
from orchestra_jax.data.corpus import build_documents, load_documents
from orchestra_jax.data.questions import build_tasks
from orchestra_jax.data.preferences import PREFERENCES
from orchestra_jax.data.records import Preference, Task
from orchestra_jax.environments.question_answering import QuestionAnswering, reference_objectives
from orchestra_jax.environments.rollout import RolloutConfig
from orchestra_jax.experts.delegation import Answer, EnhanceReasoning, Search
from orchestra_jax.experts.simulated import SimulatedExperts
from orchestra_jax.generation.engine import Engine
from orchestra_jax.generation.jax_engine import JaxEngine
from orchestra_jax.models.config import MODELS, ModelConfig
from orchestra_jax.rewards.preference import Objective
from orchestra_jax.tools.local_search import LocalSearch
from orchestra_jax.tools.python_sandbox import PythonSandbox
from orchestra_jax.tools.toolbox import Toolbox

VOCAB_MULTIPLE = 32  # the embedding is padded to it


@dataclasses.dataclass(frozen=True)
class Components:
    chat: Chat
    model_config: ModelConfig
    environment: QuestionAnswering
    sandbox: PythonSandbox
    objectives: tuple[Objective, ...]
    rollout: RolloutConfig
    train_tasks: tuple[Task, ...]
    test_tasks: tuple[Task, ...]
    preferences: tuple[Preference, ...]


ENGINES = {"jax": lambda config, parts, params, version: JaxEngine(parts.model_config, params, config.jax_engine, version)}


def build_engine(config: RunConfig, parts: Components, params, version: int) -> Engine:
    """The engine that `config.engine` names. ValueError for one that is not there."""
    if config.engine not in ENGINES:
        raise ValueError(f"engine {config.engine!r} is not one of {sorted(ENGINES)}")
    return ENGINES[config.engine](config, parts, params, version)


def build_preferences(weights: tuple[float, ...]) -> tuple[Preference, ...]:
    """The five of the default world, or the one that `data.weights` describes in the words of "balanced"."""
    if not weights:
        return tuple(PREFERENCES.values())
    if len(weights) != 3 or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"data.weights {weights} must be three weights, 0 or more: outcome, cost_usd, latency_s")
    outcome, cost_usd, latency_s = (weight / sum(weights) for weight in weights)
    named = {"outcome": outcome, "cost_usd": cost_usd, "latency_s": latency_s, "disallowed_calls": 0.0}
    return (dataclasses.replace(PREFERENCES["balanced"], weights=named),)


def build_components(config: RunConfig) -> Components:
    """ValueError for a model, rendering, tokenizer directory or corpus that is not there."""
    if config.model not in MODELS:
        raise ValueError(f"model {config.model!r} is not one of {sorted(MODELS)}")
    chat = load_chat(config.prompt.tokenizer_directory, config.prompt.rendering)
    vocab_size = -(-chat.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    documents = load_documents(config.data.corpus_path) if config.data.corpus_path else build_documents()
    experts = SimulatedExperts(config.world)
    sandbox = PythonSandbox()
    tools = (
        Search(lambda model: experts, LocalSearch(documents)),
        EnhanceReasoning(lambda model: experts, sandbox),
        Answer(lambda model: experts),
    )
    environment = QuestionAnswering(
        Toolbox(tools, config.episode.tool_timeout_s), config.world.max_calls, config.prompt.rendering == "compact"
    )
    return Components(
        chat=chat,
        model_config=dataclasses.replace(MODELS[config.model], vocab_size=vocab_size),
        environment=environment,
        sandbox=sandbox,
        objectives=reference_objectives(config.world.reference_cost_usd, config.world.reference_latency_s),
        rollout=RolloutConfig(
            max_turn_tokens=config.episode.max_turn_tokens,
            max_tokens=config.episode.max_tokens,
            calls_per_turn=config.episode.calls_per_turn,
            temperature=config.episode.temperature,
            orchestrator_usd_per_million_tokens=config.world.orchestrator_usd_per_million_tokens,
            orchestrator_tokens_per_s=config.world.orchestrator_tokens_per_s,
        ),
        train_tasks=build_tasks("train", config.data.num_tasks_per_cell, config.data.seed),
        test_tasks=build_tasks("test", config.data.num_test_tasks_per_cell, config.data.seed),
        preferences=build_preferences(config.data.weights),
    )
