"""What a trajectory is measured by: objectives with a declared direction, and vectors of their unweighted values.

Neither weights (rewards/preference.py) nor ranges of a group (rewards/normalization.py) are known here. All that is
declared of an objective is in its own unit, so that cents for dollars change nothing if they are changed throughout.

Shape suffix: M objectives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from orchestra_jax.types import CallRecord, CallStatus

OUTCOME = "outcome"
DIRECTIONS = ("maximize", "minimize")


@dataclasses.dataclass(frozen=True)
class Objective:
    """One coordinate of the objective vector; reference points, floor and cap are in the objective's own unit."""

    name: str
    direction: str  # "maximize" or "minimize"
    reference_low: float
    reference_high: float
    range_floor: float = 0.0  # a group's range that is narrower is widened to it (rewards/normalization.py)
    is_gated: bool = True  # False: a constraint, paid by wrong answers too
    cap: float = math.inf  # a larger value counts as this one

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise ValueError(f"objective {self.name!r}: direction {self.direction!r} must be one of {DIRECTIONS}")
        if not self.reference_low < self.reference_high:
            raise ValueError(
                f"objective {self.name!r}: reference_low {self.reference_low} must lie below reference_high "
                f"{self.reference_high}; say what is better by `direction`"
            )
        if not self.range_floor >= 0:
            raise ValueError(f"objective {self.name!r}: range_floor {self.range_floor} must be 0 or more")
        if self.name == OUTCOME and not (self.is_gated and self.direction == "maximize"):
            raise ValueError(f"objective {OUTCOME!r} is the gate itself: it must be gated and maximized")


def tool_objective(tool: str, is_raw: bool = False) -> Objective:
    """The paper's coordinate of a tool, as used (1) or not used (0); `is_raw`: the number of its calls.

    Raw counts pay for every repeat of a favoured call, up to the busiest rollout of the group. Without the cap the
    reference range [0, 1] still cuts them under the "reference" rule; under "group" they are compared as they are.
    """
    return Objective(f"calls/{tool}", "maximize", 0.0, 1.0, cap=math.inf if is_raw else 1.0)


def count_tool_calls(calls: Sequence[CallRecord], tools: Sequence[str]) -> dict[str, float]:
    """The values of the tools' objectives: how often each was called. A call that was refused has used nobody."""
    used = [record.call.name for record in calls if record.status != CallStatus.REFUSED]
    return {f"calls/{tool}": float(used.count(tool)) for tool in tools}


def objective_vector(values: Mapping[str, float], objectives: Sequence[Objective]) -> np.ndarray:
    """Orders named values (a trajectory's objectives, or a preference's weights) as `objectives` stand.

    Returns:
      [M] float64, in each objective's own unit.

    Raises:
      ValueError: an objective has no value.
    """
    missing = [objective.name for objective in objectives if objective.name not in values]
    if missing:
        raise ValueError(f"no value for the objectives {missing}; there are values for {sorted(values)}")
    return np.array([values[objective.name] for objective in objectives], dtype=np.float64)


def is_gated(objectives: Sequence[Objective]) -> np.ndarray:
    return np.array([objective.is_gated for objective in objectives], dtype=bool)


def reference_span(objectives: Sequence[Objective]) -> np.ndarray:
    """[M], each in its objective's unit."""
    return np.array([each.reference_high - each.reference_low for each in objectives], dtype=np.float64)


def outcome_index(objectives: Sequence[Objective]) -> int:
    """Where the gate stands. ValueError if it is missing."""
    names = [objective.name for objective in objectives]
    if OUTCOME not in names:
        raise ValueError(f"the reward is gated by the objective {OUTCOME!r}, which is missing from {names}")
    return names.index(OUTCOME)
