"""The embedded engine: generates in process with the trainer's own model. The default; needs no server.

Requests that arrive together are one batch: their turns are decoded to the end in one compiled call, then the episodes
run their tools and come back. Each session owns a row of the KV cache while there are rows enough, so a next turn feeds
only its new tokens, and the rollouts of one prompt share its prefill. It is no continuous batching: a batch waits for its
longest turn.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import Sequence

import jax
import numpy as np

from orchestra_jax.generation.decoding import Turns, decode, prefill
from orchestra_jax.generation.engine import Completion, Sampling
from orchestra_jax.models.config import ModelConfig
from orchestra_jax.models.kv_cache import empty_cache
from orchestra_jax.types import StopReason

QUIET_TICKS = 8  # turns of the event loop without a new request before a batch is closed


@dataclasses.dataclass
class JaxEngineConfig:
    """Sizes of the engine. `prefill_buckets` and `turn_buckets` are padded lengths, rising; each compiles once."""

    num_rows: int = 256
    max_tokens: int = 192
    max_turn_tokens: int = 40
    prompts_per_prefill: int = 32
    prefill_buckets: tuple[int, ...] = (88, 192)
    turn_buckets: tuple[int, ...] = (1, 32)


@dataclasses.dataclass
class _Request:
    tokens: np.ndarray
    sampling: Sampling
    request_id: str
    session_id: str
    deadline: float  # by time.monotonic()
    future: asyncio.Future


@dataclasses.dataclass
class _Row:
    """A cache row: whose it is, and which tokens it holds."""

    session_id: str = ""
    tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    last_used: int = 0


class JaxEngine:
    """An `Engine` (engine.py). ValueError for sizes that do not fit each other."""

    def __init__(self, model_config: ModelConfig, params, config: JaxEngineConfig, version: int = 0):
        if config.max_tokens > max(config.prefill_buckets):
            raise ValueError(
                f"prefill_buckets {config.prefill_buckets} must hold max_tokens {config.max_tokens}: a session that lost "
                "its row is prefilled anew"
            )
        self._model_config, self._params, self._config, self._version = model_config, params, config, version
        self._cache = empty_cache(model_config, config.num_rows, config.max_tokens)
        self._rows = [_Row() for _ in range(config.num_rows)]
        self._pending: list[_Request] = []
        self._worker: asyncio.Task | None = None
        self._batch_count = 0
        self.num_sampled_tokens = 0
        self.busy_s = 0.0

    async def generate(
        self,
        prompt_tokens: Sequence[int],
        sampling: Sampling,
        *,
        request_id: str,
        session_id: str,
        deadline_s: float | None = None,
    ) -> Completion:
        """As the Protocol says. A deadline or an abort takes effect between batches."""
        limit = self._config.max_tokens - sampling.max_new_tokens
        if not 0 < len(prompt_tokens) <= limit or sampling.max_new_tokens > self._config.max_turn_tokens:
            raise ValueError(
                f"request {request_id}: {len(prompt_tokens)} prompt tokens and {sampling.max_new_tokens} new ones do not fit "
                f"max_tokens {self._config.max_tokens} and max_turn_tokens {self._config.max_turn_tokens} of the engine"
            )
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + deadline_s if deadline_s is not None else float("inf")
        tokens = np.asarray(prompt_tokens, np.int32)
        request = _Request(tokens, sampling, request_id, session_id, deadline, loop.create_future())
        self._pending.append(request)
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return await request.future

    async def abort(self, request_id: str) -> None:
        for request in self._pending:
            if request.request_id == request_id:
                request.deadline = float("-inf")

    async def update_weights(self, params, version: int) -> None:
        """Later tokens come from `params`; what was cached under the old ones is forgotten."""
        self._params, self._version = params, version
        self._rows = [_Row() for _ in self._rows]

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
        for request in self._pending:
            request.future.cancel()
        self._pending = []

    async def _work(self) -> None:
        """Closes a batch when no request has come for a few ticks, runs it off the event loop, hands out the results."""
        while self._pending:
            quiet, seen = 0, len(self._pending)
            while quiet < QUIET_TICKS and len(self._pending) < self._config.num_rows:
                await asyncio.sleep(0)
                quiet, seen = (0, len(self._pending)) if len(self._pending) != seen else (quiet + 1, seen)
            batch, self._pending = self._pending[: self._config.num_rows], self._pending[self._config.num_rows :]
            late = [request for request in batch if request.deadline < time.monotonic()]
            for request in late:
                request.future.set_result(_aborted())
            batch = [request for request in batch if request not in late and not request.future.cancelled()]
            if not batch:
                continue
            try:
                completions = await asyncio.to_thread(self._run_batch, batch)
            except BaseException as error:  # whoever waits must hear of it, or the episodes hang
                for request in (*batch, *self._pending):
                    if not request.future.done():
                        request.future.set_exception(error)
                self._pending = []
                return
            for request, completion in zip(batch, completions, strict=True):
                if not request.future.done():
                    request.future.set_result(completion)

    def _run_batch(self, batch: Sequence[_Request]) -> list[Completion]:
        start_s = time.monotonic()
        self._batch_count += 1
        rows = self._assign_rows(batch)
        fresh = []
        for row, request in zip(rows, batch, strict=True):
            held = self._rows[row].tokens
            num_held = len(held)
            is_kept = self._rows[row].session_id == request.session_id and np.array_equal(held, request.tokens[:num_held])
            num_new = len(request.tokens) - num_held
            if not (is_kept and 0 < num_new <= self._config.turn_buckets[-1]):
                self._rows[row] = _Row(request.session_id, request.tokens[:-1])
                fresh.append(row)
            self._rows[row].last_used = self._batch_count
        self._prefill([row for row in fresh if len(self._rows[row].tokens)])
        sampled = self._decode(rows, batch)
        completions = []
        for row, request in zip(rows, batch, strict=True):
            num_tokens = int(sampled.num_tokens_B[row])
            tokens = np.array(sampled.tokens_BN[row, :num_tokens])
            # All but the last sampled token have gone through the model.
            self._rows[row].tokens = np.concatenate([request.tokens, tokens[:-1]])
            reason = StopReason.STOP if sampled.is_stopped_B[row] else StopReason.LENGTH
            versions = np.full(num_tokens, self._version, np.int32)
            completions.append(Completion(tokens, np.array(sampled.logprobs_BN[row, :num_tokens]), versions, reason))
        self.num_sampled_tokens += int(sum(len(completion.tokens) for completion in completions))
        self.busy_s += time.monotonic() - start_s
        return completions

    def _assign_rows(self, batch: Sequence[_Request]) -> list[int]:
        """A row per request: the session's own, else the one used longest ago that no request of this batch owns."""
        owned = {row.session_id: index for index, row in enumerate(self._rows) if row.session_id}
        taken = {owned[request.session_id] for request in batch if request.session_id in owned}
        free = iter(sorted((i for i in range(len(self._rows)) if i not in taken), key=lambda i: self._rows[i].last_used))
        rows = []
        for request in batch:
            row = owned.get(request.session_id)
            rows.append(next(free) if row is None else row)
        assert len(set(rows)) == len(rows), "two requests of one session are in one batch: await the first one"
        return rows

    def _prefill(self, rows: Sequence[int]) -> None:
        """Fills the rows with all but the last token of their prompts, each different prompt once."""
        rows_of_prompt: dict[bytes, list[int]] = {}
        for row in rows:
            rows_of_prompt.setdefault(self._rows[row].tokens.tobytes(), []).append(row)
        groups, size = list(rows_of_prompt.values()), self._config.prompts_per_prefill
        for start in range(0, len(groups), size):
            some = groups[start : start + size]
            longest = max(len(self._rows[group[0]].tokens) for group in some)
            bucket = next(bucket for bucket in self._config.prefill_buckets if bucket >= longest)
            tokens_UT = np.zeros((size, bucket), np.int32)
            lengths_U = np.zeros(size, np.int32)
            prompt_of_row_B = np.full(len(self._rows), -1, np.int32)
            for number, group in enumerate(some):
                prompt = self._rows[group[0]].tokens
                tokens_UT[number, : len(prompt)] = prompt
                lengths_U[number] = len(prompt)
                prompt_of_row_B[group] = number
            self._cache = prefill(
                self._params, self._cache, tokens_UT, lengths_U, prompt_of_row_B, config=self._model_config
            )

    def _decode(self, rows: Sequence[int], batch: Sequence[_Request]):
        num_rows = len(self._rows)
        new = {row: request.tokens[len(self._rows[row].tokens) :] for row, request in zip(rows, batch, strict=True)}
        longest = max(len(tokens) for tokens in new.values())
        bucket = next(bucket for bucket in self._config.turn_buckets if bucket >= longest)
        turns = Turns(
            np.zeros((num_rows, bucket), np.int32),
            np.zeros(num_rows, np.int32),
            np.zeros(num_rows, np.int32),
            np.ones(num_rows, np.float32),
            np.zeros((num_rows, 2), np.uint32),
            np.zeros((num_rows, self._model_config.vocab_size), bool),
        )
        lengths_B = np.zeros(num_rows, np.int32)
        for row, request in zip(rows, batch, strict=True):
            turns.new_tokens_BT[row, : len(new[row])] = new[row]
            turns.num_new_B[row] = len(new[row])
            turns.max_new_B[row] = request.sampling.max_new_tokens
            turns.temperature_B[row] = request.sampling.temperature
            turns.key_data_B2[row] = _key_data(request)
            turns.is_stop_BV[row, list(request.sampling.stop_ids)] = True
            lengths_B[row] = len(self._rows[row].tokens)
        cache = self._cache._replace(lengths_B=lengths_B)
        self._cache, sampled = decode(
            self._params, cache, turns, config=self._model_config, max_new_tokens=self._config.max_turn_tokens
        )
        return jax.device_get(sampled)


def _key_data(request: _Request) -> np.ndarray:
    """The request's own key: its samples depend on seed, session and position, not on what else is in the batch."""
    digest = hashlib.blake2b(f"{request.sampling.seed}\x1f{request.session_id}".encode(), digest_size=8).digest()
    return np.frombuffer(digest, np.uint32)


def _aborted() -> Completion:
    empty = np.zeros(0, np.int32)
    return Completion(empty, np.zeros(0, np.float32), empty, StopReason.ABORTED)
