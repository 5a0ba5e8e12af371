"""From groups of trajectories to micro-batches of fixed shapes: the prompt of a group once, its rollouts beside it.

A group's rollouts share their prompt, so the train step runs each prompt once and the completions attend to its keys
and values (models/kv_cache.shared_prefix_cache): 16 rollouts of a 100-token prompt cost 100 prompt tokens, not 1,600.
The last prompt token opens each completion's row, since it predicts the first sampled token.

    prompt row      P0 P1 ... Pn-2
    completion row  Pn-1 c0 c1 ... ck-1      inputs
                    c0   c1 c2 ... ck        targets, with mask, log-probabilities

Numpy only. Legend: P prompts of a micro-batch, G rollouts of each, B = P * G rows, T prompt tokens, C completion
tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from orchestra_jax.types import TrajectoryGroup


class MicroBatch(NamedTuple):
    """Padding has mask 0 and length 0; a row of padding counts in nothing."""

    prompt_tokens_PT: np.ndarray  # int32
    prompt_lengths_P: np.ndarray  # int32
    input_tokens_BC: np.ndarray  # int32
    input_lengths_B: np.ndarray  # int32
    targets_BC: np.ndarray  # int32
    loss_mask_BC: np.ndarray  # bool
    sampler_logprobs_BC: np.ndarray  # float32
    advantages_B: np.ndarray  # float32


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The padded sizes, rising; one compilation for each pair of buckets that is met."""

    num_groups: int
    group_size: int
    prompt_buckets: tuple[int, ...]
    completion_buckets: tuple[int, ...]


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


def _padded_lengths(group: TrajectoryGroup, shape: BatchShape) -> tuple[int, int]:
    """The buckets that hold the group's prompt, but for its last token, and its longest completion."""
    num_prompt = group.trajectories[0].num_prompt_tokens - 1
    longest = max(trajectory.num_completion_tokens for trajectory in group.trajectories)
    return (
        _bucket("prompt", num_prompt, shape.prompt_buckets, group.instance_id),
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
    num_prompt_tokens, width = (max(each) for each in zip(*lengths, strict=True))
    num_rows = shape.num_groups * shape.group_size
    batch = MicroBatch(
        np.zeros((shape.num_groups, num_prompt_tokens), np.int32),
        np.zeros(shape.num_groups, np.int32),
        np.zeros((num_rows, width), np.int32),
        np.zeros(num_rows, np.int32),
        np.zeros((num_rows, width), np.int32),
        np.zeros((num_rows, width), bool),
        np.zeros((num_rows, width), np.float32),
        np.zeros(num_rows, np.float32),
    )
    for p, number in enumerate(numbers):
        _fill_group(batch, p, groups[number], advantages_PG[number], valid_PG[number], shape)
    return batch


def _fill_group(batch: MicroBatch, p: int, group: TrajectoryGroup, advantages_G, valid_G, shape: BatchShape) -> None:
    """Writes a group to prompt row p of the batch and to the completion rows that belong to it."""
    trajectories = group.trajectories
    assert len(trajectories) == shape.group_size, f"{len(trajectories)} rollouts in a group of {shape.group_size}"
    num_prompt = trajectories[0].num_prompt_tokens - 1
    batch.prompt_tokens_PT[p, :num_prompt] = trajectories[0].tokens[:num_prompt]
    batch.prompt_lengths_P[p] = num_prompt
    for g, trajectory in enumerate(trajectories):
        prompt = trajectory.tokens[: trajectory.num_prompt_tokens]
        is_shared = np.array_equal(prompt, trajectories[0].tokens[: num_prompt + 1])
        assert is_shared, f"rollout {g} of {group.instance_id} has a prompt of its own"
        row, count = p * shape.group_size + g, trajectory.num_completion_tokens
        batch.input_tokens_BC[row, :count] = trajectory.tokens[num_prompt:-1]
        batch.input_lengths_B[row] = count
        batch.targets_BC[row, :count] = trajectory.tokens[num_prompt + 1 :]
        batch.loss_mask_BC[row, :count] = trajectory.loss_mask[num_prompt + 1 :] & valid_G[g]
        batch.sampler_logprobs_BC[row, :count] = trajectory.logprobs[num_prompt + 1 :]
        batch.advantages_B[row] = advantages_G[g]
