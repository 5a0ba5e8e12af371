"""The optimizers and their schedule: what turns gradients into updates, for the warm start and for GRPO alike.

"adamw"  Loshchilov and Hutter, arXiv 1711.05101
"muon"   the momentum of every layer's weight matrix is orthogonalised (Jordan 2024; Liu et al., arXiv 2502.16982,
         whose scale, 0.2 sqrt(max(fan_in, fan_out)), makes rates comparable with AdamW's); the embedding, an untied
         head and the norms' scales go by Adam. On the small policy it learns faster from the same rollouts and
         leaves the thought readable at rates where AdamW does not (docs/log.md).

The chain: gradients of frozen parameters become 0, the global norm of the others is clipped, the optimizer steps.
Around it, where asked: the dtypes of a precision recipe (precision.py). Where the state lies between steps is not the
optimizer's business: `check_optimizer` refuses host memory that is not there, policy.py places the state,
grpo/train_step.py brings it to the device for a step and back.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from orchestra_jax import sharding
from orchestra_jax.precision import RECIPES, with_precision

# bfloat16 has 8 bits: what decays by less than 1/256 of itself a step is rounded back to where it was.
MAX_BFLOAT16_DECAY = 1 - 2**-8
MUON_RMS = 0.2  # root mean square of an update at rate 1
# (axes in, axes out) of each weight matrix of models.transformer; axis 0 is the layer.
MUON_AXES = {
    "query": (1, (2, 3)),
    "key": (1, (2, 3)),
    "value": (1, (2, 3)),
    "output": ((1, 2), 3),
    "gate": (1, 2),
    "up": (1, 2),
    "down": (1, 2),
}


@dataclasses.dataclass
class OptimizerConfig:
    """The rate rises linearly over `warmup_steps`, stays, and falls linearly over the last `falling_share` of the steps
    to `final_share` of itself.

    Groups of parameters are named by regular expressions that are searched for in a path such as
    "layers/attention/query": `frozen` ones never move, `undecayed` ones have no weight decay.
    """

    name: str = "muon"  # a key of OPTIMIZERS
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    falling_share: float = 1.0  # 1: it falls from the end of the rise on
    final_share: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.95  # Muon's; beta1 and beta2 are Adam's
    beta1: float = 0.9
    beta2: float = 0.95
    max_gradient_norm: float = 1.0
    frozen: tuple[str, ...] = ()
    undecayed: tuple[str, ...] = ()
    precision: str = "float32"  # a key of precision.RECIPES
    # Between steps, in the memory that jax calls "pinned_host": the device keeps its memory for activations, and a step
    # pays for two copies of the moments. For GPUs, and not timed on one; on a CPU both places are the same memory.
    is_state_on_host: bool = False


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The rate of optimizer step 0, 1, ...: the first one is 1 / `warmup_steps` of the full rate, not 0."""
    full, num_rising = config.learning_rate, max(config.warmup_steps, 1)
    num_falling = max(min(round(config.falling_share * num_steps), num_steps - num_rising), 1)
    rise = optax.linear_schedule(full / num_rising, full, num_rising - 1)
    fall = optax.linear_schedule(full, full * config.final_share, num_falling)
    start_of_fall = max(num_steps - 1 - num_falling, num_rising - 1)
    return optax.join_schedules([rise, optax.constant_schedule(full), fall], [num_rising - 1, start_of_fall])


def _muon_axes(params):
    """The tree of `params` with what Muon turns into matrices, and None for what goes by Adam."""

    def axes_of(path, _):
        axes = MUON_AXES.get(path[-1].key)
        return axes and contrib.MuonDimensionNumbers(*axes)

    return jax.tree_util.tree_map_with_path(axes_of, params)


def in_group(params, patterns: tuple[str, ...]):
    """The tree of `params` with True where a pattern is found in the path of the leaf.

    ValueError for a pattern that is found nowhere.
    """
    paths = _paths(params)
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"no parameter's path matches {pattern!r}: the paths are {paths}")
    is_in = [any(re.search(pattern, path) for pattern in patterns) for path in paths]
    return jax.tree.unflatten(jax.tree.structure(params), is_in)


def _paths(params) -> list[str]:
    return ["/".join(entry.key for entry in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _weight_decay(config: OptimizerConfig) -> float:
    """The optimizer's own, which decays all; groups that are excepted are the business of `decay_others`."""
    return 0.0 if config.undecayed else config.weight_decay


def _adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(schedule, b1=config.beta1, b2=config.beta2, weight_decay=_weight_decay(config))


def _muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return contrib.muon(
        schedule,
        beta=config.momentum,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        weight_decay=_weight_decay(config),
        adam_weight_decay=_weight_decay(config),
        muon_weight_dimension_numbers=_muon_axes,
        consistent_rms=MUON_RMS,
    )


OPTIMIZERS = {"adamw": _adamw, "muon": _muon}


def freeze(patterns: tuple[str, ...]) -> optax.GradientTransformation:
    """Zeroes what belongs to the group: gradients as the first link, updates as the last (weight decay moves too)."""

    def update(updates, state, params=None):
        is_frozen = in_group(updates, patterns)
        kept = jax.tree.map(lambda leaf, frozen: jnp.zeros_like(leaf) if frozen else leaf, updates, is_frozen)
        return kept, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def check_groups(patterns: tuple[str, ...]) -> optax.GradientTransformation:
    """Changes nothing; refuses a pattern that names no parameter when the state is made."""

    def init(params):
        in_group(params, patterns)
        return optax.EmptyState()

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


def decay_others(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Decoupled weight decay, rate * weight_decay * parameter, of all that is not in the group `undecayed`.

    A link of its own: optax's Muon has a mask for its matrices and none for what goes by Adam.
    """

    def update(updates, state, params=None):
        factor = schedule(state.count) * config.weight_decay
        undecayed = in_group(params, config.undecayed)
        decayed = jax.tree.map(lambda leaf, p, is_in: leaf if is_in else leaf - factor * p, updates, params, undecayed)
        return decayed, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update)


def check_host_memory(name: str, kinds: Collection[str]) -> None:
    """ValueError, which calls the config `name`: no memory of the host among the `kinds` that the devices reach."""
    if sharding.HOST_MEMORY not in kinds:
        raise ValueError(
            f"{name}.is_state_on_host needs memory of the kind {sharding.HOST_MEMORY!r}, and these devices reach "
            f"{sorted(kinds)} alone: leave it out"
        )


def check_optimizer(config: OptimizerConfig, name: str) -> None:
    """ValueError, which calls the config `name`: an unknown optimizer or precision, moments that would not move, or
    would lie in memory that is not there."""
    if config.name not in OPTIMIZERS:
        raise ValueError(f"{name}.name {config.name!r} is not one of {sorted(OPTIMIZERS)}")
    if config.precision not in RECIPES:
        raise ValueError(f"{name}.precision {config.precision!r} is not one of {sorted(RECIPES)}")
    decay = max(config.beta1, config.beta2, config.momentum)
    if RECIPES[config.precision].moments == "bfloat16" and decay > MAX_BFLOAT16_DECAY:
        raise ValueError(
            f"{name}: a moment that keeps {decay} of itself a step does not move in bfloat16, lower it to "
            f"{MAX_BFLOAT16_DECAY:.3f} or take another precision than {config.precision}"
        )
    if config.is_state_on_host:
        check_host_memory(name, sharding.memory_kinds())


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clips the global norm, then steps; see the top of the file for what else is in the chain.

    Args:
      config: what the optimizer is and how fast it goes.
      num_steps: optimizer steps of the whole run, over which the rate decays.

    Raises:
      ValueError: see `check_optimizer`. A pattern that names no parameter is refused when the state is made.
    """
    check_optimizer(config, "optimizer")
    schedule = learning_rate_schedule(config, num_steps)
    frozen = [freeze(config.frozen)] if config.frozen else []
    named = (*config.frozen, *config.undecayed)
    optimizer = optax.chain(
        *([check_groups(named)] if named else []),
        *frozen,
        optax.clip_by_global_norm(config.max_gradient_norm),
        OPTIMIZERS[config.name](config, schedule),
        *([decay_others(config, schedule)] if config.undecayed else []),
        *frozen,
    )
    return with_precision(optimizer, config.precision)
