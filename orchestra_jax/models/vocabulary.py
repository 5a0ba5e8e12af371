"""Logits of packed tokens, by chunks of tokens and blocks of the vocabulary, and what is summed over their columns.

    logits  = hidden . head / temperature
    logprob = logits[target] - logsumexp(logits)
    entropy = logsumexp(logits) - sum(p logits)

Only scored tokens meet the head: in each shard of the rows they are put in front, and chunks go up to the last one. One
running maximum and sum joins the blocks. What is made of them, and the gradients: logprobs.py, token_loss.py.

Legend: B rows, T tokens, D hidden, V vocab, S shards of the rows, N tokens of a shard (B / S * T), M the same padded to
whole chunks, W tokens that a chunk takes of each shard, C columns of the vocab that a block takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

VECTOR = 16  # float32 numbers of an instruction
COUNTED_LOGIT = -1e30  # of a column that an earlier block has counted; finite, so that 0 times it is 0


class Splits(NamedTuple):
    """In how many equal parts a mesh cuts the rows and the vocabulary (sharding.num_splits)."""

    rows: int = 1
    vocab: int = 1


WHOLE = Splits()


class Shape(NamedTuple):
    """Static: W, C, and whether entropies are wanted."""

    width: int
    block: int
    has_entropy: bool


class Tokens(NamedTuple):
    """What is known of the tokens, packed: the scored ones of each shard in front."""

    order_SM: jax.Array  # where they stand among the shard's N; the padding repeats the first
    targets_SM: jax.Array
    temperature_SM: jax.Array
    counts_S: jax.Array  # scored tokens
    num_chunks: jax.Array | int


class Packing(NamedTuple):
    """What `packing` makes of rows of tokens."""

    shape: Shape
    hidden_SND: jax.Array
    tokens: Tokens
    pack: Callable[[jax.Array], jax.Array]  # [B, T] -> [S, M]
    unpack: Callable[[jax.Array], jax.Array]  # [S, M] -> [B, T], 0 outside of the mask


def packing(hidden_BTD, head_DV, targets_BT, temperature_B, sizes, mask_BT, splits, has_entropy):
    """The rows' tokens, packed; arguments as in logprobs.token_logprobs.

    Args:
      sizes: tokens of a chunk, all shards together, and columns of a block where there are blocks.
      has_entropy: whether `scores` are to have entropies.

    Raises:
      ValueError: the rows cannot be cut into `splits.rows` parts.
    """
    chunk, block = sizes
    num_rows, num_tokens = targets_BT.shape
    num_shards, vocab_size = splits.rows, head_DV.shape[1]
    if num_rows % num_shards:
        raise ValueError(f"{num_rows} rows cannot be cut into {num_shards} parts: make them a multiple of it")
    num_packed = num_rows // num_shards * num_tokens
    width = min(num_packed, max(1, chunk // num_shards))
    is_blocked = splits.vocab == 1 and jax.default_backend() == "cpu"
    shape = Shape(width, _block_size(vocab_size, block) if is_blocked else vocab_size, has_entropy)

    def by_shard(x_BT):
        return x_BT.reshape(num_shards, num_packed, *x_BT.shape[2:])

    order_SN = jnp.broadcast_to(jnp.arange(num_packed)[None], (num_shards, num_packed))
    counts_S = jnp.full(num_shards, num_packed)
    num_chunks = -(-num_packed // width)
    if mask_BT is not None:
        mask_SN = by_shard(mask_BT)
        order_SN = jnp.argsort(~mask_SN, axis=1, stable=True)
        counts_S = mask_SN.sum(axis=1)
        num_chunks = -(-counts_S.max() // width)
    order_SM = jnp.pad(order_SN, [(0, 0), (0, -num_packed % width)])

    def pack(x_BT):
        return jnp.take_along_axis(by_shard(x_BT), order_SM, axis=1)

    def unpack(x_SM):
        if mask_BT is None:
            return x_SM[:, :num_packed].reshape(targets_BT.shape)
        place_SN = jnp.argsort(order_SN, axis=1)
        return jnp.where(mask_BT, jnp.take_along_axis(x_SM, place_SN, axis=1).reshape(targets_BT.shape), 0.0)

    temperature_SM = jnp.take_along_axis(temperature_B.reshape(num_shards, -1), order_SM // num_tokens, axis=1)
    tokens = Tokens(order_SM, pack(targets_BT), temperature_SM, counts_S, num_chunks)
    return Packing(shape, by_shard(hidden_BTD), tokens, pack, unpack)


def _block_size(vocab_size, most):
    """Of equal blocks, so that the last one repeats little of the one before."""
    share = -(-vocab_size // -(-vocab_size // most))
    return min(vocab_size, -(-share // VECTOR) * VECTOR)


def scored_mask(tokens):
    """-> is_scored_SM."""
    return jnp.arange(tokens.order_SM.shape[1])[None, :] < tokens.counts_S[:, None]


def pack_hidden(hidden_SND, tokens):
    """-> (the hidden states in their order, is_scored_SM)."""
    is_scored_SM = scored_mask(tokens)
    # Behind the last scored token: zeros, for a NaN there would reach the head's gradient in spite of its factor 0.
    return jnp.where(is_scored_SM[:, :, None], _take(hidden_SND, tokens.order_SM), 0), is_scored_SM


def unpack_hidden(x_SMD, tokens, like_SND):
    """Every token of a shard stands in its order once; the padding behind it is a repetition and has no gradient."""
    place_SN = jnp.argsort(tokens.order_SM[:, : like_SND.shape[1]], axis=1)
    return _take(x_SMD, place_SN).astype(like_SND.dtype)


def _take(x_SND, index_SW):
    return jnp.take_along_axis(x_SND, index_SW[:, :, None], axis=1)


def parts(number, width, *arrays):
    """Chunk `number` of each array [S, M, ...]."""
    return [jax.lax.dynamic_slice_in_dim(x_SM, number * width, width, axis=1) for x_SM in arrays]


def put(x_SM, x_SW, number):
    """x_SM with x_SW as its chunk `number`."""
    return jax.lax.dynamic_update_slice_in_dim(x_SM, x_SW, number * x_SW.shape[1], axis=1)


def num_blocks(shape, head_DV):
    return -(-head_DV.shape[1] // shape.block)


def over_blocks(shape, head_DV, body, carry):
    """The last carry of body(block, carry) -> carry; no loop for a single block."""
    count = num_blocks(shape, head_DV)
    return jax.lax.fori_loop(0, count, body, carry) if count > 1 else body(0, carry)


def columns(block, shape, head_DV, dtype):
    """-> (head_DC, the numbers of its columns; -1 for one that an earlier block has counted)."""
    start = _start(head_DV.shape[1], block, shape.block)
    head_DC = jax.lax.dynamic_slice_in_dim(head_DV, start, shape.block, axis=1).astype(dtype)
    columns_C = start + jnp.arange(shape.block)
    return head_DC, jnp.where(columns_C < block * shape.block, -1, columns_C)


def add_to_columns(x_SDV, block_SDC, block, shape):
    """x_SDV with block_SDC added to the columns of `block`."""
    start = _start(x_SDV.shape[2], block, shape.block)
    block_SDC += jax.lax.dynamic_slice_in_dim(x_SDV, start, shape.block, axis=2)
    return jax.lax.dynamic_update_slice_in_dim(x_SDV, block_SDC, start, axis=2)


def _start(size, number, width):
    """Where part `number` starts; the last one ends with the array and may repeat some of the one before."""
    return jnp.minimum(number * width, size - width)


def logits(hidden_SWD, head_DC, columns_C, temperature_SW):
    """-> logits_SWC over `columns`; COUNTED_LOGIT where an earlier block has counted them."""
    logits_SWC = product("SWD,DC->SWC", hidden_SWD, head_DC) / temperature_SW[:, :, None]
    return jnp.where(columns_C[None, None] < 0, COUNTED_LOGIT, logits_SWC)


def product(dims, *operands):
    """einsum in the operands' dtype with sums in float32."""
    return jnp.einsum(dims, *operands, preferred_element_type=jnp.float32)


def is_target(columns_C, targets_SW):
    return columns_C[None, None, :] == targets_SW[:, :, None]


def no_sums(shape, dims):
    """The sums of `add_columns` before the first column, each of `dims`."""
    zeros = jnp.zeros(dims, jnp.float32)
    return [zeros - jnp.inf] + [zeros] * (3 if shape.has_entropy else 2)


def add_columns(logits_SWC, is_target_SWC, sums_SW):
    """-> (exp(logits - the new maximum), the new [maximum, sum, the target's logit[, sum of p logits]])."""
    maximum_SW, total_SW, target_logit_SW, *weighted = sums_SW
    higher_SW = jnp.maximum(maximum_SW, logits_SWC.max(axis=-1))
    weight_SWC = jnp.exp(logits_SWC - higher_SW[:, :, None])
    shrink_SW = jnp.exp(maximum_SW - higher_SW)
    # A sum over a one-hot mask instead of a gather: a sharded vocab dim stays sharded.
    target_logit_SW += jnp.where(is_target_SWC, logits_SWC, 0.0).sum(axis=-1)
    total_SW = total_SW * shrink_SW + weight_SWC.sum(axis=-1)
    weighted = [x_SW * shrink_SW + (weight_SWC * logits_SWC).sum(axis=-1) for x_SW in weighted]
    return weight_SWC, [higher_SW, total_SW, target_logit_SW, *weighted]


def scores(sums, is_scored):
    """-> ([logprobs[, entropies]], 0 for what is not scored; logsumexp)."""
    maximum, total, target_logit, *weighted = sums
    log_normalizer = maximum + jnp.log(total)
    logprobs_and_entropies = [target_logit - log_normalizer] + [log_normalizer - x / total for x in weighted]
    return [jnp.where(is_scored, x, 0.0) for x in logprobs_and_entropies], log_normalizer
