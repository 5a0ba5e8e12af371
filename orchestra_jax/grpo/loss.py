"""The GRPO policy loss with three policies, and what to watch while it runs.

    ratio      = pi / stop_gradient(pi_old)                                  pi_old: the trainer's own probabilities
    correction = stop_gradient(min(correction_clip, pi_old / pi_sampler))    truncated importance correction, per token
    surrogate  = min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), and at least dual_clip A where A < 0
    token loss = -correction * surrogate + kl_coefficient * 0.5 (log pi - log pi_reference)^2 - entropy_coefficient * H

Sources: GRPO arXiv 2402.03300; asymmetric clip DAPO arXiv 2503.14476; dual clip arXiv 1912.09729; k2 estimator
Schulman, "Approximating KL Divergence" (2020), whose gradient on samples of pi is in expectation that of
KL(pi || pi_reference). ToolOrchestra's release sets 0.2, 0.28, 10, 1e-4 for the two clips, the dual clip and the KL.
Entropy H and all log-probabilities are natural and at the sampling temperature. A row is one rollout; where its
advantage comes from is not known here.

Shape suffixes: B rollouts, T tokens. Settings are Python numbers (static under jit); `denominator` may be an array.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# exp(20) = 4.9e8 is finite in float32 also after squaring, exp(89) is not. No useful gradient is lost: beyond the
# clamp the clip or, for negative advantages, the dual clip has stopped it, or the ratio (2e-9) has made it vanish.
MAX_LOG_RATIO = 20.0

# Each aggregation: (weight of every token before the division [B, T], what the whole batch is divided by).
AGGREGATIONS = {
    "rollout_mean": (
        lambda mask_BT: mask_BT / jnp.maximum(mask_BT.sum(axis=1, keepdims=True), 1),
        lambda mask_BT: mask_BT.any(axis=1).sum(),
    ),
    "token_mean": (lambda mask_BT: mask_BT, lambda mask_BT: mask_BT.sum()),
}


def _aggregation(name):
    if name not in AGGREGATIONS:
        raise ValueError(f"aggregation {name!r} must be one of {sorted(AGGREGATIONS)}")
    return AGGREGATIONS[name]


def loss_denominator(loss_mask_BT: jax.Array, aggregation: str) -> jax.Array:
    """What the sum over the batch is divided by: rollouts with any masked-in token, or masked-in tokens.

    Computed once on the whole batch, so that the losses and gradients of its micro-batches add up to the batch's.
    Returns a float32 scalar, at least 1.
    """
    _, count = _aggregation(aggregation)
    return jnp.maximum(count(jnp.asarray(loss_mask_BT).astype(bool)), 1).astype(jnp.float32)


def _masked(values_BT, mask_BT):
    # Select before computing: a NaN outside the mask would survive a product with 0, in the gradient too.
    assert values_BT.shape == mask_BT.shape, f"shape {values_BT.shape}, but the mask has {mask_BT.shape}"
    return jnp.where(mask_BT, values_BT.astype(jnp.float32), 0.0)


def _exp_log_ratio(log_ratio_BT):
    return jnp.exp(jnp.clip(log_ratio_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _check_clips(clip_low, clip_high, dual_clip, correction_clip):
    if not (0 < clip_low < 1 and clip_high > 0):
        raise ValueError(f"clip_low {clip_low} must lie in (0, 1) and clip_high {clip_high} above 0")
    if not dual_clip > 1 + clip_high:
        raise ValueError(f"dual_clip {dual_clip} must lie above 1 + clip_high = {1 + clip_high}")
    if not correction_clip > 0:
        raise ValueError(f"correction_clip {correction_clip} must be positive; math.inf switches truncation off")


def _policy_terms(current_BT, old_BT, sampler_BT, advantages_BT, clip_low, clip_high, dual_clip, correction_clip):
    """The policy loss of each token and what to watch about it, by name, all [B, T]."""
    log_ratio_BT = current_BT - old_BT
    ratio_BT = _exp_log_ratio(log_ratio_BT)
    unclipped_BT = ratio_BT * advantages_BT
    clipped_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high) * advantages_BT
    # Where A < 0 the minimum is unbounded below as the ratio grows: one stray token would own the step.
    is_dual_clipped_BT = (advantages_BT < 0) & (ratio_BT > dual_clip)
    surrogate_BT = jnp.where(is_dual_clipped_BT, dual_clip * advantages_BT, jnp.minimum(unclipped_BT, clipped_BT))
    untruncated_BT = _exp_log_ratio(old_BT - sampler_BT)
    correction_BT = jnp.minimum(untruncated_BT, correction_clip)
    return {
        "policy_loss": -correction_BT * surrogate_BT,
        "ratio_mean": ratio_BT,
        "clip_share": clipped_BT < unclipped_BT,
        "dual_clip_share": is_dual_clipped_BT,
        "kl_old": ratio_BT - 1.0 - log_ratio_BT,  # k3: never negative
        "correction_mean": correction_BT,
        "correction_truncated_share": untruncated_BT > correction_clip,
        "sampler_gap_mean": jnp.abs(old_BT - sampler_BT),
    }


def _metrics(terms, mask_BT):
    num_tokens = mask_BT.sum().astype(jnp.float32)
    metrics = {
        name: jnp.where(mask_BT, value_BT, 0.0).sum() / jnp.maximum(num_tokens, 1.0) for name, value_BT in terms.items()
    }
    metrics["sampler_gap_max"] = jnp.where(mask_BT, terms["sampler_gap_mean"], 0.0).max()
    metrics["num_tokens"] = num_tokens
    metrics["num_rollouts"] = mask_BT.any(axis=1).sum().astype(jnp.float32)
    return jax.lax.stop_gradient(metrics)


def grpo_loss(
    logprobs_BT: jax.Array,
    old_logprobs_BT: jax.Array,
    sampler_logprobs_BT: jax.Array,
    reference_logprobs_BT: jax.Array | None,
    advantages_B: jax.Array,
    loss_mask_BT: jax.Array,
    *,
    denominator: jax.Array | float,
    kl_coefficient: float,
    correction_clip: float,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 10.0,
    entropy_BT: jax.Array | None = None,
    entropy_coefficient: float = 0.0,
    aggregation: str = "rollout_mean",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of one (micro-)batch and its metrics; gradients flow through logprobs_BT and entropy_BT alone.

    Args:
      logprobs_BT, old_logprobs_BT, sampler_logprobs_BT, reference_logprobs_BT: [B, T] log-probabilities of the tokens
        under the current, old, sampling and reference policies; outside the mask they may be anything, NaN included.
      advantages_B: [B].
      loss_mask_BT: [B, T] bool or 0/1; the tokens that the policy sampled.
      denominator: `loss_denominator` of the whole batch.
      aggregation: "rollout_mean", every rollout counts alike, or "token_mean", every token does.

    Returns:
      Float32 scalar loss, and a dict of float32 scalars: means over this call's masked-in tokens (so micro-batches are
      averaged by num_tokens), but for sampler_gap_max, num_tokens and num_rollouts.

    Raises:
      ValueError: a setting out of its range, or a coefficient without the array it weighs.
    """
    _check_clips(clip_low, clip_high, dual_clip, correction_clip)
    token_weights, _ = _aggregation(aggregation)
    mask_BT = jnp.asarray(loss_mask_BT).astype(bool)
    assert advantages_B.shape == mask_BT.shape[:1], f"advantages {advantages_B.shape} for a mask {mask_BT.shape}"
    current_BT = _masked(logprobs_BT, mask_BT)
    constants = (old_logprobs_BT, sampler_logprobs_BT, jnp.broadcast_to(advantages_B[:, None], mask_BT.shape))
    old_BT, sampler_BT, advantages_BT = (jax.lax.stop_gradient(_masked(values_BT, mask_BT)) for values_BT in constants)
    clips = (clip_low, clip_high, dual_clip, correction_clip)
    terms = _policy_terms(current_BT, old_BT, sampler_BT, advantages_BT, *clips)
    token_loss_BT = terms["policy_loss"]
    if reference_logprobs_BT is not None:
        reference_BT = jax.lax.stop_gradient(_masked(reference_logprobs_BT, mask_BT))
        terms["kl_reference"] = 0.5 * (current_BT - reference_BT) ** 2
        token_loss_BT = token_loss_BT + kl_coefficient * terms["kl_reference"]
    elif kl_coefficient != 0:
        raise ValueError(f"kl_coefficient {kl_coefficient} needs reference_logprobs_BT; pass them, or 0")
    if entropy_BT is not None:
        terms["entropy"] = _masked(entropy_BT, mask_BT)
        token_loss_BT = token_loss_BT - entropy_coefficient * terms["entropy"]
    elif entropy_coefficient != 0:
        raise ValueError(f"entropy_coefficient {entropy_coefficient} needs entropy_BT; pass it, or 0")
    loss = (token_loss_BT * token_weights(mask_BT)).sum() / denominator
    return loss, _metrics(terms, mask_BT)
