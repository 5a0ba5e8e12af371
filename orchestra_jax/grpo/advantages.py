"""Group-relative advantages: a reward against a baseline, and in units of a standard deviation.

    "grpo"           (R_i - mean) / (max(std, std_floor) + epsilon)    mean and std over the group's valid rollouts
    "dr_grpo"        R_i - mean
    "rloo"           R_i - mean of the others = n / (n - 1) (R_i - mean)
    "leave_one_out"  (R_i - mean of the others) / (max(std of the others, std_floor) + epsilon)
    "batch"          (R_i - mean) / (max(std, std_floor) + epsilon)    over the valid rollouts of all groups given
    "batch_std"      (R_i - mean of the group) / (max(std, std_floor) + epsilon), std pooled over all groups given:
                     the square root of sum (R - mean of its group)^2 / sum (n - ddof), over groups of two or more

Sources: DeepSeekMath (arXiv 2402.03300), as ToolOrchestra uses it; Dr. GRPO (2503.20783); RLOO (2402.14740);
REINFORCE++ (2501.03262) for the baseline and the deviation of the batch. Dividing by the group's own gives one whose
rollouts differ by cents the same push as one that holds failures: the homogeneity filter (grpo/filters.py) and the
floor undo most of that, "batch_std" all of it. A lone winner has a standard deviation of the others of 0: without a
floor "leave_one_out" puts it at the clip.

By hand, rewards 1, 0, 0, 1: "dr_grpo" gives 1/2, -1/2, -1/2, 1/2; "rloo" 2/3, -2/3, -2/3, 2/3; "grpo" with ddof 0 gives
1, -1, -1, 1, with ddof 1 these times sqrt(3) / 2.

The rewards come from rewards/preference.py; nothing here knows objectives. Numpy only. Shape suffixes: G rollouts of a
group; all take leading dimensions too, as in [P, G].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class AdvantageResult(NamedTuple):
    advantages_G: np.ndarray  # [..., G] float64; 0 where invalid
    is_clipped_G: np.ndarray  # [..., G] bool; the clip changed the value


def _check(rewards_G, valid_G, std_ddof):
    rewards_G, valid_G = np.asarray(rewards_G, dtype=np.float64), np.asarray(valid_G, dtype=bool)
    assert rewards_G.shape == valid_G.shape, f"rewards {rewards_G.shape} and valid {valid_G.shape} differ in shape"
    assert np.isfinite(rewards_G[valid_G]).all(), f"a valid rollout has a non-finite reward: {rewards_G}"
    if std_ddof not in (0, 1):
        raise ValueError(f"std_ddof {std_ddof} must be 0 (population) or 1 (sample)")
    return rewards_G, valid_G


def _deviations(rewards_G, valid_G, std_ddof):
    """Returns (R - mean, std with kept last dimension); both 0 in a group with fewer than two valid rollouts.

    Both are 0 exactly, too, where all rewards are one number: the mean of three times 0.2 is not 0.2.
    """
    num_valid = valid_G.sum(axis=-1, keepdims=True)
    highest = np.where(valid_G, rewards_G, -np.inf).max(axis=-1, keepdims=True)
    lowest = np.where(valid_G, rewards_G, np.inf).min(axis=-1, keepdims=True)
    mean = np.where(valid_G, rewards_G, 0.0).sum(axis=-1, keepdims=True) / np.maximum(num_valid, 1)
    deviation_G = np.where(valid_G & (num_valid >= 2) & (highest > lowest), rewards_G - mean, 0.0)
    variance = (deviation_G**2).sum(axis=-1, keepdims=True) / np.maximum(num_valid - std_ddof, 1)
    return deviation_G, np.sqrt(variance)


def _grpo(rewards_G, valid_G, std_ddof, epsilon, std_floor):
    deviation_G, std = _deviations(rewards_G, valid_G, std_ddof)
    return deviation_G / (np.maximum(std, std_floor) + epsilon)


def _dr_grpo(rewards_G, valid_G, std_ddof, epsilon, std_floor):
    return _deviations(rewards_G, valid_G, std_ddof)[0]


def _rloo(rewards_G, valid_G, std_ddof, epsilon, std_floor):
    num_valid = valid_G.sum(axis=-1, keepdims=True)
    return _deviations(rewards_G, valid_G, std_ddof)[0] * (num_valid / np.maximum(num_valid - 1, 1))


def _leave_one_out(rewards_G, valid_G, std_ddof, epsilon, std_floor):
    """With d the deviations of the whole group, the others' squares sum to sum d^2 - d_i^2 - d_i^2 / (n - 1)."""
    deviation_G, _ = _deviations(rewards_G, valid_G, std_ddof)
    num_others = np.maximum(valid_G.sum(axis=-1, keepdims=True) - 1, 1)
    squares = (deviation_G**2).sum(axis=-1, keepdims=True)
    squares_G = np.maximum(squares - deviation_G**2 * (1 + 1 / num_others), 0.0)
    # What rounding leaves of others that are all alike is no deviation.
    squares_G = np.where(squares_G > 1e-12 * squares, squares_G, 0.0)
    std_G = np.sqrt(squares_G / np.maximum(num_others - std_ddof, 1))
    return deviation_G * (1 + 1 / num_others) / (np.maximum(std_G, std_floor) + epsilon)


def _batch(rewards_G, valid_G, std_ddof, epsilon, std_floor):
    flat = _grpo(rewards_G.reshape(-1), valid_G.reshape(-1), std_ddof, epsilon, std_floor)
    return flat.reshape(rewards_G.shape)


def _batch_std(rewards_G, valid_G, std_ddof, epsilon, std_floor):
    deviation_G, _ = _deviations(rewards_G, valid_G, std_ddof)
    num_valid = valid_G.sum(axis=-1)
    num_free = np.where(num_valid >= 2, num_valid - std_ddof, 0).sum()
    return deviation_G / (max(np.sqrt((deviation_G**2).sum() / max(num_free, 1)), std_floor) + epsilon)


ADVANTAGES = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
    "leave_one_out": _leave_one_out,
    "batch": _batch,
    "batch_std": _batch_std,
}


def raw_advantages(
    rewards_G: np.ndarray,
    valid_G: np.ndarray,
    kind: str = "grpo",
    *,
    std_ddof: int = 1,
    epsilon: float = 1e-6,
    std_floor: float = 0.0,
) -> np.ndarray:
    """Advantages before any clip.

    Args:
      rewards_G: [..., G]; what stands at invalid places does not matter.
      valid_G: [..., G] bool; invalid rollouts enter no statistic and get advantage 0.
      kind: a key of ADVANTAGES.
      std_ddof: 1 is the sample's standard deviation, 0 the population's.
      epsilon: added to the standard deviation.
      std_floor: a smaller standard deviation counts as this one.

    Returns:
      [..., G] float64; all 0 for a group with fewer than two valid rollouts.

    Raises:
      ValueError: an unknown kind, or std_ddof neither 0 nor 1.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"advantage {kind!r} must be one of {sorted(ADVANTAGES)}")
    rewards_G, valid_G = _check(rewards_G, valid_G, std_ddof)
    return ADVANTAGES[kind](rewards_G, valid_G, std_ddof, epsilon, std_floor)


def clip_advantages(advantages_G: np.ndarray, clip: float) -> AdvantageResult:
    """Bounds the magnitude. A sample-scaled advantage is at most (n - 1) / sqrt(n): 3 binds from n = 11 on.

    ValueError for a clip that is not positive; math.inf switches it off.
    """
    if not clip > 0:
        raise ValueError(f"clip {clip} must be positive; math.inf switches it off")
    return AdvantageResult(np.clip(advantages_G, -clip, clip), np.abs(advantages_G) > clip)


def group_advantages(
    rewards_G: np.ndarray, valid_G: np.ndarray, kind: str = "grpo", *, clip: float = 3.0, **statistics
) -> AdvantageResult:
    """`raw_advantages`, with its keywords, clipped to [-clip, clip]. ValueError as there."""
    return clip_advantages(raw_advantages(rewards_G, valid_G, kind, **statistics), clip)


def is_homogeneous(rewards_G: np.ndarray, valid_G: np.ndarray, min_std: float, std_ddof: int = 1) -> bool | np.ndarray:
    """The paper's first filter: the standard deviation of the valid rewards is below `min_std` (0.1 there).

    Returns:
      One bool for [G], an array of them for leading dimensions. min_std = 0 lets every group through.
    """
    _, std = _deviations(*_check(rewards_G, valid_G, std_ddof), std_ddof)
    is_low = std[..., 0] < min_std
    return bool(is_low) if is_low.ndim == 0 else is_low
