"""The parts of a run, built once from its config: chat, tasks, tools, environment, model shape.

What is wrong with a config is said here, before anything is trained or written. Weights and engine are no parts: the
engine is made of weights, whenever there are some (`build_engine`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import pathlib

from orchestra_jax.chat import Chat, load_chat
from orchestra_jax.config import GrpoConfig, RunConfig
from orchestra_jax.environments.question_answering import reference_objectives
from orchestra_jax.environments.rollout import RolloutConfig
from orchestra_jax.experts.world import check_pools
from orchestra_jax.generation.engine import Engine
from orchestra_jax.generation.jax_engine import JaxEngine
from orchestra_jax.generation.replicas import Replicas
from orchestra_jax.generation.sglang.processes import CONTEXT_MARGIN
from orchestra_jax.generation.sglang.weight_sync import ROUTES
from orchestra_jax.generation.sglang_engine import SGLangEngine
from orchestra_jax.grpo.advantages import ADVANTAGES
from orchestra_jax.grpo.filters import FILTERS, OVERLONG
from orchestra_jax.grpo.kl_penalty import KL_IN_REWARD
from orchestra_jax.grpo.loss import AGGREGATIONS, CORRECTIONS, KL_ESTIMATORS, RATIOS, check_clips
from orchestra_jax.models import attention, pretrained
from orchestra_jax.models.config import MODELS, ModelConfig
from orchestra_jax.models.huggingface_config import DTYPES
from orchestra_jax.models.lora import check_lora
from orchestra_jax.models.transformer import REMAT_POLICIES
from orchestra_jax.models.weight_files import WeightWriter
from orchestra_jax.optimizers import check_optimizer
from orchestra_jax.policy import run_mesh
from orchestra_jax.rewards.normalization import RANGE_RULES
from orchestra_jax.rewards.objectives import Objective
from orchestra_jax.rewards.preference import FORMS
from orchestra_jax.settings import num_threads
from orchestra_jax.tools.budget import Account
from orchestra_jax.worlds import WORLDS, World

OUTCOMES = ("computed", "judged")
BATCHINGS = ("shared_prompt", "packed")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
VOCAB_MULTIPLE = 32  # the embedding is padded to it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Components(World):
    """The world, and what all worlds have. Close `resources` (the sandbox, servers of tools) in the end."""

    chat: Chat
    model_config: ModelConfig  # with the tokenizer's vocabulary
    resources: contextlib.ExitStack
    account: Account  # real money
    objectives: tuple[Objective, ...]
    rollout: RolloutConfig


def _build_jax_engine(config: RunConfig, parts: Components, params, version: int) -> Engine:
    """On a mesh it samples there, from the weights as the trainer has laid them out.

    As many as there are threads, for each fills one; beside updates, which have threads of their own, one.
    """
    mesh = run_mesh(config)
    engines = [
        JaxEngine(parts.model_config, params, config.jax_engine, version, mesh, is_training=True)
        for _ in range(1 if config.grpo.rollout_lag else num_threads(config))
    ]
    return Replicas(engines) if len(engines) > 1 else engines[0]


def _build_sglang_engine(config: RunConfig, parts: Components, params, version: int) -> Engine:
    writer = WeightWriter(parts.model_config, config.sglang.dtype)
    engine = SGLangEngine(config.sglang, parts.model_config.vocab_size, writer.write)
    asyncio.run(engine.update_weights(params, version))
    return engine


ENGINES = {"jax": _build_jax_engine, "sglang": _build_sglang_engine}


def build_engine(config: RunConfig, parts: Components, params, version: int) -> Engine:
    """The engine that `config.engine` names, with the weights `params` of the policy's version `version`."""
    return ENGINES[config.engine](config, parts, params, version)


def check_config(config: RunConfig) -> None:
    """ValueError for what would else show when the warm start is done, minutes later."""
    choices = {
        "compute.dtype": (config.compute.dtype, ("own", *COMPUTE_DTYPES)),
        "compute.remat": (config.compute.remat, ("own", "none", *REMAT_POLICIES)),
        "compute.attention": (config.compute.attention, ("own", "auto", *attention.IMPLEMENTATIONS)),
        "engine": (config.engine, ENGINES),
        "experts.outcome": (config.experts.outcome, OUTCOMES),
        "environment": (config.environment, WORLDS),
        "grpo.batching": (config.grpo.batching, BATCHINGS),
        "grpo.reward_form": (config.grpo.reward_form, FORMS),
        "grpo.range_rule": (config.grpo.range_rule, RANGE_RULES),
        "grpo.advantage": (config.grpo.advantage, ADVANTAGES),
        "grpo.filters": (config.grpo.filters, FILTERS),
        "grpo.overlong": (config.grpo.overlong, OVERLONG),
        "grpo.ratio": (config.grpo.ratio, RATIOS),
        "grpo.correction": (config.grpo.correction, CORRECTIONS),
        "grpo.kl": (config.grpo.kl, (*KL_ESTIMATORS, KL_IN_REWARD)),
        "grpo.aggregation": (config.grpo.aggregation, AGGREGATIONS),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is not one of {sorted(allowed)}")
    needed, there = config.episode.max_tokens, config.jax_engine.max_tokens
    if config.engine == "jax" and needed > there:
        raise ValueError(f"episode.max_tokens {needed} does not fit jax_engine.max_tokens {there}: raise the engine's")
    check_lora(config.lora)
    longest = model_shape(config.model).max_position
    if config.episode.max_tokens > longest:
        raise ValueError(
            f"episode.max_tokens {config.episode.max_tokens} is beyond the {longest} of {config.model!r}: lower it"
        )
    if config.environment == "question_answering":  # the one whose optimum is computed
        check_pools(config.world)
    if config.engine == "sglang":
        _check_sglang(config)
    _check_mesh(config)
    for name, optimizer in (("warm_start", config.warm_start.optimizer), ("grpo", config.grpo.optimizer)):
        check_optimizer(optimizer, f"{name}.optimizer")
    _check_reward(config)
    _check_what_does_nothing(config.grpo)
    _check_lag(config)
    _check_numbers(config)
    if config.checkpoint_every < 1 or config.grpo.group_size < 2:
        raise ValueError(
            f"checkpoint_every {config.checkpoint_every} must be 1 or more, and grpo.group_size "
            f"{config.grpo.group_size} must be 2 or more: a rollout is compared with the others of its group"
        )


def model_shape(model: str) -> ModelConfig:
    """By name, or of the weights at that path; ValueError for what is neither."""
    if model in MODELS:
        return MODELS[model]
    if not pathlib.Path(model).exists():
        raise ValueError(f"model {model!r} is not one of {sorted(MODELS)}, and there is no such directory or file")
    return pretrained.read_model(model)


def build_chat_and_model(config: RunConfig) -> tuple[Chat, ModelConfig]:
    """How messages are written, and the model's shape with that vocabulary.

    ValueError for a tokenizer that is not there, or is not the one that the weights were trained with.
    """
    chat = load_chat(config.prompt.tokenizer_directory, config.prompt.rendering)
    shape = model_shape(config.model)
    vocab_size = shape.vocab_size
    if config.model in MODELS:
        vocab_size = -(-chat.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    else:
        pretrained.check_tokenizer(config.model, vocab_size, chat.tokenizer)
    chosen = {"compute_dtype": config.compute.dtype, "remat": config.compute.remat}
    chosen["attention"] = config.compute.attention
    chosen = {name: value for name, value in chosen.items() if value != "own"}
    if config.lora.rank:
        chosen["lora_scale"] = config.lora.alpha / config.lora.rank
    return chat, dataclasses.replace(shape, vocab_size=vocab_size, **chosen)


def _check_sglang(config: RunConfig) -> None:
    needed, there = config.episode.max_tokens, config.sglang.context_length
    longest = model_shape(config.model).max_position - CONTEXT_MARGIN
    if not needed <= there <= longest:
        raise ValueError(
            f"sglang.context_length {there} must hold episode.max_tokens {needed} and be {longest} at most, what "
            f"{config.model!r} has less {CONTEXT_MARGIN}"
        )
    if config.sglang.dtype not in DTYPES:
        raise ValueError(f"sglang.dtype {config.sglang.dtype!r} is not one of {DTYPES}")
    if config.sglang.weight_route not in ROUTES:
        raise ValueError(f"sglang.weight_route {config.sglang.weight_route!r} is not one of {sorted(ROUTES)}")


def _check_mesh(config: RunConfig) -> None:
    mesh, settings = config.mesh, config.grpo
    num_row_parts, num_length_parts = mesh.data * mesh.fsdp, mesh.context
    rows = {"warm_start.groups_per_micro_batch": config.warm_start.groups_per_micro_batch}
    lengths = {"grpo.prefix_buckets": settings.prefix_buckets, "episode.max_tokens": (config.episode.max_tokens,)}
    lengths["grpo.completion_buckets"] = settings.completion_buckets
    if settings.batching == "packed" or settings.kl == KL_IN_REWARD:
        rows["grpo.rows_per_micro_batch"] = settings.rows_per_micro_batch
        lengths["grpo.tokens_per_row"] = (settings.tokens_per_row,)
    if settings.batching == "shared_prompt":
        rows["grpo.groups_per_micro_batch"] = settings.groups_per_micro_batch
    for name, value in rows.items():
        if value % num_row_parts:
            raise ValueError(f"{name} {value} must be a multiple of mesh.data x mesh.fsdp, which is {num_row_parts}")
    for name, values in lengths.items():
        if any(value % num_length_parts for value in values):
            raise ValueError(f"{name} {values} must be multiples of mesh.context, which is {num_length_parts}")
    num_kv_heads = model_shape(config.model).num_kv_heads
    if num_kv_heads % mesh.tensor:
        raise ValueError(
            f"mesh.tensor {mesh.tensor} must divide the {num_kv_heads} key-value heads of {config.model!r}"
        )


def _check_lag(config: RunConfig) -> None:
    settings = config.grpo
    lag = settings.rollout_lag
    if lag not in (0, 1) or lag > settings.max_policy_lag:
        raise ValueError(
            f"grpo.rollout_lag {lag} must be 0 or 1, and grpo.max_policy_lag {settings.max_policy_lag} no less: what "
            "is older leaves the loss"
        )
    if lag and settings.correction == "none":
        raise ValueError(
            f"grpo.rollout_lag {lag} with grpo.correction 'none': nothing would account for the sampler's older "
            "weights, take 'token' or 'sequence'"
        )
    if lag and config.engine == "sglang" and config.sglang.is_colocated:
        raise ValueError(
            f"grpo.rollout_lag {lag} with sglang.is_colocated: servers that sample beside the update have no memory to "
            "lend to it, set one of the two"
        )
    # Programs of two threads that talk among the same devices can wait for each other for ever.
    is_on_mesh = max(dataclasses.astuple(config.mesh)) > 1
    if lag and is_on_mesh and (config.engine == "jax" or settings.kl == KL_IN_REWARD):
        raise ValueError(
            f"grpo.rollout_lag {lag} on a mesh needs engine 'sglang' and a grpo.kl of the loss, not {config.engine!r} "
            f"and {settings.kl!r}: both would run on the trainer's devices beside the update. Set it to 0"
        )


def _check_reward(config: RunConfig) -> None:
    settings = config.grpo
    budgets = (settings.budget_cost_usd, settings.budget_latency_s)
    if settings.reward_form == "constrained" and all(math.isinf(each) for each in budgets):
        raise ValueError('grpo.reward_form "constrained" needs grpo.budget_cost_usd or grpo.budget_latency_s: set one')
    if settings.reward_form == "per_objective" and (settings.overlong == "soft" or settings.kl == KL_IN_REWARD):
        raise ValueError(
            'grpo.reward_form "per_objective" has no one reward that a length or KL penalty could be taken from: set '
            "grpo.overlong to keep or mask, and grpo.kl to k2 or k3"
        )
    longest = config.episode.max_tokens
    is_packing = settings.batching == "packed" or settings.kl == KL_IN_REWARD
    if is_packing and settings.tokens_per_row < longest:
        raise ValueError(f"grpo.tokens_per_row {settings.tokens_per_row} must hold episode.max_tokens {longest}")
    if settings.overlong == "soft" and not 1 <= settings.overlong_buffer_tokens <= longest:
        raise ValueError(f"grpo.overlong_buffer_tokens {settings.overlong_buffer_tokens} must lie in 1 to {longest}")


def _check_what_does_nothing(settings: GrpoConfig) -> None:
    """ValueError for a choice that another choice leaves without effect: an ablation of it would compare equals."""
    has_floor = settings.range_floor_cost_usd > 0 or settings.range_floor_latency_s > 0
    has_budget = math.isfinite(settings.budget_cost_usd) or math.isfinite(settings.budget_latency_s)
    is_range_read = settings.reward_form not in ("weight_then_normalize", "constrained")
    for is_idle, told in (
        (
            settings.ratio != "token" and settings.num_updates == 1,
            f"grpo.ratio {settings.ratio!r} with grpo.num_updates 1: the ratio of a single pass is 1, raise it",
        ),
        (
            has_floor and settings.range_rule == "reference",
            'a grpo.range_floor with grpo.range_rule "reference", whose range is fixed: take "group" or "correct"',
        ),
        (
            has_budget and settings.reward_form != "constrained",
            f'a grpo.budget with grpo.reward_form {settings.reward_form!r}: take "constrained", or leave it out',
        ),
        (
            settings.range_rule != "reference" and not is_range_read,
            f"grpo.range_rule {settings.range_rule!r} with grpo.reward_form {settings.reward_form!r}, which reads "
            'none: leave it at "reference"',
        ),
        (
            settings.std_floor > 0 and settings.advantage in ("dr_grpo", "rloo"),
            f"grpo.std_floor {settings.std_floor} with grpo.advantage {settings.advantage!r}, which divides by no "
            "deviation: leave it at 0",
        ),
        (
            settings.max_resamples > 0 and settings.min_group_std == 0,
            f"grpo.max_resamples {settings.max_resamples} with grpo.min_group_std 0: no group is homogeneous, raise it",
        ),
    ):
        if is_idle:
            raise ValueError(f"without effect: {told}")


def _check_numbers(config: RunConfig) -> None:
    settings = config.grpo
    check_clips(settings.clip_low, settings.clip_high, settings.dual_clip, settings.correction_clip)
    lowest = {
        "grpo.num_updates": (settings.num_updates, 1),
        "grpo.groups_per_update": (settings.groups_per_update, 1),
        "grpo.groups_per_micro_batch": (settings.groups_per_micro_batch, 1),
        "warm_start.groups_per_micro_batch": (config.warm_start.groups_per_micro_batch, 1),
        "compute.num_threads": (config.compute.num_threads, 1),
        "grpo.rows_per_micro_batch": (settings.rows_per_micro_batch, 1),
        "grpo.segments_per_row": (settings.segments_per_row, 1),
        "grpo.max_resamples": (settings.max_resamples, 0),
        "grpo.min_group_std": (settings.min_group_std, 0),
        "grpo.std_floor": (settings.std_floor, 0),
        "grpo.multiplier_rate": (settings.multiplier_rate, 0),
        "grpo.max_sampler_gap": (settings.max_sampler_gap, 0),
        "episode.num_corrections": (config.episode.num_corrections, 0),
    }
    for name, (value, limit) in lowest.items():
        if not value >= limit:
            raise ValueError(f"{name} {value} must be {limit} or more")
    if settings.std_ddof not in (0, 1) or not settings.advantage_clip > 0:
        raise ValueError(
            f"grpo.std_ddof {settings.std_ddof} must be 0 or 1, and grpo.advantage_clip {settings.advantage_clip} "
            "positive: inf switches it off"
        )


def build_objectives(config: RunConfig) -> tuple[Objective, ...]:
    """The objectives of the default world, with the range floors of the config."""
    floors = {"cost_usd": config.grpo.range_floor_cost_usd, "latency_s": config.grpo.range_floor_latency_s}
    objectives = reference_objectives(config.world.reference_cost_usd, config.world.reference_latency_s)
    return tuple(dataclasses.replace(each, range_floor=floors.get(each.name, 0.0)) for each in objectives)


def build_components(config: RunConfig) -> Components:
    """ValueError for what `check_config` refuses, and a rendering, tokenizer directory, corpus or endpoints file that
    is not there."""
    check_config(config)
    chat, model_config = build_chat_and_model(config)
    account = Account(config.experts.spend_cap_usd)
    with contextlib.ExitStack() as opened:
        world = WORLDS[config.environment](config, account, opened)
        resources = opened.pop_all()  # a mistake before this line closes what was opened
    return Components(
        **vars(world),
        chat=chat,
        model_config=model_config,
        resources=resources,
        account=account,
        objectives=build_objectives(config),
        rollout=RolloutConfig(
            max_turn_tokens=config.episode.max_turn_tokens,
            max_tokens=config.episode.max_tokens,
            calls_per_turn=config.episode.calls_per_turn,
            temperature=config.episode.temperature,
            num_corrections=config.episode.num_corrections,
            orchestrator_usd_per_million_tokens=config.world.orchestrator_usd_per_million_tokens,
            orchestrator_tokens_per_s=config.world.orchestrator_tokens_per_s,
            ends_on_tool_failure=config.episode.ends_on_tool_failure,
        ),
    )
