"""An expert whose replies are recorded, or replayed without asking anybody (tools/recording.py).

A reply is known by the model, the role, the messages as they are sent, and which sample it is: the instance's seed and
the rollout's index. So the rollouts of a group stay independent, and the same run asks for the same replies.
"""

from __future__ import annotations

import dataclasses

from orchestra_jax.experts.endpoint import EndpointExpert
from orchestra_jax.experts.expert import ExpertBound, ExpertReply, ExpertRequest
from orchestra_jax.experts.roles import render_messages
from orchestra_jax.run_directory import json_value
from orchestra_jax.tools.recording import Store
from orchestra_jax.types import CallStatus, Reason


class RecordedExpert:
    """An `Expert` in front of an endpoint."""

    def __init__(self, expert: EndpointExpert, store: Store):
        self._expert, self._store = expert, store

    def bound(self, request: ExpertRequest) -> ExpertBound:
        return self._expert.bound(request)

    async def reply(self, request: ExpertRequest) -> ExpertReply:
        asked = {
            "model": self._expert.model,
            "role": request.role,
            "messages": render_messages(request),
            "sample": [request.instance.seed, request.rollout_index],
            "max_output_tokens": self._expert.max_output_tokens,
        }
        held = self._store.load(asked)
        if held is not None and (self._store.is_replay or held["status"] == CallStatus.OK):
            named = {**held, "status": CallStatus(held["status"]), "reason": Reason(held["reason"])}
            return dataclasses.replace(ExpertReply(**named), is_cache_hit=True, queue_s=0.0)
        if self._store.is_replay:
            return ExpertReply("", 0, 0, 0.0, CallStatus.FAILED, Reason.NOT_RECORDED, attempt=0)
        reply = await self._expert.reply(request)
        self._store.save(asked, json_value(reply, "reply"))
        return reply

    async def close(self) -> None:
        await self._expert.close()
