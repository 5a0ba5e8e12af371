"""One turn on its way: what is asked for, what has been sampled so far, and how it ended. Knows no HTTP.

A turn may be sampled in several parts, by several servers: what a server had sampled when it was interrupted stays, and
the next one goes on behind it. A stop id that the request does not name (a model's own end of text) interrupts too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from orchestra_jax.generation.engine import Completion, OnWatched, Sampling
from orchestra_jax.generation.sglang.payload import Part, find_sequence
from orchestra_jax.types import StopReason


class TurnRequest:
    def __init__(
        self,
        prompt_tokens: Sequence[int],
        sampling: Sampling,
        request_id: str,
        session_id: str,
        on_watched: OnWatched | None,
    ):
        self.prompt_tokens, self.sampling = list(prompt_tokens), sampling
        self.request_id, self.session_id, self._on_watched = request_id, session_id, on_watched
        self.tokens: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self.stop_reason: StopReason | None = None
        self.is_aborted = False
        self.rid = ""  # of the attempt under way, at its server
        self.url = ""  # of that server
        self.task = None
        self.start_s = time.monotonic()

    @property
    def num_left(self) -> int:
        return self.sampling.max_new_tokens - len(self.tokens)

    @property
    def is_watching(self) -> bool:
        """Whether tokens are wanted while they come."""
        is_heard = self._on_watched is not None and bool(self.sampling.watch_ids)
        return is_heard or bool(self.sampling.stop_sequences)

    def append(self, part: Part) -> None:
        """Takes tokens up to the one that ends the turn, and tells of those that are watched."""
        num_known = len(self.tokens)
        end = find_sequence([*self.tokens, *part.tokens], num_known, self.sampling.stop_sequences)
        stops = [num + 1 for num, token in enumerate(part.tokens) if token in self.sampling.stop_ids]
        num_taken = min([len(part.tokens), *stops[:1], *([end - num_known] if end else [])])
        self.tokens += part.tokens[:num_taken]
        self._logprobs += part.logprobs[:num_taken]
        self._versions += part.versions[:num_taken]
        is_ended = bool(end and end == len(self.tokens)) or bool(stops and stops[0] == num_taken)
        if self._on_watched is not None:
            for place in range(num_known, len(self.tokens)):
                if self.tokens[place] in self.sampling.watch_ids:
                    self._on_watched(np.array(self.tokens[: place + 1], np.int32))
        if is_ended:
            self.stop_reason = StopReason.STOP
        elif not self.num_left:
            self.stop_reason = StopReason.LENGTH

    def completion(self, stop_reason: StopReason) -> Completion:
        return Completion(
            np.array(self.tokens, np.int32),
            np.array(self._logprobs, np.float32),
            np.array(self._versions, np.int32),
            stop_reason,
        )
