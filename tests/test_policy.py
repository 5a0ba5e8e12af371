"""Moments in the memory of the host: placed there, stepped as those on the device are, donated, and restored to it.

A CPU has that memory too, apart from its devices' own: where an array lies is real here, what it costs is not.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax import policy, sharding
from orchestra_jax.checkpoints import Checkpointer
from orchestra_jax.config import RunConfig
from orchestra_jax.grpo.train_state import take_step
from orchestra_jax.models.config import MODELS
from orchestra_jax.optimizers import make_optimizer
from orchestra_jax.precision import recipe_of

TINY = MODELS["tiny"]


def tiny_run(is_on_host, precision="float32", **fields):
    config = RunConfig(model="tiny")
    names = {"is_state_on_host": is_on_host, "precision": precision, **fields}
    config.grpo.optimizer = dataclasses.replace(config.grpo.optimizer, warmup_steps=0, **names)
    return config


def start(config):
    """(optimizer, a state of the run that has taken no step)"""
    settings = config.grpo.optimizer
    optimizer = make_optimizer(settings, num_steps=4)
    params = policy.trained_params(config, policy.start_params(config, TINY), settings, policy.GRPO)
    return optimizer, policy.new_state(config, TINY, params, settings, optimizer)


def step(config, optimizer, state, number):
    dtype = recipe_of(config.grpo.optimizer.precision).gradients
    gradients = jax.tree.map(lambda leaf: jnp.sin(jnp.arange(leaf.size) + number).reshape(leaf.shape), state.params)
    gradients = jax.tree.map(lambda leaf: leaf.astype(dtype), gradients)
    return take_step(state, gradients, config=TINY, optimizer=optimizer)[0]


def kinds(tree):
    """By number of dims: the kinds of memory that arrays lie in."""
    found = {}
    for leaf in jax.tree.leaves(tree):
        found.setdefault(leaf.ndim > 0, set()).add(leaf.sharding.memory_kind)
    return found


DEVICE = jax.devices()[0].default_memory().kind
ON_HOST = {True: {sharding.HOST_MEMORY}, False: {DEVICE}}  # counters stay on the device


@pytest.mark.parametrize(
    ("name", "precision"),
    [("adamw", "float32"), pytest.param("muon", "bfloat16_lean", marks=pytest.mark.slow)],
)
def test_moments_on_the_host_are_donated_and_step_to_the_same_bits(name, precision):
    states = {}
    for is_on_host in (False, True):
        config = tiny_run(is_on_host, precision, name=name)
        optimizer, state = start(config)
        for number in range(2):
            before = state
            state = step(config, optimizer, state, number)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before) if leaf.ndim)
            assert kinds(state.params) == {True: {DEVICE}}
            assert kinds(state.optimizer_state) == (ON_HOST if is_on_host else {True: {DEVICE}, False: {DEVICE}})
        states[is_on_host] = jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, states[True], states[False])
    start_params = policy.trained_params(config, policy.start_params(config, TINY), config.grpo.optimizer, policy.GRPO)
    assert (states[True].params["embedding"] != start_params["embedding"]).any()


def test_a_checkpoint_comes_back_to_the_host_and_goes_on_to_the_same_bits(tmp_path):
    config = tiny_run(True, name="adamw")
    optimizer, state = start(config)
    state = step(config, optimizer, state, 0)
    with Checkpointer(tmp_path, max_to_keep=1) as checkpointer:
        checkpointer.save(1, {"state": state, "reference_params": state.params}, {})
        expected = step(config, optimizer, state, 1)  # while the save runs: what it saves is what there was
        restored = checkpointer.restore(1, policy.saved_arrays(config, TINY, optimizer))[0]["state"]
    assert kinds(restored.params) == {True: {DEVICE}}
    assert kinds(restored.optimizer_state) == kinds(expected.optimizer_state) == ON_HOST
    found = step(config, optimizer, restored, 1)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))
