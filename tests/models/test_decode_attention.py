"""The kernel for one new token a row against plain attention. Legend as in orchestra_jax/models/decode_attention.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.models import attention, decode_attention

NUM_LAYERS, NUM_ROWS, NUM_KV_HEADS, NUM_QUERIES, HEAD_DIM, NUM_SLOTS = 2, 3, 2, 4, 16, 320


def check(dtype, tolerance):
    """Lengths of no slot, within a tile, and all slots of more than one part; what is stale is not seen."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    shape = (NUM_LAYERS, NUM_ROWS, NUM_KV_HEADS)
    keys_LCKHS = jax.random.normal(next(keys), (*shape, HEAD_DIM, NUM_SLOTS), dtype)
    values_LCKSH = jax.random.normal(next(keys), (*shape, NUM_SLOTS, HEAD_DIM), dtype)
    q_C1NH = 3 * jax.random.normal(next(keys), (NUM_ROWS, 1, NUM_KV_HEADS * NUM_QUERIES, HEAD_DIM), dtype)
    k_C1KH, v_C1KH = (jax.random.normal(next(keys), (NUM_ROWS, 1, NUM_KV_HEADS, HEAD_DIM), dtype) for _ in range(2))
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
    check(jnp.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
def test_the_kernel_equals_plain_attention_on_a_gpu():
    check(jnp.bfloat16, 0.02)
