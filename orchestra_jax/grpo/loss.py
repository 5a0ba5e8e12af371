"""The GRPO policy loss with three policies, and what to watch while it runs.

    ratio      = pi / stop_gradient(pi_old)                                  pi_old: the trainer's own probabilities
    correction = stop_gradient(min(correction_clip, pi_old / pi_sampler))    truncated importance correction
    surrogate  = min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), and at least dual_clip A where A < 0
    token loss = -correction * surrogate + kl_coefficient * KL - entropy_coefficient * H

Choices, each a key of a dict in this file:
    ratio        "token"; "sequence": exp of the mean log-ratio over the rollout's masked-in tokens, one for all of them
                 (GSPO; its clips are far smaller, 3e-4 and 4e-4); "cispo": the surrogate is
                 stop_gradient(min(ratio, 1 + clip_high)) A log pi, so that a clipped token still has a gradient
    correction   "token"; "sequence": the product over the rollout's tokens, truncated once; "none"
    kl           "k2": 0.5 (log pi - log pi_ref)^2; "k3": exp(d) - 1 - d, d = log pi_ref - log pi. k1 is for the
                 reward alone (grpo/kl_penalty.py): as a loss its gradient is 0 in expectation.
    aggregation  sums over the batch's tokens divided by what `loss_denominator` says; with t_i the tokens of rollout i:
                 "token_mean" sum / sum_i t_i; "sequence_mean" sum / rollouts; "rollout_mean" sum / rollouts with a
                 weight of 1 / t_i a token, so that a long episode does not outweigh a short one; "constant" sum /
                 (rollouts * aggregation_length)

Sources: GRPO arXiv 2402.03300; asymmetric clip DAPO arXiv 2503.14476; dual clip arXiv 1912.09729; k1 to k3 Schulman,
"Approximating KL Divergence" (2020): k2's gradient on samples of pi is in expectation that of KL(pi || pi_ref), k3's
that of KL(pi_ref || pi); GSPO arXiv 2507.18071; CISPO arXiv 2506.13585; the constant Dr. GRPO, arXiv 2503.20783.
ToolOrchestra's release sets 0.2, 0.28, 10, 1e-4 for the two clips, the dual clip and the KL (k2). By hand: pi / pi_old
= 1.5 with A = 1 costs -1.28 and has no gradient; with A = -1 it costs 1.5.

Entropy H and all log-probabilities are natural and at the sampling temperature. A row is one rollout, or, with segment
ids, several; where its advantage comes from is not known here.

Shape suffixes: B rows, T tokens, S segments of a row at most. Settings are Python numbers and strings (static under
jit); `denominator` may be an array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# exp(20) = 4.9e8 is finite in float32 also after squaring, exp(89) is not. No useful gradient is lost: beyond the
# clamp the clip or, for negative advantages, the dual clip has stopped it, or the ratio (2e-9) has made it vanish.
MAX_LOG_RATIO = 20.0


class Rollouts(NamedTuple):
    """Which tokens belong together: to sum over a rollout, and to give every token what its rollout has."""

    spread: Callable[[jax.Array], jax.Array]  # one value a rollout -> [B, T]
    total: Callable[[jax.Array], jax.Array]  # [B, T] -> one value a rollout, [B, 1] or [B, S]


def rollouts_of(shape, segment_ids_BT=None, num_segments: int = 0) -> Rollouts:
    """A rollout is a row; with segment ids it is one of the segments 1 to `num_segments` of a row (0 is padding)."""
    if segment_ids_BT is None:
        return Rollouts(
            lambda values_B1: jnp.broadcast_to(values_B1, shape),
            lambda values_BT: values_BT.sum(axis=1, keepdims=True),
        )
    # Products with a one-hot array: a scatter would add in an order of its own on a GPU.
    is_in_BTS = (segment_ids_BT[:, :, None] == jnp.arange(1, num_segments + 1)[None, None, :]).astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    return Rollouts(
        lambda values_BS: jnp.einsum("BTS,BS->BT", is_in_BTS, values_BS.astype(jnp.float32), precision=exact),
        lambda values_BT: jnp.einsum("BTS,BT->BS", is_in_BTS, values_BT.astype(jnp.float32), precision=exact),
    )


def _token_weights_alike(mask_BT, rollouts):
    return mask_BT


def _token_weights_by_rollout(mask_BT, rollouts):
    return mask_BT / jnp.maximum(rollouts.spread(rollouts.total(mask_BT)), 1)  # padding belongs to no segment: 0 / 1


def _num_tokens(mask_BT, rollouts, length):
    return mask_BT.sum()


def _num_rollouts(mask_BT, rollouts, length):
    return (rollouts.total(mask_BT) > 0).sum()


def _num_constant_tokens(mask_BT, rollouts, length):
    return _num_rollouts(mask_BT, rollouts, length) * length


# Each aggregation: (weight of every token before the division [B, T], what the whole batch is divided by).
AGGREGATIONS = {
    "token_mean": (_token_weights_alike, _num_tokens),
    "sequence_mean": (_token_weights_alike, _num_rollouts),
    "rollout_mean": (_token_weights_by_rollout, _num_rollouts),
    "constant": (_token_weights_alike, _num_constant_tokens),
}


def _choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value!r} must be one of {sorted(choices)}")
    return choices[value]


def loss_denominator(
    loss_mask_BT: jax.Array, aggregation: str, *, length: int = 1, segment_ids_BT=None, num_segments: int = 0
) -> jax.Array:
    """What the sum over the batch is divided by: see the aggregations above; `length` is `aggregation_length`.

    Computed once on the whole batch, so that the losses and gradients of its micro-batches add up to the batch's.
    Returns a float32 scalar, at least 1.
    """
    _, count = _choice("aggregation", aggregation, AGGREGATIONS)
    mask_BT = jnp.asarray(loss_mask_BT).astype(bool)
    rollouts = rollouts_of(mask_BT.shape, segment_ids_BT, num_segments)
    return jnp.maximum(count(mask_BT, rollouts, length), 1).astype(jnp.float32)


def _masked(values_BT, mask_BT):
    # Select before computing: a NaN outside the mask would survive a product with 0, in the gradient too.
    assert values_BT.shape == mask_BT.shape, f"shape {values_BT.shape}, but the mask has {mask_BT.shape}"
    return jnp.where(mask_BT, values_BT.astype(jnp.float32), 0.0)


def _exp_log_ratio(log_ratio_BT):
    return jnp.exp(jnp.clip(log_ratio_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def check_clips(clip_low: float, clip_high: float, dual_clip: float, correction_clip: float) -> None:
    """ValueError for what clips nothing, or everything."""
    if not (0 < clip_low < 1 and clip_high > 0):
        raise ValueError(f"clip_low {clip_low} must lie in (0, 1) and clip_high {clip_high} above 0")
    if not dual_clip > 1 + clip_high:
        raise ValueError(f"dual_clip {dual_clip} must lie above 1 + clip_high = {1 + clip_high}")
    if not correction_clip > 0:
        raise ValueError(f"correction_clip {correction_clip} must be positive; math.inf switches truncation off")


def _sequence_mean(log_ratio_BT, mask_BT, rollouts):
    num_tokens = jnp.maximum(rollouts.total(mask_BT.astype(jnp.float32)), 1.0)
    return rollouts.spread(rollouts.total(log_ratio_BT) / num_tokens)


RATIOS = {  # the log of the ratio
    "token": lambda log_ratio_BT, mask_BT, rollouts: log_ratio_BT,
    "sequence": _sequence_mean,
    "cispo": lambda log_ratio_BT, mask_BT, rollouts: log_ratio_BT,
}
CORRECTIONS = {  # the log of the untruncated correction, made of log old - log sampler
    "token": lambda gap_BT, rollouts: gap_BT,
    "sequence": lambda gap_BT, rollouts: rollouts.spread(rollouts.total(gap_BT)),
    "none": lambda gap_BT, rollouts: jnp.zeros_like(gap_BT),
}


def _k3(current_BT, reference_BT):
    difference_BT = reference_BT - current_BT
    return _exp_log_ratio(difference_BT) - 1.0 - difference_BT


KL_ESTIMATORS = {"k2": lambda current_BT, reference_BT: 0.5 * (current_BT - reference_BT) ** 2, "k3": _k3}


def _surrogate(ratio, current_BT, ratio_BT, advantages_BT, clip_low, clip_high, dual_clip):
    """-> the surrogate, where the clip is active, where the dual clip is; all [B, T]."""
    if ratio == "cispo":
        weight_BT = jax.lax.stop_gradient(jnp.minimum(ratio_BT, 1.0 + clip_high))
        return weight_BT * advantages_BT * current_BT, ratio_BT > 1.0 + clip_high, jnp.zeros_like(ratio_BT, bool)
    unclipped_BT = ratio_BT * advantages_BT
    clipped_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high) * advantages_BT
    # Where A < 0 the minimum is unbounded below as the ratio grows: one stray token would own the step.
    is_dual_clipped_BT = (advantages_BT < 0) & (ratio_BT > dual_clip)
    surrogate_BT = jnp.where(is_dual_clipped_BT, dual_clip * advantages_BT, jnp.minimum(unclipped_BT, clipped_BT))
    return surrogate_BT, clipped_BT < unclipped_BT, is_dual_clipped_BT


def _policy_terms(policies, advantages_BT, mask_BT, rollouts, clips, correction_clip, ratio, correction):
    """The policy loss of each token and what to watch about it, by name, all [B, T]."""
    current_BT, old_BT, sampler_BT = policies
    log_ratio_BT = _choice("ratio", ratio, RATIOS)(current_BT - old_BT, mask_BT, rollouts)
    ratio_BT = _exp_log_ratio(log_ratio_BT)
    surrogate_BT, is_clipped_BT, is_dual_clipped_BT = _surrogate(ratio, current_BT, ratio_BT, advantages_BT, *clips)
    log_correction_BT = _choice("correction", correction, CORRECTIONS)(old_BT - sampler_BT, rollouts)
    untruncated_BT = _exp_log_ratio(log_correction_BT)
    correction_BT = jnp.minimum(untruncated_BT, correction_clip)
    return {
        "policy_loss": -correction_BT * surrogate_BT,
        "ratio_mean": ratio_BT,
        "clip_share": is_clipped_BT,
        "dual_clip_share": is_dual_clipped_BT,
        "kl_old": ratio_BT - 1.0 - log_ratio_BT,  # k3: never negative
        "correction_mean": correction_BT,
        "correction_truncated_share": untruncated_BT > correction_clip,
        "sampler_gap_mean": jnp.abs(old_BT - sampler_BT),
    }


def _regularisers(current_BT, mask_BT, reference_BT, kl_coefficient, kl, entropy_BT, entropy_coefficient):
    """(name, value [B, T], coefficient) of the KL and of the entropy, each where its array is given."""
    found = []
    if reference_BT is not None:
        estimate = _choice("kl", kl, KL_ESTIMATORS)
        found.append(("kl_reference", estimate(current_BT, reference_BT), kl_coefficient))
    elif kl_coefficient != 0:
        raise ValueError(f"kl_coefficient {kl_coefficient} needs reference_logprobs_BT; pass them, or 0")
    if entropy_BT is not None:
        found.append(("entropy", _masked(entropy_BT, mask_BT), -entropy_coefficient))
    elif entropy_coefficient != 0:
        raise ValueError(f"entropy_coefficient {entropy_coefficient} needs entropy_BT; pass it, or 0")
    return found


def _metrics(terms, mask_BT, rollouts):
    num_tokens = mask_BT.sum().astype(jnp.float32)
    metrics = {
        name: jnp.where(mask_BT, value_BT, 0.0).sum() / jnp.maximum(num_tokens, 1.0) for name, value_BT in terms.items()
    }
    metrics["sampler_gap_max"] = jnp.where(mask_BT, terms["sampler_gap_mean"], 0.0).max()
    metrics["num_tokens"] = num_tokens
    metrics["num_rollouts"] = _num_rollouts(mask_BT, rollouts, 1).astype(jnp.float32)
    return jax.lax.stop_gradient(metrics)


class _Given(NamedTuple):
    """What the loss reads beside the current log-probabilities: masked, without gradients."""

    mask_BT: jax.Array
    rollouts: Rollouts
    old_BT: jax.Array | None
    sampler_BT: jax.Array
    reference_BT: jax.Array | None
    advantages_BT: jax.Array
    weights_BT: jax.Array  # before the division by the denominator


def _given(old_BT, sampler_BT, reference_BT, advantages_B, loss_mask_BT, aggregation, segment_ids_BT) -> _Given:
    token_weights, _ = _choice("aggregation", aggregation, AGGREGATIONS)
    mask_BT = jnp.asarray(loss_mask_BT).astype(bool)
    assert len(advantages_B) == len(mask_BT), f"advantages {advantages_B.shape} for a mask {mask_BT.shape}"
    advantages_BS = advantages_B[:, None] if segment_ids_BT is None else advantages_B
    rollouts = rollouts_of(mask_BT.shape, segment_ids_BT, advantages_BS.shape[1])
    if segment_ids_BT is not None:  # a NaN of a rollout that is out would reach all of its row in the product
        advantages_BS = jnp.where(rollouts.total(mask_BT) > 0, advantages_BS, 0.0)
    old_BT, sampler_BT, reference_BT, advantages_BT = (
        None if values_BT is None else jax.lax.stop_gradient(_masked(values_BT, mask_BT))
        for values_BT in (old_BT, sampler_BT, reference_BT, rollouts.spread(advantages_BS))
    )
    weights_BT = token_weights(mask_BT, rollouts)
    return _Given(mask_BT, rollouts, old_BT, sampler_BT, reference_BT, advantages_BT, weights_BT)


def is_elementwise(ratio: str, correction: str, entropy_coefficient: float) -> bool:
    """Whether a token's loss depends on its own log-probability alone."""
    return ratio in ("token", "cispo") and correction in ("token", "none") and entropy_coefficient == 0


def elementwise_loss(
    old_logprobs_BT: jax.Array | None,
    sampler_logprobs_BT: jax.Array,
    reference_logprobs_BT: jax.Array | None,
    advantages_B: jax.Array,
    loss_mask_BT: jax.Array,
    *,
    denominator: jax.Array | float,
    kl_coefficient: jax.Array | float,
    correction_clip: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    entropy_coefficient: float,
    aggregation: str,
    ratio: str,
    correction: str,
    kl: str,
    segment_ids_BT: jax.Array | None = None,
) -> tuple[Callable, tuple[jax.Array, ...]]:
    """`grpo_loss` where `is_elementwise`: (loss_of, per_token), as models.token_loss takes them.

    The sum of loss_of(logprobs, *per_token) over the masked-in tokens is the loss. old_logprobs_BT: None says that old
    is current. The other arguments are those of `grpo_loss`; without a reference the KL coefficient is not read.
    """
    assert is_elementwise(ratio, correction, entropy_coefficient), (ratio, correction, entropy_coefficient)
    check_clips(clip_low, clip_high, dual_clip, correction_clip)
    given = _given(
        old_logprobs_BT, sampler_logprobs_BT, reference_logprobs_BT, advantages_B, loss_mask_BT, aggregation,
        segment_ids_BT,
    )  # fmt: skip
    arrays = {
        "sampler": given.sampler_BT,
        "advantages": given.advantages_BT,
        "weights": given.weights_BT / denominator,
        "kl_coefficient": jnp.broadcast_to(jnp.asarray(kl_coefficient, jnp.float32), given.mask_BT.shape),
        "old": given.old_BT,
        "reference": given.reference_BT,
    }
    arrays = {name: array_BT for name, array_BT in arrays.items() if array_BT is not None}

    def loss_of(current, *values):
        of = dict(zip(arrays, values, strict=True))
        policies = current, of.get("old", jax.lax.stop_gradient(current)), of["sampler"]
        clips = (clip_low, clip_high, dual_clip)
        terms = _policy_terms(policies, of["advantages"], None, None, clips, correction_clip, ratio, correction)
        loss = terms["policy_loss"]
        if "reference" in of:
            loss = loss + of["kl_coefficient"] * _choice("kl", kl, KL_ESTIMATORS)(current, of["reference"])
        return loss * of["weights"]

    return loss_of, tuple(arrays.values())


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
    ratio: str = "token",
    correction: str = "token",
    kl: str = "k2",
    segment_ids_BT: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of one (micro-)batch and its metrics; gradients flow through logprobs_BT and entropy_BT alone.

    Args:
      logprobs_BT, old_logprobs_BT, sampler_logprobs_BT, reference_logprobs_BT: [B, T] log-probabilities of the tokens
        under the current, old, sampling and reference policies; outside the mask they may be anything, NaN included.
      advantages_B: [B], one a row; with segment ids [B, S], one a segment.
      loss_mask_BT: [B, T] bool or 0/1; the tokens that the policy sampled.
      denominator: `loss_denominator` of the whole batch.
      aggregation, ratio, correction, kl: see the top of this file.
      segment_ids_BT: [B, T] int, 0 for padding and 1 to S for the rollouts of the row.

    Returns:
      Float32 scalar loss, and a dict of float32 scalars: means over this call's masked-in tokens (so micro-batches are
      averaged by num_tokens), but for sampler_gap_max, num_tokens and num_rollouts.

    Raises:
      ValueError: a setting out of its range, or a coefficient without the array it weighs.
    """
    check_clips(clip_low, clip_high, dual_clip, correction_clip)
    given = _given(
        old_logprobs_BT, sampler_logprobs_BT, reference_logprobs_BT, advantages_B, loss_mask_BT, aggregation,
        segment_ids_BT,
    )  # fmt: skip
    mask_BT, rollouts = given.mask_BT, given.rollouts
    current_BT = _masked(logprobs_BT, mask_BT)
    terms = _policy_terms(
        (current_BT, given.old_BT, given.sampler_BT), given.advantages_BT, mask_BT, rollouts,
        (clip_low, clip_high, dual_clip), correction_clip, ratio, correction,
    )  # fmt: skip
    token_loss_BT = terms["policy_loss"]
    regularisers = _regularisers(
        current_BT, mask_BT, given.reference_BT, kl_coefficient, kl, entropy_BT, entropy_coefficient
    )
    for name, value_BT, coefficient in regularisers:
        terms[name] = value_BT
        token_loss_BT = token_loss_BT + coefficient * value_BT
    loss = (token_loss_BT * given.weights_BT).sum() / denominator
    return loss, _metrics(terms, mask_BT, rollouts)
