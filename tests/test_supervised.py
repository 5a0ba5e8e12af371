"""The warm start's step on a tiny model."""

import jax
import numpy as np
import pytest

from orchestra_jax.grpo.batching import MicroBatch
from orchestra_jax.grpo.train_state import init_state
from orchestra_jax.grpo.train_step import batch_logprobs
from orchestra_jax.models import transformer
from orchestra_jax.models.config import MODELS
from orchestra_jax.optimizers import OptimizerConfig, make_optimizer
from orchestra_jax.supervised import supervised_step

TINY = MODELS["tiny"]
CHUNK = 64
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.02, warmup_steps=1), num_steps=40)


def make_batch(num_groups=2):
    """Two demonstrations of two prompts; `num_groups` 3 adds a row of padding."""
    rng = np.random.default_rng(0)
    tokens_BC = np.zeros((num_groups, 6), np.int32)
    tokens_BC[:2] = rng.integers(0, TINY.vocab_size, (2, 6))
    targets_BC = np.roll(tokens_BC, -1, axis=1)
    lengths_B = np.array([6, 4, 0, 0][:num_groups], np.int32)
    mask_BC = np.arange(6)[None, :] < lengths_B[:, None]
    mask_BC[0, 2:4] = False  # given tokens between two turns
    prompts_PT = np.zeros((num_groups, 3), np.int32)
    prompts_PT[:2] = [[3, 1, 4], [1, 5, 0]]
    zeros_BC, prefix_lengths_P = np.zeros((num_groups, 6), np.float32), np.array([3, 2, 0, 0][:num_groups], np.int32)
    zeros_B = np.zeros(num_groups, np.float32)
    return MicroBatch(prompts_PT, prefix_lengths_P, tokens_BC, lengths_B, targets_BC, mask_BC, zeros_BC, zeros_B)


def train(batch, num_steps):
    state = init_state(transformer.init_params(TINY, jax.random.key(0)), OPTIMIZER)
    losses = []
    for _ in range(num_steps):
        state, loss = supervised_step(state, [batch], config=TINY, optimizer=OPTIMIZER, chunk=CHUNK)
        losses.append(float(loss))
    assert int(state.step) == num_steps
    return jax.device_get(state.params), losses


def test_the_loss_is_the_mean_over_masked_in_tokens_and_falls():
    batch = make_batch()
    params = transformer.init_params(TINY, jax.random.key(0))
    logprobs_BC = np.asarray(batch_logprobs(params, batch, 1.0, config=TINY, chunk=CHUNK))
    trained, losses = train(batch, 30)
    assert losses[0] == pytest.approx(-logprobs_BC[batch.loss_mask_BC].mean(), rel=1e-5)
    assert losses[-1] < 0.1 * losses[0]
    whole = batch._replace(loss_mask_BC=np.ones_like(batch.loss_mask_BC))
    trained_BC = np.asarray(batch_logprobs(trained, whole, 1.0, config=TINY, chunk=CHUNK))
    assert (trained_BC[0, 2:4] < -2).all()  # given tokens were not learned


@pytest.mark.slow
def test_padding_rows_do_nothing():
    params, losses = train(make_batch(2), 3)
    padded, padded_losses = train(make_batch(3), 3)
    np.testing.assert_allclose(padded_losses, losses, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), padded, params)


def test_two_runs_are_bitwise_equal():
    (first, losses), (second, same_losses) = train(make_batch(), 3), train(make_batch(), 3)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert losses == same_losses


def test_a_batch_of_padding_gives_a_loss_of_zero_and_no_step():
    batch = make_batch()
    batch = batch._replace(loss_mask_BC=np.zeros_like(batch.loss_mask_BC))
    params, losses = train(batch, 2)
    assert losses == [0.0, 0.0]
    jax.tree.map(np.testing.assert_array_equal, params, transformer.init_params(TINY, jax.random.key(0)))
