"""What a generation engine is: tokens in, tokens with their log-probabilities and weight versions out. No jax.

`jax_engine` runs in process; a server's client or a scripted engine stand behind the same Protocol.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from orchestra_jax.types import StopReason

# Called in the event loop of `generate` with all tokens that the turn has so far, the watched id last.
OnWatched = Callable[[np.ndarray], None]


class Constraint(Protocol):
    """What a turn may go on with (constraint.py)."""

    def allowed_tokens(self, sampled: Sequence[int]) -> np.ndarray | None:
        """bool [V] given the turn's tokens so far, or None if everything is allowed."""
        ...


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` divides the logits; 0 is greedy, whose log-probabilities are never trained on.

    `top_k`, `top_p` and `min_p` cut the temperature-scaled distribution in this order, a `constraint` before them; what
    is sampled under any of the four is off-policy. A stop sequence is of token ids and part of the completion, as a
    stop id is. `watch_ids` end nothing: `on_watched` of `generate` hears of each the moment it is born.
    """

    temperature: float
    max_new_tokens: int
    stop_ids: frozenset[int]
    seed: int
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    watch_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None

    @property
    def is_truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def is_on_policy(self) -> bool:
        """Whether tokens are sampled from the distribution whose log-probabilities are recorded."""
        return not self.is_truncated and self.constraint is None


def check_sampling(sampling: Sampling) -> None:
    """ValueError for a value out of its range, and for options that contradict each other."""
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {sampling.max_new_tokens} must be 1 or more")
    if not 0 <= sampling.temperature < math.inf:
        raise ValueError(f"temperature {sampling.temperature} must be 0 (greedy) or more, and finite")
    if sampling.top_k < 0 or not 0 < sampling.top_p <= 1 or not 0 <= sampling.min_p < 1:
        raise ValueError(
            f"top_k {sampling.top_k} must be 0 (all) or more, top_p {sampling.top_p} in (0, 1] and min_p "
            f"{sampling.min_p} in [0, 1)"
        )
    if sampling.temperature == 0 and sampling.is_truncated:
        raise ValueError(
            f"temperature 0 is greedy and takes no top_k {sampling.top_k}, top_p {sampling.top_p} or min_p "
            f"{sampling.min_p}: leave them out or raise the temperature"
        )
    if not all(sampling.stop_sequences):
        raise ValueError(f"stop_sequences {sampling.stop_sequences} hold an empty one, which would stop at once")


@dataclasses.dataclass(frozen=True)
class Completion:
    """Sampled tokens, the stop id included; natural log-probabilities under the temperature-scaled, untruncated
    distribution; the version of the weights that sampled each token."""

    tokens: np.ndarray  # [T] int32
    logprobs: np.ndarray  # [T] float32
    policy_versions: np.ndarray  # [T] int32
    stop_reason: StopReason


class Engine(Protocol):
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
        """Samples behind `prompt_tokens`, the whole stream so far; `deadline_s` counts from the call.

        Requests of one `session_id` extend each other, so an engine may keep what it computed for the earlier ones.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """Ends a request early: its `generate` returns what there is, with StopReason.ABORTED."""
        ...

    async def update_weights(self, params: object, version: int) -> None: ...

    async def forget(self) -> None:
        """Drops what is kept of sessions, while nothing is sampled: to later ones the engine is like a new one."""
        ...

    async def release_memory(self) -> None:
        """Says that nothing is sampled before the next `update_weights`: an engine may lend its device memory out."""
        ...

    async def close(self) -> None: ...
