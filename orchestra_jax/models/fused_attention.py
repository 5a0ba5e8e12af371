"""Fused kernels of others behind the one function of attention.py: cuDNN, Pallas on GPUs, splash on TPUs.

Each takes one block of keys, without a cache. The two of Pallas know packed rows by their segments and order by index:
a row's positions must rise along each segment, as all packed rows of the learner do; they never hold a mask of T x S,
which cuDNN reads as a bias unless it is told the segments' lengths. On a CPU they run interpreted, for tests.

Legend: B token rows, T tokens, S keys, N query heads, K key-value heads, H head dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

TILE = 128  # the kernels' own blocks: rows are padded to whole ones
PADDING_SEGMENT = -2  # sees itself alone


def attend_cudnn(q_BTNH, blocks):
    """NVIDIA's fused kernel, bfloat16 or float16: packed rows by the lengths of their segments, others by a mask."""
    if q_BTNH.dtype.itemsize != 2:
        raise ValueError(f'attention "cudnn" in {q_BTNH.dtype}: it takes bfloat16 or float16; choose "auto"')
    keys_BSKH, values_BSKH, visibility = _own_keys("cudnn", q_BTNH, blocks)
    if visibility.segment_lengths_BM is not None and _takes_segments():
        return _attend_segments(q_BTNH, keys_BSKH, values_BSKH, visibility.segment_lengths_BM)
    mask_B1TS = visibility.mask_BTS()[:, None]
    return jax.nn.dot_product_attention(q_BTNH, keys_BSKH, values_BSKH, mask=mask_B1TS, implementation="cudnn")


def _takes_segments():
    """Hopper or later; and jax 0.11, for 0.10 counts the keys' offsets in the heads of the queries."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return jax.__version_info__ >= (0, 11) and cudnn.check_compute_capability("9.0")


def _attend_segments(q_BTNH, keys_BSKH, values_BSKH, segment_lengths_BM):
    # jax.nn does not pass the segments of a row on, so the function behind it is called.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    if q_BTNH.size >= 2**31:
        raise ValueError(
            f'attention "cudnn" over {q_BTNH.size:,} numbers of queries: the kernel counts them in 32 bits, take fewer '
            "rows at a time"
        )
    lengths_BM, starts_BM = cudnn_segments(segment_lengths_BM, q_BTNH.shape[1])
    return cudnn.dot_product_attention(
        q_BTNH, keys_BSKH, values_BSKH, q_seqlen=lengths_BM, kv_seqlen=lengths_BM, q_offsets=starts_BM,
        kv_offsets=starts_BM, scale=q_BTNH.shape[-1] ** -0.5, mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )  # fmt: skip


def cudnn_segments(segment_lengths_BM, num_tokens):
    """-> (lengths [B, M + 1], starts [B, M + 2]), int32, as cuDNN takes them: -1 for none.

    The padding is a segment of its own, so that the kernel leaves no token's output unwritten.
    """
    padding_B1 = num_tokens - segment_lengths_BM.sum(axis=1, keepdims=True)
    lengths_BM = jnp.concatenate([segment_lengths_BM, padding_B1], axis=1).astype(jnp.int32)
    starts_BM = jnp.where(lengths_BM > 0, jnp.cumsum(lengths_BM, axis=1) - lengths_BM, -1)
    starts_BM = jnp.pad(starts_BM, [(0, 0), (0, 1)], constant_values=-1)
    return jnp.where(lengths_BM > 0, lengths_BM, -1), starts_BM


def attend_pallas(q_BTNH, blocks):
    """The FlashAttention of jax.experimental.pallas.ops.gpu: Triton, NVIDIA's Ampere and newer."""
    from jax.experimental.pallas.ops.gpu import attention

    keys_BSKH, values_BSKH, visibility = _own_keys("pallas", q_BTNH, blocks)
    num_tokens, num_queries = q_BTNH.shape[1], q_BTNH.shape[2] // keys_BSKH.shape[2]
    arrays = [q_BTNH, *(jnp.repeat(x, num_queries, axis=2) for x in (keys_BSKH, values_BSKH))]
    arrays = [_padded(x, 0) for x in arrays]
    segments_BT = _padded(visibility.query_segments_BT, PADDING_SEGMENT)
    out_BTNH = attention.mha(
        *arrays, segments_BT, sm_scale=q_BTNH.shape[-1] ** -0.5, causal=True, interpret=_is_interpreted()
    )
    return out_BTNH[:, :num_tokens]


def attend_splash(q_BTNH, blocks):
    """The splash attention of jax.experimental.pallas.ops.tpu, whose head dim is a multiple of 128."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    num_tokens, num_heads, head_dim = q_BTNH.shape[1:]
    if head_dim % TILE:
        raise ValueError(f'attention "splash" with head_dim {head_dim}: it takes multiples of {TILE}; choose "auto"')
    keys_BSKH, values_BSKH, visibility = _own_keys("splash", q_BTNH, blocks)
    arrays = [jnp.moveaxis(_padded(x, 0), 2, 1) for x in (q_BTNH * head_dim**-0.5, keys_BSKH, values_BSKH)]
    segments_BT = _padded(visibility.query_segments_BT, PADDING_SEGMENT)
    segment_ids = splash_attention_kernel.SegmentIds(segments_BT, segments_BT)
    kernel = _splash_kernel(num_heads, segments_BT.shape[1], _is_interpreted())
    return jnp.moveaxis(jax.vmap(kernel)(*arrays, segment_ids), 1, 2)[:, :num_tokens].astype(q_BTNH.dtype)


@functools.lru_cache(maxsize=32)
def _splash_kernel(num_heads, num_tokens, is_interpreted):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    causal = splash_attention_mask.CausalMask((num_tokens, num_tokens))
    mask = splash_attention_mask.MultiHeadMask([causal] * num_heads)
    with jax.ensure_compile_time_eval():
        return splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, interpret=is_interpreted)


def _own_keys(name, q_BTNH, blocks):
    """(keys and values [B, S, K, H], visibility) of the one block; ValueError if there are more, or other keys."""
    if len(blocks) != 1 or blocks[0].keys_CKHS.shape[-1] != q_BTNH.shape[1]:
        raise ValueError(
            f'attention "{name}" over {len(blocks)} blocks of keys: it takes one, the tokens\' own, without a cache; '
            'choose "auto"'
        )
    (block,) = blocks
    num_repeats = q_BTNH.shape[0] // block.keys_CKHS.shape[0]
    keys_BSKH = jnp.repeat(jnp.moveaxis(block.keys_CKHS, -1, 1), num_repeats, axis=0)
    values_BSKH = jnp.repeat(jnp.moveaxis(block.values_CKSH, 2, 1), num_repeats, axis=0)
    return keys_BSKH, values_BSKH, block.visibility


def _padded(x_BT, fill):
    padding = [(0, 0), (0, -x_BT.shape[1] % TILE)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, padding, constant_values=fill)


def _is_interpreted():
    return jax.default_backend() == "cpu"
