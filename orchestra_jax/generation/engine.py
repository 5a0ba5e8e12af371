"""What a generation engine is: tokens in, tokens with their log-probabilities and weight versions out. No jax.

`jax_engine` runs in process; a server's client or a scripted engine stand behind the same Protocol.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from orchestra_jax.types import StopReason


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` divides the logits; 0 is greedy, whose log-probabilities are never trained on."""

    temperature: float
    max_new_tokens: int
    stop_ids: frozenset[int]
    seed: int


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
    ) -> Completion:
        """Samples behind `prompt_tokens`, the whole stream so far; `deadline_s` counts from the call.

        Requests of one `session_id` extend each other, so an engine may keep what it computed for the earlier ones.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """Ends a request early: its `generate` returns what there is, with StopReason.ABORTED."""
        ...

    async def update_weights(self, params: object, version: int) -> None: ...

    async def close(self) -> None: ...
