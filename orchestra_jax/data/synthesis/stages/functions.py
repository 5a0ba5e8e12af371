"""Stage 6, functions: brief, data model and entries -> functions that the policy will call, each tried in the sandbox.

A function passes if its source is one plain `def` with the arguments of its schema, and its examples run on the
database: no exception but a refusal, a JSON result, the same one twice, the data model kept, nothing written by a read.
"""

from __future__ import annotations

import ast
import asyncio
import json

import jsonschema

from orchestra_jax.data.loaders.rows import TEXT, RowError, check_schema, list_schema, object_schema
from orchestra_jax.data.synthesis.records import Brief, DataModel, Entries, FunctionSource
from orchestra_jax.data.synthesis.sandboxed import make_domain
from orchestra_jax.data.synthesis.writer import Rejected, Writer
from orchestra_jax.environments.functions.function import FunctionBroken, FunctionRefused, run_function
from orchestra_jax.tools.sandbox.python_sandbox import PythonSandbox

SYSTEM = "You write small, exact Python functions for a customer-service system. Answer with JSON alone."
PROMPT = (
    "Domain {name}: {description}\n\nData model:\n{model}\n\nSome entries:\n{entries}\n\nWrite {count} functions that "
    "agents of this domain use most, reading and writing ones. Each is plain Python over `database`, a dict "
    "{{table: {{id: entry}}}}, uses nothing but the standard library, calls no other of the "
    "functions, takes entries by "
    "their id, depends on neither clock nor chance, returns JSON, and says no by `raise Refused('why')`. Give examples "
    "of arguments that work on the entries above.\nForm: "
    '{{"functions": [{{"name": "get_job", "description": "Look a job up.", "parameters": {{"type": "object", '
    '"properties": {{"job_id": {{"type": "string", "description": "such as S1-J7"}}}}, "required": ["job_id"]}}, '
    '"is_write": false, "source": "def get_job(database, job_id):\\n    if job_id not in database[\'jobs\']:\\n        '
    "raise Refused('there is no such job')\\n    return database['jobs'][job_id]\\n\", "
    '"examples": [{{"job_id": "S1-J7"}}]}}]}}'
)
FORM = object_schema(
    {
        "name": TEXT,
        "description": TEXT,
        "parameters": object_schema({"type": {"const": "object"}, "properties": {"type": "object"}}),
        "is_write": {"type": "boolean"},
        "source": TEXT,
        "examples": list_schema({"type": "object"}, least=1),
    }
)


async def make_functions(
    brief: Brief, model: DataModel, entries: Entries, count: int, sample: int, writer: Writer, sandbox: PythonSandbox
) -> list[FunctionSource | Rejected]:
    """The functions of one request; one that fails is Rejected in its place."""
    shown = json.dumps(model.entry_schemas, indent=1)
    prompt = PROMPT.format(
        name=brief.name, description=brief.description, model=shown, entries=json.dumps(entries, indent=1), count=count
    )
    written = await writer.ask_json("functions", SYSTEM, prompt, sample)
    if not isinstance(written, dict) or not isinstance(written.get("functions"), list):
        raise Rejected("wrong form", "there is no list of functions")
    return [await asyncio.to_thread(_check, each, model, entries, sandbox) for each in written["functions"]]


def _check(written: object, model: DataModel, entries: Entries, sandbox: PythonSandbox) -> FunctionSource | Rejected:
    try:
        check_schema(FORM, written, "a function")
        record = FunctionSource(
            written["name"], written["description"], written["parameters"], written["is_write"], written["source"]
        )
        check_source(record)
        try_examples(record, written["examples"], model, entries, sandbox)
        return record
    except RowError as error:
        return Rejected("wrong form", str(error))
    except Rejected as rejected:
        return rejected


def check_source(record: FunctionSource) -> None:
    """Rejected for source that is not one def with the arguments of the schema. The source is parsed and never run."""
    try:
        jsonschema.Draft202012Validator.check_schema(record.parameters_schema)
    except jsonschema.SchemaError as error:
        raise Rejected("no JSON schema", f"{record.name}: {error.message}") from error
    try:
        body = ast.parse(record.source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Rejected("no Python", f"{record.name}: {error}") from error
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef) or body[0].name != record.name:
        raise Rejected("no single def", f"the source of {record.name} is not one def of that name")
    arguments = body[0].args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    wanted = list(record.parameters_schema["properties"])
    if names[:1] != ["database"] or sorted(names[1:]) != sorted(wanted) or arguments.vararg or arguments.kwarg:
        raise Rejected("other arguments", f"{record.name} takes {names}, its schema says database and {wanted}")


def try_examples(
    record: FunctionSource, examples: list[dict], model: DataModel, entries: Entries, sandbox: PythonSandbox
) -> None:
    """Rejected if an example breaks the function, two runs differ, or all examples are refused."""
    num_done = 0
    for arguments in examples:
        results = []
        for nonce in ("first", "second"):  # another program, so that the second run is no remembered one
            domain = make_domain("examples", "", model, entries, [record], sandbox, nonce)
            database = domain.open_database()
            try:
                text = run_function(domain.functions_by_name, database, record.name, arguments)
                results.append((text, database.changes))
            except FunctionRefused as error:
                results.append((str(error), None))
            except FunctionBroken as error:
                raise Rejected("fails in the sandbox", f"{record.name}({arguments}): {error}") from error
        if results[0] != results[1]:
            raise Rejected("not deterministic", f"{record.name}({arguments}) gives {results[0]} and {results[1]}"[:300])
        num_done += results[0][1] is not None
    if not num_done:
        raise Rejected("examples refused", f"{record.name} refuses all its examples: {results[0][0]}")
