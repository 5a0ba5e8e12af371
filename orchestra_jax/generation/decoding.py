"""The compiled half of the embedded engine: prefill prompts into cache rows, extend rows, decode rows to their ends.

All three are pure functions of (params, cache, arrays). Prompts are prefilled once and copied to every row that
continues them; the other two take their rows out of the cache, work on these alone and put them back, so a call costs
what its own rows and lengths cost. The number of rows, slots and tokens of a call are static: the engine keeps the set
of compiled shapes small. No scheduling, no requests.

A cache row holds all tokens of its session but the last one, which enters with the next decode. Rows that pad a call
out name a cache row that nobody owns.

Legend: B cache rows, R rows of one call, U different prompts, T tokens of a bucket, N new tokens at most, E stop ids,
V vocab, L layers, K key-value heads, H head dim, D hidden, S cache slots.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from orchestra_jax.models.attention import for_products
from orchestra_jax.models.config import ModelConfig
from orchestra_jax.models.kv_cache import KVCache, write
from orchestra_jax.models.transformer import Transformer, head_weights


class Turns(NamedTuple):
    """What each row of a decode is to generate; padding has max_new_R of 0."""

    rows_R: jax.Array  # int32: cache rows
    last_tokens_R: jax.Array  # int32: the token that is not in the cache yet
    max_new_R: jax.Array  # int32: tokens to sample at most
    temperature_R: jax.Array  # float32; 0 is greedy
    key_data_R2: jax.Array  # uint32: one key per session; the position is folded in
    stop_ids_RE: jax.Array  # int32: ids that end a turn, padded with -1


class Sampled(NamedTuple):
    tokens_RN: jax.Array  # int32; 0 behind the last
    logprobs_RN: jax.Array  # float32, natural, of the temperature-scaled distribution (of the logits' own if greedy)
    num_tokens_R: jax.Array  # int32
    is_stopped_R: jax.Array  # bool: ended by a stop id


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

    def copy(kept, new):
        """Arrays [L, B, K, ...] and [L, U, K, ...], the latter with fewer slots."""
        mixed = jnp.where(is_fresh_B[None, :, None, None, None], new[:, prompt_of_row_B], _cut(kept, new.shape))
        return jax.lax.dynamic_update_slice(kept, mixed.astype(kept.dtype), (0, 0, 0, 0, 0))

    new_keys, new_values = for_products(*new_keys_values)
    return KVCache(
        copy(cache.keys_LCKHS, new_keys),
        copy(cache.values_LCKSH, new_values),
        jnp.where(is_fresh_B, lengths_U[prompt_of_row_B], cache.lengths_B),
    )


@functools.partial(jax.jit, static_argnames=("config", "num_slots"), donate_argnames="cache")
def extend(params, cache: KVCache, rows_R, tokens_RT, num_tokens_R, *, config: ModelConfig, num_slots: int) -> KVCache:
    """Feeds left-aligned tokens that were not sampled: what a session was given since its last turn."""
    is_valid_RT = jnp.arange(tokens_RT.shape[1])[None, :] < num_tokens_R[:, None]
    _, own = _forward(params, _take_rows(cache, rows_R, num_slots), tokens_RT, is_valid_RT, config)
    return _put_rows(cache, rows_R, own)


@functools.partial(jax.jit, static_argnames=("config", "num_slots", "max_new_tokens"), donate_argnames="cache")
def decode(
    params, cache: KVCache, turns: Turns, num_left, *, config: ModelConfig, num_slots: int, max_new_tokens: int
) -> tuple[KVCache, Sampled]:
    """Samples until all rows but `num_left` have met a stop id or their own limit.

    num_left: int32 scalar. The rows left over go on in a later call with fewer rows: a turn that rambles does not keep
    a full batch busy. num_slots: at least the longest row with what it may sample.
    """
    num_rows = len(turns.rows_R)
    keys_R = jax.random.wrap_key_data(turns.key_data_R2, impl="threefry2x32")
    head_DV = head_weights(params, config)

    def is_running(sampled: Sampled):
        return ~sampled.is_stopped_R & (sampled.num_tokens_R < turns.max_new_R)

    def step(carry):
        number, own, token_R, sampled = carry
        is_running_R = is_running(sampled)
        hidden_R1D, own = _forward(params, own, token_R[:, None], is_running_R[:, None], config)
        logits_RV = jnp.matmul(hidden_R1D[:, 0], head_DV.astype(hidden_R1D.dtype), preferred_element_type=jnp.float32)
        token_R, logprob_R = _sample(logits_RV, turns.temperature_R, keys_R, own.lengths_B)
        is_stop_R = (token_R[:, None] == turns.stop_ids_RE).any(axis=1)
        sampled = Sampled(
            sampled.tokens_RN.at[:, number].set(jnp.where(is_running_R, token_R, 0)),
            sampled.logprobs_RN.at[:, number].set(jnp.where(is_running_R, logprob_R, 0.0)),
            sampled.num_tokens_R + is_running_R,
            sampled.is_stopped_R | (is_running_R & is_stop_R),
        )
        return number + 1, own, token_R, sampled

    sampled = Sampled(
        jnp.zeros((num_rows, max_new_tokens), jnp.int32),
        jnp.zeros((num_rows, max_new_tokens), jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros(num_rows, bool),
    )
    carry = (jnp.int32(0), _take_rows(cache, turns.rows_R, num_slots), turns.last_tokens_R, sampled)
    _, own, _, sampled = jax.lax.while_loop(lambda carry: is_running(carry[3]).sum() > num_left, step, carry)
    return _put_rows(cache, turns.rows_R, own), sampled


def _forward(params, own: KVCache, tokens_RT, is_valid_RT, config: ModelConfig):
    positions_RT = own.lengths_B[:, None] + jnp.arange(tokens_RT.shape[1])[None, :]
    hidden_RTD, new_keys_values = Transformer(config).apply(
        {"params": params}, tokens_RT, positions_RT, is_valid_RT.astype(jnp.int32), own
    )
    return hidden_RTD, write(own, new_keys_values, own.lengths_B, is_valid_RT)


def _sample(logits_RV, temperature_R, keys_R, position_R):
    """One token per row, by the Gumbel maximum, with its log-probability."""
    is_greedy_R = temperature_R == 0
    scaled_RV = logits_RV / jnp.where(is_greedy_R, 1.0, temperature_R)[:, None]

    def noise(key, position):
        return jax.random.gumbel(jax.random.fold_in(key, position), logits_RV.shape[1:])

    noise_RV = jnp.where(is_greedy_R[:, None], 0.0, jax.vmap(noise)(keys_R, position_R))
    token_R = jnp.argmax(scaled_RV + noise_RV, axis=-1).astype(jnp.int32)
    chosen_R = jnp.take_along_axis(scaled_RV, token_R[:, None], axis=-1)[:, 0]
    return token_R, chosen_R - jax.nn.logsumexp(scaled_RV, axis=-1)


def _cut(array, shape):
    """The first entries of each dim but the second, as many as in `shape`."""
    return array[: shape[0], :, : shape[2], : shape[3], : shape[4]]


def _take_rows(cache: KVCache, rows_R, num_slots: int) -> KVCache:
    """A copy of the first slots of some rows. Row by row: a gather of whole rows takes XLA CPU several times longer."""

    def take(array, row_shape):
        def copy_row(r, taken):
            row = jax.lax.dynamic_slice(array, (0, rows_R[r], 0, 0, 0), row_shape)
            return jax.lax.dynamic_update_slice(taken, row, (0, r, 0, 0, 0))

        empty = jnp.zeros((row_shape[0], len(rows_R), *row_shape[2:]), array.dtype)
        return jax.lax.fori_loop(0, len(rows_R), copy_row, empty)

    num_layers, _, num_kv_heads, head_dim, _ = cache.keys_LCKHS.shape
    rows = (num_layers, 1, num_kv_heads)
    return KVCache(
        take(cache.keys_LCKHS, (*rows, head_dim, num_slots)),
        take(cache.values_LCKSH, (*rows, num_slots, head_dim)),
        cache.lengths_B[rows_R],
    )


def _put_rows(cache: KVCache, rows_R, own: KVCache) -> KVCache:
    """Writes rows of `_take_rows` back to where they came from."""

    def put(array, own_array):
        def copy_row(r, array):
            row = jax.lax.dynamic_slice_in_dim(own_array, r, 1, axis=1)
            return jax.lax.dynamic_update_slice(array, row, (0, rows_R[r], 0, 0, 0))

        return jax.lax.fori_loop(0, len(rows_R), copy_row, array)

    return KVCache(
        put(cache.keys_LCKHS, own.keys_LCKHS),
        put(cache.values_LCKSH, own.values_LCKSH),
        cache.lengths_B.at[rows_R].set(own.lengths_B),
    )
