"""Which prefix each row of the store holds: found again by session or by content, evicted by least recent use.

Bookkeeping on the host; the keys and values themselves lie in the engine's store cache. A row's prefix may be longer
than what a request shares with it: the first slots serve alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Match:
    """Where a prefix comes from and where it is to stand; both rows are pinned until `PrefixStore.unpin`."""

    source_row: int
    num_matched: int  # tokens that the source row shares with the prefix
    row: int  # the source itself where nothing is missing, or the session's own row goes on


class PrefixStore:
    """`num_rows` prefixes of at most `max_tokens` tokens. `wait_tokens`: see `match`."""

    def __init__(self, num_rows: int, max_tokens: int, wait_tokens: int):
        self._tokens_BT = np.full((num_rows, max_tokens), -1, np.int32)
        self._wait_tokens = wait_tokens
        self.num_tokens_B = np.zeros(num_rows, np.int32)  # that the row is to hold
        self.num_filled_B = np.zeros(num_rows, np.int32)  # that it holds already
        self._last_used_B = np.zeros(num_rows, np.int64)
        self._num_pins_B = np.zeros(num_rows, np.int32)
        self._session_of_row: dict[int, str] = {}
        self._row_of_session: dict[str, int] = {}
        self._row_of_prefix: dict[int, int] = {}  # by hash: a guess, looked at before it is believed
        self._clock = 0

    def forget(self) -> None:
        """Nothing is known any more and nothing pinned."""
        self._tokens_BT[:] = -1
        for counts_B in (self.num_tokens_B, self.num_filled_B, self._last_used_B, self._num_pins_B):
            counts_B[:] = 0
        self._session_of_row, self._row_of_session, self._row_of_prefix = {}, {}, {}

    def has(self, session_id: str) -> bool:
        return session_id in self._row_of_session

    def match(self, session_id: str, prefix: np.ndarray) -> Match | None:
        """Finds the longest beginning of `prefix` and a row for all of it, which from now on counts as holding it.

        None if every row is pinned, or a row is being filled with `wait_tokens` more of `prefix` than is there: wait.
        A row that is being filled with all of `prefix` is a match.
        """
        source, num_matched = self._own(session_id, prefix)
        is_own = source is not None
        if not is_own:
            source, num_matched = self._longest(prefix)
            if source is None:
                return None
        row = source
        if num_matched < len(prefix) and (not is_own or self._num_pins_B[source] > 0):
            self._num_pins_B[source] += num_matched > 0  # what is to be copied must not be the row that goes
            row = self._allocate(session_id)
            self._num_pins_B[source] -= num_matched > 0
            if row is None:
                return None
            source = source if num_matched else row
        if num_matched < len(prefix):
            self._tokens_BT[row, : len(prefix)] = prefix
            self.num_tokens_B[row] = len(prefix)
            self._row_of_prefix[hash(prefix.tobytes())] = row
        for used in (source, row):
            self._num_pins_B[used] += 1
            self._touch(used)
        return Match(source, num_matched, row)

    def keep(self, session_id: str, prefix: np.ndarray) -> int | None:
        """The row that `prefix` of a session should be written to, which from now on counts as holding it."""
        row = self._row_of_session.get(session_id)
        if row is None or self._num_pins_B[row]:
            row = self._allocate(session_id)
        if row is not None:
            self._tokens_BT[row, : len(prefix)] = prefix
            self._tokens_BT[row, len(prefix) :] = -1  # of a longer one that was there
            self.num_tokens_B[row] = self.num_filled_B[row] = len(prefix)
            self._touch(row)
        return row

    def unpin(self, *rows: int) -> None:
        for row in rows:
            self._num_pins_B[row] -= 1

    def _own(self, session_id: str, prefix: np.ndarray) -> tuple[int | None, int]:
        """The session's own row, if all that it holds begins `prefix`."""
        row = self._row_of_session.get(session_id)
        if row is None or self.num_filled_B[row] < self.num_tokens_B[row]:
            return None, 0
        num_tokens = int(self.num_tokens_B[row])
        is_beginning = num_tokens <= len(prefix) and np.array_equal(
            self._tokens_BT[row, :num_tokens], prefix[:num_tokens]
        )
        return (row, num_tokens) if is_beginning else (None, 0)

    def _longest(self, prefix: np.ndarray) -> tuple[int | None, int]:
        """(row, shared tokens) of the best row; no row if another request is about to fill in much more."""
        num_compared = len(prefix)
        hint = self._row_of_prefix.get(hash(prefix.tobytes()))
        if hint is not None and np.array_equal(self._tokens_BT[hint, :num_compared], prefix):
            return hint, num_compared
        is_other_BT = self._tokens_BT[:, :num_compared] != prefix[None, :]
        num_common_B = np.where(is_other_BT.any(axis=1), is_other_BT.argmax(axis=1), num_compared)
        num_common_B = np.minimum(num_common_B, self.num_tokens_B)
        whole = np.flatnonzero(num_common_B == num_compared)
        if len(whole):
            return int(whole[self.num_filled_B[whole].argmax()]), num_compared
        num_there_B = np.minimum(num_common_B, self.num_filled_B)
        best = int(num_there_B.argmax())
        if num_common_B.max() >= num_there_B[best] + self._wait_tokens:
            return None, 0
        return best, int(num_there_B[best])

    def _allocate(self, session_id: str) -> int | None:
        """The row used longest ago that nobody has pinned becomes the session's."""
        free = np.flatnonzero(self._num_pins_B == 0)
        if not len(free):
            return None
        row = int(free[self._last_used_B[free].argmin()])
        self._row_of_session.pop(self._session_of_row.pop(row, ""), None)
        self._session_of_row.pop(self._row_of_session.get(session_id, -1), None)
        self._session_of_row[row], self._row_of_session[session_id] = session_id, row
        self._row_of_prefix.pop(hash(self._tokens_BT[row, : self.num_tokens_B[row]].tobytes()), None)
        self.num_tokens_B[row] = self.num_filled_B[row] = 0
        self._tokens_BT[row] = -1
        return row

    def _touch(self, row: int) -> None:
        self._clock += 1
        self._last_used_B[row] = self._clock
