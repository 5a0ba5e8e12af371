"""One token per row from its logits, with the log-probability that the learner would give it.

    p = softmax(logits / temperature); the log-probability is log p[token], whatever is cut off;
    top-k, then top-p of what is left, then min-p of the most probable set p to 0; the token is the first whose
    cumulative probability exceeds u times the total, u uniform, from the row's own key and position.

A row's result depends on nothing but its own logits, settings, key and position. A whole vocabulary of Gumbel noise
would do the same at one random number and two logarithms per entry.

Legend: R rows, V vocab, N blocks of the vocab, W entries of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # entries: the cumulative sum runs over blocks first and then within one


class SamplingRows(NamedTuple):
    """The settings of each row, and its key: the position is folded in."""

    temperature_R: jax.Array  # float32; 0 is greedy
    top_k_R: jax.Array  # int32; 0: all
    top_p_R: jax.Array  # float32
    min_p_R: jax.Array  # float32
    key_data_R2: jax.Array  # uint32


def sample(logits_RV, rows: SamplingRows, position_R, is_allowed_RV=None):
    """-> (token_R int32, logprob_R float32), the latter natural, of the untruncated, unconstrained distribution.

    A greedy row takes the most probable token, with the log-probability of the logits' own distribution.
    """
    is_greedy_R = rows.temperature_R == 0
    scaled_RV = logits_RV / jnp.where(is_greedy_R, 1.0, rows.temperature_R)[:, None]
    weight_RV = jnp.exp(scaled_RV - scaled_RV.max(axis=-1, keepdims=True))
    log_total_R = jnp.log(weight_RV.sum(axis=-1))
    if is_allowed_RV is not None:  # what is allowed may be too improbable to have a weight beside the rest
        allowed_RV = jnp.where(is_allowed_RV, scaled_RV, -jnp.inf)
        weight_RV = jnp.exp(allowed_RV - allowed_RV.max(axis=-1, keepdims=True))
    # Sorting a vocabulary costs more than all the rest: only where some row asks for it.
    is_truncated_R = (rows.top_k_R > 0) | (rows.top_p_R < 1) | (rows.min_p_R > 0)
    zeros_R = jnp.zeros_like(log_total_R)
    least_R = jax.lax.cond(is_truncated_R.any(), _least_weight, lambda *_: zeros_R, weight_RV, rows)
    least_R = jnp.where(is_truncated_R, least_R, 0.0)  # a row is not cut because its neighbour is
    weight_RNW = _blocks(jnp.where(weight_RV >= least_R[:, None], weight_RV, 0.0))

    def uniform(key_data_2, position):
        key = jax.random.wrap_key_data(key_data_2, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, position))

    drawn_R = _first_beyond(weight_RNW, jax.vmap(uniform)(rows.key_data_R2, position_R))
    token_R = jnp.where(is_greedy_R, _argmax(weight_RNW), drawn_R).astype(jnp.int32)
    token_R = jnp.minimum(token_R, logits_RV.shape[-1] - 1)  # weights of NaN would point into the padding
    chosen_R = jnp.take_along_axis(scaled_RV, token_R[:, None], axis=-1)[:, 0]
    return token_R, chosen_R - scaled_RV.max(axis=-1) - log_total_R


def _least_weight(weight_RV, rows: SamplingRows):
    """The weight from which on an entry stays. Ties with the last that stays stay too."""
    vocab_size = weight_RV.shape[-1]
    sorted_RV = -jnp.sort(-weight_RV, axis=-1)
    num_kept_R = jnp.where(rows.top_k_R > 0, jnp.minimum(rows.top_k_R, vocab_size), vocab_size)
    top_RV = jnp.where(jnp.arange(vocab_size)[None, :] < num_kept_R[:, None], sorted_RV, 0.0)
    before_RV = jnp.cumsum(top_RV, axis=-1) - top_RV
    # The most probable token stays even where rounding puts top_p times the total at 0.
    is_kept_RV = (before_RV < rows.top_p_R[:, None] * top_RV.sum(axis=-1, keepdims=True)) & (top_RV > 0)
    least_R = jnp.where(is_kept_RV, top_RV, jnp.inf).min(axis=-1)
    return jnp.maximum(jnp.minimum(least_R, sorted_RV[:, 0]), rows.min_p_R * sorted_RV[:, 0])


def _blocks(weight_RV):
    padded_RV = jnp.pad(weight_RV, ((0, 0), (0, -weight_RV.shape[-1] % BLOCK)))
    return padded_RV.reshape(len(padded_RV), -1, BLOCK)


def _argmax(weight_RNW):
    """The first index of the largest weight. An argmax of the whole takes XLA CPU many times longer than maxima do."""
    block_R = jnp.argmax(weight_RNW.max(axis=-1), axis=-1)
    return block_R * BLOCK + jnp.argmax(_take_block(weight_RNW, block_R), axis=-1)


def _take_block(weight_RNW, block_R):
    return jnp.take_along_axis(weight_RNW, block_R[:, None, None], axis=1)[:, 0]


def _first_beyond(weight_RNW, uniform_R):
    """The first index whose cumulative weight exceeds uniform * total; never one of weight 0."""
    block_RN = weight_RNW.sum(axis=-1)
    target_R = uniform_R * block_RN.sum(axis=-1)
    block_R = _first(block_RN, target_R)
    cumulative_RN = jnp.cumsum(block_RN, axis=-1)
    before_R = jnp.take_along_axis(cumulative_RN - block_RN, block_R[:, None], axis=-1)[:, 0]
    return block_R * BLOCK + _first(_take_block(weight_RNW, block_R), target_R - before_R)


def _first(weight_RX, target_R):
    """The first X with cumulative weight > target; where rounding leaves none, the last of a weight above 0."""
    is_beyond_RX = (jnp.cumsum(weight_RX, axis=-1) > target_R[:, None]) & (weight_RX > 0)
    last_R = weight_RX.shape[-1] - 1 - jnp.argmax(weight_RX[:, ::-1] > 0, axis=-1)
    return jnp.where(is_beyond_RX.any(axis=-1), jnp.argmax(is_beyond_RX, axis=-1), last_R)
