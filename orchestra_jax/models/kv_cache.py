"""The keys and values of tokens already seen. The layers only read it; new tokens enter through one `write`.

Slots [0, length) of a row are filled, in the order the tokens were seen; everything in the row belongs to segment 1 and
is earlier than any new token. Keys are stored rotated, so the cache needs no positions. Donate the cache to the jitted
function that calls `write`: the update is then in place.

Legend: L layers, B token rows, C cache rows (B = C * G), S slots, T new tokens, K key-value heads, H head dim,
P prompts, G token rows that share a cache row.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from orchestra_jax.models.attention import for_products
from orchestra_jax.models.config import ModelConfig


class KVCache(NamedTuple):
    """Token row b reads cache row b // (B // C); C < B is a cache shared by groups of neighbouring token rows."""

    keys_LCKHS: jax.Array  # the order in which attention reads them (attention.KeyBlock)
    values_LCKSH: jax.Array
    lengths_B: jax.Array  # int32: filled slots, by token row

    @property
    def num_slots(self) -> int:
        return self.keys_LCKHS.shape[-1]


def empty_cache(config: ModelConfig, num_rows, num_slots) -> KVCache:
    """A cache of `num_rows` rows with nothing in it, in the compute dtype."""
    rows = (config.num_layers, num_rows, config.num_kv_heads)
    return KVCache(
        keys_LCKHS=jnp.zeros((*rows, config.head_dim, num_slots), config.compute_dtype),
        values_LCKSH=jnp.zeros((*rows, num_slots, config.head_dim), config.compute_dtype),
        lengths_B=jnp.zeros(num_rows, jnp.int32),
    )


def write(cache: KVCache, new_keys_values, start_B, is_valid_BT, rows_B=None) -> KVCache:
    """Writes the valid new tokens of each row side by side from slot `start_B` on; the length becomes start + valid.

    `new_keys_values` is the pair [L, B, T, K, H] that the model returned. Tokens that are not valid leave no trace. A
    token past the last slot is dropped, although the length counts it: size the cache for the longest row. `rows_B`
    are the cache rows to write (all of them in order, if not given); a row number >= C is dropped, which lets a batch
    be padded. Slots at or past the new length keep stale keys, which nothing sees.
    """
    num_cache_rows = cache.keys_LCKHS.shape[1]
    if len(cache.lengths_B) != num_cache_rows:
        raise ValueError(
            f"a cache of {num_cache_rows} rows is shared by {len(cache.lengths_B)} token rows: it cannot be written; "
            "write to a cache with a row of its own for each token row"
        )
    if rows_B is None:
        rows_B = jnp.arange(num_cache_rows)
    slots_BT = start_B[:, None] + jnp.cumsum(is_valid_BT, axis=1, dtype=jnp.int32) - 1
    slots_BT = jnp.where(is_valid_BT, slots_BT, cache.num_slots)  # out of range: dropped
    # Two index arrays apart from each other put the rows and tokens in front: [B, T, L, K, H].
    keys_BTLKH, values_BTLKH = (jnp.moveaxis(new, 0, 2) for new in new_keys_values)
    all_, rows_B1 = slice(None), rows_B[:, None]
    keys, values = cache.keys_LCKHS, cache.values_LCKSH
    return KVCache(
        keys_LCKHS=keys.at[all_, rows_B1, :, :, slots_BT].set(keys_BTLKH.astype(keys.dtype), mode="drop"),
        values_LCKSH=values.at[all_, rows_B1, :, slots_BT].set(values_BTLKH.astype(values.dtype), mode="drop"),
        lengths_B=cache.lengths_B.at[rows_B].set(start_B + is_valid_BT.sum(axis=1, dtype=jnp.int32), mode="drop"),
    )


def shared_prefix_cache(new_keys_values, prompt_lengths_P, group_size) -> KVCache:
    """The prompts' own keys and values [L, P, T, K, H] as the cache of P * group_size completions.

    Prompts are padded on the right. Token row p * group_size + g continues prompt p. Gradients reach the prompts.
    """
    return KVCache(*for_products(*new_keys_values), jnp.repeat(prompt_lengths_P, group_size))
