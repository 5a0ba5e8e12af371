"""The warm start: next-token training on demonstrations, on the tokens that the demonstrator sampled alone.

A demonstration is a real episode whose turns come from a script, so observations, masks and forced tokens are what the
policy will meet in training. The scripted route is drawn at random: it teaches the grammar and what is on offer, and
nothing about what to choose.

Legend: B rows, C completion tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from orchestra_jax import sharding
from orchestra_jax.grpo.accumulation import deal_out, sum_gradients
from orchestra_jax.grpo.batching import MicroBatch
from orchestra_jax.grpo.train_state import TrainState, state_axes, take_step
from orchestra_jax.grpo.train_step import score_targets, shares_targets, summed, zero_gradients
from orchestra_jax.models import compilation, lora
from orchestra_jax.models.config import ModelConfig
from orchestra_jax.models.logprobs import token_logprobs
from orchestra_jax.models.token_loss import token_loss


@functools.partial(compilation.jit, static_argnames=("config", "chunk"), donate_argnames="gradients")
def add_supervised_gradients(
    gradients, params, batch: MicroBatch, num_tokens, base_params=None, *, config: ModelConfig, chunk: int
):
    """Adds the micro-batch's gradients to `gradients`, which are donated, and returns them with its part of the loss.

    gradients: None if it is the only micro-batch.
    num_tokens: the masked-in tokens of the whole batch, over which the loss is a mean.
    """

    def loss_function(params):
        where = (lora.attach(params, base_params), batch, 1.0, config, chunk)
        if shares_targets(batch):
            return -score_targets(token_logprobs, *where).sum() / num_tokens
        return score_targets(functools.partial(token_loss, jnp.negative), *where)[0] / num_tokens

    loss, new_gradients = jax.value_and_grad(loss_function)(params)
    gradients = summed(gradients, new_gradients, "float32")
    return sharding.constrain(gradients, state_axes(gradients, config)), loss


def supervised_step(
    state: TrainState,
    batches: Sequence[MicroBatch],
    base_params=None,
    *,
    config: ModelConfig,
    optimizer,
    chunk: int,
    num_threads: int = 1,
):
    """One step on the mean cross-entropy over the masked-in tokens of all micro-batches, at temperature 1.

    Returns the state, whose old buffers are donated, and the loss before the step in nats per token. `base_params`: the
    frozen weights, if the state's parameters are low-rank factors. `num_threads`: see grpo/accumulation.py.
    """
    num_tokens = jnp.maximum(sum(batch.loss_mask_BC.sum() for batch in batches), 1)

    def add(gradients, batch):
        return add_supervised_gradients(
            gradients, state.params, batch, num_tokens, base_params, config=config, chunk=chunk
        )

    make_zeros = functools.partial(zero_gradients, state.params, config=config, dtype="float32")
    gradients, losses = sum_gradients(add, make_zeros, deal_out(batches, num_threads))
    state, _ = take_step(state, gradients, config=config, optimizer=optimizer)
    return state, sum(losses)
