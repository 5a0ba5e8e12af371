"""What makes a run's experience, step by step: in turn with the updates, or one step ahead of them.

In turn, rollouts wait for the update and the update for them, and each leaves idle what the other would use. One step
ahead (`grpo.rollout_lag` 1, "one-step off-policy"), the experience of step k + 1 is made beside the update of step k,
by the weights from before it:

    weights      v0            v0             v1             v2
    experience   of step 0     of step 1      of step 2      of step 3
    update                     v0 -> v1       v1 -> v2       v2 -> v3

The old policy is the one that a step updates, as ever; the truncated correction (old over sampler, grpo/loss.py)
accounts for the sampler's lag. Which weights play which step does not hang on time: same seed, same run. Real money
that experience has cost which an interrupt throws away stays spent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from orchestra_jax.data.records import Instance
from orchestra_jax.experience import Experience
from orchestra_jax.generation.engine import Completion, Engine

Draw = Callable[[], Sequence[Instance]]
Make = Callable[[Engine, Draw, int, Mapping[str, float]], Experience]


class Abandoned(RuntimeError):
    """Nobody wants the experience any more."""


class _UntilAbandoned:
    """The engine as rollouts beside an update see it: they end with their next turn when nobody wants them."""

    def __init__(self, engine: Engine):
        self._engine, self.is_abandoned = engine, False

    async def generate(self, *arguments: object, **options: object) -> Completion:
        if self.is_abandoned:
            raise Abandoned
        return await self._engine.generate(*arguments, **options)


class Sampler:
    """Use it as a context manager: leaving it abandons what is being made, and waits for the turn under way."""

    def __init__(self, make: Make, engine: Engine, batches: Iterator, version: int):
        """make: (engine, draw, step, multipliers) -> the experience of the step. `version`: of the engine's weights."""
        self._make, self._engine, self._batches = make, engine, batches
        self.version = version
        self._ahead: Future | None = None
        self._step_ahead = -1
        self._engine_ahead = _UntilAbandoned(engine)
        self._data_state = None  # from before the instances ahead were drawn
        self._thread = ThreadPoolExecutor(1, "sampler")

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine_ahead.is_abandoned = True
        self._thread.shutdown(wait=True)

    def take(self, step: int, multipliers: Mapping[str, float]) -> Experience:
        """The experience of `step`: what was begun ahead, waited for, or else made now with these multipliers."""
        if self._ahead is None:
            return self._make(self._engine, self._draw, step, multipliers)
        assert step == self._step_ahead, f"step {self._step_ahead} is ahead, not {step}"
        ahead, self._ahead = self._ahead, None
        return ahead.result()

    def begin(self, step: int, multipliers: Mapping[str, float]) -> None:
        """Has the experience of `step` made, while the caller goes on. `take` it before anything else.

        By an engine that remembers nothing of the step before, which had the same weights if it was the first: a run
        that goes on here begins with a new one.
        """
        assert self._ahead is None, "one step ahead, no more"
        asyncio.run(self._engine.forget())
        self._data_state, self._step_ahead = self._batches.get_state(), step
        self._ahead = self._thread.submit(self._make, self._engine_ahead, self._draw, step, dict(multipliers))

    def _draw(self) -> Sequence[Instance]:
        return next(self._batches)

    def update_weights(self, params, version: int) -> None:
        assert self._ahead is None, "rollouts of a step have weights of one version"
        asyncio.run(self._engine.update_weights(params, version))
        self.version = version

    def release_memory(self) -> None:
        """What the engine need not hold while an update runs."""
        if self._ahead is None:
            asyncio.run(self._engine.release_memory())

    def data_state(self):
        """Of the data iterator, behind the steps that have been taken: from there what is ahead is drawn again."""
        return self._batches.get_state() if self._ahead is None else self._data_state
