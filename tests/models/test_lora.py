"""Low-rank factors: the base at first, the merged weights afterwards, and no array of a weight's size to train them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.models import huggingface, lora, transformer
from orchestra_jax.models.config import MODELS

jax.config.update("jax_numpy_rank_promotion", "raise")

TINY = dataclasses.replace(MODELS["tiny"], lora_scale=4.0)
CONFIG = lora.LoraConfig(rank=2, alpha=8.0)
TOKENS_BT = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 5))


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(TINY, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=1)
def hidden(params, config=TINY):
    positions_BT = jnp.broadcast_to(jnp.arange(5)[None], (2, 5))
    return transformer.Transformer(config).apply({"params": params}, TOKENS_BT, positions_BT, jnp.ones((2, 5), int))[0]


def random_factors(params, config=CONFIG):
    factors = lora.init_lora(config, params, jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), factors)


@pytest.mark.slow
def test_fresh_factors_change_nothing_and_a_step_on_them_lowers_the_loss(params):
    factors = lora.init_lora(CONFIG, params, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, factors, TINY.lora_scale), params)
    np.testing.assert_array_equal(hidden(lora.attach(factors, params)), hidden(params))
    loss_of = jax.jit(jax.value_and_grad(lambda factors: jnp.square(hidden(lora.attach(factors, params)) - 1).mean()))
    loss, gradients = loss_of(factors)
    assert len(jax.tree.leaves(gradients)) == 2 * len(lora.PROJECTIONS)
    for part in gradients["layers"].values():  # A's gradient is B, which is 0 at first
        assert all(np.abs(each).any() == name.endswith("_b") for name, each in part.items())
    factors = jax.tree.map(lambda x, gradient: x - 0.1 * gradient, factors, gradients)
    assert loss_of(factors)[0] < loss - 1e-4


def test_factors_beside_the_weights_equal_the_merged_weights(params):
    factors, config = random_factors(params), dataclasses.replace(TINY, remat="full")
    merged = lora.merge(params, factors, TINY.lora_scale)
    attached_BTD, merged_BTD = hidden(lora.attach(factors, params), config), hidden(merged, config)
    np.testing.assert_allclose(attached_BTD, merged_BTD, atol=1e-5)
    assert np.abs(np.asarray(merged_BTD) - hidden(params, config)).max() > 0.1


def test_the_change_of_a_weight_by_hand(params):
    factors = lora.init_lora(lora.LoraConfig(2, 8.0, ("output", "query")), params, jax.random.key(1))
    assert factors["layers"]["attention"]["output_a"].shape == (3, 4, 6, 2)  # layers, heads, head_dim, rank
    factors = jax.tree.map(jnp.ones_like, factors)
    merged = lora.merge(params, factors, 4.0)
    for name in ("output", "query"):  # 4 times the product of ones over two ranks
        change = merged["layers"]["attention"][name] - params["layers"]["attention"][name]
        np.testing.assert_allclose(change, 8.0, rtol=1e-5)
    assert merged["layers"]["attention"]["key"] is params["layers"]["attention"]["key"]


def test_factors_lie_on_a_mesh_as_their_weights_do(params):
    axes = lora.factor_axes(TINY)
    factors = lora.init_lora(CONFIG, params, jax.random.key(1))
    jax.tree.map(lambda x, names: np.testing.assert_equal(len(names), x.ndim), factors, axes)
    assert tuple(axes["layers"]["attention"]["output_a"]) == ("layers", "heads", "head_dim", None)
    assert tuple(axes["layers"]["feed_forward"]["gate_b"]) == ("layers", None, "mlp")


def test_the_gradient_of_factors_needs_one_layer_of_weights_at_a_time_and_makes_none():
    config = dataclasses.replace(TINY, num_layers=8, hidden_size=512, intermediate_size=4096, remat="full")
    base = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
    factors = jax.eval_shape(lambda: lora.init_lora(CONFIG, base, jax.random.key(0)))

    def loss(factors, base):
        return jnp.square(hidden(lora.attach(factors, base), config)).mean()

    memory = jax.jit(jax.grad(loss)).lower(factors, base).compile().memory_analysis()
    assert memory.argument_size_in_bytes > 192 * 2**20  # three matrices of 8 MiB in each of eight layers
    # The loop over the layers copies out what it reads, and gradients of the weights would be a second 192 MiB.
    assert memory.output_size_in_bytes < 2**20 and memory.temp_size_in_bytes < 40 * 2**20


def test_the_export_of_a_merge_is_loaded_as_plain_weights(params, tmp_path):
    merged = lora.merge(params, random_factors(params), TINY.lora_scale)
    huggingface.save_pretrained(transformer.Transformer(TINY), merged, tmp_path)
    model, loaded = huggingface.load_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, merged)


@pytest.mark.parametrize(
    "config",
    [lora.LoraConfig(4, projections=("query", "router")), lora.LoraConfig(-1), lora.LoraConfig(4, projections=())],
)
def test_mistakes_are_named(config):
    with pytest.raises(ValueError, match="the rank must be 0 or more"):
        lora.check_lora(config)
