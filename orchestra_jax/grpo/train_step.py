"""The update: log-probabilities of a batch under the current policy, the loss, its gradients, one optimizer step.

Pure functions over an explicit `TrainState` (train_state.py). A batch is a list of micro-batches of one shape each;
their gradients add up to the batch's, whose denominator is fixed beforehand. A micro-batch is a `MicroBatch` (groups
behind shared prompts, batching.py) or a `PackedBatch` (whole trajectories side by side, packing.py). The same forward
pass serves the warm start (supervised.py).

Legend: P prompts, G rollouts of each, B rows (B = P * G), T prefix tokens, I own tokens of a completion, S shared ones,
C targets (C = S + I), D hidden. Of a `PackedBatch` B are its rows R and C the tokens T of a row; S are its segments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orchestra_jax import sharding
from orchestra_jax.grpo.accumulation import deal_out, in_threads, sum_gradients
from orchestra_jax.grpo.batching import MicroBatch
from orchestra_jax.grpo.loss import elementwise_loss, grpo_loss, is_elementwise, loss_denominator
from orchestra_jax.grpo.packing import PackedBatch, layout
from orchestra_jax.grpo.train_state import TrainState, state_axes, take_step
from orchestra_jax.models import compilation, lora
from orchestra_jax.models.config import ModelConfig
from orchestra_jax.models.kv_cache import shared_prefix_cache
from orchestra_jax.models.logprobs import token_logprobs, token_logprobs_and_entropy
from orchestra_jax.models.token_loss import token_loss
from orchestra_jax.models.transformer import Transformer, head_weights
from orchestra_jax.models.vocabulary import Splits


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Static settings of the GRPO loss; hashable, so that jit takes them as constants."""

    clip_low: float
    clip_high: float
    dual_clip: float
    correction_clip: float
    entropy_coefficient: float
    aggregation: str
    logprob_chunk: int
    ratio: str = "token"
    correction: str = "token"
    kl: str = "k2"
    aggregation_length: int = 1  # tokens a rollout, of "constant"

    def of_the_loss(self) -> dict[str, object]:
        """Those that `grpo_loss` takes, by its own names."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("logprob_chunk", "aggregation_length")
        }


def prefix_and_own_hidden(params, batch: MicroBatch, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Hidden states [P, T, D] of the prefixes, which run once, and [B, I, D] of the completions behind them."""
    model = Transformer(config)
    positions_PT = jnp.broadcast_to(jnp.arange(batch.prefix_tokens_PT.shape[1])[None, :], batch.prefix_tokens_PT.shape)
    segments_PT = (positions_PT < batch.prefix_lengths_P[:, None]).astype(jnp.int32)
    hidden_PTD, keys_values = model.apply(
        {"params": params}, batch.prefix_tokens_PT, positions_PT, segments_PT,
        segment_lengths_BM=batch.prefix_lengths_P[:, None],
    )  # fmt: skip
    num_rows, num_tokens = batch.input_tokens_BI.shape
    cache = shared_prefix_cache(keys_values, batch.prefix_lengths_P, num_rows // len(batch.prefix_tokens_PT))
    offsets_BI = jnp.broadcast_to(jnp.arange(num_tokens)[None, :], batch.input_tokens_BI.shape)
    segments_BI = (offsets_BI < batch.input_lengths_B[:, None]).astype(jnp.int32)
    positions_BI = cache.lengths_B[:, None] + offsets_BI
    hidden_BID, _ = model.apply({"params": params}, batch.input_tokens_BI, positions_BI, segments_BI, cache)
    return hidden_PTD, hidden_BID


def packed_hidden(params, batch: PackedBatch, config: ModelConfig) -> jax.Array:
    """Hidden states [B, C, D] of whole trajectories; none sees another one of its row."""
    segments_BC, positions_BC = layout(batch.segment_lengths_RS, batch.tokens_RT.shape[1])
    lengths = {"segment_lengths_BM": batch.segment_lengths_RS}
    return Transformer(config).apply({"params": params}, batch.tokens_RT, positions_BC, segments_BC, **lengths)[0]


class LossInputs(NamedTuple):
    """What the loss reads of a micro-batch, column c being what the hidden state of column c predicts."""

    targets_BC: jax.Array
    loss_mask_BC: jax.Array
    sampler_logprobs_BC: jax.Array
    advantages: jax.Array  # [B], or [B, S] with segments
    segment_ids_BC: jax.Array | None


def loss_inputs(batch: MicroBatch | PackedBatch) -> LossInputs:
    if isinstance(batch, MicroBatch):
        return LossInputs(
            batch.targets_BC, batch.loss_mask_BC, batch.sampler_logprobs_BC, batch.advantages_B, segment_ids_BC=None
        )
    segments_BC, _ = layout(batch.segment_lengths_RS, batch.tokens_RT.shape[1])
    # The next token, but for the last one of a segment, which predicts nothing of another trajectory.
    targets_BC, mask_BC, logprobs_BC, next_BC = (
        jnp.roll(each, -1, axis=1)
        for each in (batch.tokens_RT, batch.loss_mask_RT, batch.sampler_logprobs_RT, segments_BC)
    )
    is_inside_BC = (segments_BC == next_BC) & (jnp.arange(segments_BC.shape[1]) < segments_BC.shape[1] - 1)[None, :]
    return LossInputs(targets_BC, mask_BC & is_inside_BC, logprobs_BC, batch.advantages_RS, segments_BC)


@functools.partial(jax.jit, static_argnames="settings")
def batch_denominator(batch: MicroBatch | PackedBatch, *, settings: LossSettings) -> jax.Array:
    """The part of the loss's denominator that a micro-batch adds: 0 if it is masked out altogether."""
    inputs = loss_inputs(batch)
    num_segments = 0 if inputs.segment_ids_BC is None else inputs.advantages.shape[1]
    count = loss_denominator(
        inputs.loss_mask_BC, settings.aggregation, length=settings.aggregation_length,
        segment_ids_BT=inputs.segment_ids_BC, num_segments=num_segments,
    )  # fmt: skip
    return jnp.where(inputs.loss_mask_BC.any(), count, 0.0)


def shares_targets(batch: MicroBatch | PackedBatch) -> bool:
    """Whether a target may be scored for several rollouts at once, so that its loss is not one token's."""
    return isinstance(batch, MicroBatch) and batch.shared_columns_PS is not None


def score_targets(function, params, batch: MicroBatch | PackedBatch, temperature, config: ModelConfig, chunk: int):
    """What `function` of models.logprobs or token_loss says of the targets in the loss mask, under `params`."""
    inputs = loss_inputs(batch)

    def score(hidden_BCD, targets_BC, mask_BC):
        temperature_B = jnp.full(len(hidden_BCD), temperature, jnp.float32)
        splits = Splits(sharding.num_splits("batch"), sharding.num_splits("vocab"))
        return function(hidden_BCD, head_weights(params, config), targets_BC, temperature_B, chunk, mask_BC, splits)

    if isinstance(batch, PackedBatch):
        return score(packed_hidden(params, batch, config), inputs.targets_BC, inputs.loss_mask_BC)
    hidden_PTD, hidden_BID = prefix_and_own_hidden(params, batch, config)
    if not shares_targets(batch):
        return score(hidden_BID, inputs.targets_BC, inputs.loss_mask_BC)
    return _score_shared_once(score, hidden_PTD, hidden_BID, batch)


def _score_shared_once(score, hidden_PTD, hidden_BID, batch: MicroBatch):
    """`score` of a group's shared targets and of its rollouts' own ones, side by side in one row; then [B, C] again."""
    num_prompts, num_shared = batch.shared_columns_PS.shape
    num_rows, num_own = batch.input_tokens_BI.shape
    group_size = num_rows // num_prompts

    def beside_each_other(x_BC, shared_PS):
        own_PN = x_BC[:, num_shared:].reshape(num_prompts, group_size * num_own)
        return jnp.concatenate([shared_PS, own_PN], axis=1)

    shared_PSD = jnp.take_along_axis(hidden_PTD, batch.shared_columns_PS[:, :, None], axis=1)
    own_PND = hidden_BID.reshape(num_prompts, group_size * num_own, -1)
    shared_mask_PS = batch.loss_mask_BC[:, :num_shared].reshape(num_prompts, group_size, num_shared).any(axis=1)
    scores = score(
        jnp.concatenate([shared_PSD, own_PND], axis=1),
        beside_each_other(batch.targets_BC, batch.targets_BC[::group_size, :num_shared]),
        beside_each_other(batch.loss_mask_BC, shared_mask_PS),
    )

    def behind_each_other(x_PM):
        shared_BS = jnp.repeat(x_PM[:, :num_shared], group_size, axis=0)
        own_BI = x_PM[:, num_shared:].reshape(num_rows, num_own)
        return jnp.where(batch.loss_mask_BC, jnp.concatenate([shared_BS, own_BI], axis=1), 0.0)

    return jax.tree.map(behind_each_other, scores)


@functools.partial(compilation.jit, static_argnames=("config", "chunk"))
def batch_logprobs(
    params, batch: MicroBatch | PackedBatch, temperature, base_params=None, *, config: ModelConfig, chunk: int
) -> jax.Array:
    """Log-probabilities [B, C] of the targets under `params`, 0 where the loss mask is not set; no gradients."""
    return score_targets(token_logprobs, lora.attach(params, base_params), batch, temperature, config, chunk)


@functools.partial(compilation.jit, static_argnames=("config", "settings", "dtype"), donate_argnames="gradients")
def add_gradients(
    gradients,
    params,
    batch: MicroBatch | PackedBatch,
    old_logprobs_BC,
    reference_logprobs_BC,
    temperature,
    kl_coefficient,
    denominator,
    base_params=None,
    *,
    config: ModelConfig,
    settings: LossSettings,
    dtype: str = "float32",
):
    """Adds the micro-batch's gradients to `gradients`, which are donated, and returns them with its metrics.

    gradients: None says that it is the only micro-batch; its gradients are returned in `dtype`.
    old_logprobs_BC: None says that the batch is on-policy for the trainer: old is current, the ratio 1.
    reference_logprobs_BC: None leaves the KL term out, whatever its coefficient.
    base_params: the frozen weights, if `params` are low-rank factors beside them.
    """
    inputs = loss_inputs(batch)
    given = (inputs.sampler_logprobs_BC, reference_logprobs_BC, inputs.advantages, inputs.loss_mask_BC)
    options = {
        "denominator": denominator,
        "kl_coefficient": kl_coefficient if reference_logprobs_BC is not None else 0.0,
        "segment_ids_BT": inputs.segment_ids_BC,
        **settings.of_the_loss(),
    }
    # Then its gradient can be taken where the token is scored.
    is_loss_of_one_token = not shares_targets(batch) and is_elementwise(
        settings.ratio, settings.correction, settings.entropy_coefficient
    )

    def loss_function(params):
        weights = lora.attach(params, base_params)
        score = functools.partial(
            score_targets, params=weights, batch=batch, temperature=temperature, config=config,
            chunk=settings.logprob_chunk,
        )  # fmt: skip
        if is_loss_of_one_token:
            loss_of, per_token = elementwise_loss(old_logprobs_BC, *given, **options)
            sum_losses = functools.partial(token_loss, loss_of, per_token=per_token, has_entropy=True)
            loss, (logprobs_BC, entropy_BC) = score(sum_losses)
        else:
            loss, (logprobs_BC, entropy_BC) = None, score(token_logprobs_and_entropy)
        old_BC = jax.lax.stop_gradient(logprobs_BC) if old_logprobs_BC is None else old_logprobs_BC
        loss_of_scores, metrics = grpo_loss(logprobs_BC, old_BC, *given, entropy_BT=entropy_BC, **options)
        return loss_of_scores if loss is None else loss, metrics

    (loss, metrics), new_gradients = jax.value_and_grad(loss_function, has_aux=True)(params)
    gradients = summed(gradients, new_gradients, dtype)
    return sharding.constrain(gradients, state_axes(gradients, config)), {**metrics, "loss": loss}


def summed(gradients, new_gradients, dtype: str):
    """The sum in the dtype of `gradients`; if those are None, what is new in `dtype`."""
    if gradients is None:
        return jax.tree.map(lambda new: new.astype(dtype), new_gradients)
    return jax.tree.map(lambda total, new: total + new.astype(total.dtype), gradients, new_gradients)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def zero_gradients(params, *, config: ModelConfig, dtype: str):
    """What `add_gradients` starts from; on a mesh it lies as the parameters do from the start."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), params)
    return sharding.constrain(zeros, state_axes(zeros, config))


class Measured(NamedTuple):
    """The metrics of a step that may still run; `read_metrics` waits for them."""

    by_micro_batch: list[dict[str, jax.Array]]
    gradient_norm: jax.Array


def train_step(*arguments, **options) -> tuple[TrainState, dict[str, float]]:
    """`dispatch_step`, waited for: the new state and the metrics of the last pass, by name."""
    state, measured = dispatch_step(*arguments, **options)
    return state, read_metrics(measured)


def dispatch_step(
    state: TrainState,
    batches: Sequence[MicroBatch | PackedBatch],
    temperature: float,
    reference_params,
    kl_coefficient: float,
    *,
    config: ModelConfig,
    settings: LossSettings,
    optimizer: optax.GradientTransformation,
    num_updates: int,
    gradient_dtype: str = "float32",
    base_params=None,
    num_threads: int = 1,
    reference_logprobs: Sequence[jax.Array] | None = None,
) -> tuple[TrainState, Measured]:
    """Trains on one batch of micro-batches, `num_updates` times over it, and returns what the last pass measures.

    Nothing is waited for: the step after it can be dispatched while this one runs.

    `state` is donated. `reference_params`: read only if the KL coefficient is not 0. The first pass is on-policy; for
    further ones the old log-probabilities are computed once, before it. `gradient_dtype`: what micro-batches add up in.
    `base_params`: the frozen weights, if the state's parameters are low-rank factors (models/lora.py).
    `num_threads`: micro-batches that are computed at a time, each with gradients of its own (accumulation.py).
    `reference_logprobs`: what `batch_logprobs` says of each batch under `reference_params`, if that is known already.
    Within sharding.mesh_context the step runs on all devices of the mesh, for a state of `place_state`. ValueError for
    no batch, or no update.
    """
    if not batches or num_updates < 1:
        raise ValueError(
            f"{len(batches)} micro-batches and num_updates {num_updates}: there must be one of each at least"
        )
    counts = [batch_denominator(batch, settings=settings) for batch in batches]
    denominator = jnp.maximum(sum(counts), 1.0)  # a batch that is masked out altogether has gradients of 0, not NaN
    logprobs = functools.partial(batch_logprobs, config=config, chunk=settings.logprob_chunk)

    def compare(part):
        """Each batch with its old log-probabilities and the reference's, as far as they are asked for."""
        return [
            (
                batch,
                logprobs(state.params, batch, temperature, base_params) if num_updates > 1 else None,
                logprobs(reference_params, batch, temperature) if kl_coefficient and known_BC is None else known_BC,
            )
            for batch, known_BC in part
        ]

    def add(is_first, params, gradients, compared):
        batch, old_BC, reference_BC = compared
        # Of the first pass old is current to the last bit, which two compiled programs need not agree on.
        return add_gradients(
            gradients, params, batch, None if is_first else old_BC, reference_BC,
            temperature, kl_coefficient, denominator, base_params, config=config, settings=settings,
            dtype=gradient_dtype,
        )  # fmt: skip

    known = [None] * len(batches) if reference_logprobs is None else reference_logprobs
    parts = in_threads(compare, deal_out(list(zip(batches, known, strict=True)), num_threads))
    for number in range(num_updates):
        make_zeros = functools.partial(zero_gradients, state.params, config=config, dtype=gradient_dtype)
        add_to = functools.partial(add, number == 0, state.params)
        gradients, metrics = sum_gradients(add_to, make_zeros, parts)
        state, gradient_norm = take_step(state, gradients, config=config, optimizer=optimizer)
    return state, Measured(metrics, gradient_norm)


def read_metrics(measured: Measured) -> dict[str, float]:
    metrics, gradient_norm = jax.device_get(measured)
    return {**_combine(metrics), "gradient_norm": float(gradient_norm)}


def _combine(metrics: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Means over tokens of the whole batch; losses and counts add up."""
    num_tokens = sum(float(some["num_tokens"]) for some in metrics)
    combined = {}
    for name in metrics[0]:
        values = [float(some[name]) for some in metrics]
        if name in ("loss", "num_tokens", "num_rollouts"):
            combined[name] = sum(values)
        elif name == "sampler_gap_max":
            combined[name] = max(values)
        else:
            combined[name] = sum(
                value * float(some["num_tokens"]) for value, some in zip(values, metrics, strict=True)
            ) / max(num_tokens, 1.0)
    return combined
