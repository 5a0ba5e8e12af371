"""Which row a prefix is found in, and which one has to go. Prefixes are written as digits."""

import numpy as np
import pytest

from orchestra_jax.generation.prefix_store import Match, PrefixStore


def tokens(digits):
    return np.array([int(digit) for digit in digits], np.int32)


@pytest.fixture
def store():
    return PrefixStore(num_rows=3, max_tokens=12, wait_tokens=4)


def fill(store, session_id, digits):
    """As the engine does it: match, compute, let go."""
    match = store.match(session_id, tokens(digits))
    store.num_filled_B[match.row] = max(store.num_filled_B[match.row], len(digits))
    store.unpin(match.source_row, match.row)
    return match


def test_rollouts_of_one_prompt_wait_for_one_row(store):
    first = store.match("a", tokens("12345"))
    second = store.match("b", tokens("12345"))
    assert (first.num_matched, second.num_matched) == (0, 5)
    assert second.source_row == second.row == first.row and store.num_filled_B[first.row] == 0


def test_a_session_goes_on_in_its_own_row_and_another_one_takes_a_copy(store):
    row = fill(store, "a", "12345").row
    assert fill(store, "a", "1234567") == Match(row, 5, row)
    other = fill(store, "b", "12349")
    assert (other.source_row, other.num_matched) == (row, 4) and other.row != row
    assert store.keep("a", tokens("12345678")) == row
    assert fill(store, "c", "123456789").num_matched == 8


def test_a_row_that_somebody_is_to_copy_is_not_written(store):
    row = fill(store, "a", "12345").row
    pinned = store.match("b", tokens("123"))
    assert pinned == Match(row, 3, row)
    moved = store.match("a", tokens("1234567"))
    assert moved.source_row == row and moved.row != row and moved.num_matched == 5
    assert store.keep("a", tokens("12345679")) not in (row, moved.row)


def test_the_row_used_longest_ago_goes(store):
    rows = {name: fill(store, name, digits).row for name, digits in (("a", "111"), ("b", "222"), ("c", "333"))}
    assert len(set(rows.values())) == 3
    fill(store, "a", "1115")
    assert fill(store, "d", "444").row == rows["b"]
    assert store.has("a") and not store.has("b")
    assert fill(store, "b", "222").num_matched == 0


def test_where_every_row_is_pinned_a_request_waits(store):
    matches = [store.match(name, tokens(name * 3)) for name in "123"]
    assert store.match("4", tokens("444")) is None
    store.unpin(matches[1].source_row, matches[1].row)
    assert store.match("4", tokens("444")).row == matches[1].row


def test_much_that_is_being_computed_is_waited_for_and_little_is_not(store):
    store.match("a", tokens("123456"))
    assert store.match("b", tokens("12345")).num_matched == 5  # all of it: a match
    assert store.match("c", tokens("123499")) is None  # four of six are on their way
    assert store.match("c", tokens("123999")).num_matched == 0


def test_nothing_is_believed_after_forgetting(store):
    fill(store, "a", "12345")
    store.forget()
    assert not store.has("a") and fill(store, "a", "12345").num_matched == 0


def test_a_shorter_prefix_leaves_nothing_of_the_longer_one_to_be_found(store):
    row = fill(store, "a", "123456").row
    assert store.keep("a", tokens("12")) == row
    match = store.match("b", tokens("123456"))
    assert (match.source_row, match.num_matched) == (row, 2) and match.row != row
