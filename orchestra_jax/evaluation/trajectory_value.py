"""What a played trajectory was worth in expectation: the statistics of its calls under the world's known probabilities.

The last draw, whether the answering expert is right, is replaced by its probability; which evidence came is taken as it
was. So 300 instances say what realised accuracy needs thousands for. Turns are charged as the oracle charges them, which
puts a policy and the optimum on one scale; the realised values, from the ledger, stand beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orchestra_jax.evaluation.oracle import ANSWER, STATISTICS, Charges
from orchestra_jax.experts.catalog import EXPERTS, ROLES
from orchestra_jax.types import CallStatus, EpisodeStatus, Trajectory

_COLUMN = {expert.alias: index for index, expert in enumerate(EXPERTS)}


def expected_statistics(charges: Charges, trajectories: Sequence[Trajectory]) -> np.ndarray:
    """[I, S] of one trajectory per instance, in the order of `charges`; columns as oracle.STATISTICS."""
    return np.stack([_expected_row(charges, i, trajectory) for i, trajectory in enumerate(trajectories)])


def _expected_row(charges: Charges, i: int, trajectory: Trajectory) -> np.ndarray:
    cost_usd, latency_s, accuracy, is_disallowed, has_evidence = 0.0, 0.0, 0.0, False, False
    calls = dict.fromkeys(STATISTICS[4:], 0.0)
    for record in trajectory.calls:
        cost_usd += charges.turn_cost_usd
        latency_s += charges.turn_latency_s
        if record.status != CallStatus.OK:
            continue
        tool, alias = record.call.name, str(record.call.arguments["model"])
        role, e = ROLES.index(tool), _COLUMN[alias]
        role += int(role == ANSWER and has_evidence)
        cost_usd += charges.cost_usd_RIE[role, i, e]
        latency_s += charges.latency_s_RIE[role, i, e]
        is_disallowed |= bool(charges.is_disallowed_IE[i, e])
        calls[f"calls/{tool}"] += 1
        calls[f"calls/{alias}"] += 1
        if tool == "answer" and trajectory.status == EpisodeStatus.ANSWERED:
            accuracy = charges.success_RIE[role, i, e]
        has_evidence = record.is_evidence_present
    w_o, w_c, w_l, w_x = charges.weights_IM[i]
    cheapness = 1 - min(cost_usd / charges.reference_cost_usd, 1)
    speed = 1 - min(latency_s / charges.reference_latency_s, 1)
    utility = accuracy * (w_o + w_c * cheapness + w_l * speed) - w_x * is_disallowed
    return np.array([utility, accuracy, cost_usd, latency_s, *calls.values()])
