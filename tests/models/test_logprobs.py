"""Chunked log-probabilities and entropies against log_softmax over all logits, and what they hold in memory.

Legend: B rows, T tokens, D hidden, V vocab.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.models import logprobs, vocabulary
from orchestra_jax.models.logprobs import token_logprobs, token_logprobs_and_entropy
from orchestra_jax.models.vocabulary import Splits
from tests.models.few_tokens import HEAD_DV, HIDDEN_BTD, MASK_BT, TARGETS_BT, TEMPERATURE_B, WEIGHTS_2BT

jax.config.update("jax_numpy_rank_promotion", "raise")


def reference_logprobs_and_entropy(hidden_BTD, head_DV, mask_BT):
    log_probabilities_BTV = jax.nn.log_softmax(hidden_BTD @ head_DV / TEMPERATURE_B[:, None, None])
    logprobs_BT = jnp.take_along_axis(log_probabilities_BTV, TARGETS_BT[:, :, None], axis=-1)[:, :, 0]
    entropy_BT = -(jnp.exp(log_probabilities_BTV) * log_probabilities_BTV).sum(axis=-1)
    return jnp.where(mask_BT, logprobs_BT, 0.0), jnp.where(mask_BT, entropy_BT, 0.0)


def values_and_gradients(function):
    def weighted(hidden_BTD, head_DV):
        values = function(hidden_BTD, head_DV)
        return sum((w * x).sum() for w, x in zip(WEIGHTS_2BT, values, strict=False)), values

    gradients, values = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))(HIDDEN_BTD, HEAD_DV)
    return (*gradients, *values)


@functools.cache
def expected(is_masked, num_values):
    is_scored_BT = MASK_BT if is_masked else jnp.ones_like(MASK_BT)
    return values_and_gradients(lambda *inputs: reference_logprobs_and_entropy(*inputs, is_scored_BT)[:num_values])


@pytest.mark.parametrize(
    ("is_masked", "chunk", "vocab_block", "num_shards"),
    [
        (False, 1000, 11, 1),
        (True, 6, 4, 1),  # the last block repeats a column of the one before
        (True, 6, 11, 2),
        (False, 6, 4, 2),
    ],
)
def test_values_and_gradients_are_those_of_log_softmax(monkeypatch, is_masked, chunk, vocab_block, num_shards):
    monkeypatch.setattr(logprobs, "VOCAB_BLOCK", vocab_block)
    monkeypatch.setattr(vocabulary, "VECTOR", 1)
    rest = (TARGETS_BT, TEMPERATURE_B, chunk, MASK_BT if is_masked else None, Splits(rows=num_shards))
    both = values_and_gradients(lambda *inputs: token_logprobs_and_entropy(*inputs, *rest))
    for one, other in zip(both, expected(is_masked, 2), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    alone = values_and_gradients(lambda *inputs: [token_logprobs(*inputs, *rest)])
    for one, other in zip(alone, expected(is_masked, 1), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("num_scored", "num_chunks"), [(0, 0), (1, 1), (6, 1), (7, 2), (28, 5)])
def test_the_head_meets_no_more_chunks_than_the_scored_tokens_fill(monkeypatch, num_scored, num_chunks):
    """Products with the head that really run, forward and backward, of 28 tokens in chunks of 6."""
    runs, logits = [], vocabulary.logits

    def counted(*arguments):
        jax.debug.callback(lambda: runs.append(1))
        return logits(*arguments)

    monkeypatch.setattr(vocabulary, "logits", counted)
    mask_BT = jnp.arange(28).reshape(4, 7) % 28 < num_scored
    values_and_gradients(lambda *inputs: [token_logprobs(*inputs, TARGETS_BT, TEMPERATURE_B, 6, mask_BT)])
    jax.effects_barrier()
    assert len(runs) == 2 * num_chunks


def test_a_batch_without_a_scored_token_has_gradients_of_zero():
    none_BT = jnp.zeros_like(MASK_BT)
    results = values_and_gradients(lambda *inputs: [token_logprobs(*inputs, TARGETS_BT, TEMPERATURE_B, 6, none_BT)])
    assert not any(np.abs(x).any() for x in results)


def test_what_is_not_scored_may_be_anything():
    """NaN in a hidden state outside of the mask reaches neither the values nor the gradients of the rest."""
    hidden_BTD = jnp.where(MASK_BT[:, :, None], HIDDEN_BTD, jnp.nan)

    def total(hidden_BTD, head_DV):
        return token_logprobs(hidden_BTD, head_DV, TARGETS_BT, TEMPERATURE_B, 6, MASK_BT).sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(hidden_BTD, HEAD_DV)
    assert all(np.isfinite(x).all() for x in gradients)
    assert not np.abs(gradients[0][~MASK_BT]).any() and np.abs(gradients[0][MASK_BT]).all()


def test_bfloat16_products_keep_float32_sums():
    hidden_BTD = HIDDEN_BTD.astype(jnp.bfloat16)
    values = token_logprobs(hidden_BTD, HEAD_DV, TARGETS_BT, TEMPERATURE_B, 8)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected(False, 1)[2], atol=0.1)


def test_rows_that_no_mesh_can_cut_are_refused():
    with pytest.raises(ValueError, match="4 rows cannot be cut into 3 parts"):
        token_logprobs(HIDDEN_BTD, HEAD_DV, TARGETS_BT, TEMPERATURE_B, 8, None, Splits(rows=3))


def temporary_bytes(num_rows, num_tokens, vocab_size, splits):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((num_rows, num_tokens, 32), (32, vocab_size))]
    targets = jax.ShapeDtypeStruct((num_rows, num_tokens), jnp.int32)
    mask = jax.ShapeDtypeStruct((num_rows, num_tokens), bool)

    def loss(hidden_BTD, head_DV, targets_BT, mask_BT):
        return token_logprobs(hidden_BTD, head_DV, targets_BT, jnp.ones(num_rows), 128, mask_BT, splits).sum()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return step.lower(*shapes, targets, mask).compile().memory_analysis().temp_size_in_bytes


def test_temporaries_grow_with_the_vocabulary_as_the_head_does_and_no_more():
    """Twice the columns: the gradient of the head and what it is added up in; no logits of all tokens."""
    small, large = (temporary_bytes(8, 512, vocab_size, Splits()) for vocab_size in (151_936, 2 * 151_936))
    head_bytes = 151_936 * 32 * 4
    assert large - small < 2.1 * head_bytes < 0.05 * 8 * 512 * 151_936 * 4


@pytest.mark.parametrize("splits", [Splits(), Splits(vocab=2)])  # in blocks of the vocab, and over all of it
def test_temporaries_at_the_vocabulary_of_qwen3(splits):
    vocab_size = 151_936
    small, large = (temporary_bytes(8, num_tokens, vocab_size, splits) for num_tokens in (512, 1024))
    assert small < 8 * 512 * vocab_size * 4 / 5
    # Twice the tokens: no more than the tokens' own arrays (hidden states, and a few numbers a token).
    assert large - small < 8 * 512 * (3 * 32 + 32) * 4
