"""From a step's groups to its updates."""

import dataclasses
import functools

import numpy as np
import pytest

from orchestra_jax import experience
from orchestra_jax.config import GrpoConfig
from orchestra_jax.grpo.batching import BatchShape
from orchestra_jax.grpo.packing import PackedBatch, PackedShape
from orchestra_jax.grpo.scoring import ScoredGroups
from orchestra_jax.types import EpisodeStatus, Trajectory, TrajectoryGroup


def bare_group(name):
    tokens, mask, zeros = np.array([1, 2, 3]), np.array([False, True, True]), np.zeros(3)
    rollout = Trajectory(name, 0, tokens, mask, zeros, zeros, 1, (), (), EpisodeStatus.ANSWERED, "", {})
    return TrajectoryGroup(name, {}, (rollout, rollout))


def test_updates_share_the_kept_groups_out_and_keep_their_advantages():
    groups = [bare_group(str(number)) for number in range(7)]
    kept = (0, 2, 3, 5, 6)
    advantages_KG = np.array([[number, -number] for number in kept], float)
    valid_PG, no_clip_KG = np.ones((7, 2), bool), np.zeros((5, 2), bool)
    scored = ScoredGroups(np.zeros((7, 2)), valid_PG, valid_PG, kept, advantages_KG, no_clip_KG, {}, ())
    settings, shape = GrpoConfig(num_groups=7, groups_per_update=2, group_size=2), BatchShape(2, 2, (4,), (4,))
    split = functools.partial(experience.split_into_updates, groups, scored, settings, shape)
    updates = split(seed=0)
    # As many as seven kept groups would make: the rate's schedule counts them.
    assert [len(micro_batches) for micro_batches in updates] == [1, 1, 1, 1]
    rows = [batch.advantages_B[batch.loss_mask_BC.any(axis=1)].tolist() for (batch,) in updates]
    assert sorted(len(row) // 2 for row in rows) == [1, 1, 1, 2]
    assert sorted(value for row in rows for value in row) == sorted(advantages_KG.ravel().tolist())
    assert [batch.advantages_B.tolist() for (batch,) in split(seed=0)] == [b.advantages_B.tolist() for (b,) in updates]
    assert any(not np.array_equal(a[0].advantages_B, b[0].advantages_B) for a, b in zip(updates, split(seed=1)))
    nothing = ScoredGroups(np.zeros((7, 2)), valid_PG, valid_PG, (), advantages_KG[:0], no_clip_KG[:0], {}, ())
    assert experience.split_into_updates(groups, nothing, settings, shape, seed=0) == []


@pytest.mark.parametrize("shape", [BatchShape(2, 2, (4,), (4,)), PackedShape(2, 8, 2)])
def test_a_group_whose_rollouts_have_all_left_the_loss_makes_no_update(shape):
    """Its gradient would be 0 and the optimizer's momentum would step all the same."""
    groups = [bare_group(str(number)) for number in range(3)]
    valid_PG, trained_PG = np.ones((3, 2), bool), np.array([[False, False], [True, False], [False, False]])
    zeros_KG = np.zeros((3, 2))
    scored = ScoredGroups(zeros_KG, valid_PG, trained_PG, (0, 1, 2), zeros_KG, zeros_KG > 0, {}, ())
    settings = GrpoConfig(groups_per_update=1, group_size=2)
    ((batch,),) = experience.split_into_updates(groups, scored, settings, shape, seed=0)
    assert (batch.loss_mask_RT if isinstance(batch, PackedBatch) else batch.loss_mask_BC).any(axis=1).sum() == 1
    nobody = dataclasses.replace(scored, trained_PG=~valid_PG)
    assert experience.split_into_updates(groups, nobody, settings, shape, seed=0) == []


def test_the_kl_coefficient_falls_linearly():
    settings = GrpoConfig(num_steps=5, kl_coefficient=0.2, final_kl_coefficient=0.0)
    falling = [experience.kl_coefficient(settings, step) for step in range(5)]
    assert falling == pytest.approx([0.2, 0.15, 0.1, 0.05, 0.0])
    assert experience.kl_coefficient(dataclasses.replace(settings, num_steps=1), 0) == 0.2
