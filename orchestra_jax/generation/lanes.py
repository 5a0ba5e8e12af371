"""A lane: turns that are sampled side by side, in a cache of fixed rows and slots. The host's half, without a schedule.

A turn takes a row when one is free and leaves it when it ends, whatever the others do. All that a compiled call is told
of the rows stands here as arrays and is kept up to date, so that a call costs Python little more than its arguments.

Legend: R rows, E stop or watched ids.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from orchestra_jax.generation.decoding import Limits, Sampled, Turns, decode, decode_few, make_cache
from orchestra_jax.generation.engine import Completion, OnWatched, Sampling
from orchestra_jax.generation.prefix_store import Match
from orchestra_jax.generation.sampling import SamplingRows
from orchestra_jax.models.config import ModelConfig
from orchestra_jax.types import StopReason

MAX_STOP_IDS = 8  # of one request: a dim of a compiled shape
MAX_WATCH_IDS = 2


class Turn:
    """A request with what has been sampled for it so far."""

    def __init__(self, prompt_tokens: Sequence[int], sampling: Sampling, request_id: str, session_id: str):
        self.sampling, self.request_id, self.session_id = sampling, request_id, session_id
        self.num_prompt = self.length = len(prompt_tokens)
        self.stream = np.zeros(self.num_prompt + sampling.max_new_tokens, np.int32)  # prompt and sampled tokens
        self.stream[: self.num_prompt] = prompt_tokens
        self.logprobs = np.zeros(sampling.max_new_tokens, np.float32)
        self.versions = np.zeros(sampling.max_new_tokens, np.int32)
        self.deadline = float("inf")  # by time.monotonic()
        self.future: asyncio.Future | None = None
        self.on_watched: OnWatched | None = None
        self.lane = 0  # the number of the lane that its length asks for
        self.is_queued = False
        self.is_aborted = False
        self.is_stopped = False
        self.error: Exception | None = None  # what its constraint raised
        self.match: Match | None = None

    @property
    def num_sampled(self) -> int:
        return self.length - self.num_prompt

    @property
    def prefix(self) -> np.ndarray:
        """What is in the cache while the turn is sampled: all but the last token."""
        return self.stream[: self.length - 1]

    @property
    def num_slots(self) -> int:
        """Slots that the turn may come to fill; the last token that it samples needs none."""
        return len(self.stream) - 1

    @property
    def is_over(self) -> bool:
        return self.is_stopped or self.length == len(self.stream) or self.error is not None

    @property
    def is_unwanted(self) -> bool:
        return self.is_aborted or self.deadline <= time.monotonic() or self.future.done()

    def append(self, tokens: np.ndarray, logprobs: np.ndarray, version: int, is_stopped: bool) -> None:
        """Books sampled tokens; where a stop sequence ends among them, those behind it are dropped."""
        start = self.num_sampled
        self.stream[self.length : self.length + len(tokens)] = tokens
        end = self._stop_sequence_end(self.length, self.length + len(tokens))
        self.is_stopped = is_stopped or end is not None
        self.length = self.length + len(tokens) if end is None else end
        num_new = self.num_sampled - start
        self.logprobs[start : self.num_sampled] = logprobs[:num_new]
        self.versions[start : self.num_sampled] = version

    def _stop_sequence_end(self, start: int, end: int) -> int | None:
        if not self.sampling.stop_sequences:
            return None
        for place in range(start + 1, end + 1):
            for sequence in self.sampling.stop_sequences:
                begin = place - len(sequence)
                if begin >= self.num_prompt and self.stream[begin:place].tolist() == list(sequence):
                    return place
        return None

    def completion(self) -> Completion:
        reason = StopReason.STOP if self.is_stopped else StopReason.LENGTH
        if not self.is_over:
            reason = StopReason.ABORTED
        tokens, num_sampled = self.stream[self.num_prompt : self.length], self.num_sampled
        return Completion(tokens, self.logprobs[:num_sampled], self.versions[:num_sampled], reason)


@dataclasses.dataclass
class Counters:
    """What an engine did since it was made. Occupancy = used / offered row steps, counted while turns waited."""

    num_sampled_tokens: int = 0
    num_dispatches: int = 0
    num_row_steps: int = 0
    num_waited_row_steps: int = 0
    num_waited_used_row_steps: int = 0
    busy_s: float = 0.0

    def count(self, sampled: Sampled, num_waiting: int) -> None:
        num_offered = len(sampled.num_tokens_R) * int(sampled.num_steps)
        num_tokens = int(sampled.num_tokens_R.sum())
        self.num_dispatches += 1
        self.num_row_steps += num_offered
        self.num_sampled_tokens += num_tokens
        if num_waiting:
            self.num_waited_row_steps += num_offered
            self.num_waited_used_row_steps += num_tokens


class Lane:
    """`num_rows` turns side by side over `num_slots` slots each. `few_rows`: see decoding.decode_few; 0 for never."""

    def __init__(
        self, model_config: ModelConfig, num_rows: int, num_slots: int, few_rows: int, mesh: Mesh | None = None
    ):
        self._model_config, self.num_rows, self.num_slots, self._few_rows = model_config, num_rows, num_slots, few_rows
        self.cache = make_cache(model_config, num_rows, num_slots, mesh)
        self.turns: dict[int, Turn] = {}  # by row
        self._free = list(range(num_rows))[::-1]
        self._state = Turns(
            np.zeros(num_rows, np.int32),
            np.zeros(num_rows, np.int32),
            np.zeros(num_rows, np.int32),
            np.full((num_rows, MAX_STOP_IDS), -1, np.int32),
            np.full((num_rows, MAX_WATCH_IDS), -1, np.int32),
            SamplingRows(
                np.ones(num_rows, np.float32),
                np.zeros(num_rows, np.int32),
                np.ones(num_rows, np.float32),
                np.zeros(num_rows, np.float32),
                np.zeros((num_rows, 2), np.uint32),
            ),
        )

    @property
    def num_free(self) -> int:
        return len(self._free)

    def join(self, turn: Turn) -> int:
        """Gives the turn a row, which the caller fills with its prefix."""
        row, sampling = self._free.pop(), turn.sampling
        self.turns[row] = turn
        self._set_place(row, turn)
        state, settings = self._state, self._state.sampling
        for ids_RE, ids in ((state.stop_ids_RE, sampling.stop_ids), (state.watch_ids_RE, sampling.watch_ids)):
            ids_RE[row] = -1
            ids_RE[row, : len(ids)] = sorted(ids)
        settings.temperature_R[row], settings.top_k_R[row] = sampling.temperature, sampling.top_k
        settings.top_p_R[row], settings.min_p_R[row] = sampling.top_p, sampling.min_p
        settings.key_data_R2[row] = _key_data(sampling.seed, turn.session_id)
        return row

    def leave(self, row: int) -> Turn:
        self._state.num_left_R[row] = 0
        self._state.sampling.top_k_R[row] = 0  # or a turn that is gone would have the vocabulary sorted
        self._state.sampling.top_p_R[row], self._state.sampling.min_p_R[row] = 1, 0
        self._free.append(row)
        return self.turns.pop(row)

    def dispatch(self, params, max_steps: int, num_waiting: int, version: int, counters: Counters) -> list[Turn]:
        """Samples a few tokens in every row that has a turn; returns the turns that sampled a watched id.

        While turns wait, it is over as soon as one row in sixteen is free for them.
        """
        num_running = len(self.turns)
        num_ended = max(num_running // 16, 1) if num_waiting else self.num_rows
        constrained = {row: turn for row, turn in self.turns.items() if turn.sampling.constraint is not None}
        # What a constraint allows is known one token at a time.
        limits = Limits(np.int32(1 if constrained else max_steps), np.int32(num_ended))
        is_allowed_RV = self._allowed(constrained) if constrained else None
        run = self._run_few if num_running <= self._few_rows < self.num_rows else self._run_all
        places, sampled = run(params, limits, is_allowed_RV, max_steps)
        watched = []
        for (row, turn), place in zip(self.turns.items(), places, strict=True):
            num_tokens = int(sampled.num_tokens_R[place])
            tokens = sampled.tokens_RN[place, :num_tokens]
            turn.append(tokens, sampled.logprobs_RN[place, :num_tokens], version, bool(sampled.is_stopped_R[place]))
            self._set_place(row, turn)
            if turn.sampling.watch_ids and turn.sampling.watch_ids.intersection(tokens.tolist()):
                watched.append(turn)
        counters.count(sampled, num_waiting)
        return watched

    def _run_all(self, params, limits: Limits, is_allowed_RV, max_steps: int):
        """-> (where the result of each turn stands, what was sampled)."""
        self.cache, sampled = decode(
            params, self.cache, self._state, limits, is_allowed_RV, config=self._model_config, max_steps=max_steps
        )
        return list(self.turns), jax.device_get(sampled)

    def _run_few(self, params, limits: Limits, is_allowed_RV, max_steps: int):
        num_running = len(self.turns)
        rows_R = np.zeros(self._few_rows, np.int32)
        rows_R[:num_running] = list(self.turns)
        state = jax.tree.map(lambda array: array[rows_R], self._state)
        state.num_left_R[num_running:] = 0
        self.cache, sampled = decode_few(
            params, self.cache, rows_R, np.int32(num_running), state, limits,
            None if is_allowed_RV is None else is_allowed_RV[rows_R],
            config=self._model_config, max_steps=max_steps,
        )  # fmt: skip
        return range(num_running), jax.device_get(sampled)

    def _allowed(self, constrained: dict[int, Turn]) -> np.ndarray:
        is_allowed_RV = np.ones((self.num_rows, self._model_config.vocab_size), bool)
        for row, turn in constrained.items():
            sampled = turn.stream[turn.num_prompt : turn.length].tolist()
            try:
                is_allowed_V = turn.sampling.constraint.allowed_tokens(sampled)
                _check_allowed(is_allowed_V, self._model_config.vocab_size, turn)
            except Exception as error:  # of one request: it ends alone
                turn.error = error
                self._state.num_left_R[row] = 0
                continue
            if is_allowed_V is not None:
                is_allowed_RV[row] = is_allowed_V
        return is_allowed_RV

    def _set_place(self, row: int, turn: Turn) -> None:
        self._state.lengths_R[row] = turn.length - 1
        self._state.last_tokens_R[row] = turn.stream[turn.length - 1]
        self._state.num_left_R[row] = len(turn.stream) - turn.length


def _check_allowed(is_allowed_V: np.ndarray | None, vocab_size: int, turn: Turn) -> None:
    if is_allowed_V is None:
        return
    if is_allowed_V.shape != (vocab_size,):
        raise ValueError(
            f"request {turn.request_id}: its constraint's mask has shape {is_allowed_V.shape}, the model has "
            f"{vocab_size} tokens: make it for the model's vocab_size"
        )
    if not is_allowed_V.any():
        raise ValueError(f"request {turn.request_id}: its constraint allows nothing behind {turn.num_sampled} tokens")


def _key_data(seed: int, session_id: str) -> np.ndarray:
    """The turn's own key: its samples depend on seed, session and position, not on what else is in the batch."""
    digest = hashlib.blake2b(f"{seed}\x1f{session_id}".encode(), digest_size=8).digest()
    return np.frombuffer(digest, np.uint32)
