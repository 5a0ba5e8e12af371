"""A function of a domain: what a tool call runs on the episode's database.

In Python it is a plain function whose first parameter is the database; the others make the JSON schema, their
descriptions stand in `Annotated`, its own in the docstring:

    def cancel_order(database, order_id: Annotated[str, "such as O17"]) -> str:
        \"""Cancel an order that has not been shipped.\"""

It says no by raising FunctionRefused with a sentence for the policy. All else that goes wrong is the function's fault,
and is a FunctionBroken that names it: an exception, a result that is no JSON, an entry that breaks the data model, or
more time than it is given.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import inspect
import json
import signal
import threading
import typing
from collections.abc import Callable, Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from orchestra_jax.environments.functions.database import Database

TIMEOUT_S = 5.0


class FunctionRefused(Exception):
    """The function says no: its message is the result that the policy reads, and nothing has changed."""


class FunctionBroken(Exception):
    """The function itself is at fault; the message names it."""


@dataclasses.dataclass(frozen=True)
class Function:
    """`call(database, arguments)` returns JSON or records; `is_write` says whether it may change the database."""

    name: str
    description: str
    parameters_schema: dict[str, object]
    call: Callable[[Database, dict[str, object]], object] = dataclasses.field(repr=False)
    is_write: bool = False
    summarize: Callable[[str], str] = str  # the result in a word or two, for policies with short prompts

    @property
    def schema(self) -> dict[str, object]:
        """In the OpenAI function format."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters_schema}
        return {"type": "function", "function": function}


def make_function(function: Callable, *, is_write: bool, summarize: Callable[[str], str] = str) -> Function:
    """The `Function` that a plain Python function describes. ValueError for one without docstring or types."""
    name = function.__name__
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, object] = {}
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.name not in hints:
            raise ValueError(f"{name}: the argument {parameter.name!r} has no type: annotate it")
        hint = hints[parameter.name]
        texts = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, str)]
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[parameter.name] = (hint, Field(default, description=texts[0] if texts else None))
    if not function.__doc__:
        raise ValueError(f"{name}: no docstring: it is the description that the policy reads")
    arguments_model = create_model(name, __config__=ConfigDict(extra="forbid", strict=True), **fields)

    def call(database: Database, arguments: dict[str, object]) -> object:
        try:
            given = arguments_model.model_validate(arguments)
        except ValidationError as error:
            first = error.errors()[0]
            raise FunctionRefused(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        return function(database, **given.__dict__)

    description = " ".join(inspect.cleandoc(function.__doc__).split())
    return Function(name, description, _without_titles(arguments_model.model_json_schema()), call, is_write, summarize)


def run_function(
    functions: Mapping[str, Function],
    database: Database,
    name: str,
    arguments: dict[str, object],
    timeout_s: float = TIMEOUT_S,
) -> str:
    """Runs one call as a transaction; returns the result as JSON text.

    FunctionRefused for a call that is not possible, FunctionBroken for a function that is at fault; then nothing has
    changed.
    """
    if name not in functions:
        raise FunctionRefused(f"there is no function {name[:40]!r}; the functions are {', '.join(functions)}")
    function = functions[name]
    try:
        with _deadline(name, timeout_s):
            text = _as_json(name, function.call(database, arguments))
        if not function.is_write and database.is_written:
            raise FunctionBroken(f"{name} is a read function and has changed the database: make it a write function")
        database.commit()
    except (FunctionRefused, FunctionBroken):
        database.rollback()
        raise
    except RecursionError as error:
        database.rollback()
        raise FunctionBroken(f"{name} calls itself without end") from error
    except Exception as error:  # whatever somebody's function raises is data here, with its name
        database.rollback()
        raise FunctionBroken(f"{name} raised {type(error).__name__}: {error}"[:300]) from error
    return text


def _as_json(name: str, result: object) -> str:
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, default=_as_plain, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FunctionBroken(f"{name} returns what is no JSON: {error}"[:300]) from error


def _as_plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"a {type(value).__name__}")


def _without_titles(schema):
    if isinstance(schema, dict):
        return {
            key: {name: _without_titles(each) for name, each in value.items()}
            if key == "properties"
            else _without_titles(value)
            for key, value in schema.items()
            if key != "title"
        }
    return [_without_titles(each) for each in schema] if isinstance(schema, list) else schema


def _deadline(name: str, timeout_s: float):
    """FunctionBroken from within a function that runs too long, in whatever thread it is called; what waits in C is cut
    when it comes back. A function that nobody vouches for belongs into the sandbox."""
    told = f"{name} ran longer than {timeout_s:g} s"
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _deadline_by_alarm(told, timeout_s)
    return _deadline_by_watch(told, timeout_s)


@contextlib.contextmanager
def _deadline_by_alarm(told: str, timeout_s: float):
    """Signals reach the main thread alone."""

    def stop(*_):
        raise FunctionBroken(told)

    previous = signal.signal(signal.SIGALRM, stop)
    # Repeats: what is raised inside a finalizer or a callback of the garbage collector (jax has one) is dropped.
    left_s, interval_s = signal.setitimer(signal.ITIMER_REAL, timeout_s, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left_s, interval_s)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def _deadline_by_watch(told: str, timeout_s: float):
    """Another thread watches the clock and has the interpreter raise in this one."""

    class TooSlow(FunctionBroken):  # the interpreter takes a class, and makes the exception itself
        def __init__(self):
            super().__init__(told)

    caller, is_over, lock = ctypes.c_ulong(threading.get_ident()), threading.Event(), threading.Lock()

    def watch():
        while not is_over.wait(timeout_s):  # repeats, as the alarm does
            with lock:
                if not is_over.is_set():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(caller, ctypes.py_object(TooSlow))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        with lock:
            is_over.set()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(caller, None)  # one that has not been raised yet never is
