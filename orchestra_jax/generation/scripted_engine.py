"""An engine that says what it is told to: for demonstrations and tests. No model, no jax.

The script is a function of the session and of how many turns it has had; its tokens count as sampled, with
log-probability 0 and the version that the engine was given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from orchestra_jax.generation.engine import Completion, OnWatched, Sampling
from orchestra_jax.types import StopReason


class ScriptedEngine:
    """An `Engine` (engine.py). `script(session_id, turn, prompt_tokens)` gives the tokens of the next turn.

    A turn is cut behind its first stop id, as a sampling engine would stop there, or at the token limit.
    """

    def __init__(self, script: Callable[[str, int, Sequence[int]], Sequence[int]], version: int = 0):
        self._script, self._version = script, version
        self._num_turns: dict[str, int] = {}

    async def generate(
        self,
        prompt_tokens: Sequence[int],
        sampling: Sampling,
        *,
        request_id: str,
        session_id: str,
        deadline_s: float | None = None,
        on_watched: OnWatched | None = None,
    ) -> Completion:
        del request_id, deadline_s
        turn = self._num_turns.get(session_id, 0)
        self._num_turns[session_id] = turn + 1
        tokens = list(self._script(session_id, turn, prompt_tokens))
        end = next((place + 1 for place, token in enumerate(tokens) if token in sampling.stop_ids), None)
        is_stopped = end is not None and end <= sampling.max_new_tokens
        tokens = np.array(tokens[: end if is_stopped else sampling.max_new_tokens], np.int32)
        reason = StopReason.STOP if is_stopped else StopReason.LENGTH
        for place in np.flatnonzero(np.isin(tokens, list(sampling.watch_ids))) if on_watched else ():
            on_watched(tokens[: place + 1])
            await asyncio.sleep(0)  # what hears of it may start while the turn goes on
        versions = np.full(len(tokens), self._version, np.int32)
        return Completion(tokens, np.zeros(len(tokens), np.float32), versions, reason)

    async def abort(self, request_id: str) -> None:
        """Nothing is ever under way."""

    async def update_weights(self, params: object, version: int) -> None:
        self._version = version

    async def forget(self) -> None:
        self._num_turns = {}

    async def release_memory(self) -> None:
        """It has none."""

    async def close(self) -> None:
        self._num_turns = {}
