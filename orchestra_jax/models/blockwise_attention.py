"""The same attention a tile at a time: chunks of queries against chunks of keys, under a running maximum and sum.

    m' = max(m, max_s x_s)    l' = l e^(m - m') + sum_s e^(x_s - m')    o' = o e^(m - m') + sum_s e^(x_s - m') v_s

A tile of scores is all that exists of them, forward and backward, whatever the length: the forward pass keeps the
logsumexp of each query, from which the backward pass forms the weights of a tile again (FlashAttention-2, arXiv
2307.08691, algorithms 1 and 2). Tiles in which no query sees a key are skipped. In plain JAX: for any platform, any
number of blocks (attention.KeyBlock), rows that share keys, segments and positions in any order.

Legend: B token rows, C cache rows (B = C * G), T tokens, I chunks of W tokens, S keys of a block, Z keys of a chunk,
N query heads (N = K * R), K key-value heads, R query heads of one key-value head, H head dim, U = G * W.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that the maximum of a row that has seen nothing is no NaN's source
NO_QUERY = -2  # the segment of padded queries
NO_KEY = -1  # of padded keys, which no query is of
SMALLEST = 1e-37  # what a sum of no weights is divided as


class Sizes(NamedTuple):
    """Static: W and Z."""

    query_chunk: int
    key_chunk: int


class _Queries(NamedTuple):
    """Of one block, in its layout; I in front. Gradients and logsumexps in the backward pass alone."""

    q_ICKURH: jax.Array
    segments_ICGW: jax.Array
    positions_ICGW: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(sizes, q_BTNH, blocks):
    """-> [B, T, N, H] in the dtype of the queries; 0 for a query that sees no key. Sums in float32."""
    return _forward(sizes, q_BTNH, blocks)[0]


def _forward(sizes, q_BTNH, blocks):
    num_rows, _, num_heads, head_dim = q_BTNH.shape
    scaled_q_BTNH = q_BTNH * head_dim**-0.5
    queries = [_queries(sizes, scaled_q_BTNH, block) for block in blocks]
    keys = [_key_chunks(sizes, block) for block in blocks]

    def attend_chunk(queries):
        parts = [_partial_softmax(*pair) for pair in zip(queries, keys, strict=True)]
        parts = [[_token_rows(x, num_rows) for x in part] for part in parts]
        maximum_BWKR = functools.reduce(jnp.maximum, [maximum for maximum, _, _ in parts])
        total_BWKR = sum(total * jnp.exp(maximum - maximum_BWKR) for maximum, total, _ in parts)
        out_BWKRH = sum(out * jnp.exp(maximum - maximum_BWKR)[..., None] for maximum, _, out in parts)
        total_BWKR = jnp.maximum(total_BWKR, SMALLEST)
        out_BWNH = (out_BWKRH / total_BWKR[..., None]).reshape(num_rows, -1, num_heads, head_dim)
        return out_BWNH.astype(q_BTNH.dtype), maximum_BWKR + jnp.log(total_BWKR)

    out_IBWNH, normalizer_IBWKR = jax.lax.map(attend_chunk, queries)
    out_BTNH = _joined(out_IBWNH, q_BTNH.shape[1])
    return out_BTNH, (q_BTNH, blocks, out_BTNH, _joined(normalizer_IBWKR, q_BTNH.shape[1]))


def _partial_softmax(queries, keys):
    """Maximum, sum and weighted values [C, K, U, R(, H)] of one chunk of queries over the keys of one block."""
    q_CKURH, segments_CGW, positions_CGW = queries

    def add_tile(carry, tile):
        keys_CKHZ, values_CKZH, *visibility = tile
        is_visible_CUZ = _is_visible(segments_CGW, positions_CGW, *visibility)

        def add(carry):
            maximum_CKUR, total_CKUR, out_CKURH = carry
            score_CKURZ = _scores(q_CKURH, keys_CKHZ, is_visible_CUZ)
            higher_CKUR = jnp.maximum(maximum_CKUR, score_CKURZ.max(axis=-1))
            weight_CKURZ = jnp.where(
                is_visible_CUZ[:, None, :, None], jnp.exp(score_CKURZ - higher_CKUR[..., None]), 0.0
            )
            shrink_CKUR = jnp.exp(maximum_CKUR - higher_CKUR)
            weighted_CKURH = _product("CKURZ,CKZH->CKURH", weight_CKURZ.astype(values_CKZH.dtype), values_CKZH)
            total_CKUR = total_CKUR * shrink_CKUR + weight_CKURZ.sum(axis=-1)
            return higher_CKUR, total_CKUR, out_CKURH * shrink_CKUR[..., None] + weighted_CKURH

        return jax.lax.cond(is_visible_CUZ.any(), add, lambda carry: carry, carry), None

    zeros_CKUR = jnp.zeros(q_CKURH.shape[:-1], jnp.float32)
    carry = zeros_CKUR + MASKED, zeros_CKUR, jnp.zeros(q_CKURH.shape, jnp.float32)
    return jax.lax.scan(add_tile, carry, keys)[0]


def _backward(sizes, residuals, cotangent_BTNH):
    q_BTNH, blocks, out_BTNH, normalizer_BTKR = residuals
    scale = q_BTNH.shape[-1] ** -0.5
    product_BTN = (cotangent_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)).sum(axis=-1)
    per_query = (_heads(cotangent_BTNH, blocks[0]), normalizer_BTKR, product_BTN.reshape(normalizer_BTKR.shape))
    q_gradient_BTNH, block_gradients = 0.0, []
    for block in blocks:
        num_rows = block.keys_CKHS.shape[0]
        queries = _queries(sizes, q_BTNH * scale, block)
        # A padded query has a logsumexp of 0 and sees nothing.
        others = [_block_rows(x, sizes.query_chunk, num_rows) for x in per_query]
        q_gradient_ICKURH, (keys_XCKHZ, values_XCKZH) = _tile_gradients(queries, others, _key_chunks(sizes, block))
        q_gradient_IBWKRH = jax.vmap(lambda x: _token_rows(x, len(q_BTNH)))(q_gradient_ICKURH)
        q_gradient_BTNH += scale * _joined(q_gradient_IBWKRH, q_BTNH.shape[1]).reshape(q_BTNH.shape)
        num_slots = block.keys_CKHS.shape[-1]
        keys_CKHS = jnp.moveaxis(keys_XCKHZ, 0, -2).reshape(*block.keys_CKHS.shape[:-1], -1)[..., :num_slots]
        values_CKSH = jnp.moveaxis(values_XCKZH, 0, 2)
        values_CKSH = values_CKSH.reshape(*block.keys_CKHS.shape[:2], -1, values_CKSH.shape[-1])[:, :, :num_slots]
        block_gradients.append(
            block._replace(
                keys_CKHS=keys_CKHS.astype(block.keys_CKHS.dtype),
                values_CKSH=values_CKSH.astype(block.values_CKSH.dtype),
                visibility=None,
            )
        )
    return q_gradient_BTNH.astype(q_BTNH.dtype), block_gradients


attend.defvjp(_forward, _backward)


def _tile_gradients(queries, others, keys):
    """(by the scaled queries [I, C, K, U, R, H], (by the keys [X, C, K, H, Z], by the values [X, C, K, Z, H]))."""

    def of_keys(q_gradient_ICKURH, tile):
        keys_CKHZ, values_CKZH, *visibility = tile

        def of_queries(carry, chunk):
            number, (q_CKURH, segments_CGW, positions_CGW), (cotangent_CKURH, normalizer_CKUR, product_CKUR) = chunk
            is_visible_CUZ = _is_visible(segments_CGW, positions_CGW, *visibility)

            def gradients():
                score_CKURZ = _scores(q_CKURH, keys_CKHZ, is_visible_CUZ)
                weight_CKURZ = jnp.exp(score_CKURZ - normalizer_CKUR[..., None])
                weight_CKURZ = jnp.where(is_visible_CUZ[:, None, :, None], weight_CKURZ, 0.0)
                by_weight_CKURZ = _product("CKURH,CKZH->CKURZ", cotangent_CKURH, values_CKZH)
                by_score_CKURZ = weight_CKURZ * (by_weight_CKURZ - product_CKUR[..., None])
                by_score_CKURZ = by_score_CKURZ.astype(q_CKURH.dtype)
                weight_CKURZ = weight_CKURZ.astype(cotangent_CKURH.dtype)
                return (
                    _product("CKURZ,CKHZ->CKURH", by_score_CKURZ, keys_CKHZ),
                    _product("CKURZ,CKURH->CKHZ", by_score_CKURZ, q_CKURH),
                    _product("CKURZ,CKURH->CKZH", weight_CKURZ, cotangent_CKURH),
                )

            # The sums stay outside of the branch, which would copy what it is handed.
            by_query_CKURH, by_key_CKHZ, by_value_CKZH = jax.lax.cond(
                is_visible_CUZ.any(), gradients, lambda: tuple(map(zeros_like, (q_CKURH, keys_CKHZ, values_CKZH)))
            )
            q_gradient_ICKURH, keys_sum_CKHZ, values_sum_CKZH = carry
            q_gradient_ICKURH = q_gradient_ICKURH.at[number].add(by_query_CKURH)
            return (q_gradient_ICKURH, keys_sum_CKHZ + by_key_CKHZ, values_sum_CKZH + by_value_CKZH), None

        numbers_I = jnp.arange(len(q_gradient_ICKURH))
        carry = q_gradient_ICKURH, zeros_like(keys_CKHZ), zeros_like(values_CKZH)
        carry, _ = jax.lax.scan(of_queries, carry, (numbers_I, tuple(queries), tuple(others)))
        return carry[0], carry[1:]

    def zeros_like(x):
        return jnp.zeros(x.shape, jnp.float32)

    return jax.lax.scan(of_keys, zeros_like(queries.q_ICKURH), keys)


def _is_visible(segments_CGW, positions_CGW, key_segments_CGZ, key_positions_CGZ):
    is_same = segments_CGW[..., None] == key_segments_CGZ[:, :, None]
    is_visible_CGWZ = is_same & (key_positions_CGZ[:, :, None] <= positions_CGW[..., None])
    return is_visible_CGWZ.reshape(len(segments_CGW), -1, key_segments_CGZ.shape[-1])


def _scores(q_CKURH, keys_CKHZ, is_visible_CUZ):
    score_CKURZ = _product("CKURH,CKHZ->CKURZ", q_CKURH, keys_CKHZ)
    return jnp.where(is_visible_CUZ[:, None, :, None], score_CKURZ, MASKED)


def _product(dims, *operands):
    return jnp.einsum(dims, *operands, preferred_element_type=jnp.float32)


def _queries(sizes, q_BTNH, block):
    num_rows = len(block.keys_CKHS)

    def rows(x_BT, fill):
        x_IBW = _chunks(x_BT, sizes.query_chunk, fill)
        return x_IBW.reshape(len(x_IBW), num_rows, -1, x_IBW.shape[-1])

    return _Queries(
        _block_rows(_heads(q_BTNH, block), sizes.query_chunk, num_rows),
        rows(block.visibility.query_segments_BT, NO_QUERY),
        rows(block.visibility.query_positions_BT, 0),
    )


def _heads(x_BTNH, block):
    """[B, T, N, H] -> [B, T, K, R, H]"""
    return x_BTNH.reshape(*x_BTNH.shape[:2], block.keys_CKHS.shape[1], -1, x_BTNH.shape[-1])


def _key_chunks(sizes, block):
    """(keys [X, C, K, H, Z], values [X, C, K, Z, H], segments and positions [X, C, G, Z]), X chunks."""
    num_rows, *_, num_slots = block.keys_CKHS.shape
    width = min(sizes.key_chunk, num_slots)

    def split(x, axis, fill=0):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, -num_slots % width)
        x = jnp.pad(x, padding, constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, width, *x.shape[axis + 1 :]), axis, 0)

    segments_BS, positions_BS = block.visibility.key_segments_BS, block.visibility.key_positions_BS
    segments_CGS, positions_CGS = (x.reshape(num_rows, -1, num_slots) for x in (segments_BS, positions_BS))
    return (
        split(block.keys_CKHS, 3),
        split(block.values_CKSH, 2),
        split(segments_CGS, 2, NO_KEY),
        split(positions_CGS, 2),
    )


def _chunks(x_BT, width, fill):
    """[B, T, ...] -> [I, B, W, ...]"""
    num_tokens = x_BT.shape[1]
    width = min(width, num_tokens)
    padding = [(0, 0), (0, -num_tokens % width)] + [(0, 0)] * (x_BT.ndim - 2)
    padded_BT = jnp.pad(x_BT, padding, constant_values=fill)
    return jnp.moveaxis(padded_BT.reshape(len(x_BT), -1, width, *x_BT.shape[2:]), 1, 0)


def _joined(x_IBW, num_tokens):
    """[I, B, W, ...] -> [B, T, ...]"""
    x_BIW = jnp.moveaxis(x_IBW, 0, 1)
    return x_BIW.reshape(len(x_BIW), -1, *x_BIW.shape[3:])[:, :num_tokens]


def _block_rows(x_BTKR, width, num_rows):
    """[B, T, K, R, ...] -> [I, C, K, U, R, ...]"""
    x_IBWKR = _chunks(x_BTKR, width, 0)
    x_ICUKR = x_IBWKR.reshape(len(x_IBWKR), num_rows, -1, *x_IBWKR.shape[3:])
    return x_ICUKR.swapaxes(2, 3)


def _token_rows(x_CKUR, num_rows):
    """[C, K, U, R, ...] -> [B, W, K, R, ...]"""
    x_CUKR = x_CKUR.swapaxes(1, 2)
    return x_CUKR.reshape(num_rows, -1, *x_CUKR.shape[2:])
