"""Stage 3, data model: tables in words -> a JSON schema for the entries of each, and the references between them.

A schema and no class: a model's code would have to be run to be looked at, a schema is data.
"""

from __future__ import annotations

import json

import jsonschema

from orchestra_jax.data.loaders.rows import TEXT, RowError, check_schema, list_schema, object_schema
from orchestra_jax.data.synthesis.records import DataModel, Reference, TableSchema
from orchestra_jax.data.synthesis.writer import Rejected, Writer

SYSTEM = "You write JSON schemas (draft 2020-12). Answer with JSON alone."
PROMPT = (
    "For each table below write the JSON schema of one entry: an object with exactly the named "
    "properties, their types, "
    "enums and limits, and which are required. Name the fields that hold ids of another table.\n\nTables:\n{tables}\n\n"
    'Form: {{"tables": {{"<table>": {{"type": "object", "properties": {{...}}, "required": [...]}}}}, "references": '
    '[{{"table": "...", "field": "...", "to": "..."}}]}}'
)
FORM = object_schema(
    {
        "tables": {"type": "object", "additionalProperties": {"type": "object"}},
        "references": list_schema(object_schema({"table": TEXT, "field": TEXT, "to": TEXT})),
    }
)


async def make_data_model(tables: tuple[TableSchema, ...], writer: Writer, sample: int) -> DataModel:
    prompt = PROMPT.format(tables=json.dumps([vars(table) for table in tables], indent=1))
    written = await writer.ask_json("data model", SYSTEM, prompt, sample)
    try:
        check_schema(FORM, written, "the data model")
    except RowError as error:
        raise Rejected("wrong form", str(error)) from error
    schemas = written["tables"]
    if set(schemas) != {table.name for table in tables}:
        raise Rejected("other tables", f"the data model has the tables {sorted(schemas)}, not those of the schema")
    for table in tables:
        _check_entry_schema(table, schemas[table.name])
    references = tuple(Reference(each["table"], each["field"], each["to"]) for each in written["references"])
    for each in references:
        if each.table not in schemas or each.to not in schemas or each.field not in schemas[each.table]["properties"]:
            raise Rejected("bad reference", f"{each.table}.{each.field} -> {each.to} names what is not there")
    closed = {name: {**schema, "additionalProperties": False} for name, schema in schemas.items()}
    return DataModel(closed, {table.name: table.id_field for table in tables}, references)


def _check_entry_schema(table: TableSchema, schema: dict) -> None:
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise Rejected("no JSON schema", f"the schema of {table.name} is none: {error.message}") from error
    properties = schema.get("properties")
    if schema.get("type") != "object" or not isinstance(properties, dict) or set(properties) != set(table.fields):
        raise Rejected(
            "other fields", f"the schema of {table.name} does not have the properties {sorted(table.fields)}"
        )
    if table.id_field not in schema.get("required", ()) or "$ref" in json.dumps(schema):
        raise Rejected(
            "no id", f"the schema of {table.name} must require {table.id_field} and refer to no other schema"
        )
