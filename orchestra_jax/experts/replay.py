"""An expert whose replies are recorded, or replayed without asking anybody (tools/recording.py).

A reply is known by the model, the role, the messages as they are sent, and which sample it is: the instance's seed and
the rollout's index. So the rollouts of a group stay independent, and the same run asks for the same replies. A judge's
verdict is one for all who give the same answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence

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
        self.model, self.usd_per_million_tokens = expert.model, expert.usd_per_million_tokens

    def bound(self, request: ExpertRequest) -> ExpertBound:
        return self._expert.bound(request)

    def bound_of(self, messages: Sequence[Mapping[str, str]]) -> ExpertBound:
        return self._expert.bound_of(messages)

    async def reply(self, request: ExpertRequest) -> ExpertReply:
        sample = [request.instance.seed, request.rollout_index]
        asked = self._asked(request.role, render_messages(request), sample)
        return await self._held_or(asked, lambda: self._expert.reply(request))

    async def complete(self, messages: Sequence[Mapping[str, str]]) -> ExpertReply:
        """The reply to messages as they are, such as a judge's, or a writer's of descriptions."""
        asked = self._asked("complete", [dict(each) for each in messages], [])
        return await self._held_or(asked, lambda: self._expert.complete(messages))

    def _asked(self, role: str, messages: list[dict[str, str]], sample: list[int]) -> dict[str, object]:
        return {
            "model": self.model,
            "role": role,
            "messages": messages,
            "sample": sample,
            "max_output_tokens": self._expert.max_output_tokens,
        }

    async def _held_or(self, asked: dict[str, object], ask: Callable[[], Awaitable[ExpertReply]]) -> ExpertReply:
        async with self._store.turn(asked):
            held = self._store.load(asked)
            if held is not None and (self._store.is_replay or held["status"] == CallStatus.OK):
                named = {**held, "status": CallStatus(held["status"]), "reason": Reason(held["reason"])}
                return dataclasses.replace(ExpertReply(**named), is_cache_hit=True, queue_s=0.0)
            if self._store.is_replay:
                return ExpertReply("", 0, 0, 0.0, CallStatus.FAILED, Reason.NOT_RECORDED, attempt=0)
            reply = await ask()
            self._store.save(asked, json_value(reply, "reply"))
            return reply

    async def close(self) -> None:
        await self._expert.close()
