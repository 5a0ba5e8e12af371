"""Grouped-query attention over blocks of keys under one softmax. Not the projections, not the cache's bookkeeping.

    out[t] = sum_s softmax_s(q[t] . k[s] / sqrt(H) where s is visible to t) v[s]

The keys come in one or two blocks: the cache's (if there is one) and the new tokens' own. The blocks' scores share one
maximum and one denominator (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"), so the blocks
are never concatenated. Key heads are never repeated: the R query heads of a key head are rows of the same product.

Legend: B token rows, C cache rows (B = C * G), G token rows that share a cache row, T new tokens, S keys of a block,
N query heads (N = K * R), K key-value heads, R query heads of one key-value head, H head dim, U = G * T.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from orchestra_jax.models import blockwise_attention, fused_attention

MASKED_SCORE = -1e30  # finite: a fully masked block gives weights of 0 after the shared maximum, never NaN
NO_SEGMENT = -1  # of a key that no token sees
BEFORE_ALL = -1  # the position of a key that every token of its segment sees
QUERY_CHUNK, KEY_CHUNK = 256, 512  # that "chunked" scores at a time
CHUNKED_FROM = 2048 * 2048  # scores of a head from which on "auto" no longer holds all of them at once


class Visibility(NamedTuple):
    """A token sees the keys of its own segment at its own or an earlier position. Key row c serves B / C token rows.

    `segment_lengths_BM`: the lengths of a row's segments, where they lie side by side from its first slot on with the
    padding behind; 0 for none. A fused kernel that knows them holds no mask.
    """

    query_segments_BT: jax.Array
    query_positions_BT: jax.Array
    key_segments_BS: jax.Array
    key_positions_BS: jax.Array
    segment_lengths_BM: jax.Array | None = None

    def mask_BTS(self):
        is_same_BTS = self.query_segments_BT[:, :, None] == self.key_segments_BS[:, None, :]
        return is_same_BTS & (self.key_positions_BS[:, None, :] <= self.query_positions_BT[:, :, None])


class KeyBlock(NamedTuple):
    """Keys and values with who may see them. Token row b reads cache row b // (B // C).

    The two lie as the products over them read them: a cache in another order would be transposed at every token.
    """

    keys_CKHS: jax.Array
    values_CKSH: jax.Array
    visibility: Visibility


def for_products(keys_XSKH, values_XSKH):
    """Keys [..., S, K, H] and values [..., S, K, H] as a KeyBlock holds them: [..., K, H, S] and [..., K, S, H]."""
    return jnp.moveaxis(keys_XSKH, -3, -1), jnp.moveaxis(values_XSKH, -3, -2)


def own_visibility(positions_BT, segment_ids_BT, segment_lengths_BM=None) -> Visibility:
    """Of new tokens among themselves (padding, id 0, sees padding)."""
    return Visibility(segment_ids_BT, positions_BT, segment_ids_BT, positions_BT, segment_lengths_BM)


def cache_visibility(positions_BT, segment_ids_BT, lengths_B, num_slots) -> Visibility:
    """Tokens of segment 1 see the first `lengths_B` slots, all of them earlier tokens."""
    is_filled_BS = jnp.arange(num_slots)[None, :] < lengths_B[:, None]
    key_segments_BS = jnp.where(is_filled_BS, 1, NO_SEGMENT)
    return Visibility(segment_ids_BT, positions_BT, key_segments_BS, jnp.full_like(key_segments_BS, BEFORE_ALL))


def attend(q_BTNH, blocks, implementation="auto"):
    """Attention of the queries over all `blocks` (a list of KeyBlock) -> [B, T, N, H] in the queries' dtype.

    Every query must see at least one key of some block. The softmax is float32. ValueError for an unknown
    `implementation`, one that cannot do what is asked of it, or a block whose rows do not divide the queries' rows.
    """
    for block in blocks:
        if q_BTNH.shape[0] % block.keys_CKHS.shape[0]:
            raise ValueError(
                f"{q_BTNH.shape[0]} token rows over {block.keys_CKHS.shape[0]} key rows: "
                "the token rows must be a whole multiple, in groups of neighbours"
            )
    if implementation == "auto":
        implementation = choose(q_BTNH, blocks, jax.default_backend())
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {['auto', *IMPLEMENTATIONS]}")
    return IMPLEMENTATIONS[implementation](q_BTNH, blocks)


def choose(q_BTNH, blocks, platform):
    """The implementation that "auto" stands for: by platform, dtype, and how many scores there are."""
    num_tokens, head_dim = q_BTNH.shape[1], q_BTNH.shape[-1]
    num_scores = num_tokens * sum(block.keys_CKHS.shape[-1] for block in blocks)
    has_own_keys_alone = len(blocks) == 1 and blocks[0].keys_CKHS.shape[-1] == num_tokens > 1
    if platform == "gpu" and has_own_keys_alone and q_BTNH.dtype.itemsize == 2:
        return "cudnn"
    if platform == "tpu" and has_own_keys_alone and num_scores >= CHUNKED_FROM and head_dim % fused_attention.TILE == 0:
        return "splash"
    return "chunked" if num_tokens > QUERY_CHUNK and num_scores >= CHUNKED_FROM else "xla"


def _attend_xla(q_BTNH, blocks):
    num_rows, num_tokens, num_heads, head_dim = q_BTNH.shape
    scaled_q_BTNH = q_BTNH * head_dim**-0.5
    scores = [_masked_scores(scaled_q_BTNH, block) for block in blocks]

    def to_token_rows(x_CKUR, width=()):
        """[C, K, U, R, ...] -> [B, T, K, R, ...]: the layout in which the blocks meet."""
        num_kv_heads = x_CKUR.shape[1]
        num_queries = num_heads // num_kv_heads
        return x_CKUR.swapaxes(1, 2).reshape(num_rows, num_tokens, num_kv_heads, num_queries, *width)

    def to_block_rows(x_BTKR, block):
        num_key_rows = block.keys_CKHS.shape[0]
        return x_BTKR.reshape(num_key_rows, -1, *x_BTKR.shape[2:]).swapaxes(1, 2)

    # The softmax does not change under a shift, so no gradient needs to pass through the maximum.
    maximum_BTKR = None
    for score_CKURS in scores:
        block_maximum_BTKR = to_token_rows(jax.lax.stop_gradient(score_CKURS).max(axis=-1))
        maximum_BTKR = block_maximum_BTKR if maximum_BTKR is None else jnp.maximum(maximum_BTKR, block_maximum_BTKR)

    total_BTKR = 0.0
    out_BTKRH = 0.0
    for score_CKURS, block in zip(scores, blocks, strict=True):
        weight_CKURS = jnp.exp(score_CKURS - to_block_rows(maximum_BTKR, block)[..., None])
        total_BTKR += to_token_rows(weight_CKURS.sum(axis=-1))
        values_CKSH = block.values_CKSH
        weighted_CKURH = jnp.einsum(
            "CKURS,CKSH->CKURH",
            weight_CKURS.astype(values_CKSH.dtype),
            values_CKSH,
            preferred_element_type=jnp.float32,
        )
        out_BTKRH += to_token_rows(weighted_CKURH, (head_dim,))
    out_BTKRH = out_BTKRH / total_BTKR[..., None]
    return out_BTKRH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)


def _masked_scores(q_BTNH, block):
    """Float32 scores [C, K, U, R, S]: the order a batched matrix product writes, so the big array is not transposed."""
    num_key_rows, num_kv_heads, head_dim, num_slots = block.keys_CKHS.shape
    q_CUKRH = q_BTNH.reshape(num_key_rows, -1, num_kv_heads, q_BTNH.shape[2] // num_kv_heads, head_dim)
    score_CKURS = jnp.einsum("CUKRH,CKHS->CKURS", q_CUKRH, block.keys_CKHS, preferred_element_type=jnp.float32)
    is_visible_CUS = block.visibility.mask_BTS().reshape(num_key_rows, -1, num_slots)
    return jnp.where(is_visible_CUS[:, None, :, None, :], score_CKURS, MASKED_SCORE)


def _attend_chunked(q_BTNH, blocks):
    """A tile of queries and keys at a time, backward again: no scores or masks of T x S, nor of chunk x S."""
    sizes = blockwise_attention.Sizes(QUERY_CHUNK, KEY_CHUNK)
    return blockwise_attention.attend(sizes, q_BTNH, blocks)


IMPLEMENTATIONS = {
    "xla": _attend_xla,
    "chunked": _attend_chunked,
    "cudnn": fused_attention.attend_cudnn,
    "pallas": fused_attention.attend_pallas,
    "splash": fused_attention.attend_splash,
}
