"""Engines side by side, each with sessions of its own: while one prefills or samples, so does another.

The programs of a small model fill no two cores, and an engine runs one after the other; two engines in two threads do.
The rollouts of one prompt go to one engine, which prefills it once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from orchestra_jax.generation.engine import Completion, Engine, Sampling


class Replicas:
    """An `Engine` (engine.py) over others, which share its weights.

    Who goes where depends on the order in which sessions begin alone, so that the same requests meet the same batches.
    """

    def __init__(self, engines: Sequence[Engine]):
        self.engines = tuple(engines)
        self._forget()

    def _forget(self) -> None:
        self._by_session: dict[str, int] = {}  # the engine's number
        self._by_prompt: dict[tuple[int, ...], int] = {}
        self._num_sessions = [0] * len(self.engines)

    async def generate(
        self, prompt_tokens: Sequence[int], sampling: Sampling, *, session_id: str, **options: object
    ) -> Completion:
        engine = self.engines[self._number_for(session_id, prompt_tokens)]
        return await engine.generate(prompt_tokens, sampling, session_id=session_id, **options)

    def _number_for(self, session_id: str, prompt_tokens: Sequence[int]) -> int:
        """A session stays where it began: with its prompt, or where the fewest sessions are."""
        if session_id not in self._by_session:
            emptiest = self._num_sessions.index(min(self._num_sessions))
            number = self._by_session[session_id] = self._by_prompt.setdefault(tuple(prompt_tokens), emptiest)
            self._num_sessions[number] += 1
        return self._by_session[session_id]

    async def abort(self, request_id: str) -> None:
        await asyncio.gather(*(engine.abort(request_id) for engine in self.engines))

    async def update_weights(self, params: object, version: int) -> None:
        """Prefixes are forgotten with the old weights, and so is where they were; sessions under way stay."""
        await asyncio.gather(*(engine.update_weights(params, version) for engine in self.engines))
        self._forget()

    async def forget(self) -> None:
        await asyncio.gather(*(engine.forget() for engine in self.engines))
        self._forget()

    async def release_memory(self) -> None:
        await asyncio.gather(*(engine.release_memory() for engine in self.engines))

    async def close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self.engines))
