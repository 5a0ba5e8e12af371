"""Chunked log-probabilities and entropies against log_softmax over all logits, and what they hold in memory.

Legend: B rows, T tokens, D hidden, V vocab.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.models import logprobs
from orchestra_jax.models.logprobs import Splits, token_logprobs, token_logprobs_and_entropy, token_loss

jax.config.update("jax_numpy_rank_promotion", "raise")

KEYS = jax.random.split(jax.random.key(1), 5)
HIDDEN_BTD = jax.random.normal(KEYS[0], (4, 7, 5))
HEAD_DV = jax.random.normal(KEYS[1], (5, 11))
TARGETS_BT = jax.random.randint(KEYS[2], (4, 7), 0, 11)
WEIGHTS_2BT = jax.random.normal(KEYS[3], (2, 4, 7))
MASK_BT = jax.random.uniform(KEYS[4], (4, 7)) < 0.4
TEMPERATURE_B = jnp.array([0.5, 1.0, 2.0, 0.7])


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
    monkeypatch.setattr(logprobs, "VECTOR", 1)
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
    runs, logits = [], logprobs._logits

    def counted(*arguments):
        jax.debug.callback(lambda: runs.append(1))
        return logits(*arguments)

    monkeypatch.setattr(logprobs, "_logits", counted)
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


def squared(logprobs, weights, offsets):
    """A loss that is not linear, so that its gradient must be taken at the token's own log-probability."""
    return weights * (logprobs - offsets) ** 2


def value_and_gradients_of_loss(is_fused, hidden_BTD, head_DV, chunk, mask_BT=None, splits=logprobs.WHOLE, factor=1.0):
    """-> ((loss, scores), gradients): of token_loss, or of the same loss behind token_logprobs and autodiff."""
    rest = (TARGETS_BT, TEMPERATURE_B, chunk, mask_BT, splits)
    is_scored_BT = jnp.ones_like(MASK_BT) if mask_BT is None else mask_BT
    weights_BT, offsets_BT = (jnp.where(is_scored_BT, x_BT, jnp.nan) for x_BT in WEIGHTS_2BT)

    def loss(hidden_BTD, head_DV):
        if is_fused:
            per_token = (weights_BT, offsets_BT)
            total, scores = token_loss(squared, hidden_BTD, head_DV, *rest, per_token=per_token, has_entropy=True)
        else:
            scores = token_logprobs_and_entropy(hidden_BTD, head_DV, *rest)
            total = jnp.where(is_scored_BT, squared(scores[0], *WEIGHTS_2BT), 0.0).sum()
        return factor * total, scores

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden_BTD, head_DV)


@pytest.mark.parametrize(
    ("is_masked", "chunk", "block", "num_shards", "factor"),
    [
        (False, 1000, 11, 1, 1.0),
        (True, 6, 4, 1, -2.5),  # the last block repeats a column of the one before
        (True, 6, 11, 2, 1.0),
        (False, 6, 4, 2, 3.0),
        (True, 6, 1, 4, 1.0),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 0.02)])
def test_the_loss_of_tokens_has_the_gradients_of_autodiff(
    monkeypatch, is_masked, chunk, block, num_shards, factor, dtype, tolerance
):
    """Of products of bfloat16 the gradients by the logits are rounded: 2^-8 of each, and so are the results."""
    for name in ("LOSS_BLOCK", "VOCAB_BLOCK"):
        monkeypatch.setattr(logprobs, name, block)
    monkeypatch.setattr(logprobs, "LOSS_CHUNK", chunk)
    monkeypatch.setattr(logprobs, "VECTOR", 1)
    inputs = HIDDEN_BTD.astype(dtype), HEAD_DV.astype(dtype)
    rest = (chunk, MASK_BT if is_masked else None, Splits(rows=num_shards), factor)
    fused, plain = (value_and_gradients_of_loss(is_fused, *inputs, *rest) for is_fused in (True, False))
    for one, other in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        assert one.dtype == other.dtype
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * float(jnp.abs(other).max()))


def test_the_loss_alone_is_that_with_gradients():
    mask = (6, MASK_BT)
    (loss, _), _ = value_and_gradients_of_loss(True, HIDDEN_BTD, HEAD_DV, *mask)
    alone, _ = jax.jit(
        lambda: token_loss(squared, HIDDEN_BTD, HEAD_DV, TARGETS_BT, TEMPERATURE_B, *mask, per_token=tuple(WEIGHTS_2BT))
    )()
    np.testing.assert_allclose(alone, loss, rtol=1e-6)


def test_no_gradient_comes_from_the_scores_beside_the_loss():
    def scores(hidden_BTD, head_DV):
        rest = (TARGETS_BT, TEMPERATURE_B, 6, MASK_BT)
        return sum(x.sum() for x in token_loss(jnp.negative, hidden_BTD, head_DV, *rest, has_entropy=True)[1])

    assert not any(np.abs(x).any() for x in jax.grad(scores, argnums=(0, 1))(HIDDEN_BTD, HEAD_DV))


@pytest.mark.parametrize("num_scored", [0, 9])
def test_the_loss_knows_nothing_of_what_is_not_scored(monkeypatch, num_scored):
    """NaN in hidden states outside of the mask, with padding inside of the last chunk and without a token at all."""
    monkeypatch.setattr(logprobs, "LOSS_CHUNK", 6)
    mask_BT = jnp.arange(28).reshape(4, 7) < num_scored
    hidden_BTD = jnp.where(mask_BT[:, :, None], HIDDEN_BTD, jnp.nan)
    (loss, scores), gradients = value_and_gradients_of_loss(True, hidden_BTD, HEAD_DV, 6, mask_BT)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, scores, gradients)))
    assert (np.abs(gradients[0]).sum(axis=-1) > 0).sum() == num_scored
    assert np.abs(gradients[1]).any() == (num_scored > 0)


def head_products(function, argnums):
    """Products in the compiled program of `function`, in chunks and blocks: each stands there once."""

    def loss(hidden_BTD, head_DV):
        return function(hidden_BTD, head_DV, TARGETS_BT, TEMPERATURE_B, 6, MASK_BT)

    step = loss if argnums is None else jax.value_and_grad(loss, argnums=argnums)
    return jax.jit(step).lower(HIDDEN_BTD, HEAD_DV).compile().as_text().count(" dot(")


@pytest.mark.parametrize(("argnums", "of_loss", "of_scores"), [((0, 1), 3, 4), (0, 2, 3), (None, 1, 1)])
@pytest.mark.parametrize("block", [4, 11])
def test_the_loss_takes_a_product_with_the_head_less(monkeypatch, argnums, of_loss, of_scores, block):
    """Where the head needs no gradient (low-rank factors), none is made; without gradients there is one product."""
    for name, value in (("LOSS_CHUNK", 6), ("LOSS_BLOCK", block), ("VOCAB_BLOCK", block), ("VECTOR", 1)):
        monkeypatch.setattr(logprobs, name, value)
    assert head_products(lambda *inputs: token_loss(jnp.negative, *inputs)[0], argnums) == of_loss
    assert head_products(lambda *inputs: -token_logprobs(*inputs).sum(), argnums) == of_scores


@pytest.mark.parametrize(("splits", "num_copies"), [(Splits(), 1.1), (Splits(vocab=2), 3.1)])  # by blocks; all at once
def test_temporaries_of_the_loss_are_those_of_a_chunk(monkeypatch, splits, num_copies):
    """Of its logits a chunk keeps one copy; of all columns at once it has three, as `token_logprobs` does."""
    vocab_size = 151_936
    monkeypatch.setattr(logprobs, "LOSS_CHUNK", 128)

    def loss(hidden_BTD, head_DV, targets_BT, mask_BT):
        temperature_B = jnp.ones(len(hidden_BTD))
        return token_loss(jnp.negative, hidden_BTD, head_DV, targets_BT, temperature_B, 128, mask_BT, splits)[0]

    def temporary_bytes(num_tokens, argnums=(0, 1)):
        shapes = (((8, num_tokens, 32), "float32"), ((32, vocab_size), "float32"))
        shapes += (((8, num_tokens), "int32"), ((8, num_tokens), bool))
        step = jax.jit(jax.value_and_grad(loss, argnums=argnums))
        inputs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        return step.lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    small, large, frozen = temporary_bytes(512), temporary_bytes(1024), temporary_bytes(512, argnums=0)
    logits_bytes, head_bytes = 128 * vocab_size * 4, 32 * vocab_size * 4
    assert small < num_copies * logits_bytes + 2 * head_bytes < 8 * 512 * vocab_size * 4 / 5
    assert large - small < 8 * 512 * (3 * 32 + 32) * 4
    assert frozen < (num_copies + 0.1) * logits_bytes  # no gradient of the head is held, nor what it is added up in
