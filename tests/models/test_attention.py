"""Attention by hand and against a loop over query heads. Legend as in orchestra_jax/models/attention.py."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.models import attention

jax.config.update("jax_numpy_rank_promotion", "raise")

attend = jax.jit(attention.attend)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


class Mask(NamedTuple):
    """Any visibility at all in the place of segments and positions."""

    is_visible_BTS: jax.Array

    def mask_BTS(self):
        return self.is_visible_BTS


def block(keys_CSKH, values_CSKH, is_visible_BTS):
    return attention.KeyBlock(*attention.for_products(keys_CSKH, values_CSKH), Mask(is_visible_BTS))


def test_weights_of_two_keys_by_hand():
    # Scores 2 * ln(3) / sqrt(4) = ln 3 and 0: weights 3/4 and 1/4.
    q_BTNH = jnp.array([2 * np.log(3.0), 0, 0, 0]).reshape(1, 1, 1, 4)
    keys_CSKH = jnp.array([[1.0, 0, 0, 0], [0, 0, 0, 0]]).reshape(1, 2, 1, 4)
    values_CSKH = jnp.array([[4.0, 0, 0, 1], [0, 8, 0, 1]]).reshape(1, 2, 1, 4)
    out_BTNH = attend(q_BTNH, [block(keys_CSKH, values_CSKH, jnp.ones((1, 1, 2), bool))])
    np.testing.assert_allclose(out_BTNH[0, 0, 0], [3, 2, 0, 1], atol=1e-6)


def test_grouped_heads_equal_a_loop_over_query_heads():
    q_BTNH, keys_CSKH, values_CSKH = normal(0, 2, 3, 4, 6), normal(1, 2, 5, 2, 6), normal(2, 2, 5, 2, 6)
    is_visible_BTS = jnp.tril(jnp.ones((3, 5), bool), 2)[None].repeat(2, axis=0)
    out_BTNH = attend(q_BTNH, [block(keys_CSKH, values_CSKH, is_visible_BTS)])
    for head in range(4):
        keys_BSH, values_BSH = keys_CSKH[:, :, head // 2], values_CSKH[:, :, head // 2]
        score_BTS = q_BTNH[:, :, head] @ keys_BSH.swapaxes(1, 2) / np.sqrt(6)
        weight_BTS = jax.nn.softmax(jnp.where(is_visible_BTS, score_BTS, -jnp.inf))
        np.testing.assert_allclose(out_BTNH[:, :, head], weight_BTS @ values_BSH, atol=1e-5)


def test_two_blocks_equal_their_concatenation_and_large_scores_do_not_overflow():
    q_BTNH, keys_CSKH, values_CSKH = 100 * normal(0, 2, 3, 4, 6), normal(1, 2, 5, 2, 6), normal(2, 2, 5, 2, 6)
    is_visible_BTS = jnp.ones((2, 3, 5), bool).at[0, :, 1].set(False).at[1, 2, 2:].set(False)
    whole = block(keys_CSKH, values_CSKH, is_visible_BTS)
    halves = [
        block(keys_CSKH[:, part], values_CSKH[:, part], is_visible_BTS[:, :, part])
        for part in (slice(2, 5), slice(0, 2))
    ]
    expected_BTNH = attend(q_BTNH, [whole])
    assert np.isfinite(expected_BTNH).all()
    np.testing.assert_allclose(attend(q_BTNH, halves), expected_BTNH, atol=1e-5)


def test_shared_key_rows_equal_repeated_ones_in_value_and_gradient():
    q_BTNH, keys_CSKH, values_CSKH = normal(0, 6, 3, 4, 6), normal(1, 2, 5, 2, 6), normal(2, 2, 5, 2, 6)
    is_visible_BTS = (jax.random.uniform(jax.random.key(3), (6, 3, 5)) < 0.6).at[:, :, 0].set(True)

    def loss(keys_CSKH, values_CSKH, num_repeats):
        keys, values = jnp.repeat(keys_CSKH, num_repeats, axis=0), jnp.repeat(values_CSKH, num_repeats, axis=0)
        out_BTNH = attend(q_BTNH, [block(keys, values, is_visible_BTS)])
        return jnp.sin(out_BTNH).sum(), out_BTNH

    gradient_of = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    shared, repeated = gradient_of(keys_CSKH, values_CSKH, 1), gradient_of(keys_CSKH, values_CSKH, 3)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), shared, repeated)


def test_visibility_by_hand():
    own_TT = attention.own_visibility(jnp.array([[0, 1, 0, 0]]), jnp.array([[1, 1, 2, 0]])).mask_BTS()[0]
    np.testing.assert_array_equal(own_TT, np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool))
    positions_BT = jnp.array([[2, 3], [0, 1]])
    cached_BTS = attention.cache_visibility(positions_BT, jnp.array([[1, 0], [1, 1]]), jnp.array([2, 0]), 3).mask_BTS()
    np.testing.assert_array_equal(cached_BTS, np.array([[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]], bool))


def packed_rows(num_rows, num_tokens):
    """Two segments a row, the second twice as long as the first, and padding behind them."""
    lengths = (num_tokens // 4, num_tokens // 2)
    segments_T = np.repeat([1, 2, 0], [*lengths, num_tokens - sum(lengths)])
    positions_T = np.concatenate([np.arange((segments_T == number).sum()) for number in (1, 2, 0)])
    return [jnp.tile(x_T[None], (num_rows, 1)) for x_T in (positions_T, segments_T)]


def test_chunked_equals_xla_in_value_and_gradient(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_CHUNK", 3)  # 3, 3, 2: the last one is padded
    monkeypatch.setattr(attention, "KEY_CHUNK", 2)  # of three cached keys too
    positions_BT, segments_BT = packed_rows(4, 8)
    own = attention.own_visibility(positions_BT, segments_BT)
    cached = attention.cache_visibility(positions_BT + 3, segments_BT, jnp.array([3, 1, 2, 0]), 3)
    q_BTNH, own_keys, own_values = normal(0, 4, 8, 4, 6), normal(1, 4, 8, 2, 6), normal(2, 4, 8, 2, 6)
    cache_keys, cache_values = normal(3, 2, 3, 2, 6), normal(4, 2, 3, 2, 6)  # shared by two rows each

    def loss(arrays, implementation):
        q_BTNH, own_keys, own_values, cache_keys, cache_values = arrays
        blocks = [
            attention.KeyBlock(*attention.for_products(own_keys, own_values), own),
            attention.KeyBlock(*attention.for_products(cache_keys, cache_values), cached),
        ]
        out_BTNH = attention.attend(q_BTNH, blocks, implementation)
        return jnp.sin(out_BTNH).sum(), out_BTNH

    gradient_of = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    arrays = (q_BTNH, own_keys, own_values, cache_keys, cache_values)
    actual, expected = gradient_of(arrays, "chunked"), gradient_of(arrays, "xla")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), actual, expected)


def test_chunked_memory_grows_with_the_length_not_its_square():
    def temporary_bytes(num_tokens, implementation):
        visibility = attention.own_visibility(*packed_rows(1, num_tokens))

        def loss(q_BTNH, keys_BSKH, values_BSKH):
            own = attention.KeyBlock(*attention.for_products(keys_BSKH, values_BSKH), visibility)
            return jnp.sin(attention.attend(q_BTNH, [own], implementation)).sum()

        shapes = [jax.ShapeDtypeStruct((1, num_tokens, num_heads, 8), jnp.float32) for num_heads in (2, 1, 1)]
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = (temporary_bytes(num_tokens, "chunked") for num_tokens in (4096, 8192))
    # What grows is the arrays of the tokens, about ten of 2 heads of 8: a chunk's scores of twice the keys would be
    # 2 x 256 x 4096 x 4 bytes more, 8 MiB.
    assert large - small < 4096 * 16 * 4 * 12
    assert small < temporary_bytes(4096, "xla") / 30


def test_auto_goes_by_platform_dtype_and_length():
    def choice(platform, num_tokens, dtype=jnp.bfloat16, num_blocks=1, head_dim=8):
        keys = jax.ShapeDtypeStruct((1, 2, head_dim, num_tokens), dtype)
        blocks = [attention.KeyBlock(keys, None, None)] * num_blocks
        return attention.choose(jax.ShapeDtypeStruct((1, num_tokens, 4, head_dim), dtype), blocks, platform)

    assert choice("cpu", 64) == choice("gpu", 64, jnp.float32) == choice("gpu", 1) == "xla"
    assert choice("cpu", 4096) == choice("gpu", 4096, jnp.float32) == choice("tpu", 4096) == "chunked"
    assert choice("gpu", 64) == choice("gpu", 4096) == "cudnn"
    assert choice("gpu", 64, num_blocks=2) == choice("tpu", 64, head_dim=128) == "xla"
    assert choice("tpu", 4096, head_dim=128) == choice("tpu", 4096, jnp.float32, head_dim=128) == "splash"
    assert choice("tpu", 4096, num_blocks=2, head_dim=128) == "chunked"


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "head_dim"), [("pallas", 16), ("splash", 128)])
def test_kernels_of_accelerators_equal_xla_when_interpreted(implementation, head_dim):
    """Packed rows, grouped heads, a length that is no whole number of tiles; the logic alone, no accelerator."""
    positions_BT, segments_BT = packed_rows(2, 140)
    visibility = attention.own_visibility(positions_BT, segments_BT)

    def loss(arrays, implementation):
        own = attention.KeyBlock(*attention.for_products(*arrays[1:]), visibility)
        out_BTNH = attention.attend(arrays[0], [own], implementation)
        out_BTNH = jnp.where((segments_BT > 0)[:, :, None, None], out_BTNH, 0.0)
        return jnp.sin(out_BTNH).sum(), out_BTNH

    gradient_of = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    arrays = [normal(number, 2, 140, num_heads, head_dim) for number, num_heads in enumerate((4, 2, 2))]
    actual, expected = gradient_of(arrays, implementation), gradient_of(arrays, "xla")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), actual, expected)


def test_unknown_implementation_and_rows_that_do_not_divide_are_refused():
    block = attention.KeyBlock(normal(0, 2, 5, 1, 6), normal(1, 2, 5, 1, 6), Mask(jnp.ones((3, 1, 5), bool)))
    with pytest.raises(ValueError, match="2 blocks of keys: it takes one"):
        attention.attend(normal(2, 2, 1, 1, 6), [block, block], implementation="pallas")
    with pytest.raises(ValueError, match='"cudnn" in float32'):
        attention.attend(normal(2, 2, 1, 1, 6), [block], implementation="cudnn")
    with pytest.raises(ValueError, match="flash9"):
        attention.attend(normal(2, 2, 1, 1, 6), [block], implementation="flash9")
    with pytest.raises(ValueError, match="3 token rows over 2 key rows"):
        attention.attend(normal(2, 3, 1, 1, 6), [block])
