"""The embedded engine: generates in process with the trainer's own model. The default; needs no server.

Continuous batching in rounds. A request waits until its prefix is in the store: what the store has of it is found by
session or by content, the rest is prefilled in chunks, ahead of need and many requests at a time, so the rollouts of
one prompt share its prefill. Then it takes a free row of the lane that its own length asks for; each round samples a
few tokens in every lane (lanes.py). A turn that ends leaves its row at once and its prefix in the store.

All shapes are fixed by the config. Which of them a request meets depends on its own lengths alone if `row_buckets` has
one entry: its numbers are then the same to the last bit whatever else the engine does. Smaller row buckets save
arithmetic when few requests are there, and cost that.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from orchestra_jax.generation.decoding import copy_rows, extend, make_cache
from orchestra_jax.generation.engine import Completion, OnWatched, Sampling, check_sampling
from orchestra_jax.generation.lanes import MAX_STOP_IDS, MAX_WATCH_IDS, Counters, Lane, Turn
from orchestra_jax.generation.prefix_store import PrefixStore
from orchestra_jax.models.config import ModelConfig
from orchestra_jax.sharding import mesh_context

QUIET_TICKS = 8  # turns of the event loop without a new request before a round begins


@dataclasses.dataclass
class JaxEngineConfig:
    """Sizes of the engine. The buckets are padded sizes, rising; each combination that is met compiles once.

    A lane has the last of `row_buckets` rows; its few last turns are sampled in as many as the first. There is a lane
    for each of `slot_buckets`, and one for `max_tokens`.
    """

    num_rows: int = 256  # prefixes that are kept, of sessions between two turns
    max_tokens: int = 192  # of a session, the new ones included
    row_buckets: tuple[int, ...] = (16, 48)
    slot_buckets: tuple[int, ...] = (80, 112)
    chunk_rows: int = 8  # prefixes that a prefill extends at a time
    chunk_buckets: tuple[int, ...] = (20, 48, 88)  # tokens by which it extends them
    steps_per_dispatch: int = 16


class JaxEngine:
    """An `Engine` (engine.py). `counters` says what it did.

    On a `mesh` the caller lays the parameters out (sharding.RULES); the engine splits its caches by key-value heads
    over the `tensor` axis, and repeats them over the others. `is_training`: requests whose samples would be off-policy
    (engine.Sampling) are refused.
    """

    def __init__(
        self, model_config: ModelConfig, params, config: JaxEngineConfig, version: int = 0, mesh: Mesh | None = None,
        is_training: bool = False,
    ):  # fmt: skip
        _check_config(config)
        self._mesh, self._is_training = mesh, is_training
        self._model_config, self._params, self._config, self._version = model_config, params, config, version
        self._slot_buckets = _buckets(config.slot_buckets, config.max_tokens)
        self._store = PrefixStore(config.num_rows, config.max_tokens, wait_tokens=config.chunk_buckets[-1])
        self._make_caches()
        self._turns: dict[str, Turn] = {}  # by session: one request of each at a time
        # The three stages of a turn before its lane: no row of the store yet, prefix to be computed, prefix there.
        self._waiting: list[Turn] = []
        self._filling: list[Turn] = []
        self._ready: list[Turn] = []
        self._worker: asyncio.Task | None = None
        self._device_lock = threading.Lock()  # one round or change of weights at a time, whatever loop asks for it
        self.counters = Counters()

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
        """As the Protocol says. A deadline or an abort takes effect between rounds.

        ValueError for a request that the engine's sizes do not hold, token ids outside the vocabulary, settings that
        make no sense or are refused in training, or a second request of a session while the first waits.
        """
        self._check(prompt_tokens, sampling, request_id, session_id)
        if deadline_s is not None and math.isnan(deadline_s):
            raise ValueError(f"request {request_id}: deadline_s {deadline_s} must be a number of seconds, or None")
        loop = asyncio.get_running_loop()
        turn = Turn(prompt_tokens, sampling, request_id, session_id)
        turn.future, turn.on_watched = loop.create_future(), on_watched
        turn.lane = self._slot_buckets.index(_bucket(self._slot_buckets, turn.num_slots))
        if deadline_s is not None:
            turn.deadline = time.monotonic() + deadline_s
        self._turns[session_id] = turn
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
            self._worker.add_done_callback(self._after_work)
        return await turn.future

    def _check(self, prompt_tokens: Sequence[int], sampling: Sampling, request_id: str, session_id: str) -> None:
        num_prompt, num_new = len(prompt_tokens), sampling.max_new_tokens
        try:
            check_sampling(sampling)
        except ValueError as error:
            raise ValueError(f"request {request_id}: {error}") from error
        if self._is_training and not sampling.is_on_policy:
            raise ValueError(
                f"request {request_id}: top_k, top_p, min_p and a constraint sample from another distribution than the "
                "one that is trained: leave them out, or serve from an engine without is_training"
            )
        if not num_prompt or num_prompt + num_new > self._config.max_tokens:
            raise ValueError(
                f"request {request_id}: {num_prompt} prompt tokens and {num_new} new ones do not fit max_tokens "
                f"{self._config.max_tokens} of the engine, or there is no prompt"
            )
        least, most, vocab_size = min(prompt_tokens), max(prompt_tokens), self._model_config.vocab_size
        if least < 0 or most >= vocab_size:
            raise ValueError(f"request {request_id}: token ids {least} to {most} are not all in [0, {vocab_size})")
        if len(sampling.stop_ids) > MAX_STOP_IDS or len(sampling.watch_ids) > MAX_WATCH_IDS:
            raise ValueError(
                f"request {request_id}: stop_ids {sorted(sampling.stop_ids)} and watch_ids "
                f"{sorted(sampling.watch_ids)} must be {MAX_STOP_IDS} and {MAX_WATCH_IDS} at most"
            )
        if session_id in self._turns and not self._turns[session_id].future.done():
            raise ValueError(f"request {request_id}: session {session_id} has a request waiting: await it first")

    async def abort(self, request_id: str) -> None:
        for turn in self._turns.values():
            if turn.request_id == request_id:
                turn.is_aborted = True

    async def update_weights(self, params, version: int) -> None:
        """Later tokens are sampled by `params`; what was cached under the old ones is forgotten.

        Turns under way go on: their tokens so far are prefilled anew, and each token keeps the version it came from.
        """

        def update():
            with self._device_lock:
                self._params, self._version = params, version
                under_way = [lane.leave(row) for lane in self._lanes for row in list(lane.turns)]
                self._waiting = [*under_way, *self._ready, *self._filling, *self._waiting]
                self._ready, self._filling = [], []
                self._store.forget()

        await asyncio.to_thread(update)

    async def forget(self) -> None:
        with self._device_lock:
            assert not self._turns, f"{len(self._turns)} turns are under way"
            self._store.forget()

    async def release_memory(self) -> None:
        """Nothing: it shares the trainer's weights, and its caches are small."""

    async def close(self) -> None:
        """Cancels every `generate` that waits."""
        if self._worker is not None:
            self._worker.cancel()
        for turn in self._take_turns():
            turn.future.cancel()

    async def _work(self) -> None:
        """One round after the other off the event loop, as long as anybody waits."""
        loop = asyncio.get_running_loop()
        while self._turns:
            quiet, seen = 0, len(self._turns)
            while quiet < QUIET_TICKS:
                await asyncio.sleep(0)
                quiet, seen = (0, len(self._turns)) if len(self._turns) != seen else (quiet + 1, seen)
            arrived = [turn for turn in self._turns.values() if not turn.is_queued]
            for turn in arrived:
                turn.is_queued = True

            def tell(function: Callable, turns: list[Turn]) -> None:
                for turn in turns:  # one by one: what one raises does not keep the others from hearing
                    loop.call_soon_threadsafe(function, turn)

            await asyncio.to_thread(self._run_round, arrived, tell)

    def _hear(self, turn: Turn) -> None:
        """Tells of a watched id, unless nobody awaits the turn any more; what that raises is the request's own end."""
        if turn.future.done() or turn.on_watched is None:
            return
        try:
            turn.on_watched(turn.stream[turn.num_prompt : turn.length].copy())
        except Exception as error:
            turn.future.set_exception(error)

    def _finish(self, turn: Turn) -> None:
        if self._turns.get(turn.session_id) is turn:
            del self._turns[turn.session_id]
        if turn.future.done():
            return
        if turn.error is not None:
            turn.future.set_exception(turn.error)
        else:
            turn.future.set_result(turn.completion())

    def _after_work(self, worker: asyncio.Task) -> None:
        """Whoever waits hears of a worker's failure, or the episodes would hang."""
        if not worker.cancelled() and worker.exception() is None:
            return
        for turn in self._take_turns():
            if worker.cancelled():
                turn.future.cancel()
            elif not turn.future.done():
                turn.future.set_exception(worker.exception())

    def _take_turns(self) -> list[Turn]:
        turns, self._turns = list(self._turns.values()), {}
        return turns

    def _make_caches(self) -> None:
        """Empty caches, and nobody in them."""
        config = self._config
        self._store.forget()
        self._store_cache = make_cache(self._model_config, config.num_rows, config.max_tokens, self._mesh)
        few_rows = config.row_buckets[0] if len(config.row_buckets) > 1 else 0
        self._lanes = [
            Lane(self._model_config, config.row_buckets[-1], num_slots, few_rows, self._mesh)
            for num_slots in self._slot_buckets
        ]

    def _run_round(self, arrived: Sequence[Turn], tell: Callable) -> None:
        """Fills, joins, samples a few tokens in each lane. `tell(function, turns)`: call it in the event loop."""
        with self._device_lock:
            start_s, is_done = time.monotonic(), False
            self._waiting.extend(arrived)
            try:
                with contextlib.nullcontext() if self._mesh is None else mesh_context(self._mesh):
                    self._sweep(tell)
                    self._match()
                    self._fill()
                    self._sweep(tell)  # of those that are filled now, none that nobody wants may join
                    self._join()
                    for lane in self._lanes:
                        if lane.turns:
                            self._dispatch(lane, tell)
                is_done = True
            finally:
                if not is_done:  # donated caches may be gone, and rows half filled are not to be believed
                    self._waiting, self._filling, self._ready = [], [], []
                    self._make_caches()
                self.counters.busy_s += time.monotonic() - start_s

    def _sweep(self, tell: Callable) -> None:
        """Turns that were aborted, are too late or that nobody awaits any more end, wherever they are."""
        self._waiting, gone = _split_unwanted(self._waiting)
        self._ready, unwanted = _split_unwanted(self._ready)
        for turn in unwanted:
            self._unpin(turn)
        gone += unwanted
        # Others may wait for the prefix of one that is being filled: it is told now and filled to its end.
        gone += [turn for turn in self._filling if turn.is_unwanted]
        for lane in self._lanes:
            gone += [lane.leave(row) for row, turn in list(lane.turns.items()) if turn.is_unwanted]
        if gone:
            tell(self._finish, gone)

    def _match(self) -> None:
        """Finds waiting turns rows of the store, for as many ahead of their turn as the lanes have rows.

        Sessions that come back go first: they hold a row that a new one would take from them.
        """
        num_wanted = sum(lane.num_rows for lane in self._lanes) - len(self._filling) - len(self._ready)
        candidates = sorted(self._waiting, key=lambda turn: not self._store.has(turn.session_id))
        blocked, rest = [], candidates[max(num_wanted, 0) :]
        for turn in candidates[: max(num_wanted, 0)]:
            turn.match = self._store.match(turn.session_id, turn.prefix) if turn.length > 1 else None
            if turn.match is None and turn.length > 1:
                blocked.append(turn)
            else:
                (self._ready if self._is_filled(turn) else self._filling).append(turn)
        self._waiting = blocked + rest

    def _is_filled(self, turn: Turn) -> bool:
        return turn.length == 1 or self._store.num_filled_B[turn.match.row] >= turn.length - 1

    def _fill(self) -> None:
        """Prefills one chunk of each prefix: full batches at once, others only if a lane would go short."""
        free = [lane.num_free for lane in self._lanes]
        for turn in self._ready:
            free[turn.lane] -= 1
        groups: dict[tuple[int, int], list[tuple[Turn, int, int]]] = {}
        for turn in self._filling:
            num_wanted = turn.length - 1
            if turn.match.num_matched < num_wanted:  # else another turn fills the row
                start = max(turn.match.num_matched, int(self._store.num_filled_B[turn.match.row]))
                num_given = min(num_wanted - start, self._config.chunk_buckets[-1])
                shape = _bucket(self._config.chunk_buckets, num_given), _bucket(self._slot_buckets, start + num_given)
                groups.setdefault(shape, []).append((turn, start, num_given))
        for shape, chunks in groups.items():
            for begin in range(0, len(chunks), self._config.chunk_rows):
                batch = chunks[begin : begin + self._config.chunk_rows]
                is_short = any(free[turn.lane] > 0 for turn, _, _ in batch)
                if is_short or len(batch) == self._config.chunk_rows:
                    self._extend(batch, *shape)
        self._ready += [turn for turn in self._filling if self._is_filled(turn)]
        self._filling = [turn for turn in self._filling if not self._is_filled(turn)]

    def _extend(self, batch: Sequence[tuple[Turn, int, int]], width: int, num_slots: int) -> None:
        """Computes tokens [start, start + num_given) of each turn's prefix; all shapes are given."""
        size, filled_B = self._config.chunk_rows, self._store.num_filled_B
        source_rows_R, rows_R = np.zeros(size, np.int32), np.zeros(size, np.int32)
        lengths_R, num_tokens_R = np.zeros(size, np.int32), np.zeros(size, np.int32)
        tokens_RT = np.zeros((size, width), np.int32)
        for r, (turn, start, num_given) in enumerate(batch):
            row = turn.match.row
            source_rows_R[r] = row if filled_B[row] == start else turn.match.source_row
            rows_R[r], lengths_R[r], num_tokens_R[r] = row, start, num_given
            tokens_RT[r, :num_given] = turn.stream[start : start + num_given]
        self._store_cache = extend(
            self._params, self._store_cache, source_rows_R, rows_R, lengths_R, np.int32(len(batch)), tokens_RT,
            num_tokens_R, config=self._model_config, num_slots=num_slots,
        )  # fmt: skip
        for turn, start, num_given in batch:
            filled_B[turn.match.row] = start + num_given

    def _join(self) -> None:
        """Puts turns whose prefix is there into free rows of their lanes, in the order in which they came."""
        still_ready, copies = [], {}
        for turn in self._ready:
            lane = self._lanes[turn.lane]
            if not lane.num_free:
                still_ready.append(turn)
                continue
            row = lane.join(turn)
            if turn.match is not None:
                copies.setdefault(lane, []).append((row, turn.match.row))
                self._unpin(turn)
        self._ready = still_ready
        for lane, pairs in copies.items():
            lane.cache = copy_rows(lane.cache, self._store_cache, *_padded_pairs(pairs, lane.num_rows))

    def _dispatch(self, lane: Lane, tell: Callable) -> None:
        """Samples a few tokens in a lane; those that end leave it, and their prefixes go to the store."""
        number = self._lanes.index(lane)
        stages = (self._waiting, self._filling, self._ready)
        num_waiting = sum(turn.lane == number for stage in stages for turn in stage)
        watched = lane.dispatch(
            self._params, self._config.steps_per_dispatch, num_waiting, self._version, self.counters
        )
        if watched:
            tell(self._hear, watched)
        ended, pairs = [], []
        for row in [row for row, turn in lane.turns.items() if turn.is_over]:
            turn = lane.leave(row)
            ended.append(turn)
            store_row = self._store.keep(turn.session_id, turn.prefix)
            if store_row is not None:
                pairs.append((store_row, row))
        if pairs:
            self._store_cache = copy_rows(self._store_cache, lane.cache, *_padded_pairs(pairs, lane.num_rows))
        if ended:
            tell(self._finish, ended)

    def _unpin(self, turn: Turn) -> None:
        if turn.match is not None:
            self._store.unpin(turn.match.source_row, turn.match.row)
            turn.match = None


def _check_config(config: JaxEngineConfig) -> None:
    for name in ("row_buckets", "slot_buckets", "chunk_buckets"):
        sizes = getattr(config, name)
        if list(sizes) != sorted(set(sizes)) or min(sizes, default=1) < 1 or (name != "slot_buckets" and not sizes):
            raise ValueError(f"jax_engine.{name} {sizes} must be rising sizes of 1 or more")
    # One row to copy a shared beginning from and one to copy it to.
    for name, least in (("num_rows", 2), ("max_tokens", 2), ("chunk_rows", 1), ("steps_per_dispatch", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"jax_engine.{name} {getattr(config, name)} must be {least} or more")


def _buckets(sizes: Sequence[int], largest: int) -> tuple[int, ...]:
    """The sizes below the largest, and that one."""
    return (*(size for size in sizes if size < largest), largest)


def _bucket(buckets: Sequence[int], size: int) -> int:
    return next(bucket for bucket in buckets if bucket >= size)


def _split_unwanted(turns: Sequence[Turn]) -> tuple[list[Turn], list[Turn]]:
    """(those that go on, those that do not): asked once each, for a deadline may pass at any time."""
    wanted, unwanted = [], []
    for turn in turns:
        (unwanted if turn.is_unwanted else wanted).append(turn)
    return wanted, unwanted


def _padded_pairs(pairs: Sequence[tuple[int, int]], size: int) -> tuple[np.ndarray, np.ndarray, np.int32]:
    """(rows, source rows, number of real ones), as decoding.copy_rows takes them."""
    padded_R2 = np.zeros((size, 2), np.int32)
    padded_R2[: len(pairs)] = pairs
    return padded_R2[:, 0].copy(), padded_R2[:, 1].copy(), np.int32(len(pairs))
