"""The state of training and the optimizer's step on it; where its arrays lie on a mesh, or in the host's memory."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from orchestra_jax import sharding
from orchestra_jax.models import lora
from orchestra_jax.models.config import ModelConfig
from orchestra_jax.models.transformer import logical_axes


class TrainState(NamedTuple):
    params: object
    optimizer_state: object
    step: jax.Array  # int32: optimizer steps taken


def init_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(params, optimizer.init(params), jnp.int32(0))


def state_axes(state: TrainState, config: ModelConfig) -> TrainState:
    """The logical axes of each array: moments and master copies lie as their parameters do, counters are whole.

    `state` may be one of shapes, or a part of one. An array belongs to the parameter whose path ends its own.
    """
    by_path = {
        tuple(key.key for key in path): names
        for tree in (logical_axes(config), lora.factor_axes(config))
        for path, names in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
        )
    }

    def axes_of(path, leaf):
        keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        for start in range(len(keys)):
            if keys[start:] in by_path and len(by_path[keys[start:]]) == leaf.ndim:
                return by_path[keys[start:]]
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(axes_of, state)


def place_state(state: TrainState, config: ModelConfig, mesh) -> TrainState:
    """The state laid out over the devices of `mesh`."""
    return sharding.place(state, sharding.shardings(state_axes(state, config), mesh))


# The gradients are not donated: the new state has no buffer left over that could take them.
@functools.partial(jax.jit, static_argnames=("config", "optimizer"), donate_argnames="state")
def apply_gradients(state: TrainState, gradients, *, config: ModelConfig, optimizer) -> tuple[TrainState, jax.Array]:
    """One optimizer step; returns the state, whose old buffers are donated, and the gradients' norm before clipping."""
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = TrainState(params, optimizer_state, state.step + 1)
    return sharding.constrain(state, state_axes(state, config)), optax.tree.norm(gradients)


def take_step(state: TrainState, gradients, *, config: ModelConfig, optimizer) -> tuple[TrainState, jax.Array]:
    """`apply_gradients` for a state whose moments may lie in the host's memory: they come to the device and go back.

    Between compiled programs and not within one: jax gives a donated buffer to an output of its shape whatever the
    memory of the two, and one of the host's for one of the device's ends the process.
    """
    moments = state.optimizer_state
    hosted = [leaf for leaf in jax.tree.leaves(moments) if leaf.sharding.memory_kind == sharding.HOST_MEMORY]
    if not hosted:
        return apply_gradients(state, gradients, config=config, optimizer=optimizer)
    moments = sharding.place(moments, sharding.device_shardings(moments))
    for leaf in hosted:
        leaf.delete()  # what donation does to the rest
    state, norm = apply_gradients(
        state._replace(optimizer_state=moments), gradients, config=config, optimizer=optimizer
    )
    moments = sharding.place(state.optimizer_state, sharding.host_shardings(state.optimizer_state))
    jax.block_until_ready(moments)  # before those of the next step come to the device
    return state._replace(optimizer_state=moments), norm
