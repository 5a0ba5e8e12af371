"""The layout of the micro-batches, on trajectories small enough to write down."""

import numpy as np
import pytest

from orchestra_jax.grpo.batching import BatchShape, make_micro_batches
from orchestra_jax.types import EpisodeStatus, Trajectory, TrajectoryGroup


def trajectory(tokens, mask, num_prompt_tokens):
    mask = np.array(mask, bool)
    return Trajectory(
        instance_id="i", rollout_index=0, tokens=np.array(tokens, np.int32), loss_mask=mask,
        logprobs=np.where(mask, -0.5 - np.arange(len(mask)), 0.0).astype(np.float32),
        policy_versions=np.where(mask, 3, -1), num_prompt_tokens=num_prompt_tokens, calls=(), receipts=(),
        status=EpisodeStatus.ANSWERED, answer="", objectives={},
    )  # fmt: skip


def group(prompt, completions):
    """Each completion is a list of tokens; negative ones were given, not sampled."""
    return TrajectoryGroup("i", {}, tuple(
        trajectory([*prompt, *np.abs(tokens)], [False] * len(prompt) + [token > 0 for token in tokens], len(prompt))
        for tokens in completions
    ))  # fmt: skip


SHORT = group([5, 6, 7], [[11, 12], [13]])
LONG = group([8, 9], [[21, -22, -23, 24], [25, 26, 27]])
SHAPE = BatchShape(num_groups=1, group_size=2, prefix_buckets=(3,), completion_buckets=(2, 4))
ADVANTAGES_PG = np.array([[1.0, -1.0], [2.0, -2.0]])
ALL_VALID_PG = np.ones((2, 2), bool)


def test_the_layout_by_hand():
    first, second = make_micro_batches([LONG, SHORT], ADVANTAGES_PG, ALL_VALID_PG, SHAPE)
    # Short completions come first, in the smaller bucket.
    np.testing.assert_array_equal(first.prefix_tokens_PT, [[5, 6, 0]])
    np.testing.assert_array_equal(first.prefix_lengths_P, [2])
    np.testing.assert_array_equal(first.input_tokens_BI, [[7, 11], [7, 0]])
    np.testing.assert_array_equal(first.input_lengths_B, [2, 1])
    np.testing.assert_array_equal(first.targets_BC, [[11, 12], [13, 0]])
    np.testing.assert_array_equal(first.loss_mask_BC, [[True, True], [True, False]])
    np.testing.assert_array_equal(first.sampler_logprobs_BC, [[-3.5, -4.5], [-3.5, 0]])
    np.testing.assert_array_equal(first.advantages_B, [2.0, -2.0])
    np.testing.assert_array_equal(second.input_tokens_BI, [[9, 21, 22, 23], [9, 25, 26, 0]])
    np.testing.assert_array_equal(second.targets_BC, [[21, 22, 23, 24], [25, 26, 27, 0]])
    np.testing.assert_array_equal(second.loss_mask_BC, [[True, False, False, True], [True, True, True, False]])
    np.testing.assert_array_equal(second.sampler_logprobs_BC, [[-2.5, 0, 0, -5.5], [-2.5, -3.5, -4.5, 0]])
    np.testing.assert_array_equal(second.advantages_B, [1.0, -1.0])


def test_what_the_rollouts_share_is_part_of_the_prefix():
    # Both sample 11 and are given 12; behind them they differ. The first one's mask and log-probabilities stay its own.
    twins = group([5, 6], [[11, -12, 13, 14], [11, -12, 15]])
    shape = BatchShape(num_groups=1, group_size=2, prefix_buckets=(4,), completion_buckets=(2,), num_shared=3)
    valid_PG = np.array([[True, False]])
    (batch,) = make_micro_batches([twins], ADVANTAGES_PG[:1], valid_PG, shape)
    np.testing.assert_array_equal(batch.prefix_tokens_PT, [[5, 6, 11, 0]])
    np.testing.assert_array_equal(batch.prefix_lengths_P, [3])
    np.testing.assert_array_equal(batch.shared_columns_PS, [[1, 2, 0]])  # 6 predicts 11, 11 predicts 12
    np.testing.assert_array_equal(batch.input_tokens_BI, [[12, 13], [12, 0]])
    np.testing.assert_array_equal(batch.input_lengths_B, [2, 1])
    np.testing.assert_array_equal(batch.targets_BC, [[11, 12, 0, 13, 14], [11, 12, 0, 15, 0]])
    np.testing.assert_array_equal(batch.loss_mask_BC, [[True, False, False, True, True], [False] * 5])
    np.testing.assert_allclose(batch.sampler_logprobs_BC, [[-2.5, 0, 0, -4.5, -5.5], [-2.5, 0, 0, -4.5, 0]])


@pytest.mark.parametrize(
    ("completions", "prefix_bucket", "num_shared", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4]], 9, 8, 2),
        ([[1, 2, 3], [1, 2, 4]], 9, 1, 1),  # no more than was asked for
        ([[1, 2, 3], [1, 2, 4]], 2, 8, 1),  # nor than the prefix has room for
        ([[1, 2, 3], [1, 2, 3]], 9, 8, 2),  # a rollout keeps its last token
        ([[1], [1, 2]], 9, 8, 0),
        ([[1, 2], [3, 2]], 9, 8, 0),
    ],
)
def test_how_much_is_shared(completions, prefix_bucket, num_shared, expected):
    shape = BatchShape(1, 2, (prefix_bucket,), (4,), num_shared)
    (batch,) = make_micro_batches([group([5, 6], completions)], ADVANTAGES_PG[:1], np.ones((1, 2), bool), shape)
    assert batch.prefix_lengths_P.tolist() == [1 + expected]
    assert batch.loss_mask_BC.sum(axis=1).tolist() == [len(tokens) for tokens in completions]


def test_a_rollout_that_is_not_valid_has_no_token_to_train_on():
    valid_PG = np.array([[True, False], [True, True]])
    batches = make_micro_batches([SHORT, LONG], ADVANTAGES_PG, valid_PG, SHAPE)
    assert batches[0].loss_mask_BC.sum(axis=1).tolist() == [2, 0]
    assert batches[1].loss_mask_BC.sum(axis=1).tolist() == [2, 3]


def test_missing_groups_are_rows_of_padding():
    shape = BatchShape(num_groups=3, group_size=2, prefix_buckets=(3,), completion_buckets=(2, 4, 8))
    (batch,) = make_micro_batches([SHORT, LONG], ADVANTAGES_PG, ALL_VALID_PG, shape)
    assert batch.input_tokens_BI.shape == (6, 4)
    assert batch.prefix_lengths_P.tolist() == [2, 1, 0]
    assert batch.input_lengths_B.tolist() == [2, 1, 4, 3, 0, 0]
    assert batch.loss_mask_BC.sum(axis=1).tolist() == [2, 1, 2, 3, 0, 0]
    assert make_micro_batches([], np.zeros((0, 2)), np.zeros((0, 2), bool), shape) == []


def test_what_fits_no_size_is_refused_with_the_mend():
    with pytest.raises(ValueError, match="the completion of i has 4 tokens .*completion_buckets"):
        make_micro_batches([LONG], ADVANTAGES_PG, ALL_VALID_PG, BatchShape(1, 2, (3,), (2, 3)))
    with pytest.raises(ValueError, match="the prefix of i has 2 tokens .*prefix_buckets"):
        make_micro_batches([SHORT], ADVANTAGES_PG, ALL_VALID_PG, BatchShape(1, 2, (1,), (4,)))


def test_groups_of_like_lengths_share_a_micro_batch():
    short_prompt = group([4], [[11, 12, 13, 14], [13]])
    shape = BatchShape(num_groups=2, group_size=2, prefix_buckets=(1, 2), completion_buckets=(2, 4))
    groups = [SHORT, LONG, SHORT, short_prompt]  # prompts without their last token: 2, 1, 2, 0
    batches = make_micro_batches(groups, np.zeros((4, 2)), np.ones((4, 2), bool), shape)
    assert [batch.prefix_tokens_PT.shape[1] for batch in batches] == [1, 2]
    assert [batch.input_tokens_BI.shape[1] for batch in batches] == [4, 2]


def test_rollouts_of_a_group_share_their_prompt():
    mixed = TrajectoryGroup("i", {}, (SHORT.trajectories[0], trajectory([5, 1, 7, 13], [0, 0, 0, 1], 3)))
    with pytest.raises(AssertionError, match="rollout 1 of i"):
        make_micro_batches([mixed], ADVANTAGES_PG, ALL_VALID_PG, SHAPE)
