"""Log-probabilities and entropies of tokens from hidden states, a chunk at a time and only where they are scored.

    logits  = hidden . head / temperature
    logprob = logits[target] - logsumexp(logits)            d logprob / d logits = onehot(target) - p
    entropy = logsumexp(logits) - sum(p logits)             d entropy / d logits = -p (log p + entropy)

The scored tokens are put in front. The vocabulary goes by in blocks, and for each block the tokens in chunks, up to the
last scored one, under one running maximum and sum. The backward pass computes the logits again, from the stored
logsumexp, and adds up the gradients of hidden states and head at once, so [B, T, V] never exists (the plan of Cut
Cross-Entropy, arXiv 2411.09009). That is four products with the head.

Where a token's loss depends on its own log-probability alone, three will do (`token_loss`; the plan of Liger's fused
linear cross entropy, arXiv 2410.10989): the gradients are taken in the forward pass, chunk by chunk, from the chunk's
exp(logits), which are kept for so long.

Legend: B rows, T tokens, D hidden, V vocab, S shards of the rows, N tokens of a shard (B / S * T), M the same padded to
whole chunks, W tokens that a chunk takes of each shard, C columns of the vocab that a block takes, K blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

# On a CPU a block of the head and its logits should stay in a core's cache: 1.5 times as fast as all 151,936 at once.
VOCAB_BLOCK = 1024
# Tokens and columns of `token_loss` on a CPU, whatever `chunk` says: for each chunk of tokens it reads the head twice,
# its gradient once. At 151,936 columns the chunk's logits are 311 MB; 1,024 tokens are no faster.
LOSS_CHUNK, LOSS_BLOCK = 512, 512
VECTOR = 16  # float32 numbers of an instruction
COUNTED_LOGIT = -1e30  # of a column that an earlier block has counted; finite, so that 0 times it is 0


class Splits(NamedTuple):
    """In how many equal parts a mesh cuts the rows and the vocabulary (sharding.num_splits)."""

    rows: int = 1
    vocab: int = 1


WHOLE = Splits()


def token_logprobs(hidden_BTD, head_DV, targets_BT, temperature_B, chunk, mask_BT=None, splits=WHOLE):
    """log softmax(hidden . head / temperature)[target], float32 [B, T]; natural logarithm; 0 outside of the mask.

    Gradients reach the hidden states and the head, not the temperature.

    Args:
      chunk: for how many tokens at a time logits exist, in the forward and in the backward pass.
      mask_BT: the tokens that are scored, all of them if not given. The others never meet the head.
      splits: each part of the rows is packed for itself, so that no token leaves its device.

    Raises:
      ValueError: the rows cannot be cut into `splits.rows` parts.
    """
    return _scored(hidden_BTD, head_DV, targets_BT, temperature_B, chunk, mask_BT, splits, False)[0]


def token_logprobs_and_entropy(hidden_BTD, head_DV, targets_BT, temperature_B, chunk, mask_BT=None, splits=WHOLE):
    """(`token_logprobs`, entropy of the same distribution in nats), each float32 [B, T]."""
    return _scored(hidden_BTD, head_DV, targets_BT, temperature_B, chunk, mask_BT, splits, True)


def token_loss(
    loss_of, hidden_BTD, head_DV, targets_BT, temperature_B, chunk, mask_BT=None, splits=WHOLE, *,
    per_token=(), has_entropy=False,
):  # fmt: skip
    """-> (sum of the scored tokens' losses, [logprobs_BT[, entropies_BT]]), all float32.

    Three products with the head for value and gradients, one without gradients. Those of the sum alone reach the hidden
    states and the head; log-probabilities and entropies have none, neither have `per_token` and the temperature.

    Args:
      loss_of: (log-probabilities, *per_token) of any shape -> losses of that shape, each of its own numbers alone.
      chunk: for how many tokens at a time logits exist; on a CPU LOSS_CHUNK, unless there are fewer tokens.
      per_token: what `loss_of` reads of each token, a tuple of arrays [B, T]; outside of the mask they may be anything.
      has_entropy: whether entropies are returned too.
      The rest is that of `token_logprobs`.
    """
    chunk = LOSS_CHUNK if jax.default_backend() == "cpu" else chunk
    sizes = (chunk, LOSS_BLOCK)
    packing = _packing(hidden_BTD, head_DV, targets_BT, temperature_B, sizes, mask_BT, splits, has_entropy)
    per_token_SM = tuple(packing.pack(x_BT) for x_BT in per_token)
    total, *packed = _packed_loss(packing.shape, loss_of, packing.hidden_SND, head_DV, packing.tokens, per_token_SM)
    return total, [packing.unpack(jax.lax.stop_gradient(x_SM)) for x_SM in packed]


class _Shape(NamedTuple):
    """Static: W, C, and whether entropies are wanted."""

    width: int
    block: int
    has_entropy: bool


class _Tokens(NamedTuple):
    """What is known of the tokens, packed: the scored ones of each shard in front."""

    order_SM: jax.Array  # where they stand among the shard's N; the padding repeats the first
    targets_SM: jax.Array
    temperature_SM: jax.Array
    counts_S: jax.Array  # scored tokens
    num_chunks: jax.Array | int


class _Packing(NamedTuple):
    shape: _Shape
    hidden_SND: jax.Array
    tokens: _Tokens
    pack: Callable[[jax.Array], jax.Array]  # [B, T] -> [S, M]
    unpack: Callable[[jax.Array], jax.Array]  # [S, M] -> [B, T], 0 outside of the mask


def _scored(hidden_BTD, head_DV, targets_BT, temperature_B, chunk, mask_BT, splits, has_entropy):
    sizes = (chunk, VOCAB_BLOCK)
    packing = _packing(hidden_BTD, head_DV, targets_BT, temperature_B, sizes, mask_BT, splits, has_entropy)
    packed = _packed_scores(packing.shape, packing.hidden_SND, head_DV, packing.tokens)
    return [packing.unpack(x_SM) for x_SM in packed]


def _packing(hidden_BTD, head_DV, targets_BT, temperature_B, sizes, mask_BT, splits, has_entropy):
    """`sizes`: tokens of a chunk, all shards together, and columns of a block where there are blocks."""
    chunk, block = sizes
    num_rows, num_tokens = targets_BT.shape
    num_shards, vocab_size = splits.rows, head_DV.shape[1]
    if num_rows % num_shards:
        raise ValueError(f"{num_rows} rows cannot be cut into {num_shards} parts: make them a multiple of it")
    num_packed = num_rows // num_shards * num_tokens
    width = min(num_packed, max(1, chunk // num_shards))
    is_blocked = splits.vocab == 1 and jax.default_backend() == "cpu"
    shape = _Shape(width, _block_size(vocab_size, block) if is_blocked else vocab_size, has_entropy)

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
    tokens = _Tokens(order_SM, pack(targets_BT), temperature_SM, counts_S, num_chunks)
    return _Packing(shape, by_shard(hidden_BTD), tokens, pack, unpack)


def _block_size(vocab_size, most):
    """Of equal blocks, so that the last one repeats little of the one before."""
    share = -(-vocab_size // -(-vocab_size // most))
    return min(vocab_size, -(-share // VECTOR) * VECTOR)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed_scores(shape, hidden_SND, head_DV, tokens):
    return _forward(shape, hidden_SND, head_DV, tokens)[0]


def _forward(shape, hidden_SND, head_DV, tokens):
    """-> ((logprobs_SM[, entropies_SM]), residuals). 0 for what is not scored."""
    packed_SMD, is_scored_SM = _pack(hidden_SND, tokens)

    def score_block(block, sums):
        head_DC, columns_C = _columns(block, shape, head_DV, packed_SMD.dtype)

        def add_chunk(number, sums):
            hidden_SWD, targets_SW, temperature_SW, *sums_SW = _parts(
                number, shape.width, packed_SMD, tokens.targets_SM, tokens.temperature_SM, *sums
            )
            logits_SWC = _logits(hidden_SWD, head_DC, columns_C, temperature_SW)
            _, new = _add_columns(logits_SWC, _is_target(columns_C, targets_SW), sums_SW)
            return [_put(x_SM, x_SW, number) for x_SM, x_SW in zip(sums, new, strict=True)]

        return jax.lax.fori_loop(0, tokens.num_chunks, add_chunk, sums)

    sums = _over_blocks(shape, head_DV, score_block, _no_sums(shape, is_scored_SM.shape))
    scores, log_normalizer_SM = _scores(sums, is_scored_SM)
    return scores, (hidden_SND, head_DV, tokens, log_normalizer_SM, scores)


def _no_sums(shape, dims):
    zeros = jnp.zeros(dims, jnp.float32)
    return [zeros - jnp.inf] + [zeros] * (3 if shape.has_entropy else 2)


def _add_columns(logits_SWC, is_target_SWC, sums_SW):
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


def _scores(sums, is_scored):
    """-> ([logprobs[, entropies]], 0 for what is not scored; logsumexp)."""
    maximum, total, target_logit, *weighted = sums
    log_normalizer = maximum + jnp.log(total)
    scores = [target_logit - log_normalizer] + [log_normalizer - x / total for x in weighted]
    return [jnp.where(is_scored, x, 0.0) for x in scores], log_normalizer


def _backward(shape, residuals, cotangents):
    hidden_SND, head_DV, tokens, log_normalizer_SM, scores = residuals
    packed_SMD, _ = _pack(hidden_SND, tokens)
    per_token = (tokens.targets_SM, tokens.temperature_SM, log_normalizer_SM, *cotangents, *scores[1:])

    def block_gradients(block, carry):
        hidden_gradient_SMD, head_gradient_SDV = carry
        head_DC, columns_C = _columns(block, shape, head_DV, packed_SMD.dtype)

        def add_chunk(number, carry):
            hidden_gradient_SMD, block_gradient_SDC = carry
            hidden_SWD, targets_SW, temperature_SW, log_normalizer_SW, *factors = _parts(
                number, shape.width, packed_SMD, *per_token
            )
            logits_SWC = _logits(hidden_SWD, head_DC, columns_C, temperature_SW)
            log_probability_SWC = logits_SWC - log_normalizer_SW[:, :, None]
            is_target_SWC = _is_target(columns_C, targets_SW)
            gradient_SWC = _logit_gradient(log_probability_SWC, is_target_SWC, *factors)
            gradient_SWC = (gradient_SWC / temperature_SW[:, :, None]).astype(hidden_SWD.dtype)
            (sum_SWD,) = _parts(number, shape.width, hidden_gradient_SMD)
            sum_SWD += _product("SWC,DC->SWD", gradient_SWC, head_DC)
            block_gradient_SDC += _product("SWD,SWC->SDC", hidden_SWD, gradient_SWC)
            return _put(hidden_gradient_SMD, sum_SWD, number), block_gradient_SDC

        zeros_SDC = jnp.zeros((len(head_gradient_SDV), *head_DC.shape), jnp.float32)
        hidden_gradient_SMD, block_gradient_SDC = jax.lax.fori_loop(
            0, tokens.num_chunks, add_chunk, (hidden_gradient_SMD, zeros_SDC)
        )
        return hidden_gradient_SMD, _add_to_columns(head_gradient_SDV, block_gradient_SDC, block, shape)

    # A shard has a sum of its own for the head, so that devices meet once, behind the loop.
    num_shards = len(hidden_SND)
    carry = jnp.zeros(packed_SMD.shape, jnp.float32), jnp.zeros((num_shards, *head_DV.shape), jnp.float32)
    hidden_gradient_SMD, head_gradient_SDV = _over_blocks(shape, head_DV, block_gradients, carry)
    hidden_gradient_SND = _unpack(hidden_gradient_SMD, tokens, hidden_SND)
    return hidden_gradient_SND, head_gradient_SDV.sum(axis=0).astype(head_DV.dtype), None


_packed_scores.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _packed_loss(shape, loss_of, hidden_SND, head_DV, tokens, per_token_SM):
    """-> (sum of losses, logprobs_SM[, entropies_SM])."""
    scores = _packed_scores(shape, hidden_SND, head_DV, tokens)
    return _sum_of_losses(loss_of, _is_scored(tokens), scores[0], per_token_SM), *scores


def _sum_of_losses(loss_of, is_scored, logprobs, per_token):
    # Selected before and behind: a NaN of what is not scored must not reach the gradient, and loss_of(0) may not be 0.
    per_token = [jnp.where(is_scored, x, jnp.zeros_like(x)) for x in per_token]
    return jnp.where(is_scored, loss_of(logprobs, *per_token), 0.0).sum()


def _loss_forward(shape, loss_of, hidden_SND, head_DV, tokens, per_token_SM):
    """The primal's results and, as residuals, the gradients of the sum; a chunk of tokens over all blocks at a time.

    A head that is frozen (low-rank factors) has no gradient, None.
    """
    needs_head_gradient = head_DV.perturbed
    hidden_SND, head_DV, tokens, per_token_SM = jax.tree.map(
        lambda primal: primal.value, (hidden_SND, head_DV, tokens, per_token_SM)
    )
    packed_SMD, is_scored_SM = _pack(hidden_SND, tokens)
    num_shards, vocab_size = len(hidden_SND), head_DV.shape[1]
    num_blocks = -(-vocab_size // shape.block)

    def add_chunk(number, carry):
        total, scores, hidden_gradient_SMD, head_gradient_SDV, weight_KSWC = carry
        carried_KSWC = weight_KSWC
        if weight_KSWC is None:
            weight_KSWC = jnp.zeros(weight_dims, jnp.float32)
        hidden_SWD, targets_SW, temperature_SW, is_scored_SW, *per_token_SW = _parts(
            number, shape.width, packed_SMD, tokens.targets_SM, tokens.temperature_SM, is_scored_SM, *per_token_SM
        )

        def score_block(block, carry):
            weight_KSWC, maximum_KSW, sums_SW = carry
            head_DC, columns_C = _columns(block, shape, head_DV, packed_SMD.dtype)
            logits_SWC = _logits(hidden_SWD, head_DC, columns_C, temperature_SW)
            weight_SWC, sums_SW = _add_columns(logits_SWC, _is_target(columns_C, targets_SW), sums_SW)
            return weight_KSWC.at[block].set(weight_SWC), maximum_KSW.at[block].set(sums_SW[0]), sums_SW

        maximum_KSW = jnp.zeros((num_blocks, *targets_SW.shape), jnp.float32)
        weight_KSWC, maximum_KSW, sums_SW = _over_blocks(
            shape, head_DV, score_block, (weight_KSWC, maximum_KSW, _no_sums(shape, targets_SW.shape))
        )
        scores_SW, log_normalizer_SW = _scores(sums_SW, is_scored_SW)
        sum_of_losses = functools.partial(_sum_of_losses, loss_of, is_scored_SW, per_token=per_token_SW)
        loss, by_logprob_SW = jax.value_and_grad(sum_of_losses)(scores_SW[0])
        factor_SW = by_logprob_SW / temperature_SW

        def block_gradients(block, carry):
            hidden_gradient_SWD, head_gradient_SDV = carry
            head_DC, columns_C = _columns(block, shape, head_DV, packed_SMD.dtype)
            scale_SW = jnp.exp(maximum_KSW[block] - log_normalizer_SW) * -factor_SW
            gradient_SWC = weight_KSWC[block] * scale_SW[:, :, None]
            gradient_SWC += jnp.where(_is_target(columns_C, targets_SW), factor_SW[:, :, None], 0.0)
            gradient_SWC = gradient_SWC.astype(hidden_SWD.dtype)
            hidden_gradient_SWD += _product("SWC,DC->SWD", gradient_SWC, head_DC)
            if not needs_head_gradient:
                return hidden_gradient_SWD, None
            block_gradient_SDC = _product("SWD,SWC->SDC", hidden_SWD, gradient_SWC)
            return hidden_gradient_SWD, _add_to_columns(head_gradient_SDV, block_gradient_SDC, block, shape)

        zeros_SWD = jnp.zeros(hidden_SWD.shape, jnp.float32)
        hidden_gradient_SWD, head_gradient_SDV = _over_blocks(
            shape, head_DV, block_gradients, (zeros_SWD, head_gradient_SDV)
        )
        scores = [_put(x_SM, x_SW, number) for x_SM, x_SW in zip(scores, scores_SW, strict=True)]
        hidden_gradient_SMD = _put(hidden_gradient_SMD, hidden_gradient_SWD, number)
        weight_KSWC = None if carried_KSWC is None else weight_KSWC
        return total + loss, scores, hidden_gradient_SMD, head_gradient_SDV, weight_KSWC

    zeros_SM = jnp.zeros(is_scored_SM.shape, jnp.float32)
    weight_dims = (num_blocks, num_shards, shape.width, shape.block)
    carry = (
        jnp.float32(0),
        [zeros_SM] * (2 if shape.has_entropy else 1),
        jnp.zeros(packed_SMD.shape, jnp.float32),
        jnp.zeros((num_shards, *head_DV.shape), jnp.float32) if needs_head_gradient else None,
        # Made once: a buffer of each chunk's own would be filled with zeros for each. A single block needs none.
        jnp.zeros(weight_dims, jnp.float32) if num_blocks > 1 else None,
    )
    total, scores, hidden_gradient_SMD, head_gradient_SDV, _ = jax.lax.fori_loop(0, tokens.num_chunks, add_chunk, carry)
    hidden_gradient_SND = _unpack(hidden_gradient_SMD, tokens, hidden_SND)
    head_gradient_DV = head_gradient_SDV.sum(axis=0).astype(head_DV.dtype) if needs_head_gradient else None
    return (total, *scores), (hidden_gradient_SND, head_gradient_DV)


def _loss_backward(shape, loss_of, gradients, cotangents):
    by_total, *_ = cotangents  # scores have none
    if isinstance(by_total, SymbolicZero):
        return None, None, None, None
    scaled = jax.tree.map(lambda x: (by_total * x.astype(jnp.float32)).astype(x.dtype), gradients)
    return *scaled, None, None


_packed_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)


def _logit_gradient(log_probability_SWC, is_target_SWC, by_logprob_SW, by_entropy_SW=None, entropy_SW=None):
    """The loss's gradient by the scaled logits, from its gradients by log-probability and entropy."""
    factor = -by_logprob_SW[:, :, None]
    if by_entropy_SW is not None:
        factor = factor - by_entropy_SW[:, :, None] * (log_probability_SWC + entropy_SW[:, :, None])
    return jnp.exp(log_probability_SWC) * factor + jnp.where(is_target_SWC, by_logprob_SW[:, :, None], 0.0)


def _over_blocks(shape, head_DV, body, carry):
    num_blocks = -(-head_DV.shape[1] // shape.block)
    return jax.lax.fori_loop(0, num_blocks, body, carry) if num_blocks > 1 else body(0, carry)


def _columns(block, shape, head_DV, dtype):
    """-> (head_DC, the numbers of its columns; -1 for one that an earlier block has counted)."""
    start = _start(head_DV.shape[1], block, shape.block)
    head_DC = jax.lax.dynamic_slice_in_dim(head_DV, start, shape.block, axis=1).astype(dtype)
    columns_C = start + jnp.arange(shape.block)
    return head_DC, jnp.where(columns_C < block * shape.block, -1, columns_C)


def _logits(hidden_SWD, head_DC, columns_C, temperature_SW):
    logits_SWC = _product("SWD,DC->SWC", hidden_SWD, head_DC) / temperature_SW[:, :, None]
    return jnp.where(columns_C[None, None] < 0, COUNTED_LOGIT, logits_SWC)


def _product(dims, *operands):
    return jnp.einsum(dims, *operands, preferred_element_type=jnp.float32)


def _is_target(columns_C, targets_SW):
    return columns_C[None, None, :] == targets_SW[:, :, None]


def _is_scored(tokens):
    return jnp.arange(tokens.order_SM.shape[1])[None, :] < tokens.counts_S[:, None]


def _pack(hidden_SND, tokens):
    """-> (the hidden states in their order, is_scored_SM)."""
    is_scored_SM = _is_scored(tokens)
    # Behind the last scored token: zeros, for a NaN there would reach the head's gradient in spite of its factor 0.
    return jnp.where(is_scored_SM[:, :, None], _take(hidden_SND, tokens.order_SM), 0), is_scored_SM


def _unpack(x_SMD, tokens, like_SND):
    """Every token of a shard stands in its order once; the padding behind it is a repetition and has no gradient."""
    place_SN = jnp.argsort(tokens.order_SM[:, : like_SND.shape[1]], axis=1)
    return _take(x_SMD, place_SN).astype(like_SND.dtype)


def _take(x_SND, index_SW):
    return jnp.take_along_axis(x_SND, index_SW[:, :, None], axis=1)


def _start(size, number, width):
    """Where part `number` starts; the last one ends with the array and may repeat some of the one before."""
    return jnp.minimum(number * width, size - width)


def _add_to_columns(x_SDV, block_SDC, block, shape):
    start = _start(x_SDV.shape[2], block, shape.block)
    block_SDC += jax.lax.dynamic_slice_in_dim(x_SDV, start, shape.block, axis=2)
    return jax.lax.dynamic_update_slice_in_dim(x_SDV, block_SDC, start, axis=2)


def _parts(number, width, *arrays):
    """Chunk `number` of each array [S, M, ...]."""
    return [jax.lax.dynamic_slice_in_dim(x_SM, number * width, width, axis=1) for x_SM in arrays]


def _put(x_SM, x_SW, number):
    return jax.lax.dynamic_update_slice_in_dim(x_SM, x_SW, number * x_SW.shape[1], axis=1)
