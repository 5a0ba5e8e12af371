"""Experts whose success is drawn from the world's tables: free, instant, and the same on every machine.

A draw is a function of (instance seed, expert, role, rollout index) alone. So asking the same expert again gives the
same result, the evidence can only help (one draw against a higher probability), and the rollouts of a group are
independent. What a failing writer writes, and what an expert answers that does not know, stands on the task.
"""

from __future__ import annotations

import numpy as np

from orchestra_jax.experts.expert import ExpertBound, ExpertReply, ExpertRequest
from orchestra_jax.experts.world import (
    FAMILY_INDEX,
    KIND_INDEX,
    WorldConfig,
    call_latency_s,
    call_tokens,
    skill_tables,
)
from orchestra_jax.seeds import derive_seed


class SimulatedExperts:
    """All experts of the world at once: an `Expert` that looks up the one that the request names."""

    def __init__(self, config: WorldConfig):
        self._config = config
        self._skills = skill_tables(config)
        self._columns = {model: index for index, model in enumerate(self._skills.models)}

    def success_probability(self, request: ExpertRequest) -> float:
        """The chance that this request is filled well; 0 for a writer whose tool cannot bring this task's evidence."""
        task, column = request.instance.task, self._columns[request.offer.model]
        family = FAMILY_INDEX[task.family]
        if request.role == "answer":
            kind = KIND_INDEX[task.kind]
            return float(self._skills.answer_FKEV[family, kind, column, int(request.is_evidence_present)])
        return float(self._skills.writer_FE[family, column]) if request.role == task.evidence_tool else 0.0

    def bound(self, request: ExpertRequest) -> ExpertBound:
        """Exact: what a reply consumes does not depend on whether it is right."""
        tokens = call_tokens(self._config, request.role, request.is_evidence_present)
        return ExpertBound(*tokens, call_latency_s(self._config, request.offer, request.role))

    async def reply(self, request: ExpertRequest) -> ExpertReply:
        seed = derive_seed(request.instance.seed, request.offer.alias, request.role, request.rollout_index)
        is_success = np.random.default_rng(seed).random() < self.success_probability(request)
        task = request.instance.task
        written = {
            "search": (task.query, task.poor_query),
            "enhance_reasoning": (task.program, task.poor_program),
            "answer": (task.answer, task.wrong_answer),
        }
        input_tokens, output_tokens = call_tokens(self._config, request.role, request.is_evidence_present)
        return ExpertReply(
            text=written[request.role][0 if is_success else 1],
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            latency_s=call_latency_s(self._config, request.offer, request.role),
        )
