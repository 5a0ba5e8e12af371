"""The optimizers and their schedule: what turns gradients into updates, for the warm start and for GRPO alike.

"adamw"  Loshchilov and Hutter, arXiv 1711.05101
"muon"   the momentum of every layer's weight matrix is orthogonalised (Jordan 2024; Liu et al., arXiv 2502.16982,
         whose scale, 0.2 sqrt(max(fan_in, fan_out)), makes rates comparable with AdamW's); the embedding, an untied
         head and the norms' scales go by Adam. On the small policy it learns faster from the same rollouts and
         leaves the thought readable at rates where AdamW does not (docs/log.md).
"""

from __future__ import annotations

import dataclasses

import jax
import optax
from optax import contrib

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
    to `final_share` of itself."""

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


def _adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(schedule, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay)


def _muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return contrib.muon(
        schedule,
        beta=config.momentum,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        weight_decay=config.weight_decay,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=_muon_axes,
        consistent_rms=MUON_RMS,
    )


OPTIMIZERS = {"adamw": _adamw, "muon": _muon}


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clips the global norm, then steps.

    Args:
      config: what the optimizer is and how fast it goes.
      num_steps: optimizer steps of the whole run, over which the rate decays.

    Raises:
      ValueError: an unknown optimizer.
    """
    if config.name not in OPTIMIZERS:
        raise ValueError(f"optimizer name {config.name!r} is not one of {sorted(OPTIMIZERS)}")
    schedule = learning_rate_schedule(config, num_steps)
    return optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), OPTIMIZERS[config.name](config, schedule))
