"""The warm start: next-token training on demonstrations, on the tokens that the demonstrator sampled alone.

A demonstration is a real episode whose turns come from a script, so observations, masks and forced tokens are what the
policy will meet in training. The scripted route is drawn at random: it teaches the grammar and what is on offer, and
nothing about what to choose.

Legend: B rows, C completion tokens.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from orchestra_jax import sharding
from orchestra_jax.grpo.batching import MicroBatch
from orchestra_jax.grpo.train_step import TrainState, score_targets, state_axes
from orchestra_jax.models import lora
from orchestra_jax.models.config import ModelConfig
from orchestra_jax.models.logprobs import token_logprobs


@functools.partial(jax.jit, static_argnames=("config", "optimizer", "chunk"), donate_argnames="state")
def supervised_step(
    state: TrainState, batch: MicroBatch, base_params=None, *, config: ModelConfig, optimizer, chunk: int
):
    """One step on the mean cross-entropy over the masked-in tokens, at temperature 1.

    Returns the state, whose old buffers are donated, and the loss before the step in nats per token. `base_params`: the
    frozen weights, if the state's parameters are low-rank factors.
    """

    def loss_function(params):
        logprobs_BC = score_targets(token_logprobs, lora.attach(params, base_params), batch, 1.0, config, chunk)
        return -jnp.where(batch.loss_mask_BC, logprobs_BC, 0.0).sum() / jnp.maximum(batch.loss_mask_BC.sum(), 1)

    loss, gradients = jax.value_and_grad(loss_function)(state.params)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = TrainState(params, optimizer_state, state.step + 1)
    return sharding.constrain(state, state_axes(state, config)), loss
