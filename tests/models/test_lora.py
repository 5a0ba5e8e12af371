"""Low-rank factors: the base at first, a low-rank change after a step, one tree of plain parameters after the merge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.models import huggingface, lora, transformer
from orchestra_jax.models.config import MODELS

jax.config.update("jax_numpy_rank_promotion", "raise")

TINY = MODELS["tiny"]
CONFIG = lora.LoraConfig(rank=2, alpha=8.0)
TOKENS_BT = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 5))


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(TINY, jax.random.key(0))


def hidden(params):
    positions_BT = jnp.broadcast_to(jnp.arange(5)[None], (2, 5))
    return transformer.Transformer(TINY).apply({"params": params}, TOKENS_BT, positions_BT, jnp.ones((2, 5), int))[0]


def test_fresh_factors_change_nothing_and_a_step_on_them_lowers_the_loss(params):
    factors = lora.init_lora(CONFIG, params, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, lora.merge(CONFIG, params, factors), params)
    loss_of = jax.jit(
        jax.value_and_grad(lambda factors: jnp.square(hidden(lora.merge(CONFIG, params, factors)) - 1).mean())
    )
    loss, gradients = loss_of(factors)
    assert all(np.abs(each["b"]).any() for each in gradients.values())
    factors = jax.tree.map(lambda x, gradient: x - 0.1 * gradient, factors, gradients)
    assert loss_of(factors)[0] < loss - 1e-4


def test_the_change_of_a_weight_by_hand(params):
    factors = lora.init_lora(lora.LoraConfig(2, 8.0, ("output", "query")), params, jax.random.key(1))
    factors = jax.tree.map(jnp.ones_like, factors)
    merged = lora.merge(CONFIG, params, factors)
    for name in ("output", "query"):  # 8 / 2 times the product of ones over two ranks
        change = merged["layers"]["attention"][name] - params["layers"]["attention"][name]
        np.testing.assert_allclose(change, 8.0, rtol=1e-5)
    assert merged["layers"]["attention"]["key"] is params["layers"]["attention"]["key"]


def test_the_export_of_a_merge_is_loaded_as_plain_weights(params, tmp_path):
    factors = lora.init_lora(CONFIG, params, jax.random.key(1))
    factors = jax.tree.map(lambda x: x + 0.01, factors)
    merged = lora.merge(CONFIG, params, factors)
    huggingface.save_pretrained(transformer.Transformer(TINY), merged, tmp_path)
    _, loaded = huggingface.load_pretrained(tmp_path)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-3), loaded, merged)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'router'"):
        lora.LoraConfig(projections=("query", "router"))
    with pytest.raises(ValueError, match="rank 0"):
        lora.LoraConfig(rank=0)
