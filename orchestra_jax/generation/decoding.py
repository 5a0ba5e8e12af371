"""The compiled half of the embedded engine: prefill prompts into cache rows, and decode a batch of turns to their ends.

Both are pure functions of (params, cache, arrays) with a fixed number of rows, so the set of compiled shapes is known:
one prefill per prompt bucket, one decode per bucket of new tokens.

Legend: B cache rows, U different prompts, T tokens of a bucket, N new tokens of a turn at most, V vocab,
L layers, K key-value heads, H head dim, D hidden.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from orchestra_jax.models.config import ModelConfig
from orchestra_jax.models.kv_cache import KVCache, write
from orchestra_jax.models.transformer import Transformer, head_weights


class Turns(NamedTuple):
    """What each row is to generate; rows that take no part have max_new_B of 0."""

    new_tokens_BT: jax.Array  # int32: tokens not yet in the cache, left-aligned; at least one for a row that takes part
    num_new_B: jax.Array  # int32
    max_new_B: jax.Array  # int32: tokens to sample at most
    temperature_B: jax.Array  # float32; 0 is greedy
    key_data_B2: jax.Array  # uint32: one key per request; the position is folded in
    is_stop_BV: jax.Array  # bool [1 or B, V]: ids that end a turn


class Sampled(NamedTuple):
    tokens_BN: jax.Array  # int32
    logprobs_BN: jax.Array  # float32
    num_tokens_B: jax.Array  # int32
    is_stopped_B: jax.Array  # bool: ended by a stop id


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(params, cache: KVCache, tokens_UT, lengths_U, prompt_of_row_B, *, config: ModelConfig) -> KVCache:
    """Runs each prompt once and copies its keys and values to every row that continues it.

    prompt_of_row_B: the prompt of each row, or a negative number for a row that keeps what it has.
    """
    positions_UT = jnp.broadcast_to(jnp.arange(tokens_UT.shape[1])[None, :], tokens_UT.shape)
    segment_ids_UT = (positions_UT < lengths_U[:, None]).astype(jnp.int32)
    _, new_keys_values = Transformer(config).apply({"params": params}, tokens_UT, positions_UT, segment_ids_UT)
    is_fresh_B = prompt_of_row_B >= 0
    prompt_of_row_B = jnp.maximum(prompt_of_row_B, 0)

    def copy(kept_LBSKH, new_LUTKH):
        start_LBTKH = kept_LBSKH[:, :, : tokens_UT.shape[1]]
        mixed_LBTKH = jnp.where(is_fresh_B[None, :, None, None, None], new_LUTKH[:, prompt_of_row_B], start_LBTKH)
        return jax.lax.dynamic_update_slice(kept_LBSKH, mixed_LBTKH.astype(kept_LBSKH.dtype), (0, 0, 0, 0, 0))

    return KVCache(
        copy(cache.keys_LCSKH, new_keys_values[0]),
        copy(cache.values_LCSKH, new_keys_values[1]),
        jnp.where(is_fresh_B, lengths_U[prompt_of_row_B], cache.lengths_B),
    )


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens"), donate_argnames="cache")
def decode(params, cache: KVCache, turns: Turns, *, config: ModelConfig, max_new_tokens: int) -> tuple[KVCache, Sampled]:
    """Feeds the new tokens of each row, then samples until every row has met a stop id or its own limit.

    The last sampled token of a row is not in the cache yet: it comes back among the new tokens of the next turn.
    """
    num_rows = len(turns.num_new_B)
    keys_B = jax.random.wrap_key_data(turns.key_data_B2)
    head_DV = head_weights(params, config)

    def forward(cache, tokens_BT, is_valid_BT):
        positions_BT = cache.lengths_B[:, None] + jnp.arange(tokens_BT.shape[1])[None, :]
        hidden_BTD, new_keys_values = Transformer(config).apply(
            {"params": params}, tokens_BT, positions_BT, is_valid_BT.astype(jnp.int32), cache
        )
        return hidden_BTD, write(cache, new_keys_values, cache.lengths_B, is_valid_BT)

    def sample(hidden_BD, position_B):
        """One token per row with its log-probability under the temperature-scaled distribution (1 for greedy)."""
        logits_BV = jnp.matmul(hidden_BD, head_DV.astype(hidden_BD.dtype), preferred_element_type=jnp.float32)
        is_greedy_B = turns.temperature_B == 0
        scaled_BV = logits_BV / jnp.where(is_greedy_B, 1.0, turns.temperature_B)[:, None]
        noise_BV = jax.vmap(lambda key, position: jax.random.gumbel(jax.random.fold_in(key, position), logits_BV.shape[1:]))(
            keys_B, position_B
        )
        token_B = jnp.argmax(scaled_BV + jnp.where(is_greedy_B[:, None], 0.0, noise_BV), axis=-1).astype(jnp.int32)
        chosen_B = jnp.take_along_axis(scaled_BV, token_B[:, None], axis=-1)[:, 0]
        return token_B, chosen_B - jax.nn.logsumexp(scaled_BV, axis=-1)

    def record(sampled: Sampled, step, token_B, logprob_B, is_running_B):
        is_stop_B = jnp.take_along_axis(
            jnp.broadcast_to(turns.is_stop_BV, (num_rows, turns.is_stop_BV.shape[1])), token_B[:, None], axis=1
        )[:, 0]
        return Sampled(
            sampled.tokens_BN.at[:, step].set(jnp.where(is_running_B, token_B, 0)),
            sampled.logprobs_BN.at[:, step].set(jnp.where(is_running_B, logprob_B, 0.0)),
            sampled.num_tokens_B + is_running_B,
            sampled.is_stopped_B | (is_running_B & is_stop_B),
        )

    def is_running(sampled):
        return ~sampled.is_stopped_B & (sampled.num_tokens_B < turns.max_new_B)

    is_valid_BT = jnp.arange(turns.new_tokens_BT.shape[1])[None, :] < turns.num_new_B[:, None]
    hidden_BTD, cache = forward(cache, turns.new_tokens_BT, is_valid_BT)
    last_B = jnp.maximum(turns.num_new_B - 1, 0)
    hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    sampled = Sampled(
        jnp.zeros((num_rows, max_new_tokens), jnp.int32),
        jnp.zeros((num_rows, max_new_tokens), jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros(num_rows, bool),
    )
    token_B, logprob_B = sample(hidden_BD, cache.lengths_B)
    sampled = record(sampled, 0, token_B, logprob_B, is_running(sampled))

    def step(carry):
        number, cache, token_B, sampled = carry
        is_running_B = is_running(sampled)
        hidden_B1D, cache = forward(cache, token_B[:, None], is_running_B[:, None])
        token_B, logprob_B = sample(hidden_B1D[:, 0], cache.lengths_B)
        return number + 1, cache, token_B, record(sampled, number, token_B, logprob_B, is_running_B)

    carry = (jnp.int32(1), cache, token_B, sampled)
    _, cache, _, sampled = jax.lax.while_loop(lambda carry: is_running(carry[3]).any(), step, carry)
    return cache, sampled
