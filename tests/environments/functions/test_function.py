"""A function becomes a tool by its signature; what goes wrong in it is named, and undone."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestra_jax.environments.functions.function import (
    FunctionBroken,
    FunctionRefused,
    make_function,
    run_function,
)
from tests.environments.functions.small_domain import add_note, make_domain


def raises(database):
    """Break."""
    database.orders["O1"].status = "half way"
    raise KeyError("oops")


def loops(database):
    """Never come back."""
    while True:
        database.orders["O1"].status += "!"


def recurses(database):
    """Call itself."""
    return recurses(database)


def returns_a_set(database):
    """Return what is no JSON."""
    return {"a": {1, 2}}


def returns_nan(database):
    """Return what is no number in JSON."""
    return {"a": float("nan")}


def writes_nonsense(database):
    """Break the data model."""
    database.orders["O1"].status = 7


def test_the_schema_is_that_of_the_signature():
    assert make_function(add_note, is_write=True).schema == {
        "type": "function",
        "function": {
            "name": "add_note",
            "description": "Write a note into the shop's book.",
            "parameters": {
                "type": "object",
                "properties": {"text": {"type": "string"}, "count": {"type": "integer", "default": 1}},
                "required": ["text"],
                "additionalProperties": False,
            },
        },
    }
    assert make_domain().functions[0].parameters_schema["properties"]["order_id"]["description"] == "such as O1"


def test_an_undescribed_function_is_refused():
    with pytest.raises(ValueError, match="the argument 'x' has no type"):
        make_function(lambda database, x: x, is_write=False)
    with pytest.raises(ValueError, match="no docstring"):
        make_function(lambda database: 1, is_write=False)
    with pytest.raises(ValueError, match="two functions of the name 'add_note'"):
        make_domain(add_note)


def call(domain, database, name, timeout_s=5.0, **arguments):
    return run_function(domain.functions_by_name, database, name, arguments, timeout_s)


def test_a_result_is_json_and_a_string_is_itself():
    domain = make_domain()
    database = domain.open_database()
    assert call(domain, database, "cancel_order", order_id="O1") == "done"
    shown = call(domain, database, "get_order", order_id="O1")
    assert shown == '{"order_id": "O1", "status": "cancelled", "lines": []}'
    assert call(domain, database, "add_note", text="a", count=2) == "2"


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("get_order", {"order_id": "O7"}, "there is no order O7"),
        ("cancel_order", {"order_id": "O2"}, "order O2 is shipped"),  # and has emptied its lines on the way
        ("get_order", {}, "get_order: order_id: Field required"),
        ("get_order", {"order_id": "O1", "x": 1}, "get_order: x: Extra inputs"),
        ("add_note", {"text": "a", "count": "2"}, "add_note: count: Input should be a valid integer"),
        ("fly", {}, "there is no function 'fly'; the functions are get_order, cancel_order, add_note"),
    ],
)
def test_a_call_that_is_not_possible_changes_nothing(name, arguments, told):
    domain = make_domain()
    database = domain.open_database()
    with pytest.raises(FunctionRefused, match=told):
        call(domain, database, name, **arguments)
    assert not database.changes and not database.touched


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (raises, "raises raised KeyError: 'oops'"),
        (loops, "loops ran longer than 0.1 s"),
        (recurses, "recurses calls itself without end"),
        (returns_a_set, "returns_a_set returns what is no JSON: a set"),
        (returns_nan, "returns_nan returns what is no JSON"),
        (writes_nonsense, "writes_nonsense raised ValueError: orders O1.status: Input should be a valid string, got 7"),
    ],
)
def test_a_function_at_fault_is_named_and_undone(function, told):
    domain = make_domain(function)
    database = domain.open_database()
    with pytest.raises(FunctionBroken, match=told):
        call(domain, database, function.__name__, timeout_s=0.1)
    assert not database.changes and not database.touched


class Swallows:
    """Its finalizer lasts until the alarm, whose exception the interpreter then drops."""

    def __del__(self):
        time.sleep(1.0)


def swallows(database):
    """Go on for long after the first alarm, which came inside a finalizer."""
    Swallows()
    end_s = time.monotonic() + 10
    while time.monotonic() < end_s:
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_alarm_that_is_dropped_strikes_again():
    domain = make_domain(swallows)
    with pytest.raises(FunctionBroken, match="swallows ran longer than 0.1 s"):
        call(domain, domain.open_database(), "swallows", timeout_s=0.1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("function", [loops, swallows])
def test_a_deadline_holds_in_a_thread_without_alarms_too(function):
    """And strikes nothing that is called there behind it."""
    domain = make_domain(function)

    def play():
        for _ in range(2):
            with pytest.raises(FunctionBroken, match=f"{function.__name__} ran longer than 0.1 s"):
                call(domain, domain.open_database(), function.__name__, timeout_s=0.1)
        time.sleep(0.15)
        return call(domain, domain.open_database(), "get_order", timeout_s=0.1, order_id="O1")

    with ThreadPoolExecutor(1) as pool:
        assert "O1" in pool.submit(play).result(timeout=20)


def test_a_read_function_does_not_write():
    domain = make_domain()
    functions = {"add_note": make_function(add_note, is_write=False)}
    with pytest.raises(FunctionBroken, match="is a read function and has changed the database"):
        run_function(functions, domain.open_database(), "add_note", {"text": "a"})
