"""The sum of tokens' losses, each of its own log-probability alone: three products with the head in place of four.

The gradients are taken in the forward pass, chunk by chunk, from the chunk's exp(logits), which are kept for so long
(the plan of Liger's fused linear cross entropy, arXiv 2410.10989). Other losses: the scores of logprobs.py.

    d sum / d logits = d loss / d logprob (onehot(target) - p)

Legend: vocabulary.py; K blocks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from orchestra_jax.models import vocabulary
from orchestra_jax.models.logprobs import packed_scores
from orchestra_jax.models.vocabulary import WHOLE

# Tokens of a chunk and columns of a block on a CPU, whatever `chunk` says: a chunk reads the head twice, its gradient
# once. At 151,936 columns the chunk's logits are 311 MB; 1,024 tokens are no faster.
LOSS_CHUNK, LOSS_BLOCK = 512, 512


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
      The rest is that of `logprobs.token_logprobs`.
    """
    chunk = LOSS_CHUNK if jax.default_backend() == "cpu" else chunk
    sizes = (chunk, LOSS_BLOCK)
    packing = vocabulary.packing(hidden_BTD, head_DV, targets_BT, temperature_B, sizes, mask_BT, splits, has_entropy)
    per_token_SM = tuple(packing.pack(x_BT) for x_BT in per_token)
    total, *packed = _packed_loss(packing.shape, loss_of, packing.hidden_SND, head_DV, packing.tokens, per_token_SM)
    return total, [packing.unpack(jax.lax.stop_gradient(x_SM)) for x_SM in packed]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _packed_loss(shape, loss_of, hidden_SND, head_DV, tokens, per_token_SM):
    """-> (sum of losses, logprobs_SM[, entropies_SM])."""
    scores = packed_scores(shape, hidden_SND, head_DV, tokens)
    return _sum_of_losses(loss_of, vocabulary.scored_mask(tokens), scores[0], per_token_SM), *scores


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
    packed_SMD, is_scored_SM = vocabulary.pack_hidden(hidden_SND, tokens)
    of_tokens = (packed_SMD, tokens.targets_SM, tokens.temperature_SM, is_scored_SM, *per_token_SM)
    num_shards, num_blocks = len(hidden_SND), vocabulary.num_blocks(shape, head_DV)

    def no_weights():
        return jnp.zeros((num_blocks, num_shards, shape.width, shape.block), jnp.float32)

    def add_chunk(number, sums, weight_KSWC):
        total, scores, hidden_gradient_SMD, head_gradient_SDV = sums
        chunk = vocabulary.parts(number, shape.width, *of_tokens)
        loss, scores_SW, hidden_gradient_SWD, head_gradient_SDV, weight_KSWC = _loss_of_chunk(
            shape, loss_of, head_DV, chunk, head_gradient_SDV, weight_KSWC
        )
        scores = [vocabulary.put(x_SM, x_SW, number) for x_SM, x_SW in zip(scores, scores_SW, strict=True)]
        hidden_gradient_SMD = vocabulary.put(hidden_gradient_SMD, hidden_gradient_SWD, number)
        return (total + loss, scores, hidden_gradient_SMD, head_gradient_SDV), weight_KSWC

    zeros_SM = jnp.zeros(is_scored_SM.shape, jnp.float32)
    sums = (
        jnp.float32(0),
        [zeros_SM] * (2 if shape.has_entropy else 1),
        jnp.zeros(packed_SMD.shape, jnp.float32),
        jnp.zeros((num_shards, *head_DV.shape), jnp.float32) if needs_head_gradient else None,
    )
    over_chunks = functools.partial(jax.lax.fori_loop, 0, tokens.num_chunks)
    if num_blocks == 1:
        sums = over_chunks(lambda number, sums: add_chunk(number, sums, no_weights())[0], sums)
    else:  # A buffer of each chunk's own would be filled with zeros for each.
        sums, _ = over_chunks(lambda number, carry: add_chunk(number, *carry), (sums, no_weights()))
    total, scores, hidden_gradient_SMD, head_gradient_SDV = sums
    hidden_gradient_SND = vocabulary.unpack_hidden(hidden_gradient_SMD, tokens, hidden_SND)
    head_gradient_DV = head_gradient_SDV.sum(axis=0).astype(head_DV.dtype) if needs_head_gradient else None
    return (total, *scores), (hidden_gradient_SND, head_gradient_DV)


def _loss_of_chunk(shape, loss_of, head_DV, chunk, head_gradient_SDV, weight_KSWC):
    """-> (sum of losses, scores_SW, hidden_gradient_SWD, head_gradient_SDV, weight_KSWC).

    chunk: hidden states, targets, temperatures, is_scored, *per_token, each [S, W, ...].
    head_gradient_SDV: the chunk's is added; None if the head needs none.
    weight_KSWC: overwritten with exp(logits - the maximum up to their block).
    """
    hidden_SWD, targets_SW, temperature_SW, is_scored_SW, *per_token_SW = chunk

    def score_block(block, carry):
        weight_KSWC, maximum_KSW, sums_SW = carry
        head_DC, columns_C = vocabulary.columns(block, shape, head_DV, hidden_SWD.dtype)
        logits_SWC = vocabulary.logits(hidden_SWD, head_DC, columns_C, temperature_SW)
        is_target_SWC = vocabulary.is_target(columns_C, targets_SW)
        weight_SWC, sums_SW = vocabulary.add_columns(logits_SWC, is_target_SWC, sums_SW)
        return weight_KSWC.at[block].set(weight_SWC), maximum_KSW.at[block].set(sums_SW[0]), sums_SW

    maximum_KSW = jnp.zeros(weight_KSWC.shape[:-1], jnp.float32)
    weight_KSWC, maximum_KSW, sums_SW = vocabulary.over_blocks(
        shape, head_DV, score_block, (weight_KSWC, maximum_KSW, vocabulary.no_sums(shape, targets_SW.shape))
    )
    scores_SW, log_normalizer_SW = vocabulary.scores(sums_SW, is_scored_SW)
    sum_of_losses = functools.partial(_sum_of_losses, loss_of, is_scored_SW, per_token=per_token_SW)
    loss, by_logprob_SW = jax.value_and_grad(sum_of_losses)(scores_SW[0])
    factor_SW = by_logprob_SW / temperature_SW

    def add_gradients(block, carry):
        hidden_gradient_SWD, head_gradient_SDV = carry
        head_DC, columns_C = vocabulary.columns(block, shape, head_DV, hidden_SWD.dtype)
        scale_SW = jnp.exp(maximum_KSW[block] - log_normalizer_SW) * -factor_SW
        gradient_SWC = weight_KSWC[block] * scale_SW[:, :, None]
        gradient_SWC += jnp.where(vocabulary.is_target(columns_C, targets_SW), factor_SW[:, :, None], 0.0)
        gradient_SWC = gradient_SWC.astype(hidden_SWD.dtype)
        hidden_gradient_SWD += vocabulary.product("SWC,DC->SWD", gradient_SWC, head_DC)
        if head_gradient_SDV is not None:
            block_gradient_SDC = vocabulary.product("SWD,SWC->SDC", hidden_SWD, gradient_SWC)
            head_gradient_SDV = vocabulary.add_to_columns(head_gradient_SDV, block_gradient_SDC, block, shape)
        return hidden_gradient_SWD, head_gradient_SDV

    gradients = jnp.zeros(hidden_SWD.shape, jnp.float32), head_gradient_SDV
    gradients = vocabulary.over_blocks(shape, head_DV, add_gradients, gradients)
    return loss, scores_SW, *gradients, weight_KSWC


def _loss_backward(shape, loss_of, gradients, cotangents):
    by_total, *_ = cotangents  # scores have none
    if isinstance(by_total, SymbolicZero):
        return None, None, None, None
    scaled = jax.tree.map(lambda x: (by_total * x.astype(jnp.float32)).astype(x.dtype), gradients)
    return *scaled, None, None


_packed_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)
