"""Functions that a model wrote, run where they can do no harm: each call is a program of its own in the sandbox.

The program is given the tables as JSON, runs one function, and prints its result, the ids that it took and the entries
that it changed. What is printed is JSON that is read as data; no text of a model is run or imported here. To the rest
of the system such a function is like any other (environments/functions/function.py), only slower.
"""

from __future__ import annotations

import json

import jsonschema

from orchestra_jax.data.synthesis.records import DataModel, Entries, FunctionSource
from orchestra_jax.environments.functions.database import Database
from orchestra_jax.environments.functions.domain import Domain
from orchestra_jax.environments.functions.function import Function, FunctionBroken, FunctionRefused
from orchestra_jax.tools.sandbox.python_sandbox import ProgramStatus, PythonSandbox

_HARNESS = """
import io, json, sys

class Refused(Exception):
    pass

taken = {}

class Table(dict):
    def __init__(self, name, entries):
        super().__init__(entries)
        self.table_name = name

    def __getitem__(self, key):
        entry = super().__getitem__(key)
        taken[self.table_name, key] = True
        return entry

    def get(self, key, default=None):
        return self[key] if key in self else default

def as_text(value):
    return json.dumps(value, sort_keys=True, allow_nan=False)

request = json.loads(REQUEST)
database = {name: Table(name, entries) for name, entries in request["tables"].items()}
before = {name: {key: as_text(entry) for key, entry in table.items()} for name, table in database.items()}
names = {"Refused": Refused}
printed, sys.stdout = sys.stdout, io.StringIO()
answer = {"status": "ok", "result": None, "taken": [], "changes": []}
try:
    exec(compile(request["source"], "<function>", "exec"), names)
    answer["result"] = names[request["name"]](database, **request["arguments"])
    for name in [*before, *database]:
        entries = dict(database.get(name, {}))
        for key, entry in entries.items():
            if before.get(name, {}).get(key) != as_text(entry):
                answer["changes"].append([name, key, entry])
        answer["changes"] += [[name, key, None] for key in before.get(name, {}) if key not in entries]
    answer["taken"] = [list(pair) for pair in taken]
    text = json.dumps(answer, allow_nan=False)
except Refused as error:
    text = json.dumps({"status": "refused", "told": str(error)})
except (Exception, SystemExit) as error:
    text = json.dumps({"status": "broken", "told": f"{type(error).__name__}: {error}"[:300]})
printed.write(text)
"""


def make_sandboxed_function(
    record: FunctionSource, model: DataModel, sandbox: PythonSandbox, nonce: str = ""
) -> Function:
    """The function as the environment takes it. `nonce` makes another program of it: the sandbox remembers results."""
    arguments_schema = {**record.parameters_schema, "additionalProperties": False}

    def call(database: Database, arguments: dict[str, object]) -> object:
        error = next(jsonschema.Draft202012Validator(arguments_schema).iter_errors(arguments), None)
        if error is not None:
            raise FunctionRefused(f"{record.name}: {error.message}"[:300])
        tables = {name: dict(database.table(name).items()) for name in sorted(database.base.tables)}
        answer = _run(record, tables, arguments, sandbox, nonce)
        if answer["status"] == "refused":
            raise FunctionRefused(answer["told"])
        if answer["status"] == "broken":
            raise FunctionBroken(f"{record.name} raised {answer['told']}")
        _apply(record.name, model, database, answer)
        return answer["result"]

    return Function(record.name, record.description, record.parameters_schema, call, record.is_write)


def make_domain(
    name: str,
    policy: str,
    model: DataModel,
    entries: Entries,
    functions: list[FunctionSource],
    sandbox: PythonSandbox,
    nonce: str = "",
) -> Domain:
    """The domain that all of it makes; every table of the model is there, if empty."""
    data = {table: entries.get(table, {}) for table in model.entry_schemas}
    return Domain(name, policy, data, [make_sandboxed_function(each, model, sandbox, nonce) for each in functions])


def _run(record: FunctionSource, tables: Entries, arguments: dict, sandbox: PythonSandbox, nonce: str) -> dict:
    request = json.dumps({"tables": tables, "source": record.source, "name": record.name, "arguments": arguments})
    program = f"# {nonce}\nREQUEST = {request!r}\n{_HARNESS}"
    result = sandbox.run(program)
    if result.status != ProgramStatus.OK:
        raise FunctionBroken(f"{record.name}: {result.stderr_line or result.status}"[:300])
    try:
        return json.loads(result.stdout)
    except ValueError as error:
        raise FunctionBroken(f"{record.name} ended without a result, or with one that is too long") from error


def _apply(name: str, model: DataModel, database: Database, answer: dict) -> None:
    """Takes and changes what the program took and changed. FunctionBroken for an entry that the data model refuses."""
    for table, key, entry in answer["changes"]:
        if table not in model.entry_schemas:
            raise FunctionBroken(f"{name} writes into {table!r}, which is no table")
        if entry is None:
            continue
        error = next(jsonschema.Draft202012Validator(model.entry_schemas[table]).iter_errors(entry), None)
        if error is not None:
            raise FunctionBroken(f"{name} leaves {table}.{key} against the data model: {error.message}"[:300])
    for table, key in answer["taken"]:
        if key in database.table(table):
            database.table(table)[key]  # touches it
    for table, key, entry in answer["changes"]:
        if entry is None:
            del database.table(table)[key]
        else:
            database.table(table)[key] = entry
