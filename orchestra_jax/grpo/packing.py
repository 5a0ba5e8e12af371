"""Whole trajectories side by side in rows of a token budget: for long rollouts of very different lengths.

Each trajectory, prompt included, is one segment of one row; no trajectory is cut, and none is dropped so that the rows
come out even: rows of padding, with weight zero, fill the last micro-batch. Rows are filled best fit first, from the
longest trajectory on (Johnson 1974: at most 11/9 of the fewest rows there could be).

    row        P0 P1 c0 c1 | Q0 c0 c1 c2 | 0 0        tokens; | ends a segment, 0 is padding
    segments    1  1  1  1    2  2  2  2   0 0        made of `segment_lengths_RS` on the device, positions too

Compared with batching.py a shared prompt is computed G times and padding all but vanishes. On 2,048 lengths of a
log-normal distribution (median 4,000, sigma 1, cut to 256..24,000; rows of 24,576, 4 rows a micro-batch) 1 % of the
slots are padding (tests/grpo/test_packing.py).

Numpy, but for `layout`. Legend: R rows of a micro-batch, T tokens of a row, S segments of a row at most, P groups, G
rollouts of each.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from orchestra_jax.types import Trajectory, TrajectoryGroup


class PackedBatch(NamedTuple):
    """Rollout `numbers_RS` of the step (p * G + g, -1 where there is none) is segment s + 1 of row r."""

    tokens_RT: np.ndarray  # int32
    loss_mask_RT: np.ndarray  # bool, of the token itself
    sampler_logprobs_RT: np.ndarray  # float32, of the token itself
    segment_lengths_RS: np.ndarray  # int32
    advantages_RS: np.ndarray  # float32
    numbers_RS: np.ndarray  # int32


@dataclasses.dataclass(frozen=True)
class PackedShape:
    """One compilation: every micro-batch has this shape."""

    num_rows: int
    num_tokens: int  # of a row: the token budget
    num_segments: int  # of a row at most


def pack_lengths(lengths: Sequence[int], num_tokens: int, num_segments: int) -> list[list[int]]:
    """The numbers of the lengths that share a row, row by row: best fit, from the longest on.

    ValueError for a length beyond num_tokens.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    if order and lengths[order[0]] > num_tokens:
        raise ValueError(
            f"trajectory {order[0]} has {lengths[order[0]]} tokens and a row {num_tokens}: raise tokens_per_row"
        )
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted; rows that are full are not in it
    for number in order:
        place = bisect.bisect_left(room, (lengths[number], -1))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = num_tokens, len(rows)
            rows.append([])
        rows[row].append(number)
        if len(rows[row]) < num_segments:
            bisect.insort(room, (left - lengths[number], row))
    return rows


def make_packed_batches(
    groups: Sequence[TrajectoryGroup], advantages_PG: np.ndarray, trained_PG: np.ndarray, shape: PackedShape
) -> list[PackedBatch]:
    """Packs the rollouts of all groups; those that are not trained on have no place.

    advantages_PG, trained_PG: [number of groups, G]. ValueError for a trajectory that fits no row.
    """
    flat = [trajectory for group in groups for trajectory in group.trajectories]
    numbers = np.flatnonzero(np.ravel(trained_PG))
    rows = pack_lengths([len(flat[number].tokens) for number in numbers], shape.num_tokens, shape.num_segments)
    advantages_N = np.ravel(advantages_PG)
    batches = []
    for start in range(0, len(rows), shape.num_rows):
        batch = _empty(shape)
        for r, row in enumerate(rows[start : start + shape.num_rows]):
            _fill_row(batch, r, [int(numbers[place]) for place in row], flat, advantages_N)
        batches.append(batch)
    return batches


def _empty(shape: PackedShape) -> PackedBatch:
    tokens, segments = (shape.num_rows, shape.num_tokens), (shape.num_rows, shape.num_segments)
    return PackedBatch(
        np.zeros(tokens, np.int32),
        np.zeros(tokens, bool),
        np.zeros(tokens, np.float32),
        np.zeros(segments, np.int32),
        np.zeros(segments, np.float32),
        np.full(segments, -1, np.int32),
    )


def _fill_row(batch: PackedBatch, r: int, numbers: list[int], flat: list[Trajectory], advantages_N) -> None:
    start = 0
    for s, number in enumerate(numbers):
        trajectory = flat[number]
        stop = start + len(trajectory.tokens)
        batch.tokens_RT[r, start:stop] = trajectory.tokens
        batch.loss_mask_RT[r, start:stop] = trajectory.loss_mask
        batch.sampler_logprobs_RT[r, start:stop] = trajectory.logprobs
        batch.segment_lengths_RS[r, s] = stop - start
        batch.advantages_RS[r, s] = advantages_N[number]
        batch.numbers_RS[r, s] = number
        start = stop


def layout(segment_lengths_RS, num_tokens: int):
    """-> segment_ids_RT (0 padding, 1.. segments), positions_RT (restarting in each), both int32; jax or numpy in."""
    ends_RS = jnp.cumsum(jnp.asarray(segment_lengths_RS), axis=1)
    slots_T = jnp.arange(num_tokens)
    is_behind_RTS = slots_T[None, :, None] >= ends_RS[:, None, :]
    index_RT = is_behind_RTS.sum(axis=2)  # segments that end at or before the slot
    is_real_RT = slots_T[None, :] < ends_RS[:, -1:]
    starts_RT = jnp.where(is_behind_RTS, ends_RS[:, None, :], 0).max(axis=2)
    segment_ids_RT = jnp.where(is_real_RT, index_RT + 1, 0).astype(jnp.int32)
    return segment_ids_RT, jnp.where(is_real_RT, slots_T[None, :] - starts_RT, 0).astype(jnp.int32)


def wasted_share(batches: Sequence[PackedBatch]) -> float:
    """The share of slots that hold no token of a trajectory, rows of padding included."""
    used = sum(int(batch.segment_lengths_RS.sum()) for batch in batches)
    return 1.0 - used / max(sum(batch.tokens_RT.size for batch in batches), 1)
