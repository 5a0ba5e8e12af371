"""What a played trajectory was worth in expectation: the statistics of its calls under the world's known probabilities.

The last draw, whether the answering expert is right, is replaced by its probability; which evidence came is taken as it
was, and calls of one turn run side by side: the slowest counts, and none sees what another one brought. So 300
instances say what realised accuracy needs thousands for. Turns are charged as the oracle charges them, which puts a
policy and the optimum on one scale; the realised values, from the ledger, stand beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orchestra_jax.evaluation.oracle import ANSWER, Charges
from orchestra_jax.experts.catalog import ROLES
from orchestra_jax.tools.ledger import split_turns
from orchestra_jax.types import CallRecord, CallStatus, EpisodeStatus, Trajectory


def expected_statistics(charges: Charges, trajectories: Sequence[Trajectory]) -> np.ndarray:
    """[I, S] of one trajectory per instance, in the order of `charges`; columns as oracle.statistic_names."""
    return np.stack([_expected_row(charges, i, trajectory) for i, trajectory in enumerate(trajectories)])


def _expected_row(charges: Charges, i: int, trajectory: Trajectory) -> np.ndarray:
    cost_usd, latency_s, accuracy, is_disallowed, has_evidence, is_answered = 0.0, 0.0, 0.0, False, False, False
    tool_calls, expert_calls = np.zeros(len(ROLES)), np.zeros(charges.is_disallowed_IE.shape[1])
    for records in _turns(trajectory):
        service_s = [0.0]
        for record in records:
            if record.status != CallStatus.OK:
                continue
            tool, e = record.call.name, charges.columns_I[i][str(record.call.arguments["model"])]
            role = ROLES.index(tool)
            tool_calls[role] += 1
            expert_calls[e] += 1
            role += int(role == ANSWER and has_evidence)
            cost_usd += charges.cost_usd_RIE[role, i, e]
            service_s.append(charges.latency_s_RIE[role, i, e])
            is_disallowed |= bool(charges.is_disallowed_IE[i, e])
            if tool == "answer" and not is_answered and trajectory.status == EpisodeStatus.ANSWERED:
                accuracy, is_answered = charges.success_RIE[role, i, e], True
        cost_usd += charges.turn_cost_usd
        latency_s += charges.turn_latency_s + max(service_s)
        has_evidence = records[-1].is_evidence_present if records else has_evidence
    w_o, w_c, w_l, w_x = charges.weights_IM[i]
    cheapness = 1 - min(cost_usd / charges.reference_cost_usd, 1)
    speed = 1 - min(latency_s / charges.reference_latency_s, 1)
    utility = accuracy * (w_o + w_c * cheapness + w_l * speed) - w_x * is_disallowed
    return np.array([utility, accuracy, cost_usd, latency_s, *tool_calls, *expert_calls])


def _turns(trajectory: Trajectory) -> list[list[CallRecord]]:
    """The calls of each turn; none for a turn that came to no call. Receipts and records stand in one order."""
    records = iter(trajectory.calls)
    return [[next(records) for _ in receipts[1:]] for receipts in split_turns(trajectory.receipts)]
