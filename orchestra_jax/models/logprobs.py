"""Log-probabilities and entropies of tokens from hidden states, a chunk at a time and only where they are scored.

    d logprob / d logits = onehot(target) - p
    d entropy / d logits = -p (log p + entropy)

The vocabulary goes by in blocks, and for each block the tokens in chunks (vocabulary.py). The backward pass computes
the logits again, from the stored logsumexp, and adds up the gradients of hidden states and head at once, so [B, T, V]
never exists (the plan of Cut Cross-Entropy, arXiv 2411.09009). That is four products with the head. Where a token's
loss depends on its own log-probability alone, three will do: token_loss.py.

Legend: vocabulary.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from orchestra_jax.models import vocabulary
from orchestra_jax.models.vocabulary import WHOLE

# On a CPU a block of the head and its logits should stay in a core's cache: 1.5 times as fast as all 151,936 at once.
VOCAB_BLOCK = 1024


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


def _scored(hidden_BTD, head_DV, targets_BT, temperature_B, chunk, mask_BT, splits, has_entropy):
    sizes = (chunk, VOCAB_BLOCK)
    packing = vocabulary.packing(hidden_BTD, head_DV, targets_BT, temperature_B, sizes, mask_BT, splits, has_entropy)
    packed = packed_scores(packing.shape, packing.hidden_SND, head_DV, packing.tokens)
    return [packing.unpack(x_SM) for x_SM in packed]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def packed_scores(shape, hidden_SND, head_DV, tokens):
    """-> (logprobs_SM[, entropies_SM]) of what vocabulary.packing gives; 0 for what is not scored."""
    return _forward(shape, hidden_SND, head_DV, tokens)[0]


def _forward(shape, hidden_SND, head_DV, tokens):
    """-> (the scores, residuals)."""
    packed_SMD, is_scored_SM = vocabulary.pack_hidden(hidden_SND, tokens)

    def score_block(block, sums):
        head_DC, columns_C = vocabulary.columns(block, shape, head_DV, packed_SMD.dtype)

        def add_chunk(number, sums):
            hidden_SWD, targets_SW, temperature_SW, *sums_SW = vocabulary.parts(
                number, shape.width, packed_SMD, tokens.targets_SM, tokens.temperature_SM, *sums
            )
            logits_SWC = vocabulary.logits(hidden_SWD, head_DC, columns_C, temperature_SW)
            _, new = vocabulary.add_columns(logits_SWC, vocabulary.is_target(columns_C, targets_SW), sums_SW)
            return [vocabulary.put(x_SM, x_SW, number) for x_SM, x_SW in zip(sums, new, strict=True)]

        return jax.lax.fori_loop(0, tokens.num_chunks, add_chunk, sums)

    sums = vocabulary.over_blocks(shape, head_DV, score_block, vocabulary.no_sums(shape, is_scored_SM.shape))
    scores, log_normalizer_SM = vocabulary.scores(sums, is_scored_SM)
    return scores, (hidden_SND, head_DV, tokens, log_normalizer_SM, scores)


def _backward(shape, residuals, cotangents):
    hidden_SND, head_DV, tokens, log_normalizer_SM, scores = residuals
    packed_SMD, _ = vocabulary.pack_hidden(hidden_SND, tokens)
    per_token = (tokens.targets_SM, tokens.temperature_SM, log_normalizer_SM, *cotangents, *scores[1:])

    def block_gradients(block, carry):
        hidden_gradient_SMD, head_gradient_SDV = carry
        head_DC, columns_C = vocabulary.columns(block, shape, head_DV, packed_SMD.dtype)

        def add_chunk(number, carry):
            hidden_gradient_SMD, block_gradient_SDC = carry
            hidden_SWD, targets_SW, temperature_SW, log_normalizer_SW, *factors = vocabulary.parts(
                number, shape.width, packed_SMD, *per_token
            )
            logits_SWC = vocabulary.logits(hidden_SWD, head_DC, columns_C, temperature_SW)
            log_probability_SWC = logits_SWC - log_normalizer_SW[:, :, None]
            is_target_SWC = vocabulary.is_target(columns_C, targets_SW)
            gradient_SWC = _logit_gradient(log_probability_SWC, is_target_SWC, *factors)
            gradient_SWC = (gradient_SWC / temperature_SW[:, :, None]).astype(hidden_SWD.dtype)
            (sum_SWD,) = vocabulary.parts(number, shape.width, hidden_gradient_SMD)
            sum_SWD += vocabulary.product("SWC,DC->SWD", gradient_SWC, head_DC)
            block_gradient_SDC += vocabulary.product("SWD,SWC->SDC", hidden_SWD, gradient_SWC)
            return vocabulary.put(hidden_gradient_SMD, sum_SWD, number), block_gradient_SDC

        zeros_SDC = jnp.zeros((len(head_gradient_SDV), *head_DC.shape), jnp.float32)
        hidden_gradient_SMD, block_gradient_SDC = jax.lax.fori_loop(
            0, tokens.num_chunks, add_chunk, (hidden_gradient_SMD, zeros_SDC)
        )
        return hidden_gradient_SMD, vocabulary.add_to_columns(head_gradient_SDV, block_gradient_SDC, block, shape)

    # A shard has a sum of its own for the head, so that devices meet once, behind the loop.
    num_shards = len(hidden_SND)
    carry = jnp.zeros(packed_SMD.shape, jnp.float32), jnp.zeros((num_shards, *head_DV.shape), jnp.float32)
    hidden_gradient_SMD, head_gradient_SDV = vocabulary.over_blocks(shape, head_DV, block_gradients, carry)
    hidden_gradient_SND = vocabulary.unpack_hidden(hidden_gradient_SMD, tokens, hidden_SND)
    return hidden_gradient_SND, head_gradient_SDV.sum(axis=0).astype(head_DV.dtype), None


def _logit_gradient(log_probability_SWC, is_target_SWC, by_logprob_SW, by_entropy_SW=None, entropy_SW=None):
    """The loss's gradient by the scaled logits, from its gradients by log-probability and entropy."""
    factor = -by_logprob_SW[:, :, None]
    if by_entropy_SW is not None:
        factor = factor - by_entropy_SW[:, :, None] * (log_probability_SWC + entropy_SW[:, :, None])
    return jnp.exp(log_probability_SWC) * factor + jnp.where(is_target_SWC, by_logprob_SW[:, :, None], 0.0)


packed_scores.defvjp(_forward, _backward)
