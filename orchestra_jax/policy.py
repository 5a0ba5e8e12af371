"""The weights of a run: what training starts from, which part of them it moves, and the whole that is played.

Without LoRA all parameters are trained, and the whole is what is trained. With it low-rank factors are, on a frozen
base: first on the weights that the run starts from; then, with the warm start merged, on the reference policy.
"""

from __future__ import annotations

import contextlib
import dataclasses

import jax
from jax.sharding import Mesh

from orchestra_jax import sharding
from orchestra_jax.config import RunConfig
from orchestra_jax.grpo.train_state import TrainState, init_state, place_state, state_axes
from orchestra_jax.models import lora, pretrained
from orchestra_jax.models.config import MODELS, ModelConfig
from orchestra_jax.models.transformer import init_params, logical_axes
from orchestra_jax.optimizers import OptimizerConfig
from orchestra_jax.precision import cast_parameters

# Of the keys that factors are drawn from; the parameters of a fresh model have the seed itself.
WARM_START, GRPO = 1, 2


def run_mesh(config: RunConfig) -> Mesh | None:
    """What `config.mesh` describes; None for a single device. ValueError if there are too few devices."""
    sizes = dataclasses.asdict(config.mesh)
    return sharding.make_mesh(sizes) if max(sizes.values()) > 1 else None


def on_mesh(config: RunConfig):
    """The context of an update: the mesh of the run, or nothing for a single device."""
    mesh = run_mesh(config)
    return contextlib.nullcontext() if mesh is None else sharding.mesh_context(mesh)


def start_params(config: RunConfig, model_config: ModelConfig):
    """Fresh ones of the shape that `config.model` names, or those at its path; on the devices of the mesh."""
    with on_mesh(config) as mesh:
        if config.model not in MODELS:
            return pretrained.load_params(config.model, mesh)
    params = init_params(model_config, jax.random.key(config.seed))
    if mesh is None:
        return params
    return sharding.place(params, sharding.shardings(logical_axes(model_config), mesh))


def trained_params(config: RunConfig, params, settings: OptimizerConfig, stage: int):
    """What a stage moves of the policy `params`: itself, or fresh factors, in the dtype of the precision recipe."""
    if config.lora.rank:
        key = jax.random.fold_in(jax.random.key(config.seed), stage)
        params = lora.init_lora(config.lora, params, key)
    return cast_parameters(params, settings.precision)


def whole_params(model_config: ModelConfig, params, base_params=None):
    """The policy as plain weights: `params`, or the factors `params` merged into `base_params`, laid out as those."""
    if base_params is None:
        return params
    merged = lora.merge(base_params, params, model_config.lora_scale)
    return jax.tree.map(lambda new, old: new if new is old else jax.device_put(new, old.sharding), merged, base_params)


def new_state(config: RunConfig, model_config: ModelConfig, params, settings: OptimizerConfig, optimizer) -> TrainState:
    """A state that has taken no step, on the devices of the mesh; its moments on the host, if `settings` say so."""
    state = init_state(params, optimizer)
    with on_mesh(config) as mesh:
        state = state if mesh is None else place_state(state, model_config, mesh)
    if not settings.is_state_on_host:
        return state
    moments = sharding.place(state.optimizer_state, sharding.host_shardings(state.optimizer_state))
    return state._replace(optimizer_state=moments)


def saved_arrays(config: RunConfig, model_config: ModelConfig, optimizer):
    """Shapes, dtypes and places of what a checkpoint of GRPO holds."""

    def initial():
        params = init_params(model_config, jax.random.key(0))
        trained = trained_params(config, params, config.grpo.optimizer, GRPO)
        if not config.lora.rank:
            params = cast_parameters(params, config.warm_start.optimizer.precision)
        arrays = {"state": init_state(trained, optimizer), "reference_params": params}
        if config.grpo.rollout_lag:
            arrays["sampler_params"] = params if config.lora.rank else trained
        return arrays

    return abstract_arrays(config, model_config, config.grpo.optimizer, jax.eval_shape(initial))


def abstract_arrays(config: RunConfig, model_config: ModelConfig, settings: OptimizerConfig, shapes):
    """`shapes`, a dict with a "state" and parameters, each array with its place as `new_state` has it."""
    with on_mesh(config) as mesh:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda leaf: device, shapes)
        if mesh is not None:
            places = sharding.shardings(state_axes(shapes, model_config), mesh)
    arrays = _with_places(shapes, places)
    if settings.is_state_on_host:
        moments = arrays["state"].optimizer_state
        moments = _with_places(moments, sharding.host_shardings(moments))
        arrays["state"] = arrays["state"]._replace(optimizer_state=moments)
    return arrays


def _with_places(shapes, places):
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )
