"""Precision recipes: parameters really move at a rate of 1e-6, and what is stored is in the dtype that is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orchestra_jax.optimizers import OptimizerConfig, make_optimizer
from orchestra_jax.precision import RECIPES, _random_words, _round_leaf, cast_parameters, with_precision

RATE, NUM_STEPS = 1e-6, 10


def start():
    return {"weight": jnp.linspace(2**-7, 2**-6, 4096, endpoint=False).reshape(64, 64)}


def take_steps(optimizer, params):
    """Ten steps of a constant gradient; -> (params, optimizer state)."""
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for _ in range(NUM_STEPS):
        gradients = jax.tree.map(lambda x: jnp.ones_like(x, jnp.bfloat16), params)
        updates, state = step(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_move_at_a_rate_of_1e_6(name):
    """AdamW under a constant gradient moves each parameter by the rate, so by 1e-5 in all, upon its mean."""
    recipe, params = RECIPES[name], cast_parameters(start(), name)
    assert params["weight"].dtype == recipe.parameters
    moved, state = take_steps(with_precision(optax.adamw(RATE, weight_decay=0.0), name), params)
    assert moved["weight"].dtype == recipe.parameters
    exact = moved["weight"] if recipe.master == "none" else state.master["weight"]
    shift = np.asarray(exact, np.float32).astype(np.float64) - np.asarray(params["weight"], np.float64)
    # The neighbours are 2**-14 away, so by stochastic rounding some 670 of the parameters move, give or take 26.
    assert shift.mean() == pytest.approx(-RATE * NUM_STEPS, rel=0.2 if recipe.has_stochastic_rounding else 0.05)
    assert (np.asarray(exact) != np.asarray(params["weight"])).any()
    if recipe.master == "float32":
        assert exact.dtype == jnp.float32
        np.testing.assert_array_equal(moved["weight"], exact.astype(recipe.parameters))


def test_bfloat16_alone_does_not_move():
    """What the recipes are there for."""
    params = cast_parameters(start(), "bfloat16_master")
    moved, _ = take_steps(optax.adamw(RATE, weight_decay=0.0), params)
    np.testing.assert_array_equal(moved["weight"], params["weight"])


@pytest.mark.parametrize("name", RECIPES)
def test_moments_are_in_the_dtype_that_is_named(name):
    _, state = take_steps(with_precision(optax.adamw(RATE), name), cast_parameters(start(), name))
    moments = [x for x in jax.tree.leaves(getattr(state, "inner", state)) if x.ndim]
    assert len(moments) == 2 and {x.dtype.name for x in moments} == {RECIPES[name].moments}


def test_a_recipe_is_chosen_in_the_optimizer_config():
    params = cast_parameters(start(), "bfloat16_master")
    config = OptimizerConfig(name="adamw", learning_rate=RATE, warmup_steps=0, precision="bfloat16_master")
    _, state = take_steps(make_optimizer(config, NUM_STEPS), params)
    assert state.master["weight"].dtype == jnp.float32 and (state.master["weight"] < params["weight"]).all()
    with pytest.raises(ValueError, match="'float8' is not one of"):
        make_optimizer(OptimizerConfig(precision="float8"), NUM_STEPS)


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_moments_in_half_the_bytes_step_almost_alike(name):
    params = {"layers": {"gate": jnp.ones((2, 3, 4))}, "embedding": jnp.ones((5, 3))}
    moved, num_bytes = {}, {}
    for precision in ("float32", "float32_lean"):
        config = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=0, precision=precision)
        moved[precision], state = take_steps(make_optimizer(config, NUM_STEPS), params)
        num_bytes[precision] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-2), *moved.values())
    assert num_bytes["float32_lean"] < 0.55 * num_bytes["float32"]


def test_moments_are_computed_in_float32():
    """By hand: a mean of 1 and 2^-10 is 0.50048828125, of which bfloat16 keeps 0.5."""
    optimizer = with_precision(optax.ema(0.5, debias=False), "float32_lean")
    params = jnp.zeros(1)
    state = optimizer.init(params)
    _, state = optimizer.update(jnp.array([2.0]), state, params)
    updates, state = optimizer.update(jnp.array([2.0**-10]), state, params)
    assert updates[0] == np.float32(0.50048828125)
    assert state.inner.ema.tolist() == [0.5]


def test_small_updates_add_up_in_the_master_copy():
    """100 steps of 1e-3 from 1: each is lost in bfloat16, whose neighbours of 1 are 2^-7 and 2^-8 away."""
    start = jnp.ones(3, jnp.bfloat16)
    moved = {}
    for name, optimizer in (("plain", optax.sgd(1e-3)), ("master", with_precision(optax.sgd(1e-3), "bfloat16_master"))):
        state, params = optimizer.init(start), start
        for _ in range(100):
            updates, state = optimizer.update(jnp.ones(3, jnp.bfloat16), state, params)
            params = optax.apply_updates(params, updates)
        moved[name] = params
    assert moved["master"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(moved["plain"], np.ones(3))
    np.testing.assert_array_equal(moved["master"], state.master.astype(jnp.bfloat16))
    np.testing.assert_allclose(state.master, 0.9, rtol=1e-5)


def test_the_words_of_stochastic_rounding_are_even_and_hang_on_place_and_step():
    """2^18 words: a bit is set in half of them, two bits agree in half of them, give or take 5 deviations of 2^-10."""
    shape, tolerance = (64, 64, 64), 5 * 2**-10
    first, second = (np.asarray(_random_words(shape, jax.random.key(seed))).ravel() for seed in (0, 1))
    bits = np.stack([(first >> n) & 1 for n in range(32)]).astype(np.float64)
    np.testing.assert_allclose(bits.mean(axis=1), 0.5, atol=tolerance)
    agreement = (bits @ bits.T + (1 - bits) @ (1 - bits).T) / bits.shape[1]
    np.testing.assert_allclose(agreement[np.triu_indices(32, 1)], 0.5, atol=tolerance)
    # A place's word says nothing of its neighbours', in any direction, nor of its own in the next step.
    uniform = first / 2.0**32
    for other in (*(np.roll(uniform, stride) for stride in (1, 64, 64 * 64)), second / 2.0**32):
        assert abs(np.corrcoef(uniform, other)[0, 1]) < tolerance
    counts = np.bincount((first >> 16).astype(np.int64) // 1024, minlength=64)  # of the half that is added
    assert ((counts - first.size / 64) ** 2 / (first.size / 64)).sum() < 120  # chi-squared of 63: beyond 120 in 2e-5


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000])
def test_a_nan_is_rounded_to_a_nan(bits):
    """The first is what arithmetic on an NVIDIA GPU gives: a random half added to it would make it 0."""
    x = jax.lax.bitcast_convert_type(jnp.full(64, bits, jnp.uint32), jnp.float32)
    assert jnp.isnan(_round_leaf(x, jax.random.key(0)).astype(jnp.float32)).all()
