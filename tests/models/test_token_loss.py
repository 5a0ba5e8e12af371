"""The loss in three products against the same loss behind token_logprobs and autodiff, and what it holds in memory.

Legend: B rows, T tokens, D hidden, V vocab.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestra_jax.models import logprobs, vocabulary
from orchestra_jax.models import token_loss as module
from orchestra_jax.models.logprobs import token_logprobs, token_logprobs_and_entropy
from orchestra_jax.models.token_loss import token_loss
from orchestra_jax.models.vocabulary import WHOLE, Splits
from tests.models.few_tokens import HEAD_DV, HIDDEN_BTD, MASK_BT, TARGETS_BT, TEMPERATURE_B, WEIGHTS_2BT

jax.config.update("jax_numpy_rank_promotion", "raise")


def squared(logprobs, weights, offsets):
    """A loss that is not linear, so that its gradient must be taken at the token's own log-probability."""
    return weights * (logprobs - offsets) ** 2


def set_sizes(monkeypatch, chunk, block):
    """The loss in chunks of `chunk` tokens, it and the scores in blocks of `block` columns."""
    monkeypatch.setattr(module, "LOSS_CHUNK", chunk)
    monkeypatch.setattr(module, "LOSS_BLOCK", block)
    monkeypatch.setattr(logprobs, "VOCAB_BLOCK", block)
    monkeypatch.setattr(vocabulary, "VECTOR", 1)


def value_and_gradients_of_loss(is_fused, hidden_BTD, head_DV, chunk, mask_BT=None, splits=WHOLE, factor=1.0):
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
    set_sizes(monkeypatch, chunk, block)
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
    monkeypatch.setattr(module, "LOSS_CHUNK", 6)
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
    set_sizes(monkeypatch, 6, block)
    assert head_products(lambda *inputs: token_loss(jnp.negative, *inputs)[0], argnums) == of_loss
    assert head_products(lambda *inputs: -token_logprobs(*inputs).sum(), argnums) == of_scores


@pytest.mark.parametrize(("splits", "num_copies"), [(Splits(), 1.1), (Splits(vocab=2), 3.1)])  # by blocks; all at once
def test_temporaries_of_the_loss_are_those_of_a_chunk(monkeypatch, splits, num_copies):
    """Of its logits a chunk keeps one copy; of all columns at once it has three, as `token_logprobs` does."""
    vocab_size = 151_936
    monkeypatch.setattr(module, "LOSS_CHUNK", 128)

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
