"""The compiled half of the embedded engine: extend prefixes, copy rows, decode a few steps.

All three are pure functions of (params, cache, arrays) over two kinds of cache: the store, whose rows keep prefixes,
and the lanes, whose rows are turns that are being sampled. Rows and tokens of a call are static, how many of the rows
are real is not: the engine keeps the set of compiled shapes small. No scheduling, no requests.

Lengths are the caller's, who gives them with each call. A row holds all tokens of its turn but the last one, which
enters with the next decode.

Legend: B cache rows, R rows of one call, T tokens of a bucket, N new tokens at most, E stop or watched ids, V vocab,
L layers, K key-value heads, H head dim, D hidden, S cache slots.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from orchestra_jax import sharding
from orchestra_jax.generation.head import head_logits
from orchestra_jax.generation.sampling import SamplingRows, sample
from orchestra_jax.models import compilation
from orchestra_jax.models.config import ModelConfig
from orchestra_jax.models.kv_cache import KVCache, empty_cache, write
from orchestra_jax.models.transformer import Transformer, head_weights, join_projections

# Where there is a mesh, each device keeps the key heads it computes. No names for the dims behind: jit hands arrays
# back without them, and would take a cache that has them for one of another layout, to be compiled for anew.
CACHE_AXES = KVCache(
    PartitionSpec("layers", None, "kv_heads"), PartitionSpec("layers", None, "kv_heads"), PartitionSpec()
)


class Turns(NamedTuple):
    """What each row of a decode is to generate."""

    lengths_R: jax.Array  # int32: slots that are filled
    last_tokens_R: jax.Array  # int32: the token that is not in the cache yet
    num_left_R: jax.Array  # int32: tokens to sample at most; 0 for a row without a turn
    stop_ids_RE: jax.Array  # int32: ids that end a turn, padded with -1
    watch_ids_RE: jax.Array  # int32: ids that the caller waits for, padded with -1
    sampling: SamplingRows


class Limits(NamedTuple):
    """When a decode returns although rows still run; besides, a watched id ends it at once. int32 scalars."""

    num_steps: jax.Array
    num_ended: jax.Array  # rows that ended in this call


class Sampled(NamedTuple):
    tokens_RN: jax.Array  # int32; 0 behind the last
    logprobs_RN: jax.Array  # float32, natural, of the temperature-scaled distribution (of the logits' own if greedy)
    num_tokens_R: jax.Array  # int32
    is_stopped_R: jax.Array  # bool: ended by a stop id
    num_steps: jax.Array  # int32: steps that ran


def make_cache(config: ModelConfig, num_rows: int, num_slots: int, mesh: Mesh | None) -> KVCache:
    """An empty cache, laid out on the mesh if there is one. ValueError if its tensor axis does not divide the heads."""
    if mesh is None:
        return empty_cache(config, num_rows, num_slots)
    num_splits = mesh.shape.get("tensor", 1)
    if config.num_kv_heads % num_splits:
        raise ValueError(
            f"{config.num_kv_heads} key-value heads over a tensor axis of {num_splits}: choose a divisor for the axis"
        )
    make = functools.partial(empty_cache, config, num_rows, num_slots)
    return jax.jit(make, out_shardings=sharding.shardings(CACHE_AXES, mesh))()


@functools.partial(compilation.jit, static_argnames=("config", "num_slots"), donate_argnames="store")
def extend(
    params, store: KVCache, source_rows_R, rows_R, lengths_R, num_rows, tokens_RT, num_tokens_R,
    *, config: ModelConfig, num_slots: int,
) -> KVCache:  # fmt: skip
    """Runs left-aligned tokens behind prefixes, the first `lengths_R` slots of `source_rows_R`; both go to `rows_R`.

    num_rows: the rows that are real. num_slots: at least the longest prefix with its new tokens.
    """
    is_valid_RT = jnp.arange(tokens_RT.shape[1])[None, :] < num_tokens_R[:, None]
    own = _take_rows(store, source_rows_R, num_rows, num_slots)._replace(lengths_B=lengths_R)
    _, own = _forward(params, own, tokens_RT, is_valid_RT, config)
    return _put_rows(store, rows_R, num_rows, own)


@functools.partial(jax.jit, donate_argnames="cache")
def copy_rows(cache: KVCache, source: KVCache, rows_R, source_rows_R, num_rows) -> KVCache:
    """Copies the first `num_rows` of `source_rows_R` to `rows_R` of another cache: as many slots as both have."""
    num_slots = min(cache.num_slots, source.num_slots)
    return _put_rows(cache, rows_R, num_rows, _take_rows(source, source_rows_R, num_rows, num_slots))


@functools.partial(compilation.jit, static_argnames=("config", "max_steps"), donate_argnames="lane")
def decode(
    params, lane: KVCache, turns: Turns, limits: Limits, is_allowed_RV=None, *, config: ModelConfig, max_steps: int
) -> tuple[KVCache, Sampled]:
    """Samples one token after the other in every row of a lane, in place, until all have ended or a limit is met."""
    return _decode(params, lane, turns, limits, is_allowed_RV, config, max_steps)


@functools.partial(compilation.jit, static_argnames=("config", "max_steps"), donate_argnames="lane")
def decode_few(
    params, lane: KVCache, rows_R, num_rows, turns: Turns, limits: Limits, is_allowed_RV=None,
    *, config: ModelConfig, max_steps: int,
) -> tuple[KVCache, Sampled]:  # fmt: skip
    """`decode` of some rows of a lane, which are copied out and back: for the few that go on when most have ended."""
    own = _take_rows(lane, rows_R, num_rows, lane.num_slots)
    own, sampled = _decode(params, own, turns, limits, is_allowed_RV, config, max_steps)
    return _put_rows(lane, rows_R, num_rows, own), sampled


def _decode(params, cache: KVCache, turns: Turns, limits: Limits, is_allowed_RV, config, max_steps):
    num_rows = len(turns.last_tokens_R)
    cache = cache._replace(lengths_B=turns.lengths_R)
    head_DV = head_weights(params, config)
    is_on_one_gpu = jax.default_backend() == "gpu" and not sharding.has_mesh()
    if is_on_one_gpu and is_allowed_RV is None:  # constrained turns take one step a dispatch: not worth its copy
        params = join_projections(params)

    def is_running(sampled: Sampled):
        return ~sampled.is_stopped_R & (sampled.num_tokens_R < turns.num_left_R)

    def should_go_on(carry):
        _, _, num_ended, has_watched, sampled = carry
        is_within = (sampled.num_steps < jnp.minimum(limits.num_steps, max_steps)) & (num_ended < limits.num_ended)
        return is_running(sampled).any() & is_within & ~has_watched

    def step(carry):
        cache, token_R, num_ended, _, sampled = carry
        is_running_R = is_running(sampled)
        hidden_R1D, cache = _forward(params, cache, token_R[:, None], is_running_R[:, None], config)
        logits_RV = head_logits(hidden_R1D[:, 0], head_DV)
        token_R, logprob_R = sample(logits_RV, turns.sampling, cache.lengths_B, is_allowed_RV)
        is_stop_R = (token_R[:, None] == turns.stop_ids_RE).any(axis=1)
        is_watched_R = (token_R[:, None] == turns.watch_ids_RE).any(axis=1)
        number = sampled.num_steps
        sampled = Sampled(
            sampled.tokens_RN.at[:, number].set(jnp.where(is_running_R, token_R, 0)),
            sampled.logprobs_RN.at[:, number].set(jnp.where(is_running_R, logprob_R, 0.0)),
            sampled.num_tokens_R + is_running_R,
            sampled.is_stopped_R | (is_running_R & is_stop_R),
            number + 1,
        )
        num_ended += (is_running_R & ~is_running(sampled)).sum(dtype=jnp.int32)
        return cache, token_R, num_ended, (is_running_R & is_watched_R).any(), sampled

    sampled = Sampled(
        jnp.zeros((num_rows, max_steps), jnp.int32),
        jnp.zeros((num_rows, max_steps), jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros(num_rows, bool),
        jnp.int32(0),
    )
    carry = (cache, turns.last_tokens_R, jnp.int32(0), jnp.bool_(False), sampled)
    cache, *_, sampled = jax.lax.while_loop(should_go_on, step, carry)
    return _on_mesh(cache), sampled


def _on_mesh(cache: KVCache) -> KVCache:
    """Holds a cache to its layout, so that the next call finds it as it was compiled for. Nothing without a mesh."""
    return KVCache(*map(nn.with_logical_constraint, cache, map(tuple, CACHE_AXES)))


def _forward(params, own: KVCache, tokens_RT, is_valid_RT, config: ModelConfig):
    positions_RT = own.lengths_B[:, None] + jnp.arange(tokens_RT.shape[1])[None, :]
    hidden_RTD, new_keys_values = Transformer(config).apply(
        {"params": params}, tokens_RT, positions_RT, is_valid_RT.astype(jnp.int32), own
    )
    return hidden_RTD, write(own, new_keys_values, own.lengths_B, is_valid_RT)


def _take_rows(cache: KVCache, rows_R, num_rows, num_slots: int) -> KVCache:
    """A copy of the first slots of some rows, without their lengths.

    Row by row: a gather of whole rows takes XLA CPU several times longer.
    """

    def take(array, row_shape):
        def copy_row(r, taken):
            row = jax.lax.dynamic_slice(array, (0, rows_R[r], 0, 0, 0), row_shape)
            return jax.lax.dynamic_update_slice(taken, row, (0, r, 0, 0, 0))

        empty = jnp.zeros((row_shape[0], len(rows_R), *row_shape[2:]), array.dtype)
        return jax.lax.fori_loop(0, num_rows, copy_row, empty)

    num_layers, _, num_kv_heads, head_dim, _ = cache.keys_LCKHS.shape
    rows = (num_layers, 1, num_kv_heads)
    return KVCache(
        take(cache.keys_LCKHS, (*rows, head_dim, num_slots)),
        take(cache.values_LCKSH, (*rows, num_slots, head_dim)),
        jnp.zeros(len(rows_R), jnp.int32),
    )


def _put_rows(cache: KVCache, rows_R, num_rows, own: KVCache) -> KVCache:
    """Writes rows of `_take_rows` to `rows_R`."""

    def put(array, own_array):
        def copy_row(r, array):
            row = jax.lax.dynamic_slice_in_dim(own_array, r, 1, axis=1)
            return jax.lax.dynamic_update_slice(array, row, (0, rows_R[r], 0, 0, 0))

        return jax.lax.fori_loop(0, num_rows, copy_row, array)

    keys, values = put(cache.keys_LCKHS, own.keys_LCKHS), put(cache.values_LCKSH, own.values_LCKSH)
    return _on_mesh(KVCache(keys, values, cache.lengths_B))
