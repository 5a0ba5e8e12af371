"""The embedded engine: generates in process with the trainer's own model. The default; needs no server.

Requests that arrive together are one batch. Its turns are decoded in chunks of a fixed number of rows, neighbours in
length together; the few that a chunk leaves over go on in a smaller one. Then the episodes run their tools and come
back. Each session owns a row of the KV cache while there are rows enough, so a next turn feeds only its new tokens, and
the rollouts of one prompt share its prefill. It is no continuous batching: a batch waits for its longest turn.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from orchestra_jax.generation.decoding import Turns, decode, extend, prefill
from orchestra_jax.generation.engine import Completion, Sampling
from orchestra_jax.models.config import ModelConfig
from orchestra_jax.models.kv_cache import empty_cache
from orchestra_jax.types import StopReason

QUIET_TICKS = 8  # turns of the event loop without a new request before a batch is closed
MAX_STOP_IDS = 8  # of one request: a dim of a compiled shape


@dataclasses.dataclass
class JaxEngineConfig:
    """Sizes of the engine. The buckets are padded sizes, rising; each that is met compiles once.

    A chunk of a decode has `row_buckets` rows. It reads the first `slot_buckets` slots of them, or all `max_tokens`.
    """

    num_rows: int = 256  # sessions that keep their cache
    max_tokens: int = 192  # of a session, the new ones included
    max_turn_tokens: int = 32
    prompts_per_prefill: int = 16
    prefill_buckets: tuple[int, ...] = (48, 88)
    turn_buckets: tuple[int, ...] = (20, 40)  # tokens that a session was given since its last turn
    row_buckets: tuple[int, ...] = (16, 64)
    slot_buckets: tuple[int, ...] = (80, 112)


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


@dataclasses.dataclass
class _Turn:
    """A request on its cache row, with what has been sampled so far."""

    request: _Request
    row: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    is_stopped: bool = False

    @property
    def num_left(self) -> int:
        return 0 if self.is_stopped else self.request.sampling.max_new_tokens - len(self.tokens)

    @property
    def num_cached(self) -> int:
        return len(self.request.tokens) + len(self.tokens) - 1

    @property
    def num_slots(self) -> int:
        """Slots that the turn may come to fill."""
        return self.num_cached + self.num_left

    def completion(self, version: int) -> Completion:
        reason = StopReason.STOP if self.is_stopped else StopReason.LENGTH
        versions = np.full(len(self.tokens), version, np.int32)
        return Completion(np.array(self.tokens, np.int32), np.array(self.logprobs, np.float32), versions, reason)


class JaxEngine:
    """An `Engine` (engine.py).

    `num_sampled_tokens` and `busy_s` count what it sampled and the time its batches took.
    """

    def __init__(self, model_config: ModelConfig, params, config: JaxEngineConfig, version: int = 0):
        self._model_config, self._params, self._config, self._version = model_config, params, config, version
        self._prefill_buckets = _buckets(config.prefill_buckets, config.max_tokens)
        self._slot_buckets = _buckets(config.slot_buckets, config.max_tokens)
        self._row_buckets = _buckets(config.row_buckets, min(config.num_rows, max(config.row_buckets)))
        self._forget_rows()
        self._pending: dict[str, _Request] = {}  # by session: one request of each at a time
        self._in_flight: list[_Request] = []
        self._worker: asyncio.Task | None = None
        self._device_lock = threading.Lock()  # one batch or change of weights at a time, whatever loop asks for it
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
        """As the Protocol says. A deadline or an abort takes effect between batches.

        ValueError for a request that fits no size of the engine, or a second one of a session while the first waits.
        """
        self._check(prompt_tokens, sampling, request_id, session_id)
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + deadline_s if deadline_s is not None else float("inf")
        tokens = np.asarray(prompt_tokens, np.int32)
        request = _Request(tokens, sampling, request_id, session_id, deadline, loop.create_future())
        self._pending[session_id] = request
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
            self._worker.add_done_callback(self._after_work)
        return await request.future

    def _check(self, prompt_tokens: Sequence[int], sampling: Sampling, request_id: str, session_id: str) -> None:
        config = self._config
        num_prompt, num_new = len(prompt_tokens), sampling.max_new_tokens
        if not (0 < num_prompt and 0 < num_new <= config.max_turn_tokens and num_prompt + num_new <= config.max_tokens):
            raise ValueError(
                f"request {request_id}: {num_prompt} prompt tokens and {num_new} new ones do not fit max_tokens "
                f"{config.max_tokens} and max_turn_tokens {config.max_turn_tokens} of the engine, or are none"
            )
        if sampling.temperature < 0 or len(sampling.stop_ids) > MAX_STOP_IDS:
            raise ValueError(
                f"request {request_id}: temperature {sampling.temperature} must not be negative, and stop_ids "
                f"{sorted(sampling.stop_ids)} must be {MAX_STOP_IDS} at most"
            )
        if session_id in self._pending and not self._pending[session_id].future.done():
            raise ValueError(f"request {request_id}: session {session_id} has a request waiting: await it first")

    async def abort(self, request_id: str) -> None:
        for request in self._pending.values():
            if request.request_id == request_id:
                request.deadline = float("-inf")

    async def update_weights(self, params, version: int) -> None:
        """Later batches use `params`; what was cached under the old ones is forgotten."""

        def update():
            with self._device_lock:
                self._params, self._version = params, version
                self._rows = [_Row() for _ in self._rows]

        await asyncio.to_thread(update)

    async def close(self) -> None:
        """Cancels every `generate` that waits."""
        if self._worker is not None:
            self._worker.cancel()
        for request in self._take_requests():
            request.future.cancel()

    async def _work(self) -> None:
        """Closes a batch when no request has come for a few ticks and runs it off the event loop."""
        while self._pending:
            quiet, seen = 0, len(self._pending)
            while quiet < QUIET_TICKS and len(self._pending) < self._config.num_rows:
                await asyncio.sleep(0)
                quiet, seen = (0, len(self._pending)) if len(self._pending) != seen else (quiet + 1, seen)
            batch = self._close_batch()
            completions = await asyncio.to_thread(self._run_batch, batch) if batch else []
            for request, completion in zip(batch, completions, strict=True):
                if not request.future.done():
                    request.future.set_result(completion)
            self._in_flight = []

    def _close_batch(self) -> list[_Request]:
        """Takes the requests that came first and still wait, as many as there are rows."""
        now = time.monotonic()
        for request in self._pending.values():
            if request.deadline <= now and not request.future.done():
                request.future.set_result(_aborted())
        waiting = [request for request in self._pending.values() if not request.future.done()]
        self._in_flight, rest = waiting[: self._config.num_rows], waiting[self._config.num_rows :]
        self._pending = {request.session_id: request for request in rest}
        return self._in_flight

    def _after_work(self, worker: asyncio.Task) -> None:
        """Whoever waits hears of a worker's failure, or the episodes would hang."""
        if not worker.cancelled() and worker.exception() is None:
            return
        for request in self._take_requests():
            if worker.cancelled():
                request.future.cancel()
            elif not request.future.done():
                request.future.set_exception(worker.exception())

    def _take_requests(self) -> list[_Request]:
        requests = [*self._in_flight, *self._pending.values()]
        self._in_flight, self._pending = [], {}
        return requests

    def _forget_rows(self) -> None:
        # One row more than are given out: whatever pads a call is read from it and written to it.
        self._cache = empty_cache(self._model_config, self._config.num_rows + 1, self._config.max_tokens)
        self._rows = [_Row() for _ in range(self._config.num_rows)]

    def _run_batch(self, batch: Sequence[_Request]) -> list[Completion]:
        with self._device_lock:
            if self._cache.keys_LCKHS.is_deleted():  # donated to a call that failed
                self._forget_rows()
            start_s = time.monotonic()
            self._batch_count += 1
            turns = [_Turn(request, row) for request, row in zip(batch, self._assign_rows(batch), strict=True)]
            self._fill_rows(turns)
            running = turns
            while running:
                for chunk in _chunks(running, self._row_buckets[-1]):
                    self._decode(chunk)
                running = [turn for turn in running if turn.num_left]
            for turn in turns:
                # All but the last sampled token have gone through the model.
                tokens = np.concatenate([turn.request.tokens, turn.tokens[:-1]]).astype(np.int32)
                self._rows[turn.row] = _Row(turn.request.session_id, tokens, self._batch_count)
            self.num_sampled_tokens += sum(len(turn.tokens) for turn in turns)
            self.busy_s += time.monotonic() - start_s
            return [turn.completion(self._version) for turn in turns]

    def _assign_rows(self, batch: Sequence[_Request]) -> list[int]:
        """A row per request: the session's own, else the one used longest ago that no request of this batch owns."""
        owned = {row.session_id: index for index, row in enumerate(self._rows) if row.session_id}
        taken = {owned[request.session_id] for request in batch if request.session_id in owned}
        free_rows = [index for index in range(len(self._rows)) if index not in taken]
        free = iter(sorted(free_rows, key=lambda index: self._rows[index].last_used))
        rows = []
        for request in batch:
            row = owned.get(request.session_id)
            rows.append(next(free) if row is None else row)
        assert len(set(rows)) == len(rows), "two requests of one session are in one batch"
        return rows

    def _fill_rows(self, turns: Sequence[_Turn]) -> None:
        """Brings each row to all but its request's last token: known sessions by what is new, others by prefill."""
        fresh, extended = [], []
        for turn in turns:
            held = self._rows[turn.row]
            # Until the batch is done the row is nobody's: should the batch fail, nothing half filled is believed.
            self._rows[turn.row] = _Row()
            num_given = turn.num_cached - len(held.tokens)
            is_known = (
                held.session_id == turn.request.session_id
                and 0 <= num_given <= self._config.turn_buckets[-1]
                and np.array_equal(held.tokens, turn.request.tokens[: len(held.tokens)])
            )
            if not is_known:
                fresh.append(turn)
            elif num_given:
                extended.append((turn, num_given))
        self._prefill([turn for turn in fresh if turn.num_cached])
        extended.sort(key=lambda turn_given: turn_given[1])
        for start in range(0, len(extended), self._row_buckets[-1]):
            self._extend(extended[start : start + self._row_buckets[-1]])

    def _prefill(self, turns: Sequence[_Turn]) -> None:
        """Runs each different prompt once."""
        rows_of_prompt: dict[bytes, list[int]] = {}
        for turn in turns:
            rows_of_prompt.setdefault(turn.request.tokens[:-1].tobytes(), []).append(turn.row)
        groups, size = sorted(rows_of_prompt.items(), key=lambda item: len(item[0])), self._config.prompts_per_prefill
        for start in range(0, len(groups), size):
            prompts = [np.frombuffer(prompt, np.int32) for prompt, _ in groups[start : start + size]]
            tokens_UT = np.zeros((size, _bucket(self._prefill_buckets, len(prompts[-1]))), np.int32)
            lengths_U = np.zeros(size, np.int32)
            prompt_of_row_B = np.full(self._config.num_rows + 1, -1, np.int32)
            for number, (prompt, (_, rows)) in enumerate(zip(prompts, groups[start : start + size], strict=True)):
                tokens_UT[number, : len(prompt)] = prompt
                lengths_U[number] = len(prompt)
                prompt_of_row_B[rows] = number
            self._cache = prefill(
                self._params, self._cache, tokens_UT, lengths_U, prompt_of_row_B, config=self._model_config
            )

    def _extend(self, turns_given: Sequence[tuple[_Turn, int]]) -> None:
        """Feeds (turn, number of tokens given) what lies between the tokens that its row holds and the last one."""
        size = self._row_buckets[-1]
        width = _bucket(self._config.turn_buckets, max(num_given for _, num_given in turns_given))
        rows_R = np.full(size, self._config.num_rows, np.int32)
        tokens_RT, num_tokens_R = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
        lengths_B = np.zeros(self._config.num_rows + 1, np.int32)
        for r, (turn, num_given) in enumerate(turns_given):
            rows_R[r], num_tokens_R[r] = turn.row, num_given
            tokens_RT[r, :num_given] = turn.request.tokens[-1 - num_given : -1]
            lengths_B[turn.row] = turn.num_cached - num_given
        self._cache = extend(
            self._params, self._cache._replace(lengths_B=lengths_B), rows_R, tokens_RT, num_tokens_R,
            config=self._model_config, num_slots=self._config.max_tokens,
        )  # fmt: skip

    def _decode(self, chunk: Sequence[_Turn]) -> None:
        """Samples until few rows of the chunk go on, or none if the chunk is one of few rows itself."""
        few = self._row_buckets[0]
        is_small = len(chunk) <= few
        size = _bucket(self._row_buckets, len(chunk))
        turns = Turns(
            np.full(size, self._config.num_rows, np.int32),
            np.zeros(size, np.int32),
            np.zeros(size, np.int32),
            np.ones(size, np.float32),
            np.zeros((size, 2), np.uint32),
            np.full((size, MAX_STOP_IDS), -1, np.int32),
        )
        lengths_B = np.zeros(self._config.num_rows + 1, np.int32)
        for r, turn in enumerate(chunk):
            request = turn.request
            turns.rows_R[r] = turn.row
            turns.last_tokens_R[r] = turn.tokens[-1] if turn.tokens else request.tokens[-1]
            turns.max_new_R[r] = turn.num_left
            turns.temperature_R[r] = request.sampling.temperature
            turns.key_data_R2[r] = _key_data(request)
            turns.stop_ids_RE[r, : len(request.sampling.stop_ids)] = sorted(request.sampling.stop_ids)
            lengths_B[turn.row] = turn.num_cached
        # Few rows take little time at any length: not worth a compilation of their own.
        num_slots = self._config.max_tokens if is_small else _bucket(self._slot_buckets, chunk[-1].num_slots)
        num_left = np.int32(0 if is_small else max(few // 4, 1))
        self._cache, sampled = decode(
            self._params, self._cache._replace(lengths_B=lengths_B), turns, num_left,
            config=self._model_config, num_slots=num_slots, max_new_tokens=self._config.max_turn_tokens,
        )  # fmt: skip
        sampled = jax.device_get(sampled)
        for r, turn in enumerate(chunk):
            num_tokens = int(sampled.num_tokens_R[r])
            turn.tokens.extend(sampled.tokens_RN[r, :num_tokens].tolist())
            turn.logprobs.extend(sampled.logprobs_RN[r, :num_tokens].tolist())
            turn.is_stopped = bool(sampled.is_stopped_R[r])


def _buckets(sizes: Sequence[int], largest: int) -> tuple[int, ...]:
    """The sizes below the largest, and that one."""
    return (*sorted(size for size in sizes if size < largest), largest)


def _bucket(buckets: Sequence[int], size: int) -> int:
    return next(bucket for bucket in buckets if bucket >= size)


def _chunks(turns: Sequence[_Turn], size: int) -> Iterator[Sequence[_Turn]]:
    """At most `size` turns at a time, neighbours in length together."""
    ordered = sorted(turns, key=lambda turn: turn.num_slots)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _key_data(request: _Request) -> np.ndarray:
    """The request's own key: its samples depend on seed, session and position, not on what else is in the batch."""
    digest = hashlib.blake2b(f"{request.sampling.seed}\x1f{request.session_id}".encode(), digest_size=8).digest()
    return np.frombuffer(digest, np.uint32)


def _aborted() -> Completion:
    empty = np.zeros(0, np.int32)
    return Completion(empty, np.zeros(0, np.float32), empty, StopReason.ABORTED)
