"""Each validator by itself: one thing that it accepts, and one bad thing for each reason."""

import asyncio
import copy
import json

import pytest

from orchestra_jax.data.synthesis.duplicates import find_duplicates
from orchestra_jax.data.synthesis.records import DataModel, FunctionSource, Reference, SubjectEntries
from orchestra_jax.data.synthesis.sandboxed import make_domain
from orchestra_jax.data.synthesis.stages.entries import check_entries
from orchestra_jax.data.synthesis.stages.entry_checks import check_entry
from orchestra_jax.data.synthesis.stages.functions import check_source
from orchestra_jax.data.synthesis.stages.schema import make_schema
from orchestra_jax.data.synthesis.stages.tasks import read_task
from orchestra_jax.data.synthesis.writer import Rejected, read_json
from orchestra_jax.environments.functions.function import FunctionBroken, FunctionRefused, run_function
from orchestra_jax.environments.functions.task import FunctionTask, GoldCall, UserScenario
from orchestra_jax.tools.sandbox.python_sandbox import PythonSandbox
from tests.data.synthesis import bakery

MODEL = DataModel(
    {name: {**schema, "additionalProperties": False} for name, schema in bakery.MODEL["tables"].items()},
    {"cakes": "cake_id", "orders": "order_id"},
    (Reference("orders", "cake_id", "cakes"),),
)


def source_of(written):
    fields = ("name", "description", "parameters", "is_write", "source")
    return FunctionSource(*(written[field] for field in fields))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        ("Sure: [1, 2] and more", [1, 2]),
        ('Draft:\n```json\n[0]\n```\nFinal:\n```json\n{"a": [1]}\n```', {"a": [1]}),
    ],
)
def test_json_is_found_in_a_reply(text, value):
    assert read_json(text) == value


@pytest.mark.parametrize("text", ["", "no", '{"a": ', "```json\n\n```", '{"a": NaN}', "[" * 100_000])
def test_a_reply_without_json_is_rejected(text):
    with pytest.raises(Rejected) as caught:
        read_json(text)
    assert caught.value.reason == "not JSON"


def without(value, path):
    value = copy.deepcopy(value)
    holder = value
    for name in path[:-1]:
        holder = holder[name]
    del holder[path[-1]]
    return value


def with_value(value, path, new):
    value = copy.deepcopy(value)
    holder = value
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = new
    return value


GOOD = bakery.make_entries("S1-")


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (GOOD, ""),
        ({**GOOD, "orders": {}}, ""),
        ([], "wrong form"),
        ({"cakes": []}, "wrong form"),
        ({}, "empty"),
        ({**GOOD, "pies": {}}, "unknown table"),
        (bakery.make_entries("S2-"), "bad id"),
        (with_value(GOOD, ["orders", "S1-O1", "order_id"], "S1-O2"), "bad id"),
        (with_value(GOOD, ["orders", "S1-O1", "amount"], 0), "against the model"),
        (with_value(GOOD, ["orders", "S1-O1", "colour"], "red"), "against the model"),
        (without(GOOD, ["orders", "S1-O1", "state"]), "against the model"),
        (without(GOOD, ["cakes", "S1-C1"]), "dangling id"),
    ],
)
def test_entries(entries, reason):
    if not reason:
        check_entries(MODEL, entries, "S1-")
        return
    with pytest.raises(Rejected) as caught:
        check_entries(MODEL, entries, "S1-")
    assert caught.value.reason == reason


class Saying:
    """A writer that says one thing."""

    def __init__(self, value):
        self._value = value

    async def ask_json(self, *arguments):
        return self._value


YES = {"is_ok": True, "reason": ""}


@pytest.mark.parametrize(
    ("verdicts", "reason"),
    [
        ({"conforms": YES, "consistent": YES, "natural": YES}, ""),
        ({"conforms": YES, "consistent": YES, "natural": {"is_ok": False}}, "not natural"),
        ({"conforms": YES, "consistent": YES}, "no verdict"),
        ({"conforms": YES, "consistent": YES, "natural": {"is_ok": "yes"}}, "no verdict"),
        ([], "no verdict"),
    ],
)
def test_entry_checks(verdicts, reason):
    made = SubjectEntries("cakes", GOOD)
    if not reason:
        assert asyncio.run(check_entry(MODEL, made, Saying(verdicts))) is made
        return
    with pytest.raises(Rejected) as caught:
        asyncio.run(check_entry(MODEL, made, Saying(verdicts)))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"fields": {"cake_id": ""}}, "wrong form"),
        ({"name": "cake list"}, "bad name"),
        ({"fields": {"cake_id": "string", "the price": "number"}}, "bad name"),
        ({"id_field": "number"}, "no id"),
    ],
)
def test_schema(change, reason):
    from orchestra_jax.data.synthesis.records import Brief

    work = make_schema(Brief("bakery", "Cakes."), Saying({"tables": [{**bakery.TABLES[0], **change}]}), 0)
    if not reason:
        assert [table.name for table in asyncio.run(work)] == ["cakes"]
        return
    with pytest.raises(Rejected) as caught:
        asyncio.run(work)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(database, order_id):\n    return 1", ""),
        ("def f(database, *, order_id='x'):\n    return 1", ""),
        ("def f(database, order_id", "no Python"),
        ("def f(database, order_id):\n    return '\0'", "no Python"),
        ("def g(database, order_id):\n    return 1", "no single def"),
        ("f = lambda database, order_id: 1", "no single def"),
        ("print(1)\ndef f(database, order_id):\n    return 1", "no single def"),
        ("def f(order_id, database):\n    return 1", "other arguments"),
        ("def f(database, **more):\n    return 1", "other arguments"),
    ],
)
def test_source_is_looked_at_and_not_run(source, reason):
    schema = {"type": "object", "properties": {"order_id": {"type": "string"}}}
    record = FunctionSource("f", "To f.", schema, False, source)
    if not reason:
        check_source(record)
        return
    with pytest.raises(Rejected) as caught:
        check_source(record)
    assert caught.value.reason == reason


TASK = bakery.make_task("You ask for the total.", "Order S1-O1.", [("get_order", {"order_id": "S1-O1"})], ["8"])


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (TASK, ""),
        (without(TASK, ["actions"]), "wrong form"),
        ({**TASK, "actions": []}, "wrong form"),
        ({**TASK, "communicate_info": ["8" * 61]}, "wrong form"),
        (with_value(TASK, ["actions", 0, "name"], "get"), "unknown function"),
        (with_value(TASK, ["actions", 0, "arguments"], {"order_id": 1}), "wrong arguments"),
        (with_value(TASK, ["actions", 0, "arguments"], {"order_id": "a", "more": 1}), "wrong arguments"),
        (with_value(TASK, ["actions", 0, "arguments"], {}), "wrong arguments"),
        ({**TASK, "known_info": "You paid $8."}, "information given away"),
        ({**TASK, "known_info": "You paid $18."}, ""),
    ],
)
def test_tasks(task, reason):
    functions = [source_of(bakery.GET_ORDER)]
    if not reason:
        assert read_task(task, "bakery/0", "bakery", 1, functions).communicate_info == ("8",)
        return
    with pytest.raises(Rejected) as caught:
        read_task(task, "bakery/0", "bakery", 1, functions)
    assert caught.value.reason == reason


def make_task(number, text, **arguments):
    calls = (GoldCall(name="f", arguments=arguments),)
    return FunctionTask(task_id=str(number), domain="d", scenario=UserScenario(reason_for_call=text), gold_calls=calls)


def test_near_duplicates_go_and_the_first_stays():
    tasks = [
        make_task(0, "please cancel the order of two birthday cakes for friday", order="O1"),
        make_task(1, "tell me what the wedding cake of my sister costs", order="O2"),
        make_task(2, "Please cancel the order of two birthday cakes for Friday!", order="O1"),
        make_task(3, "please cancel the order of nine birthday cakes for sunday", order="O7"),
    ]
    # 0 and 2 are one set of triples; 0 and 3 share 4 triples (please cancel the, cancel the order, the order of,
    # birthday cakes for) of the 10 (8 of the words, 2 across to the call) that each has: 4 / 16.
    assert find_duplicates(tasks, 0.8) == {"2": "0"}
    assert find_duplicates(tasks, 0.2) == {"2": "0", "3": "0"}
    assert find_duplicates(tasks, 1.0) == {}


@pytest.fixture(scope="module")
def sandbox():
    with PythonSandbox(timeout_s=4.0) as made:
        yield made


def test_a_sandboxed_function_is_like_any_other(sandbox):
    records = [source_of(each) for each in (bakery.GET_ORDER, bakery.CANCEL_ORDER, bakery.CHANGE_AMOUNT)]
    domain = make_domain("bakery", "", MODEL, GOOD, records, sandbox)
    database = domain.open_database()

    def call(name, **arguments):
        return run_function(domain.functions_by_name, database, name, arguments)

    assert json.loads(call("get_order", order_id="S1-O1"))["total_usd"] == 8.0
    assert database.changes == {} and database.touched == {("orders", "S1-O1"), ("cakes", "S1-C1")}
    call("cancel_order", order_id="S1-O2")
    call("change_amount", order_id="S1-O1", amount=3)
    assert {key: entry["state"] for key, entry in database.changes.items()} == {
        ("orders", "S1-O1"): "open",
        ("orders", "S1-O2"): "cancelled",
    }
    assert json.loads(call("get_order", order_id="S1-O1"))["total_usd"] == 12.0  # a call sees what calls before it did
    with pytest.raises(FunctionRefused, match="no such order"):
        call("get_order", order_id="S9")
    with pytest.raises(FunctionRefused, match="'order_id' is a required property"):
        call("get_order")
    with pytest.raises(FunctionBroken, match="change_amount leaves orders.S1-O1 against the data model"):
        call("change_amount", order_id="S1-O1", amount=0)
    assert database.changes["orders", "S1-O1"]["amount"] == 3


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("reads", "PermissionError"),
        ("connects", "connects"),
        ("loops", "killed after 4 s"),
        ("leaves", "ended without a result"),
        ("no_json", "TypeError"),
        ("writes", "is a read function and has changed"),
        ("breaks_model", "against the data model"),
    ],
)
def test_a_bad_function_breaks_with_its_name_and_changes_nothing(sandbox, name, told):
    domain = make_domain("bakery", "", MODEL, GOOD, [source_of(bakery.BAD_FUNCTIONS[name])], sandbox)
    database = domain.open_database()
    with pytest.raises(FunctionBroken, match=told) as caught:
        run_function(domain.functions_by_name, database, name, {}, timeout_s=60.0)
    assert str(caught.value).startswith(name) and database.changes == {}
