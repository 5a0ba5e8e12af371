"""From groups of trajectories to micro-batches of fixed shapes: what a group's rollouts share once, the rest beside it.

A group's rollouts share their prompt, and mostly the first tokens that they sampled too: a thought that restates the
prompt is the same in all of them. The train step runs this prefix once, and what is left of the completions attends to
its keys and values (models/kv_cache.shared_prefix_cache): 16 rollouts of a 100-token prompt cost 100 prompt tokens, not
1,600. The last token of the prefix opens each completion's row, since it predicts the first token of its own.

    prefix row      P0 P1 ... Pn-1 s0 ... sj-2     predicts s0 ... sj-1 behind the prompt
    completion row  sj-1 c0 c1 ... ck-1            inputs
                    s0 ... sj-1 | c0 c1 ... ck     targets, with mask, log-probabilities: the shared ones in front

Each rollout keeps its own mask, log-probabilities and advantage of the shared tokens too, so the loss and its gradient
are those of whole trajectories.

Numpy only. Legend: P prompts of a micro-batch, G rollouts of each, B = P * G rows, T prefix tokens, I own tokens of a
completion, S shared ones, C = S + I targets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from orchestra_jax.types import TrajectoryGroup


class MicroBatch(NamedTuple):
    """Padding has mask 0 and length 0; a row of padding counts in nothing."""

    prefix_tokens_PT: np.ndarray  # int32
    prefix_lengths_P: np.ndarray  # int32
    input_tokens_BI: np.ndarray  # int32
    input_lengths_B: np.ndarray  # int32
    targets_BC: np.ndarray  # int32
    loss_mask_BC: np.ndarray  # bool
    sampler_logprobs_BC: np.ndarray  # float32
    advantages_B: np.ndarray  # float32
    shared_columns_PS: np.ndarray | None = (
        None  # int32: of the prefix row, each predicts one shared target; None: S = 0
    )


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The padded sizes, rising; one compilation for each pair of buckets that is met."""

    num_groups: int
    group_size: int
    prefix_buckets: tuple[int, ...]
    completion_buckets: tuple[int, ...]  # of what is a rollout's own
    num_shared: int = 0  # completion tokens that count to the prefix, at most


def make_micro_batches(
    groups: Sequence[TrajectoryGroup], advantages_PG: np.ndarray, valid_PG: np.ndarray, shape: BatchShape
) -> list[MicroBatch]:
    """Cuts the groups into micro-batches, those of like lengths together so that few rows are padded far.

    advantages_PG, valid_PG: [number of groups, G]; rollouts that are not valid are masked out altogether. ValueError
    for a prompt or a completion that fits no padded size.
    """
    order = sorted(range(len(groups)), key=lambda number: _padded_lengths(groups[number], shape))
    return [
        _make_micro_batch(groups, advantages_PG, valid_PG, order[start : start + shape.num_groups], shape)
        for start in range(0, len(order), shape.num_groups)
    ]


def _num_shared(group: TrajectoryGroup, shape: BatchShape) -> int:
    """How many completion tokens all rollouts begin with, each one's last token not counted, as far as sizes allow."""
    completions = [trajectory.tokens[trajectory.num_prompt_tokens :] for trajectory in group.trajectories]
    room = shape.prefix_buckets[-1] - (group.trajectories[0].num_prompt_tokens - 1)
    width = max(min(shape.num_shared, room, *(len(tokens) - 1 for tokens in completions)), 0)
    is_same = (np.stack([tokens[:width] for tokens in completions]) == completions[0][:width]).all(axis=0)
    return int(np.cumprod(is_same).sum())


def _padded_lengths(group: TrajectoryGroup, shape: BatchShape) -> tuple[int, int]:
    """The buckets that hold the group's prefix, but for its last token, and the longest rest of a completion."""
    num_shared = _num_shared(group, shape)
    num_prefix = group.trajectories[0].num_prompt_tokens - 1 + num_shared
    longest = max(trajectory.num_completion_tokens for trajectory in group.trajectories) - num_shared
    return (
        _bucket("prefix", num_prefix, shape.prefix_buckets, group.instance_id),
        _bucket("completion", longest, shape.completion_buckets, group.instance_id),
    )


def _bucket(what: str, length: int, buckets: tuple[int, ...], instance_id: str) -> int:
    fitting = [bucket for bucket in buckets if bucket >= length]
    if not fitting:
        raise ValueError(
            f"the {what} of {instance_id} has {length} tokens and fits none of {what}_buckets {buckets}: "
            "add a longer one"
        )
    return min(fitting)


def _make_micro_batch(groups, advantages_PG, valid_PG, numbers, shape: BatchShape) -> MicroBatch:
    lengths = [_padded_lengths(groups[number], shape) for number in numbers]
    num_prefix_tokens, num_own = (max(each) for each in zip(*lengths, strict=True))
    num_rows, num_targets = shape.num_groups * shape.group_size, shape.num_shared + num_own
    batch = MicroBatch(
        np.zeros((shape.num_groups, num_prefix_tokens), np.int32),
        np.zeros(shape.num_groups, np.int32),
        np.zeros((num_rows, num_own), np.int32),
        np.zeros(num_rows, np.int32),
        np.zeros((num_rows, num_targets), np.int32),
        np.zeros((num_rows, num_targets), bool),
        np.zeros((num_rows, num_targets), np.float32),
        np.zeros(num_rows, np.float32),
        np.zeros((shape.num_groups, shape.num_shared), np.int32) if shape.num_shared else None,
    )
    for p, number in enumerate(numbers):
        _fill_group(batch, p, groups[number], advantages_PG[number], valid_PG[number], shape)
    return batch


def _fill_group(batch: MicroBatch, p: int, group: TrajectoryGroup, advantages_G, valid_G, shape: BatchShape) -> None:
    """Writes a group to prefix row p of the batch and to the completion rows that belong to it."""
    trajectories, num_shared = group.trajectories, _num_shared(group, shape)
    assert len(trajectories) == shape.group_size, f"{len(trajectories)} rollouts in a group of {shape.group_size}"
    num_prompt = trajectories[0].num_prompt_tokens - 1
    num_prefix = num_prompt + num_shared
    batch.prefix_tokens_PT[p, :num_prefix] = trajectories[0].tokens[:num_prefix]
    batch.prefix_lengths_P[p] = num_prefix
    if num_shared:
        batch.shared_columns_PS[p, :num_shared] = np.arange(num_prompt, num_prefix)
    for g, trajectory in enumerate(trajectories):
        prompt = trajectory.tokens[: trajectory.num_prompt_tokens]
        is_shared = np.array_equal(prompt, trajectories[0].tokens[: num_prompt + 1])
        assert is_shared, f"rollout {g} of {group.instance_id} has a prompt of its own"
        row, count = p * shape.group_size + g, trajectory.num_completion_tokens - num_shared
        batch.input_tokens_BI[row, :count] = trajectory.tokens[num_prefix:-1]
        batch.input_lengths_B[row] = count
        for columns, start, stop in (
            (slice(num_shared), num_prompt + 1, num_prefix + 1),
            (slice(shape.num_shared, shape.num_shared + count), num_prefix + 1, None),
        ):
            batch.targets_BC[row, columns] = trajectory.tokens[start:stop]
            batch.loss_mask_BC[row, columns] = trajectory.loss_mask[start:stop] & valid_G[g]
            batch.sampler_logprobs_BC[row, columns] = trajectory.logprobs[start:stop]
        batch.advantages_B[row] = advantages_G[g]
