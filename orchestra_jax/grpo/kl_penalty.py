"""The KL to the reference as a part of the reward, estimated by k1 on the sampled tokens of each rollout.

    penalty_i = kl_coefficient * sum_t (log pi_sampler(t) - log pi_reference(t))

k1 is unbiased and has a large variance; as a *loss* its gradient is 0 in expectation, so it stands here alone. The
penalty is taken from the reward before the baseline of the group is, which removes most of that variance; the filters
have looked at the reward without it (grpo/scoring.py).

Legend: P groups, G rollouts of each, R rows, T tokens, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orchestra_jax.grpo.packing import PackedShape, make_packed_batches
from orchestra_jax.grpo.train_step import batch_logprobs, loss_inputs
from orchestra_jax.models.config import ModelConfig
from orchestra_jax.types import TrajectoryGroup

KL_IN_REWARD = "k1_reward"  # of grpo.kl, beside the estimators of the loss


def reference_kl(
    groups: Sequence[TrajectoryGroup],
    reference_params,
    temperature: float,
    *,
    config: ModelConfig,
    chunk: int,
    shape: PackedShape,
) -> np.ndarray:
    """[P, G] nats: k1 summed over the sampled tokens of each rollout, by one forward pass of the reference.

    `shape`: how the trajectories are packed for it. ValueError for a trajectory that fits no row.
    """
    size = (len(groups), len(groups[0].trajectories))
    totals = np.zeros(size[0] * size[1])
    for batch in make_packed_batches(groups, np.zeros(size), np.ones(size, bool), shape):
        reference_RT = np.asarray(batch_logprobs(reference_params, batch, temperature, config=config, chunk=chunk))
        inputs = loss_inputs(batch)
        mask_RT, segments_RT = np.asarray(inputs.loss_mask_BC), np.asarray(inputs.segment_ids_BC)
        k1_RT = np.where(mask_RT, np.asarray(inputs.sampler_logprobs_BC) - reference_RT, 0.0)
        for r, s in np.argwhere(batch.numbers_RS >= 0):
            totals[batch.numbers_RS[r, s]] = k1_RT[r][segments_RT[r] == s + 1].sum(dtype=np.float64)
    return totals.reshape(size)
