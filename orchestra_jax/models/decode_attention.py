"""Attention of one new token a row over its cache, on NVIDIA GPUs: a kernel that reads each filled slot once.

    scores x_s = q . k_s / sqrt(H)    a part of the slots: m = max x_s, l = sum e^(x_s - m), o = sum e^(x_s - m) v_s
    parts and the token itself:       out = sum_parts e^(m - M) o / sum_parts e^(m - M) l,    M = max m

The slots of a row are cut into parts that run side by side, so that few rows fill the GPU too (Flash-Decoding, Dao et
al. 2023). The R query heads of a key head share what is read; slots behind a row's length are not read. The cache comes
as the stack of all layers with the layer's number, for a slice of the stack would be a copy of it. Pallas, by Triton.

Legend: C rows, K key-value heads, R query heads of one, N = K * R, H head dim, L layers, S cache slots, X parts, Z
slots of a tile, M rows of a tile of queries.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a part of no slots weighs 0
TILE = 64  # slots that are read at a time
NUM_PROGRAMS = 1024  # there should be, or more: eight to each of an H200's multiprocessors
MIN_ROWS = 16  # of a tile of queries: what a tensor core takes
MAX_HEAD_DIM = 128  # beyond, the tiles that are under way would fill a multiprocessor's memory


class CacheStack(NamedTuple):
    keys_LCKHS: jax.Array
    values_LCKSH: jax.Array
    lengths_C: jax.Array  # int32: filled slots, at most S


def can_attend(config, cache, num_tokens: int) -> bool:
    """Whether the kernel serves `num_tokens` new tokens a row of `cache` (kv_cache.KVCache) on the platform at hand."""
    num_rows, head_dim, num_slots = cache.keys_LCKHS.shape[1], config.head_dim, cache.num_slots
    return (
        jax.default_backend() == "gpu"
        and config.attention == "auto"
        and num_tokens == 1
        and len(cache.lengths_B) == num_rows
        and cache.keys_LCKHS.dtype.itemsize == 2
        and num_slots % TILE == 0
        and MIN_ROWS <= head_dim <= MAX_HEAD_DIM
        and head_dim & (head_dim - 1) == 0
        and jax.sharding.get_abstract_mesh().empty  # the compiler cannot split a kernel
    )


def attend(q_C1NH, k_C1KH, v_C1KH, stack: CacheStack, layer):
    """Attention of each row's new token over the first `lengths_C` slots and itself -> [C, 1, N, H], q's dtype.

    layer: int32, which of the stack's layers is read. The softmax is float32.
    """
    num_rows, _, num_heads, head_dim = q_C1NH.shape
    num_kv_heads = k_C1KH.shape[2]
    q_CKRH = (q_C1NH * head_dim**-0.5).reshape(num_rows, num_kv_heads, -1, head_dim)
    maximum_CKXR, total_CKXR, out_CKXRH = attend_parts(q_CKRH, stack, layer, jax.default_backend() == "cpu")
    own_CKR = (q_CKRH.astype(jnp.float32) * k_C1KH[:, 0, :, None].astype(jnp.float32)).sum(axis=-1)
    highest_CKR = jnp.maximum(maximum_CKXR.max(axis=2), own_CKR)
    weight_CKXR = jnp.exp(maximum_CKXR - highest_CKR[:, :, None])
    own_weight_CKR = jnp.exp(own_CKR - highest_CKR)
    total_CKR = (weight_CKXR * total_CKXR).sum(axis=2) + own_weight_CKR
    own_CKRH = own_weight_CKR[..., None] * v_C1KH[:, 0, :, None].astype(jnp.float32)
    out_CKRH = ((weight_CKXR[..., None] * out_CKXRH).sum(axis=2) + own_CKRH) / total_CKR[..., None]
    return out_CKRH.reshape(q_C1NH.shape).astype(q_C1NH.dtype)


def attend_parts(q_CKRH, stack: CacheStack, layer, is_interpreted: bool):
    """(maximum, sum, weighted values) of each part of the slots: [C, K, X, R(, H)], float32."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    num_rows, num_kv_heads, num_queries, head_dim = q_CKRH.shape
    num_tiles = -(-stack.keys_LCKHS.shape[-1] // TILE)
    num_parts = min(num_tiles, -(-NUM_PROGRAMS // (num_rows * num_kv_heads)))
    part_slots = -(-num_tiles // num_parts) * TILE
    num_padded = max(MIN_ROWS, 1 << (num_queries - 1).bit_length())
    q_CKMH = jnp.pad(q_CKRH, ((0, 0), (0, 0), (0, num_padded - num_queries), (0, 0)))
    part = (None, None, None, num_padded)
    out_shape = (num_rows, num_kv_heads, num_parts, num_padded)
    outputs = pl.pallas_call(
        functools.partial(_attend_part, num_queries, part_slots),
        grid=(num_rows, num_kv_heads, num_parts),
        in_specs=[
            pl.BlockSpec((1,), lambda c, k, x: (0,)),
            pl.BlockSpec((1,), lambda c, k, x: (c,)),
            pl.BlockSpec((None, None, num_padded, head_dim), lambda c, k, x: (c, k, 0, 0)),
            pl.BlockSpec(stack.keys_LCKHS.shape, lambda c, k, x: (0,) * 5),
            pl.BlockSpec(stack.values_LCKSH.shape, lambda c, k, x: (0,) * 5),
        ],
        out_specs=[
            pl.BlockSpec(part, lambda c, k, x: (c, k, x, 0)),
            pl.BlockSpec(part, lambda c, k, x: (c, k, x, 0)),
            pl.BlockSpec((*part, head_dim), lambda c, k, x: (c, k, x, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(out_shape, jnp.float32),
            jax.ShapeDtypeStruct(out_shape, jnp.float32),
            jax.ShapeDtypeStruct((*out_shape, head_dim), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=is_interpreted,
        name="decode_attention",
    )(jnp.reshape(layer, 1), stack.lengths_C, q_CKMH, stack.keys_LCKHS, stack.values_LCKSH)
    return [x[:, :, :, :num_queries] for x in outputs]


def _attend_part(
    num_queries, part_slots, layer_ref, length_ref, q_ref, keys_ref, values_ref, maximum_ref, total_ref, out_ref
):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    row, head, part = (pl.program_id(axis) for axis in range(3))
    layer = layer_ref[0]
    start = part * part_slots
    stop = jnp.minimum(length_ref[0], start + part_slots)
    q_MH = q_ref[...]

    def add_tile(number, carry):
        maximum_M, total_M, out_MH = carry
        slots = pl.ds(start + number * TILE, TILE)
        keys_HZ = keys_ref[layer, row, head, :, slots]
        score_MZ = plgpu.dot(q_MH, keys_HZ)
        is_filled_Z = start + number * TILE + jnp.arange(TILE) < stop
        score_MZ = jnp.where(is_filled_Z[None, :], score_MZ, MASKED)
        higher_M = jnp.maximum(maximum_M, score_MZ.max(axis=1))
        weight_MZ = jnp.exp(score_MZ - higher_M[:, None])
        shrink_M = jnp.exp(maximum_M - higher_M)
        values_ZH = values_ref[layer, row, head, slots, :]
        out_MH = out_MH * shrink_M[:, None] + plgpu.dot(weight_MZ.astype(values_ZH.dtype), values_ZH)
        return higher_M, total_M * shrink_M + weight_MZ.sum(axis=1), out_MH

    zeros_M = jnp.zeros(q_MH.shape[0], jnp.float32)
    carry = zeros_M + MASKED, zeros_M, jnp.zeros(q_MH.shape, jnp.float32)
    num_tiles = pl.cdiv(jnp.maximum(stop - start, 0), TILE)
    maximum_ref[...], total_ref[...], out_MH = jax.lax.fori_loop(0, num_tiles, add_tile, carry)
    is_real_M = jnp.arange(q_MH.shape[0]) < num_queries
    plgpu.store(out_ref, out_MH, mask=jnp.broadcast_to(is_real_M[:, None], out_MH.shape))
