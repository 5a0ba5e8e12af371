"""The optimizers: the schedule, and what Muon does to a weight matrix and leaves to Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orchestra_jax.models.config import MODELS
from orchestra_jax.models.transformer import init_params
from orchestra_jax.optimizers import (
    MUON_AXES,
    OPTIMIZERS,
    OptimizerConfig,
    check_host_memory,
    check_optimizer,
    in_group,
    learning_rate_schedule,
    make_optimizer,
)


def test_the_rate_rises_from_its_first_step_on_and_falls_to_its_final_share():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=0.1, warmup_steps=2, final_share=0.1), num_steps=4)
    np.testing.assert_allclose([schedule(step) for step in range(6)], [0.05, 0.1, 0.055, 0.01, 0.01, 0.01], rtol=1e-5)


def test_the_rate_may_stay_up_until_the_last_steps():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=2, falling_share=0.5, final_share=0.1)
    schedule = learning_rate_schedule(config, num_steps=8)
    rates = [schedule(step) for step in range(9)]
    np.testing.assert_allclose(rates, [0.05, 0.1, 0.1, 0.1, 0.0775, 0.055, 0.0325, 0.01, 0.01], rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_as_large_as_the_rate_says(name):
    params = init_params(MODELS["tiny"], jax.random.key(0))
    gradients = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape) * 1e3, params)
    optimizer = make_optimizer(OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=0), num_steps=10)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        root_mean_square = float(jnp.sqrt(jnp.mean(update**2)))
        is_matrix = name == "muon" and path[-1].key in MUON_AXES
        # An orthogonal [m, n] matrix has root mean square 1 / sqrt(max(m, n)), which the scale undoes.
        low, high = (0.12, 0.25) if is_matrix else (0.9, 1.6)  # above 1: the Adam in Muon looks ahead (Nesterov)
        assert 0.1 * low < root_mean_square < 0.1 * high, path


def test_muon_moves_every_direction_of_a_matrix_alike():
    params = init_params(MODELS["tiny"], jax.random.key(0))
    optimizer = make_optimizer(OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0), num_steps=10)
    gradients = jax.tree.map(jnp.zeros_like, params)
    left, right = (jax.random.normal(jax.random.key(key), (3, size, 2)) for key, size in ((0, 20), (1, 28)))
    strengths = jnp.array([1.0, 0.05])  # two directions, one with a twentieth of the other's gradient
    gradients["layers"]["feed_forward"]["gate"] = jnp.einsum("ldr,lfr,r->ldf", left, right, strengths)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    singular = np.linalg.svd(updates["layers"]["feed_forward"]["gate"], compute_uv=False)[:, :2]
    assert (singular[:, 1] / singular[:, 0] > 0.4).all(), singular


def test_every_weight_matrix_of_a_layer_is_named():
    layers = init_params(MODELS["tiny"], jax.random.key(0))["layers"]
    names = {path[-1].key for path, leaf in jax.tree_util.tree_leaves_with_path(layers) if leaf.ndim > 2}
    assert names == set(MUON_AXES)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="'sgd' is not one of"):
        make_optimizer(OptimizerConfig(name="sgd"), num_steps=4)


SMALL = {"layers": {"gate": jnp.ones((2, 3, 4)), "scale": jnp.ones((2, 3))}, "embedding": jnp.ones((5, 3))}


def one_step(params=SMALL, **fields):
    """Parameters after a step of size 0.1 on gradients of 1, and the optimizer's state."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_steps=0, **fields), num_steps=10)
    state = optimizer.init(params)
    updates, state = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, params), state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_frozen_parameters_stay_and_enter_no_norm(name):
    params, _ = one_step(name=name, frozen=("embedding", "layers/scale"), weight_decay=0.5)
    np.testing.assert_array_equal(params["embedding"], SMALL["embedding"])
    np.testing.assert_array_equal(params["layers"]["scale"], SMALL["layers"]["scale"])
    assert (np.asarray(params["layers"]["gate"]) < 0.99).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_undecayed_parameters_move_by_their_gradient_alone(name):
    decayed, _ = one_step(name=name, weight_decay=0.5)
    excepted, _ = one_step(name=name, weight_decay=0.5, undecayed=("scale", "gate"))
    plain, _ = one_step(name=name)
    for leaf in ("scale", "gate"):
        np.testing.assert_allclose(excepted["layers"][leaf], plain["layers"][leaf], rtol=1e-6)
    np.testing.assert_allclose(excepted["embedding"], decayed["embedding"], rtol=1e-6)
    np.testing.assert_allclose(plain["embedding"] - decayed["embedding"], 0.1 * 0.5, rtol=1e-5)


def test_groups_are_named_by_their_paths():
    assert in_group(SMALL, ("^layers/",)) == {"layers": {"gate": True, "scale": True}, "embedding": False}
    with pytest.raises(ValueError, match="no parameter's path matches 'bias': the paths are .*layers/gate"):
        one_step(undecayed=("bias",))


def test_memory_that_the_devices_do_not_reach_is_refused():
    told = "grpo.optimizer.is_state_on_host needs memory of the kind 'pinned_host', and these devices reach"
    with pytest.raises(ValueError, match=told + r" \['device', 'unpinned_host'\] alone: leave it out"):
        check_host_memory("grpo.optimizer", {"device", "unpinned_host"})
    check_optimizer(OptimizerConfig(is_state_on_host=True), "grpo.optimizer")  # that of a CPU is there


def test_moments_that_bfloat16_would_hold_still_are_refused():
    """0.999 of a moment plus 0.001 of nothing is the moment again, once rounded."""
    moment = jnp.bfloat16(1.0)
    assert (0.999 * moment.astype(jnp.float32)).astype(jnp.bfloat16) == moment
    assert (0.95 * moment.astype(jnp.float32)).astype(jnp.bfloat16) < moment
    with pytest.raises(ValueError, match="optimizer: a moment that keeps 0.999 of itself a step does not move"):
        make_optimizer(OptimizerConfig(beta2=0.999, precision="float32_lean"), num_steps=2)
    make_optimizer(OptimizerConfig(beta2=0.999), num_steps=2)
