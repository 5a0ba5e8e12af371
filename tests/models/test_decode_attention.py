"""The kernel for one new token a row against plain attention. Legend as in orchestra_jax/models/decode_attention.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.models import attention, decode_attention
from orchestra_jax.models.config import MODELS
from orchestra_jax.models.kv_cache import empty_cache
from orchestra_jax.models.transformer import Transformer, init_params

NUM_LAYERS, NUM_ROWS, NUM_KV_HEADS, NUM_QUERIES, NUM_SLOTS = 2, 3, 2, 4, 320


def check(dtype, tolerance, head_dim):
    """Lengths of no slot, within a tile, and all slots of more than one part; what is stale is not seen."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    shape = (NUM_LAYERS, NUM_ROWS, NUM_KV_HEADS)
    keys_LCKHS = jax.random.normal(next(keys), (*shape, head_dim, NUM_SLOTS), dtype)
    values_LCKSH = jax.random.normal(next(keys), (*shape, NUM_SLOTS, head_dim), dtype)
    q_C1NH = 3 * jax.random.normal(next(keys), (NUM_ROWS, 1, NUM_KV_HEADS * NUM_QUERIES, head_dim), dtype)
    k_C1KH, v_C1KH = (jax.random.normal(next(keys), (NUM_ROWS, 1, NUM_KV_HEADS, head_dim), dtype) for _ in range(2))
    lengths_C = jnp.array([0, 70, NUM_SLOTS])
    stack = decode_attention.CacheStack(keys_LCKHS, values_LCKSH, lengths_C)
    one_C1 = jnp.ones((NUM_ROWS, 1), jnp.int32)
    for layer in range(NUM_LAYERS):
        actual = jax.jit(decode_attention.attend)(q_C1NH, k_C1KH, v_C1KH, stack, jnp.int32(layer))
        own = attention.KeyBlock(*attention.for_products(k_C1KH, v_C1KH), attention.own_visibility(one_C1, one_C1))
        seen = attention.cache_visibility(one_C1, one_C1, lengths_C, NUM_SLOTS)
        cached = attention.KeyBlock(keys_LCKHS[layer], values_LCKSH[layer], seen)
        expected = attention.attend(q_C1NH, [own, cached], "xla")
        np.testing.assert_allclose(np.float32(actual), np.float32(expected), atol=tolerance)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="interpreted on a CPU alone")
def test_the_kernel_equals_plain_attention_when_interpreted(monkeypatch):
    monkeypatch.setattr(decode_attention, "NUM_PROGRAMS", 3 * NUM_ROWS * NUM_KV_HEADS)  # three parts: of 2, 2, 1 tiles
    check(jnp.float32, 1e-5, 16)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="interpreted on a CPU alone")
def test_the_model_decodes_with_the_kernel_as_without(monkeypatch):
    """Rows at work and one at rest, at lengths of their own; the cache of all layers."""
    config = dataclasses.replace(MODELS["tiny"], num_layers=2, head_dim=16)
    params = init_params(config, jax.random.key(0))
    cache = empty_cache(config, 3, 128)
    keys = jax.random.split(jax.random.key(1))
    cache = cache._replace(
        keys_LCKHS=jax.random.normal(keys[0], cache.keys_LCKHS.shape),
        values_LCKSH=jax.random.normal(keys[1], cache.values_LCKSH.shape),
        lengths_B=jnp.array([70, 128, 5]),
    )
    tokens_B1, working_B1 = jnp.array([[3], [4], [5]]), jnp.array([[1], [0], [1]])
    hidden = {}
    for has_kernel in (False, True):
        monkeypatch.setattr(decode_attention, "can_attend", lambda *_, has_kernel=has_kernel: has_kernel)
        hidden[has_kernel], _ = Transformer(config).apply(
            {"params": params}, tokens_B1, cache.lengths_B[:, None], working_B1, cache
        )
    np.testing.assert_allclose(hidden[True], hidden[False], atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize(("head_dim", "num_programs"), [(16, 1024), (128, 1024), (128, 1)])
def test_the_kernel_equals_plain_attention_on_a_gpu(monkeypatch, head_dim, num_programs):
    """Parts of one tile, and one part of all five."""
    monkeypatch.setattr(decode_attention, "NUM_PROGRAMS", num_programs)
    check(jnp.bfloat16, 0.02, head_dim)
