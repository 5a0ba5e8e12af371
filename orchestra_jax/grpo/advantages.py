"""Group-relative advantages and the filter that drops groups without a signal.

    A_i = (R_i - mean R) / (std R + epsilon), clipped to [-clip, clip]     mean and std over the group's valid rollouts

GRPO (DeepSeekMath, arXiv 2402.03300) as ToolOrchestra uses it; without the division it is Dr. GRPO's (2503.20783).
Dividing gives a group whose rollouts differ by cents the same push as one that holds failures: the homogeneity filter
is what undoes most of that. The rewards come from rewards/preference.py; nothing here knows objectives.

Numpy only. Shape suffixes: G rollouts of a group; all but the filter take leading dimensions too, as in [P, G].
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np


class AdvantageResult(NamedTuple):
    advantages_G: np.ndarray  # [..., G] float64; 0 where invalid
    is_clipped_G: np.ndarray  # [..., G] bool; the clip changed the value


class FilterReason(enum.StrEnum):
    TOO_FEW_VALID = "too_few_valid"  # fewer than two rollouts to compare
    HOMOGENEOUS = "homogeneous"  # the rewards hardly differ


def _check(rewards_G, valid_G, std_ddof):
    rewards_G, valid_G = np.asarray(rewards_G, dtype=np.float64), np.asarray(valid_G, dtype=bool)
    assert rewards_G.shape == valid_G.shape, f"rewards {rewards_G.shape} and valid {valid_G.shape} differ in shape"
    assert np.isfinite(rewards_G[valid_G]).all(), f"a valid rollout has a non-finite reward: {rewards_G}"
    if std_ddof not in (0, 1):
        raise ValueError(f"std_ddof {std_ddof} must be 0 (population) or 1 (sample)")
    return rewards_G, valid_G


def _deviations(rewards_G, valid_G, std_ddof):
    """Returns (R - mean, std with kept last dimension); both 0 in a group with fewer than two valid rollouts."""
    num_valid = valid_G.sum(axis=-1, keepdims=True)
    mean = np.where(valid_G, rewards_G, 0.0).sum(axis=-1, keepdims=True) / np.maximum(num_valid, 1)
    deviation_G = np.where(valid_G & (num_valid >= 2), rewards_G - mean, 0.0)
    variance = (deviation_G**2).sum(axis=-1, keepdims=True) / np.maximum(num_valid - std_ddof, 1)
    return deviation_G, np.sqrt(variance)


def group_advantages(
    rewards_G: np.ndarray,
    valid_G: np.ndarray,
    *,
    divide_by_std: bool,
    std_ddof: int = 1,
    epsilon: float = 1e-6,
    clip: float = 3.0,
) -> AdvantageResult:
    """Centres the rewards of each group, and scales them by its standard deviation if asked.

    Args:
      rewards_G: [..., G]; what stands at invalid places does not matter.
      valid_G: [..., G] bool; invalid rollouts enter no statistic and get advantage 0.
      divide_by_std: the paper's choice is True.
      std_ddof: 1 is the sample's standard deviation, 0 the population's.
      epsilon: added to the standard deviation.
      clip: bound on the magnitude. A sample-scaled advantage is at most (n - 1) / sqrt(n): 3 binds from n = 11 on.

    Returns:
      AdvantageResult; all 0 for a group with fewer than two valid rollouts.

    Raises:
      ValueError: std_ddof is neither 0 nor 1, or clip is not positive.
    """
    if not clip > 0:
        raise ValueError(f"clip {clip} must be positive; math.inf switches it off")
    rewards_G, valid_G = _check(rewards_G, valid_G, std_ddof)
    deviation_G, std = _deviations(rewards_G, valid_G, std_ddof)
    advantages_G = deviation_G / (std + epsilon) if divide_by_std else deviation_G
    return AdvantageResult(np.clip(advantages_G, -clip, clip), np.abs(advantages_G) > clip)


def is_homogeneous(rewards_G: np.ndarray, valid_G: np.ndarray, min_std: float, std_ddof: int = 1) -> bool | np.ndarray:
    """The paper's first filter: the standard deviation of the valid rewards is below `min_std` (0.1 there).

    Returns:
      One bool for [G], an array of them for leading dimensions. min_std = 0 lets every group through.
    """
    _, std = _deviations(*_check(rewards_G, valid_G, std_ddof), std_ddof)
    is_low = std[..., 0] < min_std
    return bool(is_low) if is_low.ndim == 0 else is_low


def filter_group(
    rewards_G: np.ndarray, valid_G: np.ndarray, *, min_std: float, std_ddof: int = 1
) -> FilterReason | None:
    """Why one group [G] is left out of training, or None if it is not."""
    if np.sum(valid_G) < 2:
        return FilterReason.TOO_FEW_VALID
    if is_homogeneous(rewards_G, valid_G, min_std, std_ddof):
        return FilterReason.HOMOGENEOUS
    return None
