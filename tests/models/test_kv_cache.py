"""The cache against the full forward pass: decoding, chunked prefill, shared prompts with gradients.

Legend: B rows, T tokens, P prompts, G completions of a prompt, D hidden.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.models import kv_cache, transformer
from orchestra_jax.models.config import MODELS
from orchestra_jax.models.logprobs import token_logprobs

jax.config.update("jax_numpy_rank_promotion", "raise")

TINY = MODELS["tiny"]
MODEL = transformer.Transformer(TINY)


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(TINY, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens_BT():
    return jnp.asarray(np.random.default_rng(0).integers(0, TINY.vocab_size, (3, 12)))


@jax.jit
def full_forward(params, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return MODEL.apply({"params": params}, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))[0]


@jax.jit
def extend(params, cache, tokens_BT, is_valid_BT):
    """One step of any width: runs the tokens behind each row's cache, then writes them."""
    positions_BT = cache.lengths_B[:, None] + jnp.cumsum(is_valid_BT, axis=1) - 1
    hidden_BTD, new = MODEL.apply({"params": params}, tokens_BT, positions_BT, is_valid_BT.astype(jnp.int32), cache)
    return hidden_BTD, kv_cache.write(cache, new, cache.lengths_B, is_valid_BT)


def test_prefill_and_decode_of_ragged_rows_equal_the_full_forward(params, tokens_BT):
    expected_BTD = full_forward(params, tokens_BT)
    prompt_lengths_B = np.array([2, 5, 4])
    is_valid_BT = jnp.arange(5)[None, :] < prompt_lengths_B[:, None]
    cache = kv_cache.empty_cache(TINY, num_rows=3, num_slots=12)
    prompts_BT = jnp.where(is_valid_BT, tokens_BT[:, :5], 9)  # whatever stands in the padding
    hidden_BTD, cache = extend(params, cache, prompts_BT, is_valid_BT)
    np.testing.assert_array_equal(cache.lengths_B, prompt_lengths_B)
    np.testing.assert_allclose(hidden_BTD[is_valid_BT], expected_BTD[:, :5][is_valid_BT], atol=1e-5)
    for _ in range(7):
        lengths_B = np.asarray(cache.lengths_B)
        next_B1 = jnp.take_along_axis(tokens_BT, lengths_B[:, None], axis=1)
        hidden_B1D, cache = extend(params, cache, next_B1, jnp.ones((3, 1), bool))
        np.testing.assert_allclose(hidden_B1D[:, 0], expected_BTD[np.arange(3), lengths_B], atol=1e-5)
    np.testing.assert_array_equal(cache.lengths_B, prompt_lengths_B + 7)


def test_chunked_prefill_with_holes_equals_the_full_forward(params, tokens_BT):
    expected_BTD = full_forward(params, tokens_BT)
    cache = kv_cache.empty_cache(TINY, num_rows=3, num_slots=12)
    start_B = np.zeros(3, int)
    # Row 2 sits out the second chunk, and row 1 has padding on the left of it.
    for counts, is_left in (((4, 2, 4), False), ((4, 3, 0), True), ((1, 4, 3), False)):
        counts_B = np.array(counts)
        slots_BT = np.arange(4)[None, :] - (4 - counts_B[:, None] if is_left else 0)
        is_valid_BT = (slots_BT >= 0) & (slots_BT < counts_B[:, None])
        index_BT = np.where(is_valid_BT, start_B[:, None] + slots_BT, 0)
        chunk_BT = jnp.take_along_axis(tokens_BT, index_BT, axis=1)
        hidden_BTD, cache = extend(params, cache, chunk_BT, jnp.asarray(is_valid_BT))
        assert np.isfinite(hidden_BTD).all()
        expected = np.take_along_axis(np.asarray(expected_BTD), index_BT[:, :, None], axis=1)
        np.testing.assert_allclose(hidden_BTD[is_valid_BT], expected[is_valid_BT], atol=1e-5)
        start_B += counts_B
        np.testing.assert_array_equal(cache.lengths_B, start_B)


def test_write_puts_valid_tokens_side_by_side_and_leaves_the_rest_alone():
    cache = kv_cache.empty_cache(TINY, num_rows=3, num_slots=4)
    cache = cache._replace(lengths_B=jnp.array([1, 2, 3]))
    shape = (TINY.num_layers, 2, 3, TINY.num_kv_heads, TINY.head_dim)
    new = jnp.broadcast_to(jnp.array([[1.0, 2, 3], [4, 5, 6]])[None, :, :, None, None], shape)
    is_valid_BT = jnp.array([[True, False, True], [False, True, True]])
    # New row 0 goes to cache row 2, where its second token no longer fits; new row 1 to row 0, from the start.
    cache = kv_cache.write(cache, (new, -new), jnp.array([3, 0]), is_valid_BT, rows_B=jnp.array([2, 0]))
    expected_CS = np.array([[5, 6, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
    expected_keys = np.broadcast_to(expected_CS[None, :, None, None, :], cache.keys_LCKHS.shape)
    expected_values = np.broadcast_to(-expected_CS[None, :, None, :, None], cache.values_LCKSH.shape)
    np.testing.assert_array_equal(cache.keys_LCKHS, expected_keys)
    np.testing.assert_array_equal(cache.values_LCKSH, expected_values)
    np.testing.assert_array_equal(cache.lengths_B, [2, 2, 5])


def test_a_row_past_the_end_is_not_written():
    cache = kv_cache.empty_cache(TINY, num_rows=2, num_slots=3)
    new = jnp.ones((TINY.num_layers, 1, 2, TINY.num_kv_heads, TINY.head_dim))
    written = kv_cache.write(cache, (new, new), jnp.array([0]), jnp.ones((1, 2), bool), rows_B=jnp.array([2]))
    jax.tree.map(np.testing.assert_array_equal, written, cache)


def test_a_decode_step_updates_the_cache_in_place_in_a_tenth_of_its_memory():
    """At the shape of Qwen3-0.6B: a layer of the cache is copied at a time, and a model of three has few."""
    config = dataclasses.replace(MODELS["qwen3-0.6b"], compute_dtype="float32")
    model = transformer.Transformer(config)

    def decode(params, cache, tokens_B1, is_running_B1):
        """One token for each row that runs."""
        segments_B1 = is_running_B1.astype(jnp.int32)
        hidden_B1D, new = model.apply({"params": params}, tokens_B1, cache.lengths_B[:, None], segments_B1, cache)
        return hidden_B1D, kv_cache.write(cache, new, cache.lengths_B, is_running_B1)

    cache = jax.eval_shape(lambda: kv_cache.empty_cache(config, num_rows=8, num_slots=4096))
    params = jax.eval_shape(lambda key: transformer.init_params(config, key), jax.random.key(0))
    inputs = jax.ShapeDtypeStruct((8, 1), jnp.int32), jax.ShapeDtypeStruct((8, 1), bool)
    memory = jax.jit(decode, donate_argnums=1).lower(params, cache, *inputs).compile().memory_analysis()
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 10


@pytest.mark.slow
def test_a_shared_prompt_gives_the_logprobs_and_gradients_of_full_sequences(params):
    generator = np.random.default_rng(1)
    model = transformer.Transformer(dataclasses.replace(TINY, remat="full"))
    num_prompts, group_size, prompt_width, completion_width = 2, 3, 5, 4
    prompt_lengths_P = np.array([3, 5])
    completion_lengths_B = np.array([4, 1, 3, 2, 4, 4])
    prompts_PT = generator.integers(0, TINY.vocab_size, (num_prompts, prompt_width))
    completions_BT = generator.integers(0, TINY.vocab_size, (num_prompts * group_size, completion_width))
    starts_B = np.repeat(prompt_lengths_P, group_size)
    is_real_BT = np.arange(completion_width)[None] < completion_lengths_B[:, None]
    is_target_BT = is_real_BT[:, 1:]
    temperature_B = jnp.linspace(0.7, 1.3, num_prompts * group_size)

    def logprobs(params, hidden_BTD):
        head_DV = transformer.head_weights(params, TINY)
        targets_BT = jnp.asarray(completions_BT[:, 1:])
        return token_logprobs(hidden_BTD, head_DV, targets_BT, temperature_B, chunk=6)

    def shared(params):
        prompt_positions_PT = np.tile(np.arange(prompt_width), (num_prompts, 1))
        prompt_segments_PT = (prompt_positions_PT < prompt_lengths_P[:, None]).astype(int)
        _, new = model.apply({"params": params}, prompts_PT, prompt_positions_PT, prompt_segments_PT)
        cache = kv_cache.shared_prefix_cache(new, jnp.asarray(prompt_lengths_P), group_size)
        positions_BT = starts_B[:, None] + np.arange(completion_width)[None]
        hidden_BTD, _ = model.apply({"params": params}, completions_BT, positions_BT, is_real_BT.astype(int), cache)
        return logprobs(params, hidden_BTD[:, :-1])

    def full(params):
        sequences_BT = np.zeros((num_prompts * group_size, prompt_width + completion_width), int)
        for row, (start, completion_T) in enumerate(zip(starts_B, completions_BT, strict=True)):
            sequences_BT[row, :start] = prompts_PT[row // group_size, :start]
            sequences_BT[row, start : start + completion_width] = completion_T
        index_BT = starts_B[:, None] + np.arange(completion_width - 1)[None]
        hidden_BTD = full_forward(params, jnp.asarray(sequences_BT))
        return logprobs(params, jnp.take_along_axis(hidden_BTD, index_BT[:, :, None], axis=1))

    def loss(function, params):
        logprobs_BT = jnp.where(is_target_BT, function(params), 0.0)
        return jnp.sum(logprobs_BT * jnp.arange(1.0, completion_width)[None]), logprobs_BT

    gradient_of = jax.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)
    (gradients, logprobs_BT), (expected_gradients, expected_BT) = gradient_of(shared, params), gradient_of(full, params)
    np.testing.assert_allclose(logprobs_BT, expected_BT, atol=1e-5)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected_gradients))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * scale), gradients, expected_gradients)


def test_a_shared_cache_is_not_written_and_a_foreign_one_not_read(params, tokens_BT):
    _, new = MODEL.apply({"params": params}, tokens_BT, tokens_BT, jnp.ones_like(tokens_BT))
    cache = kv_cache.shared_prefix_cache(new, jnp.array([12, 12, 12]), group_size=2)
    with pytest.raises(ValueError, match="3 rows is shared by 6 token rows"):
        kv_cache.write(cache, new, cache.lengths_B, jnp.ones((6, 1), bool))
    with pytest.raises(ValueError, match="3 token rows with a cache for 6"):
        MODEL.apply({"params": params}, tokens_BT, tokens_BT, jnp.ones_like(tokens_BT), cache)
